"""Chapter 06, adapters: seven exercises and six questions.

Every answer is a function of what it is given, so probes compare values: outputs, gradients, counts. Cases keep apart
what is easily mixed up: m ≠ d, B ≠ T, biases and scales that are not trivial. Imports torch and the standard library
only; references resolve when they are first used.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pefttools.grading.exercise import Exercise
from pefttools.grading.leaves import gradients, plain, randn
from pefttools.grading.question import Question

CHAPTER = "06_adapters"
TITLE = "Adapters"
HIDES = ("pefttools.adapters", "pefttools.adapter_layers", "pefttools.placements", "pefttools.sites", "pefttools.ia3",
         "pefttools.hyper", "pefttools.hyper_config", "pefttools.compose", "peft", "adapters")


def drawn_adapter(rng: torch.Generator, d: int, m: int) -> dict[str, Tensor]:
    """One adapter, every number of it away from zero on average, so that nothing can be left out unseen."""
    return {"W_down": randn(rng, m, d) / d ** 0.5, "b_down": randn(rng, m), "W_up": randn(rng, d, m) / m ** 0.5,
            "b_up": randn(rng, d)}


def update_of(h: Tensor, W_down: Tensor, b_down: Tensor, W_up: Tensor, b_up: Tensor) -> Tensor:
    """W_up relu(W_down h + b_down) + b_up"""
    return F.linear(torch.relu(F.linear(h, W_down, b_down)), W_up, b_up)


# ================================================================================================ bottleneck

def bottleneck_inputs(rng: torch.Generator) -> list[dict]:
    def case(lead: tuple[int, ...], d: int, m: int) -> dict:
        return {"h": randn(rng, *lead, d), **drawn_adapter(rng, d, m)}

    return [case((), 6, 2), case((2, 4), 8, 3), case((5,), 3, 1), case((2, 1, 3), 4, 7)]


def bottleneck_probe(work: Callable, case: dict) -> dict[str, Any]:
    given = {name: tensor.clone().requires_grad_() for name, tensor in case.items()}
    output = work(**given)
    return {"output": plain(output), **gradients(output, **given)}


def make_bottleneck(residual=1.0, f=torch.relu, b_down=True, b_up=True, end=lambda y: y, f_last=False, early=False,
                    detached=False, norm=False, activation_after=False):
    """bottleneck with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def bottleneck(h, W_down, b_down_, W_up, b_up_):
        x = F.layer_norm(h, h.shape[-1:]) if norm else h
        z = F.linear(x, W_down, b_down_ if b_down and not early else None)
        z = z if f_last else f(z)
        z = z + b_down_ if early else z
        u = F.linear(z, W_up, b_up_ if b_up else None)
        u = torch.relu(u) if f_last or activation_after else u
        return end(residual * h + (u.detach() if detached else u))

    def named(h, W_down, b_down, W_up, b_up):
        return bottleneck(h, W_down, b_down, W_up, b_up)
    return named


def bottleneck_turned(h, W_down, b_down, W_up, b_up):
    return h + torch.relu(h @ W_down + b_down) @ W_up + b_up


def bottleneck_of_a_vector(h, W_down, b_down, W_up, b_up):
    return h + W_up @ torch.relu(W_down @ h + b_down) + b_up


def bottleneck_in_place(h, W_down, b_down, W_up, b_up):
    h += update_of(h, W_down, b_down, W_up, b_up)
    return h


def bottleneck_by_einsum(h, W_down, b_down, W_up, b_up):
    z = (torch.einsum("...d,md->...m", h, W_down) + b_down).clamp(min=0)
    return torch.einsum("...m,dm->...d", z, W_up) + b_up + h


def bottleneck_by_matmul(h, W_down, b_down, W_up, b_up):
    z = h @ W_down.T + b_down
    return h + torch.where(z > 0, z, 0 * z) @ W_up.T + b_up


BOTTLENECK = Exercise(
    name="bottleneck", chapter=CHAPTER, title="A bottleneck with a way around it", points=2, minutes=5, difficulty=1,
    inputs=bottleneck_inputs, probe=bottleneck_probe, reference="pefttools.adapters:bottleneck_forward",
    mistakes={
        "no way around": (make_bottleneck(residual=0.0),
            "The way around is missing: this is the update alone, and h has to be added to it. (Source 001 prints the "
            "formula without h, too. With W_up at zero the sublayer's output would be wiped out.)"),
        "h twice": (make_bottleneck(residual=2.0), "You add h twice. It goes around the bottleneck once."),
        "no activation": (make_bottleneck(f=lambda z: z),
            "The activation is missing. Then W_up·W_down is one matrix of rank m, and the adapter is LoRA after the "
            "layer."),
        "activation at the end": (make_bottleneck(f_last=True),
            "The activation stands after W_up. It belongs between the two matrices, on the m numbers in the middle."),
        "activation twice": (make_bottleneck(activation_after=True),
            "There is a second relu, after W_up: the update may have negative entries."),
        "activation over all": (make_bottleneck(end=torch.relu),
            "relu also cuts off the result: the way around has to stay free, or h does not come through."),
        "gelu": (make_bottleneck(f=F.gelu),
            "This is the adapter with GELU (source 003 has it). Here f is relu, as in source 000."),
        "bias after the activation": (make_bottleneck(early=True),
            "b_down is added after the activation. It belongs to the first linear layer: relu(W_down h + b_down)."),
        "no b_down": (make_bottleneck(b_down=False), "b_down is not used: it is added before the activation."),
        "no b_up": (make_bottleneck(b_up=False), "b_up is not used: it is added after W_up."),
        "no biases": (make_bottleneck(b_down=False, b_up=False), "Neither of the two biases is used."),
        "normalised first": (make_bottleneck(norm=True),
            "You normalise h first. Bapna & Firat's adapter does so; this one reads h as it is."),
        "turned round": (bottleneck_turned,
            "The matrices are multiplied the wrong way round: W_down is [m, d], so it is h @ W_down.T, or "
            "F.linear(h, W_down, b_down)."),
        "for a vector only": (bottleneck_of_a_vector,
            "W_down @ h is right for one vector. h may also be a batch of sequences, [..., d]: then the features stand "
            "last, and it is h @ W_down.T, or F.linear(h, W_down, b_down)."),
        "in place": (bottleneck_in_place,
            "h += … writes into the tensor that you were given, which belongs to the model and is still needed for its "
            "gradients. Make a new one: return h + …, or h = h + …."),
        "cannot learn": (make_bottleneck(detached=True),
            "The numbers are right, and the adapter cannot learn from them: .detach(), .data or no_grad has cut it "
            "off."),
    },
    alternatives={"einsum": bottleneck_by_einsum, "matrix products": bottleneck_by_matmul},
    accepts="function", hides=HIDES)


# ================================================================================================ count-adapters

PLACES = ("houlsby", "pfeiffer", "parallel", "bapna", "input_output", "ia3")


