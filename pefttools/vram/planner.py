"""Which configurations fit, in order, and why each of the others loses.

    plan("llama-3.1-8b", "t4", seq=1024, tasks=20)

    every configuration ──► criteria but memory (rounding, arithmetic, passes, bytes to serve N tasks): exact
            │
            └──► best first: the formula decides what its bound allows, the simulator what is near the edge (verdict.py)

The search is exact: candidates are taken in the order of the criteria, and the first whose verdict is "fits" is the
best there is. A configuration that would lose anyway is not simulated, and its row says so. `decide="all"` simulates
these too.

What "best" means is an order of criteria, each computed from the model's shapes:

    gpus            how many GPUs
    approximations  how many things are rounded that need not be: 4-bit base, 8-bit moments, 16-bit trained weights
    flops           arithmetic of an optimizer step, recomputation included (costs.py)
    passes          forward/backward runs in a row for one optimizer step: fewer and larger use a GPU better
    host            bytes of optimizer state that may move to the host's memory (paged optimizers)
    serving         bytes on the GPU to answer for N tasks without loading anything (serving.py)
    needs           bytes on the device: what is left over is head room

Nothing here says how well a method learns: that is measured (docs/bundled_finetune.md, chapter 10), not computed. So
`best` is the least costly configuration, `by_method` the best one of every method, and the choice between methods
yours.
"""
from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pefttools.vram.costs import Cost, Shape, cost
from pefttools.vram.job import Job, among
from pefttools.vram.lengths import Lengths, lengths_of, worst_batch
from pefttools.vram.serving import Serving, fits_by, resident, serving
from pefttools.vram.space import Space, approximations
from pefttools.vram.verdict import BOUND, Budget, Judge, Verdict

CRITERIA = ("gpus", "approximations", "flops", "passes", "host", "serving", "needs")
OBJECTIVES = {
    "exact": CRITERIA,
    "cost": ("gpus", "flops", "passes", "host", "approximations", "serving", "needs"),
    "serving": ("gpus", "serving", "approximations", "flops", "passes", "host", "needs"),
    "memory": ("gpus", "needs", "approximations", "flops", "passes", "host", "serving"),
}


@dataclass(frozen=True)
class Option:
    """One configuration. `by` decided `fits`, which is None where only a simulation could tell and it loses anyway."""

    verdict: Verdict
    cost: Cost
    approximations: tuple[str, ...]
    ways: tuple[Serving, ...]
    serving: Serving
    trainable: int

    @property
    def job(self) -> Job:
        return self.verdict.job

    @property
    def fits(self) -> bool | None:
        return self.verdict.fits

    @property
    def by(self) -> str:
        return self.verdict.by

    @property
    def needs(self) -> int:
        return self.verdict.needs

    @property
    def room(self) -> int:
        return self.verdict.room

    def criterion(self, name: str) -> float:
        job = self.job
        if name == "host":
            return self.trainable * (2 if job.optimizer.endswith("8bit") else 8) * ("paged" in job.optimizer)
        return {"gpus": job.gpus, "approximations": len(self.approximations), "flops": self.cost.flops,
                "passes": self.cost.passes, "serving": resident(self.ways), "needs": self.needs}[name]

    def key(self, order: tuple[str, ...], needs: str = "needs") -> tuple[float, ...]:
        """The criteria's values, smaller is better. needs="low" or "high": the ends of what is known of it."""
        return tuple(getattr(self.verdict, needs) if name == "needs" else self.criterion(name) for name in order)


@dataclass
class Plan:
    """`options`: all configurations, what fits first, in order. `refused`: (configuration, why it makes no sense)."""

    budget: Budget
    order: tuple[str, ...]
    options: list[Option]
    judge: Judge = field(repr=False)
    tasks: int = 1
    data: Lengths | None = None
    refused: list[tuple[Job, str]] = field(default_factory=list)

    @property
    def fitting(self) -> list[Option]:
        return [option for option in self.options if option.fits]

    @property
    def best(self) -> Option | None:
        """The first in order that fits; None if nothing does."""
        return self.options[0] if self.options and self.options[0].fits else None

    @property
    def by_method(self) -> dict[str, Option]:
        """The best configuration of every method that has one that fits, in order."""
        found: dict[str, Option] = {}
        for option in self.fitting:
            found.setdefault(option.job.method, option)
        return found

    def why(self, option: Option) -> str:
        """One sentence: why this configuration is the best, loses, or does not fit and what would help."""
        from pefttools.vram.reasons import why

        return why(self, option)

    def to_dict(self, limit: int | None = None) -> dict[str, Any]:
        from pefttools.vram.plan_text import to_dict

        return to_dict(self, limit)

    def __str__(self) -> str:
        from pefttools.vram.plan_text import to_text

        return to_text(self)


