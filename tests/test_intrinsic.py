"""Intrinsic dimension: P is what it says, the gradient is Pᵀ∇θ, and a model goes in and comes out unchanged."""
from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from pefttools.inject import attach, count_parameters, detach, disabled, set_adapter, trainable
from pefttools.intrinsic import IntrinsicConfig, d90, dense_rows, hashed_rows, hashed_update
from pefttools.intrinsic_file import load_intrinsic, save_intrinsic

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bert", "t5")


def matrix(sizes, d, seed):
    """P [D, d], column by column."""
    rows, D = hashed_rows(sizes, d, seed), sum(sizes)
    basis = torch.eye(d, dtype=torch.float64)
    return torch.stack([torch.cat([hashed_update(e, row, D) for row in rows]) for e in basis], 1)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).to(dtype)


def model_and_inputs(family, small_model, small_inputs, dtype="float32", **options):
    inputs = small_inputs(family)
    return small_model(family, dtype, **options), {key: value.contiguous() for key, value in inputs.items()}


# ------------------------------------------------------------------------------------------------ P

@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_columns_are_orthonormal_and_balanced(sizes, d, seed):
    d = min(d, sum(sizes))
    P = matrix(sizes, d, seed)
    assert torch.allclose(P.T @ P, torch.eye(d, dtype=torch.float64), atol=1e-14)
    assert ((P != 0).sum(1) == 1).all()                                     # O(D): one entry in each row
    heard = (P != 0).sum(0)
    assert heard.max() - heard.min() <= 1 and heard.sum() == sum(sizes)
    dense = torch.cat(dense_rows(sizes, d, seed))
    assert torch.allclose(dense.T @ dense, torch.eye(d, dtype=torch.float64), atol=1e-13)


def test_worked_number_seed_signs_and_memory():
    P = matrix([4, 6], 3, 0)
    assert sorted(P.abs().max(0).values.tolist()) == pytest.approx([4 ** -0.5, 3 ** -0.5, 3 ** -0.5])
    assert torch.equal(P, matrix([4, 6], 3, 0)) and not torch.equal(P, matrix([4, 6], 3, 1))
    row, = hashed_rows([100_000], 1000, 0)
    assert row.dtype == torch.int32                                          # 4 bytes a parameter
    assert (row >= 1000).float().mean().item() == pytest.approx(0.5, abs=0.01)                        # random signs
    assert torch.unique((row % 1000).reshape(100, 1000)[0]).numel() < 700  # and random places
    half = hashed_update(torch.ones(1, dtype=torch.float16), torch.zeros(4, dtype=torch.int32), 10 ** 6)
    assert half[0].item() == pytest.approx(1e-3, rel=1e-3)                    # a count of 10⁶ does not fit into float16
    before = torch.get_rng_state()
    hashed_rows([9], 3, 0), dense_rows([9], 3, 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("projection", ["hashed", "dense"])
@pytest.mark.parametrize("said", [False, True])
def test_gradcheck_through_the_model(projection, said):
    model = network()
    attach(model, IntrinsicConfig(d=14, projection=projection, said=said, seed=3))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    parameters = trainable(model)
    assert sum(p.numel() for p in parameters.values()) == 14
    with torch.no_grad():
        for p in parameters.values():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(2)))

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(parameters, values)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_P_transposed_times_the_models(family, small_model, small_inputs):
    model, inputs = model_and_inputs(family, small_model, small_inputs, "float64")
    model(**inputs).loss.backward()
    unused = [torch.zeros_like(p) for p in model.parameters()]
    gradient = torch.cat([(p.grad if p.grad is not None else z).flatten() for p, z in zip(model.parameters(), unused)])
    expected = matrix([p.numel() for p in model.parameters()], 50, 7).T @ gradient

    attach(model, IntrinsicConfig(d=50, seed=7))
    model(**inputs).loss.backward()
    assert torch.allclose(model.intrinsic.vector.grad, expected, rtol=1e-9, atol=1e-12)


