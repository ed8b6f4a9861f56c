"""Pictures of chapter 01: elimination step by step, the SVD of a picture and of a weight, spectra, intrinsic dimension.

Each function that draws is pure: numbers in, a Matplotlib figure out. What is kept or moved is orange or blue and
drawn with a thick line; what is left out is grey and hatched or dashed, so that the pictures read without colour too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

KEPT, LEFT, INK = "#E69F00", "#D9D9D9", "#222222"  # Okabe and Ito's orange; grey; near black
BLUE, VERMILION, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
MARKERS, LINES = "osD^v", ("-", "--", "-.", ":")


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _clean(*axes) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------ the picture

def product_picture(m: int = 6, n: int = 8, k: int = 2):
    """An m×n matrix of rank k beside the product of an m×k and a k×n one, drawn to scale, one square per number."""
    from matplotlib.patches import Rectangle

    fig = _figure(9.2, 3.3)
    ax = fig.add_subplot()
    ax.set_aspect("equal")
    ax.axis("off")

    def grid(x, y, columns, rows, name, size, few):
        ax.add_patch(Rectangle((x, y), columns, rows, fc=KEPT if few else LEFT, ec=INK, lw=1.4,
                               hatch=None if few else "////"))
        for i in range(1, columns):
            ax.plot([x + i] * 2, [y, y + rows], color="white", lw=0.8)
        for i in range(1, rows):
            ax.plot([x, x + columns], [y + i] * 2, color="white", lw=0.8)
        ax.text(x + columns / 2, y + rows / 2, name, ha="center", va="center", fontsize=17, color=INK,
                bbox={"fc": KEPT if few else LEFT, "ec": "none", "pad": 1.5})
        ax.text(x + columns / 2, y + rows + 0.35, size, ha="center", va="bottom", fontsize=10, color=INK)

    grid(0, 0, n, m, "$W$", f"$m \\times n$ = {m} × {n}", False)
    ax.text(n / 2, -0.4, f"{m * n} numbers", ha="center", va="top", fontsize=10)
    ax.text(n + 1.3, m / 2, "=", ha="center", va="center", fontsize=22)
    left = n + 2.6
    grid(left, 0, k, m, "$B$", f"$m \\times k$ = {m} × {k}", True)
    middle = left + k + 1.6
    grid(middle, (m - k) / 2, n, k, "$A$", f"$k \\times n$ = {k} × {n}", True)
    ax.text(left + k / 2, -0.4, f"{m * k}", ha="center", va="top", fontsize=10)
    ax.text(left + k + 0.8, -0.4, "+", ha="center", va="top", fontsize=10)
    ax.text(middle + n / 2, -0.4, f"{k * n} = {k} × ({m} + {n}) = {k * (m + n)} numbers", ha="center", va="top", fontsize=10)
    ax.set(xlim=(-0.5, middle + n + 0.5), ylim=(-1.4, m + 1.4))
    return fig


def plane_picture(seed: int = 0):
    """Points that a 3×3 matrix of rank 2 makes of a cloud: all of them in one plane. Beside it, rank 3 and rank 1."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 3, generator=rng)
    full = torch.tensor([[1.0, 0.3, -0.2], [0.1, 0.9, 0.4], [-0.3, 0.2, 1.1]])
    # the second has its third row equal to the first two added up; the third repeats one row
    matrices = {3: full, 2: torch.stack([full[0], full[1], full[0] + full[1]]),
                1: torch.stack([full[0], 0.5 * full[0], -full[0]])}
    fig = _figure(9.6, 3.4)
    for number, (rank, W) in enumerate(matrices.items(), 1):
        ax = fig.add_subplot(1, 3, number, projection="3d")
        y = x @ W.T
        if rank == 2:                                  # the plane itself, since a flat cloud does not look flat from everywhere
            edge = torch.tensor([[-2.2, 2.2], [-2.2, 2.2]])
            ax.plot_surface(edge.numpy(), edge.T.numpy(), (edge + edge.T).numpy(), color=KEPT, alpha=0.25, edgecolor=INK, lw=0.8)
        if rank == 1:
            end = 4 * matrices[1][:, 0]
            ax.plot(*torch.stack([-end, end], 1).tolist(), color=KEPT, lw=4, alpha=0.5, zorder=0)
        ax.scatter(*y.T.tolist(), s=6, color=BLUE, depthshade=False, alpha=0.6)
        ax.view_init(elev=16, azim=-58)
        kind = {3: "the whole space", 2: "a plane", 1: "a line"}[rank]
        ax.set(xlim=(-4, 4), ylim=(-4, 4), zlim=(-4, 4), xticks=[], yticks=[], zticks=[])
        ax.set_title(f"rank {rank}: {kind}", fontsize=11)
    return fig


