"""Pictures of chapter 06: the bottleneck, where each placement sits in a block, what places are worth, what they cost.

Each function that draws is pure: numbers in, a Matplotlib figure out. As in the other chapters, what trains is orange
and plain, what is frozen is grey and hatched, so that the pictures read without colour too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TRAINED, FROZEN, INK = "#E69F00", "#D9D9D9", "#222222"  # Okabe and Ito's orange; grey; near black
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
MARKERS, LINES = "osD^vPX", ("-", "--", "-.", ":")

# what the explorer offers; "total" is every parameter of the model, "linear" those that a token is multiplied with
MODELS: dict[str, dict[str, int]] = {
    "Llama-3.2-1B": {"layers": 16, "d_model": 2048, "kv_width": 512, "ff_width": 8192, "total": 1_235_814_400},
    "the bundled model": {"layers": 6, "d_model": 256, "kv_width": 128, "ff_width": 704, "total": 5_475_584},
}
PLACES = ("houlsby", "pfeiffer", "parallel", "bapna", "input and output", "IA³", "norms")
WORDS = {
    "houlsby": "after attention and after the feed-forward, each before its residual sum",
    "pfeiffer": "after the feed-forward, before the residual sum",
    "parallel": "beside the feed-forward: reads what that reads",
    "bapna": "after the whole layer, residual sum included; with a norm of its own",
    "input and output": "before the first layer and after the last",
    "IA³": "factors on keys, values and the feed-forward's inner activations",
    "norms": "the norms' own gains",
}


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _box(ax: Any, x: float, y: float, width: float, height: float, text: str, trained: bool, size: float = 9) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, fc=TRAINED if trained else FROZEN, ec=INK,
                           lw=1.2,
                           hatch=None if trained else "////", zorder=3))
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, zorder=4,
            bbox={"fc": TRAINED if trained else FROZEN, "ec": "none", "pad": 1.2})


# ------------------------------------------------------------------------------------------------ the bottleneck

def bottleneck_picture(d: int = 2048, m: int = 64):
    """h [d] → W_down → f → W_up → + h, with widths drawn by their square roots so that both can be seen."""
    from matplotlib.patches import Polygon

    fig = _figure(8.6, 3.3)
    ax = fig.add_subplot()
    ax.axis("off")
    wide, narrow = 2.0, 2.0 * (m / d) ** 0.5
    for x, text in ((0.2, f"$h$\n{d:,}"), (9.4, f"$y$\n{d:,}")):
        ax.add_patch(Polygon([(x, -wide / 2), (x, wide / 2), (x + 0.35, wide / 2), (x + 0.35, -wide / 2)], fc="white",
                             ec=INK))
        ax.text(x + 0.17, -wide / 2 - 0.1, text, ha="center", va="top", fontsize=11)
    for left, right, a, b, text in ((1.4, 3.6, wide, narrow, f"$W_{{down}}$\n{m} × {d:,}"),
                                    (5.2, 7.4, narrow, wide, f"$W_{{up}}$\n{d:,} × {m}")):
        ax.add_patch(Polygon([(left, -a / 2), (left, a / 2), (right, b / 2), (right, -b / 2)], fc=TRAINED, ec=INK))
        ax.text((left + right) / 2, 0, text, ha="center", va="center", fontsize=10)
    ax.text(4.4, 0.45, f"relu\n{m} numbers", ha="center", va="center", fontsize=10)
    ax.text(8.4, 0, "+", ha="center", va="center", fontsize=18, bbox={"boxstyle": "circle", "fc": "white", "ec": INK})
    for a, b in ((0.6, 1.35), (3.65, 5.15), (7.45, 8.1), (8.7, 9.35)):
        ax.annotate("", (b, 0), (a, 0), arrowprops={"arrowstyle": "-|>", "color": INK})
    ax.plot([1.0, 1.0, 8.4], [0, 1.45, 1.45], color=INK, lw=1.4)
    ax.annotate("", (8.4, 0.3), (8.4, 1.47), arrowprops={"arrowstyle": "-|>", "color": INK})
    ax.text(4.7, 1.52, "the way around: h itself", ha="center", va="bottom", fontsize=10)
    ax.set(xlim=(-0.2, 10.1), ylim=(-1.8, 2.0))
    return fig


# ------------------------------------------------------------------------------------------------ the explorer

def facts(placement: str, model: Mapping[str, int], m: int) -> dict[str, Any]:
    """Numbers about a placement in a model: what trains, what a token costs more, and whether it can be merged.

    "extra": multiplications for one token more than the base model's, as a share; "steps": further small operations
    that wait for one another in one layer (a matrix product each; input and output: in the whole model).
    """
    L, d, kv, ff = (model[k] for k in ("layers", "d_model", "kv_width", "ff_width"))
    one = 2 * m * d + d + m
    adapters = {"houlsby": 2 * L, "pfeiffer": L, "parallel": L, "bapna": L, "input and output": 2}.get(placement, 0)
    trained = adapters * one + (2 * d * L if placement == "bapna" else 0)
    if placement == "IA³":
        trained = L * (2 * kv + ff)
    if placement == "norms":
        trained = (2 * L + 1) * d
    base = L * (2 * d * d + 2 * d * kv + 3 * d * ff)
    return {"trained": trained, "share": trained / model["total"], "extra": adapters * 2 * m * d / base,
            "steps": {"houlsby": 4, "pfeiffer": 2, "bapna": 2, "parallel": 2, "input and output": 4}.get(placement, 0),
            "merges": adapters == 0}


def block_figure(placement: str = "houlsby", model: str = "Llama-3.2-1B", m: int = 64):
    """One layer of a Llama with the placement in orange, and beside it how many numbers each placement trains."""
    if placement not in PLACES or model not in MODELS:
        raise ValueError(f"placement must be one of {', '.join(PLACES)} and model one of {', '.join(MODELS)}; got "
                         f"{placement!r} and {model!r}.")
    if m < 1:
        raise ValueError(f"m must be 1 or more; got {m!r}.")
    fig = _figure(11.4, 4.0)
    left, right = fig.subplots(1, 2, width_ratios=(2.15, 1))
    _block(left, placement)
    shape = MODELS[model]
    now = facts(placement, shape, m)
    cost = "can be merged: no cost" if now["merges"] else \
        f"{now['extra']:.2%} more multiplications per token, {now['steps']} more steps " + \
        ("in all" if placement == "input and output" else "per layer")
    left.set_title(f"{placement}: {now['trained']:,} numbers, {now['share']:.3%}\n{cost}", fontsize=11)
    counts = [facts(name, shape, m)["trained"] for name in PLACES]
    bars = right.barh(range(len(PLACES)), counts, color=[TRAINED if name == placement else FROZEN for name in PLACES],
                      edgecolor=INK, height=0.65)
    for bar, name in zip(bars, PLACES):
        bar.set_hatch(None if name == placement else "////")
    right.bar_label(bars, [f"{n:,}" for n in counts], fontsize=8, padding=3)
    right.set(yticks=range(len(PLACES)), yticklabels=PLACES, xscale="log", xlim=(min(counts) / 3, max(counts) * 60),
              title=f"numbers to train, {model}, m = {m}")
    right.title.set_fontsize(10)
    right.invert_yaxis()
    right.tick_params(axis="both", labelsize=9)
    right.spines[["top", "right"]].set_visible(False)
    return fig


def _block(ax: Any, placement: str) -> None:
    """The diagram: the stream h runs from left to right, arcs are the residual connections; A is y + δ(y)."""
    ax.axis("off")
    two, one = placement == "houlsby", placement in ("houlsby", "pfeiffer")
    ax.annotate("", (20.6, 0), (-0.6, 0), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1})
    for start, end in ((1.2, 8.6), (9.4, 16.9)):
        ax.plot([start, start, end, end], [0, 1.75, 1.75, 0.35], color=INK, lw=1.2, zorder=1)
        ax.text(end, 0, "+", ha="center", va="center", fontsize=13, zorder=5,
                bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": INK})
        ax.text((start + end) / 2, 1.82, "residual", ha="center", va="bottom", fontsize=8)
    norms = placement == "norms"
    _box(ax, 2.3, 0, 1.3, 1.1, "norm", norms)
    _box(ax, 4.7, 0, 2.5, 1.5, "attention", False)
    _box(ax, 10.5, 0, 1.3, 1.1, "norm", norms)
    _box(ax, 13.0, 0, 2.7, 1.5, "feed-\nforward", False)
    if two:
        _box(ax, 7.2, 0, 1.3, 1.1, "A", True, 12)
    if one:
        _box(ax, 15.4, 0, 1.3, 1.1, "A", True, 12)
    if placement == "parallel":
        ax.plot([11.4, 11.4, 16.9, 16.9], [0, -1.75, -1.75, -0.35], color=INK, lw=1.2, zorder=1)
        _box(ax, 13.6, -1.75, 1.6, 1.0, "s · δ", True, 11)
    if placement == "bapna":
        _box(ax, 18.7, 0, 1.9, 1.1, "A, norm", True, 9)
    if placement == "input and output":
        _box(ax, 0.2, 0, 1.1, 1.1, "A", True, 12)
        _box(ax, 18.7, 0, 1.1, 1.1, "A", True, 12)
        ax.text(0.2, -0.75, "first\nlayer only", ha="center", va="top", fontsize=8)
        ax.text(18.7, -0.75, "last\nlayer only", ha="center", va="top", fontsize=8)
    if placement == "IA³":
        for x, text in ((4.0, "k"), (5.4, "v"), (13.0, "inner")):  # under the box that computes them
            _box(ax, x, -1.15, 1.25 if len(text) == 1 else 1.9, 0.75, f"⊙ {text}", True, 8)
    ax.text(9.6, -2.75, WORDS[placement], ha="center", va="center", fontsize=9.5)
    ax.set(xlim=(-0.9, 20.9), ylim=(-3.1, 2.4))


def block_alt(placement: str, model: str, m: int) -> str:
    """What the explorer shows for these values, in words."""
    now = facts(placement, MODELS[model], m)
    return (f"One layer of a Llama from left to right: norm, attention, sum with the residual, norm, feed-forward, sum "
            f"with the residual. In orange, {placement}: {WORDS[placement]}. It trains {now['trained']:,} numbers of "
            f"{model} with m = {m}, {now['share']:.3%}; bars compare all placements.")


def block_explorer():
    """The diagram with controls for placement, model and m; where no front end answers, its first frame."""
    from pefttools.widgets.base import Slider, slider_figure

    return slider_figure(block_figure, alt=block_alt, title="Where does it sit, how many numbers is that, what does it "
                                                            "cost?",
                         placement=list(PLACES), model=list(MODELS), m=Slider(64, 1, 256, label="bottleneck m"))


# ------------------------------------------------------------------------------------------------ what was measured

def places_figure(rows: Sequence[Mapping[str, Any]]):
    """Held-out loss against numbers trained: every seed a small mark, mean and standard deviation, the name beside it.

    rows: "name", "trained", "ends" (loss of each seed), "end", "sd", as lab.adapter_places.table gives.
    """
    fig = _figure(8.4, 4.2)
    ax = fig.add_subplot()
    for i, row in enumerate(sorted(rows, key=lambda row: row["end"])):
        colour = (BLUE, VERMILION, GREEN, PURPLE)[i % 4]
        ax.plot([row["trained"]] * len(row["ends"]), row["ends"], "o", ms=3.5, mfc="white", color=colour)
        ax.errorbar(row["trained"], row["end"], yerr=row["sd"], fmt=MARKERS[i % len(MARKERS)], ms=8, capsize=4,
                    color=colour,
                    label=f"{row['name']}: {row['end']:.2f}")
    ax.set(xscale="log", xlabel="numbers that train", ylabel="held-out loss (nats per answer token)")
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def ablation_figure(rise: Sequence[Sequence[float | None]]):
    """How much the held-out loss rises when the adapters of layers i to j are taken out: [first][last], None below."""
    L = len(rise)
    fig = _figure(5.4, 4.2)
    ax = fig.add_subplot()
    most = max(v for row in rise for v in row if v is not None)
    grid = [[float("nan") if v is None else v for v in row] for row in rise]
    ax.imshow(grid, cmap="YlOrBr", vmin=min(0.0, min(v for row in rise for v in row if v is not None)), vmax=most)
    for i in range(L):
        for j in range(i, L):
            ax.text(j, i, f"{rise[i][j]:+.2f}", ha="center", va="center", fontsize=9,
                    color="white" if rise[i][j] > 0.7 * most else INK)
    ax.set(xticks=range(L), yticks=range(L), xlabel="last layer without adapters",
           ylabel="first layer without adapters",
           title="rise of the held-out loss")
    return fig


def latency_lines(ratios: Mapping[str, Mapping[str, tuple[float, float, float]]]):
    """Time relative to the base model against the amount of work: one line per variant, uncertainty as bars.

    ratios: amount of work ("1 × 16") → variant → (ratio, low, high), in order of growing work. The A/A variant, the
    base model against itself, is drawn as a grey band.
    """
    works = list(ratios)
    names = list(ratios[works[0]])
    fig = _figure(8.6, 3.9)
    ax = fig.add_subplot()
    again = next((name for name in names if "A/A" in name), None)
    if again:
        ax.fill_between(range(len(works)), [min(1.0, ratios[w][again][1]) for w in works],
                        [max(1.0, ratios[w][again][2]) for w in works], color=FROZEN, label=again, zorder=0)
    lines = [name for name in names if name != again]
    for i, name in enumerate(lines):
        x = [k + 0.04 * (i - len(lines) / 2) for k in range(len(works))]
        y = [ratios[w][name][0] for w in works]
        error = [[max(0.0, ratios[w][name][0] - ratios[w][name][1]) for w in works],
                 [max(0.0, ratios[w][name][2] - ratios[w][name][0]) for w in works]]
        ax.errorbar(x, y, yerr=error, marker=MARKERS[i % len(MARKERS)], ls=LINES[i % 4], capsize=3, lw=1.6, ms=6,
                    color=(BLUE, VERMILION, GREEN, PURPLE, INK, TRAINED)[i % 6], label=name)
    ax.axhline(1, color=INK, ls=":", lw=1)
    ax.set(xticks=range(len(works)), xticklabels=works, xlabel="texts × tokens in one forward pass",
           ylabel="time, base model = 1")
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    return fig
