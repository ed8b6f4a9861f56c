"""One training step, as a script or transformers' Trainer runs it: forward, loss, backward, clip, step.

    zero_grad(set_to_none=True)                     gradients of the step before are given back
    for each of `accumulate` batches:
        outputs = model(ids, mask, labels=ids)      transformers' own loss, logits in float32
        outputs.loss.backward()
    clip_grad_norm_(parameters, 1.0)
    optimizer.step()
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pefttools.vram.job import Job
from pefttools.vram.ledger import Ledger
from pefttools.vram.sums import run_engine


@contextlib.contextmanager
def as_on_cuda(padded: bool) -> Iterator[None]:
    """Python code that asks for the device or for a value: answered as for a CUDA tensor with `padded` rows or none."""
    import transformers.masking_utils as masking
    from torch.utils import _foreach_utils as foreach

    before = masking.fast_all, foreach._get_foreach_kernels_supported_devices
    masking.fast_all = lambda tensor: not padded           # "is no token masked?" cannot be read from a meta tensor
    foreach._get_foreach_kernels_supported_devices = lambda: [*before[1](), "meta"]
    try:
        yield
    finally:
        masking.fast_all, foreach._get_foreach_kernels_supported_devices = before


def batch_of(model: nn.Module, batch: int, seq: int, mask: bool) -> dict[str, Any]:
    ids = torch.empty(batch, seq, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "labels": torch.empty_like(ids)}
    if mask:
        inputs["attention_mask"] = torch.empty_like(ids)
    return inputs


def run_step(model: nn.Module, optimizer: Any, ledger: Ledger, job: Job, shapes: list[tuple[int, int]],
             use_cache: bool = False, mask: bool = False, after_forward: Callable[[], None] = lambda: None) -> None:
    """One optimizer step over the batches `shapes`, written into the ledger."""
    ledger.begin("forward", "zero_grad")
    optimizer.zero_grad(set_to_none=True)
    outputs = None
    for batch, seq in shapes:
        ledger.begin("forward")
        inputs = batch_of(model, batch, seq, mask)
        outputs = model(**inputs, use_cache=use_cache, num_items_in_batch=batch * seq)
        loss = outputs.loss
        after_forward()
        if not job.keep_outputs:
            outputs = None
        if job.accumulate > 1:
            loss = loss / job.accumulate
        ledger.begin("backward")
        run_engine(loss)
    ledger.begin("step", "clip")
    parameters = [p for p in model.parameters() if p.grad is not None]
    if job.clip:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    ledger.begin("step", "optimizer")
    optimizer.step()
    del outputs, loss
    ledger.begin("between")