# ------------------------------------------------------------------------------------------------ elimination

MATRICES = {  # what the stepper offers
    "the slides' 3 × 3": [[1, 2, 3], [2, 4, 6], [1, 1, 1]],
    "fractions": [[2, 1, 3], [3, 2, 1], [1, 1, 1]],
    "rows change places": [[0, 2, 1, 4], [1, 1, 1, 1], [2, 4, 3, 6], [1, 3, 2, 5]],
    "wide, rank 2": [[1, 2, 0, 3, 1], [2, 4, 1, 7, 5], [3, 6, 1, 10, 6]],
}


def _cells(row: Sequence[Any]) -> list[str]:
    return [str(x).replace("-", "−") for x in row]


def _touched(operation: str) -> tuple[set[int], set[int]]:
    """(rows that changed, rows that were used) of an operation such as "R2 ← R2 − 3·R1", counted from 0."""
    import re

    rows = [int(found) - 1 for found in re.findall(r"R(\d+)", operation)]
    if "↔" in operation:
        return set(rows), set()
    return (set(rows[:1]), set(rows[2:])) if rows else (set(), set())


def _draw_matrix(ax, matrix, changed=frozenset(), used=frozenset(), pivots=(), title=""):
    from matplotlib.patches import Rectangle

    m, n = len(matrix), len(matrix[0])
    for i, row in enumerate(matrix):
        if i in changed or i in used:
            ax.add_patch(Rectangle((-0.5, i - 0.42), n, 0.84, fc=KEPT if i in changed else "none", ec=KEPT if i in changed
                                   else BLUE, alpha=0.35 if i in changed else 1, lw=1.8, ls="-" if i in changed else "--"))
        for j, cell in enumerate(_cells(row)):
            pivot = (i, j) in pivots
            ax.text(j, i, cell, ha="center", va="center", fontsize=13 if len(cell) < 5 else 10, color=INK,
                    fontweight="bold" if pivot else "normal",
                    bbox={"boxstyle": "circle,pad=0.25", "fc": "none", "ec": VERMILION, "lw": 1.6} if pivot else None)
        ax.text(-0.95, i, f"R{i + 1}", ha="right", va="center", fontsize=9, color="0.4")
    for x, side in ((-0.7, 1), (n - 0.3, -1)):
        ax.plot([x + 0.15 * side, x, x, x + 0.15 * side], [-0.5, -0.5, m - 0.5, m - 0.5], color=INK, lw=1.3)
    ax.set(xlim=(-1.7, n + 0.1), ylim=(m - 0.35, -0.75), aspect="equal")
    ax.set_title(title, fontsize=11)
    ax.axis("off")


def elimination_figure(A: Sequence[Sequence[Any]], step: int = 1, reduced: bool = True):
    """One row operation: the matrix before, the operation, the matrix after. Step 0 is A alone.

    A row that changes is filled, a row that is used has a dashed frame, the pivots found so far are ringed.
    """
    from pefttools.elimination import row_echelon

    found = row_echelon(A, reduced=reduced)
    steps = found.steps
    step = max(0, min(step, len(steps) - 1))
    now = steps[step]
    fig = _figure(8.2, 0.9 + 0.62 * len(A))
    left, middle, right = fig.subplots(1, 3, width_ratios=(1, 0.55, 1))
    changed, used = _touched(now.operation) if step else (set(), set())
    before = steps[max(0, step - 1)].matrix
    _draw_matrix(left, before, set(), changed | used, title="before" if step else "the matrix")
    middle.axis("off")
    text = now.operation if step else "(nothing done yet)"
    middle.text(0.5, 0.6, text, ha="center", va="center", fontsize=14 if len(text) < 20 else 9, wrap=True)
    if step:
        middle.annotate("", (0.95, 0.42), (0.05, 0.42), xycoords="axes fraction", arrowprops={"arrowstyle": "-|>", "lw": 1.6})
    last = step == len(steps) - 1
    middle.text(0.5, 0.12, f"step {step} of {len(steps) - 1}" + (f"\nrank {found.rank}" if last else ""), ha="center",
                va="center", fontsize=11 if last else 9, color=VERMILION if last else "0.4")
    pivots = {(i, column) for i, column in enumerate(found.pivots)} if last else set()
    if step:
        _draw_matrix(right, now.matrix, changed, used, pivots, "after")
    else:
        right.axis("off")
    return fig


