"""Chapter 02, LoRA: six exercises and six questions.

An exercise's probe looks at effects (outputs, gradients, what trains, how many numbers) and never at the names a
student chose. Cases have B ≠ 0, alpha ≠ r, d_in ≠ d_out and a bias: with B = 0 a layer that ignores its adapter
altogether would pass. Imports torch and the standard library only; references resolve when they are first used.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pefttools.grading.exercise import Exercise
from pefttools.grading.leaves import gradients, plain, randn
from pefttools.grading.question import Question

CHAPTER = "02_lora"
TITLE = "LoRA"
HIDES = ("pefttools.lora", "pefttools.inject", "pefttools.checkpoint", "peft")


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear that holds these values (drawn nowhere, so that no random number is spent)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


# ================================================================================================ lora-forward

def forward_inputs(rng: torch.Generator) -> list[dict]:
    def case(lead: tuple[int, ...], d_in: int, d_out: int, r: int, alpha: float, bias: bool = True) -> dict:
        return {"x": randn(rng, *lead, d_in), "W0": randn(rng, d_out, d_in), "A": randn(rng, r, d_in),
                "B": randn(rng, d_out, r), "alpha": alpha, "bias": randn(rng, d_out) if bias else None}

    return [case((), 5, 3, 2, 3.0), case((4,), 6, 9, 3, 16.0), case((2, 3), 12, 7, 4, 1.0),
            case((2, 3), 8, 5, 1, 3.0), case((7,), 10, 4, 2, 5.0, bias=False)]


def forward_probe(work: Callable, case: dict) -> dict[str, Any]:
    x, A, B = (case[k].clone().requires_grad_() for k in ("x", "A", "B"))
    W0 = case["W0"].clone()
    bias = [] if case["bias"] is None else [case["bias"].clone()]
    y = work(x, W0, A, B, case["alpha"], *bias)
    return {"output": plain(y), "W0 is left as it was": torch.equal(W0, case["W0"]), **gradients(y, A=A, B=B, x=x)}


def forward_with(scale: Callable[[float, int], float]) -> Callable:
    """W₀x + b + scale(α, r)·BAx: right where the scale is α/r."""
    def work(x, W0, A, B, alpha, bias=None):
        return F.linear(x, W0, bias) + scale(alpha, A.shape[0]) * (x @ A.T) @ B.T
    return work


def forward_rank_from_the_wrong_side(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) + alpha / A.shape[1] * (x @ A.T) @ B.T


def forward_rank_from_d_out(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) + alpha / B.shape[0] * (x @ A.T) @ B.T


def forward_no_bias(x, W0, A, B, alpha, bias=None):
    return x @ W0.T + alpha / len(A) * (x @ A.T) @ B.T


def forward_bias_in_both_paths(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) + alpha / len(A) * F.linear(x @ A.T, B, bias)


def forward_scales_everything(x, W0, A, B, alpha, bias=None):
    return alpha / len(A) * (F.linear(x, W0, bias) + (x @ A.T) @ B.T)


def forward_base_only(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) + 0 * (x @ A.T) @ B.T


def forward_adapter_only(x, W0, A, B, alpha, bias=None):
    return alpha / len(A) * (x @ A.T) @ B.T


def forward_zeros(x, W0, A, B, alpha, bias=None):
    return torch.zeros(*x.shape[:-1], W0.shape[0])


def forward_detached(x, W0, A, B, alpha, bias=None):
    with torch.no_grad():
        return forward_with(lambda a, r: a / r)(x, W0, A, B, alpha, bias)


def forward_adds_into_w0(x, W0, A, B, alpha, bias=None):
    W0 += alpha / len(A) * B @ A
    return F.linear(x, W0, bias)


def forward_subtracts(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) - alpha / len(A) * (x @ A.T) @ B.T


def forward_shapes_do_not_meet(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) + alpha / len(A) * (x @ A) @ B


def forward_columns(x, W0, A, B, alpha, bias=None):
    y = W0 @ x + alpha / len(A) * (B @ (A @ x))
    return y if bias is None else y + bias


def forward_needs_bias(x, W0, A, B, alpha, bias=None):
    return x @ W0.T + bias + alpha / len(A) * (x @ A.T) @ B.T


def forward_through_delta(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0 + alpha / len(A) * B @ A, bias)


def forward_einsum(x, W0, A, B, alpha, bias=None):
    z = torch.einsum("...i,ri->...r", x, A)
    y = torch.einsum("...i,oi->...o", x, W0) + torch.einsum("...r,or->...o", z, B) * (alpha / A.size(0))
    return y if bias is None else y + bias


def forward_scaled_input(x, W0, A, B, alpha, bias=None):
    return F.linear(F.linear(x * (alpha / B.shape[1]), A), B) + F.linear(x, W0, bias)


LORA_FORWARD = Exercise(
    name="lora-forward", chapter=CHAPTER, title="The forward pass", points=3, minutes=5, difficulty=1,
    inputs=forward_inputs, probe=forward_probe, reference="pefttools.lora:lora_forward",
    mistakes={
        "zeros": (forward_zeros,
            "These are all zeros. Begin with the frozen path, W₀x + b, and add the update to it."),
        "base only": (forward_base_only,
            "This is W₀x + b: the update never reaches the output. At the start of training B is zero and you would "
            "not notice; here B is not zero."),
        "adapter only": (forward_adapter_only,
            "This is (α/r)·BAx alone. LoRA adds to the frozen layer: the output is W₀x + b + (α/r)·BAx."),
        "no scale": (forward_with(lambda a, r: 1.0),
            "This is W₀x + b + BAx: the scale α/r is missing. It looks harmless because it is 1 when α = r, the one "
            "setting that hides it."),
        "alpha times r": (forward_with(lambda a, r: a * r),
            "Your update is scaled by α·r. It is α divided by r: a sum over more directions is divided by their "
            "number."),
        "alpha alone": (forward_with(lambda a, r: a),
            "Your update is scaled by α, and nothing divides by r. The scale is α/r."),
        "one over r": (forward_with(lambda a, r: 1 / r),
            "Your update is scaled by 1/r: α is missing from the numerator. The scale is α/r."),
        "r over alpha": (forward_with(lambda a, r: r / a),
            "Your scale is upside down: r/α instead of α/r."),
        "scale twice": (forward_with(lambda a, r: (a / r) ** 2),
            "The scale α/r is applied twice, for instance once to A's result and once to B's. Once is enough."),
        "root of r": (forward_with(lambda a, r: a / math.sqrt(r)),
            "This is α/√r, the scale of rsLoRA (chapter 08). The scale of LoRA itself is α/r."),
        "r from d_in": (forward_rank_from_the_wrong_side,
            "You divide α by A.shape[1], which is d_in. A is r × d_in, so r is A.shape[0]."),
        "r from d_out": (forward_rank_from_d_out,
            "You divide α by B.shape[0], which is d_out. B is d_out × r, so r is B.shape[1]."),
        "whole-number division": (forward_with(lambda a, r: a // r),
            "You divide with //, which rounds down to a whole number: 3 // 2 is 1. The scale is α / r."),
        "scales everything": (forward_scales_everything,
            "You scale W₀x + b as well. The scale α/r belongs to the update alone; the frozen path stays as it was."),
        "bias dropped": (forward_no_bias,
            "The bias is missing. The frozen layer is W₀x + b, all of it; F.linear(x, W0, bias) does that in one "
            "call."),
        "bias in both paths": (forward_bias_in_both_paths,
            "The bias goes into the update as well, so a scaled second copy of it is added. The update is BAx with "
            "no bias of its own."),
        "subtracted": (forward_subtracts,
            "The update is subtracted. It is added: W₀ + ΔW."),
        "shapes do not meet": (forward_shapes_do_not_meet,
            "Two shapes do not meet. Every matrix here is stored as PyTorch stores weights, outputs × inputs, so it "
            "is the transpose that x meets: x @ W0.T, and x @ A.T (r numbers), and then (…) @ B.T."),
        "columns": (forward_columns,
            "W0 @ x is right for one vector. Here x may be a batch whose rows are the vectors, [..., d_in], so it "
            "stands on the left: x @ W0.T (or F.linear(x, W0)), and x @ A.T."),
        "needs a bias": (forward_needs_bias,
            "bias may be None (a layer without one), and then it cannot be added. F.linear(x, W0, bias) takes None, "
            "too."),
        "no gradient": (forward_detached,
            "The numbers are right, but nothing can learn from them: under no_grad (or after .detach() or .data) no "
            "gradient reaches A and B."),
        "W0 overwritten": (forward_adds_into_w0,
            "The output is right and W0 is not what it was: += changed the frozen weight in place, so the next call "
            "would add the update a second time. Make a new tensor instead."),
    },
    alternatives={"through ΔW": forward_through_delta, "einsum": forward_einsum,
                  "scale on the input": forward_scaled_input},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ count-parameters

def count_inputs(rng: torch.Generator) -> list[dict]:
    some = torch.randint(3, 60, (4, 2), generator=rng).tolist()
    return [{"shapes": [(5, 8)], "r": 3},
            {"shapes": [(1024, 4096)], "r": 16},
            {"shapes": [(2048, 2048), (512, 2048)] * 16, "r": 8},
            {"shapes": [(int(a), int(b) + 60) for a, b in some], "r": 2}]


def count_probe(work: Callable, case: dict) -> dict[str, Any]:
    count = work(list(case["shapes"]), case["r"])
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    return {"trainable parameters": int(count) if isinstance(count, float) and count.is_integer() else count}


def count_reference(shapes, r):
    return sum(r * (d_in + d_out) for d_out, d_in in shapes)


def count_loop(shapes, r):
    total = 0
    for d_out, d_in in shapes:
        total += torch.empty(r, d_in).numel() + torch.empty(d_out, r).numel()
    return total


COUNT_PARAMETERS = Exercise(
    name="count-parameters", chapter=CHAPTER, title="Count the parameters", points=2, minutes=5, difficulty=1,
    inputs=count_inputs, probe=count_probe, reference=count_reference,
    mistakes={
        "zero": (lambda shapes, r: 0, "This is 0. Each adapted matrix brings an A and a B that train."),
        "the frozen matrix": (lambda shapes, r: sum(o * i for o, i in shapes),
            "This counts W₀, which is frozen. Count A (r × d_in) and B (d_out × r)."),
        "base and adapter": (lambda shapes, r: sum(o * i + r * (o + i) for o, i in shapes),
            "This is W₀ together with A and B. W₀ is frozen: only A and B are trained."),
        "product": (lambda shapes, r: sum(r * o * i for o, i in shapes),
            "You multiply d_in by d_out. A and B are two separate thin matrices, so their sizes add: r·(d_in + "
            "d_out). A product would be more than W₀ itself."),
        "twice d_in": (lambda shapes, r: sum(2 * r * i for _, i in shapes),
            "2·d·r holds for square matrices only. With grouped-query attention k and v are not square: A has r·d_in "
            "numbers and B has d_out·r."),
        "twice d_out": (lambda shapes, r: sum(2 * r * o for o, _ in shapes),
            "2·d·r with d = d_out holds for square matrices only: A has r·d_in numbers, B has d_out·r."),
        "A alone": (lambda shapes, r: sum(r * i for _, i in shapes),
            "This counts A and forgets B (d_out × r)."),
        "B alone": (lambda shapes, r: sum(r * o for o, _ in shapes),
            "This counts B and forgets A (r × d_in)."),
        "with a core": (lambda shapes, r: sum(r * (o + i) + r * r for o, i in shapes),
            "There is an r × r matrix too many in this count. Between A and B there is nothing."),
        "with biases": (lambda shapes, r: sum(r * (o + i) + r + o for o, i in shapes),
            "This counts a bias for A and for B. LoRA's two matrices have none."),
        "first only": (lambda shapes, r: r * sum(shapes[0]),
            "This counts the first matrix of the list only. Every adapted matrix has its own A and B."),
        "no rank": (lambda shapes, r: sum(o + i for o, i in shapes),
            "The rank is missing: A has r rows and B has r columns."),
    },
    alternatives={"built and counted": count_loop,
                  "one sum per side": lambda shapes, r: r * sum(o for o, _ in shapes) + r * sum(i for _, i in shapes)},
    accepts="function", hides=HIDES)


# ================================================================================================ lora-init

DRAWS = 16  # matrices drawn per case: then the spread below is known to within one percent or so


def init_inputs(rng: torch.Generator) -> list[dict]:
    seeds = torch.randint(0, 2**31, (4,), generator=rng).tolist()
    sizes = [(48, 24, 8), (32, 64, 16), (64, 16, 4)]  # so that each wrong spread falls elsewhere than the right one
    sizes.append(tuple(int(torch.randint(low, high, (), generator=rng)) for low, high in ((33, 80), (20, 70), (4, 16))))
    return [{"d_in": i, "d_out": o, "r": r, "seed": s} for (i, o, r), s in zip(sizes, seeds)]


GOOD_START = {"the entries are finite numbers": True, "largest entry of B": 0.0, "A is zero everywhere": False,
              "A gets a gradient in the first step": False, "B gets a gradient in the first step": True,
              "the rows of A are independent": True, "the entries of A average to zero": True,
              "the same generator state gives the same A": True, "another generator state gives another A": True,
              "spread of A (its standard deviation times √(3·d_in), to the nearest power of √2)": 1.0}


def init_probe(work: Callable, case: dict) -> dict[str, Any]:
    d_in, d_out, r, seed = (case[k] for k in ("d_in", "d_out", "r", "seed"))

    def draw(generator):
        pair = work(d_in, d_out, r, generator)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
            kinds = [type(p).__name__ for p in pair] if isinstance(pair, (tuple, list)) else type(pair).__name__
            raise TypeError(f"lora_init should return two tensors, A and B (return A, B); it returned {kinds}")
        return [t.detach() for t in pair]

    A, B = draw(torch.Generator().manual_seed(seed))
    if A.shape != (r, d_in) or B.shape != (d_out, r):
        return {"A": A, "B": B}
    generator = torch.Generator().manual_seed(seed + 2)
    return {"A": A, "B": B, "again": draw(torch.Generator().manual_seed(seed))[0],
            "other": draw(torch.Generator().manual_seed(seed + 1))[0],
            "many": torch.stack([draw(generator)[0] for _ in range(DRAWS)])}


def init_reading(drawn: dict[str, Tensor], case: dict) -> dict[str, Any]:
    """What must hold of a start, of the matrices that the work drew."""
    d_in, d_out, r = (case[k] for k in ("d_in", "d_out", "r"))
    A, B = drawn["A"], drawn["B"]
    leaves = {"A": torch.zeros(A.shape), "B": torch.zeros(B.shape), **GOOD_START}  # A and B for their shapes
    if A.shape != (r, d_in) or B.shape != (d_out, r):
        return leaves  # one complaint at a time
    leaves["the entries are finite numbers"] = bool(A.isfinite().all() and B.isfinite().all())
    leaves["largest entry of B"] = B.abs().max().item()
    leaves["A is zero everywhere"] = not A.any().item()
    leaves.update(learns(A, B))
    leaves["the same generator state gives the same A"] = torch.equal(A, drawn["again"])
    leaves["another generator state gives another A"] = not torch.equal(A, drawn["other"])
    many = drawn["many"].reshape(DRAWS, r, d_in).double().nan_to_num(0.0, 0.0, 0.0)
    leaves["the rows of A are independent"] = all(int(torch.linalg.matrix_rank(a)) == min(a.shape) for a in many)
    spread, wanted = many.std().item(), 1 / math.sqrt(3 * d_in)
    leaves["the entries of A average to zero"] = abs(many.mean().item()) < 0.25 * max(wanted, spread)
    power = round(2 * math.log2(spread / wanted)) / 2 if spread > 0 else -math.inf
    leaves["spread of A (its standard deviation times √(3·d_in), to the nearest power of √2)"] = round(2**power, 4)
    return leaves


def learns(A: Tensor, B: Tensor) -> dict[str, bool]:
    """Which of the two factors receives a gradient in the first step."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    x = torch.cos(torch.arange(3.0 * A.shape[1])).reshape(3, -1)
    ((x @ A.T) @ B.T).sin().add(1).square().sum().backward()
    return {"A gets a gradient in the first step": bool(A.grad.any()),
            "B gets a gradient in the first step": bool(B.grad.any())}


