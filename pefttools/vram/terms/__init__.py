"""The terms of the formula, one idea a file; each a function of a job and the dimensions of `pefttools.vram.shape`."""
