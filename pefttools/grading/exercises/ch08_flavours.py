"""Chapter 08, LoRA's relatives and choosing the rank: seven exercises and six questions.

Every answer is a function of what it is given, so probes compare values: weights, gradients, how far a real optimizer
moves each parameter, names, numbers. Cases keep apart what is easily mixed up: square and non-square weights, layer 1
and layer 11, i > j and i < j. Imports torch and the standard library only; references resolve when first used.
"""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pefttools.grading.exercise import Exercise
from pefttools.grading.leaves import gradients, plain, randn
from pefttools.grading.question import Question

CHAPTER = "08_flavours"
TITLE = "LoRA's relatives and choosing the rank"
HIDES = ("pefttools.dora", "pefttools.dora_product", "pefttools.loraplus", "pefttools.lora", "pefttools.lora_config",
         "pefttools.subspace", "pefttools.targets", "peft")


def draw(rng: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=rng))


def number(value: Any) -> Any:
    """A number out of a one-element tensor or array; anything else as it is."""
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 or type(value) is int else value


# ================================================================================================ rslora-scale

def scale_inputs(rng: torch.Generator) -> list[dict]:
    def alpha() -> float:
        return round(1 + 31 * float(torch.rand((), generator=rng)), 2)

    return [{"r": 8, "alpha": 16.0, "rslora": False}, {"r": draw(rng, 2, 60), "alpha": alpha(), "rslora": False},
            {"r": draw(rng, 5, 60), "alpha": alpha(), "rslora": True}, {"r": 64, "alpha": alpha(), "rslora": True},
            {"r": 1, "alpha": alpha(), "rslora": True}, {"r": draw(rng, 100, 300), "alpha": alpha(), "rslora": True}]


def scale_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"scale": number(work(case["r"], case["alpha"], case["rslora"]))}


def make_scale(plain_=lambda r, a: a / r, stable=lambda r, a: a / math.sqrt(r), swapped=False):
    def update_scale(r, alpha, rslora=False):
        return (stable if rslora != swapped else plain_)(r, alpha)
    return update_scale


RSLORA_SCALE = Exercise(
    name="rslora-scale", chapter=CHAPTER, title="Two scales", points=1, minutes=4, difficulty=1,
    inputs=scale_inputs, probe=scale_probe, reference="pefttools.lora:lora_scale",
    mistakes={
        "always α/r": (make_scale(stable=lambda r, a: a / r),
            "This is α/r in both cases. With rslora=True divide by the square root of r."),
        "always α/√r": (make_scale(plain_=lambda r, a: a / math.sqrt(r)),
            "This is α/√r in both cases. Without rslora it is LoRA's own α/r."),
        "the wrong way round": (make_scale(swapped=True),
            "The two have changed places: α/√r belongs to rslora=True, α/r to rslora=False."),
        "√(α/r)": (make_scale(stable=lambda r, a: math.sqrt(a / r)),
            "The square root is over α as well. It belongs under α only in that α is divided by it: α/√r."),
        "√α/r": (make_scale(stable=lambda r, a: math.sqrt(a) / r),
            "The square root has gone to α. It belongs to r: α/√r."),
        "α·√r": (make_scale(stable=lambda r, a: a * math.sqrt(r)),
            "You multiply by √r, so the update would grow with the rank. Divide by it."),
        "α alone": (make_scale(stable=lambda r, a: a),
            "With rslora you return α and leave the rank out. It still divides, by its square root."),
        "r for α": (make_scale(stable=lambda r, a: r / math.sqrt(a), plain_=lambda r, a: r / a),
            "α and r have changed places: α is in the numerator."),
        "α/r²": (make_scale(stable=lambda r, a: a / r ** 2),
            "r is squared here. rsLoRA weakens the division by r, to its square root."),
    },
    alternatives={"a power": lambda r, alpha, rslora=False: alpha * r ** (-0.5 if rslora else -1.0),
                  "√r times the plain one": lambda r, alpha, rslora=False: alpha / r * (r ** 0.5 if rslora else 1)},
    accepts="function", hides=HIDES)


# ================================================================================================ dora-column-norm

def dora_inputs(rng: torch.Generator) -> list[dict]:
    def case(d_out: int, d_in: int, r: int, alpha: float) -> dict:
        return {"W0": randn(rng, d_out, d_in), "A": randn(rng, r, d_in), "B": randn(rng, d_out, r) * 0.5,
                "m": randn(rng, d_out).abs() + 0.5, "alpha": alpha}

    return [case(5, 5, 2, 6.0), case(4, 7, 2, 3.0), case(6, 3, 1, 2.0), case(8, 8, 3, 1.0), case(2, 9, 4, 8.0)]


def dora_probe(work: Callable, case: dict) -> dict[str, Any]:
    given = {name: case[name].clone().requires_grad_(name != "W0") for name in ("W0", "A", "B", "m")}
    output = work(*given.values(), case["alpha"])
    return {"weight": plain(output), **gradients(output, m=given["m"], A=given["A"], B=given["B"])}


def dora_reference(W0, A, B, m, alpha):
    from pefttools.dora import dora_forward

    eye = torch.eye(W0.shape[1], dtype=W0.dtype)
    return dora_forward(eye, W0, A, B, m, alpha).T