def test_theta_is_theta0_plus_P_d_with_scales_and_tied_weights(small_model):
    model = small_model("llama", tied=True)
    theta0, sizes = [p.detach().clone() for p in model.parameters()], [p.numel() for p in model.parameters()]
    m = len(sizes)
    attach(model, IntrinsicConfig(d=30 + m, said=True, seed=5))
    assert model.intrinsic.vector.shape == (30,) and model.intrinsic.scales.shape == (m,)
    with torch.no_grad():
        model.intrinsic.vector.normal_(generator=torch.Generator().manual_seed(0))
        model.intrinsic.scales.copy_(torch.arange(m) / 3)
    moved = matrix(sizes, 30, 5).float() @ model.intrinsic.vector
    expected = [t + s * u.view(t.shape) for t, u, s in zip(theta0, moved.split(sizes), model.intrinsic.scales)]
    assert torch.allclose(model.model.embed_tokens.weight, expected[0], atol=1e-6)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)       # still tied
    assert torch.allclose(model.model.norm.weight, expected[-1], atol=1e-6)
    assert torch.allclose(moved.norm(), model.intrinsic.vector.norm())              # ‖P d‖ = ‖d‖
    set_adapter(model, {"default": 0.5})
    assert torch.allclose(model.model.norm.weight - theta0[-1], (expected[-1] - theta0[-1]) / 2, atol=1e-6)


# ------------------------------------------------------------------------------------------------ in and out

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_and_out_leaves_the_model_as_it_was(family, dtype, small_model, small_inputs):
    model, inputs = model_and_inputs(family, small_model, small_inputs, dtype)
    model.get_input_embeddings().weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad():                # with gradients, torch multiplies along other ways: other last digits
        in_and_out(model, inputs)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)] == objects
    assert [type(module) for module in model.modules()] == kinds and not hasattr(model, "intrinsic")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def in_and_out(model, inputs):
    base, D = model(**inputs).logits, model.num_parameters()
    attach(model, IntrinsicConfig(d=37))
    assert count_parameters(model) == (37, D + 37) and list(trainable(model)) == ["intrinsic.vector"]
    assert model.intrinsic.vector.dtype == torch.float32
    assert torch.equal(model(**inputs).logits, base)                                # bit-identical at the start
    model.intrinsic.vector.normal_(std=3, generator=torch.Generator().manual_seed(0))
    moved = model(**inputs).logits
    assert moved.dtype == base.dtype and (moved - base).abs().max() > 0.01
    with disabled(model):
        assert torch.equal(model(**inputs).logits, base)
    assert torch.equal(model(**inputs).logits, moved)

    detach(model)
    assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_generate_uses_theta_everywhere(family, small_model, small_inputs):
    """T5's encoder is called by `generate` itself, past the model's own forward: θ must be there too."""
    model, inputs = model_and_inputs(family, small_model, small_inputs)
    attach(model, IntrinsicConfig(d=300))
    with torch.no_grad():
        model.intrinsic.vector.normal_(std=5, generator=torch.Generator().manual_seed(0))
    plain = small_model(family)  # the same model with θ written into it
    with torch.no_grad():
        for name, module in plain.named_modules():
            for key, p in module._parameters.items():
                if p is not None:
                    p.copy_(getattr(model.get_submodule(name), key))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    expected = plain.generate(**ids, **options)
    assert torch.equal(model.generate(**ids, **options), expected)
    with parametrize.cached():
        assert torch.equal(model.generate(**ids, **options), expected)
    assert not torch.equal(small_model(family).generate(**ids, **options), expected)


