"""Pictures of chapter 11: what every method costs and what it gives, planned beside measured, losses along the way.

Each function that draws is pure: rows of the table (`pefttools.lab.capstone`) in, a Matplotlib figure out. Methods differ in
marker as well as in colour, and everything that is a point has its name beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

INK, GREY = "#222222", "#777777"
COLOURS = {"qlora": "#0072B2", "lora": "#56B4E9", "dora": "#009E73", "adapter": "#E69F00", "ia3": "#CC79A7",
           "prefix": "#D55E00", "prompt": "#B8A200", "full": "#222222"}
MARKERS = {"qlora": "o", "lora": "s", "dora": "D", "adapter": "^", "ia3": "v", "prefix": "P", "prompt": "X",
           "full": "*"}
MiB = 2**20
AXES = {  # name of an axis: (value of a row, label, whether its scale is logarithmic, whether less is better)
    "memory": (lambda row: row["measured"] / MiB, "peak memory, MiB", False, True),
    "loss": (lambda row: row["loss"]["value"], "held-out loss, nats a token", False, True),
    "trainable parameters": (lambda row: row["trainable"], "trainable parameters", True, True),
    "tokens per second": (lambda row: row["tokens_per_second"], "tokens read in a second", False, False),
    "forgetting": (lambda row: row["forgetting"]["value"], "forgetting, nats a token", False, True),
}


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def ran(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of methods that were run."""
    return [row for row in rows if "missing" not in row]


def on_front(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[str]:
    """The methods that no other beats in both numbers: not worse in either, better in one."""
    def cost(row: Mapping[str, Any], name: str) -> float:
        return AXES[name][0](row) * (1 if AXES[name][3] else -1)

    points = {row["method"]: (cost(row, x), cost(row, y)) for row in ran(rows)}
    return [name for name, (a, b) in points.items()
            if not any(c <= a and d <= b and (c < a or d < b) for c, d in points.values())]


def pareto_figure(rows: Sequence[Mapping[str, Any]], x: str = "memory", y: str = "loss", base: str = ""):
    """Every method as a point; its area grows with its trainable parameters (logarithm); the front as a staircase."""
    for name in (x, y):
        if name not in AXES:
            raise ValueError(f"axis {name!r} is not known; there are {', '.join(AXES)}")
    fig = _figure(8.4, 4.6)
    ax = fig.add_subplot()
    found, front = ran(rows), on_front(rows, x, y)
    for row in found:
        name = row["method"]
        ax.scatter(AXES[x][0](row), AXES[y][0](row), s=25 * math.log10(max(10, row["trainable"])) ** 1.6,
                   marker=MARKERS.get(name, "o"), color=COLOURS.get(name, GREY), edgecolor=INK,
                   lw=1.6 if name in front else 0.6, zorder=3)
        for axis, other, flat in ((x, y, True), (y, x, False)):
            if axis in ("loss", "forgetting"):
                low, high = row[axis]["low"], row[axis]["high"]
                at = AXES[other][0](row)
                ax.plot(*(([low, high], [at, at]) if flat else ([at, at], [low, high])), color=GREY, lw=0.8, zorder=2)
    if len(front) > 1:
        stairs = sorted((AXES[x][0](row), AXES[y][0](row)) for row in found if row["method"] in front)
        ax.step(*zip(*stairs), where="post" if AXES[x][3] else "pre", color=INK, ls="--", lw=1, zorder=1)
    for name, which in ((x, "x"), (y, "y")):
        if AXES[name][2]:
            getattr(ax, f"set_{which}scale")("log")
    for row in found:
        bold = "bold" if row["method"] in front else "normal"
        ax.annotate(row["method"], (AXES[x][0](row), AXES[y][0](row)), xytext=(9, 6), textcoords="offset points",
                    fontsize=9, weight=bold)
    arrows = {name: f"{AXES[name][1]} ({'less' if AXES[name][3] else 'more'} is better)" for name in (x, y)}
    ax.set(xlabel=arrows[x], ylabel=arrows[y], title=f"every method, one task{f': {base}' if base else ''}")
    ax.margins(0.16)
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def pareto_alt(rows: Sequence[Mapping[str, Any]], x: str = "memory", y: str = "loss") -> str:
    points = "; ".join(f"{row['method']} {AXES[x][0](row):,.4g}, {AXES[y][0](row):,.4g}" for row in ran(rows))
    return (f"Scatter plot of {AXES[x][1]} and {AXES[y][1]}: {points}. Beaten by nobody: {', '.join(on_front(rows, x, y))}. "
            "The size of a point is its number of trainable parameters.")


def pareto_explorer(rows: Sequence[Mapping[str, Any]], base: str = ""):
    """The same with both axes to choose; its first frame needs no front end."""
    from pefttools.widgets.base import slider_figure

    names = list(AXES)
    return slider_figure(lambda across, upwards: pareto_figure(rows, across, upwards, base),
                         alt=lambda across, upwards: pareto_alt(rows, across, upwards),
                         title="Which two numbers matter to you?", across=names,
                         upwards=["loss", *(name for name in names if name != "loss")])


def planned_figure(rows: Sequence[Mapping[str, Any]], room: int | None = None, base: str = ""):
    """Planned and measured peak memory of every method, as two bars; the room that the plan was made for as a line."""
    found = ran(rows)
    fig = _figure(8.4, 1.4 + 0.42 * len(found))
    ax = fig.add_subplot()
    for y, row in enumerate(reversed(found)):
        planned, measured = row["planned"] / MiB, row["measured"] / MiB
        ax.barh(y + 0.2, planned, height=0.36, color="white", edgecolor=INK, hatch="///", lw=0.8,
                label="planned" if y == 0 else None)
        ax.barh(y - 0.2, measured, height=0.36, color="#56B4E9", edgecolor=INK, lw=0.8,
                label="measured" if y == 0 else None)
        ax.text(max(planned, measured), y, f" {planned / measured - 1:+.1%}", va="center", fontsize=9)
    if room is not None:
        ax.axvline(room / MiB, color="#D55E00", ls="--", lw=1.2)
        ax.text(room / MiB, len(found) - 0.42, "room ", color="#D55E00", fontsize=9, ha="right", va="bottom")
    ax.set(yticks=range(len(found)), yticklabels=[row["method"] for row in reversed(found)],
           xlabel="peak of a training step, MiB", title=f"planned before, measured after{f': {base}' if base else ''}")
    longest = max(row[key] for row in found for key in ("planned", "measured"))
    ax.set_xlim(0, 1.12 * max(longest, room or 0) / MiB)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def planned_alt(rows: Sequence[Mapping[str, Any]]) -> str:
    return "Planned and measured memory of a step in MiB. " + "; ".join(
        f"{row['method']} {row['planned'] / MiB:,.0f} and {row['measured'] / MiB:,.0f}" for row in ran(rows)) + "."


def curves_figure(rows: Sequence[Mapping[str, Any]], base: str = ""):
    """Training loss of every method, running means of ten steps."""
    fig = _figure(8.4, 3.8)
    ax = fig.add_subplot()
    for row in ran(rows):
        steps = range(1, len(row["curve"]) + 1)
        ax.plot(steps, row["curve"], color=COLOURS.get(row["method"], GREY), ms=5,
                marker=MARKERS.get(row["method"], "o"), markevery=max(1, len(row["curve"]) // 8), lw=1.5, label=row["method"])
    ax.set(xlabel="optimizer step", ylabel="loss, mean of 10 steps", ylim=(0, None),
           title=f"same rows, same order{f': {base}' if base else ''}")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    return fig