def make_dora(norm=lambda V: V.norm(dim=1, keepdim=True), detach=True, scale=lambda a, r: a / r, of="V", times="rows",
              direction=True, shape=True, base=True):
    """dora_weight with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def dora_weight(W0, A, B, m, alpha):
        delta = scale(alpha, len(A)) * B @ A
        V = W0 + delta if base else delta
        n = norm({"V": V, "W0": W0, "delta": delta}[of])
        if detach:
            n = n.detach()
        if times == "none":
            return V / n
        return (m[:, None] if times == "rows" else m) * V / n
    return dora_weight


def dora_only_the_update(W0, A, B, m, alpha):
    """Normalises the update alone and adds it."""
    delta = alpha / len(A) * B @ A
    return W0 + m[:, None] * delta / delta.norm(dim=1, keepdim=True).detach()


def dora_added(W0, A, B, m, alpha):
    V = W0 + alpha / len(A) * B @ A
    return m[:, None] + V / V.norm(dim=1, keepdim=True).detach()


def dora_columns_of_m(W0, A, B, m, alpha):
    V = W0 + alpha / len(A) * B @ A
    return m * V / V.norm(dim=1).detach()


def dora_rows_without_keepdim(detach):
    """m on the rows, and the norms of the rows lined up with the columns."""
    def dora_weight(W0, A, B, m, alpha):
        V = W0 + alpha / len(A) * B @ A
        return m[:, None] * V / (V.detach() if detach else V).norm(dim=1)
    return dora_weight


def dora_product_turned(W0, A, B, m, alpha):
    V = W0 + alpha / len(A) * A @ B
    return m[:, None] * V / V.detach().norm(dim=1, keepdim=True)


def dora_without_gradients(W0, A, B, m, alpha):
    with torch.no_grad():
        return dora_reference(W0, A, B, m, alpha)


def dora_all_detached(W0, A, B, m, alpha):
    V = (W0 + alpha / len(A) * B @ A).detach()
    return m[:, None] * V / V.norm(dim=1, keepdim=True)


def dora_row_by_row(W0, A, B, m, alpha):
    rows = []
    for i in range(len(W0)):
        v = W0[i] + alpha / len(A) * (B[i] @ A)
        rows.append(m[i] / v.detach().square().sum().sqrt() * v)
    return torch.stack(rows)


def dora_two_factors(W0, A, B, m, alpha):
    """One factor for each row, from the Gram matrices, without W0 + ΔW in one piece for the norm."""
    s = alpha / len(A)
    with torch.no_grad():
        square = W0.square().sum(1) + 2 * s * (B * (W0 @ A.T)).sum(1) + s * s * (B @ (A @ A.T) * B).sum(1)
    return torch.diag(m / square.sqrt()) @ (W0 + s * (B @ A))


DORA_NORM = Exercise(
    name="dora-column-norm", chapter=CHAPTER, title="DoRA's weight", points=4, minutes=12, difficulty=2,
    inputs=dora_inputs, probe=dora_probe, reference=dora_reference,
    mistakes={
        "the wrong axis": (make_dora(norm=lambda V: V.norm(dim=0, keepdim=True)),
            "The norm runs over the wrong axis. The paper says “column”, but it writes x W; in torch the weight is "
            "[d_out, d_in] and an output is a row. There is one length for each of the d_out rows: sum the squares "
            "along d_in, dim=1."),
        "the wrong axis, m along the columns": (make_dora(norm=lambda V: V.norm(dim=0), times="columns"),
            "Norm and m both belong to columns here: one length for each input. In torch a row of the weight makes an "
            "output, and m has d_out numbers: dim=1, and m[:, None]."),
        "the wrong axis, gradient through it": (make_dora(norm=lambda V: V.norm(dim=0, keepdim=True), detach=False),
            "The norm runs over the wrong axis: dim=0 gives one length for each of the d_in columns. In torch an "
            "output is a row, so it is dim=1. (And the norm is to be a constant: .detach().)"),
        "the wrong axis, as it is often printed": (make_dora(norm=lambda V: V.norm(dim=0), times="columns",
                                                             detach=False),
            "This is the code that is often printed: norm over dim=0, one length for each input. In torch a row of the "
            "weight makes an output, and m has d_out numbers: dim=1, and m[:, None]. (And the norm is to be a "
            "constant: .detach().)"),
        "norm along the columns": (dora_rows_without_keepdim(True),
            "The norms are the rows', and torch lines a vector up with the *columns*. keepdim=True makes it [d_out, "
            "1], and then it divides the rows."),
        "norm along the columns, gradient through it": (dora_rows_without_keepdim(False),
            "The norms are the rows', and torch lines a vector up with the columns: keepdim=True makes it [d_out, 1]. "
            "(And the norm is to be a constant: .detach().)"),
        "A times B": (dora_product_turned,
            "B is [d_out, r] and A is [r, d_in]: it is B @ A that has the shape of W₀. (A @ B is r × r, where it fits "
            "at all.)"),
        "no gradients at all": (dora_without_gradients,
            "Everything is computed under no_grad, so nothing learns, m included. Only the norm is a constant: "
            ".detach() on it."),
        "m along the columns": (make_dora(times="columns"),
            "The norm is right, and m is multiplied along the columns: a vector times a matrix lines up with the last "
            "dimension. m belongs to the rows: m[:, None]."),
        "no keepdim": (dora_columns_of_m,
            "m and the norm are vectors of length d_out, and torch lines them up with the columns. They belong to the "
            "rows: write (m / norm)[:, None], or keepdim=True."),
        "one norm for all": (make_dora(norm=lambda V: V.norm()),
            "This is the norm of the whole matrix. Each row gets a length of its own."),
        "the norm of W0": (make_dora(of="W0"),
            "You divide by the norm of W₀. It is the norm of W₀ + ΔW, so that what is left is a pure direction, of "
            "length 1, and m alone says how long the row is."),
        "the norm of ΔW": (make_dora(of="delta"),
            "You divide by the norm of ΔW. It is the norm of the sum, W₀ + ΔW."),
        "only the update": (dora_only_the_update,
            "Here m sets the length of ΔW, which is then added to W₀. DoRA sets the length of the sum: add first, then "
            "divide and multiply."),
        "W0 left out": (make_dora(base=False),
            "W₀ is missing: the direction is that of W₀ + ΔW, not that of ΔW."),
        "no magnitude": (make_dora(times="none"),
            "Every row has length 1 and m has no effect. Multiply row i by m[i]."),
        "m added": (dora_added, "m is added. It is a length: it multiplies the direction."),
        "no scale": (make_dora(scale=lambda a, r: 1.0), "α/r is missing: ΔW = (α/r)·B·A."),
        "α without r": (make_dora(scale=lambda a, r: a), "r is missing in the scale: ΔW = (α/r)·B·A; r is len(A)."),
        "the square of the norm": (make_dora(norm=lambda V: V.square().sum(dim=1, keepdim=True)),
            "You divide by the sum of the squares. The length is its square root."),
        "sum of absolute values": (make_dora(norm=lambda V: V.abs().sum(dim=1, keepdim=True)),
            "This is the sum of the absolute values. DoRA takes the Euclidean length."),
        "gradient through the norm": (make_dora(detach=False),
            "The weight is right, and the gradient also runs through the norm. The paper (section 4.3) takes the norm "
            "for a constant, and so does peft: .detach() on the norm."),
        "nothing learns but m": (dora_all_detached,
            "The weight is right, but A and B get no gradient: .detach() or no_grad has cut off all of W₀ + ΔW. Only "
            "the norm is a constant."),
    },
    alternatives={"row by row": dora_row_by_row, "one factor per row": dora_two_factors,
                  "by normalize": lambda W0, A, B, m, alpha: (
                      lambda V: (m / (V.detach() / F.normalize(V.detach(), dim=1)).mean(dim=1))[:, None] * V)(
                          W0 + alpha / len(A) * B @ A)},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ loraplus-groups

def groups_inputs(rng: torch.Generator) -> list[dict]:
    def case(dora: bool, head: bool, frozen_B: bool = False) -> dict:
        shapes = {"model.layers.0.q_proj.base_layer.weight": ((4, 5), False), "model.layers.0.q_proj.base_layer.bias": (
            (4,), False),
                  "model.layers.0.q_proj.lora_A.default.weight": ((2, 5), True),
                  "model.layers.0.q_proj.lora_B.default.weight": ((4, 2), True),
                  "model.block_B.up_proj.base_layer.weight": ((6, 4), False),
                  "model.block_B.up_proj.lora_A.default.weight": ((2, 4), True),
                  "model.block_B.up_proj.lora_B.default.weight": ((6, 2), True)}
        if frozen_B:                                          # a second adapter that rests
            shapes |= {"model.layers.0.q_proj.lora_A.french.weight": ((1, 5), False),
                       "model.layers.0.q_proj.lora_B.french.weight": ((4, 1), False)}
        if dora:
            shapes |= {"model.layers.0.q_proj.lora_magnitude_vector.default.weight": ((4,), True)}
        if head:
            shapes |= {"score.weight": ((2, 4), True)}
        names = list(shapes)
        order = torch.randperm(len(names), generator=rng).tolist()
        return {"shapes": [(names[i], *shapes[names[i]]) for i in order], "seed": draw(rng, 0, 2 ** 30),
                "lr": (1 + draw(rng, 0, 900)) / 1e4, "ratio": float(draw(rng, 2, 40))}

    return [case(False, False), case(False, True, True), case(True, True)]


def groups_probe(work: Callable, case: dict) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(case["seed"])
    named = [(name, nn.Parameter(randn(rng, *shape), requires_grad=trains)) for name, shape, trains in case["shapes"]]
    before = [p.detach().clone() for _, p in named]
    groups = work(list(named), case["lr"], case["ratio"])
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, dict) for group in groups):
        raise TypeError("loraplus_groups should return a list of dicts, {'params': [...], 'lr': ...}, one for each "
                        "rate")
    optimizer = torch.optim.SGD([dict(group) for group in groups], lr=1e-9)
    for _, p in named:
        # frozen ones too: an optimizer that holds them would move them
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {f"one step moves {name} by": (was - p.detach()).mean().item()
            for (name, p), was in sorted(zip(named, before), key=lambda item: item[0][0])}


def groups_reference(named, lr, ratio):
    from pefttools.loraplus import loraplus_groups

    root = nn.Module()
    for name, parameter in named:
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        at.register_parameter(last, parameter)
    return loraplus_groups(root, lr, ratio)


def make_groups(fast=lambda n: "lora_B" in n or "lora_magnitude_vector" in n, slow=lambda n: True, rate=lambda lr,
                q: lr * q,
                base=lambda lr, q: lr, trains=True):
    """loraplus_groups with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def loraplus_groups(named, lr, ratio):
        kept = [(n, p) for n, p in named if p.requires_grad or not trains]
        return [{"params": [p for n, p in kept if not fast(n) and slow(n)], "lr": base(lr, ratio)},
                {"params": [p for n, p in kept if fast(n)], "lr": rate(lr, ratio)}]
    return loraplus_groups


