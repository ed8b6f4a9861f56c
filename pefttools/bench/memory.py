"""Memory by allocation trace: what a forward pass keeps for its backward, and the peak of a whole step, to the byte.

    kept_bytes(lambda: layer(x))                 bytes that only the autograd graph keeps alive
    peak_bytes(lambda: layer(x).sum().backward())    most bytes alive at one moment

Below autograd every operation of PyTorch passes through `Trace`, a TorchDispatchMode. A storage that an operation makes
is added when it appears and subtracted when it is freed; tensors that share a storage count once. What existed before
the trace began (parameters, inputs) is never counted.

    x ──► linear ──► relu ──► linear ──► y       x, weights: there before, not counted
                       └ kept: T·d_ff·4 bytes    relu's output, which the second linear saves as well: one storage
                                                 y: nobody saves it, so it is not kept

Worked number: 10 tokens, float32, d_ff = 8: 10 · 8 · 4 = 320 bytes kept.

Seen: everything the dispatcher makes, gradients too, for real, meta and fake tensors (no memory then: a model of any
size). Not seen: what one operation allocates and frees inside its own kernel (the CPU's flash attention has a
small buffer), and memory that never was a tensor.
"""
from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Held:
    """One storage: the operation that made it, the tensor's shape and dtype then, its bytes beyond those `before`."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    before: int = 0


class Trace(TorchDispatchMode):
    """`with Trace() as trace:` … then `trace.live`, `trace.peak` in bytes and `trace.held()`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Held] = {}
        self._finalizers: list[weakref.finalize] = []

    def held(self) -> list[Held]:
        """The storages made since the trace began that are alive now, oldest first."""
        return [held for held in self._known.values() if held.bytes > 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:      # torch.tensor([…]): its argument is the new one
            for tensor in _tensors((args, kwargs)):
                self._see(tensor, "", counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((result, args, kwargs)):        # arguments again: they may have grown
            self._see(tensor, str(func), counts=True)
        self.peak = max(self.peak, self.live)
        return result

    def _see(self, tensor: Tensor, op: str, counts: bool) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        held = self._known.get(id(storage))
        if held is None:
            before = 0 if counts else size
            held = self._known[id(storage)] = Held(op, tuple(tensor.shape), tensor.dtype, size - before, before)
            self.live += held.bytes
            # Not a weak dictionary: the storage's own id is free for another object as soon as it is gone.
            self._finalizers.append(weakref.finalize(storage, self._forget, id(storage)))
        elif held.bytes != size - held.before:                 # resize_, or an out= that was too small
            self.live += size - held.before - held.bytes
            held.bytes = size - held.before

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for finalizer in self._finalizers:                     # the figures stay as they are now
            finalizer.detach()

    def _forget(self, key: int) -> None:
        held = self._known.pop(key, None)
        self.live -= held.bytes if held else 0


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that stay allocated for the backward pass once `forward()` has returned and its result is let go.

    The result's own storage counts only if the graph saved it (as after a sigmoid). An input that the graph saves was
    there before and does not count; `kept_bytes(lambda: layer(x.clone()))` counts it. Raises ValueError where nothing
    that `forward` returns has a graph: then no gradient flows, and 0 would be a wrong answer.
    """
    return sum(held.bytes for held in kept(forward))


def kept(forward: Callable[[], Any]) -> list[Held]:
    """The storages that `kept_bytes` adds up, each with the operation that made it."""
    with Trace() as trace:
        result = forward()
        graph = [tensor.grad_fn for tensor in _tensors(result) if tensor.grad_fn is not None]
        if not graph:
            raise ValueError("forward() returned no tensor with a gradient function, so nothing can be kept for a "
                             "backward pass. Return the output, and let a parameter or the input require a gradient.")
        del result
        gc.collect()
        return trace.held()


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most bytes alive at one moment of `step()`, over what was there before it (gradients made by it count)."""
    gc.collect()
    with Trace() as trace:
        step()
    return trace.peak


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
