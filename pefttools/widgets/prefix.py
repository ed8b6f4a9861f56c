"""Pictures of chapter 07: where virtual tokens enter, the mask, attention maps with the prefix's part, what starts do.

Each function that draws is pure: numbers in, a Matplotlib figure out. As in chapters 00 and 02, what trains is orange
and plain, what is frozen is grey and hatched, so that the pictures read without colour too.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

TRAINED, FROZEN, INK = "#E69F00", "#D9D9D9", "#222222"  # Okabe and Ito's orange; grey; near black
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
MARKERS, LINES = "osD^vPX", ("-", "--", "-.", ":")


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _cell(ax: Any, x: float, y: float, kind: str, width: float = 1.0, height: float = 1.0) -> None:
    from matplotlib.patches import Rectangle

    face, hatch = {"trained": (TRAINED, None), "frozen": (FROZEN, "////"), "computed": ("white", None)}[kind]
    ax.add_patch(Rectangle((x + 0.05, y + 0.06), width - 0.1, height - 0.12, fc=face, ec=INK, lw=1, hatch=hatch))


# ------------------------------------------------------------------------------------------------ where they enter

def where_picture(P: int = 3, T: int = 4, L: int = 4, top: int = 2):
    """Three panels, layers upwards and positions to the right: prompt tuning, prefix tuning, LLaMA-Adapter."""
    fig = _figure(10.6, 3.9)
    for ax, name in zip(fig.subplots(1, 3), ("prompt tuning", "prefix tuning", "LLaMA-Adapter")):
        ax.axis("off")
        for place in range(T):
            _cell(ax, P + 0.4 + place, 0, "frozen")
        for layer in range(1, L + 1):
            for place in range(T):
                _cell(ax, P + 0.4 + place, layer, "computed")
            for place in range(P):
                if name == "prompt tuning":
                    _cell(ax, place, layer, "computed")
                elif name == "prefix tuning":
                    _cell(ax, place, layer + 0.02, "trained", height=0.5)
                    _cell(ax, place, layer + 0.48, "trained", height=0.5)
                    ax.text(place + 0.5, layer + 0.27, "k", ha="center", va="center", fontsize=8)
                    ax.text(place + 0.5, layer + 0.73, "v", ha="center", va="center", fontsize=8)
                elif layer > L - top:
                    _cell(ax, place, layer, "trained")
            if name == "LLaMA-Adapter" and layer > L - top:
                ax.text(P + 0.2, layer + 0.5, "g", ha="center", va="center", fontsize=11, color=VERMILION,
                        fontweight="bold")
        if name == "prompt tuning":
            for place in range(P):
                _cell(ax, place, 0, "trained")
        ax.text(P + 0.4 + T / 2, -0.35, "embedded words", ha="center", va="top", fontsize=9)
        ax.text(P / 2, -0.35, "P virtual tokens", ha="center", va="top", fontsize=9)
        for layer in range(1, L + 1):
            ax.text(-0.25, layer + 0.5, f"layer {layer}", ha="right", va="center", fontsize=8)
        ax.set(xlim=(-1.7, P + T + 0.6), ylim=(-1.1, L + 1.3), title=name)
    return fig


def mask_picture(P: int = 3, T: int = 4):
    """Who sees whom in attention with a prefix: rows are queries, columns are keys; ● where a query may look."""
    fig = _figure(5.8, 2.9)
    ax = fig.add_subplot()
    ax.set_aspect("equal")
    ax.axis("off")
    for row in range(T):
        for column in range(P + T):
            sees = column < P or column - P <= row
            _cell(ax, column, T - 1 - row, "trained" if column < P else "frozen" if sees else "computed")
            if sees:
                ax.plot(column + 0.5, T - 0.5 - row, "o", color=INK, ms=6, mfc="white")
        ax.text(-0.3, T - 0.5 - row, f"$q_{row + 1}$", ha="right", va="center", fontsize=12)
    for column in range(P + T):
        ax.text(column + 0.5, T + 0.15, f"$p_{column + 1}$" if column < P else f"$k_{column - P + 1}$", ha="center",
                va="bottom", fontsize=12)
    ax.text(P / 2, T + 0.95, "prefix: open to all", ha="center", fontsize=9)
    ax.text(P + T / 2, T + 0.95, "words: the causal triangle", ha="center", fontsize=9)
    ax.set(xlim=(-1, P + T + 0.2), ylim=(-0.2, T + 1.6))
    return fig


# ------------------------------------------------------------------------------------------------ attention maps

def attention_of(model: Any, tokenizer: Any, text: str) -> tuple[Any, list[str]]:
    """Attention weights [L, H, T, P + T] of a model with a prefix reading `text`, and the T words of it as texts."""
    import torch

    ids = tokenizer(text)["input_ids"]
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")             # the others do not keep their weights
    try:
        with torch.no_grad():
            maps = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(was)
    return torch.stack([m[0] for m in maps]).float(), [shown(tokenizer, i) for i in ids]


def shown(tokenizer: Any, token: int) -> str:
    """A token as a short text for an axis: ␣ for a space in front, ↵ for a line end."""
    text = tokenizer.decode([token])
    if token == tokenizer.bos_token_id:
        return "begin"
    return text.replace("\n", "↵").replace(" ", "␣")[:10] or "·"


def attention_map(weights: Any, words: Sequence[str], layer: int = 1, head: int = 1, title: str = ""):
    """One head's attention as a heat map, the P columns of the prefix set apart, and beside it each word's share λ.

    weights: [L, H, T, P + T]; words: T texts. layer and head count from 1.
    """
    if not (1 <= layer <= weights.shape[0] and 1 <= head <= weights.shape[1]):
        raise ValueError(f"layer must be from 1 to {weights.shape[0]} and head from 1 to {weights.shape[1]}; got "
                         f"{layer} and {head}.")
    w = weights[layer - 1, head - 1].numpy()
    T, total = w.shape
    P = total - T
    share = w[:, :P].sum(1)
    fig = _figure(10.4, 1.9 + 0.19 * T)
    left, right = fig.subplots(1, 2, width_ratios=(4.6, 1), sharey=True)
    image = left.imshow(w ** 0.5, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    left.axvline(P - 0.5, color=TRAINED, lw=3)
    left.plot([-0.5, P - 0.5], [-0.5, -0.5], color=TRAINED, lw=6, clip_on=False, solid_capstyle="butt")
    left.set(xticks=range(total), yticks=range(T), yticklabels=words,
             ylabel="this word …", xlabel="… looks at  (left of the line: the prefix)")
    left.set_title(f"layer {layer}, head {head}{': ' + title if title else ''}", pad=10)
    left.set_xticklabels([f"p{i + 1}" if i % 5 == 4 or i == 0 else "" for i in range(P)] + list(words), rotation=90,
                         fontsize=7)
    left.tick_params(axis="y", labelsize=8)
    bar = fig.colorbar(image, ax=left, shrink=0.8, pad=0.01, ticks=[0, 0.1 ** 0.5, 0.5 ** 0.5, 1])
    bar.ax.set_yticklabels(["0", "0.1", "0.5", "1"], fontsize=8)
    right.barh(range(T), share, color=TRAINED, edgecolor=INK, height=0.7)
    right.axvline(share.mean(), color=INK, ls=":", lw=1.2)
    right.set(xlim=(0, 1), xlabel="λ: share of the prefix", title=f"mean {share.mean():.2f}")
    right.tick_params(axis="y", labelleft=False, left=False)
    right.spines[["top", "right"]].set_visible(False)
    return fig


def attention_explorer(maps: Mapping[str, Any], words: Sequence[str]):
    """The map with controls for model ("after training", "before"), layer, head; a first frame without a front end."""
    from pefttools.widgets.base import Slider, slider_figure

    first = next(iter(maps.values()))
    L, H = first.shape[:2]
    by_head = [value for row in shares(first) for value in row]
    most = by_head.index(max(by_head))                 # begin where the prefix gets most

    def draw(prefix: str, layer: int, head: int):
        return attention_map(maps[prefix], words, layer, head, prefix)

    def alt(prefix: str, layer: int, head: int) -> str:
        w = maps[prefix][layer - 1, head - 1]
        P = w.shape[1] - w.shape[0]
        share = w[:, :P].sum(1)
        return (f"Attention of layer {layer}, head {head}, {prefix}: {w.shape[0]} words look at {P} virtual tokens, "
                f"left of an orange line, and at the words before them. Bars: the prefix gets {share.mean():.0%} of "
                f"the attention on average, between {share.min():.0%} and {share.max():.0%}.")

    return slider_figure(draw, alt=alt, title="How much of its attention does a word give to the prefix?",
                         prefix=list(maps), layer=Slider(most // H + 1, 1, L, label="layer"),
                         head=Slider(most % H + 1, 1, H, label="head"))


def shares(weights: Any) -> list[list[float]]:
    """[L][H]: the prefix's share of the attention, averaged over the words, from weights [L, H, T, P + T]."""
    P = weights.shape[-1] - weights.shape[-2]
    return weights[..., :P].sum(-1).mean(-1).tolist()


