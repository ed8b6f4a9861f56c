"""Does it fit? The formula decides where its error cannot change the answer, the simulator decides the rest.

    the formula's A bytes allocated are within e = 8 % of the simulator's; reserved is allocated plus up to f = 30 %

        C + A/(1+e)   ≤   on the device   ≤   C + A·(1+f)/(1−e)              C: CUDA's context

        ├────────── fits ──────────┤├── near the edge: simulate ──┤├────────── too much ──────────┤    → A

So the answer is the simulator's for every configuration, at the cost of a simulation for few of them. e is the bound
of the formula's own grid (docs/vram_grid.md). f: what the allocator's blocks hold without being used at the peak; it
was 2 to 26 % over full, LoRA, QLoRA and DoRA of Llama-3.2-1B on a T4 (most with checkpointing, whose logits come and
go), and is wider than the formula's own margin so that "fits" is safe.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from pefttools.vram.job import Job
from pefttools.vram.memory import Memory

BOUND = 0.08  # e: the largest error of the formula's allocated bytes against the simulator's that its grid allows
SLACK = 0.30  # f: the most that is reserved beyond what is allocated, as a share of it


@dataclass(frozen=True)
class Budget:
    """A GPU's memory as the planner sees it: `usable` bytes for what torch reserves and CUDA's context together."""

    name: str                      # for people
    usable: int
    gpu: str | None = None         # for a Job, which then knows which kernels exist there
    bf16: bool = True

    @classmethod
    def of(cls, gpu: Any) -> Budget:
        """From a name ("t4"), an entry of `gpus.py`, a Budget, or an amount ("24GiB", or a number of bytes).

        An amount is the whole memory, as a GPU's `usable` is: the context comes out of it. Raises ValueError for what
        does not exist, with the nearest names.
        """
        from pefttools.vram.gpus import find_gpu
        from pefttools.vram.units import gib, parse_bytes

        if isinstance(gpu, cls):
            return gpu
        if isinstance(gpu, int) and not isinstance(gpu, bool) or re.match(r"\s*[-+.\d]", str(gpu)) and _amount(gpu):
            usable = parse_bytes(gpu)
            return cls(f"a GPU of {gib(usable)}", usable)
        found = find_gpu(gpu)
        return cls(found.name, found.usable, found.name.lower().replace(" ", "-"), found.bf16)


def _amount(text: Any) -> bool:
    """"24GiB" or "24 G", and not "4090" or "3090 Ti"."""
    return bool(re.fullmatch(r"\s*[-+.\d,_eE]+\s*(b|[kmgt]i?b?)\s*", str(text), re.IGNORECASE))


@dataclass(frozen=True)
class Verdict:
    """Whether one job fits. `low` and `high` enclose what the simulator says; they are equal where it has spoken.

    fits    True, False, or None where the simulator would have to decide and was not asked
    by      "formula" or "simulator": who decided
    memory  None only where the formula does not know the model's layers (or several GPUs) and nothing was simulated
    """

    job: Job
    fits: bool | None
    by: str
    memory: Memory | None
    low: int
    high: int
    usable: int

    @property
    def needs(self) -> int:
        """Bytes on the device: reserved and context; the least there could be where nothing is known."""
        return self.low if self.memory is None else self.memory.device

    @property
    def room(self) -> int:
        """Usable bytes left over; negative where it does not fit."""
        return self.usable - self.needs


def key_of(job: Job) -> tuple:
    """Equal for equal jobs; works for models that are no hashable objects (dictionaries, configurations)."""
    model = job.model if isinstance(job.model, str) else id(job.model)
    rest = ((f.name, getattr(job, f.name)) for f in fields(job) if f.name not in ("model", "options"))
    return (model, repr(sorted(job.options.items())), *rest)


def beyond_formula(error: ValueError) -> bool:
    """Whether the formula refused a job that the simulator can run: its messages then name simulate()."""
    return "simulate()" in str(error)


class Judge:
    """Formula and simulator before one budget; every job is computed once. `formulas`, `simulations`: how many were.

    `estimate`, `simulate`: functions from a Job to a Memory; by default the library's. `watch` is called with each job
    before it is simulated, which takes seconds.
    """

    def __init__(self, budget: Any, *, bound: float = BOUND, estimate: Callable[[Job], Memory] | None = None,
                 simulate: Callable[[Job], Memory] | None = None, watch: Callable[[Job], None] | None = None) -> None:
        if not 0 <= bound < 1:
            raise ValueError(
                f"bound={bound!r}: the formula's largest relative error, from 0 to below 1, such as {BOUND}."
            )
        self.budget, self.bound = Budget.of(budget), bound
        self._estimate, self._simulate, self._watch = estimate, simulate, watch
        self._formula: dict[tuple, Memory] = {}
        self._simulated: dict[tuple, Memory] = {}

    @property
    def formulas(self) -> int:
        return len(self._formula)

    @property
    def simulations(self) -> int:
        return len(self._simulated)

    def estimate(self, job: Job) -> Memory:
        if (key := key_of(job)) not in self._formula:
            if self._estimate is None:
                from pefttools.vram.formula import estimate as self_estimate

                self._estimate = self_estimate
            self._formula[key] = self._estimate(job)
        return self._formula[key]

    def simulate(self, job: Job) -> Memory:
        """Of several passes two are run: from the second on, each meets what the one before it met."""
        short = job.but(accumulate=min(job.accumulate, 2))
        if (key := key_of(short)) not in self._simulated:
            if self._simulate is None:
                from pefttools.vram.simulator import simulate as self_simulate

                self._simulate = self_simulate
            if self._watch is not None:
                self._watch(short)
            self._simulated[key] = self._simulate(short)
        return replace(self._simulated[key], job=job)

    def by_formula(self, job: Job) -> Verdict:
        """The verdict without simulating anything new: `fits` is None near the edge."""
        if key_of(job.but(accumulate=min(job.accumulate, 2))) in self._simulated:
            return self.by_simulator(job)
        usable = self.budget.usable
        try:
            memory = self.estimate(job)
        except ValueError as error:
            if not beyond_formula(error):
                raise
            return Verdict(job, None, "formula", None, 0, 1 << 62, usable)
        low = memory.context + int(memory.total / (1 + self.bound))          # reserved is never below allocated
        high = memory.context + int(memory.total * (1 + SLACK) / (1 - self.bound)) + 1
        fits = True if high <= usable else False if low > usable else None
        return Verdict(job, fits, "formula", memory, low, high, usable)

    def by_simulator(self, job: Job) -> Verdict:
        memory, usable = self.simulate(job), self.budget.usable
        return Verdict(job, memory.device <= usable, "simulator", memory, memory.device, memory.device, usable)

    def sizes(self, job: Job) -> Memory:
        """A Memory whose weights, constants and numbers of parameters are those of the whole model with this method.

        The formula's, or, where it does not know the model, the simulator's of one short row.
        """
        whole = job.but(gpus=1, accumulate=1)
        try:
            return self.estimate(whole)
        except ValueError as error:
            if not beyond_formula(error):
                raise
            return self.simulate(
                whole.but(batch=1, seq=min(job.seq, 16), checkpointing=False, optimizer="adamw", padded=False)
            )

    def __call__(self, job: Job) -> Verdict:
        """The verdict: the formula's where its bound allows one, the simulator's near the edge."""
        verdict = self.by_formula(job)
        return self.by_simulator(job) if verdict.fits is None else verdict
