"""Chapter 04, quantization and NF4: eight exercises and six questions.

Quantization has edges: a value halfway between two levels may go either way, and the last bit of a quotient decides
which. So the cases are drawn until no value lies near such an edge: there every right way to compute gives the same
codes, and only then are codes compared bit by bit. What the edges do in bitsandbytes is in the chapter. Imports torch
and the standard library only; references resolve when they are first used.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pefttools.grading.exercise import Exercise
from pefttools.grading.leaves import randn
from pefttools.grading.question import Question

CHAPTER = "04_nf4"
TITLE = "Quantization and NF4"
HIDES = ("pefttools.nf4", "pefttools.nf4_kernels", "pefttools.nf4_compiled", "pefttools.nf4_linear",
         "pefttools.nf4_state", "pefttools.nf4_tensor", "pefttools.absmax", "pefttools.codebook", "pefttools.blockwise",
         "pefttools.double_quant", "pefttools.qlora", "pefttools.bnb", "bitsandbytes", "peft")

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
SLIDE = [-1.51, -1.14, -0.91, -0.76, -0.59, -0.44, -0.30, -0.18, -0.06, 0.06, 0.18, 0.30, 0.44, 0.59, 0.76, 1.00]


def number(rng: torch.Generator, low: int, high: int) -> int:
    """A whole number, low ≤ number < high."""
    return int(torch.randint(low, high, (), generator=rng))


def whole(value: Any) -> Any:
    """Codes as int64, whichever whole-number dtype they came in; anything else as it is."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value if value.is_floating_point() or value.dtype == torch.bool else value.long()
    return value


def results(value: Any, names: tuple[str, ...], said: str) -> dict[str, Any]:
    """What a function returned as several results, by name; or a complaint in the student's words."""
    if value is ... or (isinstance(value, tuple) and value and all(part is ... for part in value)):
        return dict.fromkeys(names, ...)
    if not isinstance(value, (tuple, list)) or len(value) != len(names):
        came = f"{len(value)} things" if isinstance(value, (tuple, list)) else f"one {type(value).__name__}"
        raise TypeError(f"return {said}, in this order: {len(names)} results; {came} came back")
    return {name: part.detach() if isinstance(part, Tensor) else part for name, part in zip(names, value)}


def clear_of_edges(s: Tensor, levels: Tensor, room: float = 1e-5) -> bool:
    """Whether no value lies within `room` of the middle between two neighbouring levels."""
    middle = (levels[:-1] + levels[1:]) / 2
    return bool((s.reshape(-1, 1).double() - middle.double()).abs().min() > room)


def until(draw: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    """The first draw that is good."""
    while not good(drawn := draw()):
        pass
    return drawn


def nearest(s: Tensor, levels: Tensor) -> Tensor:
    """The number of the nearest of the ascending levels, the lower one of two that are equally near."""
    return torch.bucketize(s, (levels[:-1] + levels[1:]) / 2)


# ================================================================================================ nearest-level

def nearest_inputs(rng: torch.Generator) -> list[dict]:
    def case(n: int, levels: Tensor, wide: float) -> dict:
        values = until(lambda: wide * randn(rng, n), lambda v: clear_of_edges(v, levels))
        return {"values": values, "levels": levels}

    uneven = torch.tensor([-2.0, -0.3, 0.1, 0.15, 1.2])
    drawn = torch.cat([torch.tensor([-0.9]), 0.9 * torch.rand(5, generator=rng) - 0.4, torch.tensor([1.4])]).sort().values
    slide = torch.tensor(SLIDE)
    exact = slide[torch.randint(0, 16, (9,), generator=rng)]                 # each is a level already
    return [case(6, uneven, 1.0), case(40, slide, 1.0), {"values": exact, "levels": slide}, case(1, drawn, 0.5),
            case(30, drawn, 2.0)]


def nearest_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"numbers of the levels": whole(work(case["values"].clone(), case["levels"].clone()))}


def nearest_all_distances(values, levels):
    return (values[:, None] - levels).abs().argmin(1)


def nearest_loop(values, levels):
    return torch.tensor([min(range(len(levels)), key=lambda k: abs(float(levels[k] - v))) for v in values])


def nearest_search(values, levels):
    return torch.searchsorted((levels[1:] + levels[:-1]) / 2, values).to(torch.uint8)


NEAREST_LEVEL = Exercise(
    name="nearest-level", chapter=CHAPTER, title="The nearest level", points=2, minutes=4, difficulty=1,
    inputs=nearest_inputs, probe=nearest_probe, reference=nearest,
    mistakes={
        "the level itself": (lambda v, levels: levels[nearest(v, levels)],
            "These are the values of the nearest levels. Asked for are their numbers: it is the number, 0 to 15, that "
            "fits into four bits."),
        "rounds down": (lambda v, levels: (torch.searchsorted(levels, v, right=True) - 1).clamp(min=0),
            "You take the level below each value, also where the one above is nearer."),
        "rounds up": (lambda v, levels: torch.searchsorted(levels, v).clamp(max=len(levels) - 1),
            "You take the level above each value, also where the one below is nearer. With bucketize or searchsorted: "
            "give it the middles between neighbouring levels, not the levels."),
        "rounds down, past the end": (lambda v, levels: torch.bucketize(v, levels) - 1,
            "bucketize(values, levels) − 1 is the level below each value, and −1 below the lowest. The nearest one may be "
            "above: give bucketize the middles between neighbouring levels."),
        "rounds up, past the end": (lambda v, levels: torch.searchsorted(levels, v),
            "searchsorted(levels, values) is the level above each value, and one number too many beyond the highest. The "
            "nearest one may be below: give it the middles between neighbouring levels."),
        "counts from one": (lambda v, levels: nearest(v, levels) + 1,
            "Every number is one too large: the lowest level has number 0."),
        "farthest": (lambda v, levels: (v[:, None] - levels).abs().argmax(1),
            "This is the level that is farthest away: argmax where argmin belongs."),
        "no absolute value": (lambda v, levels: (v[:, None] - levels).argmin(1),
            "You look for the smallest difference, and the most negative one is the smallest. The distance is the "
            "absolute value of the difference."),
        "other way round": (lambda v, levels: (v[:, None] - levels).abs().argmin(0),
            "There is one number per level here: for each level the nearest value. Asked for is the nearest level of "
            "each value, so argmin goes along the other dimension."),
        "as if evenly spaced": (lambda v, levels: ((v - levels[0]) / (levels[-1] - levels[0]) * (len(levels) - 1)).round()
                                .long().clamp(0, len(levels) - 1),
            "This holds if the levels are equally far apart. They are not: compare with the levels themselves."),
    },
    alternatives={"all distances": nearest_all_distances, "a loop": nearest_loop, "searchsorted": nearest_search},
    accepts="function", hides=HIDES)


# ================================================================================================ absmax-int8