def elimination_alt(A: Sequence[Sequence[Any]], step: int = 1, reduced: bool = True) -> str:
    """What `elimination_figure` shows, in words."""
    from pefttools.elimination import row_echelon

    found = row_echelon(A, reduced=reduced)
    step = max(0, min(step, len(found.steps) - 1))
    rows = "; ".join(", ".join(_cells(row)) for row in found.steps[step].matrix)
    if not step:
        return f"The matrix with the rows {rows}. Nothing is done yet; {len(found.steps) - 1} steps follow."
    end = f" This is the last step: {found.rank} rows are not zero, the rank is {found.rank}." if (
        step == len(found.steps) - 1) else ""
    return f"Step {step} of {len(found.steps) - 1}, {found.steps[step].operation}. The rows are now {rows}.{end}"


def elimination_stepper(matrices: Mapping[str, Sequence[Sequence[Any]]] = MATRICES):
    """A drop-down of matrices and a slider over the steps; where no front end answers, the first operation."""
    from pefttools.elimination import row_echelon
    from pefttools.widgets.base import Slider, slider_figure

    most = max(len(row_echelon(A, reduced=True).steps) for A in matrices.values()) - 1

    def draw(matrix: str, step: int):
        return elimination_figure(matrices[matrix], step)

    return slider_figure(draw, alt=lambda matrix, step: elimination_alt(matrices[matrix], step),
                         title="Elimination, one row operation at a time", matrix=list(matrices),
                         step=Slider(1, 0, most, label="step"))


# ------------------------------------------------------------------------------------------------ the SVD as a picture

def sample_image(height: int = 96, width: int = 128):
    """A grey picture [height, width] in 0…1, made of formulas: a sky, a round sun, hills, a house, a fence."""
    import torch

    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, width / height, width), indexing="ij")
    image = 0.55 + 0.35 * (1 - y)                                                   # a sky: rank 1 and a constant
    image = torch.where((x - 1.05).square() + (y - 0.22).square() < 0.014, torch.tensor(1.0), image)
    hill = 0.62 + 0.10 * torch.sin(5 * x) + 0.04 * torch.sin(13 * x + 1)
    image = torch.where(y > hill, 0.45 - 0.15 * (y - hill), image)
    image = torch.where((x > 0.25) & (x < 0.6) & (y > 0.5) & (y < 0.82), torch.tensor(0.82), image)
    roof = (y < 0.5) & (y > 0.3) & ((x - 0.425).abs() < (y - 0.3) * 1.1)
    image = torch.where(roof, torch.tensor(0.2), image)
    image = torch.where((x > 0.38) & (x < 0.46) & (y > 0.62) & (y < 0.82), torch.tensor(0.15), image)
    image = torch.where((y > 0.86) & (y < 0.97) & ((x * 12) % 1 < 0.4), torch.tensor(0.95), image)
    return image


def strip_figure(W, ks: Sequence[int] = (1, 3, 8, 20)):
    """A picture at several ranks, side by side, each with the numbers it takes and the error."""
    import torch

    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    m, n = W.shape
    fig = _figure(2.3 * (len(ks) + 1), 2.6)
    axes = fig.subplots(1, len(ks) + 1)
    for ax, k in zip(axes, [*ks, None]):
        shown = W if k is None else (U[:, :k] * S[:k]) @ Vh[:k]
        ax.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
        error = 0.0 if k is None else (S[k:].norm() / S.norm()).item()
        ax.set_title(f"all of it\n{m * n:,} numbers" if k is None else f"k = {k}, error {error:.0%}\n{k * (m + n):,} numbers",
                     fontsize=9)
        ax.set(xticks=[], yticks=[])
    return fig


def svd_figure(W, k: int = 8, name: str = "W", image: bool = False):
    """A matrix, its nearest one of rank k, and its singular values with the kept ones marked."""
    import torch

    W = W.detach().float()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    k = min(k, len(S))
    near = (U[:, :k] * S[:k]) @ Vh[:k]
    error = (S[k:].norm() / S.norm()).item()
    m, n = W.shape
    fig = _figure(10.4, 3.4)
    left, middle, right = fig.subplots(1, 3, width_ratios=(1, 1, 1.15))
    limit = 2.5 * W.std().item()
    look = {"cmap": "gray", "vmin": 0, "vmax": 1} if image else {"cmap": "PuOr", "vmin": -limit, "vmax": limit}
    for ax, shown, title in ((left, W, f"{name}, {m} × {n}"), (middle, near, f"nearest of rank {k}: error {error:.0%}")):
        ax.imshow(shown.numpy(), aspect="auto" if max(m, n) > 2 * min(m, n) else "equal", interpolation="nearest", **look)
        ax.set(title=title, xticks=[], yticks=[])
    number = range(1, len(S) + 1)
    S = S.clamp(min=1e-4 * S[0].item())
    S = S.tolist()
    right.plot(number, S, color="0.6", lw=1.2)
    right.plot(number[:k], S[:k], "o", color=BLUE, ms=4)
    right.axvspan(k + 0.5, len(S) + 1, fc=LEFT, alpha=0.5, hatch="//", ec="white")
    right.axvline(k + 0.5, color=VERMILION, ls="--", lw=1.2)
    right.set(title=f"kept: {k} × ({m} + {n}) = {k * (m + n):,} of {m * n:,}", xlabel="number of the singular value",
              xlim=(0, len(S) + 1), yscale="log", ylabel="singular value")
    right.title.set_fontsize(10)
    _clean(right)
    return fig


