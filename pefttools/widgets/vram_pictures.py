"""The pictures of chapter 09: where a card's memory goes, and one for each term of a training step, to scale.

Pure functions: numbers in, a Matplotlib figure out. Terms have the colours and hatching of `pefttools.widgets.vram`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pefttools.widgets.vram import GIB, INK, LOOK, _figure


def _box(ax, x: float, y: float, w: float, h: float, look: str, text: str = "", size: float = 9, **text_style) -> None:
    from matplotlib.patches import Rectangle

    colour, hatch = LOOK[look]
    ax.add_patch(Rectangle((x, y), w, h, fc=colour, ec=INK, hatch=hatch, lw=0.8))
    if text:
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK,
                bbox={"fc": "white", "ec": "none", "pad": 1.2, "alpha": 0.88}, **text_style)


def card_picture(sold: Mapping[str, int], usable: Mapping[str, int], context: Mapping[str, int]):
    """What is on the box, what torch reports, what is left for tensors; a row for each card. Bytes by card's name.

    sold: 10⁹ · what the box says, read as the GiB of chips that it means.
    """
    fig = _figure(9.4, 1.3 + 0.5 * len(sold))
    ax = fig.add_subplot()
    longest = max(sold.values()) / GIB
    for row, name in enumerate(sold):
        chips, there, cuda = sold[name] / GIB, usable[name] / GIB, context[name] / GIB
        _box(ax, 0, row - 0.3, there - cuda, 0.6, "activations", f"{there - cuda:.2f}")
        _box(ax, there - cuda, row - 0.3, cuda, 0.6, "context")
        _box(ax, there, row - 0.3, chips - there, 0.6, "allocator")
        said = f"chips {chips:.0f} GiB; torch sees {there:.2f}; context about {cuda:.2f}"
        ax.text(chips + 0.008 * longest, row, said, va="center", fontsize=8.5)
    ax.set_yticks(range(len(sold)), list(sold))
    ax.set(xlim=(0, 1.5 * longest), ylim=(len(sold) - 0.5, -0.5), xlabel="GiB (2³⁰ bytes)")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    from matplotlib.patches import Patch

    fig.legend(handles=[Patch(fc=LOOK[k][0], hatch=LOOK[k][1], ec=INK, lw=0.6, label=says) for k, says in
                        (("activations", "for tensors"), ("context", "CUDA's context"),
                         ("allocator", "error correction, driver, firmware"))],
               loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return fig


def block_picture():
    """A block of 64 weights in NF4, in bits to scale: codes, its scale in 32 bits, in 8 with double quantization."""
    fig = _figure(9.4, 2.2)
    ax = fig.add_subplot()
    ax.set(xlim=(-66, 300), ylim=(-0.1, 2.8))
    ax.axis("off")
    rows = (("16 bits", 2.1, None), ("NF4", 1.05, 32), ("NF4, double\nquantization", 0.0, 8))
    for name, y, scale in rows:
        ax.text(-3, y + 0.3, name, ha="right", va="center", fontsize=9.5)
        if scale is None:
            _box(ax, 0, y, 256, 0.6, "weights", "64 weights of 16 bits: 1024 bits (drawn at a quarter of their length)")
            continue
        _box(ax, 0, y, 256, 0.6, "weights", "64 codes of 4 bits: 256 bits")
        _box(ax, 256, y, scale, 0.6, "constants")
        says = ("one scale: 32 bits" if scale == 32 else
                "its scale: 8 bits, and 32/256 = 0.125\nof a scale of 256 such scales")
        bits = 4.5 if scale == 32 else 4 + 8 / 64 + 32 / (64 * 256)
        ax.text(292, y + 0.82, f"{says}", ha="right", va="center", fontsize=8.5)
        ax.text(292, y + 0.3, f"{bits:.3f}\nbits a weight", ha="left", va="center", fontsize=9, fontweight="bold",
                clip_on=False)
    return fig


def trained_picture(recipes: Mapping[str, Mapping[str, float]]):
    """Bytes for one number that trains, by recipe: {recipe: {"weight": 4, "gradient": 4, …}}, stacked in that order."""
    look = {"weight": "adapter", "float32 master weight": "weights", "gradient": "gradients", "moments": "optimizer"}
    fig = _figure(9.4, 1.25 + 0.46 * len(recipes))
    ax = fig.add_subplot()
    for row, (_, parts) in enumerate(recipes.items()):
        left = 0.0
        for part, size in parts.items():
            _box(ax, left, row - 0.3, size, 0.6, look[part], f"{size:.4g}" if size >= 1.5 else "")
            left += size
        ax.text(left + 0.15, row, f"{left:.4g} bytes", va="center", fontsize=9.5, fontweight="bold")
    ax.set_yticks(range(len(recipes)), list(recipes))
    ax.set(xlim=(0, 18.5), ylim=(len(recipes) - 0.5, -0.5), xlabel="bytes for each number that trains")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    from matplotlib.patches import Patch

    fig.legend(handles=[Patch(fc=LOOK[k][0], hatch=LOOK[k][1], ec=INK, lw=0.6, label=part) for part, k in look.items()],
               loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return fig


# What one decoder layer keeps: (tensor, bytes as a multiple of h, q, k or m, who needs it). "norm": the norm's weight
# if it trains; "linear": a linear layer's weight or adapter; "pass": the gradient on its way down, always.
KEPT = (
    ("input of the 1st norm, in float32", 4, "h", "pass"),
    ("… normalised, before the weight", 2, "h", "norm"),
    ("… after it: input of q, k, v", 2, "h", "linear"),
    ("queries", 2, "q", "pass"),
    ("keys, values", 4, "k", "pass"),
    ("attention's output: input of o", 2, "q", "pass"),
    ("input of the 2nd norm, in float32", 4, "h", "pass"),
    ("… normalised, before the weight", 2, "h", "norm"),
    ("… after it: input of gate, up", 2, "h", "linear"),
    ("gate, and its activation", 4, "m", "pass"),
    ("up", 2, "m", "pass"),
    ("their product: input of down", 2, "m", "linear"),
)
WHO = {"pass": ("activations", "always: the gradient passes through here"),
       "linear": ("adapter", "if a linear layer or its LoRA trains"),
       "norm": ("gradients", "if the norm's weight trains (full fine-tuning)")}


def kept_bytes_of(sizes: Mapping[str, int], who: Sequence[str] = ("pass", "linear", "norm")) -> int:
    """Bytes for one token in one layer: the rows of KEPT that these need. sizes: h, q, k, m."""
    return sum(times * sizes[letter] for _, times, letter, needed in KEPT if needed in who)


def layer_picture(sizes: Mapping[str, int], name: str = ""):
    """What one layer keeps for one token, tensor by tensor, to scale, with who needs it. sizes: h, q, k, m."""
    from matplotlib.patches import Patch

    fig = _figure(9.4, 4.5)
    ax = fig.add_subplot()
    for row, (tensor, times, letter, who) in enumerate(KEPT):
        kib = times * sizes[letter] / 1024
        colour, hatch = LOOK[WHO[who][0]]
        ax.barh(row, kib, height=0.68, fc=colour, ec=INK, hatch=hatch, lw=0.7)
        ax.text(kib, row, f"  {times}{letter} = {kib:g} KiB", va="center", fontsize=8.5)
    ax.set_yticks(range(len(KEPT)), [row[0] for row in KEPT], fontsize=9)
    ax.set(xlim=(0, 1.25 * max(t * sizes[c] for _, t, c, _ in KEPT) / 1024), ylim=(len(KEPT) - 0.4, -0.6),
           xlabel=f"KiB for one token in one layer{f' of {name}' if name else ''}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(handles=[Patch(fc=LOOK[look][0], hatch=LOOK[look][1], ec=INK, lw=0.6, label=says)
                       for look, says in WHO.values()], loc="upper right", frameon=False, fontsize=9,
              bbox_to_anchor=(1.0, 0.78))
    return fig


def logits_picture(h: int, vocab: int, layers: int):
    """One token's row in bytes, to scale: a layer's input, all layers' checkpoints, the logits and their loss."""
    rows = (("input of one layer", [("activations", 2 * h)]),
            (f"inputs of all {layers} layers\n(kept with checkpointing)", [("activations", 2 * h * layers)]),
            ("logits, in 16 bits", [("logits", 2 * vocab)]),
            ("… with the loss and its gradients,\nthree times float32",
             [("logits", 2 * vocab)] + [("logits", 4 * vocab)] * 3))
    fig = _figure(9.4, 2.6)
    ax = fig.add_subplot()
    for row, (_, parts) in enumerate(rows):
        left = 0.0
        for look, size in parts:
            _box(ax, left / 1024, row - 0.32, size / 1024, 0.64, look)
            left += size
        ax.text(left / 1024, row, f"  {left / 1024:,.0f} KiB", va="center", fontsize=9.5, fontweight="bold")
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set(xlim=(0, 1.18 * 14 * vocab / 1024), ylim=(len(rows) - 0.5, -0.5), xlabel="KiB for one token")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return fig


