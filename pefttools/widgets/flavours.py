"""Pictures of chapter 08: DoRA's rows, losses over rates and ranks with error bars, φ heat maps, a rank budget.

Each function that draws is pure: numbers in, a Matplotlib figure out. As in the other chapters, what trains is orange
and plain, what is frozen is grey and hatched; curves differ in marker and line as well as in colour.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

TRAINED, FROZEN, INK = "#E69F00", "#D9D9D9", "#222222"  # Okabe and Ito's orange; grey; near black
COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS, LINES = "sovD^P", ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# ------------------------------------------------------------------------------------------------ DoRA

def dora_picture(w: Sequence[float] = (2.4, 0.6), delta: Sequence[float] = (-0.6, 1.6), m: float = 3.1):
    """Left, one row of a weight as an arrow: W₀, W₀ + ΔW, where DoRA puts it. Right, which numbers share a length."""
    from matplotlib.patches import Circle, Rectangle

    fig = _figure(10.4, 4.0)
    left, right = fig.subplots(1, 2, width_ratios=(1.15, 1))
    start, total = math.hypot(*w), (w[0] + delta[0], w[1] + delta[1])
    size = math.hypot(*total)
    end = tuple(m * part / size for part in total)
    for radius, style in ((start, ":"), (m, "--")):
        left.add_patch(Circle((0, 0), radius, fill=False, ec=INK, ls=style, lw=1))
    # the last one first, so that the shorter arrow on the same ray stays visible
    for tip, colour, label, place, width in (
            (end, TRAINED, "DoRA: as long as $m$", (-0.25, 0.12), 0.09), (total, "#0072B2", "LoRA: $W_0 + \\Delta W$",
                                                                          (0.16, -0.3), 0.03),
            (w, "#777777", "$W_0$", (0.12, -0.28), 0.05)):
        left.arrow(0, 0, *tip, width=width, head_width=0.2, length_includes_head=True, color=colour, ec=INK, lw=0.5)
        left.text(tip[0] + place[0], tip[1] + place[1], label, fontsize=10, ha="right" if place[0] < 0 else "left")
    left.annotate("", xy=total, xytext=w, arrowprops={"arrowstyle": "->", "color": "#0072B2", "ls": "--"})
    left.text((w[0] + total[0]) / 2 + 0.12, (w[1] + total[1]) / 2, "$\\Delta W$", color="#0072B2", fontsize=10)
    left.set(xlim=(-0.6, 4.3), ylim=(-0.7, 3.6), title="one row of the weight, as an arrow")
    left.set_aspect("equal")
    left.spines[["top", "right"]].set_visible(False)

    right.axis("off")
    rows, columns = 4, 6
    for row in range(rows):
        for column in range(columns):
            right.add_patch(Rectangle((column, rows - 1 - row), 1, 1, fc=TRAINED if row == 1 else "white", ec=INK, lw=1,
                                      hatch="\\\\" if column == 4 else None))
    for row in range(rows):
        right.add_patch(Rectangle((columns + 0.5, rows - 1 - row), 0.8, 1, fc=TRAINED, ec=INK, lw=1))
    right.text(columns + 0.9, rows + 0.15, "$m$", ha="center", fontsize=12)
    right.text(columns / 2, -0.15, "$d_{in}$ columns: one for each input", ha="center", va="top", fontsize=9)
    right.text(-0.2, rows / 2, "$d_{out}$ rows:\none for each output", ha="right", va="center", fontsize=9)
    right.text(columns / 2, -0.75, "orange: the numbers that make one output. They share a length: dim=1.\n"
               "hatched: a column, the wrong axis (dim=0)", ha="center", va="top", fontsize=9)
    right.set(xlim=(-2.3, columns + 1.6), ylim=(-1.9, rows + 0.8), title="a weight as torch keeps it")
    return fig


# ----------------------------------------------------------------------------------------------- losses with error bars

def curves_figure(curves: Mapping[str, Mapping[float, Sequence[float]]], xlabel: str = "learning rate (peak)",
                  top: float | None = None, chosen: Mapping[str, float] | None = None, base: float | None = None,
                  title: str = ""):
    """Mean loss over seeds against a learning rate or a rank, one curve per method; bars: standard deviation.

    curves: method → {x: losses of the seeds}. Losses above `top` are drawn at the upper edge, as arrows.
    chosen: method → the x that gets a circle.
    """
    fig = _figure(8.2, 4.0)
    ax = fig.add_subplot()
    for (name, points), colour, marker, line in zip(curves.items(), COLOURS, MARKERS, LINES):
        xs = sorted(points)
        means = [statistics.mean(points[x]) for x in xs]
        sds = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
        ax.errorbar(xs, means, yerr=sds, color=colour, marker=marker, ls=line, capsize=4, ms=6, lw=1.6, label=name)
        if chosen and name in chosen:
            ax.plot(chosen[name], means[xs.index(chosen[name])], "o", ms=15, mfc="none", mec=colour, mew=1.4)
        if top is not None:
            for x, mean in zip(xs, means):
                if mean > top:
                    ax.plot(x, top * 0.985, marker="^", ms=9, color=colour)
    if base is not None:
        ax.axhline(base, color=INK, ls=":", lw=1)
        ax.text(min(min(points) for points in curves.values()), base, " before training", fontsize=8, va="bottom")
    ax.set(xscale="log", xlabel=xlabel, ylabel="held-out loss (lower is better)", title=title)
    every = sorted({x for points in curves.values() for x in points})
    ax.set_xticks(every, labels=[f"{x:g}" for x in every])
    ax.minorticks_off()
    if top is not None:
        ax.set_ylim(min(min(min(v) for v in points.values()) for points in curves.values()) - 0.1, top)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def dots_figure(rows: Mapping[str, Sequence[float]], xlabel: str = "held-out loss (lower is better)", title: str = ""):
    """One row per name: each seed a small circle, the mean a diamond, the standard deviation a bar."""
    fig = _figure(7.4, 1.2 + 0.55 * len(rows))
    ax = fig.add_subplot()
    for y, (_, ends) in enumerate(reversed(rows.items())):
        mean, sd = statistics.mean(ends), statistics.stdev(ends) if len(ends) > 1 else 0
        ax.plot(ends, [y + 0.2] * len(ends), "o", color=COLOURS[1], ms=4, mfc="white")
        ax.errorbar(mean, y - 0.05, xerr=sd, fmt="D", color=COLOURS[1], ms=7, capsize=4)
        ax.annotate(f"{mean:.2f}", (mean, y - 0.05), xytext=(0, -15), textcoords="offset points", ha="center",
                    fontsize=8)
    ax.set(yticks=range(len(rows)), yticklabels=list(rows)[::-1], ylim=(-0.7, len(rows) - 0.3), xlabel=xlabel,
           title=title)
    ax.spines[["top", "right"]].set_visible(False)
    return fig


# ------------------------------------------------------------------------------------------------ φ

def chance(i: int, j: int, n: int) -> float:
    """What φ(i, j) is on average for two random subspaces of n dimensions: max(i, j)/n."""
    return max(i, j) / n


def phi_figure(table: Any, n: int, title: str = ""):
    """φ(i, j) as a heat map, i downwards and j to the right, and beside it three of its rows against chance.

    table: [i, j] with entries in [0, 1], as pefttools.subspace.subspace_table gives it; n: numbers that a layer reads.
    """
    rows, columns = len(table), len(table[0])
    fig = _figure(11.0, 3.7)
    left, right = fig.subplots(1, 2, width_ratios=(1.5, 1))
    largest = max(float(value) for row in table for value in row)
    image = left.imshow(table, cmap="viridis", vmin=0, vmax=0.6 if largest <= 0.6 else 1, aspect="auto",
                        interpolation="nearest",
                        extent=(0.5, columns + 0.5, rows + 0.5, 0.5))
    left.set(xlabel="j: the first j directions of the second", ylabel="i: the first i of the first", title=title)
    left.set_yticks(range(1, rows + 1) if rows <= 10 else range(8, rows + 1, 8))
    fig.colorbar(image, ax=left, label="φ(i, j)", pad=0.01)
    js = list(range(1, columns + 1))
    for i, colour, line, marker in zip(sorted({1, max(1, rows // 4), rows}), COLOURS[1:], LINES, MARKERS):
        right.plot(js, [float(table[i - 1][j - 1]) for j in js], color=colour, ls=line, marker=marker,
                   markevery=max(1, columns // 8), ms=5,
                   label=f"i = {i}")
        right.plot(js, [chance(i, j, n) for j in js], color=colour, ls=(0, (1, 3)), lw=1)
    right.set(xlabel="j", ylabel="φ(i, j)", ylim=(0, max(0.6, largest) + 0.02), title="rows of it; thin dots: chance")
    right.legend(frameon=False, loc="upper right", fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    return fig


def phi_explorer(tables: Mapping[str, Mapping[str, Any]], n: int):
    """The heat map with controls: which two trainings, and which matrix; its first frame without a front end."""
    from pefttools.widgets.base import slider_figure

    matrices = list(next(iter(tables.values())))

    def draw(compare: str, matrix: str):
        return phi_figure(tables[compare][matrix], n, f"{compare} · {matrix}")

    def alt(compare: str, matrix: str) -> str:
        table = tables[compare][matrix]
        last_i, last_j = len(table), len(table[0])
        return (f"Heat map of φ(i, j), {compare}, {matrix}: φ(1, 1) is {float(table[0][0]):.2f}, φ(1, {last_j}) is "
                f"{float(table[0][-1]):.2f}, φ({last_i}, {last_j}) is {float(table[-1][-1]):.2f}; chance gives "
                f"{chance(1, 1, n):.3f}, {chance(1, last_j, n):.2f} and {chance(last_i, last_j, n):.2f}.")

    return slider_figure(draw, alt=alt, title="How much of what one training found lies within what another found?",
                         compare=list(tables), matrix=matrices)


# ------------------------------------------------------------------------------------------------ a rank budget

def budget_figure(ranks: Mapping[str, Sequence[int]], title: str = ""):
    """Ranks as a table of numbers: kind of matrix → one rank per layer. Layers to the right."""
    names = list(ranks)
    layers = max(map(len, ranks.values()))
    most = max(1, max(max(row) for row in ranks.values()))
    fig = _figure(1.8 + 0.85 * layers, 1.2 + 0.36 * len(names))
    ax = fig.add_subplot()
    ax.imshow([list(row) for row in ranks.values()], cmap="YlOrBr", vmin=0, vmax=most, aspect="auto")
    for y, row in enumerate(ranks.values()):
        for x, k in enumerate(row):
            ax.text(x, y, str(k), ha="center", va="center", fontsize=10, color="white" if k > 0.65 * most else INK)
    ax.set(xticks=range(layers), xticklabels=range(layers), yticks=range(len(names)), yticklabels=names,
           xlabel="layer (0 is next to the input)",
           title=title)
    return fig
