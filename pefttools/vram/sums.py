"""Where a tensor is used twice, its gradients are added: into the first of them, or into new memory?

    y ──► relu ──► …  ┐      the engine has g₁ from one use when g₂ comes from the other:
    └─────────────► + ┘      nobody else holds g₁: g₁ += g₂       otherwise: a third tensor
"""
from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ADD = torch.ops.aten.add.Tensor
ENGINE = "run_engine"                       # the function that calls autograd's engine, here and in step.py


def run_engine(loss: Tensor) -> None:
    """What loss.backward() calls in the end. (That one switches function modes off, and with them, in the layers that
    checkpointing runs again, the attention of `kernels`.)"""
    torch.autograd.Variable._execution_engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (),
                                                           allow_unreachable=True, accumulate_grad=True)


def sums_in_place(args: tuple) -> bool:
    """Whether autograd's engine, adding a second gradient of one tensor, would write into the first.

    It does where nobody else holds the first (torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`), but
    never for meta tensors or under a mode; so what it would do for a CUDA tensor is found here: is this sum the
    engine's own, and are its references as few as in a sum that is known to be in place?
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("_fn", "inner"):        # torch's wrappers of the mode
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != ENGINE or torch.is_grad_enabled():
        return False
    return _references(args) == last_reference()


def _references(args: tuple) -> tuple[int, int]:
    return args[0]._use_count(), torch._C._storage_Use_Count(args[0].untyped_storage()._cdata)


@functools.cache
def last_reference() -> tuple[int, int]:
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func is ADD and not torch.is_grad_enabled():
                found.append(_references(args))
            return func(*args, **(kwargs or {}))

    found: list[tuple[int, int]] = []
    with torch.utils._python_dispatch._disable_current_modes(), torch.enable_grad():
        y = torch.empty(2, device="meta", requires_grad=True) * 2
        loss = (y + y.relu().relu()).exp().sum()
        with Count():
            run_engine(loss)
    return found[0]
