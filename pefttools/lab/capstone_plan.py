"""What fits, method by method, before anything is loaded: chapter 11's exercise `plan-it`, as the library does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

MARGIN = 1.05      # the allocator keeps a little more than is in use


def plan_it(methods: Sequence[str], examples: int, room: int,
            predict: Callable[[str, int, bool], int]) -> dict[str, Any]:
    """{method: {"batch", "accumulate", "checkpointing", "bytes"}}, None where nothing fits.

    methods    names; examples: rows of one optimizer step, a power of two; room: bytes
    predict    (method, batch, checkpointing) → bytes at the peak of a step

    The largest batch without checkpointing whose prediction, times MARGIN, is at most `room`; only where there is none,
    the largest with checkpointing. batch · accumulate is `examples`.
    """
    plan: dict[str, Any] = dict.fromkeys(methods)
    for method in methods:
        choices = [(examples >> halved, again) for again in (False, True) for halved in range(examples.bit_length())]
        for batch, checkpointing in choices:
            need = predict(method, batch, checkpointing)
            if need * MARGIN <= room:
                plan[method] = {"batch": batch, "accumulate": examples // batch, "checkpointing": checkpointing,
                                "bytes": need}
                break
    return plan