def int8_inputs(rng: torch.Generator) -> list[dict]:
    def case(n: int, block_size: int, wide: float, zero: bool = False, outlier: bool = False) -> dict:
        def draw() -> Tensor:
            w = wide * randn(rng, n)
            if outlier:
                w[number(rng, 0, n)] = 30 * wide
            w = w - 0.3 * wide
            w[block_size - 1] = -4 * wide                 # so that some largest magnitude is negative
            if zero:
                w[block_size:2 * block_size] = 0
            return w

        def good(w: Tensor) -> bool:
            blocks = w.view(-1, block_size).double()
            scaled = 127 * blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
            a = w.view(-1, block_size).abs().amax(1, keepdim=True).clamp(min=1e-30)
            one, other = w.view(-1, block_size) * (127 / a), w.view(-1, block_size) / a * 127
            # no tie; and cut off, both ways to scale give the same, so that cutting off is known whichever was taken
            return bool(((scaled - scaled.floor() - 0.5).abs() > 1e-3).all() and torch.equal(one.trunc(), other.trunc())
                        and torch.equal(one.floor(), other.floor()))
        return {"w": until(draw, good), "block_size": block_size}

    return [case(8, 4, 1.0), case(96, 32, 0.02, outlier=True), case(48, 16, 3.0, zero=True),
            case(24 * number(rng, 2, 5), 8, 0.5), case(20, 20, 0.1)]


def int8_probe(work: Callable, case: dict) -> dict[str, Any]:
    found = results(work(case["w"].clone(), case["block_size"]), ("q", "absmax"), "(q, absmax)")
    return found


def int8_with(round_: Callable = torch.round, top: float = 127, blocks: Callable | None = None,
              absmax: Callable = lambda b: b.abs().amax(1), centre: bool = False) -> Callable:
    """Absmax int8 with one step exchanged: right as it stands."""
    def work(w, block_size):
        b = w.view(-1, block_size) if blocks is None else blocks(w, block_size)
        if centre:
            b = b - b.mean(1, keepdim=True)
        a = absmax(b)
        return round_(b * (top / a.clamp(min=1e-30))[:, None]).to(torch.int16).to(torch.int8).view(-1), a
    return work


def int8_affine(w, block_size):
    b = w.view(-1, block_size)
    low, high = b.amin(1, keepdim=True), b.amax(1, keepdim=True)
    q = ((b - low) / (high - low).clamp(min=1e-30) * 255).round() - 128
    return q.to(torch.int8).view(-1), b.abs().amax(1)


def int8_keeps_floats(w, block_size):
    b = w.view(-1, block_size)
    a = b.abs().amax(1)
    return (b * (127 / a.clamp(min=1e-30))[:, None]).round().view(-1), a


def int8_strided(w, block_size):
    q, a = int8_with()(w.view(block_size, -1).T.reshape(-1), block_size)
    return q.view(-1, block_size).T.reshape(-1), a


def int8_returns_step(w, block_size):
    q, a = int8_with()(w, block_size)
    return q, a / 127


def int8_upside_down(w, block_size):
    b = w.view(-1, block_size)
    a = b.abs().amax(1)
    return (b * (a / 127)[:, None]).round().to(torch.int8).view(-1), a


def int8_scaled_only(w, block_size):
    b = w.view(-1, block_size)
    a = b.abs().amax(1)
    return (b / a.clamp(min=1e-30)[:, None]).round().to(torch.int8).view(-1), a


def int8_of_a_tensor(w, block_size):
    a = w.abs().max()
    return (w * (127 / a)).round().to(torch.int8), a


def int8_one_for_zeros(w, block_size):
    b = w.view(-1, block_size)
    a = b.abs().amax(1)
    a[a == 0] = 1
    return (b * (127 / a)[:, None]).round().to(torch.int8).view(-1), a


def int8_loop(w, block_size):
    q, absmax = [], []
    for block in w.split(block_size):
        a = max(abs(v) for v in block.tolist())
        absmax.append(a)
        q += [round(127 * v / a) if a else 0 for v in block.tolist()]
    return torch.tensor(q, dtype=torch.int8), torch.tensor(absmax)


def int8_repeat(w, block_size):
    a = torch.stack([block.abs().max() for block in w.split(block_size)])
    step = a.repeat_interleave(block_size) / 127
    return torch.where(step > 0, w / step, 0.0).round().char(), a


ABSMAX_INT8 = Exercise(
    name="absmax-int8", chapter=CHAPTER, title="Absmax int8, in blocks", points=2, minutes=8, difficulty=1,
    inputs=int8_inputs, probe=int8_probe, reference=int8_with(),
    mistakes={
        "cut off": (int8_with(torch.trunc),
            "You cut the fraction off: .to(torch.int8) on its own goes towards zero, and the error becomes twice as large "
            "as it has to be. Round first: torch.round(...)."),
        "rounded down": (int8_with(torch.floor),
            "You round down (floor, or //). Every weight becomes a little smaller, so the errors no longer cancel. Round to "
            "the nearest."),
        "128": (int8_with(top=128),
            "You scale to 128. int8 ends at 127: the largest weight becomes +128, which wraps round to -128. The scale is "
            "127 / absmax, and -128 stays unused."),
        "one absmax for all": (int8_with(blocks=lambda w, b: w.view(1, -1)),
            "There is one absmax for the whole tensor. Each block of block_size weights has its own: w.view(-1, "
            "block_size)."),
        "one absmax for all, a number": (int8_of_a_tensor,
            "There is one absmax for the whole tensor, a single number. Each block of block_size weights has its own: "
            "w.view(-1, block_size), and the maximum along dimension 1."),
        "absmax of zeros changed": (int8_one_for_zeros,
            "In a block of zeros you return 1 as its absmax. To divide by something else than 0 is right; what is "
            "returned is the largest magnitude, and that is 0."),
        "largest, not largest magnitude": (int8_with(absmax=lambda b: b.amax(1)),
            "You take the largest value of each block. If the largest magnitude belongs to a negative weight, that one no "
            "longer fits: take .abs() first."),
        "mean removed": (int8_with(centre=True),
            "You take the block's mean off first. Absmax does not: zero has to stay zero exactly, and nobody stores the "
            "mean to add it back."),
        "from lowest to highest": (int8_affine,
            "You map lowest…highest onto -128…127 (“affine” or “zero-point” quantization). It needs two numbers per "
            "block to come back, and here only absmax is stored."),
        "still floats": (int8_keeps_floats,
            "The numbers are right, but they are still 32-bit floats, so nothing is saved. End with .to(torch.int8)."),
        "every nth weight": (int8_strided,
            "Your blocks take every so-manyth weight. A block is block_size weights that follow one another: "
            "w.view(-1, block_size), and the absmax along dimension 1."),
        "the step instead of the absmax": (int8_returns_step,
            "You return absmax / 127, the size of a step. That would do as well, but bitsandbytes stores absmax, and so do "
            "we here."),
        "upside down": (int8_upside_down,
            "Your scale is upside down: w is multiplied by 127 / absmax, not by absmax / 127."),
        "scaled to one": (int8_scaled_only,
            "You divide by absmax and round at once, so only -1, 0 and 1 are left. Multiply by 127 in between."),
    },
    alternatives={"a loop": int8_loop, "repeat_interleave": int8_repeat},
    rtol=1e-6, atol=0.0, accepts="function", hides=HIDES)


# ================================================================================================ nf4-codebook