def svd_alt(W, k: int = 8, name: str = "W") -> str:
    """What `svd_figure` shows, in words."""
    import torch

    S = torch.linalg.svdvals(W.detach().float())
    k, (m, n) = min(k, len(S)), W.shape
    error = (S[k:].norm() / S.norm()).item()
    return (f"Three panels: {name} ({m} by {n}), the nearest matrix of rank {k}, which is {error:.0%} away, and the singular "
            f"values with the first {k} of {len(S)} marked as kept. The factors have {k * (m + n):,} numbers, the matrix "
            f"{m * n:,}.")


def svd_explorer(matrices: Mapping[str, Any], images: Sequence[str] = ()):
    """A drop-down of matrices and a slider over k; where no front end answers, the first frame."""
    from pefttools.widgets.base import Slider, slider_figure

    most = max(min(W.shape) for W in matrices.values())

    def draw(matrix: str, k: int):
        return svd_figure(matrices[matrix], k, matrix, matrix in images)

    return slider_figure(draw, alt=lambda matrix, k: svd_alt(matrices[matrix], k, matrix),
                         title="Keep the first k singular values", matrix=list(matrices),
                         k=Slider(8, 1, most, label="k"))


# ------------------------------------------------------------------------------------------------ measurements

def spectra_figure(spectra: Mapping[str, Sequence[float]], tolerances: Mapping[str, float] | None = None,
                   relative: bool = True, ylim: tuple[float, float] = (1e-9, 3)):
    """Singular values of several matrices on a logarithmic axis; with `tolerances`, a line each below which is noise."""
    fig = _figure(7.2, 3.4)
    ax = fig.add_subplot()
    colours = (BLUE, VERMILION, GREEN, PURPLE, INK)
    for i, (name, values) in enumerate(spectra.items()):
        values = [max(float(v) / (float(values[0]) if relative else 1), 1e-30) for v in values]
        ax.plot(range(1, len(values) + 1), values, LINES[i % 4], color=colours[i % 5], marker=MARKERS[i % 5],
                markevery=max(1, len(values) // 12), ms=4.5, lw=1.5, label=name)
        if tolerances and name in tolerances:
            ax.axhline(tolerances[name], color=colours[i % 5], lw=0.9, ls=":")
            ax.text(0.45 * len(values), tolerances[name] * 0.7, f"tolerance for {name}", fontsize=8, ha="center", va="top",
                    color=colours[i % 5])
    ax.set(xlabel="number of the singular value", ylabel="share of the largest" if relative else "singular value",
           yscale="log", ylim=ylim)
    ax.legend(frameon=False, fontsize=9, loc="best")
    _clean(ax)
    return fig


def truncation_figure(kept: Mapping[str, Sequence[tuple[int, float]]], before: float, after: float):
    """Held-out loss against the rank that is kept, for W itself and for ΔW; lines for the two whole models."""
    fig = _figure(7.2, 3.5)
    ax = fig.add_subplot()
    for i, (name, points) in enumerate(kept.items()):
        colour = (VERMILION, BLUE, GREEN)[i % 3]
        ax.plot([k for k, _ in points], [loss for _, loss in points], LINES[i % 4], marker=MARKERS[i % 5], color=colour, lw=1.8,
                ms=6, label=name)
    top = ax.get_ylim()[1]
    for value, name in ((before, "base model"), (after, "fine-tuned model, uncut")):
        ax.axhline(value, color="0.4", lw=1, ls=":")
        ax.text(0.01, value + 0.01 * top, name, fontsize=8, color="0.3", va="bottom", transform=ax.get_yaxis_transform())
    ks = sorted({k for points in kept.values() for k, _ in points})
    ax.set(xscale="log", xlabel="rank kept in every linear layer", ylabel="held-out loss (nats per token)", ylim=(0, None))
    ax.set_xticks(ks, [str(k) for k in ks], fontsize=8)
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=9)
    _clean(ax)
    return fig


def gradient_figure(ranks: Sequence[int], losses: Mapping[str, Sequence[float]], floor: float):
    """Rank of W over the steps of training, and the loss when all of W trains beside when only its rank-10 factors do."""
    fig = _figure(9.2, 3.3)
    left, right = fig.subplots(1, 2)
    left.step(range(len(ranks)), ranks, where="post", color=BLUE, lw=2)
    left.plot(range(len(ranks)), ranks, "o", color=BLUE, ms=4)
    left.annotate(f"start: rank {ranks[0]}", (0, ranks[0]), xytext=(2, -14), textcoords="offset points", fontsize=9)
    left.set(title="rank of W while all of it trains", xlabel="step", ylabel="numerical rank", ylim=(0, max(ranks) * 1.1))
    for i, (name, values) in enumerate(losses.items()):
        right.plot(range(len(values)), values, LINES[i % 4], color=(BLUE, KEPT, GREEN)[i % 3], lw=2, label=name)
    right.axhline(floor, color=VERMILION, lw=1.2, ls=":")
    right.text(right.get_xlim()[1], floor * 1.08, "the least that rank 10 allows", ha="right", va="bottom", fontsize=8,
               color=VERMILION)
    right.set(title="loss", xlabel="step", ylabel="mean squared error", yscale="log")
    right.legend(frameon=False, fontsize=9)
    _clean(left, right)
    return fig


def learned(results: Mapping[str, Any]) -> dict[int, list[float]]:
    """{d: share of the way from `before` to the mean of full fine-tuning, one for each seed}; d = 0 is full itself."""
    by_d: dict[int, list[float]] = {}
    for run in results["runs"]:
        if "name" in run:
            continue
        by_d.setdefault(run["d"], []).append(run["loss"])
    full = sum(by_d[0]) / len(by_d[0])
    return {d: [(results["before"] - loss) / (results["before"] - full) for loss in losses] for d, losses in sorted(by_d.items())}


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of a few seeds; 0 for one."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def intrinsic_figure(shares: Mapping[int, Sequence[float]], d90: int | None, D: int,
                     here: Mapping[int, float] | None = None, points: Sequence[tuple[int, float, str]] = ()):
    """Share of full fine-tuning's gain against d: every seed as a dot, their mean as a line, d₉₀ marked.

    here: the small run of this notebook, {d: share}. points: (trainable parameters, share, name) of other methods.
    """
    fig = _figure(7.6, 3.8)
    ax = fig.add_subplot()
    sizes = [d for d in sorted(shares) if d]
    means = [sum(shares[d]) / len(shares[d]) for d in sizes]
    for d in sizes:
        ax.plot([d] * len(shares[d]), shares[d], "o", color=BLUE, ms=4, alpha=0.45)
    ax.errorbar(sizes, means, [standard_error(shares[d]) for d in sizes], color=BLUE, lw=1.8, capsize=3,
                label=f"run ahead, mean of {max(len(shares[d]) for d in sizes)} seeds")
    if here:
        ax.plot(list(here), list(here.values()), "s--", color=VERMILION, ms=7, lw=1.2, label="this notebook, a short run")
    for size, share, name in points:
        ax.plot(size, share, "D", color=GREEN, ms=8)
        ax.annotate(name, (size, share), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8)
    ax.axhline(0.9, color="0.4", lw=1, ls=":")
    ax.text(sizes[0], 0.915, "90 % of full fine-tuning's gain", fontsize=8, color="0.3")
    if d90:
        ax.axvline(d90, color=KEPT, lw=2, ls="-.")
        ax.text(d90 / 1.08, 0.04, f"$d_{{90}}$ = {d90:,}", fontsize=10, ha="right")
    ax.set(xscale="log", xlabel=f"dimension d of the subspace (the model has D = {D:,} parameters)",
           ylabel="share of the gain", ylim=(0, 1.1))
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.83))
    _clean(ax)
    return fig


def draw_all() -> dict[str, Callable]:
    """The figures that need no measurement, by name: for a look at all of them at once."""
    return {"product": product_picture, "plane": plane_picture,
            "elimination": lambda: elimination_figure(MATRICES["the slides' 3 × 3"], 1),
            "strip": lambda: strip_figure(sample_image()), "svd": lambda: svd_figure(sample_image(), 8, "a picture", True)}
