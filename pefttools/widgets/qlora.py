"""Pictures of chapter 05: the two roads of a QLoRA layer, its bytes, training at equal steps, ways to ship an adapter.

Each function that draws is pure: numbers in, a Matplotlib figure out. Parts and ways differ by colour and by hatch or marker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

INK, GREY = "#222222", "#BBBBBB"
ORANGE, BLUE, PURPLE, VERMILION, YELLOW = "#E69F00", "#0072B2", "#CC79A7", "#D55E00", "#F0E442"
PARTS = {  # part of a layer's memory → colour, hatch; as in all chapters weights are grey and hatched, what is learned orange
    "weight, 16 bits": ("#D9D9D9", "////"), "float32 copy": ("#F2F2F2", ".."), "4-bit codes": (GREY, "////"),
    "scales": ("#8A8A8A", "...."), "A and B": (ORANGE, ""), "gradients": (YELLOW, "\\\\"), "Adam's moments": (PURPLE, "xx"),
}
WAYS = {"full": (GREY, "s"), "LoRA": (BLUE, "D"), "QLoRA": (ORANGE, "o")}


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bare(*axes) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------ the picture

def roads_picture():
    """x on its way to y over the 4-bit weight and over A and B; below, the gradient on its way back."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    fig = _figure(10.4, 4.4)
    ax = fig.add_subplot()

    def box(x, y, width, text, face, height=0.62, **style):
        ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.04", fc=face, ec=INK, **style))
        ax.text(x, y, text, ha="center", va="center", fontsize=10, zorder=5, bbox={"fc": face, "ec": "none", "pad": 1.2})

    def arrow(start, end, colour=INK, style="-"):
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour, ls=style, lw=1.6))

    for base, forward in ((3.1, True), (0.0, False)):
        colour, style = (INK, "-") if forward else (VERMILION, "--")
        middle, top = base + 0.85, base + 1.75
        box(0.5, middle, 1.0, "x" if forward else "∂L/∂x", "white")
        box(9.7, middle, 1.3, "y" if forward else "g = ∂L/∂y", "white")
        box(2.6, top, 1.9, "codes, scales\n(4 bits, frozen)", "#D9D9D9", hatch="////")
        box(5.6, top, 1.9, "W, 16 bits,\nfor a moment", "white", ls=":")
        box(5.6, middle, 1.3, "x·Wᵀ" if forward else "g·W", "white")
        box(3.4, base, 0.9, "A", ORANGE)
        box(5.6, base, 0.9, "B", ORANGE)
        box(7.6, base, 1.0, "· α/r", "white")
        ax.text(4.08, top + 0.1, "dequantize", fontsize=8, ha="center")
        arrow((3.65, top), (4.55, top), "#777777")
        arrow((5.6, top - 0.38), (5.6, middle + 0.38), "#777777")
        steps = [((1.1, middle), (4.85, middle)), ((6.35, middle), (8.95, middle)), ((1.1, middle - 0.2), (2.85, base)),
                 ((3.95, base), (5.05, base)), ((6.15, base), (7.0, base)), ((8.2, base), (9.0, middle - 0.3))]
        for start, end in steps:
            arrow(*((start, end) if forward else (end, start)), colour, style)
        ax.text(-0.05, top, "forward" if forward else "backward", fontsize=12, weight="bold", va="center")
    ax.set(xlim=(-0.2, 10.5), ylim=(-0.45, 5.3))
    ax.axis("off")
    return fig


# ------------------------------------------------------------------------------------------------ the bytes of a layer