def codebook_inputs(rng: torch.Generator) -> list[dict]:
    drawn = 0.9 + 0.09 * torch.rand(3, generator=rng, dtype=torch.float64)
    return [{"offset": 0.9677083}, *({"offset": round(p, 6)} for p in drawn.tolist())]


def codebook_probe(work: Callable, case: dict) -> dict[str, Any]:
    levels = work(case["offset"])
    if isinstance(levels, (list, tuple)) and levels and all(type(v) in (int, float) for v in levels):
        levels = torch.tensor(levels)
    return {"levels": levels.detach().float() if isinstance(levels, Tensor) and levels.is_floating_point() else levels}


def quantiles(p: Tensor) -> Tensor:
    return torch.special.ndtri(p.double())


def levels_with(offset: float, below: int = 8, above: int = 9) -> Tensor:
    """Quantiles at evenly spaced probabilities on either side of zero, and zero itself, unscaled."""
    up = quantiles(torch.linspace(offset, 0.5, above, dtype=torch.float64)[:-1])
    down = -quantiles(torch.linspace(offset, 0.5, below, dtype=torch.float64)[:-1])
    return torch.cat([down, torch.zeros(1, dtype=torch.float64), up]).sort().values


def scaled(levels: Tensor) -> Tensor:
    return (levels / levels.abs().max()).float()


def codebook_reference(offset):
    return scaled(levels_with(offset))


def codebook_equal_mass(offset):
    return scaled(quantiles((torch.arange(16) + 0.5) / 16))


def codebook_unsorted(offset):
    up = quantiles(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -quantiles(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    return scaled(torch.cat([up, torch.zeros(1, dtype=torch.float64), down]))


def codebook_upper_falls(offset):
    levels = scaled(levels_with(offset))
    return torch.cat([levels[:8], levels[8:].flip(0)])


def codebook_one_less(offset):
    up, down = (quantiles(torch.linspace(offset, 0.5, k, dtype=torch.float64)) for k in (8, 7))
    return scaled(torch.cat([-down, torch.zeros(1, dtype=torch.float64), up]).sort().values)


def codebook_no_zero(offset):
    return scaled(quantiles(torch.linspace(1 - offset, offset, 16, dtype=torch.float64)))


def codebook_evenly(offset):
    return torch.cat([torch.linspace(-1, 0, 8), torch.linspace(0, 1, 9)[1:]])


def codebook_statistics(offset):
    def side(count):
        step = (offset - 0.5) / (count - 1)
        return [NormalDist().inv_cdf(offset - step * i) for i in range(count - 1)]
    levels = sorted(side(9) + [0.0] + [-v for v in side(8)])
    return torch.tensor([v / levels[-1] for v in levels])


def codebook_erfinv(offset):
    def quantile(p):
        return math.sqrt(2) * torch.erfinv(2 * p - 1)
    up = quantile(torch.linspace(0.5, offset, 9, dtype=torch.float64))
    down = quantile(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64))
    return torch.cat([down[:-1], up]) / up[-1]


NF4_CODEBOOK = Exercise(
    name="nf4-codebook", chapter=CHAPTER, title="The sixteen levels", points=3, minutes=15, difficulty=2,
    inputs=codebook_inputs, probe=codebook_probe, reference=codebook_reference,
    mistakes={
        "sixteen bins of equal mass": (codebook_equal_mass,
            "These are the middles (in probability) of sixteen bins of equal mass. It is how NF4 is often described, and "
            "it is not NF4: that has a level at exactly 0, and its two sides differ."),
        "no zero": (codebook_no_zero,
            "Sixteen quantiles in one row from 1 - offset to offset: symmetric, and none of them is 0. NF4 makes the two "
            "sides apart, so that 0 is a level: weights that are exactly zero, as padding is, have to stay it."),
        "eight below, seven above": (lambda offset: scaled(levels_with(offset, 9, 8)),
            "You have eight levels below zero and seven above. NF4 has it the other way round: seven below, zero, eight "
            "above."),
        "fifteen levels": (lambda offset: scaled(levels_with(offset, 8, 8)),
            "Seven below, zero, seven above make fifteen; four bits count to sixteen. NF4 spends the sixteenth on the side "
            "above zero."),
        "seventeen levels": (lambda offset: scaled(levels_with(offset, 9, 9)),
            "Eight below, zero and eight above make seventeen, and four bits count to sixteen. Below zero NF4 has seven."),
        "zero twice": (lambda offset: scaled(torch.cat([levels_with(offset), torch.zeros(1)]).sort().values),
            "Zero is in it twice. The quantile of 0.5 is 0: leave it out on both sides and add 0 once."),
        "not divided": (lambda offset: levels_with(offset).float(),
            "These are the quantiles themselves. Divide them by the largest, so that the levels run from -1 to 1, as a "
            "block does after division by its absmax."),
        "order": (codebook_unsorted,
            "The sixteen numbers are right, but not in ascending order. A code is a level's place in this order."),
        "upper half falls": (codebook_upper_falls,
            "The levels above zero are in falling order: linspace began at the offset. Sort at the end, or flip that "
            "half."),
        "eight and seven probabilities": (codebook_one_less,
            "Eight and seven are the levels that remain. Each side has one probability more, 9 and 8, whose last one is 0.5: "
            "its quantile is the 0 that is taken once. Yours has 0 in it three times."),
        "evenly spaced": (codebook_evenly,
            "These are evenly spaced levels. Evenly spaced are the probabilities, from the offset to 0.5; the levels are their "
            "quantiles."),
        "offset ignored": (lambda offset: codebook_reference(0.9677083),
            "The levels do not depend on offset. QLoRA's value is 0.9677083; here it is an argument, and the check tries "
            "others."),
        "probability one": (lambda offset: scaled(levels_with(1.0)),
            "The quantile of 1 is infinite, and infinity divided by itself is NaN. The outermost probability is the "
            "offset, a little below 1."),
        "distribution instead of quantile": (lambda offset: scaled(torch.special.ndtr(
                torch.cat([-torch.linspace(offset, 0.5, 8)[:-1], torch.zeros(1), torch.linspace(0.5, offset, 9)[1:]]))),
            "You use the distribution function Φ (from values to probabilities). Asked for is its inverse Φ⁻¹ (from "
            "probabilities to values): torch.special.ndtri or NormalDist().inv_cdf."),
    },
    alternatives={"the statistics module": codebook_statistics, "erfinv": codebook_erfinv},
    rtol=4e-6, atol=1e-6, accepts="function", hides=HIDES)


# ================================================================================================ nf4-quantize

def quantize_inputs(rng: torch.Generator) -> list[dict]:
    nf4 = torch.tensor(NF4)
    other = torch.cat([torch.tensor([-1.0]), (1.9 * torch.rand(14, generator=rng) - 0.95), torch.tensor([1.0])])

    def case(rows: int, columns: int, block_size: int, wide: float, code: Tensor = nf4, zero: bool = False) -> dict:
        def draw() -> Tensor:
            w = wide * (randn(rng, rows, columns) - 0.2)
            w.view(-1)[number(rng, 0, block_size)] = -5 * wide
            if zero:
                w.view(-1)[block_size:2 * block_size] = 0
            return w

        def good(w: Tensor) -> bool:
            blocks = w.view(-1, block_size)
            return clear_of_edges(blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30), code, 2e-6)
        return {"w": until(draw, good), "code": code, "block_size": block_size}

    return [case(2, 8, 8, 1.0), case(4, 24, 32, 0.02), case(6, 16, 16, 0.1, zero=True),
            case(number(rng, 3, 6), 32, 16, 0.5, other.sort().values), case(8, 8, 64, 2.0)]