def growth_figure(seqs: Sequence[int], lines: Mapping[str, Sequence[float]], cards: Mapping[str, float], xlabel: str):
    """GiB over tokens for several ways, with cards as horizontal lines. lines: {name: GiB at each of `seqs`}."""
    styles = (("#D55E00", "-", "o"), ("#0072B2", "--", "s"), ("#009E73", "-.", "D"), ("#CC79A7", ":", "^"))
    fig = _figure(9.4, 3.9)
    ax = fig.add_subplot()
    for (name, values), (colour, line, marker) in zip(lines.items(), styles):
        ax.plot(seqs, values, color=colour, ls=line, marker=marker, ms=4.5, lw=1.8, label=name)
    top = 1.08 * max(max(values) for values in lines.values())
    for name, size in cards.items():
        if size < top:
            ax.axhline(size, color=INK, lw=0.9, ls=(0, (1, 2)))
            ax.text(seqs[0], size, f"{name} ", va="bottom", ha="left", fontsize=8.5)
    ax.set(xlabel=xlabel, ylabel="GiB on the device", ylim=(0, top))
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.08, 1.0))
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def error_figure(errors: Mapping[str, Sequence[float]], limit: float = 60):
    """Relative errors in percent, a row of dots for each predictor; beyond ± `limit` they are triangles at the edge."""
    import numpy as np

    colours = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#222222")
    fig = _figure(9.4, 1.2 + 0.62 * len(errors))
    ax = fig.add_subplot()
    for row, ((name, values), colour) in enumerate(zip(errors.items(), colours * 3)):
        values = np.asarray(values, dtype=float)
        inside = np.abs(values) <= limit
        spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1)
        ax.scatter(values[inside], row + spread[inside], s=16, color=colour, alpha=0.75, lw=0)
        for sign, marker in ((1, ">"), (-1, "<")):
            beyond = values * sign > limit
            ax.scatter(np.full(beyond.sum(), sign * limit), row + spread[beyond], s=26, color=colour, marker=marker,
                       alpha=0.8, lw=0, clip_on=False)
        middle = float(np.median(values))
        ax.plot([max(-limit, min(limit, middle))] * 2, [row - 0.34, row + 0.34], color=INK, lw=2)
        said = f"median of |error| {np.median(np.abs(values)):.1f} %,\nworst {np.abs(values).max():.0f} %"
        ax.text(1.03 * limit, row, said, va="center", fontsize=8.5, clip_on=False)
    ax.axvline(0, color=INK, lw=0.9, ls=":")
    ax.set_yticks(range(len(errors)), list(errors))
    ax.set(xlim=(-limit, limit), ylim=(len(errors) - 0.45, -0.55),
           xlabel="predicted − measured, in % of what was measured")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return fig


def fit_table(rows: Sequence[str], columns: Sequence[str], gib: Mapping[tuple[str, str], float],
              limits: Mapping[tuple[str, str], float]):
    """A table of GiB needed, a cell each: filled and ✓ where it fits, hatched and × where not."""
    from matplotlib.patches import Rectangle

    fig = _figure(9.4, 0.8 + 0.36 * len(rows))
    ax = fig.add_subplot()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            need, room = gib[row, column], limits[row, column]
            fits = need <= room
            ax.add_patch(Rectangle((j, i), 1, 1, fc="#CDE6F5" if fits else "#F7E3D4", ec="white", lw=2,
                                   hatch=None if fits else "////"))
            ax.text(j + 0.5, i + 0.5, f"{'✓' if fits else '×'} {need:,.1f}", ha="center", va="center", fontsize=9,
                    fontweight="bold" if fits else "normal",
                    bbox=None if fits else {"fc": "#F7E3D4", "ec": "none", "pad": 1.0})
    ax.set_xticks([j + 0.5 for j in range(len(columns))], list(columns), fontsize=9)
    ax.set_yticks([i + 0.5 for i in range(len(rows))], list(rows), fontsize=9)
    ax.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    return fig
