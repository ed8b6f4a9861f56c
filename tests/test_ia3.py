"""pefttools.ia3 against peft's IA3Config: layers, models of six families, files both ways, merging."""
from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.ia3 import FAMILIES, FEEDFORWARD, TARGETS, IA3Config, IA3Linear, ia3_merge, ia3_scale
from pefttools.inject import (adapter_layers, adapter_parameters, attach, count_parameters, detach, disabled, merge,
                              set_adapter, trainable, unmerge)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SIX = ("llama", "qwen2", "gpt2", "opt", "bert", "t5")


def conv1d(d_in, d_out):
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(d_out, d_in)
    nn.init.normal_(layer.bias)
    return layer


def pair(d_in=12, d_out=20, bias=True, feedforward=False, dtype=torch.float32, conv=False, seed=0):
    """The same layer twice, ours and peft's, with the same l away from 1."""
    from peft import IA3Config as Theirs
    from peft.tuners.ia3.layer import Linear

    torch.manual_seed(seed)
    base = (conv1d(d_in, d_out) if conv else nn.Linear(d_in, d_out, bias=bias)).to(dtype)
    ours, theirs = (copy.deepcopy(base) for _ in range(2))
    ours = IA3Linear(ours, feedforward)
    ours.add("default")
    ours.active = {"default": 1.0}
    theirs = Linear(theirs, "default", Theirs(fan_in_fan_out=conv), is_feedforward=feedforward)
    with torch.no_grad():
        ours.ia3_l["default"] += 0.5 * torch.randn_like(ours.ia3_l["default"])
        theirs.ia3_l["default"].data = ours.ia3_l["default"].data.clone()      # peft's autocast does, too
    return ours, theirs


def everything(layer, x):
    x = x.clone().requires_grad_(True)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)).sum().backward()
    return {"y": y.detach(), "dx": x.grad, "dl": layer.ia3_l["default"].grad}


def stir(model, name=None, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


# ------------------------------------------------------------------------------------------------ a layer

@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layer_equals_pefts_to_the_last_bit(dtype, bias, feedforward, conv):
    ours, theirs = pair(bias=bias, feedforward=feedforward, dtype=dtype, conv=conv)
    x = torch.randn(2, 5, 12).to(dtype)
    got, expected = everything(ours, x), everything(theirs, x)
    for name in expected:
        assert got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name]), name
    assert got["y"].dtype == dtype
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weight_and_bias_are_bit_identical_to_pefts(dtype, feedforward, conv):
    ours, theirs = pair(feedforward=feedforward, dtype=dtype, conv=conv)
    x, weight = torch.randn(7, 12).to(dtype), ours.base_layer.weight.detach().clone()
    bias, unmerged = ours.base_layer.bias.detach().clone(), ours(x)
    ours.merge()
    theirs.merge()
    assert torch.equal(ours.base_layer.weight, theirs.get_base_layer().weight)
    assert torch.equal(ours.base_layer.bias, theirs.get_base_layer().bias)
    assert feedforward == torch.equal(ours.base_layer.bias, bias) and ours.base_layer.weight.is_contiguous()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (ours(x) - unmerged).abs().max() <= tolerance * unmerged.abs().max()
    ours.merge()
    ours.unmerge()
    ours.unmerge()
    assert torch.equal(ours.base_layer.weight, weight) and torch.equal(ours.base_layer.bias, bias)


@settings(max_examples=30, deadline=None)
@given(d_in=st.integers(1, 12), d_out=st.integers(1, 12), batch=st.lists(st.integers(0, 3), max_size=3),
       feedforward=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99))
def test_functions_are_the_formula(d_in, d_out, batch, feedforward, bias, seed):
    g = torch.Generator().manual_seed(seed)
    x, W, b, l = (torch.randn(*s, generator=g, dtype=torch.float64)
                  for s in ((*batch, d_in), (d_out, d_in), (d_out,), (d_in if feedforward else d_out,)))
    b = b if bias else None
    expected = (x * l) @ W.T + (b if bias else 0) if feedforward else (x @ W.T + (b if bias else 0)) * l
    scaled = nn.functional.linear(ia3_scale(x, l), W, b) if feedforward else ia3_scale(nn.functional.linear(x, W, b), l)
    torch.testing.assert_close(scaled, expected)
    merged, new_bias = ia3_merge(W, b, l, feedforward)
    torch.testing.assert_close(nn.functional.linear(x, merged, new_bias), expected)
    torch.testing.assert_close(merged, W @ torch.diag(l) if feedforward else torch.diag(l) @ W)


@pytest.mark.parametrize("feedforward", [False, True])
def test_gradcheck(feedforward):
    layer = pair(5, 4, feedforward=feedforward, dtype=torch.float64)[0]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def run(x, l):
        return torch.func.functional_call(layer, {"ia3_l.default": l}, x)

    assert torch.autograd.gradcheck(run, (x, layer.ia3_l["default"]))


