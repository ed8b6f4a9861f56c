"""A rate and a mean with the interval that belongs to it: every figure of this package is one of the two.

    Rate(6, 50)                  one model, so many answers of which so many are bad: Wilson's interval (1927)
    over_seeds(table)            several runs of the same experiment: bootstrap over seeds and over prompts
    difference(before, after)    the same, of the difference prompt by prompt: what an attack or a cure moved

The bootstraps are those of pefttools.lab.intervals. Where all answers agree a bootstrap sees no spread at all, so for
shares neither is narrower here than Wilson's interval of one run. Three seeds are few; what they say of a fourth is
little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pefttools.lab.intervals import Interval, bootstrap, paired_bootstrap
from pefttools.lab.intervals import wilson as wilson_of

__all__ = ["Interval", "Rate", "difference", "disjoint", "over_seeds", "rate", "wilson"]


class Rate(NamedTuple):
    """`hits` of `n`, with Wilson's 95 % interval."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n

    @property
    def low(self) -> float:
        return wilson(self.hits, self.n)[0]

    @property
    def high(self) -> float:
        return wilson(self.hits, self.n)[1]

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({self.hits} of {self.n}, {100 * self.low:.1f} to {100 * self.high:.1f} %)"


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of `hits` of `n`. Raises ValueError unless 0 ≤ hits ≤ n and n ≥ 1."""
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"a rate needs n of at least 1 and 0 <= hits <= n; got {hits} of {n}")
    return wilson_of(hits, n)


def rate(flags: Sequence[bool]) -> Rate:
    """The share of true flags. Raises ValueError if there are none."""
    flags = list(flags)
    if not flags:
        raise ValueError("flags: there are none, so there is no rate; generate at least one answer")
    return Rate(sum(map(bool, flags)), len(flags))


def over_seeds(table: Sequence[Sequence[float]], draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of `table[s][i]` (seed s, prompt i) and its 95 % interval, by resampling seeds and prompts.

    Of shares (nothing but 0 and 1 in the table) it is at least as wide as Wilson's for one seed: answers of several
    runs to one prompt are not independent, so they do not count as more prompts.
    """
    found = bootstrap(table, draws=draws, seed=seed)
    if not shares(table):
        return found
    low, high = wilson(round(found.value * len(table[0])), len(table[0]))
    return Interval(found.value, min(found.low, low), max(found.high, high))


def difference(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean of after − before, seed by seed and prompt by prompt, with its 95 % interval.

    Of shares it is at least as wide as Wilson's interval of the net change among the prompts of one seed, on both
    sides of 0 where there is no net change.
    """
    found = paired_bootstrap(after, before, draws=draws, seed=seed)
    if not (shares(before) and shares(after)):
        return found
    n = len(before[0])
    low, high = wilson(round(abs(found.value) * n), n)
    if round(abs(found.value) * n) == 0:
        low, high = -high, high
    elif found.value < 0:
        low, high = -high, -low
    return Interval(found.value, min(found.low, low), max(found.high, high))


def shares(table: Sequence[Sequence[float]]) -> bool:
    return {float(x) for row in table for x in row} <= {0.0, 1.0}


def disjoint(one: Interval, other: Interval) -> bool:
    """Whether two intervals have no point in common."""
    return one.low > other.high or one.high < other.low
