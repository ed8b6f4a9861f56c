"""The configurations that a planner tries: every combination of what may be chosen, none twice, none senseless.

    wanted: 16 rows an optimizer step          micro batch × passes added up × GPUs = 16

        on 1 GPU:   1 × 16    2 × 8    4 × 4    8 × 2    16 × 1           on 4 GPUs:   1 × 4    2 × 2    4 × 1

All of these give the same gradient, and so the same training; they differ in memory and in time. Checkpointing,
attention kernels, paging and sharding change nothing either. What does change the result is in `approximations`.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pefttools.vram.job import ATTENTION, METHODS, OPTIMIZERS, Job, among

PLAIN = ("full", "lora", "dora", "qlora", "qdora", "bottleneck", "prefix", "prompt")


@dataclass(frozen=True)
class Space:
    """What may be chosen. `effective_batch`: rows whose gradients one optimizer step sums, over all passes and GPUs."""

    methods: tuple[str, ...] = PLAIN
    effective_batch: int = 16
    r: tuple[int, ...] = (16,)
    checkpointing: tuple[bool, ...] = (False, True)
    optimizers: tuple[str, ...] = ("adamw", "adamw_8bit", "paged_adamw")
    attention: tuple[str, ...] = ("sdpa",)
    gpus: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name, known in (("methods", METHODS), ("optimizers", OPTIMIZERS), ("attention", ATTENTION)):
            object.__setattr__(self, name, values := several(getattr(self, name)))
            for value in values:
                among(name, value, known)
        for name in ("r", "checkpointing", "gpus"):
            object.__setattr__(self, name, several(getattr(self, name)))
        for name in ("methods", "optimizers", "attention", "r", "checkpointing", "gpus"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: there is nothing to choose from. Leave it out for the default.")
        if (
            isinstance(self.effective_batch, bool)
            or not isinstance(self.effective_batch, int)
            or self.effective_batch < 1
        ):
            raise ValueError(f"effective_batch={self.effective_batch!r}: rows of one optimizer step, at least 1.")
        if misfits := [n for n in self.gpus if self.effective_batch % n]:
            raise ValueError(f"effective_batch={self.effective_batch} cannot be shared equally by {misfits[0]} GPUs: "
                             f"take a multiple, such as {-(-self.effective_batch // misfits[0]) * misfits[0]}.")

    def jobs(self, model: Any, seq: int, **fixed: Any) -> Iterator[Job]:
        """Every Job of this space; `fixed` are further fields of it."""
        for method, n, checkpointing, optimizer, attention in product(
                self.methods, self.gpus, self.checkpointing, self.optimizers, self.attention):
            for r in self.r if "lora" in method or "dora" in method else self.r[:1]:      # others have no rank
                own = {name: value for name, value in fixed.items() if name != "master" or method == "full"}
                for batch in divisors(self.effective_batch // n):
                    yield Job(model, method, batch, seq, r=r, checkpointing=checkpointing, optimizer=optimizer,
                              attention=attention, gpus=n, accumulate=self.effective_batch // n // batch, **own)


def several(values: Any) -> tuple:
    """One value, or many, as a tuple without repetitions."""
    if isinstance(values, str | int | bool) or not isinstance(values, Iterable):
        values = (values,)
    return tuple(dict.fromkeys(values))


def divisors(n: int) -> list[int]:
    """Of n, ascending: [1, 2, 4, 8, 16] of 16."""
    return [d for d in range(1, n + 1) if n % d == 0]


def approximations(job: Job) -> tuple[str, ...]:
    """What this job rounds that need not be rounded: only these change what is learned, not only how it is computed."""
    found = []
    if job.quantization:
        found.append(f"the frozen base is rounded to 4 bits ({job.quantization})")
    if job.optimizer.endswith("8bit"):
        found.append("AdamW's moments are rounded to 8 bits")
    if job.method == "full" and job.dtype != "float32" and not job.master:
        found.append(f"the trained weights themselves are {job.dtype}: small updates are rounded away")
    return tuple(found)
