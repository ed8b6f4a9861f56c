"""Memory of a fine-tune before it is run: a formula, a simulator, a planner, and what a GPU measured.

    estimate(model, method, batch, seq, …) -> Memory     closed form: instant, each term a named function
    simulate(model, method, batch, seq, …) -> Memory     the real training step without data: every allocation followed
    measure(…)                                           torch.cuda's own counters, where there is a GPU
    plan(model, gpu, …)                                  what fits, what is best of it, and why the rest loses

All bytes are bytes: `units.py` writes them as GiB (2**30) or GB (10**9), never one for the other.
"""
from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {"Job": "job", "Memory": "memory", "estimate": "formula", "simulate": "simulator", "measure": "measurement",
           "plan": "planner"}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