def uniform(rng, rows, columns, bound):
    return (torch.rand(rows, columns, generator=rng) * 2 - 1) * bound


def init_gaussian(d_in, d_out, r, generator):
    return torch.randn(r, d_in, generator=generator) / math.sqrt(3 * d_in), torch.zeros(d_out, r)


def init_uniform(d_in, d_out, r, generator):
    A = torch.empty(r, d_in)
    A.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    return nn.Parameter(A), nn.Parameter(torch.zeros(d_out, r))


def init_rand(d_in, d_out, r, generator):
    return [uniform(generator, r, d_in, d_in ** -0.5), torch.zeros([d_out, r])]


def init_two_zeros(d_in, d_out, r, generator):
    return torch.zeros(r, d_in), torch.zeros(d_out, r)


def init_two_random(d_in, d_out, r, generator):
    return uniform(generator, r, d_in, d_in ** -0.5), uniform(generator, d_out, r, r ** -0.5)


def init_small_b(d_in, d_out, r, generator):
    return uniform(generator, r, d_in, d_in ** -0.5), uniform(generator, d_out, r, 1e-3)


def init_swapped(d_in, d_out, r, generator):
    return torch.zeros(r, d_in), uniform(generator, d_out, r, r ** -0.5)


def init_transposed(d_in, d_out, r, generator):
    return uniform(generator, d_in, r, d_in ** -0.5), torch.zeros(r, d_out)