def share_figure(by_name: Mapping[str, Sequence[Sequence[float]]]):
    """Mean share of the prefix, by layer and head: one panel per name, the number written into each cell."""
    fig = _figure(4.2 * len(by_name), 3.4)
    axes = fig.subplots(1, len(by_name), squeeze=False, sharey=True)[0]
    for ax, (name, rows) in zip(axes, by_name.items()):
        ax.imshow(rows, cmap="YlOrBr", vmin=0, vmax=1, aspect="auto", origin="lower")
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9,
                        color="white" if value > 0.7 else INK)
        ax.set(title=name, xlabel="head", xticks=range(len(rows[0])), xticklabels=range(1, len(rows[0]) + 1),
               yticks=range(len(rows)), yticklabels=range(1, len(rows) + 1))
    axes[0].set_ylabel("layer")
    return fig


# ------------------------------------------------------------------------------------------------ what was measured

def starts_figure(groups: Mapping[str, Sequence[Mapping[str, Any]]], base: float | None = None):
    """Held-out loss of several ways to start: each seed a small mark, mean and standard deviation beside them.

    groups: title of a panel → rows with "name", "ends" (loss of each seed), "lr", as lab.virtual_starts.table gives.
    """
    most = max(map(len, groups.values()))
    fig = _figure(5.0 * len(groups), 1.3 + 0.5 * most)
    for ax, (title, rows) in zip(fig.subplots(1, len(groups), squeeze=False, sharex=True)[0], groups.items()):
        for y, row in enumerate(reversed(list(rows))):
            mean, sd = statistics.mean(row["ends"]), statistics.stdev(row["ends"]) if len(row["ends"]) > 1 else 0
            ax.plot(row["ends"], [y + 0.17] * len(row["ends"]), "o", color=BLUE, ms=4, mfc="white")
            ax.errorbar(mean, y - 0.08, xerr=sd, fmt="D", color=BLUE, ms=7, capsize=4)
            ax.annotate(f"{mean:.2f}", (mean, y - 0.08), xytext=(0, -15), textcoords="offset points", ha="center",
                        fontsize=8)
        if base is not None:
            ax.axvline(base, color=INK, ls=":", lw=1)
            ax.text(base, len(rows) - 0.45, "base model ", ha="right", va="top", fontsize=8)
        ax.set(title=title, xlabel="held-out loss (lower is better)", yticks=range(len(rows)),
               ylim=(-0.7, len(rows) - 0.4),
               yticklabels=[f"{row['name'].split(', ')[-1]}\n(lr {row['lr']:g})" for row in rows][::-1])
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def curves_figure(runs: Mapping[str, Sequence[Sequence[float]]], smooth: int = 5, title: str = "Training loss"):
    """Training curves with bands: name → one list of losses per seed; mean over seeds, and lowest to highest."""
    fig = _figure(7.4, 3.5)
    ax = fig.add_subplot()
    for (name, seeds), colour, line in zip(runs.items(), (BLUE, VERMILION, GREEN, PURPLE), LINES):
        curves = [[statistics.mean(run[max(0, i + 1 - smooth):i + 1]) for i in range(len(run))] for run in seeds]
        steps = range(1, min(map(len, curves)) + 1)
        middle = [statistics.mean(c[i - 1] for c in curves) for i in steps]
        ax.fill_between(steps, [min(c[i - 1] for c in curves) for i in steps],
                        [max(c[i - 1] for c in curves) for i in steps], color=colour, alpha=0.2, lw=0)
        ax.plot(steps, middle, color=colour, ls=line, lw=2, label=name)
    ax.set(xlabel="optimizer step", ylabel="training loss", title=title, ylim=(0, None))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return fig
