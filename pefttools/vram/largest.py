"""The largest batch, length, rank or model that fits, and proof of it on both sides of the edge.

    batch      1   2   …   9  10  11  12  13  14   …
    formula    fits ───────┤ within its bound ├── too much          doubling, then halving: no time at all
    simulator                  ✓   ✓   ✗                            halving between: log₂ of the width
                                  11  12                            11 fits and 12 does not: both simulated

Memory grows with each of these, so one edge is the edge. (What torch *reserves* can fall by a few MiB from one size to
the next, as blocks happen to fit; the answer is then an edge, within that much.) Models are tried by their number of
parameters, the largest first, and each is decided: a smaller model with a larger vocabulary may need more.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pefttools.vram.job import Job, among, make_job
from pefttools.vram.memory import Memory
from pefttools.vram.reasons import too_much
from pefttools.vram.units import gib
from pefttools.vram.verdict import BOUND, Budget, Judge, Verdict

WHAT = ("batch", "seq", "r", "length", "model")
LIMIT = 1 << 20            # of batch, seq, rank: beyond any GPU


@dataclass(frozen=True)
class Largest:
    """`value` is the largest that fits (None: not even the least does); `above` is the next, which does not.

    `above` is None where nothing larger exists: `limit` says why. Both memories are the simulator's (of a model that is
    too large, it may be the formula's).
    """

    what: str
    value: Any
    job: Job | None
    fits: Memory | None
    above: Any
    too_much: Memory | None
    budget: Budget
    limit: str
    judge: Judge

    def __str__(self) -> str:
        if self.value is None:
            return f"No {self.what} fits on {self.budget.name}: {self.limit}"
        room = self.budget.usable - self.fits.device
        text = (f"Largest {self.what} on {self.budget.name}: {self.value} (needs {gib(self.fits.device, 2)}, "
                f"{gib(room, 2)} of {gib(self.budget.usable, 2)} are left, by the {self.fits.by})")
        return f"{text}. {self.limit}" if self.limit else f"{text}."

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, "value": self.value, "needs_bytes": self.fits.device if self.fits else None,
                "above": self.above, "above_needs_bytes": self.too_much.device if self.too_much else None,
                "gpu": self.budget.name, "usable_bytes": self.budget.usable, "limit": self.limit,
                "formulas": self.judge.formulas, "simulations": self.judge.simulations}


def largest(what: str, model: Any = None, gpu: Any = None, *, multiple: int = 1, models: Any = None,
            judge: Judge | None = None, bound: float = BOUND, **fields: Any) -> Largest:
    """The largest `what` ("batch", "seq", "r", "length" or "model") with which the job fits on `gpu`.

    model, fields   as in Job (or a Job); `multiple`: only multiples of it (64 for lengths, say)
    models          the names among which "model" chooses (default: all presets)

    Every number is simulated on both sides of the edge. Raises ValueError for a name that does not exist.
    """
    among("what", what, WHAT)
    judge = judge or Judge(gpu, bound=bound)
    fields.setdefault("gpu", judge.budget.gpu)
    if not isinstance(model, Job):
        fields.setdefault("dtype", "bfloat16" if judge.budget.bf16 else "float16")
    if what == "model":
        return largest_model(judge, models, make_job(model if model is not None else "", **fields))
    if model is None:
        raise ValueError(f"largest {what}: of which model? model=\"llama-3.2-1b\", or a Job.")
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple={multiple!r}: a whole number of at least 1.")
    start = make_job(model, **fields)
    most, because = bounds(what, start)

    def job(n: int) -> Job:
        return start.but(**{what: n * multiple})

    last = most // multiple
    if last < 1:
        raise ValueError(f"multiple={multiple} is above the largest {what} there is, {most}.")
    n = edge(lambda n: judge.by_formula(job(n)).fits, lambda n: judge.by_simulator(job(n)).fits, last)
    if n == 0:
        least = judge.by_simulator(job(1))
        return Largest(what, None, None, None, multiple, least.memory, judge.budget,
                       f"{what}={multiple} {too_much(least, judge.budget)}.", judge)
    fits = judge.by_simulator(job(n))
    if n == last:
        return Largest(what, n * multiple, fits.job, fits.memory, None, None, judge.budget, because, judge)
    above = judge.by_simulator(job(n + 1))
    return Largest(what, n * multiple, fits.job, fits.memory, (n + 1) * multiple, above.memory, judge.budget,
                   f"{what}={(n + 1) * multiple} {too_much(above, judge.budget)}.", judge)


def edge(formula: Callable[[int], bool | None], exact: Callable[[int], bool], last: int) -> int:
    """The n of 0 … last for which exact(n) holds and exact(n + 1) does not; 0 if exact(1) fails.

    `formula` says True, False or None (undecided) and only makes the search short: both sides are checked by `exact`,
    and where the formula misled, the search goes on from there.
    """
    low, high = 0, last + 1  # low fits (0: nothing known), high does not (last + 1: the end)
    probe = 1
    while probe <= last and formula(probe) is True:            # doubling
        low, probe = probe, probe * 2
    a, b = low, min(probe, last + 1)                           # the formula is sure up to a, and not at b
    while b - a > 1:
        middle = (a + b) // 2
        a, b = (middle, b) if formula(middle) is True else (a, middle)
    low = a
    a, b = b - 1, b                                            # now where it starts to be sure that it does not fit
    while b <= last and formula(b) is not False:
        a, b = b, b * 2
    b = min(b, last + 1)
    while b - a > 1:
        middle = (a + b) // 2
        a, b = (a, middle) if middle <= last and formula(middle) is False else (middle, b)
    high = b
    low, high = halve(exact, low, high)                        # between them the simulator decides
    if low >= 1 and not exact(low):                            # the formula was sure, and wrong
        low, high = halve(exact, 0, low)
    step = 1
    while low + 1 <= last and exact(low + 1):                  # wrong the other way
        low, step = halve(exact, low + 1, min(low + 1 + step, last + 1))[0], step * 2
    return low


def halve(fits: Callable[[int], bool], low: int, high: int) -> tuple[int, int]:
    """Halve the distance between `low`, which fits, and `high`, which does not, down to 1."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def bounds(what: str, job: Job) -> tuple[int, str]:
    """The largest value that makes sense, and why there is no larger one."""
    if what == "seq":
        from pefttools.vram.presets import config_of

        limit = getattr(config_of(job.model), "max_position_embeddings", None) or LIMIT
        return limit, f"The model knows no more positions than {limit:,}."
    if what == "r":
        from pefttools.vram.presets import config_of

        limit = config_of(job.model).hidden_size
        return limit, f"A rank above hidden_size={limit:,} is no longer low."
    return LIMIT, f"More than {LIMIT:,} was not tried."


def largest_model(judge: Judge, models: Any, job: Job) -> Largest:
    """From the model of most parameters down: the first that fits, simulated; `above` is the one before it."""
    from pefttools.vram.preset_data import PRESETS

    known = sorted(models or PRESETS, key=lambda name: judge.estimate(job.but(model=name)).parameters, reverse=True)
    if not known:
        raise ValueError("models is empty: name some, or leave it out for all presets.")
    above: Verdict | None = None
    for name in known:
        verdict = judge(job.but(model=name))
        if verdict.fits:
            verdict = judge.by_simulator(verdict.job)
        if verdict.fits:
            limit = (
                f"{above.job.model} {too_much(above, judge.budget)}."
                if above
                else "There is no larger one to choose from."
            )
            return Largest("model", name, verdict.job, verdict.memory, above.job.model if above else None,
                           above.memory if above else None, judge.budget, limit, judge)
        above = verdict
    return Largest("model", None, None, None, above.job.model, above.memory, judge.budget,
                   f"{above.job.model} {too_much(above, judge.budget)}.", judge)
