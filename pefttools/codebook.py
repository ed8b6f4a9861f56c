"""The sixteen levels of a 4-bit type, derived: NF4, FP4, INT4, Lloyd–Max; and the 256 of the 8-bit dynamic type.

A block of weights is divided by its largest magnitude (absmax), which puts it in [-1, 1]; then each weight is replaced
by the nearest level of a fixed *codebook*, and only the level's number is stored. What is a good codebook?

    levels       -1      -0.5       0       0.5       1        weights of a network are about normally distributed:
    INT4          |--|--|--|--|--|--|--|--|--|--|--|--|--|      equal steps, wasted where few weights are
    FP4           |----|-----|---|-|-|------|-|-|---|-----|     fine near 0, coarse outside: a floating-point number
    NF4           |------|----|---|---|--|--|--|--|--|---|----| each level stands for equally many normal weights
    Lloyd–Max     …computed: the levels with the least squared error there is

NF4 is equation 4 and appendix E of Dettmers et al. 2023, "QLoRA", arXiv:2305.14314: levels at quantiles Φ⁻¹(p) of the
normal distribution, p evenly spaced, seven below zero, zero itself, eight above, divided by the largest. The
outermost p cannot be 1, where the quantile is infinite; the authors take 1 − ½(1/32 + 1/30) = 0.9677083.

A worked number: Φ⁻¹(0.9677083) = 1.84813 becomes 1. The next p above zero's side is 0.9677083 − 0.4677083/8 =
0.9092448, Φ⁻¹ = 1.33612, and 1.33612 / 1.84813 = 0.72296: the fifteenth level of the table in appendix E.

Relative error, √(Σ(w−ŵ)² / Σw²), of normal weights in blocks of 64: NF4 0.092, INT4 0.108, FP4 0.122 (the FP4 of
bitsandbytes; that it is worse than INT4 here and better in the paper's perplexities is no contradiction), and the
least possible 0.087, by `lloyd_max` on such blocks.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

NF4_OFFSET = 0.9677083  # 1 − ½(1/32 + 1/30), to the seven digits that bitsandbytes has
_FLOAT32 = {"dtype": torch.float32, "device": "cpu"}    # whatever torch's defaults are set to
_FLOAT64 = {"dtype": torch.float64, "device": "cpu"}


# ------------------------------------------------------------------------------------------------ four bits

def nf4_codebook(offset: float = NF4_OFFSET) -> Tensor:
    """The 16 levels of NF4, float32 [16], ascending from -1 to 1, level 7 exactly 0. Source: see the module.

    Equal to bitsandbytes' table in every bit. For that the evenly spaced probabilities are rounded to float32 before
    the quantile is taken, as `torch.linspace` did when that table was made; without it, ten levels differ by up to
    1.1e-7. Raises ValueError unless 0.5 < offset < 1.
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset is the largest probability whose quantile becomes level 1, between 0.5 and 1; "
                         f"got {offset!r}. QLoRA's is {NF4_OFFSET}.")
    levels = [_quantile(p) for p in _evenly(offset, 0.5, 9)[:-1]] + [0.0]
    levels += [-_quantile(p) for p in _evenly(offset, 0.5, 8)[:-1]]
    return _scaled(sorted(levels))


def fp4_codebook() -> Tensor:
    """The 16 levels of bitsandbytes' FP4, float32 [16], in the order of their bits: s e e m.

    Sign s; the exponent field counts downwards: e = 1, 2, 3 stands for 2³, 2², 2¹, times (1 + m/2); e = 0 for m·2⁻⁴.
    All is divided by the largest, 12. So 0011 is 8 · 1.5 / 12 = 1, and 0001 is 0.0625 / 12 = 0.0052. Code 8 is
    a second 0, of no sign. Source: `get_4bit_type` in bitsandbytes/functional.py.
    """
    positive = [2.0 ** (4 - e) * (1 + m / 2) if e else m * 2.0**-4 for e in (0, 1, 2, 3) for m in (0, 1)]
    return _scaled(positive + [0.0 - level for level in positive])


def int4_codebook() -> Tensor:
    """The 16 levels of symmetric INT4, float32 [16]: -7/7 … 7/7, with 0 twice (15 different), as in bitsandbytes."""
    return _scaled([float(level) for level in range(-7, 1)] + [float(level) for level in range(8)])