def groups_twice(named, lr, ratio):
    return [{"params": [p for _, p in named if p.requires_grad], "lr": lr},
            {"params": [p for n, p in named if p.requires_grad and "lora_B" in n], "lr": lr * ratio}]


def groups_of_a_and_b(named, lr, ratio):
    """As in most examples: two comprehensions, and nobody asks what trains."""
    return [{"params": [p for n, p in named if "lora_A" in n], "lr": lr},
            {"params": [p for n, p in named if "lora_B" in n], "lr": lr * ratio}]


def groups_of_one(named, lr, ratio):
    """One group for each parameter."""
    return [{"params": [p], "lr": lr * ratio if ".lora_B." in n or p.ndim == 1 else lr} for n, p in named
            if p.requires_grad]


def groups_by_dict(named, lr, ratio):
    found: dict[float, list] = {}
    for name, p in named:
        if p.requires_grad:
            quick = any(part in ("lora_B", "lora_magnitude_vector") for part in name.split("."))
            found.setdefault(lr * (ratio if quick else 1.0), []).append(p)
    return [{"lr": rate, "params": some} for rate, some in found.items()]


LORAPLUS = Exercise(
    name="loraplus-groups", chapter=CHAPTER, title="LoRA+: two learning rates", points=3, minutes=8, difficulty=2,
    inputs=groups_inputs, probe=groups_probe, reference=groups_reference,
    mistakes={
        "A learns faster": (make_groups(fast=lambda n: "lora_A" in n),
            "A has the higher rate. In LoRA+ it is B that learns faster, by the factor `ratio`."),
        "divided for A": (make_groups(base=lambda lr, q: lr / q, rate=lambda lr, q: lr),
            "You slow A down instead of speeding B up. `lr` is A's rate; B's is lr · ratio."),
        "B slower": (make_groups(rate=lambda lr, q: lr / q),
            "B's rate is divided by the ratio. It is multiplied: lr · ratio."),
        "the ratio as the rate": (make_groups(rate=lambda lr, q: q),
            "The ratio itself is B's rate here. It is a factor: lr · ratio."),
        "one rate": (make_groups(rate=lambda lr, q: lr),
            "All groups have the same rate, which is plain LoRA. B's is lr · ratio. (Where two rates are there: does a "
            "name *end* in “lora_B”? After it comes the adapter's name.)"),
        "A too": (make_groups(fast=lambda n: "lora_" in n),
            "“lora_” is in the names of A as well, so both learn fast. Only “lora_B” (and DoRA's magnitude) do."),
        "any B": (make_groups(fast=lambda n: "B" in n or "lora_magnitude_vector" in n),
            "A module with a B in its name is not yet a B: “block_B.up_proj.lora_A” is an A. Look for “lora_B”."),
        "frozen ones too": (make_groups(trains=False),
            "Frozen parameters are in a group as well. Take only those with requires_grad."),
        "only A and B": (make_groups(slow=lambda n: "lora_A" in n),
            "What trains beside A and B, here a new head, is in no group: the optimizer will never touch it. It goes "
            "with A, at lr."),
        "only A and B, frozen ones too": (groups_of_a_and_b,
            "Two things at once: a frozen adapter is in a group as well (look at requires_grad), and what trains "
            "beside A and B (a new head, DoRA's magnitude) is in none."),
        "magnitude slow": (make_groups(fast=lambda n: "lora_B" in n),
            "DoRA's magnitude learns at lr here. As in peft, it goes with B: lr · ratio."),
        "head fast": (make_groups(fast=lambda n: "lora_A" not in n),
            "Everything that is not an A learns fast here, also the new head. Only B and DoRA's magnitude do."),
        "B twice": (groups_twice,
            "B is in both groups, and torch refuses that. Every parameter belongs to exactly one."),
    },
    alternatives={"a group for each parameter": groups_of_one, "sorted by rate": groups_by_dict},
    rtol=1e-3, accepts="function", hides=HIDES)


