"""Pictures of chapter 02: the shapes of W₀, A and B; the rank/alpha explorer; where LoRA goes; what a merge saves.

Each function that draws is pure: numbers in, a Matplotlib figure out. As in chapter 00, what trains is orange and
plain, what is frozen is grey and hatched, so that the pictures read without colour too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

TRAINED, FROZEN, INK = "#E69F00", "#D9D9D9", "#222222"  # Okabe and Ito's orange; grey; near black
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
MARKERS, LINES = "osD^v", ("-", "--", "-.", ":")


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# ------------------------------------------------------------------------------------------------ the picture

def lora_picture(d_in: int = 8, d_out: int = 6, r: int = 2):
    """W₀ beside B·A, drawn to scale, one square per number: y = (W₀ + (α/r)·B·A) x."""
    fig = _figure(9.2, 3.7)
    ax = fig.add_subplot()
    ax.set_aspect("equal")
    ax.axis("off")
    gap = 2.6

    def grid(x, y, columns, rows, name, size, trained):
        from matplotlib.patches import Rectangle

        ax.add_patch(Rectangle((x, y), columns, rows, fc=TRAINED if trained else FROZEN, ec=INK, lw=1.4,
                               hatch=None if trained else "////"))
        for i in range(1, columns):
            ax.plot([x + i] * 2, [y, y + rows], color="white", lw=0.8)
        for i in range(1, rows):
            ax.plot([x, x + columns], [y + i] * 2, color="white", lw=0.8)
        ax.text(x + columns / 2, y + rows / 2, name, ha="center", va="center", fontsize=17, color=INK,
                bbox={"fc": TRAINED if trained else FROZEN, "ec": "none", "pad": 1.5})
        ax.text(x + columns / 2, y + rows + 0.35, size, ha="center", va="bottom", fontsize=10, color=INK)

    def word(x, text, size=17):
        ax.text(x, d_out / 2, text, ha="center", va="center", fontsize=size, color=INK)

    word(-1.6, "y  =")
    grid(0, 0, d_in, d_out, "$W_0$", f"$d_{{out}} \\times d_{{in}}$ = {d_out} × {d_in}", False)
    ax.text(d_in / 2, -0.5, f"frozen: {d_out * d_in} numbers", ha="center", va="top", fontsize=10)
    word(d_in + 0.9, "x")
    word(d_in + gap, r"$+\ \frac{\alpha}{r}$", 19)
    left = d_in + gap + 1.8
    grid(left, 0, r, d_out, "$B$", f"$d_{{out}} \\times r$ = {d_out} × {r}", True)
    middle = left + r + gap
    grid(middle, (d_out - r) / 2, d_in, r, "$A$", f"$r \\times d_{{in}}$ = {r} × {d_in}", True)
    word(middle + d_in + 0.9, "x")
    ax.text((left + middle + d_in) / 2, -0.5, f"trained: {r} × ({d_in} + {d_out}) = {r * (d_in + d_out)} numbers",
            ha="center", va="top", fontsize=10)
    ax.annotate("", (left + r + 0.35, d_out / 2), (middle - 0.35, d_out / 2),
                arrowprops={"arrowstyle": "-|>", "color": INK})
    ax.text(left + r + gap / 2, d_out / 2 + 0.3, f"{r} numbers", ha="center", fontsize=9)
    ax.set(xlim=(-2.6, middle + d_in + 1.6), ylim=(-1.6, d_out + 1.5))
    return fig


# ------------------------------------------------------------------------------------------------ the explorer

WIDTH, HEIGHT, MOST = 48, 32, 32  # the explorer's matrix: d_in, d_out, and the highest rank it can have


def explorer_factors(r: int, seed: int = 0):
    """A [r, 48] and B [32, r]: the first r rows and columns of one fixed draw, so that moving r adds directions."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    A = torch.randn(MOST, WIDTH, generator=rng) / WIDTH ** 0.5
    B = torch.randn(HEIGHT, MOST, generator=rng)
    return A[:r], B[:, :r]