def test_deepcopy_is_a_model_of_its_own(small_model, small_inputs):
    model, inputs = model_and_inputs("llama", small_model, small_inputs)
    base = model(**inputs).logits
    attach(model, IntrinsicConfig(d=20))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.intrinsic.vector.fill_(1.0)
    assert torch.equal(model(**inputs).logits, base) and not torch.equal(twin(**inputs).logits, base)
    detach(model)
    assert not torch.equal(twin(**inputs).logits, base)  # detaching one leaves the other alone
    assert torch.equal(detach(twin)(**inputs).logits, base)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradient(reentrant, small_model, small_inputs):
    model, inputs = model_and_inputs("llama", small_model, small_inputs)
    attach(model, IntrinsicConfig(d=20))
    model.train()(**inputs).loss.backward()
    expected, model.intrinsic.vector.grad = model.intrinsic.vector.grad, None
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs).loss.backward()
    assert torch.allclose(model.intrinsic.vector.grad, expected, rtol=1e-5, atol=1e-7)


def test_modules_that_read_each_others_weights():
    """nn.MultiheadAttention reads out_proj.weight past out_proj's forward; an LSTM keeps a list of its weights."""
    torch.manual_seed(0)
    for module, call in ((nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda m, x: m(x)),
                         (nn.LSTM(8, 5), lambda m, x: m(x)[0])):
        module, x = module.eval(), torch.randn(2, 3, 8)
        plain = copy.deepcopy(module)
        base = call(module, x)
        attach(module, IntrinsicConfig(d=40))
        assert torch.equal(call(module, x), base)
        with torch.no_grad():
            module.intrinsic.vector.normal_()
            for name, target in plain.named_modules():
                for key, p in target._parameters.items():
                    p.copy_(getattr(module.get_submodule(name), key)) if p is not None else None
            assert torch.allclose(call(module, x), call(plain, x), atol=1e-6)
        call(module, x).sum().backward()
        assert module.intrinsic.vector.grad.norm() > 0
        assert torch.equal(call(detach(module), x), base)


def test_quantized_weights_stay(small_model):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    attach(model, IntrinsicConfig(d=12))                                            # bias 4, norm 4 + 4
    assert model.intrinsic.D == 12 and not parametrize.is_parametrized(model[0], "weight")
    assert model[0].weight is dict(detach(model)[0].named_parameters())["weight"]


# ------------------------------------------------------------------------------------------------ training

def test_thirty_steps_lower_the_loss_and_fewer_dimensions_lower_it_less(small_model, small_inputs):
    def train(d, said=False):
        model, inputs = model_and_inputs("llama", small_model, small_inputs)
        attach(model, IntrinsicConfig(d=d, said=said, seed=1))
        optimizer = torch.optim.Adam(trainable(model).values(), lr=0.3)
        losses = []
        for _ in range(31):
            loss = model(**inputs).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses[0] - losses[-1]

    gains = {d: train(d) for d in (5, 50, 200, 2000)}
    assert gains[200] > 0.5 and 0 < gains[5] < gains[50] < gains[200] < gains[2000]
    assert train(200, said=True) > 0.3


def test_d90():
    table = {10: 0.2, 100: 0.71, 200: 0.72, 1000: 0.79}
    assert d90(table, full=0.8) == 200 and d90(list(table.items()), full=0.8) == 200
    assert d90(table, full=0.9) is None and d90(table, 0.8, share=0.95) == 1000
    assert d90(table, full=0.8, baseline=0.5) == 1000                               # 90 % of the way up from 0.5
    assert d90({10: 2.9, 50: 2.1, 90: 2.0}, full=2.0, baseline=3.0) == 50           # a loss falls
    assert d90([(10, 1.0), (10, 0.0), (20, 0.9)], full=1.0) == 20                   # seeds are averaged: 10 reaches 0.5
    for bad in (({}, 1.0, 0.0), ({1: 1.0}, 2.0, 2.0)):
        with pytest.raises(ValueError, match="d90"):
            d90(*bad)


# ------------------------------------------------------------------------------------------------ the file