# ================================================================================================ pick-layers

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def pick_inputs(rng: torch.Generator) -> list[dict]:
    def names(layers: int, experts: int = 0) -> list[str]:
        found = ["model.embed_tokens"]
        for i in range(layers):
            found += [f"model.layers.{i}.self_attn.{kind}" for kind in ATTENTION]
            if experts:
                found += [f"model.layers.{i}.mlp.experts.{j}.{kind}" for j in range(experts)
                          for kind in ("up_proj", "down_proj")]
            else:
                found += [f"model.layers.{i}.mlp.{kind}" for kind in MLP]
            found.append(f"model.layers.{i}.mlp.group_proj")         # ends in "up_proj" without being one
        return [*found, "lm_head"]

    def kinds(count: int, of: tuple[str, ...]) -> list[str]:
        return [of[i] for i in torch.randperm(len(of), generator=rng)[:count].tolist()]

    return [{"names": names(draw(rng, 4, 8)), "kinds": kinds(2, ATTENTION), "top": 2},
            {"names": names(draw(rng, 11, 15)), "kinds": ["up_proj", *kinds(1, ATTENTION)], "top": draw(rng, 3, 6)},
            {"names": names(draw(rng, 3, 6)), "kinds": kinds(3, (*ATTENTION, "gate_proj")), "top": None},
            {"names": names(draw(rng, 5, 9), experts=3), "kinds": ["up_proj"], "top": draw(rng, 1, 3)}]