def quantize_probe(work: Callable, case: dict) -> dict[str, Any]:
    given = work(case["w"].clone(), case["code"].clone(), case["block_size"])
    found = results(given, ("codes", "absmax"), "(codes, absmax)")
    found["codes"] = whole(found["codes"])
    return found


def quantize_with(blocks: Callable = lambda w, b: w.reshape(-1, b), absmax: Callable = lambda b: b.abs().amax(1),
                  codes: Callable = nearest, centre: bool = False, divide: bool = True, safe: bool = True) -> Callable:
    """Block quantization with one step exchanged: right as it stands."""
    def work(w, code, block_size):
        b = blocks(w, block_size)
        if centre:
            b = b - b.mean(1, keepdim=True)
        a = absmax(b)
        s = b / (a.clamp(min=1e-30) if safe else a)[:, None] if divide else b
        return codes(s.contiguous(), code).reshape(-1), a
    return work


def quantize_z_score(w, code, block_size):
    b = w.reshape(-1, block_size)
    std = b.std(1, correction=0)
    return nearest(((b - b.mean(1, keepdim=True)) / std.clamp(min=1e-30)[:, None]).contiguous(), code).view(-1), std


def quantize_loop(w, code, block_size):
    codes, absmax = [], []
    for block in w.reshape(-1).split(block_size):
        a = block.abs().max()
        s = block / a if a > 0 else block
        codes.append(torch.stack([(code - v).abs().argmin() for v in s]))
        absmax.append(a)
    return torch.cat(codes).to(torch.uint8), torch.stack(absmax)


def quantize_midpoints_counted(w, code, block_size):
    b = w.reshape(-1, block_size)
    a = b.abs().amax(1)
    s = b * torch.where(a > 0, 1 / a, 0.0)[:, None]
    count = torch.zeros_like(s, dtype=torch.uint8)
    for low, high in zip(code[:-1], code[1:]):
        count += s > (low + high) / 2
    return count.view(-1), a


NF4_QUANTIZE = Exercise(
    name="nf4-quantize", chapter=CHAPTER, title="Quantize in blocks", points=3, minutes=12, difficulty=2,
    inputs=quantize_inputs, probe=quantize_probe, reference=quantize_with(),
    mistakes={
        "mean and deviation": (quantize_z_score,
            "You normalise each block by its mean and standard deviation, as slide 000 does. NF4 divides by the block's "
            "absmax and removes no mean: zero stays exactly zero, and nothing falls outside of -1 … 1."),
        "mean removed": (quantize_with(centre=True),
            "The block's mean is taken off before its absmax is found. NF4 removes no mean: a weight of 0 has to become "
            "level 0 exactly."),
        "one absmax for all": (quantize_with(blocks=lambda w, b: w.reshape(1, -1)),
            "There is one absmax for the whole tensor. Every block_size weights have their own: w.reshape(-1, "
            "block_size)."),
        "one absmax per row": (quantize_with(blocks=lambda w, b: w),
            "There is one absmax per row of w. A block is block_size weights of the flattened tensor, whatever the length "
            "of a row: w.reshape(-1, block_size)."),
        "largest, not largest magnitude": (quantize_with(absmax=lambda b: b.amax(1)),
            "You divide by the largest value of the block. If the largest magnitude is a negative weight's, that one ends "
            "up below -1: take .abs() first."),
        "not divided": (quantize_with(divide=False),
            "You look for the level nearest to the weight itself. First divide each block by its absmax."),
        "level below": (quantize_with(codes=lambda s, c: (torch.searchsorted(c, s, right=True) - 1).clamp(0, 15)),
            "You take the level below, also where the one above is nearer."),
        "level above": (quantize_with(codes=lambda s, c: torch.searchsorted(c, s).clamp(0, 15)),
            "You take the level above, also where the one below is nearer. bucketize and searchsorted want the boundaries "
            "between the cells, here the middles between neighbouring levels."),
        "as if evenly spaced": (quantize_with(codes=lambda s, c: ((s + 1) * 7.5).round().long()),
            "You round to sixteen evenly spaced steps. That is INT4's idea; here the levels are those in `code`."),
        "levels instead of codes": (quantize_with(codes=lambda s, c: c[nearest(s, c)]),
            "You return the levels, as floating-point numbers. Asked for are their numbers 0 … 15, the codes."),
        "in the shape of w": (lambda w, code, b: (quantize_with()(w, code, b)[0].view(w.shape), quantize_with()(w, code, b)[1]),
            "The codes are right, and have the shape of w. Asked for is one long row, [d_out · d_in]: two neighbours share a "
            "byte in the next step."),
        "absmax not 0": (lambda w, code, b: (quantize_with()(w, code, b)[0], quantize_with()(w, code, b)[1].clamp(min=1e-38)),
            "You return the absmax that you divided by. In a block of zeros that is 1e-38; the absmax is 0. Clamp in the "
            "division only."),
        "exchanged": (lambda w, code, b: quantize_with()(w, code, b)[::-1],
            "You return the absmaxes first. The order is (codes, absmax)."),
        "eight bits first": (lambda w, code, b: (nearest(int8_with()(w.reshape(-1), b)[0] / 127, code), quantize_with()(w, code, b)[1]),
            "You round to 8 bits first and look for the level nearest to the rounded number. A weight close to the middle of "
            "two levels may then fall to the wrong one: divide by absmax, and nothing else, before nearest_level."),
        "columns first": (quantize_with(blocks=lambda w, b: w.T.reshape(-1, b)),
            "Your blocks run down the columns. They run along the rows: w.reshape(-1, block_size), without a transpose."),
        "zero divided by zero": (quantize_with(safe=False),
            "In a block of zeros absmax is 0, and 0 / 0 is NaN: its codes are wrong. Divide by absmax.clamp(min=1e-38), "
            "say; then 0 stays 0."),
        "zero divided by zero, argmin": (quantize_with(
                safe=False, codes=lambda s, c: (s[..., None] - c).abs().argmin(-1)),
            "In a block of zeros absmax is 0, and 0 / 0 is NaN, to which argmin answers anything. Divide by "
            "absmax.clamp(min=1e-38), say; then 0 stays 0."),
    },
    alternatives={"a loop": quantize_loop, "count the middles below": quantize_midpoints_counted},
    rtol=1e-6, atol=0.0, accepts="function", hides=HIDES)


# ================================================================================================ pack-nibbles

def pack_inputs(rng: torch.Generator) -> list[dict]:
    def codes(n: int) -> Tensor:
        drawn = until(lambda: torch.randint(0, 16, (n,), generator=rng, dtype=torch.uint8),
                      lambda c: int(c[0]) not in (0, 15) and int(c[-1]) not in (0, 15))
        return drawn
    return [{"codes": codes(2)}, {"codes": codes(8)}, {"codes": codes(7)}, {"codes": codes(1)},
            {"codes": codes(2 * number(rng, 8, 30))}]


