"""The ledger of a run on meta tensors: every storage, when it came, when it went, and who made it.

    with Ledger() as ledger:          below autograd, every operation of PyTorch passes through it
        step()
    ledger.lives                      one `Life` for each storage and for each workspace that a CUDA kernel would take

    operation ──► new untyped storage ──► Life(bytes, born) ── last reference gone (finalize) ──► .died
                  view, in place, out=     no new storage, no entry; one that was resized ends and begins again

Meta tensors have shapes and no memory, so a model of any size runs in the time that Python takes for its operations.
What one CUDA kernel allocates and frees inside itself is no tensor here; `kernels.workspaces` says what those are, and
they are entered as a life of one instant. Tensors on the CPU (AdamW's step counters) are the host's: not entered.

Who holds a storage is decided afterwards, when its whole life is known (`Ledger.terms`):

    given a term when it was registered          weights, constants, adapter; gradients once they are in place
    made in the optimizer's phase                optimizer
    as wide as the vocabulary                    logits
    made in a forward pass, alive after it       activations (kept for backward); held by the module that made it
    everything else                              temporary
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pefttools.vram.sums import ADD, last_reference, sums_in_place
from pefttools.vram.values import answer, on_host

FOREVER = 1 << 62


@dataclass(eq=False, slots=True)
class Life:
    """One allocation. `born` and `died` are ticks of the ledger's clock; `span`: the tick at which the (re)computation
    that it was made in ended, None outside of one."""

    bytes: int
    born: int
    where: str
    phase: str
    wide: bool                                  # as wide as the vocabulary
    span: Any = None
    term: str | None = None
    died: int = FOREVER
    shape: tuple[int, ...] = ()
    op: str = ""


class Span:
    """A forward computation: what is alive after its end is kept for the backward pass."""

    __slots__ = ("end",)

    def __init__(self) -> None:
        self.end = FOREVER


@dataclass
class Mark:
    """A point of the clock at which a phase began."""

    tick: int
    phase: str
    what: str = field(default="")


class Ledger(TorchDispatchMode):
    """See the module's docstring. `vocab`: the width of logits; `workspaces`: a kernel's own bytes."""

    def __init__(self, vocab: int = 0, workspaces: Callable[[Any, Any, Any], Iterable[int]] | None = None,
                 device: str = "meta") -> None:
        super().__init__()
        last_reference()                                     # measured once, before a mode is on
        self.clock = 0
        self.phase = "build"
        self.vocab, self.device, self._workspaces = vocab, device, workspaces
        self.lives: list[Life] = []
        self.marks: list[Mark] = [Mark(0, "build")]
        self.emptied: list[int] = []                          # ticks at which the cache was emptied
        self.visits: list[tuple[int, str, bool]] = []         # (tick, module, came in or went out)
        self._alive: dict[int, tuple[Life, int]] = {}
        self._hosts: dict[int, Any] = {}                       # storages that stand for memory of the host
        self._finalizers: dict[int, weakref.finalize] = {}
        self._stack: list[str] = []
        self._span: Span | None = None
        self._depth = 0

    # ---- who is at work
    def enter(self, name: str) -> None:
        if self._depth == 0:
            self._span = Span()
        self._depth += 1
        self._stack.append(name)
        self.visits.append((self.clock, name, True))

    def leave(self) -> None:
        self.visits.append((self.clock, self._stack.pop(), False))
        self._depth -= 1
        if self._depth == 0 and self._span is not None:
            self._span.end = self.clock
            self._span = None

    @property
    def where(self) -> str:
        return self._stack[-1] if self._stack else ""

    def begin(self, phase: str, what: str = "") -> None:
        self.phase = phase
        self.marks.append(Mark(self.clock, phase, what))

    # ---- what comes and goes
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = answer(func, args, kwargs)
        if func is ADD and self.phase == "backward" and sums_in_place(args):
            return args[0].add_(args[1])
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if self._workspaces is not None:
            for size in self._workspaces(func, args, result):
                self.instant(size, str(func))
        if isinstance(result, Tensor):
            if result.device.type == self.device and not on_host(result):
                self.see(result, func)
        elif result is not None:
            for tensor in tree_iter(result):
                if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                    self.see(tensor, func)
        else:
            for tensor in tree_iter(args):                     # in place: they may have grown
                if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                    self.see(tensor, func)
        return result

    def see(self, tensor: Tensor, op: Any = "", term: str | None = None) -> Life | None:
        """Enter the storage of `tensor` unless it is known with this size."""
        if tensor.layout != torch.strided:
            if tensor.layout == torch.sparse_coo:
                self.see(tensor._indices(), op, term)
                self.see(tensor._values(), op, term)
            return None
        if type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                self.see(getattr(tensor, name), op, term)
            return None
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known = self._alive.get(key)
        if key in self._hosts:
            return None
        if known is not None:
            if known[1] == size:
                if term:
                    known[0].term = term
                return known[0]
            self._end(known[0])
        if size == 0:
            self._alive.pop(key, None)
            return None
        wide = bool(self.vocab) and tensor.dim() > 0 and (tensor.shape[-1] == self.vocab)
        life = self._begin(size, str(op), wide, term, tuple(tensor.shape))
        self._alive[key] = (life, size)
        if known is None and key not in self._finalizers:
            self._finalizers[key] = weakref.finalize(storage, self._gone, key)
        return life

    def on_host(self, tensor: Tensor) -> None:
        """This storage is the host's, for as long as the ledger is written."""
        storage = tensor.untyped_storage()
        self._hosts[id(storage)] = storage

    def instant(self, size: int, op: str = "") -> None:
        """Memory that a kernel takes and gives back before it returns."""
        if size > 0:
            self._end(self._begin(size, op, False, None, ()))

    def lasting(self, size: int, term: str, op: str = "") -> Life:
        """Memory that is taken once and kept, such as cuBLAS' workspace."""
        return self._begin(size, op, False, term, ())

    def release(self, life: Life) -> None:
        self._end(life)

    def empty_cache(self) -> None:
        """As torch.cuda.empty_cache(): matters to the replay only."""
        self.clock += 1
        self.emptied.append(self.clock)

    def of(self, tensor: Tensor) -> Life | None:
        known = self._alive.get(id(tensor.untyped_storage()))
        return known[0] if known else None

    def _begin(self, size: int, op: str, wide: bool, term: str | None, shape: tuple[int, ...]) -> Life:
        self.clock += 1
        life = Life(size, self.clock, self.where, self.phase, wide, self._span, term, FOREVER, shape, op)
        self.lives.append(life)
        return life

    def _end(self, life: Life) -> None:
        self.clock += 1
        life.died = self.clock

    def _gone(self, key: int) -> None:
        self._finalizers.pop(key, None)
        known = self._alive.pop(key, None)
        if known:
            self._end(known[0])

    def close(self) -> None:
        """No more entries: what is alive stays alive in the books."""
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()
        self._hosts.clear()
        self._alive.clear()

    # ---- whose it was
    @staticmethod
    def term_of(life: Life) -> str:
        if life.term:
            return life.term
        if life.phase == "step":
            return "optimizer"
        if life.wide:
            return "logits"
        if life.span is not None and life.died > life.span.end:
            return "activations"
        return "temporary"