def pick_probe(work: Callable, case: dict) -> dict[str, Any]:
    found = work(list(case["names"]), list(case["kinds"]), case["top"])
    return {"names": list(found) if isinstance(found, (list, tuple)) else found}


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def make_pick(kind=lambda name, kinds: name.split(".")[-1] in kinds, first=lambda L, top: L - top, last=lambda L,
              top: L,
              number=layer_of, every=True, ordered=True):
    """pick_layers with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def pick_layers(names, kinds, top=None):
        numbers = [number(name) for name in names]
        L = 1 + max(n for n in numbers if n is not None)
        keep = range(L) if top is None else range(max(0, first(L, top)), last(L, top))
        if top is None and not every:
            keep = range(0)
        return [name for name, n in zip(names, numbers) if n in keep and kind(name, kinds)]
    return pick_layers


def pick_as_texts(names, kinds, top=None):
    """Compares layer numbers as texts: "9" > "11"."""
    numbers = sorted({name.split(".")[2] for name in names if ".layers." in name})
    keep = numbers[-top:] if top else numbers
    return [name for name in names if ".layers." in name and name.split(".")[2] in keep
            and name.split(".")[-1] in kinds]


def pick_needs_a_number(names, kinds, top=None):
    """Takes the third part of every name for a number; "lm_head" has none."""
    count = 1 + max(int(name.split(".")[2]) for name in names)
    return [name for name in names if name.split(".")[-1] in kinds and int(name.split(".")[2]) >= count
            - (top or count)]


def pick_subtracts_none(names, kinds, top=None):
    numbers = [layer_of(name) for name in names]
    least = 1 + max(n for n in numbers if n is not None) - top
    return [name for name, n in zip(names, numbers) if name.split(".")[-1] in kinds and n is not None and n >= least]


def pick_modules(names, kinds, top=None):
    found = [name for name in names if name.split(".")[-1] in kinds]
    return found[-top:] if top else found


def pick_by_kind(names, kinds, top=None):
    right = make_pick()(names, kinds, top)
    return [name for kind in kinds for name in right if name.split(".")[-1] == kind]


def pick_inner_number(name: str) -> int | None:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[-1] if numbers else None


def pick_by_regex(names, kinds, top=None):
    import re

    numbers = {name: int(m[1]) for name in names if (m := re.search(r"\.layers\.(\d+)\.", name))}
    least = 0 if top is None else max(numbers.values()) - top + 1
    pattern = re.compile(r".*\.(" + "|".join(map(re.escape, kinds)) + ")")
    return [name for name in names if numbers.get(name, -1) >= least and pattern.fullmatch(name)]


def pick_in_two_goes(names, kinds, top=None):
    some = [name for name in names if name.rpartition(".")[2] in set(kinds)]
    if top is None:
        return some
    last = max(int(name.split(".layers.")[1].split(".")[0]) for name in names if ".layers." in name)
    return [name for name in some if last - int(name.split(".layers.")[1].split(".")[0]) < top]


PICK = Exercise(
    name="pick-layers", chapter=CHAPTER, title="Which layers", points=3, minutes=10, difficulty=2,
    inputs=pick_inputs, probe=pick_probe, reference=make_pick(),
    mistakes={
        "the bottom layers": (make_pick(first=lambda L, top: 0, last=lambda L, top: top),
            "These are the layers next to the input. “Top” means next to the output: the highest numbers."),
        "one too few": (make_pick(first=lambda L, top: L - top + 1),
            "One layer is missing: layers are counted from 0, so the top `top` of L layers are L − top … L − 1."),
        "one too many": (make_pick(first=lambda L, top: L - top - 1),
            "One layer too many: layers are counted from 0, so the top `top` of L layers begin at L − top."),
        "only one layer": (make_pick(first=lambda L, top: L - top, last=lambda L, top: L - top + 1),
            "You take one layer, the one at L − top. All from there to the last belong to the top."),
        "numbers as texts": (pick_as_texts,
            "Layer numbers are compared as texts, and \"9\" comes after \"11\". Make whole numbers of them first: "
            "int(...)."),
        "every name has a number": (pick_needs_a_number,
            "“lm_head” and “model.embed_tokens” are in no layer and have no number: name.split(\".\")[2] is not there. "
            "Look for “layers” among the parts first."),
        "None is a number": (pick_subtracts_none,
            "top=None means all layers, and None cannot be subtracted. Treat it first: if top is None, the first layer "
            "is 0."),
        "counts modules": (pick_modules,
            "You take the last `top` modules. `top` counts layers, and each layer has several of these modules."),
        "part of a name": (make_pick(kind=lambda name, kinds: any(name.endswith(kind) for kind in kinds)),
            "“group_proj” ends in “up_proj”, and is another module. Compare the whole last part of the name: "
            "name.split(\".\")[-1]."),
        "the expert's number": (make_pick(number=pick_inner_number),
            "In “layers.3.mlp.experts.1.up_proj” you take the 1 for the layer. The layer's number is the one after "
            "“layers”."),
        "every kind": (make_pick(kind=lambda name, kinds: True),
            "You take every module of these layers. Only those whose name ends in one of `kinds`."),
        "every layer": (make_pick(first=lambda L, top: 0),
            "`top` has no effect: modules of all layers come back."),
        "None is nothing": (make_pick(every=False),
            "With top=None nothing comes back. It means: all layers."),
        "another order": (pick_by_kind,
            "These are the right names in another order (kind by kind). Keep the model's order."),
    },
    alternatives={"by regular expression": pick_by_regex, "kinds first, then layers": pick_in_two_goes},
    accepts="function", hides=HIDES)


# ================================================================================================ subspace-similarity

def phi_inputs(rng: torch.Generator) -> list[dict]:
    def case(r_A: int, r_B: int, n: int, i: int, j: int) -> dict:
        shared = randn(rng, 1, n)
        A = randn(rng, r_A, n) + 2 * randn(rng, r_A, 1) * shared
        B = randn(rng, r_B, n) + 2 * randn(rng, r_B, 1) * shared
        return {"A": A, "B": B, "i": i, "j": j}

    return [case(3, 3, 6, 1, 1), case(4, 7, 10, 2, 5), case(5, 3, 9, 4, 2), case(6, 6, 8, 3, 3), case(2, 8, 12, 2, 8)]


def phi_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"φ": number(work(case["A"].clone(), case["B"].clone(), case["i"], case["j"]))}


def make_phi(basis=lambda M, k: torch.linalg.svd(M, full_matrices=False)[2][:k], divide=min, power=2, norm=None):
    """subspace_similarity with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def subspace_similarity(A, B, i, j):
        inner = basis(A, i) @ basis(B, j).T
        value = inner.norm() ** power if norm is None else norm(inner)
        return (value / divide(i, j)).item()
    return subspace_similarity


def phi_qr(M, k):
    return torch.linalg.qr(M.T)[0].T[:k]


def phi_left(M, k):
    return torch.linalg.svd(M, full_matrices=False)[0][:, :k].T


def phi_columns_of_Vh(M, k):
    return torch.linalg.svd(M, full_matrices=False)[2][:, :k].T


def phi_columns_of_full_Vh(M, k):
    """As if the third were V, as it was in torch.svd: the columns of what is Vh."""
    return torch.linalg.svd(M)[2][:, :k].T


def phi_outer(A, B, i, j):
    inner = torch.linalg.svd(A, full_matrices=False)[2][:i].T @ torch.linalg.svd(B, full_matrices=False)[2][:j]
    return (inner.norm() ** 2 / min(i, j)).item()


def phi_last(M, k):
    return torch.linalg.svd(M, full_matrices=False)[2][-k:]


def phi_weighted(M, k):
    _, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return (S[:, None] * Vh)[:k]


def phi_by_projectors(A, B, i, j):
    """The trace of the product of two projections."""
    def projection(M, k):
        vectors = torch.linalg.eigh(M.T @ M).eigenvectors[:, -k:]
        return vectors @ vectors.T
    return torch.trace(projection(A, i) @ projection(B, j)).item() / min(i, j)


def phi_by_angles(A, B, i, j):
    """The mean of cos² over the principal angles."""
    U, V = torch.linalg.svd(A)[2][:i], torch.linalg.svd(B)[2][:j]
    cosines = torch.linalg.svdvals(U @ V.T)
    return cosines.square().mean().item()