def lloyd_max(samples: Tensor | None = None, weights: Tensor | None = None, levels: int = 16, tol: float = 1e-7,
              max_steps: int = 10_000) -> Tensor:
    """A codebook whose mean squared error no small change lowers: float32 [levels], ascending. For N(0, 1) the least
    there is; for samples with outliers far apart, the iteration may stop at a worse one than the best.

    Lloyd's iteration (1957; Lloyd 1982, doi:10.1109/TIT.1982.1056489; Max 1960): boundaries halfway between levels,
    then each level to the mean of what falls to it, until no level moves by more than `tol` (of the largest).
    Without `samples`, for N(0, 1), where that mean is (φ(a) − φ(b)) / (Φ(b) − Φ(a)) exactly; the levels then go beyond
    ±1, as they are for weights that were not divided by an absmax. With `samples` [n], for those, each counted
    `weights` [n] times: give absmax² of its block to count the error in the weights themselves.
    Raises ValueError where samples are not finite or fewer than the levels, RuntimeError if max_steps do not suffice.
    """
    if samples is None:
        code, mean = torch.linspace(-2, 2, levels, **_FLOAT64), _normal_means
    else:
        code, mean = _sample_means(samples, weights, levels)
    for _ in range(max_steps):
        new = mean(midpoints(code))
        new = torch.where(new.isfinite(), new, code)                      # a level that nothing falls to stays
        moved, code = (new - code).abs().max(), new
        if moved <= tol * code.abs().max():
            return code.float()
    raise RuntimeError(f"lloyd_max: levels still move by {moved:.1e} after max_steps={max_steps}. Raise that or tol.")


def midpoints(code: Tensor) -> Tensor:
    """Halfway between neighbours, [n] ascending → [n-1]: weights above the i-th are nearer to level i + 1."""
    return (code[:-1] + code[1:]) / 2


# ------------------------------------------------------------------------------------------------ eight bits

def dynamic_codebook() -> Tensor:
    """The 256 levels of the signed 8-bit dynamic type, float32 [256] ascending: what double quantization stores with.

    Seven decades, 10⁻⁶ … 10⁰; in the decade 10ⁱ⁻⁶, 2ⁱ steps between 0.1 and 1 of it, each taken at its middle, with
    both signs; and 0 (level 127) and 1. Fine near zero, coarse outside, no -1: the smallest is -0.99297.
    Source: Dettmers 2016, arXiv:1511.04561; `create_dynamic_map` in bitsandbytes/functional.py. Equal in every bit.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        middles = midpoints(torch.linspace(0.1, 1, 2**i + 1, **_FLOAT32))
        for sign in (1, -1):
            levels += (sign * 10 ** (i - 6) * middles).tolist()
    return torch.tensor(sorted(levels), **_FLOAT32)


# ------------------------------------------------------------------------------------------------ helpers

def _quantile(p: float) -> float:
    """Φ⁻¹(p) rounded to float32."""
    return _float32(NormalDist().inv_cdf(p))


def _float32(x: float) -> float:
    return torch.tensor(x, **_FLOAT32).item()


def _evenly(start: float, end: float, steps: int) -> list[float]:
    """Evenly spaced from start to end, every operation rounded to float32 and from both ends inwards: torch.linspace,
    written out because its last digit may depend on the processor."""
    start, end = _float32(start), _float32(end)
    step = _float32((end - start) / (steps - 1))
    up = [_float32(start + _float32(step * i)) for i in range(steps // 2)]
    return up + [_float32(end - _float32(step * i)) for i in reversed(range(steps - steps // 2))]


def _scaled(levels: list[float]) -> Tensor:
    code = torch.tensor(levels, **_FLOAT32)
    return code / code.max()


def _normal_means(bounds: Tensor) -> Tensor:
    """The mean of N(0, 1) in each of the cells that `bounds` cut the line into."""
    edges = torch.cat([bounds.new_tensor([-math.inf]), bounds, bounds.new_tensor([math.inf])])
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(edges)
    return (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])


def _sample_means(samples: Tensor, weights: Tensor | None, levels: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Where to start, and the function boundaries → means; sorted once, then each cell is a difference of two sums."""
    x = samples.detach().reshape(-1).double().cpu()
    if len(x) < levels or not x.isfinite().all():
        raise ValueError(f"samples must be at least {levels} finite numbers; got {len(x)}, of which "
                         f"{len(x) - int(x.isfinite().sum())} are not finite.")
    x, order = x.sort()
    w = torch.ones_like(x) if weights is None else weights.detach().reshape(-1).double().cpu()[order]
    zero = x.new_zeros(1)
    mass, moment = torch.cat([zero, w.cumsum(0)]), torch.cat([zero, (w * x).cumsum(0)])

    def means(bounds: Tensor) -> Tensor:
        cuts = torch.cat([bounds.new_zeros(1, dtype=torch.long), torch.searchsorted(x, bounds),
                          bounds.new_full((1,), len(x), dtype=torch.long)])
        return moment[cuts].diff() / mass[cuts].diff()

    return torch.linspace(x[0].item(), x[-1].item(), levels, **_FLOAT64), means


NF4_CODE = nf4_codebook()
FP4_CODE = fp4_codebook()
