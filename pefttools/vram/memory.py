"""What a training step takes at its peak, term by term: the answer of the formula and of the simulator."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TERMS = {
    "weights": "the frozen or trained model, in the base's dtype; of a quantized one the 4-bit codes and what stays in 16 bits",
    "constants": "the block scales (and their scales) of quantized weights",
    "adapter": "what the method adds and trains",
    "gradients": "of everything that is trained",
    "optimizer": "its state, and what its step needs beside",
    "activations": "what layers keep for the backward pass",
    "logits": "logits, their loss and its gradient",
    "temporary": "what lives only for the moment of the peak",
}


@dataclass(frozen=True)
class Moment:
    """One point of a timeline: bytes held then, by term."""

    phase: str                     # "build", "forward", "loss", "backward", "step"
    where: str                     # the module or function at work
    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of one training step (after the optimizer's state exists: the second step, not the first).

    terms      by who holds them, in the order of TERMS; their sum is `total`, torch.cuda.max_memory_allocated()
    reserved   torch.cuda.max_memory_reserved(): with the allocator's rounding and what it cannot reuse
    context    CUDA's own share, which no counter of torch shows; `device` = reserved + context, as nvidia-smi shows it
    """

    job: Any
    by: str                        # "formula" or "simulator"
    terms: dict[str, int]
    peak_at: str                   # such as "loss: cross entropy", "backward: model.layers.27.mlp", "step"
    reserved: int
    context: int
    trainable: int                 # parameters
    parameters: int                # all of them, tied ones once
    timeline: tuple[Moment, ...] = ()
    holders: dict[str, int] = field(default_factory=dict)  # activations at the peak, by module (simulator)
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def device(self) -> int:
        return self.reserved + self.context