PHI = Exercise(
    name="subspace-similarity", chapter=CHAPTER, title="Do two trainings use the same directions?", points=4,
    minutes=12,
    difficulty=2, inputs=phi_inputs, probe=phi_probe, reference="pefttools.subspace:subspace_similarity",
    mistakes={
        "left vectors": (make_phi(basis=phi_left),
            "These are the left-singular vectors: directions among the r rows. A's directions in the layer's input are "
            "the right-singular ones, the rows of Vh."),
        "columns of Vh": (make_phi(basis=phi_columns_of_Vh),
            "torch gives Vh, whose rows are the right-singular vectors. You took its first columns."),
        "columns of the whole Vh": (make_phi(basis=phi_columns_of_full_Vh),
            "torch.linalg.svd gives U, S and Vh: the third is already transposed, and its *rows* are the "
            "right-singular vectors. You took columns: Vh[:i], not V[:, :i]."),
        "the other product": (phi_outer,
            "The vectors are rows of Vh, so their inner products are U_A @ U_B.T, [i, j]. You have transposed the "
            "other one."),
        "no order": (make_phi(basis=phi_qr),
            "Your basis is orthonormal, but its first i vectors are not the i main directions: QR takes the rows as "
            "they come. The SVD sorts by size."),
        "rows of A": (make_phi(basis=lambda M, k: M[:k]),
            "You compare rows of A and B themselves. They are neither of length 1 nor orthogonal; take the "
            "right-singular vectors."),
        "normalised rows": (make_phi(basis=lambda M, k: F.normalize(M[:k], dim=1)),
            "The rows have length 1 now, and are still not orthogonal nor sorted. Take the right-singular vectors."),
        "the smallest": (make_phi(basis=phi_last),
            "These are the directions of the smallest singular values. torch sorts from large to small: take the first "
            "i rows."),
        "weighted": (make_phi(basis=phi_weighted),
            "The singular values are still in. φ compares directions, all of length 1: take Vh alone."),
        "not divided": (make_phi(divide=lambda i, j: 1), "Divide by min(i, j), so that 1 means: one contains the "
                                                         "other."),
        "divided by max": (make_phi(divide=max),
            "You divide by the larger of i and j. Then two directions within five could never reach 1. Divide by the "
            "smaller."),
        "divided by i": (make_phi(divide=lambda i, j: i),
            "You divide by i. Where j is smaller, φ could never reach 1: divide by min(i, j)."),
        "divided by j": (make_phi(divide=lambda i, j: j),
            "You divide by j. Where i is smaller, φ could never reach 1: divide by min(i, j)."),
        "divided by i·j": (make_phi(divide=lambda i, j: i * j),
            "This is the mean of the squares over all i·j pairs. Each of the smaller set's directions can be used up "
            "once only: divide by min(i, j)."),
        "not squared": (make_phi(power=1), "The Frobenius norm has to be squared: it is the sum of the squares."),
        "largest angle": (make_phi(norm=lambda inner: torch.linalg.matrix_norm(inner, 2) ** 2, divide=lambda i, j: 1),
            "This is the spectral norm: it looks at the one best pair of directions. φ averages over all: the "
            "Frobenius norm."),
    },
    alternatives={"by projections": phi_by_projectors, "by principal angles": phi_by_angles},
    rtol=1e-3, atol=1e-4, accepts="function", hides=HIDES)


# ================================================================================================ rank-budget-by-svd

def budget_inputs(rng: torch.Generator) -> list[dict]:
    def case(shapes: list[tuple[int, int]], budget: int) -> dict:
        deltas = [randn(rng, *shape) * (0.3 + 2 * float(torch.rand((), generator=rng))) for shape in shapes]
        return {"deltas": [d @ torch.diag(torch.logspace(0, -1.2, d.shape[1])) for d in deltas], "budget": budget}

    first = case([(5, 5)] * 3, 6)
    uneven = case([(6, 4), (3, 8), (7, 7), (4, 4)], 9)
    weak = case([(5, 6), (6, 5), (8, 8)], 7)
    weak["deltas"][draw(rng, 0, 3)] *= 1e-3                  # a layer that hardly changed gets nothing
    steep = case([(9, 9)] * 4, 10)
    steep["deltas"][draw(rng, 0, 4)] *= 4.0
    return [first, uneven, weak, steep, case([(4, 4), (6, 3)], 7)]


def budget_probe(work: Callable, case: dict) -> dict[str, Any]:
    found = work([delta.clone() for delta in case["deltas"]], case["budget"])
    if isinstance(found, Tensor):
        found = found.tolist()
    return {"ranks": [int(k) if isinstance(k, (float, Tensor)) and float(k).is_integer() else k for k in found]
            if isinstance(found, (list, tuple)) else found}


def budget_by_score(deltas, budget, score):
    """The `budget` largest scores over all layers; score gives one number per singular value."""
    every = torch.cat([score(d) for d in deltas])
    owner = torch.cat([torch.full((len(score(d)),), i) for i, d in enumerate(deltas)])
    kept = owner[every.argsort(descending=True)[:budget]]
    return [int((kept == i).sum()) for i in range(len(deltas))]


def make_budget(score=torch.linalg.svdvals):
    return lambda deltas, budget: budget_by_score(deltas, budget, score)


