"""Pictures of chapter 04: weights falling to levels, levels from the normal distribution, bits in bytes, errors.

Each function that draws is pure: numbers in, a Matplotlib figure out. A data type looks the same all through the
chapter, by colour and by marker or hatch: NF4 orange circles, FP4 blue squares, INT4 green diamonds, Lloyd–Max purple
triangles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

INK, GREY = "#222222", "#BBBBBB"
ORANGE, BLUE, GREEN, PURPLE, VERMILION = "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00"
LOOK = {  # data type → colour, marker, hatch
    "NF4": (ORANGE, "o", ""), "FP4": (BLUE, "s", "//"), "INT4": (GREEN, "D", "xx"), "Lloyd–Max": (PURPLE, "^", ".."),
}
TYPES = tuple(LOOK)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bare(*axes) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------ the picture

def rounding_picture(block: Sequence[float], levels: Sequence[float]):
    """Weights of one block, divided by the block's absmax, and the level that each falls to."""
    absmax = max(abs(w) for w in block)
    fig = _figure(9.6, 3.2)
    ax = fig.add_subplot()
    used: dict[int, int] = {}
    for w in block:
        s = w / absmax
        k = min(range(len(levels)), key=lambda i: abs(levels[i] - s))
        used[k] = used.get(k, 0) + 1
        ax.plot([s, levels[k]], [1, 0.08], color=BLUE, lw=0.8, alpha=0.55, zorder=1)
        ax.plot(s, 1, "|", color=BLUE, ms=14, mew=1.4)
    for k, level in enumerate(levels):
        ax.plot(level, 0, "o", color=ORANGE if k in used else "white", mec=INK, ms=9, zorder=3)
        ax.text(level, -0.16, f"{k}", ha="center", va="top", fontsize=9)
        ax.text(level, -0.40, f"{level:.2f}".replace("-", "−"), ha="center", va="top", fontsize=7.5, color=INK)
        if k in used:
            ax.text(level, -0.62, f"{used[k]}×", ha="center", va="top", fontsize=8, color=VERMILION)
    for y, text in ((1, f"{len(block)} weights\n÷ {absmax:.3f}"), (0, "16 levels"), (-0.23, "number"), (-0.47, "level"),
                    (-0.69, "used")):
        ax.text(-1.14, y, text, ha="right", va="center", fontsize=9)
    ax.set(xlim=(-1.42, 1.06), ylim=(-0.85, 1.25))
    ax.axis("off")
    return fig


# ------------------------------------------------------------------------------------------------ the codebook

def codebook_figure(offset: float = 0.9677083):
    """Even steps in probability, through the inverse of the normal distribution function, to uneven levels."""
    import torch

    up = torch.linspace(0.5, offset, 9, dtype=torch.float64)
    down = torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64)[:-1]
    largest = torch.special.ndtri(up[-1]).item()
    fig = _figure(9.2, 4.3)
    ax = fig.add_subplot()
    x = torch.linspace(-2.6, 2.6, 300, dtype=torch.float64)
    ax.plot(x, torch.special.ndtr(x), color=INK, lw=2)
    for side, colour, style, marker in ((down, BLUE, "--", "s"), (up, ORANGE, "-", "o")):
        for p in side.tolist():
            z = torch.special.ndtri(torch.tensor(p, dtype=torch.float64)).item()
            ax.plot([-2.6, z, z], [p, p, 0], style, color=colour, lw=0.9)
            ax.plot(z, 0, marker, color=colour, mec=INK, ms=7, clip_on=False, zorder=4)
    ax.plot([], [], "s--", color=BLUE, mec=INK, label="below zero: 7 steps down from ½")
    ax.plot([], [], "o-", color=ORANGE, mec=INK, label="zero, and 8 steps up")
    ax.set(xlim=(-2.6, 2.6), ylim=(0, 1), ylabel="probability p: even steps", xlabel="quantile Φ⁻¹(p): uneven steps")
    ax.text(2.22, 0.86, "Φ, the share\nof normal\nnumbers below x", fontsize=9, ha="center", va="top")
    ax.legend(frameon=True, framealpha=1, edgecolor="none", fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.3))
    top = ax.secondary_xaxis("top", functions=(lambda v: v / largest, lambda v: v * largest))
    top.set_xlabel(f"level: divided by {largest:.3f}")
    _bare(ax)
    return fig