@pytest.mark.parametrize("projection, said, d", [("hashed", False, 60), ("hashed", True, 80), ("dense", False, 10)])
def test_save_and_load(projection, said, d, small_model, small_inputs, tmp_path):
    model, inputs = model_and_inputs("qwen2", small_model, small_inputs)
    attach(model, IntrinsicConfig(d=d, projection=projection, said=said, seed=9))
    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_(std=2, generator=torch.Generator().manual_seed(0))
    save_intrinsic(model, tmp_path / "it.safetensors")
    fresh = load_intrinsic(small_model("qwen2"), tmp_path / "it.safetensors")
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)
    assert count_parameters(fresh)[0] == d and fresh.intrinsic.config == model.intrinsic.config
    shapes = model.intrinsic.config.shapes(small_model("qwen2"))
    assert {key: tuple(p.shape) for key, p in trainable(fresh).items()} == shapes

    from safetensors import safe_open
    with safe_open(tmp_path / "it.safetensors", "pt") as opened:
        assert opened.get_tensor("intrinsic.vector").numel() == len(model.intrinsic.vector)
        shapes = json.loads(opened.metadata()["shapes"])
    assert list(shapes.items()) == [(key, list(p.shape)) for key, p in detach(model).named_parameters()]


def test_a_file_that_does_not_fit(small_model, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    file, other = tmp_path / "it.safetensors", tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match="no intrinsic subspace"):
        save_intrinsic(small_model("llama"), file)
    save_intrinsic(attach(small_model("llama"), IntrinsicConfig(d=9)), file)
    model = small_model("llama", hidden=16)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[61, 16\] here and was \[61, 32\]"):
        load_intrinsic(model, file)
    assert not hasattr(model, "intrinsic")
    save_file(load_file(file), other)
    with pytest.raises(ValueError, match="not written by save_intrinsic"):
        load_intrinsic(small_model("llama"), other)
    with pytest.raises(FileNotFoundError):
        load_intrinsic(small_model("llama"), tmp_path / "none.safetensors")

    import pefttools.intrinsic as module
    drawn = module.hashed_rows
    monkeypatch.setattr(module, "hashed_rows", lambda sizes, d, seed: drawn(sizes, d, seed + 1))
    model = small_model("llama")
    with pytest.raises(ValueError, match="draws other random numbers"):
        load_intrinsic(model, file)
    assert not hasattr(model, "intrinsic") and all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------------ refused

@pytest.mark.parametrize("settings, words", [
    ({"d": 0}, "d must be"), ({"d": 2.5}, "got 2.5"), ({"d": True}, "got True"),
    ({"projection": "fastfood"}, "'hashed' or 'dense'"),
])
def test_refuses_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        IntrinsicConfig(**settings)


def test_refuses_and_leaves_the_model_alone():
    model = network()
    D = sum(p.numel() for p in model.parameters())
    for config, words in ((IntrinsicConfig(d=D + 1), f"from 1 to {D}"),
                          (IntrinsicConfig(d=6, said=True), "6 of the d are the scales")):
        with pytest.raises(ValueError, match=words):
            attach(model, config)
    with pytest.raises(ValueError, match="from 1 to 0"):
        attach(nn.ReLU(), IntrinsicConfig())
    with pytest.raises(ValueError, match="projection='hashed', which stores 4,006,002"):
        attach(nn.Linear(2000, 2002), IntrinsicConfig(d=100, projection="dense"))
    assert all(p.requires_grad for p in model.parameters()) and not parametrize.is_parametrized(model[0])
    attach(model, IntrinsicConfig(d=D))                                             # all D dimensions are allowed
    with pytest.raises(ValueError, match="one intrinsic subspace at a time"):
        attach(model, IntrinsicConfig(d=3), name="second")
    assert model.intrinsic.names == ["default"] and trainable(model).keys() == {"intrinsic.vector"}
    from pefttools.inject import merge
    with pytest.raises(TypeError, match="not merged"):
        merge(model)
    with pytest.raises(TypeError, match="save_intrinsic"):
        model.intrinsic.config.to_peft()
    detach(model)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="parametrized weights already"):
        attach(model, IntrinsicConfig(d=3))