def budget_equal(deltas, budget):
    return [budget // len(deltas) + (i < budget % len(deltas)) for i in range(len(deltas))]


def budget_floor(deltas, budget):
    return [budget // len(deltas)] * len(deltas)


def budget_by_energy(deltas, budget):
    """In proportion to the squares."""
    squares = [d.square().sum().item() for d in deltas]
    return [round(budget * q / sum(squares)) for q in squares]


def budget_one_too_few(deltas, budget):
    """More than the budget-th largest, where it should be at least that."""
    least = torch.cat([torch.linalg.svdvals(d) for d in deltas]).sort(descending=True).values[budget - 1]
    return [int((torch.linalg.svdvals(d) > least).sum()) for d in deltas]


def budget_matrix_ranks(deltas, budget):
    return [int(torch.linalg.matrix_rank(d)) for d in deltas]


def budget_numbers(deltas, budget):
    return budget_by_score(deltas, budget, lambda d: d.abs().flatten())


def budget_stacked(deltas, budget):
    return torch.stack([torch.linalg.svdvals(d) for d in deltas]).flatten().topk(budget)


def budget_by_norm(deltas, budget):
    """In proportion to the layers' norms."""
    norms = [d.norm().item() for d in deltas]
    return [round(budget * n / sum(norms)) for n in norms]


def budget_each(deltas, budget):
    return [min(budget, *d.shape) for d in deltas]


def budget_front_first(deltas, budget):
    ranks = []
    for d in deltas:
        ranks.append(min(budget - sum(ranks), *d.shape))
    return ranks


def budget_at_least_one(deltas, budget):
    """One for each layer first, the rest by size."""
    extra = budget_by_score(deltas, budget - len(deltas), lambda d: torch.linalg.svdvals(d)[1:])
    return [1 + k for k in extra]


def budget_entries(deltas, budget):
    return budget_by_score(deltas, budget, lambda d: d.norm(dim=1))


def budget_by_heap(deltas, budget):
    import heapq

    pairs = [(value, i) for i, d in enumerate(deltas) for value in torch.linalg.svdvals(d).tolist()]
    ranks = [0] * len(deltas)
    for _, i in heapq.nlargest(budget, pairs):
        ranks[i] += 1
    return ranks


def budget_by_threshold(deltas, budget):
    spectra = [torch.linalg.eigvalsh(d @ d.T if d.shape[0] <= d.shape[1] else d.T @ d) for d in deltas]
    least = sorted((value for s in spectra for value in s.tolist()), reverse=True)[min(budget, sum(map(len, spectra)))
                                                                                   - 1]
    return [sum(value >= least for value in s.tolist()) for s in spectra]


BUDGET = Exercise(
    name="rank-budget-by-svd", chapter=CHAPTER, title="A rank budget over layers", points=4, minutes=12, difficulty=3,
    inputs=budget_inputs, probe=budget_probe, reference=make_budget(),
    mistakes={
        "the same for all": (budget_equal,
            "Every layer gets the same rank, whatever is in it. Compare the singular values of all layers and keep the "
            "largest."),
        "an equal part": (budget_floor,
            "Every layer gets budget // layers, whatever is in it. Compare the singular values of all layers and keep "
            "the largest."),
        "by energy": (budget_by_energy,
            "You share out in proportion to the squared norms. A large norm may be a single direction; count singular "
            "values."),
        "one too few": (budget_one_too_few,
            "The last of the budget is missing: `>` leaves out the value at the threshold itself. With >= there are "
            "`budget`."),
        "the ranks of the matrices": (budget_matrix_ranks,
            "These are the matrices' own ranks. The budget says how many directions all of them may keep together."),
        "single numbers": (budget_numbers,
            "You count entries of the matrices. A direction is a singular vector: torch.linalg.svdvals."),
        "stacked": (budget_stacked,
            "The matrices have different shapes, so their singular values cannot be stacked. torch.cat puts them one "
            "after the other; remember which matrix each comes from."),
        "by norm": (budget_by_norm,
            "You share out in proportion to the norms. A large norm may be a single direction; count singular values."),
        "the budget for each": (budget_each,
            "Each layer gets the whole budget. It is for all layers together."),
        "first come": (budget_front_first,
            "The first layers take what they can, and nothing is left for the others. Sort the singular values of all "
            "layers together."),
        "one for each": (budget_at_least_one,
            "Every layer gets at least rank 1. A layer that hardly changed may get 0: only the sizes count."),
        "relative to its layer": (make_budget(lambda d: torch.linalg.svdvals(d) / torch.linalg.svdvals(d)[0]),
            "You divide by each layer's largest singular value, so a layer that hardly changed counts as much as one "
            "that changed a lot. Compare the singular values themselves."),
        "the smallest": (make_budget(lambda d: -torch.linalg.svdvals(d)),
            "The smallest singular values are kept. Keep the largest: they are most of the update."),
        "rows, not directions": (budget_entries,
            "You count rows of large norm. A direction is a singular vector: torch.linalg.svdvals."),
    },
    alternatives={"by heap": budget_by_heap, "by threshold": budget_by_threshold},
    accepts="function", hides=())


# ================================================================================================ paired-difference

def pairs_inputs(rng: torch.Generator) -> list[dict]:
    def case(n: int, gap: float) -> dict:
        seeds = randn(rng, n).double() * 0.3 + 2               # what the seed does to both
        a = seeds + randn(rng, n).double() * 0.1
        b = seeds + randn(rng, n).double() * 0.1 + gap
        return {"a": [round(x, 4) for x in a.tolist()], "b": [round(x, 4) for x in b.tolist()]}

    return [case(3, 0.4), case(5, -0.3), case(2, 0.8), case(12, 0.05)]


def pairs_probe(work: Callable, case: dict) -> dict[str, Any]:
    found = work(list(case["a"]), list(case["b"]))
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError("paired_difference should return two numbers, (mean difference, its standard error)")
    return {"mean difference": number(found[0]), "standard error": number(found[1])}


def make_pairs(sign=1, spread=statistics.stdev, root=True, paired=True):
    """paired_difference with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def paired_difference(a, b):
        d = [sign * (y - x) for x, y in zip(a, b)]
        n = len(d) ** 0.5 if root is True else 1 if root is None else len(d)
        se = spread(d) / n if paired else ((statistics.variance(a) + statistics.variance(b)) / len(a)) ** 0.5
        return statistics.fmean(d), se
    return paired_difference


def pairs_absolute(a, b):
    d = [abs(y - x) for x, y in zip(a, b)]
    return statistics.fmean(d), statistics.stdev(d) / len(d) ** 0.5


def pairs_by_torch(a, b):
    d = torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64)
    return d.mean().item(), (d.std() / math.sqrt(len(d))).item()


def pairs_by_variances(a, b):
    """Var(b − a) = Var a + Var b − 2 Cov(a, b)."""
    n = len(a)
    ma, mb = sum(a) / n, sum(b) / n
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b)) / (n - 1)
    return mb - ma, ((statistics.variance(a) + statistics.variance(b) - 2 * cov) / n) ** 0.5


PAIRS = Exercise(
    name="paired-difference", chapter=CHAPTER, title="Is it a difference?", points=2, minutes=8, difficulty=2,
    inputs=pairs_inputs, probe=pairs_probe, reference=make_pairs(),
    mistakes={
        "a minus b": (make_pairs(sign=-1), "The sign is turned round: it is b − a, so that a negative number means "
                                           "that b has the lower loss."),
        "without the sign": (pairs_absolute,
            "You take absolute values. The sign says which of the two is better, and differences of both signs "
            "cancel."),
        "not paired": (make_pairs(paired=False),
            "The standard error is that of two separate groups. Seed k drew the same data for a[k] and b[k], so what "
            "the seed does to both cancels in b[k] − a[k]: take the spread of the differences."),
        "spread of one run": (make_pairs(root=None),
            "This is the standard deviation of the differences: how far a single one lies from the mean. The mean "
            "itself is known better: divide by √n."),
        "divided by n": (make_pairs(root=False), "The standard deviation is divided by n. It is √n: four times the "
                                                 "seeds, half the error."),
        "n for n − 1": (make_pairs(spread=statistics.pstdev),
            "Your standard deviation divides by n, which is too small when the mean comes from the same few numbers. "
            "Divide by n − 1 (statistics.stdev, torch.std)."),
        "variance": (make_pairs(spread=statistics.variance), "The square root is missing: you took the variance."),
        "range": (make_pairs(spread=lambda d: (max(d) - min(d)) / 2),
                  "You took half the range. The standard error comes from the standard deviation."),
    },
    alternatives={"by torch": pairs_by_torch, "by variances and covariance": pairs_by_variances},
    rtol=1e-4, accepts="function", hides=())


EXERCISES = [RSLORA_SCALE, DORA_NORM, LORAPLUS, PICK, PAIRS, PHI, BUDGET]

QUESTIONS = [
    Question(
        name="flavours-q-scale", chapter=CHAPTER, points=1, right="b",
        text="With rsLoRA and α = 16 you raise the rank from 8 to 32. What becomes of the factor in front of $BA$?",
        options={
            "a": ("It is a quarter of what it was.", "That is LoRA's α/r. rsLoRA divides by √r."),
            "b": ("It is half of what it was.", "Right: √(8/32) = 1/2."),
            "c": ("It stays: that is the point of rsLoRA.", "It falls with the rank, only more slowly than LoRA's: as "
                                                            "1/√r."),
            "d": ("It doubles.", "More rank never gives a larger factor; α is divided by √r."),
        }),
    Question(
        name="flavours-q-axis", chapter=CHAPTER, points=1, right="c",
        text="`k_proj` of Llama-3.2-1B has a weight of the shape `[512, 2048]` (torch's way). How many magnitudes does "
             "DoRA train for it?",
        options={
            "a": ("2048, one for each column, as the paper says.",
                  "The paper writes $xW$, where a column makes an output. In torch's layout that column is a row."),
            "b": ("1: the length of the weight.", "One number could only make the whole layer stronger or weaker. "
                                                  "There is one for each output."),
            "c": ("512, one for each row.", "Right: one for each output."),
            "d": ("512 + 2048, one for each row and column.", "Rows alone. Rescaling the inputs as well would be "
                                                              "another method."),
        }),
    Question(
        name="flavours-q-dora", chapter=CHAPTER, points=1, right="d",
        text="In a DoRA layer you freeze $m$ and train $A$ and $B$ for a while. What can **not** have changed?",
        options={
            "a": ("The direction of any row of the weight.", "Directions are what A and B change."),
            "b": ("The singular values of the weight.", "Rows that turn towards each other change the singular values, "
                                                        "even when each keeps its length."),
            "c": ("Anything: without $m$ nothing learns.", "A and B learn as in LoRA; only lengths are fixed."),
            "d": ("The length of each row of the weight.", "Right: it is m, whatever A and B are."),
        }),
    Question(
        name="flavours-q-chance", chapter=CHAPTER, points=1, right="a",
        text="Two matrices $A$ of rank 8 and 64 read the same input of 256 numbers. $\\varphi(8, 64)$ is 0.26. What "
             "does this say?",
        options={
            "a": ("Hardly anything: two random subspaces of this size have 64/256 = 0.25 in common.",
                  "Right. φ is to be read against chance, and chance is max(i, j)/n."),
            "b": ("A quarter of what r = 8 learned is also in r = 64.",
                  "Random matrices that have learned nothing give the same number."),
            "c": ("The two are nearly orthogonal, since 0.26 is near 0.",
                  "Orthogonal subspaces would have 0; random ones of 8 and 64 in 256 have 0.25."),
            "d": ("The rank 64 was a waste.", "Nothing follows about the rank from a number that chance gives as "
                                              "well."),
        }),
    Question(
        name="flavours-q-one-rate", chapter=CHAPTER, points=1, right="b",
        text="Somebody trains LoRA and full fine-tuning at a learning rate of 0.0001 with ten seeds each, and full "
             "fine-tuning is better by twenty standard errors. What is shown?",
        options={
            "a": ("That full fine-tuning is the better method.", "Methods have their best learning rates in different "
                                                                 "places. This compares them at one."),
            "b": ("That it is better at this learning rate.", "Right. Error bars say how sure a comparison is, and not "
                                                              "whether it was the fair one."),
            "c": ("Nothing: ten seeds are too few.", "For twenty standard errors ten seeds are plenty. The trouble "
                                                     "lies elsewhere."),
            "d": ("That LoRA needs a higher rank.", "The rank was not varied. A higher learning rate may already do."),
        }),
    Question(
        name="flavours-q-dropout", chapter=CHAPTER, points=1, right="c",
        text="LoRA with `dropout=0.5` has just been attached, $B = 0$, and the model is in training mode. How does its "
             "output differ from the base model's?",
        options={
            "a": ("Half of each layer's inputs are zero.", "That would be dropout on the whole layer. LoRA's acts on "
                                                           "the input of A alone; the frozen road sees everything."),
            "b": ("It is half as large.", "Dropout divides what it keeps by 1 − p, so sizes stay the same on average; "
                                          "and here it acts on nothing yet."),
            "c": ("Not at all.", "Right: dropout acts on what goes into A, and what comes out of B is still zero."),
            "d": ("It is random, with the base model's as its mean.",
                  "As soon as B is not zero. At the start what is added is exactly 0."),
        }),
]