def init_wide(d_in, d_out, r, generator):
    return torch.randn(r, d_in, generator=generator), torch.zeros(d_out, r)


def init_kaiming_default(d_in, d_out, r, generator):
    return nn.init.kaiming_uniform_(torch.empty(r, d_in), generator=generator), torch.zeros(d_out, r)


def init_bound_as_std(d_in, d_out, r, generator):
    return torch.randn(r, d_in, generator=generator) / math.sqrt(d_in), torch.zeros(d_out, r)


def init_fan_out(d_in, d_out, r, generator):
    return uniform(generator, r, d_in, d_out ** -0.5), torch.zeros(d_out, r)


def init_fan_r(d_in, d_out, r, generator):
    return nn.init.kaiming_uniform_(torch.empty(d_in, r), a=math.sqrt(5), generator=generator).T, torch.zeros(d_out, r)


def init_over_r(d_in, d_out, r, generator):
    return torch.randn(r, d_in, generator=generator) / r, torch.zeros(d_out, r)


def init_positive(d_in, d_out, r, generator):
    return torch.rand(r, d_in, generator=generator) * d_in ** -0.5, torch.zeros(d_out, r)


def init_constant(d_in, d_out, r, generator):
    return torch.full((r, d_in), (3 * d_in) ** -0.5), torch.zeros(d_out, r)


def init_no_generator(d_in, d_out, r, generator):
    return nn.init.kaiming_uniform_(torch.empty(r, d_in), a=math.sqrt(5)), torch.zeros(d_out, r)


def init_no_root(d_in, d_out, r, generator):
    return torch.randn(r, d_in, generator=generator) / (3 * d_in), torch.zeros(d_out, r)


def init_two_percent(d_in, d_out, r, generator):
    return torch.randn(r, d_in, generator=generator) * 0.02, torch.zeros(d_out, r)


def init_b_first(d_in, d_out, r, generator):
    return init_rand(d_in, d_out, r, generator)[::-1]


def init_own_seed(d_in, d_out, r, generator):
    return init_rand(d_in, d_out, r, torch.Generator().manual_seed(0))


LORA_INIT = Exercise(
    name="lora-init", chapter=CHAPTER, title="The start: A random, B zero", points=3, minutes=8, difficulty=1,
    inputs=init_inputs, probe=init_probe, reading=init_reading, reference="pefttools.lora:lora_init",
    mistakes={
        "both zero": (init_two_zeros,
            "A and B are both zero. Then the gradient of each is zero too (each is multiplied by the other), and the "
            "adapter stays zero for ever: it is dead."),
        "B random": (init_two_random,
            "B is random as well, so ΔW ≠ 0 before the first step: the model starts out damaged. With B = 0 it "
            "starts as exactly the model you loaded."),
        "B nearly zero": (init_small_b,
            "B is small but not zero, so the adapted model is not the one you loaded. Exact zeros are fine for B: it "
            "is A's randomness that gets the gradient going."),
        "A zero, B random": (init_swapped,
            "You have it the other way round: A is zero and B random. This also starts at ΔW = 0 and would learn, "
            "but the paper, PEFT and every adapter file you will meet start with a random A and B = 0."),
        "shapes turned": (init_transposed,
            "Your A is d_in × r and your B is r × d_out. That fits notes that write ΔW = AB. Here, as in the paper "
            "and in PEFT, A is r × d_in and B is d_out × r."),
        "B first": (init_b_first,
            "You return B before A. The order is (A, B)."),
        "unit variance": (init_wide,
            "A's entries have standard deviation 1. That is 1/√(3·d_in) too large a start: the entries of Ax would "
            "grow with the width of the layer. Shrink them."),
        "Kaiming's default": (init_kaiming_default,
            "kaiming_uniform_ without a=√5 assumes that a ReLU follows and draws √6 times too wide. PEFT, like "
            "nn.Linear itself, passes a=math.sqrt(5), which makes the bound 1/√d_in."),
        "bound taken as deviation": (init_bound_as_std,
            "Your standard deviation is 1/√d_in. That is the bound of the uniform distribution; its standard "
            "deviation is √3 times smaller, 1/√(3·d_in)."),
        "no root": (init_no_root,
            "Your standard deviation is 1/(3·d_in): the square root is missing."),
        "0.02": (init_two_percent,
            "0.02 is GPT-2's usual choice, whatever the width. Here the standard deviation follows the width: "
            "1/√(3·d_in)."),
        "d_out in the bound": (init_fan_out,
            "You used d_out for the size of A's entries. A reads the input: each row sums d_in products, so the "
            "bound is 1/√d_in."),
        "r in the bound": (init_fan_r,
            "The entries' size comes from r here, perhaps because A was drawn as d_in × r and then transposed: "
            "kaiming_uniform_ takes the second dimension for the number of inputs. Draw it as r × d_in."),
        "one over r": (init_over_r,
            "This is a Gaussian of standard deviation 1/r, PEFT's init_lora_weights=\"gaussian\". Its size depends "
            "on the rank; asked for here is the default, 1/√(3·d_in)."),
        "one-sided": (init_positive,
            "All of A's entries are positive: torch.rand draws from 0 to 1. Centre it: (2·rand − 1)·bound."),
        "constant": (init_constant,
            "All rows of A are equal, so they get equal gradients and stay equal: an adapter of rank 1, whatever r "
            "is. Randomness is what makes the r directions differ."),
        "generator ignored": (init_no_generator,
            "The same generator state gave two different matrices: A is drawn from torch's global random numbers. "
            "Pass generator=generator on, so that a run can be repeated."),
        "own seed": (init_own_seed,
            "Another generator gave the same A: the seed is fixed inside your function. Every layer of the model "
            "would then start with the same A."),
    },
    alternatives={"Gaussian of the same spread": init_gaussian, "uniform_": init_uniform, "rand, stretched": init_rand},
    rtol=1e-5, atol=0.0, accepts="function", hides=HIDES)


# ================================================================================================ lora-layer

def layer_inputs(rng: torch.Generator) -> list[dict]:
    def case(lead: tuple[int, ...], d_in: int, d_out: int, r: int, alpha: float, dropout: float = 0.0) -> dict:
        return {"x": randn(rng, *lead, d_in), "weight": randn(rng, d_out, d_in), "bias": randn(rng, d_out),
                "A": randn(rng, r, d_in), "B": randn(rng, d_out, r), "r": r, "alpha": alpha, "dropout": dropout,
                "seed": int(torch.randint(0, 2**31, (), generator=rng))}

    return [case((4,), 7, 5, 2, 3.0), case((2, 3), 6, 10, 3, 16.0), case((3,), 9, 4, 1, 2.0),
            case((64,), 24, 8, 4, 6.0, dropout=0.5)]