def plan(
    model: Any,
    gpu: Any,
    *,
    seq: int | None = None,
    lengths: Iterable[int] | None = None,
    max_length: int | None = None,
    tasks: int = 1,
    objective: str | tuple[str, ...] = "exact",
    decide: str = "best",
    verify: bool = True,
    space: Space | None = None,
    judge: Judge | None = None,
    bound: float = BOUND,
    methods: Any = None,
    effective_batch: int | None = None,
    r: Any = None,
    checkpointing: Any = None,
    optimizers: Any = None,
    attention: Any = None,
    gpus: Any = None,
    **fixed: Any,
) -> Plan:
    """The configurations of `model` that fit on `gpu`, in order of `objective`, and the others.

    model, gpu   as in Job and `gpus.py`; the GPU may also be an amount ("24GiB") of memory
    seq          tokens in a row; or `lengths`, the token counts of the data: the worst batch counts (lengths.py)
    tasks        how many fine-tunes of this base are to be served
    objective    a key of OBJECTIVES or a tuple of CRITERIA, the most important first
    decide       "best": simulate near the edge until the best of every method is known; "all": everything near the edge
    verify       also simulate the best one if the formula alone decided it
    methods, effective_batch, r, checkpointing, optimizers, attention, gpus: what may be chosen (see Space)
    fixed        further fields of Job, the same for all: targets, length, width, dtype, library …

    Raises ValueError for a name that does not exist, an empty choice, neither seq nor lengths.
    """
    judge = judge or Judge(gpu, bound=bound)
    order = order_of(objective)
    among("decide", decide, ("best", "all"))
    given = {"methods": methods, "effective_batch": effective_batch, "r": r, "checkpointing": checkpointing,
             "optimizers": optimizers, "attention": attention, "gpus": gpus}
    given = {name: value for name, value in given.items() if value is not None}
    space = space or Space(**given)
    lengths = None if lengths is None else list(lengths)
    data = None if lengths is None else lengths_of(lengths, max_length)
    if seq is None and data is None:
        raise ValueError(
            "seq is missing: give the tokens of a row (seq=1024), or the lengths of your rows (lengths=[…])."
        )
    if data and data.rows < space.effective_batch:
        raise ValueError(f"effective_batch={space.effective_batch}, and there are {data.rows} rows of data: "
                         f"effective_batch={data.rows} is the most.")
    fixed.setdefault("gpu", judge.budget.gpu)
    fixed.setdefault("dtype", "bfloat16" if judge.budget.bf16 else "float16")
    options, refused, shape = [], [], Shape.of(model)
    for job in space.jobs(model, seq or data.seq, **fixed):
        job = worst_batch(job, lengths, max_length) if lengths is not None else job
        try:
            options.append(option_of(judge, job, tasks, shape=shape))
        except ValueError as error:  # a rank above a dimension, a method this model cannot have
            refused.append((job, str(error)))
    if not options:
        raise ValueError(f"no configuration makes sense for this model; the first: {refused[0][1]}")
    options = search(options, judge, order, decide, refused)
    while verify and options[0].fits and options[0].by == "formula":  # again where the formula was outside of its bound
        judge.simulate(options[0].job)
        options = search([replace(option, verdict=judge.by_formula(option.job)) for option in options],
                         judge, order, decide, refused)
    return Plan(judge.budget, order, options, judge, tasks, data, refused)


def order_of(objective: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(objective, str):
        among("objective", objective, OBJECTIVES)
        return OBJECTIVES[objective]
    for name in objective:
        among("criterion", name, CRITERIA)
    return (*dict.fromkeys(objective), *(name for name in CRITERIA if name not in objective))


def option_of(judge: Judge, job: Job, tasks: int, verdict: Verdict | None = None, shape: Shape | None = None) -> Option:
    verdict = verdict or judge.by_formula(job)
    whole = judge.sizes(job)
    ways = serving(job, whole, tasks)
    return Option(
        verdict, cost(job, whole, shape), approximations(job), ways, fits_by(ways, judge.budget.usable), whole.trainable
    )



def search(options: list[Option], judge: Judge, order: tuple[str, ...], decide: str,
           refused: list[tuple[Job, str]]) -> list[Option]:
    """Best first, exactly: an option is placed when nothing that is undecided could still come before it.

    What the simulator refuses goes to `refused`.
    """
    heap = [(option.key(order, "low"), n, option) for n, option in enumerate(options) if option.fits is not False]
    heapq.heapify(heap)
    fitting: list[Option] = []
    undecided: list[Option] = []
    losing = [option for option in options if option.fits is False]
    methods: set[str] = set()
    while heap:
        _, n, option = heapq.heappop(heap)
        wanted = decide == "all" or option.job.method not in methods
        # Two that tie up to `needs` cannot be told apart by intervals that overlap: the simulator orders them.
        close = bool(heap) and heap[0][0] < option.key(order, "high")
        if wanted and option.by == "formula" and (option.fits is None or close):
            try:
                option = replace(option, verdict=judge.by_simulator(option.job))
            except ValueError as error:
                refused.append((option.job, str(error)))
                continue
            if option.fits:
                heapq.heappush(heap, (option.key(order), n, option))
            else:
                losing.append(option)
            continue
        if option.fits:
            fitting.append(option)
            methods.add(option.job.method)
        else:
            undecided.append(option)
    return fitting + undecided + sorted(losing, key=lambda option: (option.needs, option.key(order)))
