"""What the chapters' exercises share: drawing their cases, and turning what a work returned into leaves to compare.

A probe may use all of it: the module goes into the sandbox (`stage.INSIDE`) and holds nothing to compare with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def randn(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers from this generator."""
    return torch.randn(*shape, generator=rng, dtype=dtype)


def gradients(output: Any, **wanted: Tensor) -> dict[str, Any]:
    """{"gradient of NAME": tensor, or a sentence on why there is none} for a fixed weighted sum of the output."""
    if not isinstance(output, Tensor) or not output.requires_grad:
        return {f"gradient of {name}": "none: no gradient flows back from the output" for name in wanted}
    weights = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
    found = torch.autograd.grad((output * weights).sum(), list(wanted.values()), allow_unused=True)
    return {f"gradient of {name}": "none: the output does not depend on it" if g is None else g
            for name, g in zip(wanted, found)}


def plain(value: Any) -> Any:
    """What a function returned, as data: a tensor without its graph, or the value itself."""
    return value.detach() if isinstance(value, Tensor) else value
