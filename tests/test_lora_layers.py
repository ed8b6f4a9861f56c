"""LoRA on embeddings and on GPT-2's Conv1D: against peft, layer by layer and in whole models."""
from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pefttools.attached import adapter_parameters, count_parameters
from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.inject import attach, detach, disabled, merge, set_adapter, unmerge
from pefttools.lora import LoRAConfig, LoRALinear
from pefttools.lora_layers import LoRAEmbedding, lora_embedding_forward

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def pair(base, r, alpha, **options):
    """(ours, peft's) around equal bases, with equal random A and B."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.tuners.tuners_utils import cast_adapter_dtype

    embedding = isinstance(base, nn.Embedding)
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=options.get("dropout", 0.0),
                        use_rslora=options.get("rslora", False), fan_in_fan_out=not embedding)
    twin = copy.deepcopy(base).requires_grad_(False)
    theirs = (Embedding if embedding else Linear)(twin, "default", config=config, r=r, lora_alpha=alpha)
    cast_adapter_dtype(theirs, "default")
    ours = LoRAConfig(r, alpha, **options).build(base)
    with torch.no_grad():
        for mine, other in zip(ours.adapter_parameters().values(), adapters_of(theirs)):
            other.copy_(mine.normal_(std=0.3))
    return ours, theirs


def adapters_of(layer):
    return [p for name, p in layer.named_parameters() if "lora_" in name]


def conv1d(d_in, d_out, dtype=torch.float32, seed=0):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    layer = Conv1D(d_out, d_in).to(dtype)
    layer.bias.data.normal_()
    return layer


def embedding(num, d, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return nn.Embedding(num, d, **options).to(dtype)


def gradients(layer, x, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    inputs = adapters_of(layer) + ([x] if x.requires_grad else [])
    return y.detach(), torch.autograd.grad((y * weights).sum(), inputs)


def assert_close(got, expected):
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


# ------------------------------------------------------------------------------------------------ Conv1D

@settings(max_examples=30, deadline=None)
@given(d_in=st.integers(1, 40), d_out=st.integers(1, 40), data=st.data(),
       batch=st.lists(st.integers(0, 4), min_size=1, max_size=2), rslora=st.booleans())
def test_conv1d_equals_pefts_for_any_shape(d_in, d_out, data, batch, rslora):
    r = data.draw(st.integers(1, min(d_in, d_out)))
    ours, theirs = pair(conv1d(d_in, d_out), r, data.draw(st.sampled_from([1, 3, 8, 16])), rslora=rslora)
    x = torch.randn(*batch, d_in, requires_grad=True)
    (y, got), (expected_y, expected) = gradients(ours, x), gradients(theirs, x)
    assert torch.equal(y, expected_y)
    if x.numel():
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_conv1d_dtypes_and_merge(dtype):
    ours, theirs = pair(conv1d(24, 40, dtype), 4, 12)
    x = torch.randn(5, 24, dtype=dtype)
    assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == dtype
    original = ours.base_layer.weight.detach().clone()
    ours.merge()
    theirs.merge()
    assert torch.equal(ours.base_layer.weight, theirs.get_base_layer().weight)
    assert ours.base_layer.weight.shape == (24, 40)
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, original)
    assert ours.delta().shape == (40, 24)


def test_conv1d_gradcheck():
    layer = LoRALinear(conv1d(5, 4).double(), 2, 3.0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    values = [torch.randn_like(p).requires_grad_(True) for p in layer.adapter_parameters().values()]
    keys = list(layer.adapter_parameters())

    def run(x, *v):
        return torch.func.functional_call(layer, dict(zip(keys, v)), x)

    assert torch.autograd.gradcheck(run, (x, *values))


# ------------------------------------------------------------------------------------------------ embedding

@settings(max_examples=30, deadline=None)
@given(num=st.integers(1, 30), d=st.integers(1, 20), data=st.data(), alpha=st.sampled_from([1, 3, 16]),
       batch=st.lists(st.integers(0, 4), min_size=1, max_size=2), rslora=st.booleans())
def test_embedding_equals_pefts_for_any_shape(num, d, data, alpha, batch, rslora):
    r = data.draw(st.integers(1, min(num, d)))
    ours, theirs = pair(embedding(num, d), r, alpha, rslora=rslora)
    ids = torch.randint(num, batch)
    (y, got), (expected_y, expected) = gradients(ours, ids), gradients(theirs, ids)
    assert torch.equal(y, expected_y)
    assert_close(got, expected)
    A, B = adapters_of(ours)
    assert torch.equal(lora_embedding_forward(ids, ours.base_layer.weight, A, B, ours.scaling["default"]), y)
    one_hot = nn.functional.one_hot(ids, num).float()
    torch.testing.assert_close(y, one_hot @ (ours.base_layer.weight + ours.delta()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_embedding_dtypes_and_merge(dtype):
    ours, theirs = pair(embedding(30, 16, dtype), 4, 12)
    ids = torch.arange(30).reshape(3, 10)
    assert torch.equal(ours(ids), theirs(ids)) and ours(ids).dtype == dtype
    assert adapters_of(ours)[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    original = ours.base_layer.weight.detach().clone()
    ours.merge()
    theirs.merge()
    # peft rounds ΔE before the sum as well, so that in 16 bits it may be one rounding away
    torch.testing.assert_close(ours.base_layer.weight, theirs.get_base_layer().weight,
                               rtol={2: 8e-3, 4: 0, 8: 0}[dtype.itemsize], atol={2: 8e-3, 4: 0, 8: 0}[dtype.itemsize])
    assert torch.equal(ours(ids), ours.base_layer(ids))
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, original)


def test_embedding_padding_gets_no_gradient_as_in_peft():
    ours, theirs = pair(embedding(10, 6, padding_idx=3), 2, 4)
    ids = torch.tensor([[1, 3, 3, 7]])
    (_, got), (_, expected) = gradients(ours, ids), gradients(theirs, ids)
    assert_close(got, expected)
    assert not got[0][:, 3].any() and got[0][:, 7].any() and not got[0][:, 5].any()


def test_embedding_that_scales_its_output_scales_the_update():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    ours, theirs = pair(Gemma3TextScaledWordEmbedding(20, 8, 0, embed_scale=8 ** 0.5), 2, 4)
    ids = torch.arange(1, 20)
    unmerged = ours(ids)
    assert torch.equal(unmerged, theirs(ids))
    ours.merge()
    torch.testing.assert_close(ours(ids), unmerged)


def test_embedding_start_is_the_identity_and_pefts_distribution():
    layer = LoRAEmbedding(embedding(500, 40), 8, 16, generator=torch.Generator().manual_seed(0))
    A, B = adapters_of(layer)
    assert not A.any() and A.shape == (8, 500) and B.shape == (40, 8) and 0.9 < B.std() < 1.1
    ids = torch.arange(500)
    assert torch.equal(layer(ids), layer.base_layer(ids))
    _, (dA, dB) = gradients(layer, ids)
    assert dA.any() and not dB.any()
    assert not layer.base_layer.weight.requires_grad
    again = LoRAEmbedding(embedding(500, 40), 8, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(B, adapters_of(again)[1])


def test_embedding_gradcheck():
    layer = LoRAEmbedding(embedding(6, 5).double(), 2, 3.0)
    keys = list(layer.adapter_parameters())
    values = [torch.randn_like(p).requires_grad_(True) for p in layer.adapter_parameters().values()]
    ids = torch.tensor([[0, 5, 5], [1, 2, 3]])
    assert torch.autograd.gradcheck(lambda *v: torch.func.functional_call(layer, dict(zip(keys, v)), ids), values)


def test_several_adapters_on_an_embedding_add_up():
    layer = LoRAEmbedding(embedding(12, 8), 2, 4)
    layer.add("b", LoRAConfig(3, 6, rslora=True))
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.normal_()
    layer.active = {"default": 0.5, "b": -2.0}
    ids = torch.arange(12)
    expected = layer.base_layer.weight + 0.5 * layer.delta("default") - 2 * layer.delta("b")
    torch.testing.assert_close(layer(ids), expected)
    layer.remove("b")
    assert list(layer.settings) == layer.names == ["default"] and layer.active == {"default": 0.5}


@pytest.mark.parametrize("make, error, message", [
    (lambda: LoRAEmbedding(nn.Linear(4, 4), 2, 4), TypeError, "base must be an nn.Embedding; got Linear"),
    (lambda: LoRAEmbedding(embedding(9, 4), 5, 4), ValueError, r"r = 5 is more than min\(d_in=9, d_out=4\)"),
    (lambda: LoRAEmbedding(embedding(9, 4), 2, 4, init="pissa"), ValueError, "init='pissa' is a start for linear"),
    (lambda: LoRAEmbedding(embedding(9, 4), 2, float("nan")), ValueError, "alpha must be a finite number"),
])
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_worked_number_of_the_docstring():
    shapes = LoRAConfig(r=8).shapes(nn.Embedding(128_256, 2048, device="meta"))
    assert sum(a * b for a, b in shapes.values()) == 1_042_432 and 128_256 * 2048 == 262_668_288


# ------------------------------------------------------------------------------------------------ models

TARGETS = [("gpt2", "all-linear"), ("gpt2", ["wte", "c_fc"]), ("gpt2", None), ("opt", ["embed_tokens", "fc1"]),
           ("llama", ["embed_tokens", "v_proj"]), ("t5", ["wo", "wi"]), ("bert", ["position_embeddings", "query"])]


@pytest.mark.parametrize("family, targets", TARGETS, ids=str)
def test_models_equal_pefts_in_logits_counts_and_files(family, targets, small_model, small_inputs, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    inputs = small_inputs(family)
    ours = attach(small_model(family, tied=False), LoRAConfig(r=4, alpha=6, target_modules=targets))
    theirs = get_peft_model(small_model(family, tied=False), LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for parameter in adapter_parameters(ours).values():
            parameter.normal_(std=0.2, generator=g)
    theirs.load_state_dict({"base_model.model." + key: value for key, value in ours.state_dict().items()})
    theirs.eval()
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)

    ours(**inputs).loss.backward()
    theirs(**inputs).loss.backward()
    expected = {name.removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in adapter_parameters(ours).items():
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name

    first = ours(**inputs).logits
    save_adapter(ours, tmp_path / "ours")
    read = PeftModel.from_pretrained(small_model(family, tied=False), tmp_path / "ours")
    assert torch.equal(read(**inputs).logits, first)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    back = load_adapter(small_model(family, tied=False), tmp_path / "theirs")
    assert torch.equal(back(**inputs).logits, first)

    # without gradients: what torch multiplies by depends, to the last bit, on whether a weight requires them
    with torch.no_grad(), disabled(ours):
        base = ours(**inputs).logits
        assert torch.equal(base, small_model(family, tied=False)(**inputs).logits)
    torch.testing.assert_close(merge(ours)(**inputs).logits, first, rtol=1e-4, atol=1e-4)
    assert torch.equal(unmerge(ours)(**inputs).logits, first)
    with torch.no_grad():
        assert torch.equal(detach(ours)(**inputs).logits, base)


def test_merging_a_tied_embedding_is_refused(small_model, small_inputs):
    model = attach(small_model("llama", tied=True), LoRAConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="embed_tokens.*one tied tensor"):
        merge(model)
    assert torch.equal(detach(model)(**small_inputs()).logits, small_model("llama", tied=True)(**small_inputs()).logits)


def test_two_adapters_on_gpt2_switch(small_model, small_inputs):
    inputs = small_inputs("gpt2")
    model = attach(small_model("gpt2", tied=False), LoRAConfig(r=2, target_modules=["wte", "c_attn"]))
    attach(model, LoRAConfig(r=3, target_modules=["wte", "c_fc"]), seed=1, name="b")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.2)
    logits = {}
    for names in ("default", "b", ("default", "b")):
        set_adapter(model, names)
        logits[names] = model(**inputs).logits
    set_adapter(model, "default")
    assert torch.equal(model(**inputs).logits, logits["default"])
    assert not torch.equal(logits["default"], logits["b"]) and not torch.equal(logits["b"], logits["default", "b"])
