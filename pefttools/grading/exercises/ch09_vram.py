"""Chapter 09, memory: six exercises and six questions.

The five formulas are judged by numbers on drawn shapes. A designed configuration is judged by its effect: the probe
sends the design as data, and the reading, which runs at the grader's, puts it through `pefttools.vram.estimate`: does
it fit, does it do what was asked for, does it pay for a saving that it does not need? Several designs pass. Imports
torch and the standard library only; the library is imported when something is judged.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pefttools.grading.exercise import Exercise
from pefttools.grading.question import Question

CHAPTER = "09_vram"
TITLE = "Memory, and designing a configuration"
HIDES = ("pefttools.vram", "pefttools.widgets")


def whole(rng: torch.Generator, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def one_of(rng: torch.Generator, choices: Any) -> Any:
    return choices[whole(rng, 0, len(choices) - 1)]


def number(value: Any) -> Any:
    """What a function returned as a float, whatever kind of number it is; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.detach().item()
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


# ================================================================================================ weight-bytes

KINDS = ("float32", "bfloat16", "nf4", "nf4-dq")


def weight_inputs(rng: torch.Generator) -> list[dict]:
    drawn = [{"linear": 16_384 * whole(rng, 50, 900), "other": 1_000 * whole(rng, 400, 9_000), "kind": kind}
             for kind in ("bfloat16", "float32", "nf4", "nf4-dq")]
    return [*drawn, {"linear": 973_078_528, "other": 262_735_872, "kind": "nf4-dq"}]  # Llama-3.2-1B


def weight_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"bytes": number(work(case["linear"], case["other"], case["kind"]))}


def weight_reference(linear, other, kind):
    bits = {"float32": 32, "bfloat16": 16, "nf4": 4 + 32 / 64, "nf4-dq": 4 + 8 / 64 + 32 / (64 * 256)}[kind]
    return linear * bits / 8 + other * (4 if kind == "float32" else 2)


def weights_with(nf4: float, dq: float, other: float = 2.0, wide: float = 4.0) -> Callable:
    """Right where nf4 = 4.5 and dq = 4.127 bits a weight, 2 bytes of everything else (4 in float32)."""
    def work(linear, n_other, kind):
        if kind in ("float32", "bfloat16"):
            return (linear + n_other) * (wide if kind == "float32" else 2)
        return linear * (nf4 if kind == "nf4" else dq) / 8 + n_other * other
    return work


DQ_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def weights_all_in_four_bits(linear, other, kind):
    return weight_reference(linear + other, 0, kind)


def weights_linear_only(linear, other, kind):
    return weight_reference(linear, 0, kind)


def weights_other_in_two_bytes(linear, other, kind):
    return weight_reference(linear, 0, kind) + 2 * other


def weights_in_bits(linear, other, kind):
    return 8 * weight_reference(linear, other, kind)


def weights_in_gigabytes(linear, other, kind):
    return weight_reference(linear, other, kind) / 1e9


def weights_in_gibibytes(linear, other, kind):
    return weight_reference(linear, other, kind) / 2**30