def layer_probe(work: Callable, case: dict) -> dict[str, Any]:
    base = linear(case["weight"], case["bias"])
    torch.manual_seed(case["seed"])
    layer = work(base, case["r"], case["alpha"], case["dropout"])
    if not isinstance(layer, nn.Module):
        raise TypeError(f"LoRALayer makes a {type(layer).__name__}, which is no nn.Module")
    layer.eval()
    trainable = [p for p in layer.parameters() if p.requires_grad]
    A, B = find(trainable, case["A"]), find(trainable, case["B"])
    if A is None or B is None:
        complain_of_factors(list(layer.parameters()), trainable, case)
    leaves: dict[str, Any] = {"output at the start": plain(layer(case["x"])),
                              "trainable parameters": sum(p.numel() for p in trainable),
                              "W0 is frozen": all(p.shape != case["weight"].shape for p in trainable),
                              "the bias is frozen": all(p.shape != case["bias"].shape for p in trainable)}
    output = layer(case["x"])
    if isinstance(output, Tensor) and output.requires_grad:
        grad = torch.autograd.grad(output.square().sum(), [B], allow_unused=True)[0]
        leaves["B gets a gradient in the first step"] = grad is not None and bool(grad.any())
    else:
        leaves["B gets a gradient in the first step"] = False
    fill(A, case["A"])
    fill(B, case["B"])
    x = case["x"].clone().requires_grad_()
    output = layer(x)
    leaves["output"] = plain(output)
    leaves["output, when called a second time"] = plain(layer(x))
    leaves["W0 is left as it was"] = torch.equal(base.weight.detach(), case["weight"])
    found = gradients(output, A=A, B=B, x=x)
    for name, tensor, value in (("gradient of A", A, case["A"]), ("gradient of B", B, case["B"])):
        if isinstance(found[name], Tensor) and tensor.shape != value.shape:
            found[name] = found[name].T
    layer.train()
    if case["dropout"] > 0:
        torch.manual_seed(case["seed"])
        once, again = layer(case["x"]), layer(case["x"])
        frozen = F.linear(case["x"], case["weight"], case["bias"])
        leaves["dropout acts while training"] = not same(once, again)
        # Entries dropped on the way in: every output still gets some update. Dropped on the way out: many get none.
        leaves["while training, every output gets some update"] = (
            not isinstance(once, Tensor) or once.shape != frozen.shape or not torch.isclose(once, frozen, 0, 1e-6).any().item())
        fill(B, torch.zeros_like(case["B"]))
        leaves["output while training, with B = 0"] = plain(layer(case["x"]))
    else:
        leaves["output while training"] = plain(layer(case["x"]))
    return {**leaves, **found}


def same(a: Any, b: Any) -> bool:
    """Whether two outputs are the same to the last bit; what is no tensor is told of by the leaf `output`."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def complain_of_factors(known: list[Tensor], trainable: list[Tensor], case: dict) -> None:
    """Say why the layer cannot be looked at: what trains is not A and B."""
    sizes = f"A (r × d_in, here {list(case['A'].shape)}) and B (d_out × r, here {list(case['B'].shape)})"
    if all(find(known, case[k]) is not None for k in "AB"):
        raise ValueError(f"parameters of the sizes of {sizes} are there, but they are frozen")
    if trainable:
        shapes = ", ".join(str(list(p.shape)) for p in trainable)
        raise ValueError(f"what trains in the layer are tensors of the shapes {shapes}, and not {sizes}")
    raise ValueError(f"nothing that trains was found in layer.parameters(); expected {sizes}")


def find(tensors: list[Tensor], like: Tensor) -> Tensor | None:
    """The one of the tensors that has the shape of `like`, or of its transpose (some store A as d_in × r)."""
    return next((t for t in tensors if t.shape == like.shape or t.shape == like.T.shape), None)


def fill(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value if tensor.shape == value.shape else value.T)


class Layer(nn.Module):
    """The layer with a switch for each thing that can go wrong; with all of them off it is right."""

    freezes_weight = freezes_bias = True
    a_zero = False
    b_random = False
    adapter_bias = False
    drops_base = False
    always_drops = False
    drops = True
    drops_late = False
    base_bias = True
    base_path = lora_path = True
    no_grad = False

    @staticmethod
    def scale(alpha, r):
        return alpha / r

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.base, self.p, self.s = base, dropout, self.scale(alpha, r)
        base.weight.requires_grad_(not self.freezes_weight)
        base.bias.requires_grad_(not self.freezes_bias)
        self.down = nn.Linear(base.in_features, r, bias=self.adapter_bias)
        self.up = nn.Linear(r, base.out_features, bias=self.adapter_bias)
        if self.a_zero:
            nn.init.zeros_(self.down.weight)
        for p in [] if self.b_random else self.up.parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        def drop(t, here):
            return F.dropout(t, self.p, self.training or self.always_drops) if here and self.drops else t

        dropped = drop(x, not self.drops_late)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.no_grad):
            bias = self.base.bias if self.base_bias else None
            y = F.linear(dropped if self.drops_base else x, self.base.weight, bias)
            update = self.s * drop(self.up(self.down(dropped)), self.drops_late)
        return (y if self.base_path else 0 * y) + (update if self.lora_path else 0 * update)


def layer_with(**switches) -> type:
    return type("Layer", (Layer,), switches)


class LayerZeros(Layer):
    def forward(self, x):
        return torch.zeros(*x.shape[:-1], self.base.out_features)


class LayerPlainTensors(nn.Module):
    """A and B as tensors that require gradients, without nn.Parameter."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.base, self.s = base.requires_grad_(False), alpha / r
        self.A = (torch.randn(r, base.in_features) / math.sqrt(3 * base.in_features)).requires_grad_()
        self.B = torch.zeros(base.out_features, r, requires_grad=True)

    def forward(self, x):
        return self.base(x) + self.s * (x @ self.A.T) @ self.B.T


class LayerAllFrozen(Layer):
    """Freezes with self.requires_grad_(False) at the end, A and B among the rest."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__(base, r, alpha, dropout)
        self.requires_grad_(False)


class LayerNewBase(Layer):
    """Makes a fresh Linear of the same shape and forgets the given one's values."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__(nn.Linear(base.in_features, base.out_features), r, alpha, dropout)


class LayerFullUpdate(nn.Module):
    """ΔW as one matrix of full size."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.base, self.s = base.requires_grad_(False), alpha / r
        self.delta = nn.Parameter(torch.zeros(base.out_features, base.in_features))

    def forward(self, x):
        return self.base(x) + self.s * F.linear(x, self.delta)


class LayerMergesAsItGoes(Layer):
    """Adds ΔW into the base weight in every forward."""

    def forward(self, x):
        self.base.weight.data += (self.s * self.up.weight @ self.down.weight).data
        return self.base(x)


class LayerShapesDoNotMeet(Layer):
    def forward(self, x):
        return self.base(x) + self.s * (x @ self.down.weight) @ self.up.weight


class LayerColumns(nn.Module):
    """A stored as d_in × r and B as r × d_out, used as x A B: other names and shapes, the same map."""

    def __init__(self, inner, rank, alpha, dropout=0.0):
        super().__init__()
        self.inner = inner
        for p in inner.parameters():
            p.requires_grad = False
        rows = nn.init.kaiming_uniform_(torch.empty(rank, inner.in_features), a=5 ** 0.5)
        self.into = nn.Parameter(rows.T.contiguous())
        self.out = nn.Parameter(torch.zeros(rank, inner.out_features))
        self.drop = nn.Dropout(dropout)
        self.factor = alpha / rank

    def forward(self, x):
        return self.inner(x) + self.drop(x) @ self.into @ self.out * self.factor


class LayerBuffers(nn.Module):
    """Keeps the base's values as buffers, where nothing can train them."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.register_buffer("weight", base.weight.detach().clone())
        self.register_buffer("bias", base.bias.detach().clone())
        self.A = nn.Parameter(torch.randn(r, base.in_features) * (3 * base.in_features) ** -0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.alpha, self.p = alpha, dropout

    def forward(self, x):
        low = F.linear(F.dropout(x, self.p, self.training), self.A)
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight.T).unflatten(0, x.shape[:-1]) + (
            self.alpha / len(self.A)) * F.linear(low, self.B)


