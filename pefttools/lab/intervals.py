"""How far could this figure be off? Percentile bootstrap over rows, over pairs of rows, over seeds × rows.

    draw the rows again, with replacement, as many as there are      rows  1 2 3 4 5  →  2 2 5 1 4
    compute the figure on what was drawn; do that `draws` times
    the interval is what lies between the 2.5th and 97.5th percentile of those figures        (Efron 1979)

Two systems on the same rows: the same drawn rows for both, and the difference of the two figures. Rows that are hard
for both cancel, which is why a paired interval is the narrower one. Several seeds: which seeds were run is chance as
much as which rows were asked, so both are drawn again, independently (Owen 2007, "the pigeonhole bootstrap").

An interval of rows alone says nothing about another seed. Few seeds give too narrow an interval: with S of them the
spread that the bootstrap sees is on average √((S − 1)/S) of the true one, 0.82 for three; `tests/lab/test_intervals.py`
measures what is left of the 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

AT_ONCE = 4_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """A figure and the interval around it. `0.3 in interval`; unpacks to value, low, high."""

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high

    def __iter__(self) -> Iterator[float]:
        return iter((self.value, self.low, self.high))

    def apart(self, number: float = 0.0) -> bool:
        """Whether `number` lies outside: of a difference, whether it is more than chance gives."""
        return number not in self

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap(values: Sequence, counts: Sequence | None = None, *, draws: int = 2000, level: float = 0.95,
              seed: int = 0) -> Interval:
    """Mean of `values` with its percentile interval; with `counts`, Σ values / Σ counts (a loss per token).

    values: one number a row, or [seeds][rows], the same rows for every seed: then seeds and rows are both drawn again.
    counts: of the same shape; what was drawn together stays together. level: share of intervals that should hold the
    truth. Raises ValueError for other shapes, no rows, or values that are not finite.
    """
    table, weight = _tables(values, counts)
    _check(draws, level)
    figures = _figures([(table, weight)], draws, seed)[0]
    return _interval(_figure(table, weight), figures, level)


def paired_bootstrap(a: Sequence, b: Sequence, counts: Sequence | None = None, *, draws: int = 2000,
                     level: float = 0.95, seed: int = 0) -> Interval:
    """Figure of `a` minus figure of `b`, row i of both being the same row (and seed s the same seed).

    Shapes and counts as in `bootstrap`; `counts` holds for both (the same rows have the same tokens).
    """
    first, weight = _tables(a, counts, "a")
    second, _ = _tables(b, counts, "b")
    if first.shape != second.shape:
        raise ValueError(f"a and b must be the same rows: their shapes are {first.shape} and {second.shape}")
    _check(draws, level)
    one, two = _figures([(first, weight), (second, weight)], draws, seed)
    return _interval(_figure(first, weight) - _figure(second, weight), one - two, level)


def wilson(passed: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): honest at 0 of n and n of n, where p ± z·s is not."""
    p, d = passed / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half) if passed else 0.0, min(1.0, middle + half) if passed < n else 1.0


# ------------------------------------------------------------------------------------------------ the drawing

def _tables(values: Sequence, counts: Sequence | None, name: str = "values") -> tuple[np.ndarray, np.ndarray]:
    """(values, counts), each of shape [seeds, rows]; one seed where there is no such axis."""
    try:
        table = np.asarray([np.asarray(row, dtype=float) for row in values])
        weight = np.ones_like(table) if counts is None else np.asarray([np.asarray(row, dtype=float) for row in counts])
    except (TypeError, ValueError):
        raise ValueError(f"{name}: one number a row is needed, or [seeds][rows] with the same rows for every seed") \
            from None
    if table.ndim not in (1, 2) or not table.size:
        raise ValueError(f"{name}: shape [rows] or [seeds, rows] is needed, with at least one row; got {table.shape}")
    if weight.shape != table.shape:
        raise ValueError(f"counts must have the shape of {name}, {table.shape}; got {weight.shape}")
    if not np.isfinite(table).all() or not np.isfinite(weight).all():
        raise ValueError(f"{name}: every number must be finite; {int((~np.isfinite(table)).sum())} are not")
    if (weight < 0).any() or not weight.sum() > 0:
        raise ValueError("counts must not be negative, and not all of them 0")
    return np.atleast_2d(table), np.atleast_2d(weight)


def _check(draws: int, level: float) -> None:
    if draws < 100:
        raise ValueError(f"draws must be at least 100 for percentiles to mean something, got {draws}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")


def _figure(table: np.ndarray, weight: np.ndarray) -> float:
    return float(table.sum() / weight.sum())


def _figures(pairs: list[tuple[np.ndarray, np.ndarray]], draws: int, seed: int) -> list[np.ndarray]:
    """The figure of each (values, counts) on `draws` draws, the same draws for all of them."""
    rng = np.random.default_rng(seed)
    seeds, rows = pairs[0][0].shape
    found: list[list[np.ndarray]] = [[] for _ in pairs]
    step = max(1, AT_ONCE // rows)
    for start in range(0, draws, step):
        many = min(step, draws - start)
        # how often each row was drawn, and each seed
        often = rng.multinomial(rows, np.full(rows, 1 / rows), size=many).astype(float)
        runs = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=many).astype(float)
        for (table, weight), into in zip(pairs, found):
            below = ((runs @ weight) * often).sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):
                into.append(((runs @ table) * often).sum(1) / below)
    return [np.concatenate(each) for each in found]


def _interval(value: float, figures: np.ndarray, level: float) -> Interval:
    figures = figures[np.isfinite(figures)]  # a draw of rows that have no token at all
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
