"""Memory as pictures that move: a configuration's stacked bar against the lines of GPUs, and a step's timeline.

    weights ▒▒▒▒│adapter│optimizer│ activations ░░░░░░░│ logits ▓▓▓▓│ temporary │ allocator │ context
    ├───────────────────────────────────────────────────────────────────────────────────────┤    ┊T4     ┊L4 3090
    0                                                                                      10 GiB

Pure functions: `Memory` objects (pefttools.vram) in, Matplotlib figures out. Terms are told apart without colour too,
by their hatching, and have the same look in both pictures. `explorer` and `timeline_viewer` put controls before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pefttools.vram.memory import Memory

INK, GREY = "#222222", "#D9D9D9"
LOOK = {  # term → colour (Okabe and Ito), hatching; frozen is grey and what trains orange, as in all chapters
    "weights": ("#D9D9D9", "////"),
    "constants": ("#9A9A9A", "...."),
    "adapter": ("#E69F00", None),
    "gradients": ("#F0E442", "\\\\\\\\"),
    "optimizer": ("#CC79A7", "xxxx"),
    "activations": ("#56B4E9", None),
    "logits": ("#0072B2", "----"),
    "temporary": ("#009E73", "||||"),
    "allocator": ("#FFFFFF", "...."),
    "context": ("#FFFFFF", "++++"),
}
SAYS = {"weights": "frozen or trained weights", "constants": "scales of 4-bit weights", "adapter": "adapter",
        "gradients": "gradients", "optimizer": "optimizer's state", "activations": "kept by the layers",
        "logits": "logits and loss", "temporary": "temporary",
        "allocator": "reserved, not in use", "context": "CUDA context"}
CARDS = ("t4", "l4", "rtx-3090", "a100-40", "l40s", "a100-80", "h200")
GIB = 2**30


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _patch(name: str):
    from matplotlib.patches import Patch

    colour, hatch = LOOK[name]
    return Patch(fc=colour, ec=INK, hatch=hatch, lw=0.6, label=SAYS[name])


def _legend(fig, names: Sequence[str], columns: int = 5) -> None:
    fig.legend(handles=[_patch(name) for name in LOOK if name in names], loc="outside lower center", ncols=columns,
               frameon=False, fontsize=8.5, handlelength=1.9, handleheight=1.1)


def parts_of(memory: Memory) -> dict[str, int]:
    """Everything that the device holds at the peak, in bytes: the terms, what the allocator keeps, the context."""
    return {**memory.terms, "allocator": max(0, memory.reserved - memory.total), "context": memory.context}


def moment_of(memory: Memory) -> str:
    """Where the peak is, for readers: the operation's name in autograd says little."""
    at_the_loss = "log_softmax" in memory.peak_at or "cross entropy" in memory.peak_at
    return "the loss, going backward" if at_the_loss else memory.peak_at


def cards_around(gib: float, names: Sequence[str] = CARDS) -> list[tuple[str, float]]:
    """(name, usable GiB) of the GPUs to draw beside a bar of this length: those it reaches, and two above."""
    from pefttools.vram.gpus import GPUS

    found = sorted(((GPUS[name].name, GPUS[name].usable / GIB) for name in names if name in GPUS), key=lambda c: c[1])
    above = [card for card in found if card[1] > gib]
    return [card for card in found if card[1] <= gib] + above[:2]