LORA_LAYER = Exercise(
    name="lora-layer", chapter=CHAPTER, title="A layer that wraps nn.Linear", points=5, minutes=15, difficulty=2,
    inputs=layer_inputs, probe=layer_probe, reference="pefttools.lora:LoRALinear",
    mistakes={
        "zeros": (LayerZeros,
            "The layer returns zeros. It should return what the wrapped layer returns, plus the update."),
        "weight trains": (layer_with(freezes_weight=False),
            "W₀ still trains: its requires_grad is True. The optimizer would then update it and keep two more "
            "numbers for each of its entries, which is what LoRA is there to avoid."),
        "bias trains": (layer_with(freezes_bias=False),
            "W₀ is frozen and the bias is not. Freeze the whole wrapped layer: base.requires_grad_(False)."),
        "everything trains": (layer_with(freezes_weight=False, freezes_bias=False),
            "The wrapped layer still trains, weight and bias: nothing froze it. base.requires_grad_(False) does."),
        "everything frozen": (LayerAllFrozen,
            "Nothing trains at all: A and B are frozen together with the base. Freeze the wrapped layer only, before "
            "or after you make A and B."),
        "plain tensors": (LayerPlainTensors,
            "Your module has no trainable parameters: A and B are tensors, and nn.Module only knows what is an "
            "nn.Parameter. The optimizer would never see them, nor would state_dict()."),
        "B random": (layer_with(b_random=True),
            "The new layer does not start as the old one: B is not zero. nn.Linear draws random weights, so an "
            "nn.Linear used for B has to be set to zero."),
        "dead": (layer_with(a_zero=True),
            "A and B are both zero at the start. The output is right, but neither gets a gradient (each is "
            "multiplied by the other): this layer will never learn."),
        "no scale": (layer_with(scale=staticmethod(lambda a, r: 1.0)),
            "The layer computes W₀x + b + BAx: the scale α/r is missing."),
        "alpha times r": (layer_with(scale=staticmethod(lambda a, r: a * r)),
            "The update is scaled by α·r; the scale is α/r."),
        "alpha alone": (layer_with(scale=staticmethod(lambda a, r: a)),
            "The update is scaled by α alone; nothing divides by r."),
        "one over r": (layer_with(scale=staticmethod(lambda a, r: 1 / r)),
            "The update is scaled by 1/r: α is missing."),
        "scale twice": (layer_with(scale=staticmethod(lambda a, r: (a / r) ** 2)),
            "The scale α/r is applied twice."),
        "base path lost": (layer_with(base_path=False),
            "The output is the update alone. Add what the wrapped layer gives for the same x."),
        "update lost": (layer_with(lora_path=False),
            "The layer returns the wrapped layer's output and nothing else. At the start that is right, as B is "
            "zero; once B is not zero, the update has to show."),
        "bias dropped": (layer_with(base_bias=False),
            "The wrapped layer's bias is missing. Call the layer itself, base(x), rather than multiplying by its "
            "weight."),
        "biases in the adapter": (layer_with(adapter_bias=True),
            "There are more trainable parameters than r·(d_in + d_out): nn.Linear brings a bias unless you say "
            "bias=False, and LoRA's A and B have none."),
        "full update": (LayerFullUpdate,
            "You train a whole d_out × d_in matrix. It is right and it saves nothing: write it as the product of B "
            "(d_out × r) and A (r × d_in)."),
        "new base": (LayerNewBase,
            "The output at the start is not the wrapped layer's: a new nn.Linear was made, with random weights of "
            "its own. Keep the layer that you are given."),
        "dropout on the base": (layer_with(drops_base=True),
            "Dropout also hits the frozen path. It belongs on the adapter's input only; the pretrained layer should "
            "see x whole, as it always did."),
        "dropout too late": (layer_with(drops_late=True),
            "Dropout acts too late, on what A or B puts out, so that some outputs get no update at all. It belongs on the way "
            "in: drop entries of x before A sees them."),
        "dropout always on": (layer_with(always_drops=True),
            "Dropout is still on in eval mode, so two calls give two answers. Use an nn.Dropout module, or pass "
            "self.training to F.dropout."),
        "no dropout": (layer_with(drops=False),
            "The argument dropout has no effect. While training, it should drop entries of x on their way to A."),
        "no gradient": (layer_with(no_grad=True),
            "The outputs are right, and no gradient flows: the forward runs under no_grad, or detaches. W₀ is frozen "
            "by requires_grad=False; A and B need the graph."),
        "shapes do not meet": (LayerShapesDoNotMeet,
            "Two shapes do not meet. If A is r × d_in and B is d_out × r, then x meets their transposes: (x @ A.T) @ "
            "B.T."),
        "merges as it goes": (LayerMergesAsItGoes,
            "The forward adds ΔW into W₀ itself, so every call adds it once more. Leave W₀ alone and add the two "
            "outputs."),
    },
    alternatives={"two nn.Linear": Layer, "columns instead of rows": LayerColumns, "base in buffers": LayerBuffers},
    rtol=1e-4, atol=1e-5, accepts="class", hides=HIDES)


# ================================================================================================ lora-merge

def merge_inputs(rng: torch.Generator) -> list[dict]:
    def case(lead: tuple[int, ...], d_in: int, d_out: int, r: int, alpha: float) -> dict:
        return {"x": randn(rng, *lead, d_in), "weight": randn(rng, d_out, d_in), "bias": randn(rng, d_out),
                "A": randn(rng, r, d_in), "B": randn(rng, d_out, r), "alpha": alpha}

    return [case((4,), 6, 9, 2, 3.0), case((2, 3), 10, 4, 3, 16.0), case((3,), 7, 8, 1, 2.0)]


def merge_probe(work: Callable, case: dict) -> dict[str, Any]:
    base, x = linear(case["weight"], case["bias"]), case["x"]
    layer = work(base, case["A"].clone(), case["B"].clone(), case["alpha"])
    leaves = {"output before merging": plain(layer(x))}

    def look(when: str) -> None:
        leaves[f"output {when}"] = plain(layer(x))
        leaves[f"what the wrapped nn.Linear gives by itself, {when}"] = plain(base(x))

    layer.merge()
    look("after merging")
    leaves["W0 is frozen after merging"] = not base.weight.requires_grad
    leaves["the merged weight is a plain parameter, without a history"] = base.weight.grad_fn is None
    layer.merge()
    look("after merging twice")
    layer.unmerge()
    look("after unmerging")
    layer.unmerge()
    look("after unmerging twice")
    layer.merge()
    look("after merging again")
    return leaves


def merge_reference(base, A, B, alpha):
    """pefttools.lora.LoRALinear, with A and B put in."""
    from pefttools.lora import LoRALinear

    layer = LoRALinear(base, r=len(A), alpha=alpha)
    fill(layer.lora_A["default"].weight, A)
    fill(layer.lora_B["default"].weight, B)
    return layer