def ladders_figure(codes: Mapping[str, Sequence[float]]):
    """The levels of several data types under one another."""
    fig = _figure(9.2, 0.6 + 0.55 * len(codes))
    ax = fig.add_subplot()
    for y, (name, levels) in enumerate(reversed(codes.items())):
        colour, marker, _ = LOOK[name]
        ax.plot([-1, 1], [y, y], color=GREY, lw=0.8, zorder=0)
        ax.plot(list(levels), [y] * len(levels), marker, color=colour, mec=INK, ms=9, ls="none")
        ax.text(1.08, y, f"{len(set(levels))} different", va="center", fontsize=9)
    ax.set(yticks=range(len(codes)), yticklabels=list(codes)[::-1], xlim=(-1.06, 1.32), ylim=(-0.5, len(codes) - 0.5),
           xlabel="weight ÷ absmax of its block", xticks=[-1, -0.5, 0, 0.5, 1])
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return fig


def shares_figure(shares: Mapping[str, Sequence[float]]):
    """How often each of the sixteen codes is used, per name; the dashed line is one sixteenth."""
    fig = _figure(8.4, 3.0)
    ax = fig.add_subplot()
    width = 0.8 / len(shares)
    for i, (name, values) in enumerate(shares.items()):
        ax.bar([k + (i - (len(shares) - 1) / 2) * width for k in range(len(values))], [100 * v for v in values],
               width, color=(GREY, ORANGE)[i % 2], hatch=("///", "")[i % 2], ec=INK, lw=0.6, label=name)
    ax.axhline(100 / 16, color=INK, ls="--", lw=1)
    ax.text(15.6, 100 / 16 + 0.15, "1/16", fontsize=9, ha="right", va="bottom")
    ax.set(xlabel="code", ylabel="% of the weights", xticks=range(16))
    ax.legend(frameon=False, fontsize=9, loc="upper left", ncols=2, bbox_to_anchor=(0, 1.2))
    _bare(ax)
    return fig


# ------------------------------------------------------------------------------------------------ bits