def counts_inputs(rng: torch.Generator) -> list[dict]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    cases = [{"layers": 16, "d_model": 2048, "kv_width": 512, "ff_width": 8192, "m": draw(10, 99)},
             {"layers": 6, "d_model": 256, "kv_width": 128, "ff_width": 704, "m": draw(4, 33)}]
    for _ in range(2):
        kv = draw(3, 40)
        cases.append({"layers": draw(3, 20), "d_model": kv * 3 + draw(1, 9), "kv_width": kv,
                      "ff_width": kv * 9 + draw(1, 30), "m": draw(2, 20)})
    return cases


def counts_probe(work: Callable, case: dict) -> dict[str, Any]:
    def count(placement):
        found = work(placement, {name: value for name, value in case.items() if name != "m"}, case["m"])
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        return int(found) if isinstance(found, float) and found.is_integer() else found

    return {placement: count(placement) for placement in
            ("houlsby", "pfeiffer", "parallel", "bapna", "input_output", "ia3")}


def make_counts(b_down=True, b_up=True, halves=2, houlsby=2, norm=2, bapna=1, parallel=1, ends=2, everywhere=True,
                kv="kv_width", values=2, ff="ff_width", vector=True):
    """adapter_parameters with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def adapter_parameters(placement, model, m):
        L, d = model["layers"] if everywhere else 1, model["d_model"]
        one = halves * m * d + d * b_up + m * b_down
        if placement == "ia3":
            return L * (values * model[kv] + (model[ff] if ff else 0)) if vector else L * one
        if placement == "input_output":
            return ends * one
        return L * {"houlsby": houlsby * one, "pfeiffer": one, "parallel": parallel * one,
                    "bapna": bapna * (one + norm * d)}[placement]
    return adapter_parameters


def counts_built(placement, model, m):
    """On the meta device: shapes without numbers."""
    L, d = model["layers"], model["d_model"]
    with torch.device("meta"):
        def one():
            return [nn.Linear(d, m), nn.Linear(m, d)]
        if placement == "ia3":
            return L * sum(torch.empty(model[k]).numel() for k in ("kv_width", "kv_width", "ff_width"))
        parts = one() if placement != "bapna" else [nn.LayerNorm(d), *one()]
        each = sum(p.numel() for part in parts for p in part.parameters())
    return each * {"houlsby": 2 * L, "input_output": 2}.get(placement, L)


def counts_added_up(placement, model, m):
    d, total = model["d_model"], 0
    places = ["in", "out"] if placement == "input_output" else [
        (layer, j) for layer in range(model["layers"]) for j in range(2 if placement == "houlsby" else 1)]
    for _ in places:
        total += 2 * model["kv_width"] + model["ff_width"] if placement == "ia3" else (d + 1) * m + (m + 1) * d
        total += 2 * d if placement == "bapna" else 0
    return float(total)


def counts_bapna_norm_once(placement, model, m):
    return make_counts()(placement, model, m) - (model["layers"] - 1) * 2 * model["d_model"] * (placement == "bapna")


COUNT_ADAPTERS = Exercise(
    name="count-adapters", chapter=CHAPTER, title="Count, place by place", points=2, minutes=8, difficulty=1,
    inputs=counts_inputs, probe=counts_probe, reference=make_counts(),
    mistakes={
        "biases left out": (make_counts(b_down=False, b_up=False),
            "The biases are missing: one adapter has 2md + d + m numbers, not 2md."),
        "one bias": (make_counts(b_down=False), "b_down is missing, m numbers in each adapter."),
        "the other bias": (make_counts(b_up=False), "b_up is missing, d numbers in each adapter."),
        "one matrix": (make_counts(halves=1), "An adapter has two matrices, m × d and d × m: 2md."),
        "one adapter in a layer": (make_counts(houlsby=1),
            "Houlsby's placement has two adapters in each layer, after attention and after the feed-forward. (Source "
            "003 gives the formula of one and says “per layer”.)"),
        "no norm": (make_counts(norm=0),
            "Bapna & Firat's adapter has a layer norm of its own: 2d numbers more in each layer."),
        "half a norm": (make_counts(norm=1), "A layer norm has a gain and a shift: 2d numbers, not d."),
        "one norm in all": (counts_bapna_norm_once,
            "You count one layer norm for the whole model. Each of Bapna & Firat's adapters has its own."),
        "two for bapna": (make_counts(bapna=2), "Bapna & Firat have one adapter in a layer, at its end."),
        "parallel twice": (make_counts(parallel=2),
            "The parallel placement here has one adapter in a layer, beside the feed-forward."),
        "one end": (make_counts(ends=1), "Input and output are two adapters."),
        "one layer": (make_counts(everywhere=False),
            "This is one layer. (Only input and output do not depend on the number of layers.)"),
        "IA³ d_model wide": (make_counts(kv="d_model"),
            "IA³'s vectors for keys and values are as wide as the keys are: kv_width. With grouped-query attention "
            "that is less than d_model."),
        "IA³ without values": (make_counts(values=1),
            "IA³ rescales keys *and* values, with a vector for each: 2 · kv_width in a layer."),
        "IA³ without the feed-forward": (make_counts(ff=None),
            "IA³'s third vector is missing: the feed-forward's inner activations, ff_width numbers."),
        "IA³ after the feed-forward": (make_counts(ff="d_model"),
            "IA³'s third vector rescales what stands *between* the feed-forward's matrices, ff_width numbers, and not "
            "its output."),
        "IA³ as a bottleneck": (make_counts(vector=False),
            "You count IA³ as a bottleneck adapter (source 002 calls it a “Pfeiffer vector”). It has no matrices: "
            "three vectors in each layer."),
    },
    alternatives={"built": counts_built, "added up": counts_added_up}, accepts="function", hides=HIDES)


# ================================================================================================ houlsby-block

def block_inputs(rng: torch.Generator) -> list[dict]:
    def case(B: int, T: int, d: int, m: int, f: int) -> dict:
        return {"h": randn(rng, B, T, d), "W_attention": randn(rng, d, d) / d ** 0.5, "W_in": randn(rng, f, d)
                / d ** 0.5,
                "W_out": randn(rng, d, f) / f ** 0.5, "gain_1": 1 + 0.5 * randn(rng, d), "gain_2": 1 + 0.5
                * randn(rng, d),
                "adapter_1": drawn_adapter(rng, d, m), "adapter_2": drawn_adapter(rng, d, m)}

    return [case(2, 3, 6, 2, 8), case(1, 5, 4, 3, 7), case(3, 1, 5, 1, 6)]


def norm_of(gain: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: gain * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def attention_of(W: Tensor) -> Callable[[Tensor], Tensor]:
    """Stands for attention: each position gets the mean of what is before it, through W."""
    return lambda x: F.linear(x.cumsum(-2) / torch.arange(1.0, x.shape[-2] + 1)[:, None], W)


def feed_forward_of(W_in: Tensor, W_out: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(F.silu(F.linear(x, W_in)), W_out)


def adapter_of(tensors: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """y + W_up relu(W_down y + b_down) + b_up"""
    return lambda y: y + update_of(y, tensors["W_down"], tensors["b_down"], tensors["W_up"], tensors["b_up"])


def block_probe(work: Callable, case: dict) -> dict[str, Any]:
    h = case["h"].clone().requires_grad_()
    first, second = ({name: t.clone().requires_grad_() for name, t in case[key].items()} for key in
                     ("adapter_1", "adapter_2"))
    output = work(h, attention_of(case["W_attention"]), feed_forward_of(case["W_in"], case["W_out"]),
                  norm_of(case["gain_1"]), norm_of(case["gain_2"]), adapter_of(first), adapter_of(second))
    return {"output": plain(output), **gradients(output, h=h, **{"W_up of adapter 1": first["W_up"],
                                                                 "W_down of adapter 2": second["W_down"]})}


def block_reference(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    h = h + adapter_1(attention(norm_1(h)))
    return h + adapter_2(feed_forward(norm_2(h)))


def block_by_steps(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    for norm, sublayer, adapter in ((norm_1, attention, adapter_1), (norm_2, feed_forward, adapter_2)):
        residual = h
        h = norm(h)
        h = sublayer(h)
        h = adapter(h)
        h = residual + h
    return h


def block_by_updates(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    y = attention(norm_1(h))
    middle = h + y + (adapter_1(y) - y)
    z = feed_forward(norm_2(middle))
    return torch.stack([middle, z, adapter_2(z) - z]).sum(0)


def make_block(sublayer):
    """A block whose two sublayers are sublayer(h, part, norm, adapter)."""
    def houlsby_block(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
        return sublayer(sublayer(h, attention, norm_1, adapter_1), feed_forward, norm_2, adapter_2)
    return houlsby_block


def block_in_place(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    h += adapter_1(attention(norm_1(h)))
    h += adapter_2(feed_forward(norm_2(h)))
    return h


def block_second_only(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    h = h + attention(norm_1(h))
    return h + adapter_2(feed_forward(norm_2(h)))


def block_first_only(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    h = h + adapter_1(attention(norm_1(h)))
    return h + feed_forward(norm_2(h))


def block_same_twice(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    return block_reference(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_1)


def block_swapped(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    return block_reference(h, attention, feed_forward, norm_1, norm_2, adapter_2, adapter_1)


def block_norms_swapped(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    return block_reference(h, attention, feed_forward, norm_2, norm_1, adapter_1, adapter_2)


def block_side_by_side(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    return h + adapter_1(attention(norm_1(h))) + adapter_2(feed_forward(norm_2(h)))


def block_without_the_first_half(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    middle = h + adapter_1(attention(norm_1(h)))
    return h + adapter_2(feed_forward(norm_2(middle)))


def block_at_the_end(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    h = h + attention(norm_1(h))
    return adapter_2(h + feed_forward(norm_2(h)))


HOULSBY_BLOCK = Exercise(
    name="houlsby-block", chapter=CHAPTER, title="Two adapters in a block", points=3, minutes=10, difficulty=2,
    inputs=block_inputs, probe=block_probe, reference=block_reference,
    mistakes={
        "in place": (block_in_place,
            "h += … writes into the tensor that you were given, which is still needed for the gradients of what was "
            "computed from it. Make a new one: h = h + …."),
        "after the sum": (make_block(lambda h, part, norm, adapter: adapter(h + part(norm(h)))),
            "Your adapters stand after the residual sum. Houlsby's stand before it, on the output of the sublayer: the "
            "stream h itself goes past them untouched."),
        "at the end of the block": (block_at_the_end,
            "This is one adapter at the end of the block, after the residual sum: Bapna & Firat's place. Houlsby's has "
            "two."),
        "after the feed-forward only": (block_second_only,
            "The adapter after attention is missing. With the one after the feed-forward alone this is Pfeiffer's "
            "placement."),
        "after attention only": (block_first_only, "The adapter after the feed-forward is missing."),
        "parallel": (make_block(lambda h, part, norm, adapter: h + part(norm(h)) + adapter(norm(h))),
            "Your adapters read what the sublayer reads, and stand beside it. Houlsby's read what the sublayer "
            "*gives*."),
        "before the sublayer": (make_block(lambda h, part, norm, adapter: h + part(adapter(norm(h)))),
            "Your adapters stand between the norm and the sublayer. They belong behind the sublayer."),
        "output added twice": (make_block(lambda h, part, norm, adapter: h + part(norm(h)) + adapter(part(norm(h)))),
            "The sublayer's output is in the sum twice: the adapters that you are given add their input themselves."),
        "own way around taken out": (
            make_block(lambda h, part, norm, adapter: h + adapter(part(norm(h))) - part(norm(h))),
            "The sublayer's own output is gone, and only the adapter's update is left: this is source 001's formula. "
            "The adapter's result, with its way around, is what is added to h."),
        "no residual": (make_block(lambda h, part, norm, adapter: adapter(part(norm(h)))),
            "The block's own residual connections are missing: h is added to what each sublayer gives."),
        "residual of the norm": (make_block(lambda h, part, norm, adapter: norm(h) + adapter(part(norm(h)))),
            "You add the normalised h. The residual stream is h itself; the norm is for the sublayer's eyes alone."),
        "norm at the end": (make_block(lambda h, part, norm, adapter: norm(h + adapter(part(h)))),
            "You normalise after the sum. That is BERT's post-norm, and where Houlsby et al. had it; this block, like "
            "Llama's, normalises what goes into a sublayer."),
        "no norm": (make_block(lambda h, part, norm, adapter: h + adapter(part(h))),
            "The norms are missing: each sublayer reads norm(h)."),
        "one adapter twice": (block_same_twice, "adapter_1 stands in both places; the second is adapter_2's."),
        "adapters swapped": (block_swapped,
            "The adapters have changed places: adapter_1 is attention's, adapter_2 the feed-forward's."),
        "norms swapped": (block_norms_swapped,
            "The norms have changed places: norm_1 goes before attention, norm_2 before the feed-forward."),
        "old h": (block_side_by_side,
            "The feed-forward reads the h from before attention. It reads what attention and its adapter have made of "
            "it."),
        "second sum from the old h": (block_without_the_first_half,
            "The second sum starts from the h that came in, so what attention and its adapter added is lost. It starts "
            "from the stream after the first half."),
    },
    alternatives={"step by step": block_by_steps, "with updates": block_by_updates},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ parallel-adapter

def parallel_inputs(rng: torch.Generator) -> list[dict]:
    def case(lead: tuple[int, ...], d: int, m: int, f: int, s: float) -> dict:
        return {"h": randn(rng, *lead, d), "gain": 1 + 0.5 * randn(rng, d), "W_in": randn(rng, f, d) / d ** 0.5,
                "W_out": randn(rng, d, f) / f ** 0.5, **drawn_adapter(rng, d, m), "s": s}

    return [case((2, 3), 6, 2, 9, 4.0), case((4,), 5, 3, 7, 0.5), case((1, 2), 8, 1, 4, 2.5)]


def parallel_probe(work: Callable, case: dict) -> dict[str, Any]:
    h = case["h"].clone().requires_grad_()
    own = {name: case[name].clone().requires_grad_() for name in ("W_down", "b_down", "W_up", "b_up")}
    output = work(h, norm_of(case["gain"]), feed_forward_of(case["W_in"], case["W_out"]), *own.values(), case["s"])
    return {"output": plain(output), **gradients(output, h=h, **own)}


def make_parallel(own_h=0.0, own_x=0.0, own_y=0.0, source="x", s=lambda s: s, s_bias=True, s_all=False, residual="h",
                  f=torch.relu,
                  frozen_path=True, normed=True):
    """parallel_block with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def parallel_block(h, norm, feed_forward, W_down, b_down, W_up, b_up, scale):
        x = norm(h)
        y = feed_forward(x if normed else h)
        read = {"x": x, "h": h, "y": y}[source]
        k = s(scale)
        u = k * F.linear(f(F.linear(read, W_down, b_down)), W_up) + (k if s_bias else 1) * b_up
        y = y if frozen_path else 0
        return {"h": h, "x": x, "none": 0}[residual] + (scale * y if s_all
                                                        else y) + u + own_h * h + own_x * x + own_y * y
    return parallel_block