class Merge(nn.Module):
    """The layer that merges, with a switch for each thing that can go wrong; with all of them off it is right."""

    remembers = True      # merge twice = once
    resets = True         # unmerge twice = once
    path_stays = False    # the forward adds the update even when merged
    path_gone = False
    trains = False
    replaces = False
    does_merge = does_unmerge = True
    unmerge_sign = -1
    reshapes = False

    def __init__(self, base, A, B, alpha):
        super().__init__()
        self.base, self.A, self.B = base.requires_grad_(False), nn.Parameter(A), nn.Parameter(B)
        self.s, self.merged, self.kept = alpha / len(A), False, base.weight.detach().clone()
        self.merge_scale = self.out_scale = lambda s, r: s

    @torch.no_grad()
    def delta(self, scale):
        s = scale(self.s, len(self.A))
        return (self.A.T @ self.B.T).reshape(self.base.weight.shape) * s if self.reshapes else s * self.B @ self.A

    def forward(self, x):
        y = self.base(x)
        if self.path_gone or self.merged and not self.path_stays:
            return y
        return y + self.s * (x @ self.A.T) @ self.B.T

    def merge(self):
        if self.merged and self.remembers:
            return
        if self.does_merge:
            self.base.weight.data = (0 if self.replaces else self.base.weight.data) + self.delta(self.merge_scale)
        if self.trains:
            self.base.weight = nn.Parameter(self.base.weight.data)
        self.merged = True

    def unmerge(self):
        if not self.merged and self.resets:
            return
        if self.replaces:
            self.base.weight.data = self.kept
        elif self.does_unmerge:
            self.base.weight.data += self.unmerge_sign * self.delta(self.out_scale)
        self.base.weight.requires_grad_(False)
        self.merged = False


def merge_with(scale=None, out_scale=None, **switches) -> type:
    """`scale` goes into merge and unmerge both, `out_scale` into unmerge alone."""
    def init(self, base, A, B, alpha):
        Merge.__init__(self, base, A, B, alpha)
        self.merge_scale = scale or self.merge_scale
        self.out_scale = out_scale or scale or self.out_scale

    return type("Merge", (Merge,), {**switches, "__init__": init})


class MergeUnderGrad(Merge):
    """Merges without torch.no_grad(): the frozen weight becomes the result of a computation with A and B."""

    def merge(self):
        if not self.merged:
            self.base.weight.add_(self.s * self.B @ self.A)
            self.merged = True

    def unmerge(self):
        if self.merged:
            self.base.weight.data -= self.delta(self.out_scale)
            self.merged = False


class MergeAssignsUnderGrad(Merge):
    """The same with +=, which torch refuses."""

    def merge(self):
        if not self.merged:
            self.base.weight += self.s * self.B @ self.A
            self.merged = True


class MergeAssignsTensor(Merge):
    def merge(self):
        self.base.weight = self.base.weight + self.s * self.B @ self.A


class MergeShapesDoNotMeet(Merge):
    def delta(self, scale):
        return self.s * self.A @ self.B


class MergeNoUnmergeFlag(Merge):
    """Unmerges the weight and forgets to note it."""

    def unmerge(self):
        if self.merged:
            self.base.weight.data -= self.delta(self.out_scale)


class MergeKeepsOriginal(Merge):
    """Keeps W₀ and puts it back, instead of subtracting."""

    def merge(self):
        self.base.weight.data = self.kept + self.delta(self.merge_scale)
        self.merged = True

    def unmerge(self):
        self.base.weight.data = self.kept.clone()
        self.merged = False


class MergeNewParameter(Merge):
    """Gives the base a new frozen parameter each time."""

    def set(self, sign):
        with torch.no_grad():
            delta = self.s * torch.einsum("or,ri->oi", self.B, self.A)
            self.base.weight = nn.Parameter(self.base.weight + sign * delta, requires_grad=False)

    def merge(self):
        if not self.merged:
            self.set(+1)
        self.merged = True

    def unmerge(self):
        if self.merged:
            self.set(-1)
        self.merged = False


LORA_MERGE = Exercise(
    name="lora-merge", chapter=CHAPTER, title="Merge and unmerge", points=4, minutes=12, difficulty=2,
    inputs=merge_inputs, probe=merge_probe, reference=merge_reference,
    mistakes={
        "merges twice": (merge_with(remembers=False),
            "Merging a second time adds ΔW a second time. Remember in self.merged that it is already in, and "
            "return."),
        "unmerges twice": (merge_with(resets=False),
            "Unmerging a layer that is not merged takes ΔW out once too often: W₀ − ΔW is left. Look at self.merged "
            "first."),
        "no memory at all": (merge_with(remembers=False, resets=False),
            "merge() always adds and unmerge() always subtracts, however often they are called. Both should look at "
            "self.merged first and do nothing where there is nothing to do."),
        "counted twice": (merge_with(path_stays=True),
            "After merging, ΔW is in the weight and your forward adds the update once more. When merged, the forward "
            "is the wrapped layer alone."),
        "update never added": (merge_with(path_gone=True),
            "Before merging, your forward leaves the update out. It is W₀x + b + (α/r)·BAx as long as the layer is "
            "not merged."),
        "flag only": (merge_with(does_merge=False, does_unmerge=False),
            "merge() sets the flag and leaves the weight as it is: from then on the adapter is simply switched off. "
            "Put (α/r)·BA into base.weight."),
        "no scale": (merge_with(scale=lambda s, r: 1.0),
            "The merge adds BA without α/r, so the merged layer is another layer than the one you trained."),
        "alpha times r": (merge_with(scale=lambda s, r: s * r * r),
            "The merge adds α·r·BA; it should add (α/r)·BA, the same update as in the forward."),
        "alpha alone": (merge_with(scale=lambda s, r: s * r),
            "The merge adds α·BA: nothing divides by r."),
        "scale twice": (merge_with(scale=lambda s, r: s * s),
            "The merge applies α/r twice."),
        "unmerge without scale": (merge_with(out_scale=lambda s, r: 1.0),
            "merge() adds (α/r)·BA and unmerge() takes away BA: W₀ does not come back. Take away what you added, or "
            "keep W₀ and put it back."),
        "adds when unmerging": (merge_with(unmerge_sign=1),
            "unmerge() adds ΔW once more where it should take it away."),
        "no unmerge": (merge_with(does_unmerge=False),
            "unmerge() clears the flag and leaves ΔW in the weight, so the update then acts twice."),
        "unmerge forgets the flag": (MergeNoUnmergeFlag,
            "unmerge() takes ΔW out of the weight, and self.merged stays True: the forward then leaves the update "
            "out altogether. Set it back to False."),
        "replaced": (merge_with(replaces=True),
            "The merged weight is ΔW alone. It is W₀ + ΔW: add to the weight, do not replace it."),
        "wrong orientation": (merge_with(reshapes=True),
            "The numbers of ΔW are all there and in the wrong places: AᵀBᵀ is ΔW's transpose, and reshape only "
            "renames the axes. ΔW = (α/r)·B @ A has the shape of the weight by itself."),
        "weight trains": (merge_with(trains=True),
            "After merging, W₀ requires a gradient: nn.Parameter(...) does unless you pass requires_grad=False. "
            "Changing base.weight.data keeps it frozen."),
        "merged under grad": (MergeUnderGrad,
            "The merged weight carries the history of A and B with it, because the sum was taken with gradients on. "
            "Merge under torch.no_grad() (or change base.weight.data)."),
        "assigned under grad": (MergeAssignsUnderGrad,
            "PyTorch refuses, and is right to: with gradients on, the sum has a history, and a weight may not have "
            "one. Merge under torch.no_grad() (or change base.weight.data)."),
        "assigned a tensor": (MergeAssignsTensor,
            "base.weight is a parameter, and a sum of tensors is none, so it cannot take its place. Change the "
            "parameter's values: with torch.no_grad(): self.base.weight += ... (or assign to "
            "self.base.weight.data)."),
        "shapes do not meet": (MergeShapesDoNotMeet,
            "Two shapes do not meet. ΔW is B @ A, in this order: (d_out × r) times (r × d_in) gives d_out × d_in, "
            "the shape of the weight."),
    },
    alternatives={"subtracts again": Merge, "keeps W0": MergeKeepsOriginal, "new parameter": MergeNewParameter},
    rtol=1e-4, atol=2e-5, accepts="class", hides=HIDES)


# ================================================================================================ lora-inject

