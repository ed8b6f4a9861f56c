"""Pictures of chapter 00: three ways to reuse a model, the map of methods, memory by recipe, forgetting.

Each function that draws is pure: numbers in, a Matplotlib figure out. What trains is orange and plain, what is frozen
is grey and hatched, so that the pictures read without colour too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TRAINED, FROZEN, INK = "#E69F00", "#D9D9D9", "#222222"  # Okabe and Ito's orange; grey; near black
BLUE, GREEN, SKY, PURPLE, VERMILION = "#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#D55E00"

GPUS = {"T4": 16, "RTX 3090": 24, "A100": 80}  # GB of memory as the makers state it

# What a parameter costs in bytes: (trained, frozen). The first three keep 16-bit weights and 32-bit Adam moments.
# 4.127 bits: NF4 with double quantization, 4 + 8/64 + 32/(64·256) (QLoRA, section 3).
RECIPES = {
    "full, with master weights": (16.0, None),
    "full, without master weights": (12.0, None),
    "frozen in 16 bits + adapter": (16.0, 2.0),
    "frozen in 4 bits + adapter": (16.0, (4 + 8 / 64 + 32 / (64 * 256)) / 8),
}


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _box(ax, x, y, w, h, text, *, trained=False, size=9):
    """A rounded box with a label in its middle: hatched grey if frozen, plain orange if trained."""
    from matplotlib.patches import FancyBboxPatch

    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.08", ec=INK,
                                lw=1.6 if trained else 0.9, fc=TRAINED if trained else FROZEN,
                                hatch=None if trained else "////"))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK,
            bbox=None if trained else {"fc": FROZEN, "ec": "none", "pad": 1.2})


def _arrow(ax, start, end, **style):
    look = {"arrowstyle": "-|>", "color": INK, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=look | style)


def three_ways():
    """Feature-based transfer, full fine-tuning and PEFT side by side: what trains, how far the gradient runs."""
    fig = _figure(9.4, 4.0)
    titles = ("feature-based transfer", "full fine-tuning", "parameter-efficient (PEFT)")
    below = ("the model runs forward once;\nonly the new part learns", "every weight learns;\none whole model a task",
             "the model rests;\na few new weights inside it learn")
    for i, ax in enumerate(fig.subplots(1, 3)):
        ax.set(xlim=(-0.9, 4.6), ylim=(-1.35, 6.1))
        ax.axis("off")
        ax.set_title(titles[i], fontsize=11, fontweight="bold")
        ax.text(1.7, -0.2, "text", ha="center", va="center", fontsize=9)
        _arrow(ax, (1.7, 0.0), (1.7, 0.5))
        for layer in range(3):
            y = 0.5 + 1.2 * layer
            _box(ax, 0.2, y, 3.0, 0.8, f"block {layer + 1}", trained=i == 1)
            _arrow(ax, (1.7, y + 0.8), (1.7, y + 1.2))
            if i == 2:
                ax.plot([3.2, 3.45], [y + 0.4, y + 0.4], color=INK, lw=1.2, zorder=0)
                _box(ax, 3.45, y + 0.1, 0.9, 0.6, "new", trained=True, size=8)
        _box(ax, 0.2, 4.1, 3.0, 0.8, ("new classifier", "output head", "output head")[i], trained=i < 2)
        _arrow(ax, (1.7, 4.9), (1.7, 5.4))
        ax.text(1.7, 5.6, "answer", ha="center", va="center", fontsize=9)
        bottom = 4.15 if i == 0 else 0.55
        _arrow(ax, (-0.25, 5.3), (-0.25, bottom), color=VERMILION, lw=1.8, ls="--")
        ax.text(-0.45, (5.3 + bottom) / 2, "gradient", rotation=90, ha="right", va="center", fontsize=8,
                color=VERMILION)
        ax.text(1.7, -0.95, below[i], ha="center", va="center", fontsize=9)
    _legend(fig)
    return fig


THREE_WAYS_ALT = (
    "Three stacks of blocks side by side. Feature-based transfer: all blocks frozen, a trained classifier on top, and "
    "the gradient stops there. Full fine-tuning: every block and the head trained, the gradient runs all the way down. "
    "PEFT: all blocks and the head frozen, a small new trained part beside each block, the gradient runs all the way "
    "down.")


def _legend(fig):
    from matplotlib.patches import Patch

    fig.legend(handles=[Patch(fc=FROZEN, ec=INK, hatch="////", label="frozen"),
                        Patch(fc=TRAINED, ec=INK, label="trained")],
               loc="outside lower center", ncols=2, frameon=False, fontsize=9)


METHODS = {  # letter: (name, what it adds, chapter)
    "A": ("LoRA", "a narrow matrix pair beside any matrix", "02"),
    "B": ("QLoRA", "the same, and the frozen matrix in 4 bits", "05"),
    "C": ("bottleneck adapter", "a small network after attention and after feed-forward", "06"),
    "D": ("IA³", "one factor for each key, value and feed-forward feature", "06"),
    "E": ("prefix tuning", "trained keys and values in front of the real ones", "07"),
    "F": ("prompt tuning", "trained vectors in front of the text", "07"),
}


def method_map():
    """One block of a Llama, drawn once, with a lettered mark at each place where a method touches it."""
    fig = _figure(9.6, 6.6)
    left, right = fig.subplots(1, 2, width_ratios=(5.4, 4.2))
    ax = left
    ax.set(xlim=(-0.4, 8.4), ylim=(-0.2, 13.6))
    ax.axis("off")

    def mark(x, y, letters):
        for k, letter in enumerate(letters):
            ax.text(x + 0.6 * k, y, letter, ha="center", va="center", fontsize=9, fontweight="bold",
                    bbox={"boxstyle": "circle,pad=0.22", "fc": TRAINED, "ec": INK, "lw": 1.1}, zorder=5)

    middle = 4.2
    ax.text(middle, 0.0, "tokens", ha="center", va="center", fontsize=9)
    _arrow(ax, (middle, 0.2), (middle, 0.6))
    _box(ax, 2.2, 0.6, 4.0, 0.75, "token embedding")
    mark(6.65, 0.98, "F")
    ax.add_patch(_outline(-0.1, 1.75, 8.1, 9.85))
    ax.text(0.1, 11.3, "one block, repeated", fontsize=8, va="center", style="italic")
    _arrow(ax, (middle, 1.35), (middle, 2.1))
    _box(ax, 2.8, 2.1, 2.8, 0.55, "RMSNorm", size=8)
    for x, name in ((2.0, "query\nq_proj"), (3.5, "key\nk_proj"), (5.0, "value\nv_proj")):
        _box(ax, x, 3.15, 1.4, 0.85, name, size=8)
        _arrow(ax, (middle, 2.65), (x + 0.7, 3.15))
        _arrow(ax, (x + 0.7, 4.0), (x + 0.7, 4.75))
    mark(0.95, 3.57, "AB")
    mark(6.75, 3.57, "AB")
    mark(4.95, 4.38, "D")
    mark(6.75, 4.38, "E")
    _box(ax, 2.0, 4.75, 4.4, 0.65, "attention")
    _arrow(ax, (middle, 5.4), (middle, 5.7))
    _box(ax, 2.8, 5.7, 2.8, 0.55, "o_proj", size=8)
    mark(6.0, 5.97, "AB")
    _arrow(ax, (middle, 6.25), (middle, 6.85))
    mark(4.75, 6.55, "C")
    _plus(ax, middle, 7.05)
    _arrow(ax, (middle, 7.25), (middle, 7.6))
    _box(ax, 2.8, 7.6, 2.8, 0.55, "RMSNorm", size=8)
    for x, name in ((2.0, "gate_proj"), (4.4, "up_proj")):
        _box(ax, x, 8.5, 2.0, 0.55, name, size=8)
        _arrow(ax, (middle, 8.15), (x + 1.0, 8.5))
        _arrow(ax, (x + 1.0, 9.05), (middle, 9.65))
    mark(0.95, 8.77, "AB")
    mark(6.8, 8.77, "AB")
    mark(middle, 9.12, "D")
    _box(ax, 2.8, 9.65, 2.8, 0.55, "down_proj", size=8)
    mark(6.0, 9.92, "AB")
    _arrow(ax, (middle, 10.2), (middle, 10.8))
    mark(4.75, 10.5, "C")
    _plus(ax, middle, 11.0)
    for bottom, top in ((1.9, 7.05), (7.42, 11.0)):  # the residual stream goes around both halves
        ax.plot([middle, 0.4, 0.4, middle - 0.22], [bottom, bottom, top, top], color=INK, lw=1.0, zorder=0)
    _arrow(ax, (middle, 11.2), (middle, 12.05))
    _box(ax, 2.2, 12.05, 4.0, 0.7, "RMSNorm, output head")
    _arrow(ax, (middle, 12.75), (middle, 13.2))
    ax.text(middle, 13.4, "next token", ha="center", va="center", fontsize=9)

    right.set(xlim=(0, 10), ylim=(0, 10))
    right.axis("off")
    right.text(0, 9.75, "Where each method puts its trained numbers", fontsize=10.5, fontweight="bold", va="center")
    y = 8.9
    for letter, (name, what, chapter) in METHODS.items():
        right.text(0.35, y, letter, ha="center", va="center", fontsize=9, fontweight="bold",
                   bbox={"boxstyle": "circle,pad=0.22", "fc": TRAINED, "ec": INK, "lw": 1.1})
        right.text(1.0, y + 0.02, f"{name}  (chapter {chapter})", fontsize=9.5, fontweight="bold", va="center")
        right.text(1.0, y - 0.42, what, fontsize=8.5, va="center")
        y -= 1.2
    right.text(0, y + 0.1, "Full fine-tuning trains every hatched box and adds nothing.\n"
               "Feature-based transfer trains nothing in this picture:\nit puts its own part on top.",
               fontsize=8.5, va="top")
    _legend(fig)
    return fig


METHOD_MAP_ALT = (
    "One block of a Llama, from bottom to top: token embedding, RMSNorm, query, key and value matrices, attention, "
    "o_proj, plus, RMSNorm, gate_proj and up_proj, down_proj, plus, then the output head; all frozen. Marks: A (LoRA) "
    "and B (QLoRA) beside the matrices; C (bottleneck adapter) after o_proj and after down_proj; D (IA³) at keys, "
    "values and inside the feed-forward; E (prefix tuning) at keys and values; F (prompt tuning) at the token "
    "embedding.")


def _outline(x, y, w, h):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), w, h, fc="none", ec="#777777", ls="--", lw=1.0)


def _plus(ax, x, y):
    ax.text(x, y, "+", ha="center", va="center", fontsize=11,
            bbox={"boxstyle": "circle,pad=0.12", "fc": "white", "ec": INK, "lw": 1.0}, zorder=4)


def recipe_gigabytes(billions: float, adapter_percent: float = 0.5) -> dict[str, float]:
    """GB (10⁹ bytes) of weights, gradients and optimizer for each of `RECIPES`.

    billions: parameters of the model, in 10⁹. adapter_percent: trained parameters as a percentage of those.
    Activations are not in it. Raises ValueError for sizes that are not positive or a share outside 0–100.
    """
    if billions <= 0:
        raise ValueError(f"billions must be above 0, got {billions}")
    if not 0 <= adapter_percent <= 100:
        raise ValueError(f"adapter_percent must be between 0 and 100, got {adapter_percent}")
    adapter = billions * adapter_percent / 100
    return {name: trained * billions if frozen is None else frozen * billions + trained * adapter
            for name, (trained, frozen) in RECIPES.items()}


def what_fits(gigabytes: float) -> str:
    """The smallest of `GPUS` that holds so much, or in how many of the largest it would have to be cut."""
    for name, size in GPUS.items():
        if gigabytes <= size:
            return f"could go into one {name}"
    name, size = list(GPUS.items())[-1]
    return f"needs {int(-(-gigabytes // size))} × {name}"


def memory_by_recipe(billions: float = 7, adapter_percent: float = 0.5):
    """Bars of GB for a model of that many billion parameters, one for each recipe, against the memory of three GPUs."""
    sizes = recipe_gigabytes(billions, adapter_percent)
    fig = _figure(9.0, 3.6)
    ax = fig.add_subplot()
    styles = ((VERMILION, None), (VERMILION, ".."), (BLUE, "//"), (SKY, "xx"))
    for row, ((name, gigabytes), (colour, hatch)) in enumerate(zip(sizes.items(), styles)):
        ax.barh(row, gigabytes, color=colour, hatch=hatch, ec="white", height=0.62)
        ax.text(gigabytes * 1.06, row, f"{gigabytes:,.1f} GB, {what_fits(gigabytes)}", va="center", fontsize=9,
                bbox={"fc": "white", "ec": "none", "pad": 0.8}, zorder=4)
    for (name, size), style in zip(GPUS.items(), (":", "--", "-.")):
        ax.axvline(size, color=INK, ls=style, lw=1.2, zorder=3)
        side = {"T4": "right", "A100": "left"}.get(name, "center")  # they lie close on this axis
        ax.text(size, -0.66, f"{name.split()[-1]}\n{size} GB", ha=side, va="bottom", fontsize=8.5)
    ax.set(xscale="log", xlim=(0.3, 30_000), ylim=(3.6, -0.65),
           xlabel="GB of weights, gradients and optimizer, before activations (logarithmic)")
    ax.set_yticks(range(len(sizes)), list(sizes))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set_title(f"{billions:g} billion parameters; adapters train {adapter_percent:g} % as many", pad=30,
                 fontsize=10.5)
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def memory_alt(billions: float = 7, adapter_percent: float = 0.5) -> str:
    """What `memory_by_recipe` shows, in words."""
    sizes = recipe_gigabytes(billions, adapter_percent)
    said = "; ".join(f"{name}: {gb:,.1f} GB, {what_fits(gb)}" for name, gb in sizes.items())
    return f"Bar chart of training memory for {billions:g} billion parameters. {said}."


def memory_explorer():
    """Which recipe goes into which GPU? The figure above with two sliders; without a front end, its first frame."""
    from pefttools.widgets.base import slider_figure

    return slider_figure(memory_by_recipe, memory_alt, billions=[7, 1, 3, 8, 13, 30, 65, 70, 175],
                         adapter_percent=[0.5, 0.1, 1, 2, 5])


def stacked_bytes(measured: Mapping[str, Mapping[str, float]]):
    """Megabytes of each term for each way of training. measured: {way: {"weights": bytes, "gradients": …, …}}."""
    fig = _figure(8.6, 2.6)
    ax = fig.add_subplot()
    terms = list(next(iter(measured.values())))
    styles = dict(zip(terms, ((BLUE, "//"), (TRAINED, None), (PURPLE, ".."), (GREEN, "xx"))))
    for row, (way, parts) in enumerate(measured.items()):
        left = 0.0
        for term in terms:
            megabytes = parts[term] / 1e6
            colour, hatch = styles[term]
            ax.barh(row, megabytes, left=left, color=colour, hatch=hatch, ec="white", height=0.6,
                    label=term if row == 0 else None)
            left += megabytes
        ax.text(left * 1.01, row, f" {left:,.1f} MB", va="center", fontsize=9)
    ax.set_yticks(range(len(measured)), list(measured))
    ax.set(xlabel="MB (10⁶ bytes), counted after one training step", ylim=(len(measured) - 0.5, -0.5))
    ax.set_xlim(0, 1.16 * max(sum(p.values()) for p in measured.values()) / 1e6)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.28), ncols=len(terms), frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def learned_and_forgot(results: Mapping[str, tuple[float, float]], before: tuple[float, float]):
    """Loss on the new task and on old text for each way of training, against the loss before any training.

    results: {way: (loss on the new task, loss on old text)}; before: the same two of the base model. Nats per token.
    """
    fig = _figure(9.0, 2.9)
    titles = ("the new task: lower is better learned", "old text: higher is more forgotten")
    colours, hatches = (VERMILION, BLUE, SKY, GREEN), (None, "//", "xx", "..")
    for part, (ax, title) in enumerate(zip(fig.subplots(1, 2), titles)):
        values = [r[part] for r in results.values()]
        for row, value in enumerate(values):
            ax.barh(row, value, color=colours[row % 4], hatch=hatches[row % 4], ec="white", height=0.6)
            ax.text(value, row, f" {value:.2f}", va="center", fontsize=9)
        ax.axvline(before[part], color=INK, ls="--", lw=1.3)
        ax.text(before[part], -0.5, f"before: {before[part]:.2f}", ha="center", va="bottom", fontsize=8.5)
        ax.set_yticks(range(len(results)), list(results) if part == 0 else [""] * len(results))
        ax.set(xlabel="loss (nats per token)", ylim=(len(results) - 0.5, -0.5),
               xlim=(0, 1.18 * max([*values, before[part]])))
        ax.set_title(title, fontsize=10, pad=16)
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def two_losses(histories: Mapping[str, Sequence[float]]):
    """Training losses of several ways over optimizer steps, one line each. histories: {way: smoothed losses}."""
    fig = _figure(8.0, 3.0)
    ax = fig.add_subplot()
    styles = ((VERMILION, "-"), (BLUE, "--"), (GREEN, "-."), (PURPLE, ":"))
    for (way, losses), (colour, style) in zip(histories.items(), styles):
        ax.plot(range(1, len(losses) + 1), losses, color=colour, ls=style, lw=2, label=way)
    ax.set(xlabel="optimizer step", ylabel="loss (nats per answer token)", ylim=(0, None))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def compare_guess(guess: float | None, measured: float, unit: str = "") -> str:
    """A guess beside what was measured, in one friendly sentence. `guess` None: no guess yet."""
    unit = f" {unit}" if unit else ""
    if guess is None or guess is ...:
        return ("No guess yet. Write a number above and run both cells again:\n"
                "it counts for nothing, and you will look closer.")
    try:
        guess = float(guess)
    except (TypeError, ValueError):
        return f"Your guess is {guess!r}; write it as a number, such as 2.5."
    guessed, found = (f"{x:,.0f}" if 1000 <= abs(x) < 1e15 else f"{x:.3g}" for x in (guess, measured))
    said = f"You guessed {guessed}{unit}; measured: {found}{unit}. "
    if guess <= 0 or measured <= 0:
        return said + ("Spot on." if guess == measured else "Not far off." if abs(guess - measured) < 0.1 else
                       "A surprise, then: read on.")
    ratio = max(guess / measured, measured / guess)
    return said + ("Spot on." if ratio < 1.1 else "Close." if ratio < 1.5 else "The right size." if ratio < 3 else
                   "A surprise, then. That is what guessing is for: read on to see where the difference comes from.")