def test_identity_at_the_start_and_only_l_is_trained():
    base = nn.Linear(6, 4)
    layer = IA3Linear(base)
    layer.add("default")
    layer.active = {"default": 1.0}
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x)) and layer.base_layer is base
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["ia3_l.default"]
    assert layer(torch.zeros(0, 6)).shape == (0, 4)
    assert torch.allclose(layer(torch.randn(6, 3).T), layer(torch.randn(6, 3).T)) is False
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_several_at_once_multiply_as_in_peft_and_a_weight_leads_from_one():
    ours, theirs = pair()
    from peft import IA3Config as Theirs

    ours.add("b")
    theirs.update_layer("b", config=Theirs())
    with torch.no_grad():
        ours.ia3_l["b"] += 0.3 * torch.randn_like(ours.ia3_l["b"])
        theirs.ia3_l["b"].copy_(ours.ia3_l["b"])
    theirs.set_adapter(["default", "b"])
    ours.active = {"default": 1.0, "b": 1.0}
    x = torch.randn(4, 12)
    assert torch.equal(ours(x), theirs(x))
    ours.merge()
    theirs.merge()
    assert torch.equal(ours.base_layer.weight, theirs.get_base_layer().weight)
    ours.unmerge()
    ours.active = {"b": 0.25}
    torch.testing.assert_close(ours(x), ours.base_layer(x) * (1 + 0.25 * (ours.ia3_l["b"].T - 1)))
    ours.active = {"b": 0.0}
    torch.testing.assert_close(ours(x), ours.base_layer(x))