def bits_picture(codes: Sequence[int]):
    """An even number of codes, each as four bits, put together two by two into bytes."""
    from matplotlib.patches import Rectangle

    if len(codes) % 2 or not all(0 <= code <= 15 for code in codes):
        raise ValueError(f"codes must be an even number of whole numbers from 0 to 15; got {list(codes)!r}")
    fig = _figure(1.2 + 1.15 * len(codes), 2.5)
    ax = fig.add_subplot()
    for i, code in enumerate(codes):
        left = 4 * i + (i // 2) * 0.8
        colour, hatch = ("#F7D08A", "") if i % 2 == 0 else ("#BFDDF0", "")
        ax.text(left + 2, 3.45, f"code {code}", ha="center", fontsize=10)
        for j, bit in enumerate(f"{code:04b}"):
            ax.add_patch(Rectangle((left + j, 2), 1, 1, fc=colour, ec=INK, lw=0.8, hatch=hatch))
            ax.text(left + j + 0.5, 2.5, bit, ha="center", va="center", family="monospace", fontsize=12)
        ax.text(left + 2, 1.62, ("upper half: first", "lower half: second")[i % 2], ha="center", va="center", fontsize=8)
    for i in range(0, len(codes), 2):
        left, byte = 4.4 * i, 16 * codes[i] + codes[i + 1]
        ax.add_patch(Rectangle((left, 0.15), 8, 1, fc="white", ec=INK, lw=1.8))
        ax.text(left + 4, 0.65, f"byte {byte} = 0x{byte:02X} = 16 · {codes[i]} + {codes[i + 1]}", ha="center", va="center",
                fontsize=10)
    ax.set(xlim=(-0.3, 4.4 * len(codes) - 0.5), ylim=(0, 4))
    ax.axis("off")
    return fig


def budget_figure(rows: Mapping[str, Mapping[str, float]]):
    """Bits a weight takes, as a bar per row made of its parts; the axis begins at 4, where the codes end.

    rows: name → {part: bits}; the first part is the codes, of which only the end is shown.
    """
    from matplotlib.patches import Patch

    fig = _figure(9.0, 1.2 + 0.5 * len(rows))
    ax = fig.add_subplot()
    looks = ((ORANGE, ""), (BLUE, "//"), (GREEN, "xx"), (VERMILION, ""))
    names = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    for y, parts in enumerate(reversed(rows.values())):
        left = 0.0
        for part, bits in parts.items():
            colour, hatch = looks[names.index(part) % 4]
            ax.barh(y, bits, left=left, color=colour, hatch=hatch, ec=INK, height=0.6)
            left += bits
        ax.text(left + 0.006, y, f"{left:.3f} bits", va="center", fontsize=10)
    handles = [Patch(fc=looks[i % 4][0], hatch=looks[i % 4][1], ec=INK, label=name) for i, name in enumerate(names)]
    ax.legend(handles=handles, frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    ax.set(yticks=range(len(rows)), yticklabels=list(rows)[::-1], xlim=(3.9, 4.62), xlabel="bits per weight (axis begins at 3.9)")
    _bare(ax)
    return fig


# ------------------------------------------------------------------------------------------------ measurements

def block_size_figure(errors: Mapping[str, Sequence[float]], sizes: Sequence[int], bits: Sequence[float]):
    """Relative error over block size, one line per kind of weights; below, what a block size costs in bits."""
    fig = _figure(7.6, 3.9)
    ax, below = fig.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    for i, (name, values) in enumerate(errors.items()):
        ax.plot(sizes, values, "osD^"[i % 4], ls=("-", "--", "-.", ":")[i % 4], color=(ORANGE, VERMILION, BLUE, GREEN)[i % 4],
                lw=1.8, ms=6, label=name)
    ax.set(ylabel="relative error", ylim=(0, None), title="larger blocks: fewer bits, larger errors")
    ax.legend(frameon=False, fontsize=9)
    below.plot(sizes, bits, "k.-", lw=1.2)
    below.set(xscale="log", xlabel="block size (weights that share an absmax)", ylabel="bits")
    below.set_xticks(sizes, [str(s) for s in sizes])
    below.minorticks_off()
    _bare(ax, below)
    return fig


def types_figure(errors: Mapping[str, Mapping[str, float]]):
    """Relative errors of data types, one group of bars per kind of weights. errors: kind → type → error."""
    fig = _figure(8.0, 3.2)
    ax = fig.add_subplot()
    names = list(next(iter(errors.values())))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        colour, _, hatch = LOOK[name]
        at = [k + (i - (len(names) - 1) / 2) * width for k in range(len(errors))]
        values = [group[name] for group in errors.values()]
        bars = ax.bar(at, values, width * 0.92, color=colour, hatch=hatch, ec=INK, lw=0.7, label=name)
        ax.bar_label(bars, [f"{v:.3f}" for v in values], fontsize=8)
    ax.set(xticks=range(len(errors)), xticklabels=list(errors), ylabel="relative error", ylim=(0, 0.15))
    ax.legend(frameon=False, fontsize=9, ncols=len(names), loc="upper left")
    _bare(ax)
    return fig


def loss_figure(runs: Mapping[str, Mapping[str, Sequence[float]]], unquantized: Mapping[str, float]):
    """Held-out loss over data types, one panel per model: a mark for each placement of the blocks, a bar for their mean.

    runs: model → type → losses; unquantized: model → its loss as it was, the dotted line.
    """
    fig = _figure(9.6, 3.3)
    axes = fig.subplots(1, len(runs), squeeze=False)[0]
    for ax, (model, types) in zip(axes, runs.items()):
        for x, (name, losses) in enumerate(types.items()):
            colour, marker, _ = LOOK.get(name, (GREY, "v", ""))
            mean = sum(losses) / len(losses)
            ax.plot([x - 0.3, x + 0.3], [mean, mean], color=INK, lw=2, zorder=1)
            ax.plot([x + 0.12 * (i - (len(losses) - 1) / 2) for i in range(len(losses))], losses, marker, color=colour, mec=INK,
                    ms=8, ls="none")
        ax.axhline(unquantized[model], color=INK, ls=":", lw=1.3)
        ax.annotate("not quantized", (len(types) - 0.5, unquantized[model]), (0, 3), textcoords="offset points", fontsize=8,
                    va="bottom", ha="right")
        ax.set(title=model, xticks=range(len(types)), xticklabels=list(types), ylabel="held-out loss (nats per token)")
        ax.set_xlim(-0.6, len(types) - 0.4)
        _bare(ax)
    return fig


# ------------------------------------------------------------------------------------------------ the explorer

COUNT, SIZE_OF_OUTLIERS = 16_384, 8.0   # weights in the explorer, and how much an outlier is enlarged


def explorer_weights(spread: float = 0.1, outliers: int = 0, skew: float = 0.0, seed: int = 0):
    """float32 [16384]: normal of that standard deviation, bent by `skew`, and `outliers` in 1000 made 8 times as large.

    The draw is fixed: moving a slider changes these weights, not others.
    """
    import torch

    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(COUNT, generator=rng)
    order = torch.randperm(COUNT, generator=rng)
    w = (z + skew * (z.square() - 1)) / (1 + 2 * skew**2) ** 0.5     # mean 0 and variance 1, whatever the skew
    w[order[:round(outliers * COUNT / 1000)]] *= SIZE_OF_OUTLIERS
    return spread * w


def least_error_levels(w, block_size: int, levels: int = 16, bins: int = 1025):
    """The ascending levels with the least squared error that there are for w in such blocks: float32 [levels].

    Lloyd's iteration stops at a good place that need not be the best: with a few outliers in blocks of 4096 its error
    is more than half as large again. So all cuts into `levels` cells are searched, by dynamic programming: the best
    error of k cells up to a bin is the least, over the bins before it, of the best of k - 1 cells and one cell more.
    Boundaries lie between bins, of which [-1, 1] has `bins`; each level is the mean of what falls to its cell, every
    scaled weight counted absmax² times. (K-means in one dimension; Bruce 1965, "Optimum quantization".)
    """
    import torch

    blocks = w.reshape(-1, block_size).double()
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    x, counted = (blocks / absmax).flatten(), absmax.square().expand_as(blocks).flatten()
    at = ((x + 1) / 2 * (bins - 1)).round().long()
    sums = torch.stack([torch.bincount(at, v, bins) for v in (counted, counted * x, counted * x.square())])
    sums = torch.nn.functional.pad(sums[:, sums[0] > 0].cumsum(1), (1, 0))         # [3, filled bins + 1]
    mass, first, second = sums[:, None, :] - sums[:, :, None]                      # of the bins from i to j
    n = mass.shape[0]
    cost = torch.where(torch.ones(n, n, dtype=torch.bool).triu(1), second - first.square() / mass, math.inf)
    best, came_from = cost[0], []
    for _ in range(levels - 1):
        best, came = (best[:, None] + cost).min(0)
        came_from.append(came)
    cuts = [n - 1]
    for came in reversed(came_from):
        cuts.insert(0, came[cuts[0]].item())
    total, moment, _ = sums[:, [0, *cuts]].diff()
    return (moment / total).float()


def type_levels(name: str, w, block_size: int):
    """The sixteen ascending levels of a data type; Lloyd–Max: those with the least squared error for these weights."""
    from pefttools import codebook

    if name == "Lloyd–Max":
        return least_error_levels(w, block_size)
    return {"NF4": codebook.nf4_codebook, "FP4": codebook.fp4_codebook, "INT4": codebook.int4_codebook}[name]().sort().values


def relative_error(w, levels, block_size: int) -> float:
    """√(Σ(w−ŵ)² / Σw²) for blocks of that size."""
    import torch

    blocks = w.reshape(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    back = levels[torch.bucketize(blocks / absmax, (levels[:-1] + levels[1:]) / 2)] * absmax
    return ((back - blocks).norm() / blocks.norm()).item()


@lru_cache(maxsize=256)
def _explored(spread: float, outliers: int, skew: float, block_size: int):
    w = explorer_weights(spread, outliers, skew)
    levels = {name: type_levels(name, w, block_size) for name in TYPES}
    return w, levels, {name: relative_error(w, levels[name], block_size) for name in TYPES}


def histogram_figure(spread: float = 0.1, outliers: int = 0, skew: float = 0.0, block_size: int = 64,
                     data_type: str = "NF4"):
    """The weights; the same divided by their blocks' absmax, with a type's levels; the error of every type."""
    import torch

    if data_type not in TYPES or block_size < 1 or COUNT % block_size:
        raise ValueError(f"data_type must be one of {TYPES} and block_size divide {COUNT}; got {data_type!r}, {block_size!r}")
    w, levels, errors = _explored(spread, outliers, skew, block_size)
    colour, marker, hatch = LOOK[data_type]
    fig = _figure(11.4, 3.5)
    fig.get_layout_engine().set(w_pad=0.1)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1, 1.5, 1.05))

    wide = 1.05 * w.abs().max().item()
    left.hist(w.numpy(), bins=101, range=(-wide, wide), color=GREY, ec=GREY)
    left.set(title="the weights", xlabel="weight", yscale="log", ylim=(0.7, COUNT), ylabel="how many (log)")

    blocks = w.view(-1, block_size)
    s = blocks / blocks.abs().amax(1, keepdim=True)
    counts = torch.histc(s.flatten(), 81, -1.0125, 1.0125)
    middle.bar(torch.linspace(-1, 1, 81).tolist(), (counts / counts.max()).tolist(), 0.025, color=GREY, ec=GREY)
    middle.vlines(levels[data_type].tolist(), -0.06, 1.06, color=colour, lw=1.2)
    middle.plot(levels[data_type].tolist(), [-0.06] * 16, marker, color=colour, mec=INK, ms=7, clip_on=False)
    middle.set(title=f"÷ absmax of their block of {block_size}, and {data_type}'s levels", xlabel="weight ÷ absmax",
               yticks=[], xticks=[-1, -0.5, 0, 0.5, 1], xlim=(-1.06, 1.06), ylim=(-0.06, 1.08))

    end = max(0.2, 1.25 * max(errors.values()))
    for y, name in enumerate(reversed(TYPES)):
        face, _, lines = LOOK[name]
        right.barh(y, errors[name], color=face, hatch=lines, ec=INK, lw=2.2 if name == data_type else 0.6)
        right.text(errors[name] + 0.02 * end, y, f"{errors[name]:.3f}", va="center", fontsize=9)
    right.set(yticks=range(4), yticklabels=TYPES[::-1], xlim=(0, end), title="relative error", xlabel="√(Σ(w−ŵ)² / Σw²)")
    _bare(left, middle, right)
    return fig


def explorer_alt(spread: float = 0.1, outliers: int = 0, skew: float = 0.0, block_size: int = 64,
                 data_type: str = "NF4") -> str:
    """What the explorer shows for these values, in words."""
    _, _, errors = _explored(spread, outliers, skew, block_size)
    said = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
    return (f"Three panels for weights of standard deviation {spread:g}, {outliers} in 1000 of them enlarged eightfold, skew "
            f"{skew:g}. Their histogram. The histogram after division by the absmax of blocks of {block_size}, with the 16 "
            f"levels of {data_type}. Relative errors: {said}.")


def explorer():
    """The explorer with its controls; where no front end answers, its first frame."""
    from pefttools.widgets.base import Slider, slider_figure

    return slider_figure(histogram_figure, alt=explorer_alt, title="A histogram, sixteen levels, and the error",
                         spread=Slider(0.1, 0.02, 1.0, 0.02, label="spread (standard deviation)"),
                         outliers=Slider(0, 0, 20, label="outliers in 1000"),
                         skew=Slider(0.0, -0.8, 0.8, 0.1, label="skew"),
                         block_size=[64, 16, 256, 1024, 4096], data_type=list(TYPES))
