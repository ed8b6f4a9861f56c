"""Parameter-efficient fine-tuning, implemented to be read: one idea a file, equal to the production libraries."""

__version__ = "0.1.0"
