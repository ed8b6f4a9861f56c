"""Chapter 05, QLoRA: seven exercises and six questions.

The 4-bit weight that the student's code gets is `FourBit`, with the two things of `pefttools.nf4.NF4Tensor` that matter
here, `.shape` and `.dequantize(dtype=…)`. Where a result is rounded to 16 bits, the numbers of a case are multiples of
powers of two, so that every sum before the rounding is exact and each right way rounds the same number. Imports torch and
the standard library only; references resolve when they are first used.
"""
from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pefttools.grading.exercise import Exercise
from pefttools.grading.leaves import gradients, plain, randn
from pefttools.grading.question import Question

CHAPTER = "05_qlora"
TITLE = "QLoRA"
HIDES = ("pefttools.qlora", "pefttools.nf4_linear", "pefttools.lora", "pefttools.lora_update", "pefttools.lora_layers",
         "pefttools.inject", "pefttools.bnb", "pefttools.lab.qlora_runs", "pefttools.vram", "bitsandbytes", "peft")
QUARTERS = [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]


def whole(rng: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers, low ≤ number < high, as float32."""
    return torch.randint(low, high, shape, generator=rng).float()


def number(rng: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=rng))


class FourBit:
    """A weight [d_out, d_in] in 4 bits: .codes, .absmax, .levels, .block_size, .shape and .dequantize(dtype=…)."""

    def __init__(self, codes: Tensor, absmax: Tensor, levels: Tensor, block_size: int) -> None:
        self.codes, self.absmax, self.levels, self.block_size = codes, absmax, levels, block_size
        self.shape = codes.shape
        self.given: list[Any] = []                     # weak references to what was dequantized

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self.levels[self.codes.flatten().long()].view(-1, self.block_size) * self.absmax[:, None]
        W = values.view(self.shape).to(dtype, copy=True)
        self.given.append(weakref.ref(W.untyped_storage()))
        return W

    def alive(self) -> int:
        """How many of the dequantized weights are still in memory, those apart that only wait for the collector."""
        for generation in (0, 1, 2):                   # the last looks at every object of the process: seldom needed
            if all(there() is None for there in self.given):
                return 0
            gc.collect(generation)
        return sum(there() is not None for there in self.given)


def four_bit(case: dict) -> FourBit:
    return FourBit(*(case[k].clone() for k in ("codes", "absmax", "levels")), case["block_size"])


def drawn_weight(rng: torch.Generator, d_out: int, d_in: int, block_size: int) -> dict[str, Any]:
    levels = torch.cat([torch.tensor([-1.0]), 1.8 * torch.rand(14, generator=rng) - 0.9, torch.tensor([1.0])]).sort().values
    return {"codes": torch.randint(0, 16, (d_out, d_in), generator=rng, dtype=torch.uint8),
            "absmax": 0.5 + 1.5 * torch.rand(d_out * d_in // block_size, generator=rng), "levels": levels,
            "block_size": block_size}


# ================================================================================================ qlora-forward

def forward_inputs(rng: torch.Generator) -> list[dict]:
    def case(lead: tuple[int, ...], d_in: int, d_out: int, r: int, alpha: float, bias: bool, block_size: int) -> dict:
        return {"x": randn(rng, *lead, d_in), "A": randn(rng, r, d_in), "B": randn(rng, d_out, r), "alpha": alpha,
                "bias": randn(rng, d_out) if bias else None, **drawn_weight(rng, d_out, d_in, block_size)}

    return [case((), 8, 3, 2, 3.0, True, 4), case((4,), 6, 8, 3, 16.0, True, 16), case((2, 3), 12, 4, 1, 2.0, True, 6),
            case((5,), 4, 7, 2, 5.0, False, 2)]


def forward_probe(work: Callable, case: dict) -> dict[str, Any]:
    x, A, B = (case[k].clone().requires_grad_() for k in ("x", "A", "B"))
    q = four_bit(case)
    y = work(x, q, A, B, case["alpha"], *([] if case["bias"] is None else [case["bias"].clone()]))
    return {"output": plain(y), "codes afterwards": q.codes.long(), **gradients(y, A=A, B=B, x=x)}


def forward_with(scale: Callable = lambda a, A, B: a / A.shape[0], weight: Callable = lambda q: q.dequantize(),
                 biased: bool = True, base: float = 1, update: float = 1, graph: bool = True) -> Callable:
    """x·dequantize(q)ᵀ + b + scale·BAx: right as it stands."""
    def work(x, q, A, B, alpha, bias=None):
        with torch.set_grad_enabled(graph):
            frozen = F.linear(x, weight(q), bias if biased else None)
            return base * frozen + update * scale(alpha, A, B) * (x @ A.T) @ B.T
    return work


def forward_rounded_update(x, q, A, B, alpha, bias=None):
    """Adds ΔW and puts the sum back on the 4-bit levels, block by block."""
    W = q.dequantize() + alpha / len(A) * B @ A
    return F.linear(x, back_to_levels(W, q), bias)


def back_to_levels(W: Tensor, q: FourBit) -> Tensor:
    blocks = W.reshape(-1, q.block_size)
    absmax = blocks.abs().amax(1, keepdim=True)
    codes = ((blocks / absmax)[..., None] - q.levels).abs().argmin(-1)
    return (q.levels[codes] * absmax).view(W.shape)


def forward_transposed(x, q, A, B, alpha, bias=None):
    return x @ q.dequantize() + alpha / len(A) * (x @ A.T) @ B.T


def forward_needs_bias(x, q, A, B, alpha, bias=None):
    return x @ q.dequantize().T + bias + alpha / len(A) * (x @ A.T) @ B.T


def forward_through_sum(x, q, A, B, alpha, bias=None):
    return F.linear(x, q.dequantize() + alpha / A.shape[0] * (B @ A), bias)


def forward_einsum(x, q, A, B, alpha, bias=None):
    y = torch.einsum("oi,...i->...o", q.dequantize(torch.float32), x)
    y = y + alpha / B.shape[1] * torch.einsum("or,ri,...i->...o", B, A, x)
    return y if bias is None else y + bias


QLORA_FORWARD = Exercise(
    name="qlora-forward", chapter=CHAPTER, title="The forward pass on four bits", points=2, minutes=5, difficulty=1,
    inputs=forward_inputs, probe=forward_probe, reference=forward_with(),
    mistakes={
        "base only": (forward_with(update=0),
            "This is the frozen road alone: the update (α/r)·BAx never reaches the output."),
        "adapter only": (forward_with(base=0),
            "This is the update alone. QLoRA adds it to x·Wᵀ + b, with W = q.dequantize()."),
        "codes as weights": (forward_with(weight=lambda q: q.codes.float()),
            "You multiply by the codes. A code is only the number of a level, 0 to 15; the weights that they stand for "
            "come from q.dequantize()."),
        "levels without absmax": (forward_with(weight=lambda q: q.levels[q.codes.long()]),
            "You look the levels up and leave out the absmax of each block. q.dequantize() does both."),
        "no scale": (forward_with(scale=lambda a, A, B: 1.0),
            "The scale α/r is missing from the update."),
        "alpha alone": (forward_with(scale=lambda a, A, B: a),
            "The update is multiplied by α; nothing divides by r. The scale is α/r."),
        "r from d_in": (forward_with(scale=lambda a, A, B: a / A.shape[1]),
            "You divide by A.shape[1], which is d_in. A is r × d_in, so r is A.shape[0]."),
        "scales everything": (lambda x, q, A, B, alpha, bias=None: alpha / len(A) * (F.linear(x, q.dequantize(), bias) + (x @ A.T) @ B.T),
            "The frozen road is scaled too. α/r belongs to the update alone."),
        "bias dropped": (forward_with(biased=False),
            "The bias is missing. F.linear(x, W, bias) adds it, and takes None as well."),
        "needs a bias": (forward_needs_bias,
            "bias may be None, and None cannot be added. F.linear(x, W, bias) takes both."),
        "update put on the levels": (forward_rounded_update,
            "The sum of W and ΔW has been rounded to sixteen levels again. In QLoRA only the frozen weight is in 4 bits: the "
            "update stays in full precision, on a road of its own."),
        "transposed": (forward_transposed,
            "Two shapes do not meet. The dequantized weight is [d_out, d_in], as PyTorch stores weights: x @ W.T, or "
            "F.linear(x, W)."),
        "no gradient": (forward_with(graph=False),
            "The numbers are right, and nothing can learn from them: under no_grad (or after .detach() or .data) no "
            "gradient reaches A and B, nor the layers below through x."),
    },
    alternatives={"through W + ΔW": forward_through_sum, "einsum": forward_einsum},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ what-stays

def stays_inputs(rng: torch.Generator) -> list[dict]:
    def case(d: int, wide: int, vocabulary: int, layers: int, tied: bool) -> dict:
        parts = [["embed_tokens", "embedding", vocabulary * d]]
        for i in range(layers):
            parts += [[f"layers.{i}.input_norm", "norm", d], [f"layers.{i}.q_proj", "linear", d * d],
                      [f"layers.{i}.v_proj", "linear", d * (d // 4)], [f"layers.{i}.up_proj", "linear", d * wide],
                      [f"layers.{i}.down_proj", "linear", wide * d]]
        return {"parts": [*parts, ["norm", "norm", d], ["lm_head", "linear", vocabulary * d]], "tied": tied}

    return [case(2048, 8192, 128_256, 1, True), case(4 * number(rng, 3, 40), number(rng, 30, 90), number(rng, 200, 900), 2, True),
            case(4 * number(rng, 3, 40), number(rng, 30, 90), number(rng, 200, 900), 3, False),
            case(4 * number(rng, 60, 90), 2 * number(rng, 200, 300) + 1, 1000, 1, False)]


def stays_probe(work: Callable, case: dict) -> dict[str, Any]:
    count = work([tuple(part) for part in case["parts"]], case["tied"])
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    return {"bytes": int(count) if isinstance(count, float) and count.is_integer() else count}


def nf4_bytes(n: int, double: bool = True, mean: bool = True) -> int:
    blocks = -(-n // 64)
    return -(-n // 2) + (blocks + 4 * -(-blocks // 256) + 4 * mean if double else 4 * blocks)


def stays_with(linear: Callable = nf4_bytes, head: Callable = lambda n: 2 * n, embedding: Callable = lambda n: 2 * n,
               norm: Callable = lambda n: 2 * n, once: bool = True, headless: bool = False) -> Callable:
    """Bytes of a QLoRA base with one rule exchanged: right as it stands."""
    def work(parts, tied):
        total = 0
        for name, kind, n in parts:
            if name == "lm_head":
                total += 0 if (tied and once) or headless else head(n)
            else:
                total += {"linear": linear, "embedding": embedding, "norm": norm}[kind](n)
        return total
    return work


def stays_one_matrix(parts, tied):
    inside = sum(n for name, kind, n in parts if kind == "linear" and name != "lm_head")
    rest = sum(n for name, kind, n in parts if kind != "linear" or (name == "lm_head" and not tied))
    return nf4_bytes(inside) + 2 * rest


def stays_of_tensors(parts, tied):
    kept = [n for name, kind, n in parts if (kind != "linear" or name == "lm_head") and not (tied and name == "lm_head")]
    inside = [n for name, kind, n in parts if kind == "linear" and name != "lm_head"]
    meta = [torch.empty(n, dtype=torch.bfloat16, device="meta") for n in kept]
    for n in inside:
        blocks = math.ceil(n / 64)
        meta += [torch.empty(math.ceil(n / 2) + blocks, dtype=torch.uint8, device="meta"),
                 torch.empty(math.ceil(blocks / 256) + 1, device="meta")]
    return sum(t.numel() * t.element_size() for t in meta)


def stays_by_sums(parts, tied):
    sixteen = sum(n for name, kind, n in parts if kind in ("embedding", "norm") or (name == "lm_head" and not tied))
    fours = [n for name, kind, n in parts if kind == "linear" and name != "lm_head"]
    return 2 * sixteen + sum(math.ceil(n / 2) + math.ceil(n / 64) + 4 * math.ceil(n / 64 / 256) + 4 for n in fours)


WHAT_STAYS = Exercise(
    name="what-stays", chapter=CHAPTER, title="What stays in 16 bits, and what it weighs", points=3, minutes=10, difficulty=2,
    inputs=stays_inputs, probe=stays_probe, reference=stays_with(),
    mistakes={
        "all in four bits": (stays_with(head=nf4_bytes, embedding=nf4_bytes, norm=nf4_bytes),
            "Everything is counted in 4 bits here. Embedding, norms and the output head keep 16 bits: two bytes a number."),
        "the head too": (stays_with(head=nf4_bytes),
            "The output head is counted in 4 bits. It is a linear layer, and QLoRA leaves it alone: its errors would go "
            "straight into the logits."),
        "no case for the head": (stays_with(head=nf4_bytes, once=False),
            "The head is treated as any other linear layer, in 4 bits and always counted. Ask for the name \"lm_head\" first: "
            "16 bits, or nothing where it is tied to the embedding."),
        "one matrix": (stays_one_matrix,
            "You add up the linear layers' numbers and count them as one matrix. Each layer is quantized by itself: its counts "
            "are rounded up, and its mean takes four bytes, layer by layer."),
        "the embedding too": (stays_with(embedding=nf4_bytes),
            "The embedding is counted in 4 bits. It is a table to look up in, no linear layer, and stays in 16 bits."),
        "the norms too": (stays_with(norm=nf4_bytes),
            "The norms are counted in 4 bits. They are few and sensitive, and stay in 16 bits."),
        "tied counted twice": (stays_with(once=False),
            "With tied=True the head **is** the embedding: one tensor, and it is counted once."),
        "head never counted": (stays_with(headless=True),
            "The head is left out also where tied=False. Then it is a matrix of its own, and counts."),
        "half a byte": (stays_with(linear=lambda n: -(-n // 2)),
            "A linear weight is half a byte here. The absmaxes are stored too: with double quantization one byte for every 64 "
            "weights, four for every 256 of those, and four for the mean."),
        "4.5 bits": (stays_with(linear=lambda n: nf4_bytes(n, double=False)),
            "You count four bytes for each absmax. With double quantization it is one byte, and a float32 for every 256 of "
            "them."),
        "mean forgotten": (stays_with(linear=lambda n: nf4_bytes(n, mean=False)),
            "For each matrix four bytes are missing: the mean that double quantization took off the absmaxes."),
        "32 bits": (stays_with(head=lambda n: 4 * n, embedding=lambda n: 4 * n, norm=lambda n: 4 * n),
            "What is not quantized takes four bytes a number here. It stays in 16 bits: two."),
        "16 bits throughout": (stays_with(linear=lambda n: 2 * n),
            "This is the model in 16 bits. The linear layers inside of it are what QLoRA stores in 4."),
        "only what is quantized": (stays_with(head=lambda n: 0, embedding=lambda n: 0, norm=lambda n: 0),
            "These are the 4-bit layers alone. What stays in 16 bits is in memory too."),
    },
    alternatives={"from tensors": stays_of_tensors, "two sums": stays_by_sums},
    accepts="function", hides=HIDES)


# ================================================================================================ qlora-backward

def backward_inputs(rng: torch.Generator) -> list[dict]:
    def case(lead: tuple[int, ...], d_in: int, d_out: int, r: int, alpha: float, block_size: int) -> dict:
        return {"g": randn(rng, *lead, d_out), "x": randn(rng, *lead, d_in), "A": randn(rng, r, d_in),
                "B": randn(rng, d_out, r), "alpha": alpha, **drawn_weight(rng, d_out, d_in, block_size)}

    return [case((1,), 4, 3, 2, 3.0, 4), case((5,), 6, 8, 3, 16.0, 16), case((2, 3), 10, 4, 1, 2.0, 8),
            case((number(rng, 2, 5), number(rng, 2, 5)), 8, 6, 2, 5.0, 16)]


def backward_probe(work: Callable, case: dict) -> dict[str, Any]:
    g, x, A, B = (case[k].clone() for k in ("g", "x", "A", "B"))
    given = work(g, x, four_bit(case), A, B, case["alpha"])
    names = ("dx", "dA", "dB")
    if given is None or given is ... or (isinstance(given, tuple) and given and all(part is ... for part in given)):
        return dict.fromkeys(names, given if given is None else ...)
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        came = f"{len(given)} things" if isinstance(given, (tuple, list)) else f"one {type(given).__name__}"
        raise TypeError(f"return dx, dA, dB, in this order: 3 results; {came} came back")
    return {name: plain(part) for name, part in zip(names, given)}


def backward_with(dx: Callable = lambda g, x, W, A, B, s: g @ W + s * (g @ B) @ A,
                  dA: Callable = lambda g, x, W, A, B, s: s * (g @ B).T @ x,
                  dB: Callable = lambda g, x, W, A, B, s: s * g.T @ (x @ A.T),
                  scale: Callable = lambda a, A: a / A.shape[0], order: tuple[int, ...] = (0, 1, 2)) -> Callable:
    """The three gradients with one exchanged: right as it stands."""
    def work(g, x, q, A, B, alpha):
        W, s = q.dequantize(), scale(alpha, A)
        rows = (g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1]), W, A, B, s)
        found = (dx(*rows).reshape(x.shape), dA(*rows), dB(*rows))
        return tuple(found[i] for i in order)
    return work


def backward_not_flat(g, x, q, A, B, alpha):
    s = alpha / len(A)
    return g @ q.dequantize() + s * (g @ B) @ A, s * (g @ B).transpose(-1, -2) @ x, s * g.transpose(-1, -2) @ (x @ A.T)


def backward_means(g, x, q, A, B, alpha):
    dx, dA, dB = backward_with()(g, x, q, A, B, alpha)
    n = g.shape[:-1].numel()
    return dx, dA / n, dB / n


def backward_old_transpose(g, x, q, A, B, alpha):
    s = alpha / len(A)
    return g @ q.dequantize() + s * (g @ B) @ A, s * (g @ B).T @ x, s * g.T @ (x @ A.T)


def backward_einsum(g, x, q, A, B, alpha):
    s = alpha / len(A)
    gb = torch.einsum("...o,or->...r", g, B)
    return (torch.einsum("...o,oi->...i", g, q.dequantize()) + s * torch.einsum("...r,ri->...i", gb, A),
            s * torch.einsum("...r,...i->ri", gb, x),
            s * torch.einsum("...o,...r->or", g, torch.einsum("...i,ri->...r", x, A)))


def backward_through_delta(g, x, q, A, B, alpha):
    s = alpha / len(A)
    G = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])        # what W would get
    return g @ (q.dequantize() + s * B @ A), s * B.T @ G, s * G @ A.T


def backward_loop(g, x, q, A, B, alpha):
    W, s = q.dequantize(), alpha / len(A)
    dA, dB, dx = torch.zeros_like(A), torch.zeros_like(B), []
    for go, xi in zip(g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])):
        dA += s * torch.outer(B.T @ go, xi)
        dB += s * torch.outer(go, A @ xi)
        dx.append(W.T @ go + s * A.T @ (B.T @ go))
    return torch.stack(dx).view(x.shape), dA, dB


QLORA_BACKWARD = Exercise(
    name="qlora-backward", chapter=CHAPTER, title="The backward pass by hand", points=4, minutes=20, difficulty=3,
    inputs=backward_inputs, probe=backward_probe, reference=backward_with(),
    mistakes={
        "dx through W only": (backward_with(dx=lambda g, x, W, A, B, s: g @ W),
            "dx comes back through the frozen road only. x went into both roads, so both send something back: g·W and "
            "(α/r)·(g·B)·A."),
        "dx through the adapter only": (backward_with(dx=lambda g, x, W, A, B, s: s * (g @ B) @ A),
            "dx comes back through the adapter only. That W is frozen means that W gets no gradient; the gradient still "
            "passes **through** it, g·W."),
        "dx with Wᵀ": (lambda g, x, q, A, B, alpha: (g @ q.dequantize().T, None, None),
            "Two shapes do not meet in dx. Forward multiplies by Wᵀ ([d_in, d_out]); backward multiplies by W itself."),
        "scale missing": (backward_with(scale=lambda a, A: 1.0),
            "The scale α/r is missing. It stands in front of BAx in the forward, so it is in all three gradients."),
        "scale missing in dx": (backward_with(dx=lambda g, x, W, A, B, s: g @ W + (g @ B) @ A),
            "The scale α/r is missing in dx: what comes back through the adapter is (α/r)·(g·B)·A."),
        "scale on all of dx": (backward_with(dx=lambda g, x, W, A, B, s: s * (g @ W + (g @ B) @ A)),
            "In dx the frozen road's share is scaled as well. α/r belongs to the adapter's."),
        "scale missing in dA": (backward_with(dA=lambda g, x, W, A, B, s: (g @ B).T @ x),
            "The scale α/r is missing in dA."),
        "scale missing in dB": (backward_with(dB=lambda g, x, W, A, B, s: g.T @ (x @ A.T)),
            "The scale α/r is missing in dB."),
        "scale twice": (backward_with(dA=lambda g, x, W, A, B, s: s * s * (g @ B).T @ x,
                                      dB=lambda g, x, W, A, B, s: s * s * g.T @ (x @ A.T)),
            "The scale α/r is in dA and dB twice. It stands in the forward once, and so it does in each derivative."),
        "r from d_in": (backward_with(scale=lambda a, A: a / A.shape[1]),
            "You divide α by A.shape[1], which is d_in. r is A.shape[0]."),
        "A transposed": (backward_with(dA=lambda g, x, W, A, B, s: (s * (g @ B).T @ x).T),
            "dA is the wrong way round. A gradient has the shape of its parameter: [r, d_in]."),
        "B transposed": (backward_with(dB=lambda g, x, W, A, B, s: (s * g.T @ (x @ A.T)).T),
            "dB is the wrong way round. A gradient has the shape of its parameter: [d_out, r]."),
        "order": (backward_with(order=(1, 2, 0)),
            "The order is dx, dA, dB; yours begins with dA."),
        "batch not summed": (backward_not_flat,
            "dA and dB have a dimension too many where x is a batch of sequences. All rows share one A and one B, so their "
            "gradients are summed: flatten g and x to [rows, width] first."),
        ".T of a batch": (backward_old_transpose,
            ".T turns **all** dimensions round, so with more than one leading dimension the shapes no longer meet. "
            "Flatten g and x to [rows, width] for dA and dB; then .T is the transpose you mean."),
        "mean over rows": (backward_means,
            "dA and dB are averaged over the rows. They are sums: whether the loss is a mean is in g already."),
    },
    alternatives={"einsum": backward_einsum, "through the gradient of W": backward_through_delta, "row by row": backward_loop},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ compute-dtype

def dtype_inputs(rng: torch.Generator) -> list[dict]:
    def case(lead: tuple[int, ...], d_out: int, r: int, alpha: float, dtype: str) -> dict:
        d_in = 8
        size = (*lead, d_in)
        # quarters, and a little more that 16 bits cannot hold
        x = whole(rng, 1, 9, *size) / 4 * (2 * whole(rng, 0, 2, *size) - 1) * (1 + 2.0 ** -13 * (1 - 2 * torch.rand(*size, generator=rng)))
        return {"x": x, "A": randn(rng, r, d_in), "B": randn(rng, d_out, r), "alpha": alpha, "dtype": dtype,
                "codes": torch.randint(0, 9, (d_out, d_in), generator=rng, dtype=torch.uint8), "block_size": 4,
                "absmax": 2.0 ** whole(rng, -1, 1, 2 * d_out),
                "levels": torch.tensor(QUARTERS) * (1 + 2.0 ** -13 * (1 - 2 * torch.rand(9, generator=rng)))}

    return [case((3,), 5, 2, 3.0, "bfloat16"), case((2, 4), 7, 3, 16.0, "bfloat16"), case((4,), 6, 1, 2.0, "float16"),
            case((6,), 9, 2, 5.0, "float32")]


def dtype_probe(work: Callable, case: dict) -> dict[str, Any]:
    x, A, B = (case[k].clone() for k in ("x", "A", "B"))
    y = work(x, four_bit(case), A, B, case["alpha"], getattr(torch, case["dtype"]))
    return {"output": plain(y)}


def dtype_with(frozen: Callable = lambda x, q, t: F.linear(x.to(t), q.dequantize(dtype=t)),
               update: Callable = lambda x, A, B, t: (x @ A.T) @ B.T, out: Callable = lambda y, s, x, t: y.to(x.dtype) + s) -> Callable:
    """The frozen road in one dtype, the update in its own: right as it stands."""
    def work(x, q, A, B, alpha, compute_dtype):
        return out(frozen(x, q, compute_dtype), alpha / len(A) * update(x, A, B, compute_dtype), x, compute_dtype)
    return work


def dtype_transposed(x, q, A, B, alpha, compute_dtype):
    W = q.dequantize(compute_dtype).mT
    y = (x.to(dtype=compute_dtype) @ W).float()
    return y.add((x @ A.T @ B.T).mul(alpha / A.shape[0]))


def dtype_exact(x, q, A, B, alpha, compute_dtype):
    """Rounds in 16 bits, multiplies in 32, rounds the result: what a matrix unit does."""
    def rounded(t):
        return t.to(compute_dtype).float()
    return rounded(rounded(x) @ rounded(q.dequantize()).T) + (B @ (A @ x.mT)).mT * (alpha / len(A))


COMPUTE_DTYPE = Exercise(
    name="compute-dtype", chapter=CHAPTER, title="Which road in which dtype", points=2, minutes=10, difficulty=2,
    inputs=dtype_inputs, probe=dtype_probe, reference=dtype_with(),
    mistakes={
        "float32 throughout": (dtype_with(frozen=lambda x, q, t: F.linear(x, q.dequantize())),
            "The frozen road is computed in float32: compute_dtype is not used. x and the dequantized weight are cast to it "
            "before they are multiplied."),
        "compute_dtype throughout": (dtype_with(update=lambda x, A, B, t: (x.to(t) @ A.to(t).T) @ B.to(t).T),
            "The update is computed in compute_dtype too. A and B are float32, and their road stays in float32: in 16 bits "
            "small steps of the optimizer would be rounded away."),
        "all in compute_dtype": (lambda x, q, A, B, alpha, t: (F.linear(x.to(t), q.dequantize(dtype=t)) + alpha / len(A) * (
                x.to(t) @ A.to(t).T) @ B.to(t).T).to(x.dtype),
            "Both roads and their sum are computed in compute_dtype, and cast back at the end. Only the frozen road is: A and "
            "B work in float32 on x as it came in, and the sum is in the dtype of x."),
        "adapter on the rounded x": (dtype_with(update=lambda x, A, B, t: (x.to(t).float() @ A.T) @ B.T),
            "The adapter gets the x that was rounded for the frozen road. It gets x as it came in."),
        "left in 16 bits": (dtype_with(out=lambda y, s, x, t: y + s.to(t)),
            "The result is left in compute_dtype. It is given back in the dtype of x, so that the next layer gets what "
            "it expects."),
        "sum in 16 bits": (dtype_with(out=lambda y, s, x, t: (y + s.to(t)).to(x.dtype)),
            "The sum of the two roads is rounded to compute_dtype, and so is the update with it. Cast the frozen road's "
            "result to x's dtype first, then add."),
        "always bfloat16": (dtype_with(frozen=lambda x, q, t: F.linear(x.bfloat16(), q.dequantize(dtype=torch.bfloat16))),
            "bfloat16 is written into your function. The dtype is an argument: a T4 has no bfloat16, and computes in "
            "float16."),
        "only the weight": (dtype_with(frozen=lambda x, q, t: F.linear(x, q.dequantize(dtype=t).float())),
            "Only the weight is in compute_dtype; x still has 32 bits in the product. Both are cast."),
        "rounded afterwards": (dtype_with(frozen=lambda x, q, t: F.linear(x, q.dequantize()).to(t)),
            "You multiply in float32 and round the result. compute_dtype is what to multiply **in**: that is where "
            "the speed comes from."),
        "two dtypes meet": (dtype_with(frozen=lambda x, q, t: F.linear(x, q.dequantize(dtype=t))),
            "Two dtypes meet in one product, and PyTorch refuses. Cast x to compute_dtype as well."),
    },
    alternatives={"@ and mT": dtype_transposed, "as a matrix unit": dtype_exact},
    rtol=1e-5, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ qlora-layer

def layer_inputs(rng: torch.Generator) -> list[dict]:
    def case(lead: tuple[int, ...], d_in: int, d_out: int, r: int, alpha: float, block_size: int) -> dict:
        return {"x": randn(rng, *lead, d_in), "A": randn(rng, r, d_in), "B": randn(rng, d_out, r), "r": r, "alpha": alpha,
                "seed": int(torch.randint(0, 2**31, (), generator=rng)), **drawn_weight(rng, d_out, d_in, block_size)}

    return [case((3,), 8, 6, 2, 3.0, 16), case((2, 3), 12, 10, 3, 16.0, 8), case((4,), 6, 14, 1, 2.0, 4)]


def layer_probe(work: Callable, case: dict) -> dict[str, Any]:
    q = four_bit(case)
    torch.manual_seed(case["seed"])
    layer = work(q, case["r"], case["alpha"])
    if not isinstance(layer, nn.Module):
        raise TypeError(f"QLoRALayer makes a {type(layer).__name__}, which is no nn.Module")
    trainable = [p for p in layer.parameters() if p.requires_grad]
    A, B = layer_find(trainable, case["A"]), layer_find(trainable, case["B"])
    if A is None or B is None:
        shapes = ", ".join(str(list(p.shape)) for p in trainable) or "none at all"
        raise ValueError(f"what trains in the layer should be A (r × d_in, here {list(case['A'].shape)}) and B (d_out × r, here "
                         f"{list(case['B'].shape)}); it is {shapes}")
    y = layer(case["x"])
    leaves: dict[str, Any] = {"output at the start": plain(y), "trainable parameters": sum(p.numel() for p in trainable),
                              "A at the start": A.detach().clone(),
                              "B at the start": B.detach().clone()}
    with torch.no_grad():
        for parameter, value in ((A, case["A"]), (B, case["B"])):
            parameter.copy_(value if parameter.shape == value.shape else value.T)
    q.given.clear()
    leaves["dequantized weights in memory before the forward"] = q.alive() + layer_full_size(layer, q)
    x = case["x"].clone().requires_grad_()
    kept: list[int] = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    leaves["output"] = plain(y)
    leaves["dequantized weights that wait for the backward"] = q.alive()
    leaves["tensors of that size that autograd keeps"] = sum(n == q.shape.numel() for n in kept)
    found = gradients(y, A=A, B=B, x=x)
    for name, tensor, value in (("gradient of A", A, case["A"]), ("gradient of B", B, case["B"])):
        if isinstance(found[name], Tensor) and tensor.shape != value.shape:
            found[name] = found[name].T
    return {**leaves, **found}


def layer_reading(data: dict[str, Any], case: dict) -> dict[str, Any]:
    """The start of A is random, so what must hold of it is said of what the work drew."""
    leaves = dict(data)
    A, B = leaves.pop("A at the start"), leaves.pop("B at the start")
    return {"output at the start": leaves.pop("output at the start"), "largest entry of B at the start": B.abs().max().item(),
            "A is zero everywhere at the start": not A.any().item(), **leaves}


def layer_find(tensors: list[Tensor], like: Tensor) -> Tensor | None:
    return next((t for t in tensors if t.shape == like.shape or t.shape == like.T.shape), None)


def layer_full_size(layer: nn.Module, q: FourBit) -> int:
    """How many floating-point tensors of the weight's size the layer holds, as parameters, buffers or attributes."""
    held = [*layer.parameters(), *layer.buffers()]
    held += [value for module in layer.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return sum(t.is_floating_point() and t.numel() == q.shape.numel() for t in held)


class Frozen(torch.autograd.Function):
    """x·dequantize(q)ᵀ that keeps q alone for the backward, and there dequantizes once more."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return F.linear(x, q.dequantize())

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.q.dequantize(), None


class FrozenKept(torch.autograd.Function):
    """Right gradients; the dequantized weight waits on ctx."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.W = q.dequantize()
        return F.linear(x, ctx.W)

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.W, None


class FrozenTransposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return F.linear(x, q.dequantize())

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.q.dequantize().T, None


class FrozenCodes(torch.autograd.Function):
    """Backward by the codes instead of the weights."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return F.linear(x, q.dequantize())

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.q.codes.float(), None


class FrozenOneGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return F.linear(x, q.dequantize())

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.q.dequantize()


class Layer(nn.Module):
    """The layer with a switch for each thing that can go wrong; with all of them off it is right."""

    def frozen(self, x):
        return Frozen.apply(x, self.q)

    @staticmethod
    def scale(alpha, r):
        return alpha / r

    a_zero = False
    b_random = False
    bias = False

    def __init__(self, q, r, alpha):
        super().__init__()
        d_out, d_in = q.shape
        self.q, self.s = q, self.scale(alpha, r)
        self.A = nn.Parameter(torch.zeros(r, d_in) if self.a_zero else torch.randn(r, d_in) / math.sqrt(3 * d_in))
        self.B = nn.Parameter(torch.randn(d_out, r) if self.b_random else torch.zeros(d_out, r))
        if self.bias:
            self.b = nn.Parameter(torch.zeros(d_out))

    def forward(self, x):
        y = self.frozen(x) + self.s * (x @ self.A.T) @ self.B.T
        return y + self.b if self.bias else y


def layer_like(**what) -> type:
    return type("QLoRALayer", (Layer,), what)


class LayerWithW(Layer):
    """Dequantizes once, in __init__."""

    def __init__(self, q, r, alpha):
        super().__init__(q, r, alpha)
        self.W = q.dequantize()

    def frozen(self, x):
        return F.linear(x, self.W)


class LayerTrainsW(Layer):
    def __init__(self, q, r, alpha):
        super().__init__(q, r, alpha)
        self.W = nn.Parameter(q.dequantize())

    def frozen(self, x):
        return F.linear(x, self.W)


class LayerChecked(nn.Module):
    """Lets torch's checkpoint compute the frozen road a second time."""

    def __init__(self, q, r, alpha):
        super().__init__()
        self.q, self.s = q, alpha / r
        self.lora_A = nn.Linear(q.shape[1], r, bias=False)
        self.lora_B = nn.Linear(r, q.shape[0], bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        frozen = checkpoint(lambda rows: F.linear(rows, self.q.dequantize()), x, use_reentrant=False)
        return frozen + self.s * self.lora_B(self.lora_A(x))


class Whole(torch.autograd.Function):
    """Both roads in one node, with all gradients by hand."""

    @staticmethod
    def forward(ctx, x, A, B, q, s):
        ctx.save_for_backward(x, A, B)
        ctx.q, ctx.s = q, s
        return x @ q.dequantize().T + s * (x @ A.T) @ B.T

    @staticmethod
    def backward(ctx, g):
        x, A, B = ctx.saved_tensors
        rows, ins = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = g @ ctx.q.dequantize() + ctx.s * (g @ B) @ A
        return dx, ctx.s * (rows @ B).T @ ins, ctx.s * rows.T @ (ins @ A.T), None, None


class LayerWhole(Layer):
    def forward(self, x):
        return Whole.apply(x, self.A, self.B, self.q, self.s)


QLORA_LAYER = Exercise(
    name="qlora-layer", chapter=CHAPTER, title="A layer that keeps nothing of full size", points=5, minutes=20, difficulty=3,
    inputs=layer_inputs, probe=layer_probe, reading=layer_reading, reference=Layer,
    mistakes={
        "autograd keeps W": (layer_like(frozen=lambda self, x: F.linear(x, self.q.dequantize())),
            "Output and gradients are right, and the memory is not saved: autograd keeps the dequantized weight of every layer "
            "until the backward pass, because the gradient of x needs it. Write a torch.autograd.Function that keeps q "
            "(ctx.q = q) and dequantizes a second time in backward."),
        "W kept on ctx": (layer_like(frozen=lambda self, x: FrozenKept.apply(x, self.q)),
            "Your Function stores the dequantized weight on ctx (or saves it for backward). Then it waits there in full size. Keep q, which "
            "is in memory anyway, and call q.dequantize() again in backward."),
        "W kept in the layer": (LayerWithW,
            "The layer holds the dequantized weight all the time. Then nothing is left of the 4 bits: dequantize in the "
            "forward, use it, and let it go."),
        "W trains": (LayerTrainsW,
            "The dequantized weight is a parameter of the layer and trains. It is frozen, and in 4 bits: only A and B are "
            "parameters."),
        "frozen road detached": (layer_like(frozen=lambda self, x: F.linear(x.detach(), self.q.dequantize())),
            "The frozen road sends nothing back to x (no_grad, detach, or a backward that returns None): A and B of this layer learn, and the layers below "
            "get only what comes back through the adapter. x needs g·W too."),
        "backward with Wᵀ": (layer_like(frozen=lambda self, x: FrozenTransposed.apply(x, self.q)),
            "Two shapes do not meet in your backward. Forward is x·Wᵀ; the gradient of x is g·W, without the transpose."),
        "backward with codes": (layer_like(frozen=lambda self, x: FrozenCodes.apply(x, self.q)),
            "The gradient of x is computed with the codes. They are numbers of levels: dequantize in backward as well."),
        "no scale": (layer_like(scale=staticmethod(lambda a, r: 1.0)),
            "The scale α/r is missing from the update."),
        "alpha alone": (layer_like(scale=staticmethod(lambda a, r: a)),
            "The update is multiplied by α alone; the scale is α/r."),
        "B random": (layer_like(b_random=True),
            "At the start the output is not that of the quantized layer: B has to be zero."),
        "A zero, B random": (layer_like(a_zero=True, b_random=True),
            "A starts at zero and B at random. The output at the start is right that way too; the paper, PEFT and this course "
            "have it the other way round, and whoever loads your layer relies on it: A random, B zero."),
        "both zero": (layer_like(a_zero=True),
            "A and B are both zero. Each factor's gradient is multiplied by the other factor, so neither would ever move. Draw "
            "A at random."),
        "one gradient returned": (layer_like(frozen=lambda self, x: FrozenOneGradient.apply(x, self.q)),
            "backward returns one thing, and forward has two arguments, x and q. It returns one gradient for each: None for "
            "what has none."),
        "called instead of applied": (layer_like(frozen=lambda self, x: Frozen(x, self.q)),
            "A Function is not called like a layer. Use its apply: FrozenProduct.apply(x, self.q)."),
        "a bias trains": (layer_like(bias=True),
            "There are d_out trainable numbers too many: a bias. LoRA trains A and B and nothing else."),
        "adapter only": (layer_like(frozen=lambda self, x: 0 * Frozen.apply(x, self.q)),
            "The output is that of the adapter alone. Add it to x·dequantize(q)ᵀ."),
    },
    alternatives={"torch's checkpoint": LayerChecked, "one node for both roads": LayerWhole},
    rtol=1e-4, atol=1e-5, accepts="class", hides=HIDES)


# ================================================================================================ quantize-model

class Rounded(nn.Module):
    """What `make` gives for a layer: a stand-in for a 4-bit layer that holds whole numbers and a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("row_scale", scale)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes * self.row_scale, self.bias)


class Block(nn.Module):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        d = weights["q_proj"].shape[0]
        self.input_norm = nn.LayerNorm(d)
        self.attn = nn.Module()
        self.attn.q_proj, self.attn.o_proj = as_linear(weights["q_proj"]), as_linear(weights["o_proj"])
        self.mlp_head = as_linear(weights["up"])           # its name ends in letters of a name that is kept
        self.heads_out = as_linear(weights["down"], weights["bias"])   # and this one contains them

    def forward(self, x: Tensor) -> Tensor:
        h = self.input_norm(x)
        x = x + self.attn.o_proj(torch.tanh(self.attn.q_proj(h)))
        return x + self.heads_out(torch.relu(self.mlp_head(x)))


class Toy(nn.Module):
    """A small language model of the usual parts."""

    def __init__(self, case: dict) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(case["embed"].clone(), freeze=False)
        self.layers = nn.ModuleList(Block(weights) for weights in case["layers"])
        self.norm = nn.LayerNorm(case["embed"].shape[1])
        self.head = as_linear(case["head"])
        if case["tied"]:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def as_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def model_inputs(rng: torch.Generator) -> list[dict]:
    def case(d: int, wide: int, words: int, layers: int, tied: bool, keep: list[str], copied: bool = False) -> dict:
        table = randn(rng, words, d)
        return {"embed": table, "head": table.clone() if copied else randn(rng, words, d), "tied": tied, "keep": keep,
                "ids": torch.randint(0, words, (2, 3), generator=rng),
                "layers": [{"q_proj": randn(rng, d, d), "o_proj": randn(rng, d, d), "up": randn(rng, wide, d),
                            "down": randn(rng, d, wide), "bias": randn(rng, d)} for _ in range(layers)]}

    return [case(4, 6, 9, 1, False, ["head"]), case(6, 8, 7, 2, False, ["head", "attn.o_proj"]), case(4, 5, 8, 2, True, []),
            case(5, 7, 11, 2, True, ["layers.0.heads_out"]),
            # the head's numbers are the embedding's and its tensor is its own; mlp_head has the embedding's shape
            case(4, 6, 6, 1, False, [], copied=True), case(6, 4, 8, 1, False, ["attn.q_proj"])]


def model_probe(work: Callable, case: dict) -> dict[str, Any]:
    model = Toy(case)
    work(model, Rounded, list(case["keep"]))
    modules = dict(model.named_modules())
    return {"layers that were quantized": sorted(name for name, module in modules.items() if type(module) is Rounded),
            "linear layers that were left": sorted(name for name, module in modules.items() if type(module) is nn.Linear),
            "parameters that train": sorted(name for name, p in model.named_parameters() if p.requires_grad),
            "output": plain(model(case["ids"]))}


def model_with(kept: Callable = lambda name, key: name == key or name.endswith("." + key),
               tied: Callable = lambda weight, tables: any(weight is table for table in tables), freeze: bool = True,
               which: Callable = lambda name, module: type(module) is nn.Linear,
               walk: Callable = lambda model: model.named_modules(), give: Callable = lambda make, layer: make(layer),
               dotted: bool = False, on_top: bool = False, first: bool = False, inverted: bool = False,
               rest_trains: bool = False) -> Callable:
    """Quantize a model with one step exchanged: right as it stands."""
    def work(model, make, keep):
        if freeze:
            model.requires_grad_(False)
        tables = [module.weight for module in model.modules() if type(module) is nn.Embedding]
        linear = [(name, module) for name, module in walk(model) if which(name, module)]
        found = [(name, module) for name, module in linear
                 if any(kept(name, key) for key in keep) == inverted and not tied(module.weight, tables)]
        for name, module in found[:1] if first else found:
            parent, _, child = name.rpartition(".")
            place = model if dotted or on_top else model.get_submodule(parent)
            setattr(place, name if dotted else child, give(make, module))
        if rest_trains:
            for name, module in linear:
                module.requires_grad_((name, module) not in found)
    return work


def random_layer(layer: nn.Linear) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)


def nf4_layer(layer: nn.Linear) -> nn.Module:
    from pefttools.qlora import NF4Linear

    return NF4Linear(layer)


def model_by_the_library(model, make, keep):
    from pefttools.qlora import quantize_model

    quantize_model(model, skip=keep)


def model_by_walking(model, make, keep):
    """Recursion over children, the tied weight known by its storage."""
    tables = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding)}

    def walk(module, path):
        for name, child in list(module.named_children()):
            here = [*path, name]
            if isinstance(child, nn.Linear):
                if child.weight.data_ptr() not in tables and not any(here[-len(k.split(".")):] == k.split(".") for k in keep):
                    setattr(module, name, make(child))
            else:
                walk(child, here)

    walk(model, [])
    for p in model.parameters():
        p.requires_grad = False


def model_by_set_submodule(model, make, keep):
    embedded = [m.weight for m in model.modules() if type(m) is nn.Embedding]
    for name, module in list(model.named_modules()):
        stays = any(("." + name).endswith("." + key) for key in keep)
        if isinstance(module, nn.Linear) and not stays and not any(module.weight is w for w in embedded):
            model.set_submodule(name, make(module))
    model.requires_grad_(False)


QUANTIZE_MODEL = Exercise(
    name="quantize-model", chapter=CHAPTER, title="Quantize a model, layer by layer", points=4, minutes=15, difficulty=3,
    inputs=model_inputs, probe=model_probe, reference=model_with(),
    mistakes={
        "the head too": (model_with(kept=lambda name, key: False),
            "Layers that `keep` names were quantized too, the output head among them. A layer is kept if its path is in `keep`, or ends in "
            "\".\" + a name of it."),
        "the tied head": (model_with(tied=lambda weight, tables: False),
            "A head whose weight is also the embedding's was quantized. Then the model holds a second, rounded copy of the table and "
            "nothing is saved. Leave out a layer whose weight `is` that of an nn.Embedding."),
        "tied by `in` or ==": (model_with(tied=lambda weight, tables: weight in tables),
            "`in` and `==` compare the numbers of two tensors, and these have not even one shape. Whether it is "
            "the very same tensor, `is` says: any(layer.weight is table for table in tables)."),
        "tied by its shape": (model_with(tied=lambda weight, tables: weight.shape in [table.shape for table in tables]),
            "A layer was left out because its weight has the shape of an embedding. Another matrix can have that "
            "too. It is tied if it `is` the embedding's tensor."),
        "tied by its numbers": (model_with(tied=lambda weight, tables: any(torch.equal(weight, t) for t in tables)),
            "A head was left out because its numbers equal the embedding's. It is a tensor of its own here, so 4 "
            "bits would save its memory. It is tied only if it `is` the embedding's tensor."),
        "the head by its name": (model_with(which=lambda name, module: type(module) is nn.Linear and name != "head"),
            "The head was left out also where `keep` does not name it and its weight is its own. Only two things "
            "keep a layer: `keep`, and a weight that `is` an embedding's. A name in your code fits one model."),
        "asks the model": (lambda model, make, keep: model.get_input_embeddings(),
            "You ask the model for its embedding by a method that models of transformers have. This is any "
            "nn.Module: look for nn.Embedding among model.modules()."),
        "kept by its last letters": (model_with(kept=lambda name, key: name.endswith(key)),
            "\"layers.0.mlp_head\" ends in the letters \"head\" and is another layer. Compare whole names: equal, or ending in "
            "\".\" + name."),
        "kept by a part": (model_with(kept=lambda name, key: key in name),
            "A layer was kept because a name of `keep` is somewhere inside its path. Compare whole names at the path's end: "
            "\"layers.0.mlp_head\" is not \"head\", and what is below a kept name is not meant."),
        "exact names only": (model_with(kept=lambda name, key: name == key),
            "You compare a whole path, or its beginning. A name in `keep` may be the **end** of a path: "
            "\"attn.o_proj\" means that layer in every block."),
        "its own name only": (model_with(kept=lambda name, key: name.split(".")[-1] == key),
            "You compare a layer's own name, the last part of its path. A name in `keep` may have several parts "
            "(\"attn.o_proj\", \"layers.0.heads_out\"): compare the whole path. A recursion has to hand the path "
            "down."),
        "its own name, and tied": (model_with(kept=lambda name, key: name.split(".")[-1] == key,
                                              tied=lambda weight, tables: False),
            "Two things. You compare a layer's own name, where a name in `keep` may have several parts "
            "(\"attn.o_proj\"): compare the whole path. And a head whose weight `is` the embedding's was quantized: "
            "leave it out."),
        "only below another": (model_with(kept=lambda name, key: name.endswith("." + key)),
            "A layer at the top has no \".\" before its name: the path \"head\" is in `keep` and was quantized. "
            "Equal to the name, **or** ending in \".\" + name."),
        "inverted": (model_with(inverted=True),
            "You quantized the layers that `keep` names. They are the ones to leave alone; all others are quantized."),
        "not frozen": (model_with(freeze=False),
            "Embedding, norms or head still train. QLoRA's base is frozen, all of it: model.requires_grad_(False), "
            "with the underscore. (no_grad freezes nothing.)"),
        "what is kept trains": (model_with(rest_trains=True),
            "The layers that were not quantized still train. Left in 16 bits does not mean trained: **every** "
            "parameter of the base is frozen."),
        "first level only": (model_with(walk=lambda model: model.named_children()),
            "Only the first level was looked at. named_modules() goes all the way down."),
        "first only": (model_with(first=True),
            "Only the first layer was quantized. Go on with the others."),
        "attention only": (model_with(which=lambda name, module: type(module) is nn.Linear and "attn" in name),
            "Only attention was quantized. The feed-forward layers hold most of the weights, and are linear too."),
        "the embedding too": (model_with(which=lambda name, module: type(module) in (nn.Linear, nn.Embedding),
                                         tied=lambda weight, tables: False),
            "You gave make() an nn.Embedding. It is a table to look up in, no linear layer, and stays as it is: only "
            "nn.Linear goes to make()."),
        "set with dots": (model_with(dotted=True),
            "The new layers hang on the model under names with dots, and the forward never comes past them. Set the attribute on "
            "the parent: model.get_submodule(parent)."),
        "set on the model": (model_with(on_top=True),
            "The new layers hang on the model itself, under their own names, and in the blocks the old ones are "
            "still there. Set the attribute on the parent: model.get_submodule(parent), with what stands before the "
            "path's last dot."),
        "a new layer": (model_with(give=lambda make, layer: make(random_layer(layer))),
            "What you gave to make() is a new nn.Linear with random weights. Give it the layer that is there."),
        "its weight": (model_with(give=lambda make, layer: make(layer.weight)),
            "make() takes the layer, not its weight: it needs the bias too, and gives a whole layer that goes in "
            "its place."),
        "another layer": (model_with(give=lambda make, layer: nf4_layer(layer)),
            "The linear layers are gone, but what stands in their place does not come from make(). Put make(layer) "
            "there, whatever it gives."),
        "the library's": (model_by_the_library,
            "This is the library's function. It puts NF4 layers in and knows nothing of make() or of your names; and "
            "in grading it is not there. Walk through the model yourself."),
        "nothing done": (model_with(which=lambda name, module: False),
            "No layer was quantized. Change the model that you are given: a copy is lost when the function ends, and "
            "`layer = make(layer)` only gives the loop's variable another value. setattr(parent, child, make(layer)) "
            "puts it into the model."),
    },
    alternatives={"recursion": model_by_walking, "set_submodule": model_by_set_submodule},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ merge-dequantized

def merge_inputs(rng: torch.Generator) -> list[dict]:
    def case(d_out: int, d_in: int, r: int, alpha: float, dtype: str, block_size: int) -> dict:
        levels = (torch.randperm(127, generator=rng)[:14] - 63).sort().values / 64
        return {"codes": torch.randint(0, 16, (d_out, d_in), generator=rng, dtype=torch.uint8), "block_size": block_size,
                "absmax": whole(rng, 128, 512, d_out * d_in // block_size) / 256,
                "levels": torch.cat([torch.tensor([-1.0]), levels, torch.tensor([1.0])]),
                "A": whole(rng, -63, 64, r, d_in) / 64, "B": whole(rng, -63, 64, d_out, r) / 64, "alpha": alpha, "dtype": dtype}

    return [case(6, 8, 2, 1.0, "bfloat16", 16), case(8, 12, 4, 2.0, "float16", 8), case(9, 16, 1, 0.5, "bfloat16", 16),
            case(10, 8, 2, 4.0, "float32", 8)]


def merge_probe(work: Callable, case: dict) -> dict[str, Any]:
    q = four_bit(case)
    merged = work(q, case["A"].clone(), case["B"].clone(), case["alpha"], getattr(torch, case["dtype"]))
    return {"merged weight": plain(merged), "codes afterwards": q.codes.long()}


def merge_with(sum_of: Callable = lambda W, D, t, q: (W + D).to(t), scale: Callable = lambda a, A: a / len(A),
               delta: Callable = lambda B, A: B @ A) -> Callable:
    """Merge with one step exchanged: right as it stands."""
    def work(q, A, B, alpha, dtype):
        return sum_of(q.dequantize(), scale(alpha, A) * delta(B, A), dtype, q)
    return work


def merge_loop(q, A, B, alpha, dtype):
    W = q.dequantize().double()
    for k in range(A.shape[0]):
        W = W + alpha / A.shape[0] * torch.outer(B[:, k].double(), A[k].double())
    return W.float().to(dtype)


def merge_addmm(q, A, B, alpha, dtype):
    return torch.addmm(q.dequantize(dtype=torch.float32), B, A, alpha=alpha / B.shape[1]).to(dtype)


def merge_by_columns(q, A, B, alpha, dtype):
    """Sends the unit vectors through the layer."""
    eye = torch.eye(q.shape[1])
    return (F.linear(eye, q.dequantize()) + alpha / len(A) * eye @ A.T @ B.T).T.contiguous().to(dtype)


def merge_into_the_object(q, A, B, alpha, dtype):
    return (q + alpha / len(A) * B @ A).to(dtype)


def merge_quantized_anew(q, A, B, alpha, dtype):
    from pefttools.nf4 import quantize_nf4

    return quantize_nf4(q.dequantize() + alpha / len(A) * B @ A).dequantize().to(dtype)


def merge_into_codes(q, A, B, alpha, dtype):
    return (q.codes + alpha / len(A) * B @ A).to(dtype)


MERGE_DEQUANTIZED = Exercise(
    name="merge-dequantized", chapter=CHAPTER, title="Merge without rounding to four bits again", points=3, minutes=8, difficulty=2,
    inputs=merge_inputs, probe=merge_probe, reference=merge_with(),
    mistakes={
        "into the codes": (merge_into_codes,
            "ΔW was added to the codes. They are numbers of levels: dequantize first."),
        "into q": (merge_into_the_object,
            "q is not a tensor, and nothing can be added to it. q.dequantize() gives the weight that it stands for."),
        "to four bits again": (merge_with(sum_of=lambda W, D, t, q: back_to_levels(W + D, q).to(t)),
            "The merged weight lies on the 4-bit levels again. That rounds ΔW away where it is smaller than half a step; the result here is "
            "kept in 16 bits."),
        "quantized anew": (merge_quantized_anew,
            "You put the merged weight into NF4 once more. That rounds ΔW away where it is smaller than half a step: "
            "it is the merge that this exercise avoids. Keep the sum in 16 bits."),
        "update forgotten": (merge_with(sum_of=lambda W, D, t, q: W.to(t)),
            "This is the dequantized weight without the update."),
        "update alone": (merge_with(sum_of=lambda W, D, t, q: D.to(t)),
            "This is ΔW alone. Add it to the dequantized weight."),
        "no scale": (merge_with(scale=lambda a, A: 1.0),
            "The scale α/r is missing."),
        "alpha alone": (merge_with(scale=lambda a, A: a),
            "ΔW is multiplied by α; nothing divides by r."),
        "r from d_in": (merge_with(scale=lambda a, A: a / A.shape[1]),
            "You divide α by A.shape[1], which is d_in. A is [r, d_in]: r is A.shape[0]."),
        "root of r": (merge_with(scale=lambda a, A: a / len(A) ** 0.5),
            "You divide α by √r. That is rsLoRA's scale (chapter 08); this adapter was trained with α/r, and has to "
            "be merged with it."),
        "r over alpha": (merge_with(scale=lambda a, A: len(A) / a),
            "The scale is the wrong way round: α/r, not r/α."),
        "scales everything": (lambda q, A, B, alpha, dtype: (alpha / len(A) * (q.dequantize() + B @ A)).to(dtype),
            "The frozen weight is scaled too. α/r belongs to BA alone: W + (α/r)·BA."),
        "subtracted": (merge_with(sum_of=lambda W, D, t, q: (W - D).to(t)),
            "ΔW is subtracted. It is added."),
        "rounded before": (merge_with(sum_of=lambda W, D, t, q: W.to(t) + D.to(t)),
            "W and ΔW are rounded to 16 bits first, then added, then rounded once more. Add in float32 and round once, at the "
            "end."),
        "weight rounded before": (merge_with(sum_of=lambda W, D, t, q: (W.to(t).float() + D).to(t)),
            "The dequantized weight is rounded to 16 bits before ΔW is added. Dequantize to float32, add, and round once."),
        "update rounded before": (merge_with(sum_of=lambda W, D, t, q: (W + D.to(t).float()).to(t)),
            "ΔW is rounded to 16 bits before it is added. Round once, at the end."),
        "left in float32": (merge_with(sum_of=lambda W, D, t, q: W + D),
            "The result is float32 whatever is asked for. Give it in `dtype`. (`.to(dtype)` returns a new tensor; "
            "the one before the dot stays as it is.)"),
        "weight rounded, result not": (merge_with(sum_of=lambda W, D, t, q: W.to(t) + D),
            "You dequantize to `dtype` and add a float32 ΔW. PyTorch gives such a sum in float32: W is rounded too "
            "early, and the result not at all. Dequantize to float32, add, and call .to(dtype) on the sum."),
        "always bfloat16": (merge_with(sum_of=lambda W, D, t, q: (W + D).bfloat16()),
            "The result is bfloat16 whatever is asked for. Give it in `dtype`, which may be float16 or float32 as "
            "well."),
        "AB": (merge_with(delta=lambda B, A: A @ B),
            "A·B has another shape than the weight. ΔW = (α/r)·B·A is [d_out, d_in]."),
        "update transposed": (merge_with(delta=lambda B, A: A.T @ B.T),
            "A.T @ B.T is ΔW transposed, [d_in, d_out], as it stands behind x in code. The weight is [d_out, d_in], "
            "and so is B @ A."),
        "elementwise": (merge_with(delta=lambda B, A: B * A),
            "`*` multiplies number by number. B·A is a product of matrices: B @ A."),
    },
    alternatives={"a sum of r outer products": merge_loop, "addmm": merge_addmm, "unit vectors": merge_by_columns},
    rtol=0.0, atol=0.0, accepts="function", hides=HIDES)


EXERCISES: list[Exercise] = [QLORA_FORWARD, WHAT_STAYS, QLORA_BACKWARD, COMPUTE_DTYPE, QLORA_LAYER, QUANTIZE_MODEL,
                             MERGE_DEQUANTIZED]


# ================================================================================================ questions

QUESTIONS: list[Question] = [
    Question(
        name="qlora-q-gradient", chapter=CHAPTER, points=1, right="b",
        text="In a QLoRA layer the 4-bit weight is frozen. Does the backward pass need its values?",
        options={
            "a": ("No: what is frozen has no gradient.",
                  "W itself gets none. But the layers **below** need the gradient of x, and that is g·W: the values "
                  "are needed in full."),
            "b": ("Yes: the gradient of x passes through it, so it is dequantized a second time.",
                  "Right: g·W for the layers below. It is made again from the codes, so that nothing of full size waits in "
                  "between."),
            "c": ("Yes: to work out the gradient of W, which is then thrown away.",
                  "The gradient of W is never computed: that product, g transposed times x, is left out. What is needed is g·W, the gradient of "
                  "x."),
            "d": ("No: the adapter's own gradients pass on everything to the layers below.",
                  "The adapter passes on (α/r)·g·B·A, its own share and no more: nothing at all at the start, where "
                  "B is zero. The frozen road, which carries most of the signal, has a share of its own, g·W."),
        }),
    Question(
        name="qlora-q-temporary", chapter=CHAPTER, points=1, right="d",
        text="A model of 70 billion weights is stored in NF4 (about 36 GB). How much memory do the *dequantized* weights take while it "
             "answers?",
        options={
            "a": ("140 GB: all weights are dequantized to 16 bits.",
                  "All of them are, but not at the same time. Each is used for one product and forgotten."),
            "b": ("35 GB more, for a copy in 4 bits.", "There is no copy: the codes are read where they are."),
            "c": ("None: one multiplies with the codes themselves.",
                  "Codes are numbers of levels; a product needs the levels times the absmax. Fused kernels do that in small "
                  "pieces, and still in pieces of 16 bits."),
            "d": ("As much as the largest single matrix in 16 bits, well under 1 GB.",
                  "Right: one matrix at a time. For Llama-2-70B that is 8192 × 28672 numbers, 0.47 GB."),
        }),
    Question(
        name="qlora-q-stays", chapter=CHAPTER, points=1, right="a",
        text="Why does QLoRA leave the **embedding** in 16 bits?",
        options={
            "a": ("It is no linear layer but a table to look up in, and is often also the output head, where an error goes straight into "
                  "the logits.",
                  "Right. It costs memory, and the more so the smaller the model: see the exercise before."),
            "b": ("It is too small for it to be worth while.",
                  "In Llama-3.2-1B it is a fifth of all parameters, and in 16 bits more than half of the bytes of the quantized "
                  "model."),
            "c": ("NF4 cannot represent its values.",
                  "It can: once a block is divided by its absmax, all of it lies between −1 and 1, as NF4's levels do. "
                  "(There are methods that quantize embeddings; QLoRA is not one.)"),
            "d": ("Because it is trained.", "It is frozen like all the rest of the base."),
        }),
    Question(
        name="qlora-q-merge", chapter=CHAPTER, points=1, right="c",
        text="You trained a QLoRA adapter and want plain weights to ship. Into which base do you merge, to stay closest to what you "
             "trained?",
        options={
            "a": ("Into the original 16-bit weights: they are more exact than the 4-bit ones.",
                  "More exact, but not those that the adapter was trained on: it has learned to make up for a "
                  "rounding that is not there. In the chapter's runs the loss rose with every seed."),
            "b": ("Into the 4-bit weights: then the file stays small and nothing changes.",
                  "The file stays small. But W + ΔW has to be rounded to sixteen levels again, and ΔW is mostly "
                  "smaller than half a step: in the chapter's runs that moved the logits more than ten times as far "
                  "as the best way of merging, and the loss rose with every seed."),
            "c": ("Into the dequantized weights, kept in 16 bits.",
                  "Right: that is what the adapter was trained on, and only one rounding to 16 bits is added. The file is as "
                  "large as the 16-bit model."),
            "d": ("It makes no difference: merging is exact.",
                  "It would be with exact arithmetic, on the base of the training. But each way rounds differently, "
                  "and one takes another base: the chapter measured how much that is."),
        }),
    Question(
        name="qlora-q-adam", chapter=CHAPTER, points=1, right="b",
        text="LoRA with r = 16 on Llama-3.2-1B trains 11 million parameters. How much does an 8-bit Adam save there, against one "
             "in 32 bits?",
        options={
            "a": ("About 7 GB: six bytes for each of the 1.2 billion parameters.",
                  "That would be in full fine-tuning. Frozen parameters have no moments."),
            "b": ("About 70 MB: six bytes for each trained parameter.",
                  "Right: 8 bytes become 2. With few trained parameters there is little to save; paging is for the "
                  "**spikes** that activations cause."),
            "c": ("Three quarters of the whole memory.",
                  "Three quarters of the **moments**. With LoRA they are a small part of the whole."),
            "d": ("Nothing: the moments have to be float32.",
                  "8 bits in blocks (bitsandbytes takes 256 numbers), each with a scale of its own, work well in practice "
                  "(Dettmers et al. 2021)."),
        }),
    Question(
        name="qlora-q-dtype", chapter=CHAPTER, points=1, right="d",
        text="`bnb_4bit_compute_dtype=torch.bfloat16`: what does it set?",
        options={
            "a": ("What the weights are stored in.",
                  "They are stored in 4 bits. This is what they are dequantized **to** when they are used."),
            "b": ("What A and B are trained in.",
                  "They have a dtype of their own; peft and this course keep float32, so that small steps are not lost."),
            "c": ("What the optimizer computes in.", "The optimizer sees only the adapter's parameters and their dtype."),
            "d": ("What the frozen product x·Wᵀ is computed in.",
                  "Right: x and the dequantized W are cast to it, multiplied, and the result is given back in x's dtype."),
        }),
]
