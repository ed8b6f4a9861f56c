"""Speed as ratios measured side by side, memory from a trace of every allocation: see `make bench`."""