def test_merge_refuses_what_it_must():
    ours, _ = pair()
    with torch.no_grad():
        ours.ia3_l["default"][0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        ours.merge()
    ours.base_layer.weight = nn.Parameter(torch.zeros(20, 12, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="quantized"):
        ours.merge()


@pytest.mark.parametrize("call, message", [
    (lambda: ia3_scale(torch.zeros(2, 3), torch.ones(4)), r"x must be \[\.\.\., 4\].*got \[2, 3\]"),
    (lambda: ia3_scale(torch.zeros(()), torch.ones(4)), r"x must be \[\.\.\., 4\]"),
    (lambda: ia3_merge(torch.zeros(2, 3), None, torch.ones(3), False), "l must have 2 entries.*at its output; got 3"),
    (lambda: ia3_merge(torch.zeros(2, 3), None, torch.ones(2), True), "l must have 3 entries.*at its input; got 2"),
])
def test_functions_name_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------ in a model

def test_default_layers_are_pefts():
    from peft.utils import constants

    assert {k: list(v) for k, v in TARGETS.items()} == constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {k: list(v) for k, v in FEEDFORWARD.items()} == theirs and set(FAMILIES) == set(theirs)


def theirs_of(model, ours=None, **settings):
    from peft import IA3Config as Theirs
    from peft import get_peft_model

    peft = get_peft_model(model, Theirs(**settings)).eval()
    if ours is not None:
        state = {f"base_model.model.{k}": v for k, v in ours.state_dict().items()}
        assert set(state) == set(peft.state_dict())
        peft.load_state_dict(state)
    return peft


@pytest.mark.parametrize("family", SIX)
def test_model_equals_pefts(family, small_model, small_inputs, tmp_path):
    inputs = small_inputs(family)
    base = logits(small_model(family), inputs)
    model = attach(small_model(family), IA3Config())
    assert torch.equal(logits(model, inputs), base)
    stir(model)
    peft = theirs_of(small_model(family), model)
    assert count_parameters(model) == peft.get_nb_trainable_parameters()
    assert torch.equal(logits(model, inputs), logits(peft, inputs)) and not torch.allclose(logits(model, inputs), base)
    for each in (model, peft):
        each(**inputs).loss.backward()
    grads = {f"base_model.model.{name}": p.grad for name, p in trainable(model).items()}
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-6, atol=1e-8)
    assert grads and all(grad.any() for grad in grads.values())

    with disabled(model):
        assert torch.equal(logits(model, inputs), base)
    after = logits(model, inputs)
    merge(model)
    peft.merge_adapter()
    assert torch.equal(logits(model, inputs), logits(peft, inputs))
    torch.testing.assert_close(logits(model, inputs), after, rtol=1e-4, atol=2e-6)
    unmerge(model)
    assert torch.equal(logits(model, inputs), after)
    detach(model)
    assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("family", SIX)
def test_files_load_in_peft_and_back(family, small_model, small_inputs, tmp_path):
    from peft import PeftModel

    inputs = small_inputs(family)
    model = stir(attach(small_model(family), IA3Config()))
    save_adapter(model, tmp_path / "ours")
    peft = PeftModel.from_pretrained(small_model(family), str(tmp_path / "ours")).eval()
    assert torch.equal(logits(peft, inputs), logits(model, inputs))
    peft.save_pretrained(str(tmp_path / "theirs"))
    back = load_adapter(small_model(family), tmp_path / "theirs")
    assert torch.equal(logits(back, inputs), logits(model, inputs))
    stir(model, seed=9)
    load_adapter(model, tmp_path / "ours")                                 # over the one that is there
    assert torch.equal(logits(back, inputs), logits(model, inputs))


@pytest.mark.parametrize("targets, inputs_of", [
    (["q_proj", "v_proj", "down_proj"], ["down_proj"]), (["q_proj", "up_proj"], []),
    ("all-linear", ["down_proj", "o_proj"]),
    (r".*\.[02]\..*(k_proj|down_proj)", r".*mlp\.down_proj"), (["k_proj", "v_proj", "down_proj"], None)])
def test_chosen_layers_and_ends_are_pefts(targets, inputs_of, small_model, small_inputs, tmp_path):
    from peft import PeftModel

    inputs, settings = small_inputs(), {"target_modules": targets, "feedforward_modules": inputs_of}
    model = stir(attach(small_model(), IA3Config(**settings)))
    peft = theirs_of(small_model(), model, **settings)
    assert torch.equal(logits(model, inputs), logits(peft, inputs))
    ends = {layer.feedforward for _, layer in adapter_layers(model)}
    assert ends == ({False} if inputs_of == [] else {False, True})
    save_adapter(model, tmp_path)
    again = PeftModel.from_pretrained(small_model(), str(tmp_path)).eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert torch.equal(logits(load_adapter(small_model(), tmp_path), inputs), logits(model, inputs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_half_precision_models_equal_pefts(family, dtype, small_model, small_inputs):
    model = stir(attach(small_model(family, dtype), IA3Config()))
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    peft = theirs_of(small_model(family, dtype), model)
    assert torch.equal(logits(model, small_inputs(family)), logits(peft, small_inputs(family)))


def test_two_adapters_switched(small_model, small_inputs):
    inputs = small_inputs()
    model = stir(attach(small_model(), IA3Config()), seed=1)
    first = logits(model, inputs)
    stir(attach(model, IA3Config(["q_proj", "down_proj"], ["down_proj"]), name="b"), "b", 2)
    assert torch.equal(logits(model, inputs), first)
    set_adapter(model, "b")
    other = stir(attach(small_model(), IA3Config(["q_proj", "down_proj"], ["down_proj"]), name="b"), "b", 2)
    assert torch.equal(logits(model, inputs), logits(other, inputs))
    assert torch.equal(logits(copy.deepcopy(model), inputs), logits(other, inputs))
    with pytest.raises(ValueError, match="feedforward_modules: 'c' scales the output .* scale at the other end"):
        attach(model, IA3Config(["down_proj"], []), name="c")


def test_generate(small_model):
    model = stir(attach(small_model(dtype="float64"), IA3Config()))
    ids = torch.arange(10).reshape(2, 5)
    cached, fresh = (model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
                     for cache in (True, False))
    assert torch.equal(cached, fresh)


def test_wrong_arguments(small_model):
    with pytest.raises(ValueError, match="feedforward_modules must be among target_modules; down_proj is not"):
        IA3Config(["k_proj"], ["down_proj"])
    with pytest.raises(TypeError, match="base must be a linear layer; got Embedding"):
        IA3Linear(nn.Embedding(3, 3))
    with pytest.raises(TypeError, match="this is a LlamaRMSNorm, and IA³ scales linear layers"):
        attach(small_model(), IA3Config(["input_layernorm"], []))
    with pytest.raises(ValueError, match="no module is named 'qq_proj'"):
        attach(small_model(), IA3Config(["qq_proj"], []))
    with pytest.raises(ValueError, match=r"call config.targets\(model\) first"):
        IA3Config().build(nn.Linear(3, 3))
    model = small_model()
    model.config.model_type = "my_model"
    with pytest.raises(ValueError, match="target_modules must be given"):
        attach(model, IA3Config())


def test_the_number_in_the_docstring():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                                             vocab_size=128256, num_attention_heads=32, num_key_value_heads=8,
                                             tie_word_embeddings=True))
    config = IA3Config()
    numbers = [sum(torch.Size(shape).numel() for shape in config.shapes(base).values())
               for base in config.targets(model).values()]
    assert sum(numbers[:3]) == 9_216 and sum(numbers) == 147_456
    assert round(100 * 147_456 / sum(p.numel() for p in model.parameters()), 3) == 0.012