def layer_bytes(d_out: int = 2048, d_in: int = 2048, r: int = 16, block_size: int = 64, double_quant: bool = True,
                adam_bits: int = 32) -> dict[str, dict[str, int]]:
    """way → {part: bytes} of one linear layer in training, activations apart.

    full: 16-bit weights and gradients, float32 copy and moments (mixed precision, 16 bytes a weight). LoRA and QLoRA: A
    and B, their gradients and moments in float32; moments in 8 bits only where a factor has 4096 numbers or more.
    """
    n, blocks = d_out * d_in, -(-d_out * d_in // block_size)
    factors = (r * d_in, d_out * r)
    moments, of_all = (sum(8 * m if adam_bits == 32 or m < 4096 else 2 * (m + 4 * -(-m // 256)) for m in sizes)
                       for sizes in (factors, (n,)))
    adapter = {"A and B": 4 * sum(factors), "gradients": 4 * sum(factors), "Adam's moments": moments}
    scales = blocks + 4 * -(-blocks // 256) + 4 if double_quant else 4 * blocks
    return {"full": {"weight, 16 bits": 2 * n, "float32 copy": 4 * n, "gradients": 2 * n, "Adam's moments": of_all},
            "LoRA": {"weight, 16 bits": 2 * n, **adapter},
            "QLoRA": {"4-bit codes": -(-n // 2), "scales": scales, **adapter}}


def _mib(size: int) -> str:
    """Bytes in MiB, with a digit more where there is little."""
    return f"{size / 2**20:.2f}" if size >= 2**20 / 10 else f"{size / 2**20:.3f}"


def bytes_figure(width: int = 2048, r: int = 16, block_size: int = 64, double_quant: bool = True, adam_bits: int = 32):
    """The layer's memory as stacked bars for three ways; below, the bytes of one block of its weights as cells."""
    from matplotlib.patches import Patch, Rectangle

    ways = layer_bytes(width, width, r, block_size, double_quant, adam_bits)
    fig = _figure(10.6, 5.4)
    top, below = fig.subplots(2, 1, height_ratios=(1.5, 1))
    widest = max(sum(parts.values()) for parts in ways.values()) / 2**20
    for ax_y, way in enumerate(reversed(ways)):
        left, parts = 0.0, ways[way]
        for part, size in parts.items():
            colour, hatch = PARTS[part]
            top.barh(ax_y, size / 2**20, left=left, color=colour, hatch=hatch, ec=INK, lw=0.7, height=0.62)
            left += size / 2**20
        top.text(left + 0.01 * widest, ax_y, f"{_mib(sum(parts.values()))} MiB", va="center", fontsize=10)
    top.set(yticks=range(3), yticklabels=list(ways)[::-1], xlabel="MiB", xlim=(0, 1.15 * widest),
            title=f"one linear layer, {width:,} × {width:,}, in training (activations apart)")
    used = [part for part in PARTS if any(part in parts for parts in ways.values())]
    top.legend(handles=[Patch(fc=PARTS[p][0], hatch=PARTS[p][1], ec=INK, label=p) for p in used], frameon=False, fontsize=8,
               loc="center left", bbox_to_anchor=(1.0, 0.5))
    _bare(top)

    shown = min(block_size, 64)
    bits = 4 + (8 / block_size + 32 / (256 * block_size) if double_quant else 32 / block_size)
    per_block = {"weight, 16 bits": (2 * shown, 0), "4-bit codes": (shown // 2, 1 if double_quant else 4)}
    for row, (part, (cells, scale)) in enumerate(per_block.items()):
        for i in range(cells + scale):
            colour, hatch = PARTS[part] if i < cells else PARTS["scales"]
            below.add_patch(Rectangle((i % 64, 4.2 - 3 * row - i // 64), 0.9, 0.9, fc=colour, hatch="" if i < cells else hatch, ec=INK, lw=0.5))
    below.text(0, 5.4, f"{shown} weights in 16 bits: {2 * shown} bytes (a cell is a byte)", fontsize=9)
    share = "" if block_size == shown else f" (shared with the rest of the block of {block_size})"
    below.text(0, 2.4, f"the same in NF4: {shown // 2} bytes of codes and {1 if double_quant else 4} of scale{share}; "
               f"{bits:.3f} bits a weight", fontsize=9)
    below.set(xlim=(-0.5, 65), ylim=(0, 6.2))
    below.axis("off")
    return fig


def bytes_alt(width: int = 2048, r: int = 16, block_size: int = 64, double_quant: bool = True, adam_bits: int = 32) -> str:
    """What the picture of the bytes shows, in words."""
    ways = layer_bytes(width, width, r, block_size, double_quant, adam_bits)
    said = "; ".join(f"{way} {_mib(sum(parts.values()))} MiB ("
                     + ", ".join(f"{p} {_mib(b)}" for p, b in parts.items()) + ")"
                     for way, parts in ways.items())
    return f"Bars of memory for one {width} by {width} layer, rank {r}, blocks of {block_size}: {said}. Below, a block's bytes as cells."


def bytes_explorer():
    """The bytes of a layer with controls; where no front end answers, the first frame."""
    from pefttools.widgets.base import slider_figure

    return slider_figure(bytes_figure, alt=bytes_alt, title="The bytes of a layer", width=[2048, 256, 512, 1024, 4096, 8192],
                         r=[16, 1, 4, 8, 64, 256], block_size=[64, 32, 128, 256, 1024], double_quant=True, adam_bits=[32, 8])


# ------------------------------------------------------------------------------------------------ measurements

def runs_figure(table: Mapping[str, Mapping[str, Sequence[float]]]):
    """Held-out loss and pass@1 of each way, a mark for each seed and a bar for mean ± standard deviation."""
    fig = _figure(9.4, 3.3)
    axes = fig.subplots(1, 2)
    for ax, key, title in zip(axes, ("loss", "pass"), ("held-out loss (lower is better)", "pass@1 (higher is better)")):
        for x, (way, found) in enumerate(table.items()):
            colour, marker = WAYS.get(way, (PURPLE, "^"))
            _marks(ax, x, found[key], colour, marker)
        ax.set(xticks=range(len(table)), xticklabels=list(table), title=title)
        ax.set_ylim(0, 1.15 * max(v for found in table.values() for v in found[key]) or 1)
        ax.set_xlim(-0.6, len(table) - 0.4)
        _bare(ax)
    return fig


def shipped_figure(shipped: Mapping[str, Mapping[str, Sequence[float]]]):
    """Each way to ship an adapter: distance of the logits from the trained model's, held-out loss, pass@1."""
    fig = _figure(11.4, 3.0)
    axes = fig.subplots(1, 3, sharey=True)
    titles = {"logits": "logits: relative distance", "loss": "held-out loss", "pass": "pass@1"}
    looks = ((ORANGE, "o"), (BLUE, "D"), (GREY, "s"), (VERMILION, "X"))
    for ax, (key, title) in zip(axes, titles.items()):
        for y, (way, found) in enumerate(shipped.items()):
            _marks(ax, len(shipped) - 1 - y, found[key], *looks[y % 4], across=True)
        ax.set(yticks=range(len(shipped)), yticklabels=list(shipped)[::-1], title=title)
        ax.set_xlim(left=-0.03 * (high := max(v for found in shipped.values() for v in found[key]) or 1), right=1.1 * high)
        ax.set_ylim(-0.6, len(shipped) - 0.4)
        _bare(ax)
    return fig


def _marks(ax, at: float, values: Sequence[float], colour: str, marker: str, across: bool = False) -> None:
    mean = sum(values) / len(values)
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    places = [at + 0.12 * (i - (len(values) - 1) / 2) for i in range(len(values))]
    if across:
        ax.errorbar(mean, at, xerr=sd, color=INK, capsize=5, lw=1.6, zorder=1)
        ax.plot(values, places, marker, color=colour, mec=INK, ms=7, ls="none")
    else:
        ax.errorbar(at, mean, yerr=sd, color=INK, capsize=5, lw=1.6, zorder=1)
        ax.plot(places, values, marker, color=colour, mec=INK, ms=7, ls="none")