def rank_alpha_figure(r: int = 4, alpha: float = 16):
    """ΔW = (α/r)·B·A as a picture, its singular values, and how many numbers it takes."""
    import torch

    if not 1 <= r <= MOST:
        raise ValueError(f"r must be between 1 and {MOST} (the explorer's ΔW is {HEIGHT} × {WIDTH}); got {r!r}")
    A, B = explorer_factors(r)
    delta = alpha / r * B @ A
    singular = torch.linalg.svdvals(delta)
    fig = _figure(10.2, 3.5)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1.35, 1.3, 1))

    image = left.imshow(delta.numpy(), cmap="PuOr", vmin=-6, vmax=6, aspect="equal", interpolation="nearest")
    fig.colorbar(image, ax=left, shrink=0.6, label="size of an entry", extend="both", location="bottom")
    left.set(title=f"ΔW = {alpha:g}/{r} · B·A", xlabel=f"$d_{{in}}$ = {WIDTH}", ylabel=f"$d_{{out}}$ = {HEIGHT}",
             xticks=[], yticks=[])

    number = range(1, len(singular) + 1)
    middle.vlines(number, 0, singular, color=BLUE, lw=2.5)
    middle.plot(number, singular, "o", color=BLUE, ms=3.5)
    middle.axvline(r + 0.5, color=VERMILION, ls="--", lw=1.2)
    middle.text(r + 0.9, 58, f"rank {r}", color=VERMILION, fontsize=9, va="top")
    middle.set(title="its singular values", xlabel="number", xlim=(0, MOST + 6), ylim=(0, 60))

    full, ours = WIDTH * HEIGHT, r * (WIDTH + HEIGHT)
    bars = right.bar(["full ΔW", f"A and B\n(r = {r})"], [full, ours], color=[FROZEN, TRAINED], edgecolor=INK,
                     width=0.6)
    bars[0].set_hatch("////")
    right.bar_label(bars, [f"{full:,}", f"{ours:,}"], fontsize=9)
    right.axhline(full, color=INK, lw=0.8, ls=":", zorder=0)
    right.set(title="numbers to train", ylim=(0, 3000))
    for ax in (middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def explorer_alt(r: int, alpha: float) -> str:
    """What the explorer shows for these values, in words."""
    return (f"Three panels for r = {r} and alpha = {alpha:g}. A heat map of Delta W. Its singular values: the first {r} "
            f"are above zero, the other {MOST - r} are zero. Two bars: the full matrix has {WIDTH * HEIGHT:,} numbers, A and "
            f"B together have {r * (WIDTH + HEIGHT):,}.")


def rank_alpha_explorer():
    """The explorer with its two sliders; where no front end answers, its first frame."""
    from pefttools.widgets.base import Slider, slider_figure

    return slider_figure(rank_alpha_figure, alt=explorer_alt, title="What r and α do to ΔW",
                         r=Slider(4, 1, MOST, label="rank r"), alpha=Slider(16, 1, 64, label="α"))


# ------------------------------------------------------------------------------------------------ measurements

def placement_figure(runs: Mapping[str, tuple[int, Sequence[float], float, float]]):
    """Training curves of several placements, and held-out loss against parameters.

    runs: name → (trainable parameters, smoothed training loss per step, held-out loss before, held-out loss after).
    """
    fig = _figure(9.6, 3.6)
    left, right = fig.subplots(1, 2, width_ratios=(1.3, 1))
    colours = (BLUE, VERMILION, GREEN, PURPLE)
    for i, (name, (size, losses, _, after)) in enumerate(runs.items()):
        steps = range(1, len(losses) + 1)
        left.plot(steps, losses, LINES[i % 4], color=colours[i % 4], lw=1.8, label=name)
        right.plot(size, after, MARKERS[i % 5], color=colours[i % 4], ms=9)
        right.annotate(name, (size, after), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=9)
    left.set(title="training", xlabel="optimizer step", ylabel="loss (nats per answer token)")
    left.legend(frameon=False, fontsize=9)
    after = [v[3] for v in runs.values()]
    room = max(max(after) - min(after), 0.02)
    right.set(title="held-out rows, after training", xlabel="trainable parameters",
              ylabel="loss (nats per answer token)", xscale="log", ylim=(min(after) - 0.3 * room, max(after) + 0.5 * room))
    low, high = min(v[0] for v in runs.values()), max(v[0] for v in runs.values())
    right.set_xlim(low / 1.8, high * 1.8)
    ticks = sorted({v[0] for v in runs.values()})
    right.set_xticks(ticks, [f"{t:,}" for t in ticks], fontsize=8, rotation=20)
    right.minorticks_off()
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def spectra_figure(spectra: Mapping[str, Sequence[Sequence[float]]], r: int):
    """Singular values of several matrices per name, each divided by its largest, on a log axis.

    spectra: name → list of spectra. A dashed line marks rank r.
    """
    fig = _figure(6.8, 3.4)
    ax = fig.add_subplot()
    for i, (name, many) in enumerate(spectra.items()):
        colour = (BLUE, TRAINED, GREEN)[i % 3]
        for k, values in enumerate(many):
            values = [v / values[0] for v in values]
            ax.plot(range(1, len(values) + 1), values, LINES[i % 4], marker=MARKERS[i % 5], ms=(7, 3, 3)[i % 3],
                    lw=1, color=colour, alpha=0.7, label=name if k == 0 else None)
    ax.axvline(r + 0.5, color=VERMILION, ls="--", lw=1.2)
    ax.text(r + 0.8, 1.1, f"rank r = {r}", color=VERMILION, fontsize=9, va="bottom")
    ax.set(xlabel="number of the singular value", ylabel="share of the largest", yscale="log", ylim=(1e-8, 5),
           xlim=(0, 4 * r))
    ax.legend(frameon=False, fontsize=9, loc="center right")
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def slowdown(seconds: Sequence[float], base: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """How much slower one thing is than another, from rounds in which both ran: (ratio, low, high).

    Compares the 20th percentiles, since other programs can only slow a round down, never speed it up. low and high are
    the 10 % and 90 % points of the same ratio when the rounds are drawn again with replacement (bootstrap).
    """
    if len(seconds) != len(base) or not seconds:
        raise ValueError(f"both need one time for each round; got {len(seconds)} and {len(base)}")
    rng, n = random.Random(seed), len(base)

    def ratio(rounds: Sequence[int]) -> float:
        fast = [sorted(times[i] for i in rounds)[len(rounds) // 5] for times in (seconds, base)]
        return fast[0] / fast[1]

    drawn = sorted(ratio([rng.randrange(n) for _ in range(n)]) for _ in range(200))
    return ratio(range(n)), drawn[20], drawn[179]


def latency_figure(ratios: Mapping[str, Mapping[str, tuple[float, float, float]]]):
    """Time relative to the base model, one row per variant: a diamond, and the uncertainty as a bar.

    ratios: setting ("1 token") → variant ("merged") → (ratio, low, high), as `slowdown` gives them.
    """
    fig = _figure(9.0, 0.5 + 0.42 * len(next(iter(ratios.values()))) + 0.9)
    axes = fig.subplots(1, len(ratios), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (setting, variants) in zip(axes, ratios.items()):
        for y, (middle, low, high) in enumerate(reversed(variants.values())):
            ax.plot([low, high], [y, y], color=BLUE, lw=3, alpha=0.4, solid_capstyle="butt")
            ax.plot(middle, y, "D", color=BLUE, ms=7)
            ax.annotate(f"{middle:.2f}", (middle, y), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8)
        ax.axvline(1, color=INK, lw=1, ls=":")
        ax.set(title=setting, xlabel="time, base model = 1", yticks=range(len(variants)),
               yticklabels=list(variants)[::-1], ylim=(-0.6, len(variants) - 0.2))
        ax.spines[["top", "right"]].set_visible(False)
    return fig