def bars(named: Mapping[str, Memory], cards: Sequence[str] = CARDS, title: str = ""):
    """One stacked bar for each named `Memory`, in GiB, against dashed lines at what GPUs have to give."""
    sizes = {name: sum(parts_of(memory).values()) / GIB for name, memory in named.items()}
    longest = max(sizes.values())
    lines = cards_around(longest, cards)
    right = max([longest * 1.13, *(size * 1.04 for _, size in lines)])
    fig = _figure(9.6, 1.55 + 0.52 * len(named))
    ax = fig.add_subplot()
    used = []
    for row, (name, memory) in enumerate(named.items()):
        left = 0.0
        for term, size in parts_of(memory).items():
            if size / GIB < right / 2000:
                continue
            colour, hatch = LOOK[term]
            ax.barh(row, size / GIB, left=left, height=0.62, fc=colour, ec=INK, hatch=hatch, lw=0.6, zorder=2)
            if size / GIB > 0.055 * right:
                ax.text(left + size / GIB / 2, row, f"{size / GIB:.1f}", ha="center", va="center", fontsize=8.5,
                        zorder=4, bbox={"fc": "white", "ec": "none", "pad": 0.8, "alpha": 0.85})
            used.append(term)
            left += size / GIB
        ax.text(left + 0.008 * right, row, f"{left:.1f} GiB", va="center", fontsize=9.5, fontweight="bold", zorder=5,
                bbox={"fc": "white", "ec": "none", "pad": 0.8})
    for i, (name, size) in enumerate(lines):
        ax.axvline(size, color=INK, ls="--", lw=1.1, zorder=3)
        ax.text(size, -0.62 - 0.32 * (i % 2), f"{name} {size:.1f}", ha="center", va="bottom", fontsize=8, zorder=5,
                bbox={"fc": "white", "ec": "none", "pad": 0.6})
    ax.set_yticks(range(len(named)), list(named))
    ax.set(xlim=(0, right), ylim=(len(named) - 0.5, -1.25), xlabel="GiB (2³⁰ bytes) on the device at the peak")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    if title:
        ax.set_title(title, fontsize=10.5, loc="left")
    _legend(fig, used)
    return fig


def bars_alt(named: Mapping[str, Memory], cards: Sequence[str] = CARDS) -> str:
    """What `bars` shows, in words."""
    said = []
    for name, memory in named.items():
        parts = parts_of(memory)
        largest = sorted((p for p in parts.items() if p[1]), key=lambda p: -p[1])[:3]
        said.append(f"{name}: {sum(parts.values()) / GIB:.1f} GiB, mostly "
                    + ", ".join(f"{SAYS[term]} {size / GIB:.1f}" for term, size in largest))
    return "Stacked bars of memory at the peak. " + "; ".join(said) + "."


# ------------------------------------------------------------------------------------------------ the explorer

MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "mistral-7b", "llama-3.1-8b", "llama-2-13b", "llama-65b",
          "llama-2-70b", "llama-3.1-70b")
METHODS = ("qlora", "lora", "dora", "full", "bottleneck", "prefix", "prompt")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "sgd", "adafactor")


@lru_cache(maxsize=512)
def estimated(model: str, method: str, batch: int, seq: int, r: int, checkpointing: bool, optimizer: str,
              attention: str, gpu: str | None = None) -> Memory:
    """The formula's answer for the explorer's values; LoRA and its relatives on all linear layers.

    gpu: a card's own kernels, context and dtype (a T4 has no bfloat16, and no fused attention for grouped queries).
    """
    from pefttools.vram import estimate
    from pefttools.vram.gpus import GPUS

    targets = "all-linear" if method in ("qlora", "lora", "dora") else None
    dtype = "bfloat16" if gpu is None or GPUS[gpu].bf16 else "float16"
    return estimate(model, method, batch, seq, r=r, targets=targets, checkpointing=checkpointing, optimizer=optimizer,
                    attention=attention, gpu=gpu, dtype=dtype)


def _fitting(*values: Any) -> str:
    """Where it fits, in words: each card with its own kernels."""
    from pefttools.vram.gpus import GPUS

    yes = [GPUS[name].name for name in CARDS if estimated(*values, name).device <= GPUS[name].usable]
    return "fits " + ", ".join(yes) if yes else "fits none of these cards"