def parallel_scaled_weights(h, norm, feed_forward, W_down, b_down, W_up, b_up, s):
    x = norm(h)
    return torch.relu(x @ W_down.T + b_down) @ (s * W_up).T + s * b_up + feed_forward(x) + h


def parallel_around_scaled(h, norm, feed_forward, W_down, b_down, W_up, b_up, s):
    x = norm(h)
    return h + feed_forward(x) + s * (x + update_of(x, W_down, b_down, W_up, b_up))


def parallel_side_by_side(h, norm, feed_forward, W_down, b_down, W_up, b_up, s):
    x = norm(h)
    roads = [h, feed_forward(x), s * update_of(x, W_down, b_down, W_up, b_up)]
    return torch.stack(roads).sum(dim=0)


PARALLEL_ADAPTER = Exercise(
    name="parallel-adapter", chapter=CHAPTER, title="Beside the feed-forward", points=2, minutes=8, difficulty=2,
    inputs=parallel_inputs, probe=parallel_probe, reference=make_parallel(),
    mistakes={
        "its own way around": (make_parallel(own_x=1.0),
            "x itself is in the sum: you gave the adapter its own way around. Beside the feed-forward there is nothing "
            "to go around; only the update is added."),
        "its own way around, scaled": (parallel_around_scaled,
            "s multiplies x plus the update: you gave the adapter its own way around. Beside the feed-forward there is "
            "nothing to go around; s multiplies the update alone."),
        "h twice": (make_parallel(own_h=1.0),
            "h is in the sum twice. The block's residual brings h once, and a parallel adapter adds its update alone."),
        "sequential": (make_parallel(source="y"),
            "Your adapter reads what the feed-forward gives: that is the sequential placement (Pfeiffer). The parallel "
            "one reads what the feed-forward *reads*, norm(h)."),
        "sequential, with way around": (make_parallel(source="y", own_y=1.0),
            "Your adapter reads what the feed-forward gives, and adds it again. The parallel one reads norm(h) and "
            "adds its update alone."),
        "reads h": (make_parallel(source="h"),
            "Your adapter reads h before the norm. It is fed by what the feed-forward is fed: norm(h)."),
        "no norm": (make_parallel(source="h", normed=False),
            "The norm is missing: the feed-forward and the adapter both read x = norm(h)."),
        "no scale": (make_parallel(s=lambda s: 1.0), "The scale s is missing: s · (W_up relu(…) + b_up)."),
        "bias not scaled": (make_parallel(s_bias=False),
            "s multiplies W_up's product and not b_up. It multiplies the whole update."),
        "everything scaled": (make_parallel(s_all=True),
            "s multiplies the feed-forward's output as well. That is frozen; only the adapter's update is scaled."),
        "scale divided": (make_parallel(s=lambda s: 1 / s), "You divide by s. The update is multiplied by it."),
        "no residual": (make_parallel(residual="none"), "The block's residual is missing: h has to be added."),
        "residual of the norm": (make_parallel(residual="x"),
            "You add norm(h) in the place of h. The residual stream is h itself."),
        "no activation": (make_parallel(f=lambda z: z),
            "The activation between W_down and W_up is missing: without it this is LoRA over the whole feed-forward."),
        "feed-forward replaced": (make_parallel(frozen_path=False),
            "The feed-forward itself is missing: the adapter stands beside it, not in its place."),
    },
    alternatives={"s in the weights": parallel_scaled_weights, "three roads": parallel_side_by_side},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ ia3

def ia3_inputs(rng: torch.Generator) -> list[dict]:
    def case(d_in: int, d_out: int, at_input: bool, bias: bool) -> dict:
        l = randn(rng, d_in if at_input else d_out)                                                  # noqa: E741
        return {"weight": randn(rng, d_out, d_in), "bias": randn(rng, d_out) if bias else None, "at_input": at_input,
                "l": l, "x": randn(rng, 3, 2, d_in)}

    return [case(5, 3, False, True), case(4, 6, True, True), case(4, 4, False, False), case(3, 3, True, True)]


def ia3_probe(work: Callable, case: dict) -> dict[str, Any]:
    base = nn.Linear(case["weight"].shape[1], case["weight"].shape[0], bias=case["bias"] is not None)
    with torch.no_grad():
        base.weight.copy_(case["weight"])
        if case["bias"] is not None:
            base.bias.copy_(case["bias"])
    layer, x = work(base, case["at_input"]), case["x"]
    if not isinstance(layer, nn.Module):
        raise TypeError(f"IA3Layer makes a {type(layer).__name__}, which is no nn.Module")
    trains = [p for p in layer.parameters() if p.requires_grad]
    leaves = {"output at the start": plain(layer(x)), "numbers that train": sum(p.numel() for p in trains)}
    if len(trains) != 1 or trains[0].numel() != case["l"].numel():
        return leaves
    with torch.no_grad():
        trains[0].copy_(case["l"].reshape(trains[0].shape))
    output = layer(x)
    leaves["output with l"] = plain(output)
    leaves.update({name: g.flatten() if isinstance(g, Tensor) else g
                   for name, g in gradients(output, l=trains[0]).items()})
    layer.merge()
    leaves["weight of the base layer, merged"] = base.weight.detach().clone()
    leaves["bias of the base layer, merged"] = None if base.bias is None else base.bias.detach().clone()
    leaves["numbers of the base layer that train, merged"] = sum(p.numel() for p in base.parameters()
                                                                 if p.requires_grad)
    leaves["output, merged"] = plain(layer(x))
    layer.merge()
    leaves["output, merged twice"] = plain(layer(x))
    return leaves


def make_ia3(start=1.0, plus=0.0, end=None, scale_bias=True, merge_bias=True, axis_right=True, remembers=True,
             twice=False, frozen=True, merges=True, learns=True, one_number=False, random=False, divides=False,
             graph=False,
             length_right=True, rows_as_columns=False, assigned=False):
    """IA3Layer with a switch for each thing that can go wrong; as the defaults stand it is right."""
    class IA3Layer(nn.Module):
        def __init__(self, base, at_input):
            super().__init__()
            self.base, self.at_input = base.requires_grad_(not frozen), at_input if end is None else end == "input"
            size = 1 if one_number else base.in_features if self.at_input == length_right else base.out_features
            l = torch.randn(size) if random else torch.full((size,), start)                          # noqa: E741
            self.l, self.merged = nn.Parameter(l, requires_grad=learns), False

        def forward(self, x):
            if self.merged and remembers:
                return self.base(x)
            l = 1 / self.l if divides else plus + self.l                                             # noqa: E741
            if self.at_input:
                return self.base(x * l)
            if not scale_bias and self.base.bias is not None:
                return F.linear(x, self.base.weight) * l + self.base.bias
            return self.base(x) * l

        def merge(self):
            if (self.merged and not twice) or not merges:
                return
            with torch.set_grad_enabled(graph):
                self.fold()
            self.merged = True

        def fold(self):
            l = 1 / self.l if divides else plus + self.l                                             # noqa: E741
            rows = self.at_input != axis_right
            factor = l[:, None] if rows and not rows_as_columns else l[None]
            if assigned:
                self.base.weight *= factor
            else:
                self.base.weight.mul_(factor)
            if not self.at_input and self.base.bias is not None and merge_bias:
                self.base.bias.mul_(l)
    return IA3Layer


class IA3ByDiagonal(nn.Module):
    """l in peft's shape, merged by matrix products with diagonal matrices; l is set to one when it has gone in."""

    def __init__(self, base, at_input):
        super().__init__()
        base.requires_grad_(False)
        self.inner, self.at_input = base, at_input
        self.factor = nn.Parameter(torch.ones(1, base.in_features) if at_input else torch.ones(base.out_features, 1))

    def forward(self, x):
        if self.at_input:
            return F.linear(x @ torch.diag(self.factor.flatten()), self.inner.weight, self.inner.bias)
        return self.factor.flatten() * self.inner(x)

    def merge(self):
        D = torch.diag(self.factor.detach().flatten())
        W = self.inner.weight.detach()
        self.inner.weight.data.copy_(W @ D if self.at_input else D @ W)
        if self.inner.bias is not None and not self.at_input:
            self.inner.bias.data.copy_(D @ self.inner.bias.detach())
        self.factor.data.fill_(1.0)


class IA3OnTheWeight(nn.Module):
    """The product written as a change of the weight in every forward."""

    def __init__(self, base, at_input):
        super().__init__()
        self.base, self.at_input, self.done = base.requires_grad_(False), at_input, False
        self.l = nn.Parameter(base.weight.new_ones(base.weight.shape[int(at_input)]))

    def folded(self):
        W, b = self.base.weight, self.base.bias
        if self.at_input:
            return W * self.l, b
        return W * self.l.unsqueeze(1), None if b is None else b * self.l

    def forward(self, x):
        return self.base(x) if self.done else F.linear(x, *self.folded())

    def merge(self):
        if not self.done:
            weight, bias = self.folded()
            self.base.weight.data = weight.detach()
            if bias is not None:
                self.base.bias.data = bias.detach().clone()
            self.done = True


IA3 = Exercise(
    name="ia3", chapter=CHAPTER, title="IA³, with its merge", points=3, minutes=12, difficulty=2,
    inputs=ia3_inputs, probe=ia3_probe, reference=make_ia3(),
    mistakes={
        "zero at the start": (make_ia3(start=0.0),
            "l starts at zero, so the layer's output starts at nothing. l is a factor: the start that changes nothing "
            "is one."),
        "random start": (make_ia3(random=True),
            "l starts at random numbers, so the model starts out damaged. The start that changes nothing is one."),
        "one plus l": (make_ia3(start=0.0, plus=1.0),
            "You multiply by 1 + l, with l starting at zero. It can learn the same things, but here, as in the paper "
            "and in peft, the factor is l itself, and it starts at one."),
        "one number": (make_ia3(one_number=True),
            "l is a single number for the whole layer. It has one number for each feature."),
        "always at the output": (make_ia3(end="output"),
            "at_input is not looked at: you always rescale the output."),
        "always at the input": (make_ia3(end="input"),
            "at_input is not looked at: you always rescale the input."),
        "bias left alone": (make_ia3(scale_bias=False),
            "At the output, l multiplies the whole output, W x + b. You leave the bias out of it."),
        "merge forgets the bias": (make_ia3(merge_bias=False),
            "The merge changes the weight and forgets the bias. l ⊙ (W x + b) = (l ⊙ W) x + l ⊙ b: where the output is "
            "rescaled, the bias is, too."),
        "merge along the other axis": (make_ia3(axis_right=False),
            "The merge multiplies along the wrong axis of W [d_out, d_in]. A factor on the output belongs to the rows, "
            "a factor on the input to the columns."),
        "scaled again": (make_ia3(remembers=False),
            "After merge() the forward rescales once more, so l counts twice."),
        "merged twice": (make_ia3(twice=True),
            "The second merge() multiplies l in once more. Merging twice has to be merging once: remember that it has "
            "been done."),
        "never merged": (make_ia3(merges=False),
            "merge() leaves the base layer's weight as it was. The factor has to go into it: that is what makes IA³ "
            "free of cost."),
        "no no_grad": (make_ia3(graph=True),
            "The merge is part of the graph: the base layer's weight now hangs on l and would get gradients. Change it "
            "under torch.no_grad()."),
        "no no_grad, assigned": (make_ia3(graph=True, assigned=True),
            "weight *= l outside of torch.no_grad() makes a result that hangs on l, and a result cannot be a "
            "parameter. Put `with torch.no_grad():` around the merge."),
        "length of the other end": (make_ia3(length_right=False),
            "l has the length of the wrong end: it has in_features numbers at the input, out_features at the output."),
        "rows as columns": (make_ia3(rows_as_columns=True),
            "weight * l multiplies the columns, which is right at the input. At the output row i is multiplied by l_i: "
            "weight * l[:, None]."),
        "scaled again, and merged twice": (make_ia3(remembers=False, twice=True),
            "Nothing remembers that the merge has been done: the forward rescales once more, and a second merge() "
            "would, too. Keep a flag, such as self.merged, and look at it in both."),
        "base trains": (make_ia3(frozen=False),
            "The base layer trains as well. Freeze it: base.requires_grad_(False)."),
        "l does not train": (make_ia3(learns=False),
            "Nothing trains. l has to be an nn.Parameter that requires a gradient."),
        "divided": (make_ia3(divides=True),
            "You divide by l. At the start (all ones) nobody can tell; it is a factor."),
    },
    alternatives={"diagonal matrices": IA3ByDiagonal, "on the weight": IA3OnTheWeight},
    rtol=1e-4, atol=1e-5, accepts="class", hides=HIDES)


# ================================================================================================ switch-tasks

def switch_inputs(rng: torch.Generator) -> list[dict]:
    def case(T: int, d: int, m: int, tasks: list) -> dict:
        names = list(dict.fromkeys(task for task in tasks if task)) + ["idle"]
        names = [names[i] for i in torch.randperm(len(names), generator=rng)]
        return {"h": randn(rng, len(tasks), T, d), "tasks": tasks,
                "adapters": {name: drawn_adapter(rng, d, m) for name in names}}

    return [case(3, 4, 2, ["code", "kind", "code"]), case(2, 5, 3, ["kind", None, "code", "kind", "code"]),
            case(1, 3, 1, [None, "b", "c", "a", "b", None]), case(4, 6, 2, ["only"])]


def switch_probe(work: Callable, case: dict) -> dict[str, Any]:
    h = case["h"].clone().requires_grad_()
    adapters = {name: {key: t.clone().requires_grad_() for key, t in own.items()} for name, own in
                case["adapters"].items()}
    output = work(h, list(case["tasks"]), adapters)
    used = next(task for task in case["tasks"] if task)
    return {"output": plain(output), **gradients(output, h=h, **{"W_up of one adapter": adapters[used]["W_up"]})}


def switch_reference(h, tasks, adapters):
    rows = [row if task is None else row + update_of(row, **adapters[task]) for row, task in zip(h, tasks)]
    return torch.stack(rows)


def switch_by_group(h, tasks, adapters):
    out = h.clone()
    for name, own in adapters.items():
        at = [i for i, task in enumerate(tasks) if task == name]
        if at:
            out[at] = h[at] + update_of(h[at], **own)
    return out


def switch_by_masks(h, tasks, adapters):
    out = h
    for name, own in adapters.items():
        mine = torch.tensor([task == name for task in tasks])[:, None, None]
        out = out + mine * update_of(h, **own)
    return out


def switch_stacked_weights(h, tasks, adapters):
    """One matrix product for the whole batch: each row brings its own weights."""
    d = h.shape[-1]
    m = len(next(iter(adapters.values()))["b_down"])
    nothing = {"W_down": torch.zeros(m, d), "b_down": torch.zeros(m), "W_up": torch.zeros(d, m), "b_up": torch.zeros(d)}
    own = {key: torch.stack([(adapters[t] if t else nothing)[key] for t in tasks]) for key in nothing}
    z = torch.relu(torch.baddbmm(own["b_down"][:, None], h, own["W_down"].mT))
    return h + torch.baddbmm(own["b_up"][:, None], z, own["W_up"].mT)


def switch_all_with(pick):
    """The wrong idea that the whole batch gets one adapter: pick(tasks) names it."""
    def switch(h, tasks, adapters):
        return h + update_of(h, **adapters[pick(tasks, adapters)])
    return switch


def switch_all_together(weight):
    def switch(h, tasks, adapters):
        return h + weight(len(adapters)) * sum(update_of(h, **own) for own in adapters.values())
    return switch


def switch_none_with_first(h, tasks, adapters):
    first = next(task for task in tasks if task)
    return switch_reference(h, [task or first for task in tasks], adapters)


def switch_in_order(h, tasks, adapters):
    names = list(adapters)
    return switch_reference(h, [names[i % len(names)] for i in range(len(tasks))], adapters)


def switch_sorted(h, tasks, adapters):
    order = sorted(range(len(tasks)), key=lambda i: str(tasks[i]))
    return switch_reference(h, tasks, adapters)[order]


def switch_in_place(h, tasks, adapters):
    for i, task in enumerate(tasks):
        if task is not None:
            h[i] = h[i] + update_of(h[i], **adapters[task])
    return h


def switch_first_of_each(h, tasks, adapters):
    out = list(h)
    for name in adapters:
        if name in tasks:
            i = tasks.index(name)
            out[i] = h[i] + update_of(h[i], **adapters[name])
    return torch.stack(out)


def switch_one_after_another(h, tasks, adapters):
    for task in dict.fromkeys(task for task in tasks if task):
        h = h + update_of(h, **adapters[task])
    return h


def switch_none_zero(h, tasks, adapters):
    return torch.stack([0 * row if task is None else row + update_of(row, **adapters[task])
                        for row, task in zip(h, tasks)])


def switch_looks_up_none(h, tasks, adapters):
    return torch.stack([row + update_of(row, **adapters[task]) for row, task in zip(h, tasks)])


def switch_group_after_group(h, tasks, adapters):
    done = []
    for name, own in adapters.items():
        mine = [i for i, task in enumerate(tasks) if task == name]
        done.append(h[mine] + update_of(h[mine], **own))
    return torch.cat(done)


def switch_update_alone(h, tasks, adapters):
    return torch.stack([row if task is None else update_of(row, **adapters[task]) for row, task in zip(h, tasks)])


def switch_none_left_out(h, tasks, adapters):
    return torch.stack([row + update_of(row, **adapters[task]) for row, task in zip(h, tasks) if task])


def switch_majority(h, tasks, adapters):
    named = [task for task in tasks if task]
    return switch_reference(h, [task and max(named, key=named.count) for task in tasks], adapters)


SWITCH_TASKS = Exercise(
    name="switch-tasks", chapter=CHAPTER, title="One batch, several tasks", points=3, minutes=10, difficulty=2,
    inputs=switch_inputs, probe=switch_probe, reference=switch_reference,
    mistakes={
        "first task for all": (switch_all_with(lambda tasks, adapters: next(t for t in tasks if t)),
            "The whole batch goes through the adapter of its first task. Every row has its own."),
        "last task for all": (switch_all_with(lambda tasks, adapters: [t for t in tasks if t][-1]),
            "The whole batch goes through the adapter of its last task, as when a loop overwrites its result. Every "
            "row has its own."),
        "the most frequent task": (switch_majority,
            "The rows go through the adapter of the most frequent task. Every row has its own."),
        "all added": (switch_all_together(lambda n: 1.0),
            "Every row gets the updates of all adapters. Row i gets the one that tasks[i] names."),
        "averaged": (switch_all_together(lambda n: 1 / n),
            "Every row gets the mean of all adapters. Row i gets the one that tasks[i] names."),
        "one after another": (switch_one_after_another,
            "The whole batch goes through one adapter after the other. Row i goes through the one that tasks[i] "
            "names."),
        "in the dictionary's order": (switch_in_order,
            "Row i gets the i-th adapter of the dictionary. Look the name up: adapters[tasks[i]]."),
        "sorted": (switch_sorted,
            "The rows are right, and they come back in another order: grouped by task. Put them back in their "
            "places."),
        "first row of each task": (switch_first_of_each,
            "Only the first row of each task gets its adapter (list.index finds the first place only)."),
        "in place": (switch_in_place,
            "h[i] = … writes into the tensor that you were given, which is still needed for its gradients. Write into "
            "a copy: out = h.clone(), or collect the rows and torch.stack them."),
        "None through an adapter": (switch_none_with_first,
            "A row with the task None is a request to the base model; you send it through an adapter."),
        "None is zero": (switch_none_zero,
            "A row with the task None becomes zero. For the base model the *update* is zero, and h stays h."),
        "None looked up": (switch_looks_up_none,
            "adapters[None] is looked up, and there is none. A row whose task is None is a request to the base model: "
            "it comes back as it is."),
        "one group after the other": (switch_group_after_group,
            "You put one task's rows behind the other's: the order of h is lost, and with it the rows whose task is "
            "None. Write each group back to its rows: out = h.clone(), then out[mine] = …."),
        "None left out": (switch_none_left_out,
            "The rows with the task None are missing from the result. They come back as they were."),
        "update alone": (switch_update_alone,
            "The adapter's way around is missing: a row is h plus the update."),
    },
    alternatives={"group by group": switch_by_group, "masks": switch_by_masks,
                  "stacked weights": switch_stacked_weights},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ hyper-adapter

def hyper_inputs(rng: torch.Generator) -> list[dict]:
    def case(e: int, hidden: int, d: int, m: int) -> dict:
        return {"z": randn(rng, e), "l": randn(rng, e), "p": randn(rng, e), "W_1": randn(rng, hidden, 3 * e) / e ** 0.5,
                "b_1": randn(rng, hidden), "W_2": randn(rng, e, hidden) / hidden ** 0.5, "b_2": randn(rng, e),
                "G_down": randn(rng, m * d, e), "G_up": randn(rng, d * m, e), "m": m}

    return [case(4, 6, 5, 2), case(2, 5, 3, 4), case(3, 4, 4, 3), case(1, 7, 6, 1)]


def hyper_probe(work: Callable, case: dict) -> dict[str, Any]:
    given = {name: value.clone().requires_grad_() if isinstance(value, Tensor) else value
             for name, value in case.items()}
    found = work(**given)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        got = f"{len(found)} things" if isinstance(found, (tuple, list)) else f"a {type(found).__name__}"
        raise TypeError(f"hyper_adapter should return two matrices, (W_down, W_up); it returned {got}")
    W_down, W_up = found
    flat = torch.cat([t.flatten() for t in found]) if all(isinstance(t, Tensor) for t in found) else None
    return {"W_down": plain(W_down), "W_up": plain(W_up),
            **gradients(flat, **{name: given[name] for name in ("z", "l", "p", "W_1", "G_up")})}


def make_hyper(order="zlp", f=torch.relu, last=lambda a: a, b_1=True, b_2=True, up_turned=False, down_turned=False,
               swapped=False, returned_swapped=False, detached=False, zero="", address="mlp", outer=False):
    """hyper_adapter with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def hyper_adapter(z, l, p, W_1, b_1_, W_2, b_2_, G_down, G_up, m):                                # noqa: E741
        parts = {"z": z, "l": l, "p": p}
        x = torch.cat([0 * parts[k] if k in zero else parts[k] for k in order])
        a = last(F.linear(f(F.linear(x, W_1, b_1_ if b_1 else None)), W_2, b_2_ if b_2 else None))
        a = a.detach() if detached else z if address == "task" else a
        G_d, G_u = (G_up, G_down) if swapped else (G_down, G_up)
        down, up = G_d @ a, G_u @ a
        W_down = down.view(-1, m).T if down_turned else down.view(m, -1)
        W_up = up.view(m, -1).T if up_turned else up.view(-1, m)
        return (W_up, W_down) if returned_swapped else (W_down, W_up)

    def named(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m):                                          # noqa: E741
        return hyper_adapter(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m)
    return named


def hyper_added(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m):                                        # noqa: E741
    x = (z + l + p).repeat(3)
    return make_hyper()(x[:len(z)], x[:len(z)], x[:len(z)], W_1, b_1, W_2, b_2, G_down, G_up, m)


def hyper_sum(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m):                                          # noqa: E741
    address = W_2 @ torch.relu(W_1 @ (z + l + p) + b_1) + b_2
    return (G_down @ address).view(m, -1), (G_up @ address).view(-1, m)


def hyper_flat(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m):                                         # noqa: E741
    W_down, W_up = make_hyper()(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m)
    return W_down.flatten(), W_up.flatten()


def hyper_shapes_of_the_down(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m):                           # noqa: E741
    W_down, W_up = make_hyper()(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m)
    return W_down, W_up.reshape(m, -1)


def hyper_by_slices(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m):                                    # noqa: E741
    e = len(z)
    inner = W_1[:, :e] @ z + W_1[:, e:2 * e] @ l + W_1[:, 2 * e:] @ p + b_1
    a = W_2 @ inner.clamp(min=0) + b_2
    return (G_down @ a).reshape(m, -1), (G_up @ a).reshape(-1, m)


def hyper_by_einsum(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m):                                    # noqa: E741
    a = nn.functional.linear(torch.relu(W_1 @ torch.hstack((z, l, p)) + b_1), W_2, b_2)
    d = G_down.shape[0] // m
    return [torch.einsum("mde,e->md", G_down.view(m, d, -1), a), torch.einsum("dme,e->dm", G_up.view(d, m, -1), a)]


HYPER_ADAPTER = Exercise(
    name="hyper-adapter", chapter=CHAPTER, title="A network that writes adapters", points=3, minutes=12, difficulty=3,
    inputs=hyper_inputs, probe=hyper_probe, reference=make_hyper(),
    mistakes={
        "no activation": (make_hyper(f=lambda a: a),
            "The relu between W_1 and W_2 is missing. Then task, layer and position only add up: every task would "
            "change every layer's adapter in the same way."),
        "activation at the end": (make_hyper(f=lambda a: a, last=torch.relu),
            "relu stands after W_2. It belongs between W_1 and W_2."),
        "two activations": (make_hyper(last=torch.relu),
            "There is a second relu, after W_2: the address may have negative entries."),
        "task alone": (make_hyper(address="task"),
            "You write the matrices from the task's embedding alone. Then every layer gets the same adapter."),
        "layer left out": (make_hyper(zero="l"),
            "The layer's embedding has no effect. Then every layer gets the same adapter."),
        "position left out": (make_hyper(zero="p"),
            "The position's embedding has no effect: after attention and after the feed-forward would be the same."),
        "task left out": (make_hyper(zero="z"),
            "The task's embedding has no effect: all tasks would get one adapter."),
        "position before layer": (make_hyper(order="zpl"),
            "Layer and position have changed places: the order is [z; l; p], task, layer, position."),
        "layer before task": (make_hyper(order="lzp"),
            "Task and layer have changed places: the order is [z; l; p], task, layer, position."),
        "position first": (make_hyper(order="plz"),
            "The embeddings stand in the wrong order: it is [z; l; p], task, layer, position."),
        "added, too short": (hyper_sum,
            "W_1 reads 3e numbers, and the sum of the three embeddings has e. They are put one after the other: "
            "torch.cat([z, l, p])."),
        "long vectors": (hyper_flat,
            "These are the numbers of both matrices, each in one long vector. Say how many rows they have: .view(m, "
            "-1) for W_down, .view(-1, m) for W_up."),
        "added": (hyper_added,
            "You add the three embeddings. They are put one after the other, [z; l; p], 3e numbers: added, (task 1, "
            "layer 2) and (task 2, layer 1) could not be told apart."),
        "no b_1": (make_hyper(b_1=False), "b_1 is not used: it belongs to the first layer."),
        "no b_2": (make_hyper(b_2=False), "b_2 is not used: it belongs to the second layer."),
        "G swapped": (make_hyper(swapped=True), "G_down and G_up have changed places."),
        "returned the other way": (make_hyper(returned_swapped=True),
                                   "You return (W_up, W_down); the order is (W_down, W_up)."),
        "W_up of the wrong shape": (hyper_shapes_of_the_down,
            "Your W_up has the shape of W_down, [m, d]. It leads back from m to d: [d, m]."),
        "W_up turned": (make_hyper(up_turned=True),
            "Your W_up is laid out as [m, d] and then transposed, so every number is in another place. G_up gives it "
            "row by row, as [d, m]."),
        "W_down turned": (make_hyper(down_turned=True),
            "Your W_down is laid out as [d, m] and then transposed, so every number is in another place. G_down gives "
            "it row by row, as [m, d]."),
        "cannot learn": (make_hyper(detached=True),
            "The numbers are right, and no gradient gets back to the embeddings: .detach(), .data or no_grad has cut "
            "them off."),
    },
    alternatives={"by slices": hyper_by_slices, "einsum": hyper_by_einsum},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


EXERCISES: list[Exercise] = [BOTTLENECK, COUNT_ADAPTERS, HOULSBY_BLOCK, PARALLEL_ADAPTER, IA3, SWITCH_TASKS,
                             HYPER_ADAPTER]


# ================================================================================================ questions

QUESTIONS: list[Question] = [
    Question(
        name="adapters-q-start", chapter=CHAPTER, points=1, right="b",
        text="An adapter starts with $W_{up} = 0$ and both biases zero. Somebody leaves out its inner way around, so "
             "that it computes $W_{up} f(W_{down} h)$ instead of $h + W_{up} f(W_{down} h)$, and puts it after "
             "attention and after the feed-forward of every layer, before what they give is added to the residual "
             "stream. What is the model before the first training step?",
        options={
            "a": ("Exactly the base model: the adapter's matrices give zero.",
                  "They do, and here zero is what takes the place of what attention gives, and the feed-forward. It is "
                  "the way around that lets that through."),
            "b": ("A model whose attention and feed-forward contribute nothing.",
                  "Right: what attention and the feed-forward give is replaced by zero, and only the residual stream "
                  "is left."),
            "c": ("The base model with a little noise.",
                  "There is no noise: all that comes out is zero. (With the way around and Houlsby's small random "
                  "start there is a little.)"),
            "d": ("A model that cannot be run: the shapes do not fit.",
                  "The shapes fit, which is why nobody notices before looking at the loss."),
        }),
    Question(
        name="adapters-q-merge", chapter=CHAPTER, points=1, right="c",
        text="LoRA can be merged into the weights, IA³ too, a bottleneck adapter cannot. Why?",
        options={
            "a": ("It has biases.", "A bias could be merged: the layer before it may have one."),
            "b": ("It has too many parameters.",
                  "LoRA of the same width on the same layer has about as many."),
            "c": ("Between its two matrices stands an activation.",
                  "Right. Without f the adapter were h + W_up W_down h, and (I + W_up W_down) W is one matrix. With f "
                  "no matrix does the same for every h."),
            "d": ("It has a residual connection.",
                  "h + M h = (I + M) h: a residual around a *matrix* is a matrix."),
        }),
    Question(
        name="adapters-q-places", chapter=CHAPTER, points=1, right="d",
        text="A colleague says: “IA³ is the Pfeiffer adapter as a vector, after the feed-forward.” What is right?",
        options={
            "a": ("That: both rescale the feed-forward's output.",
                  "Pfeiffer's is a bottleneck network, and IA³ does not touch the feed-forward's output."),
            "b": ("IA³ has three bottlenecks of width 1.",
                  "It has no matrices and no activation at all: three vectors of factors."),
            "c": ("Pfeiffer's stands after attention, IA³ after the feed-forward.",
                  "Pfeiffer's stands after the feed-forward; IA³ acts at three places inside both sublayers."),
            "d": ("Pfeiffer's is a bottleneck after the feed-forward; IA³ multiplies keys, values and the "
                  "feed-forward's inner activations by learned factors.",
                  "Right. They share the idea of training little, and nothing else."),
        }),
    Question(
        name="adapters-q-latency", chapter=CHAPTER, points=1, right="a",
        text="One adapter model, two servers. One answers single requests word by word; the other scores batches of 32 "
             "texts of 512 tokens. Where do the adapters cost more, relative to the base model?",
        options={
            "a": ("With single requests.",
                  "Right: with little work per layer the time goes into starting many small operations, and adapters "
                  "add more of those. In a large batch only the extra multiplications count, a few percent."),
            "b": ("With the batches: they contain 16,384 times as many tokens.",
                  "In absolute time, yes. The base model's time has grown by more, so the share has shrunk."),
            "c": ("The same: adapters are a fixed share of the multiplications.",
                  "The share of *multiplications* is fixed. Time is also the cost of starting each operation, which "
                  "does not grow with the work."),
            "d": ("Nowhere: adapters can be merged.", "Bottleneck adapters cannot: an activation stands inside."),
        }),
    Question(
        name="adapters-q-switch", chapter=CHAPTER, points=1, right="b",
        text="Twenty tasks on one server, each request for another. What speaks for adapters and *against LoRA*?",
        options={
            "a": ("LoRA has to be merged for every request, adapters do not.",
                  "LoRA need not be merged. Kept apart it can be switched per request, and per row of a batch, just "
                  "like an adapter (you can see it in this chapter)."),
            "b": ("Nothing, as long as LoRA is not merged.",
                  "Right: unmerged, both leave the base weights alone, and both are small files that are switched by "
                  "name. Merging is an offer that LoRA makes, not a duty."),
            "c": ("Adapters do not change the base model's weights, LoRA does.",
                  "LoRA changes them only when it is merged."),
            "d": ("A LoRA file holds the whole merged model.", "It holds A and B; only a *merged* model is stored "
                                                               "whole."),
        }),
    Question(
        name="adapters-q-hyper", chapter=CHAPTER, points=1, right="c",
        text="A hypernetwork has learned five tasks. You keep it frozen and add a sixth. What is trained?",
        options={
            "a": ("One adapter after each sublayer, as for any task.",
                  "Those are written by the network now. What it needs is to know which task."),
            "b": ("The layers' and positions' embeddings.",
                  "They belong to all tasks; the other five would change with them."),
            "c": ("One vector: the task's embedding.",
                  "Right: e numbers. Whether that is *enough* depends on how much the new task has in common with the "
                  "five."),
            "d": ("Nothing: the network generalises.",
                  "Without an embedding it does not know what the task is; it could only guess at a known one."),
        }),
]
