"""The exercises of the class that is attacked. Workers import this file by its path: it imports nothing beside it."""

from __future__ import annotations

NAMES = ("lora-forward", "count-parameters", "lora-init", "lora-q-scale")


def entries(chapter: str = "02_lora") -> dict:
    """{name: exercise} of the class."""
    from pefttools.grading.exercises import exercise

    return {name: exercise(name) for name in NAMES}