def explorer_figure(model: str = "llama-3.2-1b", method: str = "qlora", batch: int = 4, tokens: int = 1024,
                    rank: int = 16, checkpointing: bool = False, optimizer: str = "adamw", attention: str = "sdpa"):
    """One configuration as a stacked bar against lines of GPUs, with the peak's moment and what fits in the title."""
    values = (model, method, batch, tokens, rank, checkpointing, optimizer, attention)
    memory = estimated(*values)
    name = f"{model}\n{method}, {batch} × {tokens:,}"
    title = (f"{memory.trainable:,} of {memory.parameters:,} parameters train; peak: {moment_of(memory)}\n"
             f"{_fitting(*values)}")
    return bars({name: memory}, title=title)


def explorer_alt(model: str = "llama-3.2-1b", method: str = "qlora", batch: int = 4, tokens: int = 1024, rank: int = 16,
                 checkpointing: bool = False, optimizer: str = "adamw", attention: str = "sdpa") -> str:
    """What `explorer_figure` shows, in words."""
    values = (model, method, batch, tokens, rank, checkpointing, optimizer, attention)
    memory = estimated(*values)
    name = (f"{model}, {method} of rank {rank}, {batch} rows of {tokens} tokens, {optimizer}, "
            f"{'with' if checkpointing else 'no'} checkpointing, {attention} attention")
    return bars_alt({name: memory}) + f" It {_fitting(*values)}."


def explorer():
    """Which configuration fits which card? `explorer_figure` with controls; without a front end, its first frame."""
    from pefttools.widgets.base import slider_figure

    return slider_figure(
        explorer_figure, alt=explorer_alt, title="Memory of one training step",
        model=list(MODELS), method=list(METHODS), batch=[4, 1, 2, 8, 16, 32],
        tokens=[1024, 128, 256, 512, 768, 1536, 2048, 3072, 4096, 8192], rank=[16, 1, 2, 4, 8, 32, 64, 128, 256],
        checkpointing=False, optimizer=list(OPTIMIZERS), attention=["sdpa", "eager"])


# ------------------------------------------------------------------------------------------------ the timeline

def phases_of(memory: Memory) -> list[tuple[str, int, int]]:
    """(name, first, last + 1) of the moments of a step: what is left from before, forward, backward, optimizer."""
    phases = [moment.phase for moment in memory.timeline]
    runs, start = [], 0      # the forward pass is the longest run of its moments; single ones stand elsewhere too
    for i in range(1, len(phases) + 1):
        if i == len(phases) or (phases[i] in ("forward", "loss")) != (phases[start] in ("forward", "loss")):
            runs += [(start, i)] if phases[start] in ("forward", "loss") else []
            start = i
    forward, backward = max(runs, key=lambda run: run[1] - run[0], default=(0, 0))
    step = next((i for i, phase in enumerate(phases) if i >= backward and phase == "step"), len(phases))
    cuts = [("before", 0, forward), ("forward", forward, backward), ("backward", backward, step),
            ("optimizer", step, len(phases))]
    return [cut for cut in cuts if cut[2] > cut[1]]


def timeline_figure(memory: Memory, title: str = "", top: float | None = None):
    """Who holds what over one step: stacked areas in GiB, the phases, and the peak. `top`: the axis' end in GiB."""
    import numpy as np

    moments = memory.timeline
    if not moments:
        raise ValueError("this Memory has no timeline: it is the formula's. Take one of simulate(…).")
    x = np.arange(len(moments) + 1)
    fig = _figure(9.6, 4.1)
    ax = fig.add_subplot()
    below, used = np.zeros(len(moments) + 1), []
    for term in memory.terms:
        values = np.array([moment.terms.get(term, 0) for moment in moments])
        values = np.append(values, values[-1:]) / GIB
        if values.max() * GIB < 2**20:
            continue
        colour, hatch = LOOK[term]
        ax.fill_between(x, below, below + values, step="post", fc=colour, ec=INK, hatch=hatch, lw=0.3)
        below = below + values
        used.append(term)
    peak = max(range(len(moments)), key=lambda i: moments[i].total)
    high = moments[peak].total / GIB
    top = top or 1.3 * high
    for name, first, last in phases_of(memory):
        ax.axvline(last, color=INK, lw=0.8, ls=":")
        if last - first > len(moments) / 25:
            ax.text((first + last) / 2, 0.985 * top, name, ha="center", va="top", fontsize=9.5, fontweight="bold")
    side = -1 if peak > 0.55 * len(moments) else 1
    ax.annotate(f"peak: {high:.2f} GiB\n{moment_of(memory)}", (peak + 0.5, high),
                (peak + side * 0.06 * len(moments), min(high + 0.1 * top, 0.84 * top)), fontsize=9,
                ha="left" if side > 0 else "right", arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.1},
                bbox={"fc": "white", "ec": INK, "lw": 0.6, "pad": 2.5})
    ax.set(xlim=(0, len(moments)), ylim=(0, top), xticks=[], xlabel="one training step, allocation by allocation →",
           ylabel="GiB")
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title, fontsize=10.5, loc="left")
    _legend(fig, used)
    return fig


