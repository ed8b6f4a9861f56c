"""Chapter 05: its exercises against the library and bitsandbytes, the runs made ahead, the figures of its prose, its pictures."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import ch05_qlora as chapter
from pefttools.lab import qlora_runs as ahead
from pefttools.lora import LoRAConfig, LoRALinear
from pefttools.nf4 import quantize_nf4
from pefttools.qlora import NF4Linear, nf4_linear, quantize_model
from pefttools.widgets import qlora as pictures

SOURCE = (Path(__file__).parents[2] / "solutions" / "05_qlora.py").read_text(encoding="utf-8")
BY_NAME = {exercise.name: exercise for exercise in chapter.EXERCISES}


def fails_as(name, work, mistake):
    verdict = verdict_on(BY_NAME[name], work, 4)
    assert not verdict.passed and verdict.mistake == mistake, verdict.text


def test_exercises_and_questions_have_what_the_standard_asks():
    assert set(BY_NAME) == {"qlora-forward", "what-stays", "qlora-backward", "compute-dtype", "qlora-layer", "quantize-model",
                            "merge-dequantized"}
    for exercise in chapter.EXERCISES:
        assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert chapter.EXERCISES[0].minutes <= 5 and chapter.EXERCISES[0].difficulty == 1
    assert 4 <= len(chapter.QUESTIONS) <= 6
    assert len({question.right for question in chapter.QUESTIONS}) >= 3, "the right letter must not be guessable"


# ------------------------------------------------------------------------------------------------ as readers wrote it

def swap(model, name, new):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def by_recursion(model, make, keep):
    model.requires_grad_(False)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    for name, child in model.named_children():
        if not isinstance(child, nn.Linear):
            by_recursion(child, make, keep)
        elif name not in keep and not any(child.weight is table for table in tables):
            setattr(model, name, make(child))


def with_in(model, make, keep):
    model.requires_grad_(False)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    for name, m in list(model.named_modules()):
        kept = any(name == k or name.endswith("." + k) for k in keep)
        if isinstance(m, nn.Linear) and not kept and m.weight not in tables:
            swap(model, name, make(m))


def only_what_is_kept(model, make, keep):
    model.requires_grad_(False)
    for name, m in list(model.named_modules()):
        if isinstance(m, nn.Linear) and any(name == k or name.endswith("." + k) for k in keep):
            swap(model, name, make(m))


def a_loop_variable(model, make, keep):
    model.requires_grad_(False)
    for _, m in model.named_modules():
        if isinstance(m, nn.Linear):
            m = make(m)  # noqa: PLW2901


def in_place(q, A, B, alpha, dtype):
    W = q.dequantize(dtype=dtype)
    W += alpha / A.shape[0] * (B @ A)
    return W


ATTEMPTS = [
    ("quantize-model", by_recursion, "its own name only"),
    ("quantize-model", with_in, "tied by `in` or =="),
    ("quantize-model", only_what_is_kept, "inverted"),
    ("quantize-model", a_loop_variable, "nothing done"),
    ("quantize-model", lambda model, make, keep: quantize_model(model, skip=keep), "the library's"),
    ("merge-dequantized", in_place, "weight rounded before"),
    ("merge-dequantized", lambda q, A, B, a, dtype: q.dequantize(dtype=dtype) + a / len(A) * B @ A,
     "weight rounded, result not"),
    ("merge-dequantized", lambda q, A, B, a, dtype: (q + a / len(A) * B @ A).to(dtype), "into q"),
    ("merge-dequantized",
     lambda q, A, B, a, dtype: quantize_nf4(q.dequantize() + a / len(A) * B @ A).dequantize().to(dtype),
     "quantized anew"),
]


@pytest.mark.parametrize(("name", "work", "mistake"), ATTEMPTS, ids=[mistake for _, _, mistake in ATTEMPTS])
def test_an_attempt_gets_the_message_of_its_mistake(name, work, mistake):
    """Written otherwise than the mistake itself is."""
    fails_as(name, work, mistake)


# ------------------------------------------------------------------------------------------------ the library as the student

def real_layer(d_in=64, d_out=32, r=4, alpha=8.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(d_in, d_out, bias=False)
    base.weight.data = torch.randn(d_out, d_in, generator=generator)
    layer = LoRALinear(NF4Linear(base), r, alpha, generator=generator)
    layer.lora_B["default"].weight.data = torch.randn(d_out, r, generator=generator)
    return layer, torch.randn(3, 5, d_in, generator=generator)


def test_references_agree_with_the_library_on_real_nf4():
    layer, x = real_layer()
    q, A, B = layer.base_layer.quantized, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = x.requires_grad_()
    y = layer(x)
    assert torch.allclose(chapter.QLORA_FORWARD.reference(x, q, A, B, 8.0), y, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, A, B), g)
    with torch.no_grad():
        for ours, theirs in zip(chapter.QLORA_BACKWARD.reference(g, x, q, A, B, 8.0), found):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(chapter.MERGE_DEQUANTIZED.reference(q, A, B, 8.0, torch.bfloat16),
                           (layer.base_layer.dequantize(torch.float32) + layer.delta()).bfloat16())


def test_compute_dtype_is_the_librarys():
    layer, x = real_layer()
    layer.base_layer.compute_dtype = torch.bfloat16
    with torch.no_grad():
        ours = chapter.COMPUTE_DTYPE.reference(x, layer.base_layer.quantized, layer.lora_A["default"].weight,
                                               layer.lora_B["default"].weight, 8.0, torch.bfloat16)
        assert torch.allclose(ours, layer(x), rtol=1e-4, atol=1e-4)


def test_the_librarys_product_keeps_nothing_and_plain_linear_is_found_out():
    assert verdict_on(BY_NAME["qlora-layer"], chapter.Layer, 9).passed
    fails_as("qlora-layer", chapter.layer_like(frozen=lambda self, x: torch.einsum("oi,...i->...o", self.q.dequantize(), x)),
             "autograd keeps W")
    q = quantize_nf4(torch.randn(32, 64))
    x = torch.randn(3, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        nf4_linear(x, q)
    assert 32 * 64 not in kept


@pytest.mark.parametrize("tied", [True, False])
def test_what_stays_is_what_the_librarys_tensors_take(tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    kinds = {nn.Linear: "linear", nn.Embedding: "embedding"}
    parts = [(name, kinds.get(type(m), "norm"), m.weight.numel()) for name, m in model.named_modules()
             if isinstance(getattr(m, "weight", None), nn.Parameter)]
    expected = chapter.WHAT_STAYS.reference(parts, tied)
    quantize_model(model)
    four = {id(m.weight): m.quantized.nbytes for m in model.modules() if isinstance(m, NF4Linear)}
    assert len(four) == 14
    assert expected == sum(four.get(id(p), 2 * p.numel()) for p in model.parameters())


# ------------------------------------------------------------------------------------------------ cases

def test_rounded_cases_are_exact_before_the_rounding():
    """So that every order of summation gives the same number, and a right answer cannot fail by its last bit."""
    for seed in range(8):
        for case in chapter.MERGE_DEQUANTIZED.cases(seed):
            q, A, B, s = chapter.four_bit(case), case["A"], case["B"], case["alpha"] / len(case["A"])
            exact = q.dequantize().double() + s * B.double() @ A.double()
            assert torch.equal((q.dequantize() + s * B @ A).double(), exact)
        for case in chapter.COMPUTE_DTYPE.cases(seed):
            dtype, q = getattr(torch, case["dtype"]), chapter.four_bit(case)
            if dtype != torch.float32:
                product = case["x"].to(dtype).double() @ q.dequantize(dtype).double().T
                assert torch.equal(product, product.float().double())
                assert not torch.equal(case["x"], case["x"].to(dtype).float())


def test_layer_shapes_tell_a_weight_from_all_else():
    for case in chapter.QLORA_LAYER.cases(3):
        n = case["codes"].numel()
        assert n not in (case["x"].numel(), case["A"].numel(), case["B"].numel(), case["x"].shape[:-1].numel() * case["r"],
                         case["x"].shape[:-1].numel() * case["codes"].shape[0])


# ------------------------------------------------------------------------------------------------ runs made ahead

def test_runs_made_ahead_are_there_for_several_seeds():
    found = ahead.results()
    assert len(found) >= 2 and all(set(runs) == set(ahead.RATES) for runs in found.values())
    table, shipped = ahead.table(), ahead.shipped()
    assert {len(v["loss"]) for v in table.values()} == {len(found)} == {len(v["pass"]) for v in shipped.values()}
    assert shipped["kept apart"]["logits"] == [0.0] * len(found)
    assert table["QLoRA"]["loss"] == shipped["kept apart"]["loss"]


def test_prose_about_merging_is_what_was_measured():
    """“Into the dequantized weights hardly anything changes; … the original 16-bit weights are no refuge.”"""
    shipped = ahead.shipped()
    for i in range(len(ahead.results())):
        logits = {way: v["logits"][i] for way, v in shipped.items()}
        loss = {way: v["loss"][i] - shipped["kept apart"]["loss"][i] for way, v in shipped.items()}
        assert logits["into dequantized 16 bits"] < 0.1 * min(logits["into 4 bits again"], logits["into the original 16 bits"])
        assert abs(loss["into dequantized 16 bits"]) < 0.001
        assert loss["into 4 bits again"] > 0.003 and loss["into the original 16 bits"] > 0.003


def test_into_4_bits_again_moves_further_than_quantizing_the_base_did():
    import copy

    from pefttools.lab import load_base, load_data

    model, tokenizer = load_base("tiny")
    rows = load_data("held_out").shuffle(seed=3).select(range(8))
    base = ahead.logits_of(model, tokenizer, rows)
    moved = (ahead.logits_of(quantize_model(copy.deepcopy(model)), tokenizer, rows) - base).norm() / base.norm()
    assert moved.item() < min(ahead.shipped()["into 4 bits again"]["logits"])


def test_ways_to_ship():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.one(x)

    from pefttools.inject import attach

    original = Two()
    import copy

    trained = attach(quantize_model(copy.deepcopy(original)), LoRAConfig(r=4, alpha=8, target_modules=["one"]), seed=0)
    nn.init.normal_(trained.one.lora_B["default"].weight, std=0.02)
    x = torch.randn(5, 64)
    y = trained(x)
    W, D = trained.one.base_layer.dequantize(), trained.one.delta()
    assert torch.equal(ahead.ship(trained, original, "kept apart")(x), y)
    merged = ahead.ship(trained, original, "into dequantized 16 bits").one
    assert type(merged) is nn.Linear and torch.equal(merged.weight, (W + D).bfloat16().float())
    assert torch.equal(ahead.ship(trained, original, "into the original 16 bits").one.weight, (original.one.weight + D).bfloat16().float())
    again = ahead.ship(trained, original, "into 4 bits again").one
    assert type(again) is NF4Linear and torch.equal(again.dequantize(), NF4Linear(merged_linear(W + D)).dequantize())


def merged_linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.detach().clone()
    return layer


# ------------------------------------------------------------------------------------------------ figures of the prose

def test_the_example_by_hand():
    W = 4 * torch.tensor([[1.0, 0], [-1, 0.5]])
    x, A, B = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5], [0.0]])
    assert W.tolist() == [[4, 0], [-4, 2]] and (W @ x).tolist() == [4, 0]
    assert (W @ x + 2 * B @ (A @ x)).tolist() == [7, 0] and "Together $(7, 0)$" in SOURCE
    g = torch.tensor([1.0, 1.0])
    assert (g @ W).tolist() == [0, 2] and (2 * (g @ B) @ A).tolist() == [1, 1] and r"together $(1, 3)$" in SOURCE


def test_answers_of_the_questions_hold():
    right = {question.name: question.right for question in chapter.QUESTIONS}
    assert 2 * 8192 * 28672 / 1e9 == pytest.approx(0.47, abs=0.005) and right["qlora-q-temporary"] == "d"
    shapes = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
    trained = 16 * sum(16 * (o + i) for o, i in shapes)
    assert trained == pytest.approx(11e6, rel=0.03) and 6 * trained == pytest.approx(70e6, rel=0.05)
    assert 7e9 == pytest.approx(6 * 1_235_814_400, rel=0.06)
    shipped = ahead.shipped()                                    # "more than ten times as far", "rose with every seed"
    assert min(shipped["into 4 bits again"]["logits"]) > 10 * max(shipped["into dequantized 16 bits"]["logits"])
    for way in ("into 4 bits again", "into the original 16 bits"):
        assert all(a > b for a, b in zip(shipped[way]["loss"], shipped["kept apart"]["loss"])), way
    table = 128_256 * 2048
    inside = 973_078_528
    assert table / 1_235_814_400 == pytest.approx(0.2, abs=0.02) and 2 * table / (2 * table + inside * 4.127 / 8) > 0.5


def test_no_source_is_quoted_that_is_not_there():
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    import inspect

    import peft.tuners.lora.bnb as peft_source

    text = inspect.getsource(functions.MatMul4Bit) + inspect.getsource(peft_source.Linear4bit.merge)
    table = SOURCE.split("| the code does | because |")[1].split("**Go and look**")[0]
    quotes = re.findall(r"^# \| `(.+?)` \|", table, re.MULTILINE)
    assert quotes
    for quoted in quotes:
        assert quoted.split("...")[0] in text, f"the chapter explains {quoted!r}"
    for quoted in re.findall(r'"(ctx\.tensors = .+?|grad_A = .+?|output = dequantize_bnb_weight\(|w_data = output.+?|bnb\.nn\.Params4bit\(w_data)"', SOURCE):
        assert quoted in text


# ------------------------------------------------------------------------------------------------ pictures

@pytest.mark.parametrize("double", [True, False])
def test_the_bytes_of_the_picture_are_those_of_the_tensors(double):
    for d_out, d_in, r in ((256, 512, 4), (128, 64, 16)):
        parts = pictures.layer_bytes(d_out, d_in, r, 64, double)["QLoRA"]
        q = quantize_nf4(torch.randn(d_out, d_in), double_quant=double)
        assert parts["4-bit codes"] + parts["scales"] == q.nbytes
        assert parts["A and B"] == 4 * r * (d_in + d_out) == parts["gradients"] and parts["Adam's moments"] == 2 * parts["A and B"]
    full = pictures.layer_bytes(64, 64)["full"]
    assert sum(full.values()) == 16 * 64 * 64


def test_moments_in_8_bits_are_what_bitsandbytes_keeps():
    pytest.importorskip("bitsandbytes")
    from pefttools.adamw import adamw

    layer = LoRALinear(nn.Linear(512, 128, bias=False).requires_grad_(False), 16, 16)
    optimizer = adamw(layer, lr=1e-3)
    layer(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    kept = sum(t.numel() * t.element_size() for state in optimizer.state.values() for key, t in state.items()
               if isinstance(t, torch.Tensor) and not key.startswith("qmap") and key != "step")
    assert kept == pictures.layer_bytes(128, 512, 16, adam_bits=8)["QLoRA"]["Adam's moments"]


def test_explorer_has_a_first_frame_without_a_front_end(capsys):
    figure = pictures.bytes_explorer()
    for values in ({}, {"width": 256, "r": 256, "block_size": 32, "double_quant": False, "adam_bits": 8}, {"block_size": 1024, "width": 8192}):
        frame = figure.frame(**values)
        assert "QLoRA" in frame["text/html"] and len(frame["image/png"]) > 5_000
    small = pictures.layer_bytes(256, 256, 64)["QLoRA"]
    assert small["A and B"] > small["4-bit codes"]                  # "at width 256 it happens early"


def test_figures_draw(tmp_path):
    two = {"loss": [0.1, 0.2], "pass": [0.5, 0.6], "logits": [0.0, 0.1]}
    figures = [pictures.roads_picture(), pictures.bytes_figure(), pictures.runs_figure({"full": two, "LoRA": two, "QLoRA": two}),
               pictures.shipped_figure({way: two for way in ahead.SHIPPED})]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 4_000
    assert math.isclose(ahead.spread([1.0, 3.0])[1], math.sqrt(2)) and ahead.spread([1.0]) == (1.0, 0.0)
