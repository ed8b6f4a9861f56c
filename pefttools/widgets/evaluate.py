"""Pictures of chapter 10: how many rows a comparison needs, pass@k, resampled means, figures with their intervals, and
a canary among its candidates.

Each function that draws is pure: numbers in, a Matplotlib figure out. What is told apart differs in marker, line or
hatch as well as in colour. An interval is (value, low, high), as `pefttools.lab.Interval` unpacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

INK, GREY = "#222222", "#BBBBBB"
ORANGE, BLUE, GREEN, PURPLE, VERMILION = "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00"  # Okabe and Ito's
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, INK)
MARKERS, LINES = "osD^vP", ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
Z95, Z80 = 1.959964, 0.841621  # quantiles of the normal distribution: 97.5 % and 80 %


def _figure(width: float, height: float):
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def _bare(*axes) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


def difference_variance(a: float, b: float, alike: float, paired: bool) -> float:
    """Variance of one row's part in the difference of two pass rates a and b (0 to 1).

    alike: 0, the two pass rows independently; 1, whatever the worse one passes the better one passes too; the
    covariance is `alike` times the largest possible. Unpaired (other rows for each) it plays no role. Raises ValueError
    for what is no share.
    """
    if not (0 <= a <= 1 and 0 <= b <= 1 and 0 <= alike <= 1):
        raise ValueError(f"a, b and alike are shares from 0 to 1; got {a}, {b} and {alike}")
    covariance = alike * (min(a, b) - a * b) if paired else 0.0
    return a * (1 - a) + b * (1 - b) - 2 * covariance


def half_width(a: float, b: float, n: int, alike: float, paired: bool) -> float:
    """Half of the 95 % interval of the difference on n rows, by the normal approximation."""
    return Z95 * math.sqrt(difference_variance(a, b, alike, paired) / n)


def rows_needed(a: float, b: float, alike: float, paired: bool, power: float = 0.8) -> float:
    """Rows on which the interval leaves out 0 with probability `power`: 0.8, or 0.5 (half of it is the difference).

    Raises ValueError for another power. Equal rates: no number of rows will do, infinity.
    """
    if a == b:
        return math.inf
    z = {0.8: Z95 + Z80, 0.5: Z95}.get(power)
    if z is None:
        raise ValueError(f"power is {power}; it must be 0.8 or 0.5")
    return z * z * difference_variance(a, b, alike, paired) / (a - b) ** 2


def rows_figure(a: int = 70, b: int = 75, rows: int = 200, alike: float = 0.6):
    """Left, half of the difference's 95 % interval over the number of rows; right, the intervals on `rows` of them.

    a, b: two pass rates in percent. alike: as in `difference_variance`.
    """
    fig = _figure(11.0, 4.1)
    left, right = fig.subplots(1, 2, width_ratios=(1.35, 1))
    p, q = a / 100, b / 100
    ns = [10 * 1.1 ** i for i in range(80)]
    ways = ((False, VERMILION, "--", "s", "other rows for each", (8, 6, "left")),
            (True, BLUE, "-", "o", "the same rows, paired", (-8, -12, "right")))
    for paired, colour, line, marker, name, (right_by, up_by, side) in ways:
        left.plot(ns, [100 * half_width(p, q, n, alike, paired) for n in ns], color=colour, ls=line, lw=2, label=name)
        needed = rows_needed(p, q, alike, paired)
        if 10 < needed < ns[-1]:
            point = (needed, 100 * half_width(p, q, needed, alike, paired))
            left.plot(*point, marker, color=colour, ms=9, mec=INK)
            left.annotate(f"{needed:,.0f} rows", point, xytext=(right_by, up_by), textcoords="offset points", ha=side)
    if a != b:
        left.axhline(abs(b - a), color=INK, ls=":", lw=1.2)
        left.text(11, abs(b - a) * 1.06, f"the difference itself, {abs(b - a)} points", fontsize=9)
    left.axvline(rows, color=GREY, lw=1)
    left.set(xscale="log", yscale="log", xlabel="test rows", ylabel="± points of the difference (95 %)",
             xlim=(10, ns[-1]), ylim=(0.5, 60), title=f"{a} % against {b} %")
    ticks = (10, 30, 100, 300, 1000, 3000, 10000)
    left.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    left.set_yticks([0.5, 1, 2, 5, 10, 20, 50], labels=["0.5", "1", "2", "5", "10", "20", "50"])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=9, loc="upper right")
    bars = [(f"{which}: {100 * rate:.0f} %", rate, Z95 * math.sqrt(rate * (1 - rate) / rows), INK, "D")
            for which, rate in (("first", p), ("second", q))]
    bars += [(f"difference, {name.split(',')[0]}", q - p, half_width(p, q, rows, alike, paired), colour, marker)
             for paired, colour, _, marker, name, _ in ways]
    for y, (_, value, half, colour, marker) in enumerate(reversed(bars)):
        right.errorbar(100 * value, y, xerr=100 * half, fmt=marker, color=colour, ms=7, capsize=4, lw=2)
        right.text(100 * value, y + 0.22, f"± {100 * half:.1f}", ha="center", fontsize=9)
    right.axvline(0, color=INK, lw=0.8, ls=":")
    right.set(yticks=range(len(bars)), yticklabels=[bar[0] for bar in reversed(bars)], ylim=(-0.5, len(bars) - 0.3),
              xlabel="percent, or points", title=f"95 % intervals on {rows:,} rows")
    _bare(left, right)
    return fig


def rows_explorer(a: int = 70, b: int = 75, rows: int = 200, alike: float = 0.6):
    """The picture with sliders; its first frame without a front end."""
    from pefttools.widgets.base import Slider, slider_figure
    def alt(a: int, b: int, rows: int, alike: float) -> str:
        p, q = a / 100, b / 100
        needed = [rows_needed(p, q, alike, paired) for paired in (False, True)]
        apart = [f"{n:,.0f}" if math.isfinite(n) else "no number of" for n in needed]
        halves = [100 * half_width(p, q, rows, alike, paired) for paired in (False, True)]
        return (f"Pass rates of {a} and {b} %: to tell them apart with a chance of 80 % takes {apart[0]} rows with other "
                f"rows for each, and {apart[1]} with the same rows, paired. On {rows} rows the 95 % interval of the "
                f"difference is ± {halves[0]:.1f} points unpaired and ± {halves[1]:.1f} paired.")

    return slider_figure(rows_figure, alt=alt, title="How many test rows do I need to tell two adapters apart?",
                         a=Slider(a, 0, 100, label="first, %"), b=Slider(b, 0, 100, label="second, %"),
                         rows=Slider(rows, 20, 5000, 10, "test rows"),
                         alike=Slider(alike, 0.0, 1.0, 0.05, "alike (0: independent)"))


def intervals_figure(rows: Mapping[str, tuple[float, float, float]], xlabel: str, title: str = "",
                     line: float | None = 0.0, percent: bool = False, groups: Mapping[str, int] | None = None,
                     limits: tuple[float, float] | None = None):
    """One row per name: value as a marker, its interval as a bar, the number beside it. A dotted line at `line`.

    groups: name → number of its group; a group has one colour and marker. percent: values are shares, shown in percent.
    """
    by = 100 if percent else 1
    fig = _figure(8.6, 1.1 + 0.42 * len(rows))
    ax = fig.add_subplot()
    if line is not None:
        ax.axvline(line * by, color=INK, ls=":", lw=1)
    for y, (name, (value, low, high)) in enumerate(reversed(rows.items())):
        group = (groups or {}).get(name, 0) % len(COLOURS)
        bars = [[by * max(0.0, value - low)], [by * max(0.0, high - value)]]
        ax.errorbar(by * value, y, xerr=bars, fmt=MARKERS[group], color=COLOURS[group], ms=7, capsize=4, lw=2)
        digits = 0 if percent else 2
        ax.annotate(f"{by * value:.{digits}f}", (by * value, y), xytext=(0, 8), textcoords="offset points", ha="center",
                    fontsize=9)
    ax.set(yticks=range(len(rows)), yticklabels=list(rows)[::-1], ylim=(-0.6, len(rows) - 0.2), xlabel=xlabel,
           title=title, xlim=limits)
    _bare(ax)
    return fig


def bars_figure(values: Mapping[str, float], right: str, ylabel: str, title: str = ""):
    """A bar for each way to compute one figure; the bar of the `right` way is plain, the others are hatched."""
    fig = _figure(8.2, 3.4)
    ax = fig.add_subplot()
    for x, (name, value) in enumerate(values.items()):
        good = name == right
        ax.bar(x, value, color=BLUE if good else "white", ec=INK, hatch="" if good else "//", width=0.62)
        ax.text(x, value, f"{value:.3g}", ha="center", va="bottom", fontsize=10)
    ax.axhline(values[right], color=BLUE, lw=1, ls=":")
    ax.set(xticks=range(len(values)), xticklabels=list(values), ylabel=ylabel, title=title,
           ylim=(0, 1.12 * max(values.values())))
    _bare(ax)
    return fig


def lines_figure(curves: Mapping[str, Mapping[float, tuple[float, float, float]]], xlabel: str, ylabel: str,
                 title: str = "", percent: bool = False, flat: Mapping[str, float] | None = None):
    """A line for each name: x → (value, low, high), with bars. flat: levels to compare with, dotted, with a name."""
    by = 100 if percent else 1
    fig = _figure(8.2, 3.8)
    ax = fig.add_subplot()
    for (name, points), colour, marker, line in zip(curves.items(), COLOURS, MARKERS, LINES):
        xs = sorted(points)
        middle = [by * points[x][0] for x in xs]
        below = [by * max(0.0, points[x][0] - points[x][1]) for x in xs]
        above = [by * max(0.0, points[x][2] - points[x][0]) for x in xs]
        ax.errorbar(xs, middle, yerr=[below, above], color=colour, marker=marker, ls=line, ms=6, lw=1.8, capsize=4,
                    label=name)
    for name, level in (flat or {}).items():
        ax.axhline(by * level, color=INK, ls=":", lw=1)
        ax.annotate(name, (0.99, by * level), xycoords=("axes fraction", "data"), xytext=(0, 3),
                    textcoords="offset points", ha="right", fontsize=9)
    every = sorted({x for points in curves.values() for x in points})
    if len(every) <= 10:
        ax.set_xticks(every, labels=[f"{x:g}" for x in every])
    ax.minorticks_off()
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(curves) > 1:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _bare(ax)
    return fig


def _edges(values: Sequence[float]) -> list[float]:
    """Ends of bins, one for each value where they lie on a grid (means of zeros and ones do), else 48 equal ones."""
    low, high = min(values), max(values)
    steps = sorted({round(x, 6) for x in values})
    step = min((y - x for x, y in zip(steps, steps[1:])), default=0.0)
    if step > 0 and (high - low) / step <= 80:
        return [low + step * (i - 0.5) for i in range(round((high - low) / step) + 2)]
    return [low + max(high - low, 1e-9) * i / 48 for i in range(49)]


def resamples_figure(means: Mapping[str, Sequence[float]], difference: float,
                     intervals: Mapping[str, tuple[float, float, float]]):
    """Histograms of resampled mean differences, one panel each on a common axis, with the 95 % interval beneath."""
    fig = _figure(8.2, 1.0 + 1.9 * len(means))
    axes = fig.subplots(len(means), 1, sharex=True, squeeze=False)[:, 0]
    edges = _edges([x for values in means.values() for x in values])
    for ax, (name, values), colour, hatch in zip(axes, means.items(), (BLUE, VERMILION, GREEN), ("", "//", "..")):
        counts, _, _ = ax.hist(list(values), bins=edges, color=colour, ec="white", hatch=hatch, lw=0.3)
        _, left, right = intervals[name]
        ax.plot([left, right], [-0.06 * counts.max()] * 2, color=INK, lw=5, solid_capstyle="butt")
        ax.axvline(0, color=INK, ls=":", lw=1)
        ax.axvline(difference, color=INK, lw=1)
        ax.set(yticks=[], title=f"{name}: 95 % of the means lie from {left:+.3f} to {right:+.3f}")
        ax.spines["left"].set_visible(False)
    axes[-1].set(xlabel="mean difference of a resample (dotted: no difference; solid: the rows as they are)")
    _bare(*axes)
    return fig


def pass_at_k_figure(ks: Sequence[int], estimates: Mapping[str, Sequence[float]], truth: Sequence[float] | None = None,
                     title: str = ""):
    """pass@k over k, in percent, one curve per way to estimate it; the truth, where known, as a thick grey line."""
    fig = _figure(7.8, 3.7)
    ax = fig.add_subplot()
    if truth is not None:
        ax.plot(ks, [100 * x for x in truth], color=GREY, lw=7, label="truth", solid_capstyle="round")
    for (name, values), colour, marker, line in zip(estimates.items(), COLOURS, MARKERS, LINES):
        ax.plot(ks, [100 * x for x in values], color=colour, marker=marker, ls=line, ms=5, lw=1.8, label=name)
    ax.set(xlabel="k", ylabel="pass@k, %", title=title, xticks=list(ks), ylim=(0, None))
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _bare(ax)
    return fig


def canary_figure(candidates: Mapping[str, Sequence[float]], planted: Mapping[str, float], bits: Mapping[str, float]):
    """For each model the losses of the candidates as a histogram, and the canary's as a line with its exposure."""
    fig = _figure(8.6, 0.8 + 1.55 * len(candidates))
    axes = fig.subplots(len(candidates), 1, sharex=True, squeeze=False)[:, 0]
    edges = _edges([x for losses in candidates.values() for x in losses] + list(planted.values()))
    for ax, (name, losses) in zip(axes, candidates.items()):
        counts, _, _ = ax.hist(list(losses), bins=edges, color=GREY, ec="white", lw=0.3)
        ax.axvline(planted[name], color=VERMILION, lw=2)
        ax.plot(planted[name], 0.88 * counts.max(), "v", color=VERMILION, ms=9, mec=INK)
        side = planted[name] < (edges[0] + edges[-1]) / 2
        text = f" the canary: {bits[name]:.1f} bits " if side else f" {bits[name]:.1f} bits: the canary "
        ax.annotate(text, (planted[name], 0.62 * counts.max()), ha="left" if side else "right", fontsize=10)
        ax.set(yticks=[], title=name)
        ax.spines["left"].set_visible(False)
    axes[-1].set(xlabel="loss of a candidate (nats; to the left: what the model expects)")
    _bare(*axes)
    return fig