def weights_block_by_block(linear, other, kind):
    if not kind.startswith("nf4"):
        return (linear + other) * {"float32": 4, "bfloat16": 2}[kind]
    blocks = linear // 64
    constants = 4 * blocks if kind == "nf4" else blocks + 4 * (blocks // 256)
    return linear // 2 + constants + 2 * other


def weights_as_a_whole_number(linear, other, kind):
    if kind == "float32":
        return 4 * linear + 4 * other
    per_tile = {"bfloat16": 32_768, "nf4": 8_192 + 256 * 4, "nf4-dq": 8_192 + 256 + 4}[kind]  # 256 blocks of 64 weights
    return linear // 16_384 * per_tile + other * 2


WEIGHT_BYTES = Exercise(
    name="weight-bytes", chapter=CHAPTER, title="What the weights weigh", points=2, minutes=5, difficulty=1,
    inputs=weight_inputs, probe=weight_probe, reference=weight_reference,
    mistakes={
        "zero": (lambda linear, other, kind: 0, "This is 0. Even a frozen model has to be there to be run."),
        "half a byte": (weights_with(4, 4),
            "You take 4-bit weights for half a byte each, as two of our sources do. The codes are; but a code means "
            "nothing without its block's scale: 4.5 bits a weight with a 32-bit scale for 64 of them, 4.127 with "
            "double quantization."),
        "everything in four bits": (weights_all_in_four_bits,
            "You quantize `other` as well. Embedding, head and norms stay in 16 bits: only the linear layers inside "
            "the blocks become codes."),
        "linear only": (weights_linear_only,
            "`other` is missing: embedding, head and norms. In Llama-3.2-1B they are a fifth of all parameters, and in "
            "a 4-bit model half of the bytes."),
        "other in four bytes": (weights_with(4.5, DQ_BITS, other=4.0),
            "In a quantized model you count `other` with 4 bytes. It stays in 16 bits: 2 bytes each."),
        "scales in 16 bits": (weights_with(4 + 16 / 64, DQ_BITS),
            "Your NF4 has scales of 16 bits. One scale (absmax) for a block of 64 weights is a float32: 32/64 = half a "
            "bit for each weight."),
        "a scale for every weight": (weights_with(4 + 32, 4 + 8),
            "You add a whole scale to every weight. One scale serves a block of 64 weights: divide it by 64."),
        "double quantization without effect": (weights_with(4.5, 4.5),
            "Your \"nf4-dq\" is as large as \"nf4\". Double quantization stores the scales themselves in 8 bits: 8/64 "
            "instead of 32/64, and a scale of scales for each 256 of them."),
        "scale of scales forgotten": (weights_with(4.5, 4 + 8 / 64),
            "The second level of scales is missing: a 32-bit number for every 256 blocks of 64 weights. It is only "
            "32/(64·256) = 0.002 bits a weight, and it is there."),
        "scale of scales per block": (weights_with(4.5, 4 + 8 / 64 + 32 / 64),
            "You add a 32-bit scale of scales to every block. One of them serves 256 blocks: 32/(64·256) bits a "
            "weight."),
        "scale of scales per 256 weights": (weights_with(4.5, 4 + 8 / 64 + 32 / 256),
            "One scale of scales serves 256 *blocks*, and a block has 64 weights: divide its 32 bits by 64·256, not by "
            "256."),
        "bits for bytes": (weights_in_bits,
            "This is the number of bits. Eight of them make a byte."),
        "other always in two bytes": (weights_other_in_two_bytes,
            "In \"float32\" you count `other` with 2 bytes. There all weights have 4, these too; 2 bytes for `other` "
            "belong to the other three kinds."),
        "float32 as bfloat16": (weights_with(4.5, DQ_BITS, wide=2.0),
            "A float32 weight has 4 bytes (32 bits), a bfloat16 one 2."),
        "in GB": (weights_in_gigabytes, "This is in GB. Return bytes: then no one can take GB for GiB."),
        "in GiB": (weights_in_gibibytes, "This is in GiB. Return bytes: then no one can take GiB for GB."),
    },
    alternatives={"block by block": weights_block_by_block, "whole numbers only": weights_as_a_whole_number},
    rtol=1e-7, accepts="function", hides=HIDES)


# ================================================================================================ optimizer-bytes

def optimizer_inputs(rng: torch.Generator) -> list[dict]:
    def adapter(r: int) -> list[tuple[int, ...]]:
        d_in, d_out = (whole(rng, 900, 3_000) for _ in range(2))
        return [(r, d_in), (d_out, r), (whole(rng, 100, 4_000),)]  # A and B are large, the vector is small

    return [{"shapes": [(whole(rng, 100, 200), whole(rng, 50, 90)), (whole(rng, 70, 90),)], "dtype_bytes": 2,
             "optimizer": "adamw"},
            {"shapes": adapter(8), "dtype_bytes": 4, "optimizer": "adamw"},
            {"shapes": adapter(8), "dtype_bytes": 4, "optimizer": "adamw_8bit"},
            {"shapes": [*adapter(6), (4096,), (4095,), (1, 4097)], "dtype_bytes": 2, "optimizer": "adamw_8bit"},
            {"shapes": adapter(16), "dtype_bytes": 2, "optimizer": "adafactor"},
            {"shapes": adapter(4), "dtype_bytes": 2, "optimizer": "sgd"}]


def optimizer_probe(work: Callable, case: dict) -> dict[str, Any]:
    shapes = [tuple(shape) for shape in case["shapes"]]
    return {"bytes": number(work(shapes, case["dtype_bytes"], case["optimizer"]))}


def state_of(shape, dtype_bytes, optimizer, small=4096, blocks=lambda n: -(-n // 256)):
    n = math.prod(shape)
    if optimizer == "adamw":
        return 2 * n * dtype_bytes
    if optimizer == "adamw_8bit":
        return 2 * 4 * n if n < small else 2 * (n + 4 * blocks(n))
    if optimizer == "adafactor":
        return 4 * (sum(shape) if len(shape) == 2 else n)
    return 0


def optimizer_reference(shapes, dtype_bytes, optimizer):
    return sum(state_of(shape, dtype_bytes, optimizer) for shape in shapes)


def optimizer_with(**changes: Callable) -> Callable:
    """The reference, with some optimizers' bytes of one tensor from other functions of (shape, dtype_bytes)."""
    def work(shapes, dtype_bytes, optimizer):
        rule = changes.get(optimizer, lambda shape, size: state_of(shape, size, optimizer))
        return sum(rule(shape, dtype_bytes) for shape in shapes)
    return work


def optimizer_in_one_lump(shapes, dtype_bytes, optimizer):
    n = sum(math.prod(shape) for shape in shapes)
    return optimizer_reference([(n,)], dtype_bytes, optimizer) if optimizer != "adafactor" else \
        optimizer_reference(shapes, dtype_bytes, optimizer)


def optimizer_with_gradients(shapes, dtype_bytes, optimizer):
    return optimizer_reference(shapes, dtype_bytes, optimizer) + dtype_bytes * sum(map(math.prod, shapes))


def optimizer_by_tensors(shapes, dtype_bytes, optimizer):
    total = 0
    for shape in shapes:
        p = torch.empty(shape, dtype={2: torch.bfloat16, 4: torch.float32}[dtype_bytes], device="meta")
        if optimizer == "adamw":
            made = [torch.empty_like(p), torch.empty_like(p)]
        elif optimizer == "adamw_8bit" and p.numel() < 4096:
            made = [torch.empty_like(p, dtype=torch.float32)] * 2
        elif optimizer == "adamw_8bit":
            blocks = p.numel() // 256 + (p.numel() % 256 > 0)
            made = [torch.empty_like(p, dtype=torch.uint8), torch.empty(blocks, device="meta")] * 2
        elif optimizer == "adafactor":
            made = [torch.empty(n, device="meta") for n in shape]
        else:
            made = []
        total += sum(t.numel() * t.element_size() for t in made)
    return total


def optimizer_by_cases(shapes, dtype_bytes, optimizer):
    bytes_of = 0.0
    for shape in shapes:
        n = 1
        for size in shape:
            n *= size
        match optimizer:
            case "adamw":
                bytes_of += n * dtype_bytes + n * dtype_bytes
            case "adamw_8bit" if n >= 4096:
                bytes_of += 2.0 * n + 8.0 * math.ceil(n / 256)
            case "adamw_8bit":
                bytes_of += 8.0 * n
            case "adafactor":
                bytes_of += 4.0 * sum(shape)
    return bytes_of


OPTIMIZER_BYTES = Exercise(
    name="optimizer-bytes", chapter=CHAPTER, title="What the optimizer remembers", points=3, minutes=10, difficulty=2,
    inputs=optimizer_inputs, probe=optimizer_probe, reference=optimizer_reference,
    mistakes={
        "nothing": (lambda shapes, dtype_bytes, optimizer: 0,
            "This is 0. Only plain SGD remembers nothing; Adam keeps two numbers for each number that trains."),
        "one moment": (optimizer_with(adamw=lambda s, d: math.prod(s) * d),
            "This is one moment. AdamW keeps two: the running mean of the gradient and of its square."),
        "always float32": (optimizer_with(adamw=lambda s, d: 8 * math.prod(s)),
            "You count the moments of \"adamw\" as float32. PyTorch's AdamW makes them in the dtype of the parameter "
            "(zeros_like): with 16-bit weights they have 16 bits. The usual 8 bytes hold for float32 parameters, such "
            "as adapters."),
        "with the gradients": (optimizer_with_gradients,
            "The gradients are in this count. They are a term of their own: they come and go in every step, while the "
            "optimizer's state stays."),
        "half of AdamW": (optimizer_with(adamw_8bit=lambda s, d: math.prod(s) * d),
            "Your 8-bit AdamW takes half (or so) of the other. Count it anew: one byte for each of two moments, and a "
            "float32 scale for each block of 256 of them."),
        "no scales": (optimizer_with(adamw_8bit=lambda s, d: math.prod(s) * (2 if math.prod(s) >= 4096 else 8)),
            "The scales of the 8-bit moments are missing: as in any blockwise quantization, each block (here of 256 "
            "numbers) has one, a float32."),
        "scales once": (optimizer_with(adamw_8bit=lambda s, d: 2 * (n := math.prod(s)) + 4 * -(-n // 256)
                                       if math.prod(s) >= 4096 else 8 * math.prod(s)),
            "The scales are counted for one of the two moments. Each has its own."),
        "one 8-bit moment": (optimizer_with(adamw_8bit=lambda s, d: (n := math.prod(s)) + 4 * -(-n // 256)
                                            if math.prod(s) >= 4096 else 4 * math.prod(s)),
            "This is one moment in 8 bits. Adam keeps two, however it stores them."),
        "last block forgotten": (optimizer_with(adamw_8bit=lambda s, d: state_of(s, d, "adamw_8bit",
                                                                                 blocks=lambda n: n // 256)),
            "You divide by 256 and round down. The last block, which is not full, has a scale as well: round up."),
        "small tensors in 8 bits": (optimizer_with(adamw_8bit=lambda s, d: state_of(s, d, "adamw_8bit", small=0)),
            "You put small tensors into 8 bits as well. bitsandbytes leaves the moments of a tensor of fewer than "
            "4,096 "
            "numbers in float32: there is little to save, and much to spoil."),
        "4,096 counts as small": (optimizer_with(adamw_8bit=lambda s, d: state_of(s, d, "adamw_8bit", small=4097)),
            "A tensor of exactly 4,096 numbers is large enough for 8 bits: only *fewer* than 4,096 stay in float32."),
        "all tensors in one lump": (optimizer_in_one_lump,
            "You add up all tensors first and then decide. Each tensor has its own state: whether it is small, and how "
            "many blocks it has, is decided tensor by tensor."),
        "adafactor keeps a whole moment": (optimizer_with(adafactor=lambda s, d: 4 * math.prod(s)),
            "Adafactor's point is that it does *not* keep the second moment of a matrix: only its row means and its "
            "column means, rows + columns numbers in float32."),
        "adafactor keeps nothing of a vector": (optimizer_with(adafactor=lambda s, d: 4 * sum(s) if len(s) == 2 else 0),
            "A vector cannot be factored into rows and columns, so Adafactor keeps its whole second moment."),
        "adafactor in the parameter's dtype": (optimizer_with(adafactor=lambda s, d: d * sum(s)),
            "Adafactor's rows and columns are float32 here, whatever the parameter is: 4 bytes each."),
        "adafactor's vector in the parameter's dtype": (
            optimizer_with(adafactor=lambda s, d: 4 * sum(s) if len(s) == 2 else d * s[0]),
            "A vector's second moment is float32 as well: all that Adafactor keeps has 4 bytes a number."),
        "small tensors in the parameter's dtype": (optimizer_with(adamw_8bit=lambda s, d: state_of(
                s, d, "adamw_8bit") if math.prod(s) >= 4096 else 2 * d * math.prod(s)),
            "The moments of the small tensors have the parameter's dtype in your count. bitsandbytes keeps those in "
            "float32 whatever the parameter is: 2 · 4 bytes a number."),
        "sgd with momentum": (optimizer_with(sgd=lambda s, d: d * math.prod(s)),
            "You count a momentum for SGD. Plain SGD (momentum 0, the default) has no state at all."),
    },
    alternatives={"as tensors on the meta device": optimizer_by_tensors, "one case after another": optimizer_by_cases},
    rtol=1e-7, accepts="function", hides=HIDES)


# ================================================================================================ activation-bytes

def draw_layer(rng: torch.Generator) -> dict[str, int]:
    head, kv, group = one_of(rng, (32, 64, 128)), whole(rng, 2, 9), whole(rng, 2, 6)
    return {"h": 64 * whole(rng, 9, 60), "q": head * kv * group, "k": head * kv, "m": 128 * whole(rng, 20, 90)}


def activation_inputs(rng: torch.Generator) -> list[dict]:
    rows = [("all", False), ("lora", False), ("none", False), ("lora", True), ("all", True)]
    drawn = [{"layer": draw_layer(rng), "layers": whole(rng, 2, 40), "tokens": whole(rng, 50, 9000), "trained": trained,
              "checkpointing": checkpointing} for trained, checkpointing in rows]
    llama = {"h": 2048, "q": 2048, "k": 512, "m": 8192}
    return [*drawn, {"layer": llama, "layers": 16, "tokens": 4 * 512, "trained": "all", "checkpointing": False}]


def activation_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"bytes": number(work(dict(case["layer"]), case["layers"], case["tokens"], case["trained"],
                                 case["checkpointing"]))}


KEPT = {"all": (16, 4, 4, 8), "lora": (12, 4, 4, 8), "none": (8, 4, 4, 6)}  # bytes for each of h, q, k, m


def activation_with(kept: dict | None = None, start: int = 2) -> Callable:
    """Right where `kept` is KEPT and a checkpointed layer keeps 2 bytes of h."""
    kept = {**KEPT, **(kept or {})}

    def work(layer, layers, tokens, trained, checkpointing):
        one = start * layer["h"] if checkpointing else sum(c * layer[k] for c, k in zip(kept[trained], "hqkm"))
        return tokens * layers * one
    return work


activation_reference = activation_with()


def activation_one_layer(layer, layers, tokens, trained, checkpointing):
    return activation_reference(layer, 1, tokens, trained, checkpointing)


def activation_elements(layer, layers, tokens, trained, checkpointing):
    return activation_reference(layer, layers, tokens, trained, checkpointing) / 2


def activation_never_checkpointed(layer, layers, tokens, trained, checkpointing):
    return activation_reference(layer, layers, tokens, trained, False)


def activation_and_one_layer(layer, layers, tokens, trained, checkpointing):
    kept = activation_reference(layer, layers, tokens, trained, checkpointing)
    return kept + (activation_reference(layer, 1, tokens, trained, False) if checkpointing else 0)


def activation_checkpoint_once(layer, layers, tokens, trained, checkpointing):
    return activation_reference(layer, 1 if checkpointing else layers, tokens, trained, checkpointing)


def activation_as_a_list(layer, layers, tokens, trained, checkpointing):
    h, q, k, m = layer["h"], layer["q"], layer["k"], layer["m"]
    if checkpointing:
        return sum(tokens * h * 2 for _ in range(layers))
    kept = [4 * h, 4 * h]                               # both norms, in float32
    kept += [2 * q, 2 * k, 2 * k, 2 * q]                # queries, keys, values, attention's output
    kept += [2 * m, 2 * m, 2 * m]                       # gate, its activation, up
    if trained != "none":
        kept += [2 * h, 2 * h, 2 * m]                   # inputs of the linear layers
    if trained == "all":
        kept += [2 * h, 2 * h]                          # inputs of the norms' weights
    return layers * tokens * sum(kept)


def activation_by_table(layer, layers, tokens, trained, checkpointing):
    weights = {"all": [16, 4, 4, 8], "lora": [12, 4, 4, 8], "none": [8, 4, 4, 6]}[trained]
    sizes = torch.tensor([layer["h"], layer["q"], layer["k"], layer["m"]], dtype=torch.float64)
    row = torch.tensor([2, 0, 0, 0] if checkpointing else weights, dtype=torch.float64)
    return (row @ sizes) * layers * tokens


ACTIVATION_BYTES = Exercise(
    name="activation-bytes", chapter=CHAPTER, title="What the layers keep", points=4, minutes=15, difficulty=2,
    inputs=activation_inputs, probe=activation_probe, reference=activation_reference,
    mistakes={
        "one layer": (activation_one_layer,
            "This is what one layer keeps. Each layer keeps its own until the backward pass comes by: times `layers`."),
        "numbers, not bytes": (activation_elements,
            "This is half of it: a 16-bit number takes 2 bytes, a float32 one 4."),
        "norms in 16 bits": (activation_with({"all": (12, 4, 4, 8), "lora": (8, 4, 4, 8), "none": (4, 4, 4, 6)}),
            "You count the norms' inner copies with 2 bytes. An RMSNorm computes in float32 and keeps its input so: "
            "4h, "
            "for each of the two norms."),
        "one norm": (activation_with({"all": (8, 4, 4, 8), "lora": (6, 4, 4, 8), "none": (4, 4, 4, 6)}),
            "A decoder layer has two norms, one before attention and one before the feed-forward part. You count one."),
        "all heads alike": (lambda layer, layers, tokens, trained, checkpointing: activation_reference(
            layer | {"k": layer["q"]}, layers, tokens, trained, checkpointing),
            "You count keys and values as wide as queries. With grouped-query attention they are k wide, not q."),
        "attention's output forgotten": (
            activation_with({"all": (16, 2, 4, 8), "lora": (12, 2, 4, 8), "none": (8, 2, 4, 6)}),
            "Attention's output is missing (2q). The fused kernel keeps q, k, v *and* its output, from which it "
            "computes "
            "the weights again in the backward pass."),
        "values forgotten": (activation_with({"all": (16, 4, 2, 8), "lora": (12, 4, 2, 8), "none": (8, 4, 2, 6)}),
            "Only one of keys and values is counted. Both are kept, 2k each."),
        "LoRA frees everything": (activation_with({"lora": KEPT["none"]}),
            "For \"lora\" you count as if no layer learned anything. But A of every linear layer needs that layer's "
            "*input* "
            "for its gradient: the norms' outputs and the input of `down_proj` are kept again."),
        "full as LoRA": (activation_with({"all": KEPT["lora"]}),
            "For \"all\" you count what LoRA keeps. The norms' own weights train too, and the gradient of each needs the "
            "normalised input from before that weight: 2h more for each of the two norms."),
        "LoRA as full": (activation_with({"lora": KEPT["all"]}),
            "For \"lora\" you count what full fine-tuning keeps. The norms' own weights are frozen, so what only they "
            "need "
            "(2h for each norm) goes."),
        "nothing trained, nothing kept": (activation_with({"none": (0, 0, 0, 0)}),
            "Where no layer learns you count nothing. The gradient still has to pass *through* the layers to reach the "
            "soft prompt in front: what nonlinear parts need for that is kept."),
        "nothing trained, as LoRA": (activation_with({"none": KEPT["lora"]}),
            "Where no layer learns, nobody asks for the inputs of linear layers: a linear layer passes a gradient on "
            "with its weight alone."),
        "checkpointing ignored": (activation_never_checkpointed,
            "Checkpointing changes nothing here. With it, a layer keeps only its own input (2h) when the forward pass "
            "is done."),
        "checkpointing keeps nothing": (activation_with(start=0),
            "With checkpointing you count nothing. Each layer keeps its input, or there would be nothing to start from "
            "again: 2h."),
        "checkpoints in float32": (activation_with(start=4),
            "A checkpointed layer keeps its input as it came, in 16 bits: 2h, not 4h."),
        "one checkpoint for all": (activation_checkpoint_once,
            "You count one layer's input. Every layer keeps its own: 2h times `layers`."),
        "with the layer that runs again": (activation_and_one_layer,
            "The layer that is computed again in the backward pass is in your count. The question is what is kept when "
            "the *forward* pass is done; that layer comes at another moment, when the logits are gone."),
    },
    alternatives={"tensor by tensor": activation_as_a_list, "a table times the widths": activation_by_table},
    rtol=1e-7, accepts="function", hides=HIDES)


# ================================================================================================ logits-bytes

def logits_inputs(rng: torch.Generator) -> list[dict]:
    drawn = [{"vocab": whole(rng, 900, 200_000), "tokens": whole(rng, 30, 9000), "dtype_bytes": size,
              "holds_logits": holds}
             for size, holds in ((2, True), (2, False), (4, True), (4, False))]
    return [{"vocab": 128_256, "tokens": 2048, "dtype_bytes": 2, "holds_logits": True}, *drawn]


def logits_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"bytes": number(work(case["vocab"], case["tokens"], case["dtype_bytes"], case["holds_logits"]))}


def logits_with(held: Callable[[int], float] = lambda size: size, rest: float = 12, never: float = 0) -> Callable:
    """Right with the defaults: the logits themselves while somebody holds them, and three float32 tensors."""
    def work(vocab, tokens, dtype_bytes, holds_logits):
        return vocab * tokens * (rest + (held(dtype_bytes) if holds_logits else never))
    return work


logits_reference = logits_with()


def logits_as_tensors(vocab, tokens, dtype_bytes, holds_logits):
    alive = [torch.empty(tokens, vocab, device="meta") for _ in range(3)]
    if holds_logits:
        dtype = {2: torch.bfloat16, 4: torch.float32}[dtype_bytes]
        alive.append(torch.empty(tokens, vocab, device="meta", dtype=dtype))
    return sum(t.nbytes for t in alive)


def logits_step_by_step(vocab, tokens, dtype_bytes, holds_logits):
    total = 0
    for name, size in {"logits": dtype_bytes, "log p": 4, "∂/∂ log p": 4, "∂/∂ logits": 4}.items():
        if name != "logits" or holds_logits:
            total += tokens * vocab * size
    return float(total)


LOGITS_BYTES = Exercise(
    name="logits-bytes", chapter=CHAPTER, title="The widest tensor of all", points=2, minutes=8, difficulty=1,
    inputs=logits_inputs, probe=logits_probe, reference=logits_reference,
    mistakes={
        "nothing": (lambda *given: 0, "This is 0. The logits are one number for each token and each word: often the "
                    "largest tensors of the whole step."),
        "logits alone": (lambda v, t, d, holds: v * t * d,
            "These are the logits alone, in the base's dtype. The loss is computed in float32, and its backward pass "
            "needs the log-probabilities and two gradients of the same shape."),
        "forward only": (lambda v, t, d, holds: v * t * (d + 4 if d == 4 else d + 8),
            "This is what is alive in the forward pass. The peak comes when the backward pass begins: the "
            "log-probabilities, the gradient with respect to them, and the gradient with respect to the logits."),
        "one gradient": (logits_with(rest=8),
            "One float32 tensor is missing. At the worst moment there are three: the log-probabilities, the gradient "
            "with respect to them, and the gradient with respect to the logits."),
        "held logits forgotten": (logits_with(held=lambda d: 0),
            "The logits themselves are missing where somebody still holds them (`out = model(…)`): they stay until "
            "`out` "
            "is let go."),
        "never let go": (lambda v, t, d, holds: v * t * (12 + d),
            "You count the logits also where nobody holds them. With `loss = model(…).loss` they are gone when the "
            "backward pass begins: the loss does not need them once it has the log-probabilities."),
        "upside down": (lambda v, t, d, holds: v * t * (12 + (0 if holds else d)),
            "You have it the other way round: the logits stay where they *are* held."),
        "everything in 16 bits": (lambda v, t, d, holds: v * t * (3 * d + (d if holds else 0)),
            "You count the loss in the base's dtype. transformers turns the logits into float32 first, whatever the "
            "model's dtype is: 4 bytes for each of the three."),
        "last gradient in the model's dtype": (lambda v, t, d, holds: v * t * (8 + d + (d if holds else 0)),
            "You count the gradient with respect to the logits in the model's dtype. At that moment it is still the "
            "one of the float32 copy, 4 bytes; it becomes 16 bits one step later, when the others are gone."),
        "one row": (lambda v, t, d, holds: v * (12 + (d if holds else 0)),
            "This is for one token. Every token of the batch has its own row of logits."),
        "float32 copy kept": (logits_with(rest=16),
            "One float32 tensor too many. The float32 copy of the logits is let go when the log-probabilities are "
            "there; "
            "the backward pass of log-softmax works from those."),
    },
    alternatives={"as tensors on the meta device": logits_as_tensors, "step by step": logits_step_by_step},
    rtol=1e-7, accepts="function", hides=HIDES)


# ================================================================================================ fits

SIZES = {"B": 1, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
CARDS = (14_909, 22_491, 24_259, 40_339, 45_598, 81_152)  # MiB, as torch reports: a T4, an L4, a 3090, A100s, an L40S


def fits_inputs(rng: torch.Generator) -> list[dict]:
    """Totals a little below or above the card, so that GB for GiB turns the answer round."""
    def case(share: float) -> dict:
        card, context, margin = one_of(rng, CARDS), whole(rng, 350, 700), whole(rng, 1, 4) / 100
        room = (card - context) * 2**20 / (1 + margin) * share
        cuts = [whole(rng, 2, 6) for _ in range(4)]
        parts, left = [], room
        for cut, unit in zip(cuts, ("GB", "GiB", "MiB", "B")):
            amount = room * cut / sum(cuts) if unit != "B" else left
            amount = round(amount / SIZES[unit], {"B": 0, "MiB": 0, "GB": 2, "GiB": 2}[unit])
            left -= amount * SIZES[unit]
            parts.append((amount, unit))
        return {"parts": parts, "card_mib": card, "context_mib": context, "margin": margin}

    close = case(0.975)
    close["parts"] = [(round(sum(a * SIZES[u] for a, u in close["parts"]) / 1e9, 2), "GB")]   # as GiB it would not fit
    return [case(0.6), close, case(0.98), case(1.02), case(1.4)]


def fits_probe(work: Callable, case: dict) -> dict[str, Any]:
    found = work([tuple(part) for part in case["parts"]], case["card_mib"], case["context_mib"], case["margin"])
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        gave = "None (is a `return` missing?)" if found is None else f"one {type(found).__name__}"
        raise TypeError("return two things, whether it fits and how many bytes are left: `return left >= 0, left`; "
                        f"this returned {gave}")
    answer = found[0].item() if isinstance(found[0], torch.Tensor) and found[0].numel() == 1 else found[0]
    return {"it fits": answer, "bytes left": number(found[1])}


def fits_with(sizes: dict | None = None, needed: Callable = lambda peak, margin: peak * (1 + margin),
              there: Callable = lambda card, context: (card - context) * 2**20) -> Callable:
    """Right with the defaults."""
    sizes = {**SIZES, **(sizes or {})}

    def work(parts, card_mib, context_mib, margin):
        left = there(card_mib, context_mib) - needed(sum(amount * sizes[unit] for amount, unit in parts), margin)
        return left >= 0, left
    return work


fits_reference = fits_with()


def fits_turned(parts, card_mib, context_mib, margin):
    fits, left = fits_reference(parts, card_mib, context_mib, margin)
    return not fits, -left


def fits_in_gib(parts, card_mib, context_mib, margin):
    fits, left = fits_reference(parts, card_mib, context_mib, margin)
    return fits, left / 2**30


def fits_in_mib(parts, card_mib, context_mib, margin):
    fits, left = fits_reference(parts, card_mib, context_mib, margin)
    return fits, left / 2**20


def fits_margin_of_the_card(parts, card_mib, context_mib, margin):
    left = (card_mib - context_mib) * 2**20 * (1 - margin) - sum(amount * SIZES[unit] for amount, unit in parts)
    return left >= 0, left


def fits_in_a_loop(parts, card_mib, context_mib, margin):
    peak = 0.0
    for amount, unit in parts:
        if unit == "GiB":
            peak += amount * 1024**3
        elif unit == "MiB":
            peak += amount * 1024**2
        elif unit == "GB":
            peak += amount * 1e9
        else:
            peak += amount
    left = card_mib * 1024**2 - context_mib * 1024**2 - peak - margin * peak
    return [bool(left > 0), left]


def fits_on_tensors(parts, card_mib, context_mib, margin):
    sizes = {"B": 1.0, "MiB": 2.0**20, "GB": 1e9, "GiB": 2.0**30}
    peak = torch.tensor([amount * sizes[unit] for amount, unit in parts], dtype=torch.float64).sum()
    left = (card_mib - context_mib) * 2.0**20 - peak * (1 + margin)
    return left >= 0, left


FITS = Exercise(
    name="fits", chapter=CHAPTER, title="Does it fit?", points=3, minutes=8, difficulty=2,
    inputs=fits_inputs, probe=fits_probe, reference=fits_reference,
    mistakes={
        "GB for GiB": (fits_with({"GiB": 10**9}),
            "You take a GiB for 10⁹ bytes. It is 2³⁰ = 1,073,741,824: 7 % more, which on a large card is more than a "
            "whole "
            "adapter with its optimizer."),
        "GiB for GB": (fits_with({"GB": 2**30}),
            "You take a GB for 2³⁰ bytes. It is 10⁹; what has 2³⁰ bytes is a GiB."),
        "MiB for MB": (fits_with({"MiB": 10**6}, there=lambda card, context: (card - context) * 10**6),
            "You take a MiB for 10⁶ bytes. It is 2²⁰ = 1,048,576. Drivers and torch count in MiB and GiB."),
        "MB in the parts": (fits_with({"MiB": 10**6}),
            "In the parts you take a MiB for 10⁶ bytes. It is 2²⁰ = 1,048,576."),
        "card in MB": (fits_with(there=lambda card, context: (card - context) * 10**6),
            "The card's and the context's sizes are in MiB: times 2²⁰ bytes, not 10⁶."),
        "context forgotten": (fits_with(there=lambda card, context: card * 2**20),
            "CUDA's own share is missing. Before the first tensor is made, the context has taken `context_mib` of the "
            "card; no counter of torch shows it."),
        "margin forgotten": (fits_with(needed=lambda peak, margin: peak),
            "The allocator's margin is missing. Blocks are rounded up and cannot all be used again, so that torch "
            "reserves more than is in use: peak · (1 + margin)."),
        "margin alone": (fits_with(needed=lambda peak, margin: peak * margin),
            "You subtract only the margin. What is needed is the peak and the margin on top: peak · (1 + margin)."),
        "margin of the card": (fits_margin_of_the_card,
            "You take the margin from the card. It is a share of what is *used*: a small job on a large card loses "
            "little to rounding."),
        "margin on the context": (lambda parts, card, context, margin: (
            (left := (card - context * (1 + margin)) * 2**20
             - sum(a * SIZES[u] for a, u in parts) * (1 + margin)) >= 0, left),
            "You put the margin on the context, too. Torch's allocator has nothing to do with it."),
        "turned round": (fits_turned,
            "The sign is the wrong way round: it fits if the card, less the context, is at least as large as what is "
            "needed."),
        "left in GiB": (fits_in_gib,
            "What is left is in GiB. Return bytes."),
        "left in MiB": (fits_in_mib,
            "What is left is in MiB. Return bytes."),
        "context put on top": (fits_with(there=lambda card, context: (card + context) * 2**20),
            "You add the context to the card. It *takes* its part of it: card − context is there for tensors."),
        "margin in percent": (fits_with(needed=lambda peak, margin: peak * (1 + margin / 100)),
            "You divide the margin by 100. It is a share already: 0.03 is 3 %."),
        "never below zero": (lambda *given: (fits_reference(*given)[0], max(0, fits_reference(*given)[1])),
            "Where it does not fit you say that 0 bytes are left. Return the negative number: it says how much has to "
            "go."),
        "always": (lambda *given: (True, fits_reference(*given)[1]),
            "You say that it fits where the bytes left are negative."),
    },
    alternatives={"in a loop": fits_in_a_loop, "on tensors": fits_on_tensors},
    rtol=1e-9, atol=1.0, accepts="function", hides=HIDES)


# ================================================================================================ design-configuration

SAVINGS = ("quantize", "checkpointing")
FIELDS = {"dtype": str, "quantize": bool, "checkpointing": bool, "batch": int, "accumulate": int, "r": int}
ROOM = 1.25  # a saving is a waste if a quarter of the card would have been left without it: no formula is so far off


def facts_of(name: str) -> dict[str, Any]:
    """The sizes of a Llama that its memory depends on, from its published configuration."""
    from pefttools.vram.preset_data import PRESETS

    c, parameters, _ = PRESETS[name]
    h, m, L, V = (c[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    head = c.get("head_dim") or h // c["num_attention_heads"]
    q, k = head * c["num_attention_heads"], head * c["num_key_value_heads"]
    linear = L * (2 * h * q + 2 * h * k + 3 * h * m)
    return {"name": name, "layer": {"h": h, "q": q, "k": k, "m": m}, "layers": L, "vocab": V, "linear": linear,
            "other": parameters - linear, "lora": L * (2 * (h + q) + 2 * (h + k) + 3 * (h + m))}


def gpu_of(name: str) -> dict[str, Any]:
    from pefttools.vram.gpus import GPUS

    gpu = GPUS[name]
    return {"name": name, "free": gpu.free_for_torch, "bfloat16": gpu.bf16}


# What each kind of case is for, with (model, GPU, tokens a row) to draw from. Every one can be done. On the T4 stands a
# model without grouped queries: for those torch has no fused kernel there, and the chapter's table of kept tensors
# would be wrong.
TIGHT = [("llama-3.2-3b", "l4", 4096), ("llama-3.2-3b", "rtx-3090", 4096), ("llama-3.2-3b", "a10", 4096)]
MIDDLE = [("llama-2-7b", "rtx-3090", 1024), ("mistral-7b", "l4", 1024), ("llama-2-7b", "l4", 768),
          ("llama-2-13b", "l40s", 1024), ("llama-2-13b", "a100-40", 1024)]
WITHOUT_BFLOAT16 = [("llama-2-7b", "t4", 512), ("llama-2-7b", "t4", 1024), ("llama-2-7b", "t4", 1536)]
QUANTIZED = [("llama-2-13b", "rtx-3090", 1024), ("llama-2-13b", "l4", 1024), ("llama-2-13b", "rtx-4090", 768)]
LARGE = [("llama-2-70b", "a100-80", 1024), ("llama-3.1-70b", "h100", 1024), ("llama-65b", "l40s", 512)]
ROOMY = [("llama-3.2-1b", "a100-80", 512), ("llama-3.2-1b", "a100-40", 256), ("llama-3.2-3b", "h100", 512),
         ("llama-3.2-3b", "a100-80", 384)]


def design_inputs(rng: torch.Generator) -> list[dict]:
    cases = []
    for kind in (ROOMY, TIGHT, MIDDLE, WITHOUT_BFLOAT16, QUANTIZED, LARGE):
        name, gpu, seq = one_of(rng, kind)
        model = facts_of(name)
        examples = one_of(rng, (4, 8)) if kind is ROOMY else one_of(rng, (16, 32, 64))
        least, tasks = one_of(rng, (8, 16)), whole(rng, 2, 60)
        most = least * one_of(rng, (1, 2))                          # the largest rank that the storage allows, below 64
        cases.append({"what": f"{name} on a {gpu}", "model": model, "gpu": gpu_of(gpu), "job": {
            "seq": seq - 16 * whole(rng, 0, 4), "examples": examples, "rank": least, "tasks": tasks,
            "storage": round(tasks * most * model["lora"] * 2 * (1 + whole(rng, 5, 70) / 100))}})
    return cases


def design_probe(work: Callable, case: dict) -> dict[str, Any]:
    design = work({**case["model"], "layer": dict(case["model"]["layer"])}, dict(case["gpu"]), dict(case["job"]))
    names = "dtype, quantize, checkpointing, batch, accumulate, r"
    if not isinstance(design, dict):
        raise TypeError(f"return a dict with {names}; this returned "
                        + ("None (did nothing fit, or is a `return` missing?)" if design is None
                           else f"one {type(design).__name__}"))
    missing = [name for name in names.split(", ") if name not in design]
    if missing:
        raise TypeError(f"the design says nothing about {missing[0]}; it is a dict with {names}")
    return {name: design[name] for name in names.split(", ")}


def peak_of(case: dict, **design: Any) -> int:
    """Bytes that torch reserves at the peak of a step, by the library's formula."""
    return reserved(case["model"]["name"], case["gpu"]["name"], case["job"]["seq"], *(design[name] for name in FIELDS))


@functools.lru_cache(maxsize=20_000)
def reserved(model: str, gpu: str, seq: int, dtype: str, quantize: bool, checkpointing: bool, batch: int,
             accumulate: int, r: int) -> int:
    from pefttools.vram import estimate

    return estimate(model, "qlora" if quantize else "lora", batch, seq, r=r, targets="all-linear", dtype=dtype,
                    checkpointing=checkpointing, accumulate=accumulate, gpu=gpu).reserved


def cards(case: dict, **design: Any) -> float:
    return peak_of(case, **design) / case["gpu"]["free"]


def design_reading(design: Any, case: dict) -> dict[str, Any]:
    """What a design does: nothing of it is taken from the student's process but the six settings."""
    if type(design) is not dict:
        raise ValueError("a design is a dict of settings")
    for name, kind in FIELDS.items():
        value = design.get(name)
        if type(value) is not kind or (kind is int and not 0 < value <= 2**20):
            raise ValueError(f"{name} is {value!r:.60}; it must be " + {
                str: '"bfloat16" or "float16"', bool: "True or False", int: "a whole number of at least 1"}[kind])
    if design["dtype"] not in ("bfloat16", "float16"):
        raise ValueError(f'dtype is {design["dtype"]!r:.60}; it must be "bfloat16" or "float16"')
    job, free = case["job"], case["gpu"]["free"]
    filled = cards(case, **design)
    waste = []
    for saving in SAVINGS:
        if design[saving] and cards(case, **{**design, saving: False}) * ROOM <= 1:
            waste.append({"quantize": "4 bits", "checkpointing": "checkpointing"}[saving])
    doubled = {**design, "batch": 2 * design["batch"], "accumulate": max(1, design["accumulate"] // 2)}
    if design["accumulate"] > 1 and design["accumulate"] % 2 == 0 and cards(case, **doubled) * ROOM <= 1:
        waste.append("a small batch")
    adapters = job["tasks"] * design["r"] * case["model"]["lora"] * 2
    return {"examples in one optimizer step": design["batch"] * design["accumulate"],
            "this GPU computes in the dtype": design["dtype"] == "float16" or case["gpu"]["bfloat16"],
            "rank is at least the one asked for": design["r"] >= job["rank"],
            "all adapters fit into the storage": adapters <= job["storage"],
            "cards that the peak would fill": max(1, math.ceil(filled)),
            "pays for savings it does not need": " and ".join(waste) or "no"}


def choose(model: dict, gpu: dict, job: dict, peak: Callable[..., float], order: Iterable[tuple[bool, bool]],
           margin: float = 1.1, **fixed: Any) -> dict:
    """The first (quantize, checkpointing) of `order`, and the largest batch with it, whose peak fits."""
    design = {"dtype": "bfloat16" if gpu["bfloat16"] else "float16", "r": job["rank"]} | fixed
    for quantize, checkpointing in order:
        batch = job["examples"]
        while batch >= 1:
            tried = {**design, "quantize": quantize, "checkpointing": checkpointing, "batch": batch,
                     "accumulate": job["examples"] // batch}
            if peak(model, job, tried) * margin <= gpu["free"]:
                return tried
            batch //= 2
    return tried


PLAIN_FIRST = [(False, False), (False, True), (True, False), (True, True)]


def terms_of(model: dict, job: dict, design: dict) -> dict[str, float]:
    """The chapter's own formula: the terms at their moments."""
    tokens = design["batch"] * job["seq"]
    kind = "nf4-dq" if design["quantize"] else "bfloat16"
    kept = activation_reference(model["layer"], model["layers"], tokens, "lora", design["checkpointing"])
    again = activation_reference(model["layer"], 1, tokens, "lora", False) if design["checkpointing"] else 0
    return {"weights": weight_reference(model["linear"], model["other"], kind),
            "trained": 16 * design["r"] * model["lora"], "kept": kept, "again": again,
            "logits": logits_reference(model["vocab"], tokens, 2, True)}


def summed(*names: str) -> Callable[..., float]:
    """A peak from some of the terms (the larger of logits and the layer that runs again, where both are there)."""
    def peak(model, job, design):
        terms = terms_of(model, job, design)
        late = max(terms[name] if name in names else 0 for name in ("logits", "again"))
        return late + sum(terms[name] for name in names if name not in ("logits", "again"))
    return peak


EVERYTHING = summed("weights", "trained", "kept", "again", "logits")


def by_the_formula(model, job, design):
    return peak_of({"model": model, "job": job, "gpu": {"name": design["card"]}}, **{
        name: design[name] for name in FIELDS})


def design_reference(model, gpu, job):
    found = choose(model, gpu, job, by_the_formula, PLAIN_FIRST, margin=1.02, card=gpu["name"])
    return {name: found[name] for name in FIELDS}


def design_in_closed_form(model, gpu, job):
    return choose(model, gpu, job, EVERYTHING, PLAIN_FIRST)


def design_quantize_before_checkpointing(model, gpu, job):
    room = job["storage"] / (job["tasks"] * model["lora"] * 2)
    return choose(model, gpu, job, EVERYTHING, [(False, False), (True, False), (False, True), (True, True)],
                  r=min(int(room), job["rank"] + 3))


def design_all_combinations(model, gpu, job):
    """The fewest savings, and of those the largest batch."""
    fitting = []
    for quantize, checkpointing in PLAIN_FIRST:
        for batch in (2**i for i in range(7) if job["examples"] % 2**i == 0):
            design = {"dtype": "float16", "quantize": quantize, "checkpointing": checkpointing, "batch": batch,
                      "accumulate": job["examples"] // batch, "r": job["rank"]}
            if EVERYTHING(model, job, design) * 1.1 <= gpu["free"]:
                fitting.append((quantize + checkpointing, -batch, len(fitting), design))
    return min(fitting)[-1]


def altered(**changes: Any) -> Callable:
    """A right design, with some settings from functions of (design, gpu, job)."""
    def work(model, gpu, job):
        design = design_reference(model, gpu, job)
        return design | {name: rule(design, gpu, job) for name, rule in changes.items()}
    return work


def planned_with(*names: str) -> Callable:
    def work(model, gpu, job):
        return choose(model, gpu, job, summed(*names), PLAIN_FIRST)
    return work


def thriftiest(model, gpu, job):
    return choose(model, gpu, job, lambda *given: 0, [(True, True)]) | {"batch": 1, "accumulate": job["examples"]}


def always_checkpointing(model, gpu, job):
    return choose(model, gpu, job, by_the_formula, [(False, True), (True, True)], margin=1.02, card=gpu["name"])


def always_four_bits(model, gpu, job):
    return choose(model, gpu, job, by_the_formula, [(True, False), (True, True)], margin=1.02, card=gpu["name"])


def nothing_saved(model, gpu, job):
    return choose(model, gpu, job, lambda *given: 0, [(False, False)])


def one_row_at_a_time(model, gpu, job):
    return design_reference(model, gpu, {**job, "examples": 1}) | {"accumulate": job["examples"]}


DESIGN = Exercise(
    name="design-configuration", chapter=CHAPTER, title="Design a configuration", points=6, minutes=30, difficulty=3,
    inputs=design_inputs, probe=design_probe, reading=design_reading, reference=design_reference,
    mistakes={
        "the thriftiest everywhere": (thriftiest,
            "This is the thriftiest configuration whatever the card: 4 bits, checkpointing, one row at a time. It "
            "fits, "
            "and it is also the slowest: on a large card you pay for savings that nobody needed. Try them in order of "
            "their price, and take the first configuration that fits."),
        "nothing saved": (nothing_saved,
            "All rows at once, 16 bits, no checkpointing: you have not asked whether it fits. Add up the terms for "
            "each "
            "choice before you take it."),
        "weights alone": (planned_with("weights"),
            "You plan for the weights alone. What the layers keep, the logits and the optimizer's state have to fit "
            "beside them."),
        "logits forgotten": (planned_with("weights", "trained", "kept", "again"),
            "Too much for the card in those very cases in which a sum without the logits, or without a margin, would "
            "have said that it fits. Are both in yours? With 128,256 words the logits are 14 bytes · 128,256 = 1.8 MB "
            "for each token, as much as many layers keep; and 10 % are for what the four functions leave out."),
        "activations forgotten": (planned_with("weights", "trained", "logits"),
            "Your sum has nothing of what the layers keep for the backward pass. Without checkpointing that is usually "
            "the largest term after the weights."),
        "accumulation forgotten": (altered(accumulate=lambda design, gpu, job: 1),
            "The optimizer's step would not see the examples asked for: batch · accumulate must be `examples`. A "
            "smaller "
            "batch is made up for by more passes."),
        "accumulation as the whole": (altered(accumulate=lambda design, gpu, job: job["examples"]),
            "accumulate is the number of *passes*, not of examples: batch · accumulate must be `examples`."),
        "bfloat16 everywhere": (altered(dtype=lambda design, gpu, job: "bfloat16"),
            "A T4 has no bfloat16 (its tensor cores know float16 only). Look at gpu[\"bfloat16\"]."),
        "rank as large as can be": (altered(r=lambda design, gpu, job: 64),
            "Rank 64, and the adapters of all tasks no longer fit into the storage: an adapter has r · lora numbers "
            "of 2 "
            "bytes, and there are as many as tasks."),
        "the smallest rank": (altered(r=lambda design, gpu, job: 4),
            "Rank 4 is below what was asked for: take at least job[\"rank\"], and save elsewhere."),
        "always checkpointing": (always_checkpointing,
            "You checkpoint even where everything would fit without it, with a quarter of the card to spare. It costs "
            "about a third more time in every step: switch it on when it is needed."),
        "always four bits": (always_four_bits,
            "You quantize even where the model fits in 16 bits, with a quarter of the card to spare. Codes have to be "
            "turned into numbers in every pass, and they are a little wrong: quantize when you have to."),
        "one row at a time": (one_row_at_a_time,
            "Everything as it should be, but one row at a time where more would fit, with a quarter of the card to "
            "spare. "
            "A GPU is slow on small batches: take the largest that fits."),
    },
    alternatives={"in closed form": design_in_closed_form,
                  "4 bits before checkpointing": design_quantize_before_checkpointing,
                  "all combinations": design_all_combinations},
    accepts="function", hides=HIDES)


# ------------------------------------------------------------------------------------------------ questions

QUESTIONS: list[Question] = [
    Question(
        name="vram-q-lora-more", chapter=CHAPTER, points=1,
        text="Somebody reports (peft, issue 1514) that a small model takes *more* memory with LoRA than with full "
             "fine-tuning. They train with long rows and a large batch. What is going on?",
        right="b",
        options={
            "a": ("A mistake in the measurement: LoRA trains less than 1 % of the parameters, so it must take less.",
                  "LoRA saves gradients and optimizer state, and those depend on the number of *parameters*. With a "
                  "small "
                  "model and many tokens they are not what fills the card."),
            "b": ("What the layers keep grows with tokens, not with parameters, and PEFT keeps a float32 copy of each "
                  "adapted layer's input besides.",
                  "Yes. With a small model and many tokens the activations rule, and each adapted layer adds to them."),
            "c": ("The base model is there twice: once frozen and once adapted.",
                  "The frozen weights are there once; A and B are small and stand beside them."),
            "d": ("A and B are larger than the matrices they replace.",
                  "They are much smaller, and they replace nothing: the frozen matrix stays."),
        }),
    Question(
        name="vram-q-units", chapter=CHAPTER, points=1,
        text="A table says that a run peaked at 15.5 GB. torch says that your T4 has 14.56 GiB. Could it fit, CUDA's "
             "context aside?",
        right="c",
        options={
            "a": ("No: 15.5 is more than 14.56.",
                  "Two different units. 14.56 GiB are 14.56 · 2³⁰ = 15.63 · 10⁹ bytes."),
            "b": ("Yes: a T4 has 16 GB.",
                  "16 GB is what the box says; torch can use what it reports, and that is 14.56 GiB."),
            "c": ("Just: 14.56 GiB are 15.63 GB. With the context it does not.",
                  "Yes. 0.13 GB are left, and a CUDA context alone takes more."),
            "d": ("That cannot be said without knowing the model.",
                  "The peak is given; nothing else about the model matters for this question."),
        }),
    Question(
        name="vram-q-accumulate", chapter=CHAPTER, points=1,
        text="You want 32 rows in each optimizer step and only 2 fit. What does gradient accumulation over 16 passes "
             "cost in memory, compared with training on 2 rows a step?",
        right="a",
        options={
            "a": ("Next to nothing: the gradients, which one pass makes anyway, stay until the step.",
                  "Yes. Activations and logits are those of 2 rows. Only, the gradients now exist during the forward "
                  "passes too, which matters if the peak was there and much is trained."),
            "b": ("16 times the gradients: one set for each pass.",
                  "backward() *adds* to the gradients that are there. There is one set."),
            "c": ("16 times the activations: they are needed until the optimizer steps.",
                  "They are needed until the backward pass of their own forward pass, and gone before the next "
                  "begins."),
            "d": ("As much as 32 rows at once, only more slowly.",
                  "Then nobody would do it. The rows are never there at the same time."),
        }),
    Question(
        name="vram-q-checkpointed", chapter=CHAPTER, points=1,
        text="Llama-3.2-1B, QLoRA with checkpointing, 4 rows of 4096 tokens: out of memory, and the traceback ends in "
             "the loss. What helps most?",
        right="d",
        options={
            "a": ("A smaller rank.",
                  "A and B with gradients and moments are 180 MB at r = 16, and do not depend on the tokens."),
            "b": ("An 8-bit optimizer.",
                  "It shrinks the moments of the adapters: some tens of MB here, at usual ranks."),
            "c": ("Double quantization, if it is not on.",
                  "0.373 bits for each weight: 45 MB for this model."),
            "d": ("Fewer tokens in a pass: 2 rows and twice the accumulation, or a loss that is computed in pieces.",
                  "Yes. The logits and their gradients are 14 bytes · 128,256 words for every token: 29 GB for these. "
                  "Nothing else comes near."),
        }),
    Question(
        name="vram-q-dequantize", chapter=CHAPTER, points=1,
        text="Source 001 says of a 70B model in NF4 that running it takes about 140 GB for the weights turned back "
             "into 16 bits, “hidden from memory accounting”. How much is it?",
        right="b",
        options={
            "a": ("140 GB, but in the host's memory.",
                  "Nothing moves to the host: each layer turns its own codes into numbers on the GPU, uses them and "
                  "lets "
                  "them go."),
            "b": ("As much as the largest single matrix in 16 bits: 0.47 GB.",
                  "Yes: 8192 · 28672 numbers of 2 bytes. One matrix at a time, and any counter of memory sees it."),
            "c": ("Nothing: the multiplication works on the codes.",
                  "Special kernels can do that for a single token. In training the matrix is unpacked first."),
            "d": ("140 GB, for a very short moment.",
                  "A GPU of 80 GB would not survive a short moment either. The layers run one after the other."),
        }),
    Question(
        name="vram-q-tasks", chapter=CHAPTER, points=1,
        text="One GPU of 24 GB is to answer for 20 tasks, each fine-tuned from the same 7B model, switching from "
             "request to request. Which way?",
        right="c",
        options={
            "a": ("Twenty merged models in memory: merged models have no latency.",
                  "Twenty times 13.5 GB. One of them would fit."),
            "b": ("Twenty merged models on disk, loading one for each request.",
                  "13.5 GB from disk for every switch: seconds to a minute for each request."),
            "c": ("One base, and twenty adapters beside it, not merged.",
                  "Yes: 13.5 GB and 20 times some tens of MB. A switch moves nothing; the price is a small product per "
                  "layer and token."),
            "d": ("One adapter trained on the data of all twenty tasks, merged.",
                  "That answers another question: it is one model for everything, and every change of one task trains "
                  "all "
                  "anew."),
        }),
]

EXERCISES: list[Exercise] = [WEIGHT_BYTES, OPTIMIZER_BYTES, ACTIVATION_BYTES, LOGITS_BYTES, FITS, DESIGN]
