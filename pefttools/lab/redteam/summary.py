"""From the runs to statements: every figure with its interval, what moved, and by how much.

An attack, a cure or a control is judged by the figure that the attack is about (`experiments.EXPERIMENTS`):
    moved         its interval and that of the condition it is compared with have no point in common, and the interval
                  of the paired difference is clear of 0; in other words, by more than its interval
    moved back    moved from where the attack left it, towards its start; "in part" where it still is away from it
Controls are compared with "before".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pefttools.lab.redteam.experiments import CONTROLS, EXPERIMENTS
from pefttools.lab.redteam.interval import Interval, difference, disjoint, over_seeds


class Line(NamedTuple):
    """One condition: the figure's interval, and the paired differences from "before" and from the attack."""

    condition: str
    figure: Interval
    from_before: Interval
    from_attack: Interval


def values_of(measured: Mapping[str, Any], figure: str) -> list[float]:
    """One seed's values of a figure, flags unpacked. Raises ValueError for a figure that was not measured."""
    if figure not in measured:
        raise ValueError(f"figure: got {figure!r}; measured were {', '.join(measured)}")
    return [float(v) for v in measured[figure]]


def table(found: Mapping[str, Any], experiment: str, condition: str, figure: str) -> list[list[float]]:
    """[seeds][prompts] of a figure."""
    runs = found[experiment][condition]
    return [values_of(runs[seed], figure) for seed in sorted(runs)]


def interval(found: Mapping[str, Any], experiment: str, condition: str, figure: str | None = None) -> Interval:
    """The mean of a figure (the experiment's main one) over seeds and prompts."""
    return over_seeds(table(found, experiment, condition, figure or EXPERIMENTS[experiment][3]))


def change(found: Mapping[str, Any], experiment: str, before: str, after: str, figure: str | None = None) -> Interval:
    """The paired difference after − before, over the seeds that both have."""
    figure = figure or EXPERIMENTS[experiment][3]
    both = sorted(set(found[experiment][before]) & set(found[experiment][after]))
    return difference(*([values_of(found[experiment][c][seed], figure) for seed in both] for c in (before, after)))


def start_of(experiment: str) -> str:
    """The condition that the attack starts from: a model that refuses must be taught first, the others are "before"."""
    return "taught" if experiment == "refusals" else "before"


def attack_of(experiment: str) -> str:
    """The condition that is the attack: the one after its start."""
    conditions = EXPERIMENTS[experiment][0]
    return conditions[conditions.index(start_of(experiment)) + 1]


def lines(found: Mapping[str, Any], experiment: str, figure: str | None = None) -> list[Line]:
    """Every condition that was measured, in the order of the experiment, controls last."""
    measured = [c for c in (*EXPERIMENTS[experiment][0], *CONTROLS) if c in found.get(experiment, {})]
    attack = attack_of(experiment)
    return [
        Line(
            c,
            interval(found, experiment, c, figure),
            change(found, experiment, "before", c, figure),
            change(found, experiment, attack, c, figure),
        )
        for c in measured
    ]


def moved(change: Interval, one: Interval, other: Interval) -> bool:
    """Whether a figure moved: the intervals are apart, and that of the paired difference is clear of 0."""
    return disjoint(one, other) and not change.low <= 0 <= change.high