def pack_probe(work: Callable, case: dict) -> dict[str, Any]:
    packed = work(case["codes"].clone())
    return {"bytes": packed.detach() if isinstance(packed, Tensor) else packed}


def pack_with(join: Callable = lambda a, b: a << 4 | b, pad: Callable = lambda c: F.pad(c, (0, len(c) % 2)),
              split: Callable = lambda c: (c[::2], c[1::2])) -> Callable:
    """Packing with one step exchanged: right as it stands."""
    def work(codes):
        return join(*split(pad(codes)))
    return work


def pack_sixteens(codes):
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return (codes.view(-1, 2).int() @ torch.tensor([16, 1], dtype=torch.int32)).to(torch.uint8)


def pack_loop(codes):
    numbers = codes.tolist() + [0] * (len(codes) % 2)
    return torch.tensor([int(f"{a:04b}{b:04b}", 2) for a, b in zip(numbers[::2], numbers[1::2])], dtype=torch.uint8)


PACK_NIBBLES = Exercise(
    name="pack-nibbles", chapter=CHAPTER, title="Two codes in a byte", points=2, minutes=8, difficulty=1,
    inputs=pack_inputs, probe=pack_probe, reference=pack_with(),
    mistakes={
        "low half first": (pack_with(lambda a, b: b << 4 | a),
            "Your first code is in the lower four bits. bitsandbytes puts it into the upper four: first << 4 | second. "
            "(Other libraries do it your way; a file says nothing about it, so one has to know.)"),
        "first half beside second half": (pack_with(split=lambda c: (c[:len(c) // 2], c[len(c) // 2:])),
            "You pair a code with the one half the tensor away. A byte holds two neighbours: codes[::2] and codes[1::2]."),
        "ten times": (pack_with(lambda a, b: (10 * a.int() + b).to(torch.uint8)),
            "You write two decimal digits. A half byte counts to sixteen, so the first code is worth 16, not 10."),
        "added": (pack_with(lambda a, b: a + b),
            "You add the two codes, and nobody can take a sum apart again. Shift the first one four places to the left "
            "before."),
        "three places": (pack_with(lambda a, b: a << 3 | b),
            "You shift by three places. A code is four bits long, so one bit of each lands on the other."),
        "and": (pack_with(lambda a, b: (a << 4) & b),
            "& keeps bits that are set in both, and here there are none: all is 0. | puts the two together."),
        "plus before shift": (pack_with(lambda a, b: a << 4 + b),
            "In a << 4 + b Python adds first: it shifts by 4 + b places. Write (a << 4) + b, or a << 4 | b."),
        "wide numbers": (pack_with(lambda a, b: (a.long() << 4) | b),
            "The numbers are right, but they are int64: eight bytes each, sixteen times too many. End with "
            ".to(torch.uint8)."),
        "not filled up": (lambda c: c[::2] << 4 | c[1::2],
            "If the number of codes is odd, there is one first code more than second ones. Append a 0 before you take them "
            "apart."),
        "filled up with a float": (lambda c: (d := torch.cat([c, torch.zeros(1)]) if len(c) % 2 else c)[::2] * 16 + d[1::2],
            "torch.zeros(1) is a float32, and makes floats of all codes where their number is odd. codes.new_zeros(1) has the "
            "dtype of the codes."),
        "odd one dropped": (pack_with(pad=lambda c: c[:len(c) // 2 * 2]),
            "If the number of codes is odd, the last one is lost. Fill up with a 0 at the end."),
        "filled up in front": (pack_with(pad=lambda c: F.pad(c, (len(c) % 2, 0))),
            "If the number of codes is odd you put the 0 in front, and every code moves by one place. Put it at the end."),
        "last one twice": (pack_with(pad=lambda c: torch.cat([c, c[len(c) - len(c) % 2:]])),
            "If the number of codes is odd you repeat the last one. Fill up with 0, so that the file does not depend on "
            "how one happened to do it."),
    },
    alternatives={"sixteen times": pack_sixteens, "as text of bits": pack_loop},
    accepts="function", hides=HIDES)


# ================================================================================================ nf4-dequantize

def dequantize_inputs(rng: torch.Generator) -> list[dict]:
    nf4 = torch.tensor(NF4)
    other = (2 * torch.rand(16, generator=rng) - 1).sort().values

    def case(shape: tuple[int, ...], block_size: int, dtype: str = "float32", code: Tensor = nf4) -> dict:
        n = math.prod(shape)
        packed = torch.randint(0, 256, (n // 2,), generator=rng, dtype=torch.uint8)
        absmax = 0.02 + randn(rng, n // block_size).abs()
        return {"packed": packed, "absmax": absmax, "code": code, "shape": list(shape), "block_size": block_size,
                "dtype": dtype}

    return [case((2, 4), 4), case((3, 16), 8), case((4, 32), 64), case((6, 20), 8, "bfloat16"),
            case((number(rng, 2, 6), 2, 16), 16, "float16", other)]


def dequantize_probe(work: Callable, case: dict) -> dict[str, Any]:
    dtype = getattr(torch, case["dtype"])
    w = work(case["packed"].clone(), case["absmax"].clone(), case["code"].clone(), tuple(case["shape"]), case["block_size"],
             dtype)
    return {"w": w.detach() if isinstance(w, Tensor) else w}


def dequantize_with(codes: Callable = lambda p: torch.stack([p >> 4, p & 15], 1).view(-1),
                    levels: Callable = lambda c, code: code[c.long()],
                    scale: Callable = lambda a, b: a.repeat_interleave(b), join: Callable = lambda x, a: x * a,
                    end: Callable = lambda w, shape, dtype: w.view(shape).to(dtype)) -> Callable:
    """Dequantization with one step exchanged: right as it stands."""
    def work(packed, absmax, code, shape, block_size, dtype):
        return end(join(levels(codes(packed), code), scale(absmax, block_size)), shape, dtype)
    return work


def dequantize_rounds_early(packed, absmax, code, shape, block_size, dtype):
    return dequantize_with(levels=lambda c, k: k.to(dtype)[c.long()],
                           scale=lambda a, b: a.to(dtype).repeat_interleave(b))(packed, absmax, code, shape, block_size, dtype)


def dequantize_fixed_block(packed, absmax, code, shape, block_size, dtype):
    n = 2 * len(packed)
    return dequantize_with(scale=lambda a, b: a.repeat_interleave(64)[:n] if len(a) * 64 >= n else a.repeat(n)[:n])(
        packed, absmax, code, shape, block_size, dtype)


def dequantize_pairs(packed, absmax, code, shape, block_size, dtype):
    """A table of 256 pairs: one look-up per byte."""
    table = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
    return (table[packed.int()].reshape(-1, block_size) * absmax.unsqueeze(1)).reshape(shape).to(dtype)


def dequantize_loop(packed, absmax, code, shape, block_size, dtype):
    w = torch.empty(2 * len(packed))
    for i, byte in enumerate(packed.tolist()):
        for j, number_ in enumerate(divmod(byte, 16)):
            w[2 * i + j] = code[number_] * absmax[(2 * i + j) // block_size]
    return w.reshape(shape).to(dtype)


NF4_DEQUANTIZE = Exercise(
    name="nf4-dequantize", chapter=CHAPTER, title="And back again", points=3, minutes=12, difficulty=2,
    inputs=dequantize_inputs, probe=dequantize_probe, reference=dequantize_with(),
    mistakes={
        "low half first": (dequantize_with(lambda p: torch.stack([p & 15, p >> 4], 1).view(-1)),
            "You take the lower four bits first. The first code is in the upper four: byte >> 4, then byte & 15."),
        "all upper, then all lower halves": (dequantize_with(lambda p: torch.cat([p >> 4, p & 15])),
            "You put all first codes before all second ones. The two codes of a byte are neighbours: torch.stack along a "
            "new last dimension, then flatten."),
        "uint8 as an index": (dequantize_with(levels=lambda c, code: code[c]),
            "A uint8 tensor in square brackets is taken for a mask, not for numbers of places. Make whole numbers of it that "
            "are meant as an index: codes.long()."),
        "one bit": (dequantize_with(lambda p: torch.stack([p >> 4, p & 4], 1).view(-1)),
            "byte & 4 keeps a single bit, the one that is worth four. The lower four bits are byte & 15 (1 + 2 + 4 + 8)."),
        "absmax forgotten": (dequantize_with(join=lambda x, a: x),
            "These are the levels, between -1 and 1. Multiply each by the absmax of its block."),
        "divided": (dequantize_with(join=lambda x, a: x / a),
            "You divide by absmax. That was on the way in; on the way back it is multiplied."),
        "absmax in turn": (dequantize_with(scale=lambda a, b: a.repeat(b)),
            "You give the absmaxes to the weights in turn (repeat). The first block_size weights share the first one: "
            "repeat_interleave(block_size), or the weights as [blocks, block_size] times absmax[:, None]."),
        "code instead of level": (dequantize_with(levels=lambda c, code: c.float()),
            "You multiply absmax by the code itself, a number from 0 to 15. Look up its level first: code[number]."),
        "as if evenly spaced": (dequantize_with(levels=lambda c, code: (c.float() - 7.5) / 7.5),
            "You turn a code into a level as if the levels were evenly spaced. They are in `code`: look them up."),
        "rounded too early": (dequantize_rounds_early,
            "Levels and absmax are rounded to 16 bits before they are multiplied, and the product is rounded again. "
            "Multiply in float32 and round once, at the end."),
        "always float32": (dequantize_with(end=lambda w, shape, dtype: w.view(shape)),
            "The result is float32 always. Convert it to `dtype` at the end."),
        "flat": (dequantize_with(end=lambda w, shape, dtype: w.to(dtype)),
            "The weights are in one long row. Give them back their shape: .view(shape)."),
        "blocks of 64": (dequantize_fixed_block,
            "It looks as if the block size were fixed to 64. It is an argument."),
    },
    alternatives={"pairs from a table": dequantize_pairs, "a loop": dequantize_loop},
    rtol=1e-6, atol=1e-9, accepts="function", hides=HIDES)


# ================================================================================================ double-quantize

def dynamic() -> Tensor:
    """The 256 levels of the 8-bit dynamic type, as in `pefttools.codebook.dynamic_codebook`."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        for sign in (1, -1):
            levels += (sign * 10 ** (i - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
    return torch.tensor(sorted(levels))


def double_inputs(rng: torch.Generator) -> list[dict]:
    code = dynamic()
    coarse = torch.cat([torch.tensor([-1.0]), (1.8 * torch.rand(14, generator=rng) - 0.9), torch.tensor([1.0])]).sort().values

    def case(n: int, block_size: int, code: Tensor) -> dict:
        def draw() -> Tensor:
            # Whole numbers of 1/4096 whose mean is one too: then the mean is the same in whichever order one adds.
            k = (4096 * (0.5 + 0.15 * randn(rng, n)).abs()).long() + 1
            k[0] += n - int(k.sum()) % n
            return k.float() / 4096

        def good(absmax: Tensor) -> bool:
            rest = absmax.double() - absmax.double().mean()
            s = [part / part.abs().max() for part in rest.split(block_size)]
            return bool(all(part.abs().max() > 0.01 for part in rest.split(block_size))
                        and clear_of_edges(torch.cat(s), code, 2e-7)
                        and all(part[part.abs().argmax()] < 0 for part in rest.split(block_size)[-1:]))
        return {"absmax": until(draw, good), "code": code, "block_size": block_size}

    return [case(4, 4, coarse), case(12, 4, coarse), case(40, 16, code), case(number(rng, 150, 200), 64, code)]


def double_probe(work: Callable, case: dict) -> dict[str, Any]:
    given = work(case["absmax"].clone(), case["code"].clone(), case["block_size"])
    found = results(given, ("codes", "absmax2", "offset"), "(codes, absmax2, offset)")
    found["codes"] = whole(found["codes"])
    if isinstance(found["offset"], Tensor) and found["offset"].numel() == 1:
        found["offset"] = found["offset"].item()
    return found


def double_with(offset: Callable = lambda a: a.mean(), blocks: bool = True, scale: Callable = lambda x: x.abs().amax(1),
                codes: Callable = nearest, last: bool = True) -> Callable:
    """Double quantization with one step exchanged: right as it stands."""
    def work(absmax, code, block_size):
        mean = offset(absmax)
        rest = absmax - mean
        size = block_size if blocks else len(rest)
        if not last:
            rest = rest[:len(rest) // size * size]
        padded = F.pad(rest, (0, -len(rest) % size)).view(-1, size)
        absmax2 = scale(padded)
        return codes((padded / absmax2[:, None]).contiguous(), code).view(-1)[:len(rest)], absmax2, mean
    return work


def double_mean_of_each_block(absmax, code, block_size):
    parts = [double_with()(part, code, block_size) for part in absmax.split(block_size)]
    return tuple(torch.cat([part[i].reshape(-1) for part in parts]) for i in range(3))


def double_scale_first(absmax, code, block_size):
    mean = absmax.mean()
    absmax2 = torch.stack([part.max() for part in absmax.split(block_size)])
    s = (absmax - mean) / absmax2.repeat_interleave(block_size)[:len(absmax)]
    return nearest(s, code), absmax2, mean


def double_linear(absmax, code, block_size):
    n = len(code) // 2 - 1
    return double_with(codes=lambda s, c: ((s + 1) * n).round().long())(absmax, code, block_size)


def double_last_padded(absmax, code, block_size):
    size = -len(absmax) % block_size
    codes, absmax2, mean = double_with(offset=lambda a: a.sum() / (len(a) + size))(absmax, code, block_size)
    return codes, absmax2, mean


def double_filled_first(absmax, code, block_size):
    rest = (F.pad(absmax, (0, -len(absmax) % block_size)) - absmax.mean()).view(-1, block_size)
    absmax2 = rest.abs().amax(1)
    return nearest(rest / absmax2[:, None], code).view(-1)[:len(absmax)], absmax2, absmax.mean()


def double_all_filled(absmax, code, block_size):
    filled = F.pad(absmax, (0, -len(absmax) % block_size))
    rest = (filled - filled.mean()).view(-1, block_size)
    absmax2 = rest.abs().amax(1)
    return nearest(rest / absmax2[:, None], code).view(-1)[:len(absmax)], absmax2, filled.mean()


def double_loop(absmax, code, block_size):
    offset = sum(absmax.tolist()) / len(absmax)
    codes, absmax2 = [], []
    for part in (absmax - offset).split(block_size):
        absmax2.append(part.abs().max())
        codes += [(code - v / absmax2[-1]).abs().argmin() for v in part]
    return torch.stack(codes).to(torch.uint8), torch.stack(absmax2), offset


def double_repeat(absmax, code, block_size):
    offset = absmax.double().mean()
    rest = absmax - offset.float()
    absmax2 = torch.stack([part.abs().max() for part in rest.split(block_size)])
    s = rest * (1 / absmax2).repeat_interleave(block_size)[:len(rest)]
    return torch.searchsorted((code[1:] + code[:-1]) / 2, s), absmax2, offset.float()


DOUBLE_QUANTIZE = Exercise(
    name="double-quantize", chapter=CHAPTER, title="Quantize the absmaxes", points=3, minutes=15, difficulty=3,
    inputs=double_inputs, probe=double_probe, reference=double_with(),
    mistakes={
        "mean left in": (double_with(offset=lambda a: a.new_zeros(())),
            "The mean is not taken off. Absmaxes are all positive, so without that half of the signed levels are never "
            "used."),
        "smallest taken off": (double_with(offset=lambda a: a.min()),
            "You take off the smallest absmax. QLoRA takes off the mean, so that both signs are used."),
        "median taken off": (double_with(offset=lambda a: a.median()),
            "You take off the median. It is the mean in QLoRA and in bitsandbytes."),
        "mean of each block": (double_mean_of_each_block,
            "You take off a mean of each block, and have to store one for each. There is one mean for the whole tensor."),
        "mean over the filling": (double_last_padded,
            "The zeros that fill up the last block are counted in the mean. Take the mean first, then fill up."),
        "mean taken off the filling": (double_filled_first,
            "You fill up the last block and then take off the mean, so that the filling becomes −mean, which is larger than "
            "anything else there. Take off the mean first, then fill up with zeros."),
        "filled before the mean": (double_all_filled,
            "You fill up first, and everything after that counts the filling: the mean, and the last block's absmax2. Take the "
            "mean, take it off, then fill up."),
        "last block not filled": (lambda absmax, code, b: double_with()(absmax.view(-1, b).view(-1), code, b),
            "The number of absmaxes need not be a multiple of block_size, and .view wants that. Fill up with zeros after the "
            "mean is off, or loop over .split(block_size)."),
        "one absmax2": (double_with(blocks=False),
            "There is one absmax2 for all. Every block_size absmaxes share one (block_size is an argument; bitsandbytes has "
            "256)."),
        "absmax2 before the mean": (double_scale_first,
            "Your absmax2 is the largest absmax itself. Take the mean off first; then the largest magnitude of what is left."),
        "largest, not largest magnitude": (double_with(scale=lambda x: x.amax(1)),
            "After the mean is taken off there are negative numbers: absmax2 is the largest magnitude, so .abs() first."),
        "deviation": (double_with(scale=lambda x: x.std(1)),
            "You divide by the standard deviation. It is the largest magnitude, so that all fits into -1 … 1."),
        "whole numbers": (double_linear,
            "You round to evenly spaced steps. The levels are those of `code`: find the nearest, as before."),
        "last block dropped": (double_with(last=False),
            "The last block is missing where it is not full. It may be shorter than the others, and belongs to the result."),
        "level below": (double_with(codes=lambda s, c: (torch.searchsorted(c, s.contiguous(), right=True) - 1).clamp(0, len(c) - 1)),
            "You take the level below, also where the one above is nearer."),
    },
    alternatives={"a loop": double_loop, "repeat_interleave": double_repeat},
    rtol=1e-6, atol=1e-9, accepts="function", hides=HIDES)


# ================================================================================================ storage-bytes

def storage_inputs(rng: torch.Generator) -> list[dict]:
    n = [64 * 256, 2048 * 2048, 64 * number(rng, 300, 900), 2 * number(rng, 20_000, 90_000) + 1, number(rng, 5, 60)]
    return [{"n": m, "block_size": b, "double_quant": d}
            for m, b in zip(n, (64, 64, 64, 128, 32)) for d in (False, True)]


def storage_probe(work: Callable, case: dict) -> dict[str, Any]:
    count = work(case["n"], case["block_size"], case["double_quant"])
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    return {"bytes": int(count) if isinstance(count, float) and count.is_integer() else count}


def storage_with(scale: int = 4, up: Callable = lambda a, b: -(-a // b), codes: Callable = lambda n: (n + 1) // 2,
                 nested: Callable = lambda blocks, up: blocks + 4 * up(blocks, 256) + 4, times: int = 1) -> Callable:
    """Bytes of a quantized weight with one term exchanged: right as it stands."""
    def work(n, block_size, double_quant):
        blocks = up(n, block_size)
        return times * (codes(n) + (nested(blocks, up) if double_quant else scale * blocks))
    return work


def storage_of_tensors(n, block_size, double_quant):
    blocks = math.ceil(n / block_size)
    parts = [torch.empty(math.ceil(n / 2), dtype=torch.uint8, device="meta")]
    if double_quant:
        parts += [torch.empty(blocks, dtype=torch.uint8, device="meta"),
                  torch.empty(math.ceil(blocks / 256), device="meta"), torch.empty((), device="meta")]
    else:
        parts += [torch.empty(blocks, device="meta")]
    return sum(t.numel() * t.element_size() for t in parts)


def storage_ceil(n, block_size, double_quant):
    blocks = math.ceil(n / block_size)
    return math.ceil(n / 2) + (blocks + 4 * (math.ceil(blocks / 256) + 1) if double_quant else 4 * blocks)


STORAGE_BYTES = Exercise(
    name="storage-bytes", chapter=CHAPTER, title="Count the bytes", points=2, minutes=8, difficulty=2,
    inputs=storage_inputs, probe=storage_probe, reference=storage_with(),
    mistakes={
        "half a byte a weight": (lambda n, b, d: (n + 1) // 2,
            "This counts the codes alone, half a byte a weight. The absmaxes are stored too: that is how 4 bits become "
            "4.5."),
        "bits": (storage_with(times=8), "These are bits. Asked for are bytes."),
        "sixteen-bit absmax": (storage_with(scale=2),
            "You count two bytes for an absmax. It is float32: four."),
        "blocks rounded down": (storage_with(up=lambda a, b: a // b),
            "The number of blocks is rounded down. A last block that is not full needs an absmax as well: round up."),
        "all rounded down": (storage_with(up=lambda a, b: a // b, codes=lambda n: n // 2),
            "Everything is rounded down, the codes too. What is not full takes its space all the same: round up each time."),
        "rounded to the nearest": (storage_with(up=lambda a, b: round(a / b), codes=lambda n: round(n / 2)),
            "You round to the nearest whole number. What is not full takes its space all the same: round up each time."),
        "by bits a weight": (lambda n, b, d: n * (4 + (8 / b + 32 / b / 256 if d else 32 / b)) / 8,
            "This is the average of bits a weight, times n. It leaves out the mean and what is not full, so it is no whole "
            "number: count codes, blocks and groups, each rounded up."),
        "256 weights": (lambda n, b, d: (n + 1) // 2 + (-(-n // b) + 4 * -(-n // 256) + 4 if d else 4 * -(-n // b)),
            "You count an absmax2 for every 256 weights. It is one for every 256 *blocks*."),
        "blocks of 64": (lambda n, b, d: storage_with()(n, 64, d),
            "You count blocks of 64 whatever was asked for. block_size is an argument."),
        "absmax2 forgotten": (storage_with(nested=lambda blocks, up: blocks + 4),
            "With double quantization the absmax2, one float32 for every 256 absmaxes, is missing."),
        "mean forgotten": (storage_with(nested=lambda blocks, up: blocks + 4 * up(blocks, 256)),
            "With double quantization the mean that was taken off is stored too: one float32 for the tensor, four bytes."),
        "both kept": (storage_with(nested=lambda blocks, up: 5 * blocks + 4 * up(blocks, 256) + 4),
            "With double quantization you count the absmaxes twice: as float32 and as 8-bit codes. The codes take their "
            "place."),
        "double changes nothing": (storage_with(nested=lambda blocks, up: 4 * blocks),
            "double_quant makes no difference in your count. With it an absmax takes one byte instead of four."),
        "always double": (storage_with(scale=1),
            "Without double quantization an absmax is a float32: four bytes, not one."),
        "a byte a code": (storage_with(codes=lambda n: n),
            "You count a whole byte for each code. Two of them share one."),
    },
    alternatives={"as tensors without memory": storage_of_tensors, "with ceil": storage_ceil},
    accepts="function", hides=HIDES)


EXERCISES: list[Exercise] = [NEAREST_LEVEL, ABSMAX_INT8, NF4_CODEBOOK, NF4_QUANTIZE, PACK_NIBBLES, NF4_DEQUANTIZE,
                             DOUBLE_QUANTIZE, STORAGE_BYTES]


# ================================================================================================ questions

QUESTIONS: list[Question] = [
    Question(
        name="nf4-q-outlier", chapter=CHAPTER, points=1, right="b",
        text="A block of 64 weights of size about 0.1 holds **one** weight of 10. It is quantized to NF4. What becomes of "
             "the other 63?",
        options={
            "a": ("They keep their accuracy; only the outlier is rounded badly.",
                  "It is the other way round. The outlier is the block's absmax, so it is stored exactly; the others pay."),
            "b": ("Nearly all become 0: the step next to zero is now about 0.8.",
                  "Right: the levels next to 0 are -0.091 and 0.080 times the absmax of 10, so what is smaller than half of "
                  "that goes to 0. Other blocks notice nothing."),
            "c": ("They are clipped to the outermost level.",
                  "Nothing is clipped: the absmax is the largest magnitude there is, so all others lie well inside."),
            "d": ("All weights of the matrix get worse, as they share one scale.",
                  "Only these 63: each block has a scale of its own. To confine the damage is what blocks are for."),
        }),
    Question(
        name="nf4-q-learned", chapter=CHAPTER, points=1, right="d",
        text="You quantize a model that nobody has seen before. Which of these decide what NF4's **sixteen levels** are?",
        options={
            "a": ("The weights of the large models that its authors had looked at.",
                  "Slide 000 says so (“learned”). The levels come from a formula with the normal distribution in it and no "
                  "weight of any model: you computed them yourself."),
            "b": ("The weights of your model.",
                  "Those decide the absmax of each block and which code each weight gets. The levels are the same for all "
                  "models."),
            "c": ("A short calibration run on some text.",
                  "Other methods look at text first (GPTQ to decide how to round, AWQ for its scales). NF4 needs no data at "
                  "all."),
            "d": ("None of your data: quantiles of the standard normal distribution.",
                  "Right: quantiles at evenly spaced probabilities, divided by the largest."),
        }),
    Question(
        name="nf4-q-byte", chapter=CHAPTER, points=1, right="c",
        text="A byte of an NF4 weight is `0x7F` (in bits `0111 1111`), and its block's absmax is 0.5. Which two weights does "
             "it stand for, in order?",
        options={
            "a": ("0.5, then 0",
                  "The order is turned: the first weight is in the upper four bits, 0111."),
            "b": ("7, then 15",
                  "Those are the codes. Each is the number of a level, which is then multiplied by the absmax."),
            "c": ("0, then 0.5",
                  "Right: code 7 is the level 0, code 15 is the level 1, times 0.5."),
            "d": ("-0.03, then 0.5",
                  "That would be right if the levels were evenly spaced from -1 to 1: 7 is then just below zero. NF4's "
                  "level 7 is exactly 0."),
        }),
    Question(
        name="nf4-q-bits", chapter=CHAPTER, points=1, right="b",
        text="How many bits does a weight take in NF4 with blocks of **128**, without double quantization?",
        options={
            "a": ("4",
                  "The absmaxes are stored too, one float32 for each block."),
            "b": ("4.25",
                  "Right: 4 bits for the code and 32/128 for its share of the absmax."),
            "c": ("4.5",
                  "That is for blocks of 64. Twice as many weights share an absmax here."),
            "d": ("5",
                  "That would be 4 + 32/32: blocks of 32."),
        }),
    Question(
        name="nf4-q-optimal", chapter=CHAPTER, points=1, right="a",
        text="Normal weights in blocks of 64: Lloyd–Max levels, made for just these, have a smaller squared error than NF4's. "
             "Why, when NF4 is called “optimal for normally distributed weights”?",
        options={
            "a": ("Equally filled cells and least squared error are two different aims.",
                  "Right: NF4 aims at codes that are about equally frequent. For the squared error it pays to take coarser steps "
                  "near 0 and finer ones far out, where NF4's are wide; and after division by absmax the values are not normal "
                  "anyway."),
            "b": ("NF4's levels are rounded to a few digits.",
                  "They are float32. Rounding them more finely changes nothing that can be measured."),
            "c": ("Lloyd–Max has more than sixteen levels.",
                  "It has sixteen as well; they are elsewhere."),
            "d": ("Because the weights of a real model are not normal.",
                  "The measurement was on exactly normal numbers too, with the same result."),
        }),
    Question(
        name="nf4-q-double", chapter=CHAPTER, points=1, right="d",
        text="Double quantization stores the absmaxes in 8 bits. Why does the error of the **weights** hardly grow?",
        options={
            "a": ("The second quantization is exact.",
                  "It is not: absmaxes come back with a small error."),
            "b": ("The weights are quantized again afterwards, which makes up for it.",
                  "The weights' codes are not touched. Only their scales change a little."),
            "c": ("Only a few blocks are quantized twice.",
                  "All of the absmaxes are. It is what it does to a weight that is small."),
            "d": ("A scale that is off by a fraction of a percent moves a weight by that fraction; rounding to 4 bits moves it "
                  "far more.",
                  "Right: errors of such different size add up (in squares) to hardly more than the larger one."),
        }),
]