def timeline_alt(memory: Memory, name: str = "") -> str:
    """What `timeline_figure` shows, in words."""
    peak = max(memory.timeline, key=lambda moment: moment.total)
    largest = sorted(((t, n) for t, n in peak.terms.items() if n), key=lambda p: -p[1])[:3]
    return (f"Memory over one training step{f' of {name}' if name else ''}, stacked by who holds it. It rises through "
            f"the forward pass, peaks at {peak.total / GIB:.2f} GiB ({moment_of(memory)}; "
            + ", ".join(f"{SAYS[t]} {n / GIB:.2f}" for t, n in largest) + "), and falls through the backward pass.")


def timeline_viewer(named: Mapping[str, Memory]):
    """`timeline_figure` with a chooser between several simulated steps, all on one scale."""
    from pefttools.widgets.base import slider_figure

    top = 1.3 * max(memory.total for memory in named.values()) / GIB

    def draw(configuration: Any):
        return timeline_figure(named[configuration], configuration, top)

    return slider_figure(draw, alt=lambda configuration: timeline_alt(named[configuration], configuration),
                         title="Who holds what over a step", configuration=list(named))


@lru_cache(maxsize=64)
def run(model: str, method: str, batch: int, seq: int, r: int, checkpointing: bool) -> Memory:
    """The simulator's answer for the page's values; LoRA and its relatives on all linear layers."""
    from pefttools.vram import simulate

    targets = "all-linear" if method in ("qlora", "lora", "dora") else None
    return simulate(model, method, batch, seq, r=r, targets=targets, checkpointing=checkpointing)


def simulated_figure(model: str = "llama-3.2-1b", method: str = "lora", batch: int = 2, tokens: int = 512,
                     rank: int = 16, checkpointing: bool = False):
    """`timeline_figure` of a configuration, simulated when it is asked for."""
    title = f"{model}, {method}, {batch} × {tokens:,} tokens{', checkpointing' if checkpointing else ''}"
    return timeline_figure(run(model, method, batch, tokens, rank, checkpointing), title)


def simulated_alt(model: str = "llama-3.2-1b", method: str = "lora", batch: int = 2, tokens: int = 512, rank: int = 16,
                  checkpointing: bool = False) -> str:
    """What `simulated_figure` shows, in words."""
    return timeline_alt(run(model, method, batch, tokens, rank, checkpointing), f"{model}, {method}")


def simulated():
    """The timeline of any configuration with controls: a simulation of some seconds for each new one."""
    from pefttools.widgets.base import slider_figure

    return slider_figure(simulated_figure, alt=simulated_alt, title="Who holds what over a step", model=list(MODELS),
                         method=["lora", *(m for m in METHODS if m != "lora")], batch=[2, 1, 4, 8, 16],
                         tokens=[512, 128, 256, 1024, 2048, 4096], rank=[16, 1, 4, 8, 32, 64, 128], checkpointing=False)