class Wrapped(nn.Module):
    """What the probe wraps layers in: the base plus a small fixed low-rank update, so that wrapping shows."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.cos(torch.arange(2.0 * base.in_features)).reshape(2, -1))
        self.B = nn.Parameter(torch.sin(torch.arange(2.0 * base.out_features)).reshape(-1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.1 * (x @ self.A.T) @ self.B.T


class ToyAttention(nn.Module):
    def __init__(self, d: int, d_v: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = nn.Linear(d, d), nn.Linear(d, d_v), nn.Linear(d_v, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.v_proj(x)) * torch.tanh(self.q_proj(x)).mean(-1, keepdim=True))


class ToyBlock(nn.Module):
    def __init__(self, d: int, d_v: int) -> None:
        super().__init__()
        self.attn = ToyAttention(d, d_v)
        self.conv_proj = nn.Linear(d, d)        # its name ends in "v_proj", and it is not v_proj
        self.v_proj_norm = nn.Linear(d, d)      # its name contains "v_proj"
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj_norm(self.conv_proj(self.norm(x + self.attn(x))))


class ToyModel(nn.Module):
    """A little residual network with names as in a Llama; one parameter of it is frozen from the start."""

    def __init__(self, d: int, d_v: int, layers: int, seed: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, d)
        self.layers = nn.ModuleList(ToyBlock(d, d_v) for _ in range(layers))
        self.lm_head = nn.Linear(d, 5)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=rng) * 0.4)
        self.embed.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def inject_inputs(rng: torch.Generator) -> list[dict]:
    def case(d: int, d_v: int, layers: int, targets: list[str]) -> dict:
        return {"d": d, "d_v": d_v, "layers": layers, "targets": targets, "x": randn(rng, 4, 3),
                "seed": int(torch.randint(0, 2**31, (), generator=rng))}

    return [case(8, 4, 2, ["q_proj", "v_proj"]), case(6, 3, 3, ["v_proj"]), case(6, 4, 1, ["lm_head", "attn.o_proj"])]


def wrapped_names(model: nn.Module) -> list[str]:
    return sorted(name for name, module in model.named_modules() if isinstance(module, Wrapped))


def inject_probe(work: Callable, case: dict) -> dict[str, Any]:
    def new_model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws; the student's random numbers stay as they were
            return ToyModel(case["d"], case["d_v"], case["layers"], case["seed"])

    model, x = new_model(), case["x"]
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    detach = work(model, tuple(case["targets"]), Wrapped)
    ours = {id(p) for m in model.modules() if isinstance(m, Wrapped) for p in (m.A, m.B)}
    if not callable(detach) or isinstance(detach, nn.Module):
        raise TypeError(f"inject should return a function without arguments; it returned a {type(detach).__name__}")
    leaves: dict[str, Any] = {
        "layers that were wrapped": wrapped_names(model), "output after injecting": plain(model(x)),
        "parameters of the base that still train": sorted(n for n, (p, _, _) in before.items() if p.requires_grad),
        "trainable numbers in the adapters": sum(
            p.numel() for p in model.parameters() if p.requires_grad and id(p) in ours)}
    detach()
    now = dict(model.named_parameters())
    leaves["layers still wrapped after detaching"] = wrapped_names(model)
    leaves["output after detaching"] = plain(model(x))
    leaves["after detaching, every module is the one it was"] = (
        all(dict(model.named_modules()).get(name) is m for name, m in modules.items()))
    leaves["after detaching, every weight is bit for bit as it was"] = (
        all(n in now and torch.equal(now[n].detach(), old) for n, (_, old, _) in before.items()))
    leaves["parameters that train after detaching and did not before"] = sorted(
        n for n, (p, _, trained) in before.items() if p.requires_grad and not trained)
    leaves["parameters that trained before and do not after detaching"] = sorted(
        n for n, (p, _, trained) in before.items() if trained and not p.requires_grad)
    try:
        work(new_model(), ("no_such_proj",), Wrapped)
        leaves["a target that no layer has"] = "nothing is said"
    except Exception:  # any kind of error says it
        leaves["a target that no layer has"] = "an error"
    return leaves


def make_inject(matches=lambda name, t: name == t or name.endswith("." + t), *, freeze="all first", fresh=False,
                dotted=False, says=True, first_only=False, detaches=True, flags="restored", returns="function"):
    """inject with a switch for each thing that can go wrong; with all of them as they stand it is right."""
    def inject(model, targets, wrap):
        flag = {p: p.requires_grad for p in model.parameters()}
        found = [(n, m) for n, m in model.named_modules()
                 if isinstance(m, nn.Linear) and any(matches(n, t) for t in targets)]
        if not found and says:
            raise ValueError(f"no layer is called {targets}")
        found = found[:1] if first_only else found
        if freeze == "all first":
            model.requires_grad_(False)
        for name, module in found:
            if freeze == "targets":
                module.requires_grad_(False)
            if fresh:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    module = nn.Linear(module.in_features, module.out_features).requires_grad_(False)
            new = wrap(module)
            if dotted:
                setattr(model, name, new)
            else:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, new)
        if freeze == "all last":
            model.requires_grad_(False)

        def detach():
            for name, module in found if detaches else []:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
            for p, was in flag.items():
                p.requires_grad_({"restored": was, "all on": True, "left": p.requires_grad}[flags])
        return detach if returns == "function" else model
    return inject


def inject_while_walking(model, targets, wrap):
    for name, module in model.named_modules():
        if any(name.endswith(t) for t in targets):
            setattr(model, name, wrap(module))


def inject_by_walking(model, targets, wrap):
    """Recursion over children; undo as a list of calls, run backwards."""
    undo = []
    for p in model.parameters():
        if p.requires_grad:
            p.requires_grad_(False)
            undo.append(lambda p=p: p.requires_grad_(True))

    hits = 0

    def walk(module, path):
        nonlocal hits
        for name, child in list(module.named_children()):
            here = [*path, name]
            if isinstance(child, nn.Linear) and any(here[-len(t.split(".")):] == t.split(".") for t in targets):
                setattr(module, name, wrap(child))
                undo.append(lambda m=module, n=name, c=child: setattr(m, n, c))
                hits += 1
            else:
                walk(child, here)

    walk(model, [])
    if not hits:
        raise KeyError(f"{targets} match no nn.Linear")

    def detach():
        while undo:
            undo.pop()()
    return detach


def inject_by_dictionary(model, targets, wrap):
    """Works on each parent's _modules, and returns an object that can be called."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    places = [(parent, key) for path, parent in model.named_modules() for key, child in parent._modules.items()
              if isinstance(child, nn.Linear) and ("." + path + "." + key).endswith(tuple("." + t for t in targets))]
    if not places:
        raise LookupError("nothing to adapt")
    for p, _ in flags:
        p.requires_grad = False
    for parent, key in places:
        parent._modules[key] = wrap(parent._modules[key])

    class Undo:
        def __call__(self):
            for parent, key in places:
                parent._modules[key] = parent._modules[key].base
            for p, flag in flags:
                p.requires_grad = flag
    return Undo()


