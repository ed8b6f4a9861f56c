"""Which of several ways is faster, and by how much: rounds in random order, ratios within a round, a control.

    round 1:   peft 4.1   ours 3.2   frozen 2.8   ours again 3.3      ms; the order is drawn anew for each round
    round 2:   ours 3.3   frozen 2.9   ours again 3.2   peft 4.3
      ⋮
    ratio ours / peft in each round: 0.78, 0.77, …   →   median, 10th and 90th percentile, 95 % interval of the median

A machine that slows down for a while slows all of a round alike, so that a ratio within a round hardly moves; a ratio
of two minima, or of two averages taken one after the other, does. The control is a way against itself ("again"): its
ratio should be 1, and its spread is what a difference must exceed to mean anything.
"""
from __future__ import annotations

import gc
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

AGAIN = " again"
RAW = "raw"                      # the key of a row's single rounds, until they are pooled; they are not kept


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for a row of a table, and how many rounds at least and at most."""

    seconds: float = 8.0
    least: int = 15
    most: int = 200
    sample: float = 0.004        # seconds that one sample should take: quick calls are repeated until it does


FULL, QUICK = Effort(), Effort(seconds=0.5, least=5, most=20)


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios, their 10th and 90th percentile, and a 95 % bootstrap interval of the median."""

    median: float
    p10: float
    p90: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float], seed: int = 0, resamples: int = 1000) -> Ratio:
        """From one ratio a round. Raises ValueError without any."""
        if not ratios:
            raise ValueError("ratios is empty: at least one round must have been timed.")
        draw = random.Random(seed)
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
        at = lambda ordered, share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
        ordered = sorted(ratios)
        return cls(statistics.median(ratios), at(ordered, 0.1), at(ordered, 0.9), at(medians, 0.025),
                   at(medians, 0.975))


@dataclass
class Times:
    """Seconds of every way in every round: `times.seconds["ours"][round]`."""

    seconds: dict[str, list[float]]

    def ratio(self, name: str, against: str) -> Ratio:
        """Time of `name` / time of `against`, round by round: below 1, `name` is the faster."""
        return Ratio.of(self.ratios(name, against))

    def ratios(self, name: str, against: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[name], self.seconds[against], strict=True)]

    def control(self) -> Ratio:
        """The way that was run twice in each round, against itself."""
        return Ratio.of(self.controls())

    def controls(self) -> list[float]:
        [again] = [name for name in self.seconds if name.endswith(AGAIN)]
        return self.ratios(again, again.removesuffix(AGAIN))

    def milliseconds(self) -> dict[str, float]:
        """Median time of each way; only to say what the ratios are ratios of."""
        return {name: 1e3 * statistics.median(values) for name, values in self.seconds.items()
                if not name.endswith(AGAIN)}


def interleave(ways: dict[str, Callable[[], Any]], effort: Effort = FULL, seed: int = 0, warm_up: int = 2,
               clock: Callable[[], float] = time.perf_counter) -> Times:
    """Time the `ways` in rounds, each round in an order of its own; the first is timed twice: the control.

    Every way is called `warm_up` times before, and so often in each round that a sample takes `effort.sample` seconds.
    Raises ValueError without ways.
    """
    if not ways:
        raise ValueError("ways is empty: give at least one callable by its name, such as {'ours': step}.")
    first = next(iter(ways))
    ways = {**ways, first + AGAIN: ways[first]}
    repeats, one_round = {}, 0.0
    for name, way in ways.items():
        for _ in range(warm_up):
            way()
        took = _sample(way, 1, clock)
        repeats[name] = max(1, min(1000, round(effort.sample / max(took, 1e-7))))
        one_round += took * repeats[name]
    repeats[first + AGAIN] = repeats[first]
    gc.collect()
    gc.freeze()                  # what was imported need not be searched again in the middle of a round
    rounds = max(effort.least, min(effort.most, int(effort.seconds / max(one_round, 1e-7))))
    order, draw = list(ways), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            seconds[name].append(_sample(ways[name], repeats[name], clock))
    gc.unfreeze()
    return Times(seconds)


def _sample(way: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        way()
    return (clock() - start) / repeats


# ------------------------------------------------------------------------------------------------ rows

def compare(row: str, times: Times, name: str, against: str, bound: float | None = None, faster: bool = False,
            **extra: Any) -> dict[str, Any]:
    """A row of a table. `bound` is the most that time(name) / time(against) may be; with `faster` the ratio is turned
    round ("how many times as fast") and `bound` is the least."""
    ratio = times.ratio(against, name) if faster else times.ratio(name, against)
    control = times.control()
    return {"row": row, "what": f"{name} × as fast as {against}" if faster else f"{name} / {against}",
            "value": ratio.median, "p10": ratio.p10, "p90": ratio.p90, "low": ratio.low, "high": ratio.high,
            "control": [control.p10, control.p90], "rounds": len(times.seconds[name]), "unit": "×",
            "sense": "≥" if faster else "≤", "bound": bound, "ms": times.milliseconds(), **extra,
            RAW: {"ratios": times.ratios(against, name) if faster else times.ratios(name, against),
                  "controls": times.controls()}}


def attempt(row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`row` with what `measure()` gives, or with the reason why there is no figure. One failure spoils one row only."""
    try:
        return {**row, **measure()}
    except Exception as error:  # noqa: BLE001
        # the first line, without paths of this machine
        text = re.sub(r" ?\(?/[\w./-]+\)?", "", str(error).partition("\n")[0])
        return {**row, "missing": f"{type(error).__name__}: {text}"}


def pooled(processes: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of several processes that measured the same, as one list, from the rounds of all.

    Where a process finds its memory can decide a ratio for as long as it lives: then the rounds of one process agree
    with each other and not with those of the next. "between" has the lowest and highest median of a process. A row
    that any process lacks a figure for is missing.
    """
    rows = []
    for same in zip(*processes, strict=True):
        row = dict(next((row for row in same if "missing" in row), same[0]))
        row.pop(RAW, None)
        raw = [one[RAW] for one in same if RAW in one]
        if len(same) > 1 and len(raw) == len(same):
            ratio, control = (Ratio.of([x for one in raw for x in one[part]]) for part in ("ratios", "controls"))
            row |= {"value": ratio.median, "p10": ratio.p10, "p90": ratio.p90, "low": ratio.low, "high": ratio.high,
                    "control": [control.p10, control.p90], "rounds": sum(len(one["ratios"]) for one in raw),
                    "between": [f(one["value"] for one in same) for f in (min, max)]}
            for part in ("ms", "beside"):
                if part in row:
                    row[part] = {name: statistics.median(one[part][name] for one in same) for name in row[part]}
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------ a busy machine

@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Afterwards the dictionary has "others": processors that other programs kept busy meanwhile, on average.

    On Linux from the kernel's own sums; a child process of ours counts as ours once it has ended. NaN elsewhere, where
    a process's time and the machine's are not in one unit. Above about 0.3 the timings are not to be trusted.
    """
    import os

    import psutil

    def read() -> tuple[float, float, float]:
        t = psutil.cpu_times()
        busy = sum(t) - t.idle - getattr(t, "iowait", 0) - getattr(t, "guest", 0) - getattr(t, "guest_nice", 0)
        return time.monotonic(), busy, sum(os.times()[:4])

    found: dict[str, float] = {}
    before = read()
    try:
        yield found
    finally:
        wall, busy, own = (b - a for a, b in zip(before, read()))
        found["others"] = max(0.0, (busy - own) / wall) if psutil.LINUX else float("nan")
        found["seconds"] = wall
