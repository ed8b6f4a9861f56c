"""Pictures of chapter 03: masked tokens and targets, padding, accumulation, memory, before and after.

Each function that draws is pure: data in, a Matplotlib figure out. `mask_viewer` and `generation_viewer` put a chooser
in front of two of them. Prompt, target and padding look the same all through the chapter, and are told apart without
colour too:

    prompt   grey, hatched      (read, not a target)
    target   orange, plain      (the loss is taken here; end-of-text has a thick border)
    padding  white, dashed      (there only to fill a rectangle)
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

INK, GREY, ORANGE, BLUE, GREEN, VERMILION = "#222222", "#D9D9D9", "#E69F00", "#0072B2", "#009E73", "#D55E00"
LOOK = {  # kind → face colour, hatch, line style, line width
    "prompt": (GREY, "////", "-", 0.7),
    "target": ("#F7D08A", None, "-", 0.9),
    "end": (ORANGE, None, "-", 2.4),
    "padding": ("white", None, (0, (2, 2)), 0.8),
    "pad target": ("#F4B9A0", "xxxx", (0, (2, 2)), 0.8),
}
SAYS = {"prompt": "prompt: label −100", "target": "target: label = id", "end": "end-of-text: a target too",
        "padding": "padding: label −100", "pad target": "padding taken as a target"}
IGNORE = -100


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _box(ax, x, y, w, h, kind, text="", size=9.0, bold=False):
    from matplotlib.patches import Rectangle

    face, hatch, style, line = LOOK[kind]
    edge = "#9A9A9A" if kind == "prompt" else INK
    ax.add_patch(Rectangle((x, y), w, h, fc=face, ec=edge, hatch=hatch, ls=style, lw=line))
    if text:
        back = {"fc": face, "ec": "none", "pad": 0.6} if hatch else None
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, family="monospace", color=INK,
                fontweight="bold" if bold else "normal", bbox=back)


def _legend(ax, kinds, **where):
    from matplotlib.patches import Patch

    handles = [Patch(fc=LOOK[k][0], hatch=LOOK[k][1], ls=LOOK[k][2], lw=LOOK[k][3], ec=INK, label=SAYS[k])
               for k in kinds]
    ax.legend(handles=handles, frameon=False, fontsize=9, ncols=len(kinds), handlelength=2.2, handleheight=1.3,
              **({"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2} | where))


# --- tokens -----------------------------------------------------------------------------------------------------------

def pieces_of(ids: Sequence[int], tokenizer) -> list[str]:
    """The text of each token, with a dot for a space and an arrow for a line end, so that they can be seen."""
    seen = {"Ġ": "·", "Ċ": "↵", "ĉ": "→"}
    return ["".join(seen.get(c, c) for c in token) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def kinds_of(ids: Sequence[int], labels: Sequence[int], attention_mask: Sequence[int], eos_id: int) -> list[str]:
    """What each place is: "prompt", "target", "end" (a target that is end-of-text), "padding" or "pad target"."""
    def kind(token, label, real):
        if not real:
            return "padding" if label == IGNORE else "pad target"
        if label == IGNORE:
            return "prompt"
        return "end" if token == eos_id else "target"

    return [kind(*place) for place in zip(ids, labels, attention_mask)]


def two_rows(pieces: Sequence[str], ids: Sequence[int], labels: Sequence[int], kinds: Sequence[str]):
    """A short row, three lines under one another: the text of each token, its id, its label."""
    width = [max(len(p), len(str(i)), 4) + 1.2 for p, i in zip(pieces, ids)]
    left = [sum(width[:i]) for i in range(len(width))]
    fig = _figure(10.5, 2.3)
    ax = fig.add_subplot()
    ax.set(xlim=(-8.5, sum(width) + 0.5), ylim=(-0.35, 3.1))
    ax.axis("off")
    size = min(9.0, 720 / (sum(width) + 9) / 0.66)
    for y, name in ((2.0, "token"), (1.0, "input_ids"), (0.0, "labels")):
        ax.text(-0.6, y + 0.4, name, ha="right", va="center", fontsize=9, family="monospace")
    for x, w, p, i, label, kind in zip(left, width, pieces, ids, labels, kinds):
        for y, text in ((2.0, p), (1.0, str(i)), (0.0, str(label))):
            _box(ax, x, y, w - 0.15, 0.8, kind, text, size, bold=kind == "end")
    _legend(ax, [k for k in LOOK if k in kinds])
    return fig


def token_flow(pieces: Sequence[str], kinds: Sequence[str], title: str = "", columns: int = 112):
    """A row of any length as boxes that wrap like text. A long run of padding is drawn as one box with its length."""
    boxes: list[tuple[str, str]] = []
    i = 0
    while i < len(pieces):
        run = 1
        while i + run < len(pieces) and kinds[i + run] == kinds[i] and kinds[i] in ("padding", "pad target"):
            run += 1
        text = f"{pieces[i]} × {run}" if run > 3 else pieces[i]
        boxes.append((text, kinds[i]))
        i += run if run > 3 else 1
    lines: list[list[tuple[float, float, str, str]]] = [[]]
    x = 0.0
    for text, kind in boxes:
        w = len(text) + 0.9
        if x + w > columns:
            lines.append([])
            x = 0.0
        lines[-1].append((x, w, text, kind))
        x += w + 0.25
    fig = _figure(10.5, 0.62 + 0.31 * len(lines))
    ax = fig.add_subplot()
    ax.set(xlim=(-0.5, columns + 0.5), ylim=(-1.1 * (len(lines) - 1) - 0.2, 1.0))
    ax.axis("off")
    for n, line in enumerate(lines):
        for x, w, text, kind in line:
            _box(ax, x, -1.1 * n, w, 0.85, kind, text, 8.4, bold=kind == "end")
    _legend(ax, [k for k in LOOK if k in kinds])
    if title:
        ax.set_title(title, fontsize=10, loc="left", pad=24)
    return fig


def row_figure(encoded: Mapping, tokenizer, pad_to: int = 0, title: str = ""):
    """`token_flow` of one encoded row (`input_ids`, `labels`), padded with label −100 to `pad_to` tokens."""
    ids, labels = list(encoded["input_ids"]), list(encoded["labels"])
    padding = max(0, pad_to - len(ids))
    mask = [1] * len(ids) + [0] * padding
    ids, labels = ids + [tokenizer.pad_token_id] * padding, labels + [IGNORE] * padding
    kinds = kinds_of(ids, labels, mask, tokenizer.eos_token_id)
    return token_flow(pieces_of(ids, tokenizer), kinds, title)


def row_alt(encoded: Mapping, tokenizer, pad_to: int = 0) -> str:
    """The same in words, for those who do not see the figure."""
    n, masked = len(encoded["input_ids"]), sum(label == IGNORE for label in encoded["labels"])
    padding = max(0, pad_to - n)
    return (f"A row of {n + padding} tokens in boxes: {masked} of the prompt, grey and hatched, with label −100; "
            f"{n - masked} of the answer, orange, as targets, the last of them end-of-text with a thick border; "
            f"{padding} of padding, dashed.")


# --- the seven steps, padding, accumulation, memory -------------------------------------------------------------------

def seven_steps(steps: Sequence[tuple[str, str]]):
    """The steps of a fine-tune as a chain of boxes: (name, what it makes)."""
    fig = _figure(10.5, 1.55)
    ax = fig.add_subplot()
    ax.set(xlim=(-0.05, 1.5 * len(steps) - 0.15), ylim=(-0.5, 1.0))
    ax.axis("off")
    for i, (name, makes) in enumerate(steps):
        x = 1.5 * i
        _box(ax, x, 0.1, 1.2, 0.8, "target" if name.startswith("5") or name.startswith("6") else "padding")
        ax.text(x + 0.6, 0.5, name.replace(" ", "\n", 1), ha="center", va="center", fontsize=9.5,
                fontweight="bold", color=INK)
        ax.text(x + 0.6, -0.05, makes, ha="center", va="top", fontsize=8.2, color=INK)
        if i:
            ax.annotate("", (x - 0.02, 0.5), (x - 0.28, 0.5), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.2})
    return fig


def padding_bars(lengths: Sequence[tuple[int, int]], fixed: int, batch_size: int):
    """Rows as bars: on the left padded to `fixed` tokens, on the right to the longest of a batch.

    lengths: (prompt tokens, answer tokens) of each row.
    """
    fig = _figure(10.5, 3.4)
    left, right = fig.subplots(1, 2, sharey=True)
    for ax, to in ((left, lambda batch: fixed), (right, lambda batch: max(p + a for p, a in batch))):
        for start in range(0, len(lengths), batch_size):
            batch = lengths[start:start + batch_size]
            for i, (p, a) in enumerate(batch):
                y = start + i + 0.6 * (start // batch_size)
                for x, w, kind in ((0, p, "prompt"), (p, a, "target"), (p + a, to(batch) - p - a, "padding")):
                    if w:
                        _box(ax, x, y, w, 0.85, kind)
        ax.set(xlim=(0, fixed), ylim=(len(lengths) + 0.6 * len(lengths) / batch_size, -0.3), xlabel="tokens", yticks=[])
        ax.spines[["top", "right", "left"]].set_visible(False)
    left.set_title(f"padded to {fixed}", fontsize=10)
    right.set_title(f"padded to the longest of its batch of {batch_size}", fontsize=10)
    fig.legend(*_handles(("prompt", "target", "padding")), loc="outside upper center", ncols=3, frameon=False,
               fontsize=9)
    return fig


def _handles(kinds):
    from matplotlib.patches import Patch

    names = {"prompt": "prompt", "target": "answer", "padding": "padding"}
    return ([Patch(fc=LOOK[k][0], hatch=LOOK[k][1], ls=LOOK[k][2], lw=LOOK[k][3], ec=INK) for k in kinds],
            [names.get(k, SAYS[k]) for k in kinds])


def token_weights(counts: Sequence[int]):
    """How much one token weighs in the loss of a step, two ways: a bar per micro-batch, as wide as its tokens."""
    total = sum(counts)
    fig = _figure(10.5, 2.5)
    for ax, title, weights in zip(fig.subplots(1, 2, sharey=True),
                                  ("mean of the micro-batches' means", "sum over tokens ÷ all tokens"),
                                  ([1 / (len(counts) * n) for n in counts], [1 / total] * len(counts))):
        x = 0
        for i, (n, w) in enumerate(zip(counts, weights)):
            ax.bar(x, 100 * w, width=n, align="edge", color=(ORANGE, BLUE, GREEN, GREY)[i % 4],
                   hatch=("", "///", "...", "xx")[i % 4], ec="white", lw=1)
            last = i == len(counts) - 1 and i > 0
            ax.text(x + n if last else x, 100 * w + 0.02 * 160 / min(counts) / len(counts),
                    f"micro-batch {i + 1}\n{n} targets, {100 * w:.2f} % each", ha="right" if last else "left",
                    va="bottom", fontsize=8.5)
            x += n
        ax.set_title(title, fontsize=10)
        ax.set(xlabel="target token of the step", ylim=(0, 160 / min(counts) / len(counts)))
        ax.spines[["top", "right"]].set_visible(False)
        ax.yaxis.set_major_formatter("{x:.0f} %")
    return fig


def memory_bars(named: Mapping[str, Mapping[str, float]], unit: str = "MiB"):
    """Stacked bars: {bar: {part: size}}. Parts are told apart by hatch and by a legend."""
    fig = _figure(8.5, 0.9 + 0.55 * len(named))
    ax = fig.add_subplot()
    parts = list(dict.fromkeys(part for sizes in named.values() for part in sizes))
    looks = {part: ((BLUE, ""), (ORANGE, "///"), (GREEN, "..."), (GREY, "xx"))[i % 4] for i, part in enumerate(parts)}
    for y, sizes in enumerate(named.values()):
        x = 0.0
        for part, size in sizes.items():
            ax.barh(y, size, left=x, height=0.62, color=looks[part][0], hatch=looks[part][1], ec="white",
                    label=part if part not in ax.get_legend_handles_labels()[1] else None)
            x += size
        ax.text(x, y, f"  {x:.1f} {unit}", va="center", fontsize=9)
    ax.set(yticks=range(len(named)), yticklabels=list(named), xlabel=unit,
           xlim=(0, 1.2 * max(sum(s.values()) for s in named.values())))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    if len(parts) > 1:
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    return fig


# --- results ----------------------------------------------------------------------------------------------------------

def loss_pair(ours: Sequence[float], theirs: Sequence[float], names=("our loop", "peft + Trainer")):
    """Two loss curves over one another, and beneath them how far apart they are, on a logarithmic scale."""
    fig = _figure(8.5, 3.8)
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    steps = range(1, len(ours) + 1)
    top.plot(steps, ours, color=ORANGE, lw=4, label=names[0])
    top.plot(steps, theirs, color=BLUE, lw=1.4, ls="--", label=names[1])
    top.set(ylabel="loss", ylim=(0, None))
    top.legend(frameon=False)
    gap = [max(abs(a - b), 1e-8) for a, b in zip(ours, theirs)]      # zero has no place on a logarithmic axis
    bottom.semilogy(steps, gap, color=INK, lw=1, marker=".", ms=4)
    bottom.set(xlabel="optimizer step", ylabel="|difference|", ylim=(5e-9, 1))
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def before_after_bars(scores: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]):
    """pass@1 by group, before and after: {group: ((passed, rows) before, (passed, rows) after)}."""
    fig = _figure(8.5, 1.1 + 0.32 * len(scores))
    ax = fig.add_subplot()
    for y, (group, (before, after)) in enumerate(scores.items()):
        a, b = (100 * p / max(1, n) for p, n in (before, after))
        ax.plot((a, b), (y, y), color="0.6", lw=1.4, zorder=1)
        ax.scatter(a, y, s=130, marker="o", fc="white", ec=INK, lw=1.4, zorder=2, label="before" if not y else None)
        ax.scatter(b, y, s=60, marker="D", color=BLUE, zorder=3, label="after" if not y else None)
        ax.text(104, y, f"{after[0]} of {after[1]}", va="center", fontsize=8.5)
    ax.set(yticks=range(len(scores)), yticklabels=list(scores), xlim=(-4, 118), xticks=range(0, 101, 20),
           xlabel="pass@1, %")
    ax.invert_yaxis()
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0))
    return fig


def error_bars(counts: Mapping[str, Mapping[str, int]]):
    """How answers end, as shares: {which rows: {outcome: count}}. Outcomes keep their order, hatch and colour."""
    outcomes = list(dict.fromkeys(o for c in counts.values() for o in c))
    looks = [(BLUE, ""), (ORANGE, "///"), ("#CC79A7", "..."), ("#56B4E9", "xx"), (GREY, "\\\\"), (VERMILION, "++")]
    fig = _figure(9.5, 1.5 + 0.5 * len(counts))
    ax = fig.add_subplot()
    for y, c in enumerate(counts.values()):
        x, n = 0.0, max(1, sum(c.values()))
        for i, o in enumerate(outcomes):
            w = 100 * c.get(o, 0) / n
            colour, hatch = looks[i % len(looks)]
            ax.barh(y, w, left=x, height=0.66, color=colour, hatch=hatch, ec="white", label=o if not y else None)
            if w > 5:
                ax.text(x + w / 2, y, f"{w:.0f}", ha="center", va="center", fontsize=9, color=INK,
                        bbox={"fc": "white", "ec": "none", "pad": 1.2})
            x += w
    ax.set(yticks=range(len(counts)), yticklabels=list(counts), xlim=(0, 100), xlabel="% of the answers")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8.5, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
    return fig


def _wrapped(text: str, columns: int, most: int) -> str:
    lines = [part for line in text.rstrip().split("\n")
             for part in (textwrap.wrap(line, columns, drop_whitespace=False, replace_whitespace=False) or [""])]
    return "\n".join(lines[:most] + (["…"] if len(lines) > most else []))


def generation_figure(prompt: str, before: Mapping, after: Mapping):
    """One prompt and two answers side by side. before, after: rows of a `Report` (`answer`, `passed`, `error`)."""
    answers = [_wrapped(row["answer"], 52, 17) for row in (before, after)]
    lines = max(a.count("\n") for a in answers) + 1
    fig = _figure(10.5, 1.3 + 0.155 * max(lines, 5))
    head = fig.suptitle(_wrapped(prompt, 100, 4), fontsize=9.5, family="monospace", ha="left", x=0.02, parse_math=False)
    head.set_bbox({"fc": "#F2F2F2", "ec": "none", "pad": 4})
    for ax, name, row, answer in zip(fig.subplots(1, 2), ("base model", "with LoRA"), (before, after), answers):
        ok = row["passed"]
        colour = "#00664B" if ok else "#A84300"
        ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
        ax.text(0.02, 0.96, answer, va="top", ha="left", fontsize=8.4, family="monospace", color=INK, parse_math=False)
        error = textwrap.shorten(row["error"] or "no answer", 48, placeholder=" …")
        verdict = "✓ passes all its tests" if ok else f"✗ {error}"
        ax.set_title(f"{name}: {verdict}", fontsize=9.5, loc="left", fontweight="bold", color=colour, parse_math=False)
        for spine in ax.spines.values():
            spine.set(color=colour, linewidth=2.2 if ok else 1.2, linestyle="-" if ok else "--")
    return fig


def generation_alt(prompt: str, before: Mapping, after: Mapping) -> str:
    """The same in words."""
    def said(row):
        return "passes all its tests" if row["passed"] else f"fails ({row['error'] or 'no answer'})"

    return (f"Prompt: {prompt!r}. The base model's answer {said(before)}. "
            f"The answer with LoRA {said(after)}: {after['answer']!r}")


# --- choosers ---------------------------------------------------------------------------------------------------------

RIGHT, SLIDE = "masked by position", "pad = eos, labels copied (slide 000)"


def mask_viewer(rows: Sequence[Mapping], tokenizer):
    """Choose a row, a length to pad to and a way to make the labels; see each token as prompt, target or padding.

    rows: rows of the data set. Returns the `SliderFigure`; its `.frame(row=…)` needs no front end.
    """
    from pefttools.lab.text import encode
    from pefttools.widgets.base import slider_figure

    named = {f"{i + 1}. {row['instruction'][:80]}": row for i, row in enumerate(rows)}

    def parts(row, pad_to, labels):
        one = dict(encode(named[row], tokenizer))
        n = len(one["input_ids"])
        padding = max(0, pad_to - n)
        pad = tokenizer.pad_token_id if labels == RIGHT else tokenizer.eos_token_id
        ids = one["input_ids"] + [pad] * padding
        target = one["labels"] + [IGNORE] * padding if labels == RIGHT else list(ids)
        return ids, kinds_of(ids, target, [1] * n + [0] * padding, tokenizer.eos_token_id)

    def count(kinds):
        targets = sum(k in ("target", "end", "pad target") for k in kinds)
        on_padding = sum(k == "pad target" for k in kinds)
        return targets, on_padding, f"{len(kinds)} tokens, {targets} of them targets, {on_padding} of these padding"

    def draw(row, pad_to, labels):
        ids, kinds = parts(row, pad_to, labels)
        return token_flow(pieces_of(ids, tokenizer), kinds, count(kinds)[2])

    def alt(row, pad_to, labels):
        return f"{row}: {count(parts(row, pad_to, labels)[1])[2]}. Labels: {labels}."

    return slider_figure(draw, alt, "Which tokens are targets?", row=list(named), pad_to=[128, 0, 256, 512],
                         labels=[RIGHT, SLIDE])


def generation_viewer(before: Sequence[Mapping], after: Sequence[Mapping]):
    """Choose a prompt; see what the base model and the fine-tuned one write, and whether their tests pass.

    before, after: the `rows` of two Reports over the same data. Returns the `SliderFigure`.
    """
    from pefttools.widgets.base import slider_figure

    if [r["instruction"] for r in before] != [r["instruction"] for r in after]:
        raise ValueError("before and after are not about the same prompts, in the same order: "
                         "evaluate both on the same rows")
    pairs = {f"{'✓' if b['passed'] else '✗'} {b['kind']}: {b['instruction'][:70]} ({i + 1})": (a, b)
             for i, (a, b) in enumerate(zip(before, after))}

    def text_of(row):
        return row["instruction"] + ("\n" + row["input"] if row["input"] else "")

    return slider_figure(lambda prompt: generation_figure(text_of(pairs[prompt][0]), *pairs[prompt]),
                         lambda prompt: generation_alt(text_of(pairs[prompt][0]), *pairs[prompt]),
                         "Before and after", prompt=list(pairs))