LORA_INJECT = Exercise(
    name="lora-inject", chapter=CHAPTER, title="Put it into a model, by name", points=5, minutes=20, difficulty=3,
    inputs=inject_inputs, probe=inject_probe, reference=make_inject(),
    mistakes={
        "base not frozen": (make_inject(freeze="no"),
            "The layers are in place, and the whole base still trains. Freeze every parameter of the model before "
            "you put the new layers in."),
        "only the targets frozen": (make_inject(freeze="targets"),
            "You froze the layers that you wrapped, and the rest of the model (embedding, norms, head) still trains. "
            "LoRA freezes all of it."),
        "adapters frozen too": (make_inject(freeze="all last"),
            "Nothing trains: you froze after putting the new layers in, and A and B were frozen with the rest. "
            "Freeze first, then wrap."),
        "endswith without the dot": (make_inject(lambda n, t: n.endswith(t)),
            "\"conv_proj\" ends in \"v_proj\" and is another layer. Compare whole names: the name equals the target, "
            "or ends in \".\" + target."),
        "substring": (make_inject(lambda n, t: t in n),
            "A target that is only part of a name matched too (\"v_proj\" is in \"v_proj_norm\" and \"conv_proj\"). "
            "Compare whole names: equal to the target, or ending in \".\" + target."),
        "last part only": (make_inject(lambda n, t: n.split(".")[-1] == t),
            "A target may have a dot in it: \"attn.o_proj\" means o_proj inside attn. Ask whether the name ends in "
            "\".\" + target rather than looking at its last part."),
        "exact name only": (make_inject(lambda n, t: n == t, says=False),
            "Only the first level was found. named_modules() goes all the way down and gives full paths such as "
            "\"layers.0.attn.q_proj\"; the target is the path's ending. (named_children() stops at the first "
            "level.)"),
        "every Linear": (make_inject(lambda n, t: True, says=False),
            "Every nn.Linear of the model was wrapped. Wrap those whose name is asked for in targets."),
        "first only": (make_inject(first_only=True),
            "Only the first match was wrapped. A model has one q_proj in every block."),
        "setattr with dots": (make_inject(dotted=True),
            "The wrapped layers hang on the model under names with dots in them, and the forward never comes past "
            "them: the output has not changed. Find the parent module first (model.get_submodule), then set its "
            "attribute."),
        "changed while walking": (inject_while_walking,
            "The model changed while named_modules() was walking through it. Collect the matches in a list first. "
            "And a name with dots is a path: set the attribute on the parent module (model.get_submodule), or you "
            "only add a new entry at the top."),
        "new layer": (make_inject(fresh=True),
            "What you wrapped is a new nn.Linear with random weights. Wrap the layer that is there: its weights are "
            "the pretrained ones."),
        "silent": (make_inject(says=False),
            "A target that no layer has passes without a word, and a whole training run would change nothing. Raise "
            "an error that says which names there are."),
        "does not detach": (make_inject(detaches=False),
            "After detach() the wrapped layers are still in the model. Keep the original modules and set them back."),
        "detached and frozen": (make_inject(flags="left"),
            "detach() puts the layers back and leaves the model frozen. Remember each parameter's requires_grad "
            "before you change it, and restore that."),
        "detached, all trainable": (make_inject(flags="all on"),
            "detach() unfreezes everything, also what was frozen before you came (one bias of the embedding, here). "
            "Restore what was, not True."),
        "returns something else": (make_inject(returns="model"),
            "inject should return a function without arguments that takes the adapters out again, not its result and "
            "not the model: define detach inside of inject, and end with return detach (no brackets)."),
    },
    alternatives={"walks the children": inject_by_walking, "edits _modules": inject_by_dictionary},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


EXERCISES: list[Exercise] = [LORA_FORWARD, COUNT_PARAMETERS, LORA_INIT, LORA_LAYER, LORA_MERGE, LORA_INJECT]


# ================================================================================================ questions

QUESTIONS: list[Question] = [
    Question(
        name="lora-q-scale", chapter=CHAPTER, points=1, right="c",
        text="An adapter file holds `lora_A.weight` of shape `[2, 4]` and `lora_B.weight` of shape `[6, 2]`, and its "
             "configuration says `lora_alpha = 16`. By what number is $BAx$ multiplied?",
        options={
            "a": ("32", "That is α·r. The scale divides: a sum over r directions is divided by r."),
            "b": ("4", "That is 16/4, with r taken from A's second dimension. A is r × d_in: r is the first one."),
            "c": ("8", "Right: A has 2 rows, so r = 2, and α/r = 16/2."),
            "d": ("16", "That is α alone. Only at r = 1 are the two the same."),
        }),
    Question(
        name="lora-q-swapped-start", chapter=CHAPTER, points=1, right="b",
        text="Suppose a library starts with **A = 0 and B random** instead. What happens?",
        options={
            "a": ("Nothing ever trains: with one of the two at zero, no gradient flows.",
                  "One zero is enough to make ΔW zero, and it still lets a gradient through: ∂L/∂A contains B, which "
                  "is not zero. Only with both at zero is the adapter dead."),
            "b": ("It starts as the base model, and in the first step only A gets a gradient.",
                  "Right: ΔW = BA = 0 either way, and the gradient of each factor is multiplied by the other."),
            "c": ("The model starts out damaged, because B is random.",
                  "B's randomness does no harm while it multiplies Ax = 0. The output is that of the base."),
            "d": ("Both factors get a gradient in the first step, so it learns twice as fast.",
                  "The gradient of B is multiplied by Ax, which is zero in the first step: B has to wait, as A does "
                  "in the usual start."),
        }),
    Question(
        name="lora-q-rank-and-step", chapter=CHAPTER, points=1, right="d",
        text="You go from r = 8 to r = 64 and leave α = 16 and the learning rate alone. How does the change of the "
             "model's **output** after the very first step of Adam compare?",
        options={
            "a": ("About eight times as large: eight times as many directions are summed.",
                  "Eight times as many, and the scale α/r divides by eight. This would be right without the "
                  "division."),
            "b": ("About an eighth: the scale α/r has fallen by eight.",
                  "The scale has fallen by eight, and eight times as many directions are summed. The one cancels the "
                  "other."),
            "c": ("That cannot be said: Adam makes every step the same size.",
                  "Adam gives each *entry of B* a step of the same size; how much the output then changes depends on "
                  "how many entries there are and on the scale. That can be said, and the chapter measured it."),
            "d": ("About the same: that is what dividing by r is for.",
                  "Right: in the first step the r directions add up in the same sense, and α/r takes their number "
                  "out again."),
        }),
    Question(
        name="lora-q-merged-file", chapter=CHAPTER, points=1, right="a",
        text="You merge a trained adapter of rank 8 into its model and save the model. How big is the file, compared "
             "with the base model's?",
        options={
            "a": ("As big: the same matrices with other numbers in them.",
                  "Right. What merging saves is the extra multiplication; the small file is the one with A and B, "
                  "unmerged."),
            "b": ("Much smaller: the merged weights have rank 8.",
                  "ΔW has rank 8. W₀ + ΔW has in general the full rank of W₀, and is stored in full."),
            "c": ("A little bigger: base plus adapter.",
                  "After merging A and B are no longer needed. ΔW is added into numbers that were there already."),
            "d": ("As small as the adapter: only what was trained is stored.",
                  "That is the unmerged adapter file, which needs the base model beside it. The merged model stands "
                  "alone."),
        }),
    Question(
        name="lora-q-speed", chapter=CHAPTER, points=1, right="b",
        text="LoRA trains less than 1 % of the parameters. How long does one training step take, compared with full "
             "fine-tuning of the same model on the same batch?",
        options={
            "a": ("About 1 % of the time.",
                  "The forward pass goes through the whole model, and so does the backward pass on its way to the "
                  "first adapter. Only the gradients of the frozen weights themselves are saved."),
            "b": ("Somewhere between half of it and nearly all of it.",
                  "Right, as measured in this chapter: what is saved is computing the frozen weights' own gradients "
                  "and updating them. The large saving of LoRA is memory."),
            "c": ("The same: every layer is still computed forwards and backwards.",
                  "Nearly: but for a frozen W₀ the product δxᵀ, about a third of a linear layer's work, is not "
                  "computed, and the optimizer has little to do."),
            "d": ("Several times as long: there are two more matrices in every layer.",
                  "They are thin. At r = 8 and d = 2048 they add less than one percent to the multiplications; on a "
                  "small model you can feel them, and still not several times over."),
        }),
    Question(
        name="lora-q-translate", chapter=CHAPTER, points=1, right="c",
        text="A colleague's code keeps a matrix `down` of shape `[512, 16]` and a matrix `up` of shape `[16, 2048]`, and "
             "adds `x @ down @ up` to the output of a layer that takes 512 numbers and gives 2048. What goes into "
             "PEFT's `lora_A.weight`?",
        options={
            "a": ("`down`",
                  "It is the right factor in the wrong orientation. lora_A.weight is r × d_in, here [16, 512]; "
                  "`down` is its transpose."),
            "b": ("`up`",
                  "`up` has 16 rows, as lora_A has, but it meets x second. lora_A is the factor that meets x first, "
                  "and its rows are d_in = 512 long."),
            "c": ("`down.T`",
                  "Right: `down` meets x first, and PyTorch stores a weight as outputs × inputs, here [16, 512]."),
            "d": ("`up.T`",
                  "That is lora_B.weight: d_out × r, here [2048, 16]. lora_A is the factor that meets x first."),
        }),
]
