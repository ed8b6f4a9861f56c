"""pefttools.compose: adapters switched, averaged, stacked, souped, and routed row by row; other methods too."""
from __future__ import annotations

import pytest
import torch

from pefttools.adapter_layers import combined_update
from pefttools.adapters import BottleneckAdapter
from pefttools.compose import routed, soup
from pefttools.hyper_config import HyperConfig
from pefttools.ia3 import IA3Config
from pefttools.inject import (adapter_layers, adapter_parameters, attach, attached, disabled, merge, set_adapter,
                              trainable)
from pefttools.ln_tuning import LNTuningConfig
from pefttools.lora import LoRAConfig
from pefttools.placements import AdapterConfig
from pefttools.sites import PLACEMENTS

pytestmark = pytest.mark.usefixtures("one_thread")
SIX = ("llama", "qwen2", "gpt2", "opt", "bert", "t5")
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def stir(model, name=None, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def with_two(model, config, other=None):
    stir(attach(model, config, name="a"), "a", 1)
    return stir(attach(model, other or config, name="b"), "b", 2)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def rows_of(inputs, picked):
    return {key: value[list(picked)] for key, value in inputs.items() if key != "labels"}


# ------------------------------------------------------------------------------------------------ side by side, stacked

def test_combined_update_is_the_sum_or_the_chain():
    g = torch.Generator().manual_seed(0)
    a, b = (BottleneckAdapter(6, 3, "gelu", init="houlsby", generator=g, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for parameter in [*a.parameters(), *b.parameters()]:
            parameter += 0.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    h = torch.randn(4, 6, generator=g, dtype=torch.float64)
    torch.testing.assert_close(combined_update(h, [(a, 0.7), (b, -2.0)]), 0.7 * a.update(h) - 2 * b.update(h))
    torch.testing.assert_close(h + combined_update(h, [(a, 1.0), (b, 1.0)], stacked=True), b(a(h)))
    torch.testing.assert_close(h + combined_update(h, [(b, 1.0), (a, 1.0)], stacked=True), a(b(h)))
    halfway = h + 0.5 * a.update(h)
    chained = combined_update(h, [(a, 0.5), (b, 3.0)], stacked=True)
    torch.testing.assert_close(h + chained, halfway + 3 * b.update(halfway))
    assert not torch.allclose(a(b(h)), b(a(h))) and combined_update(h, []) is None


@pytest.mark.parametrize("family", SIX)
def test_switch_average_and_stack_in_a_model(family, small_model, small_inputs):
    inputs, config = small_inputs(family), AdapterConfig("houlsby", bottleneck=4, activation="gelu")
    model = with_two(small_model(family, "float64"), config, AdapterConfig("houlsby", bottleneck=6, activation="tanh"))
    base = small_model(family, "float64")
    pairs = {name.replace(".base_layer", ""): layer.bottleneck for name, layer in adapter_layers(model)}

    def oracle(combine):
        """The base model, with hooks on the projections that do what `combine` says."""
        handles = [base.get_submodule(name).register_forward_hook(
            lambda module, args, y, two=two: combine(y, two["a"], two["b"])) for name, two in pairs.items()]
        expected = logits(base, inputs)
        for handle in handles:
            handle.remove()
        return expected

    for names, stacked, combine in (
            ("a", False, lambda y, a, b: a(y)), ("b", False, lambda y, a, b: b(y)),
            (["a", "b"], False, lambda y, a, b: y + a.update(y) + b.update(y)),
            ({"a": 0.5, "b": 0.5}, False, lambda y, a, b: (a(y) + b(y)) / 2),
            (["a", "b"], True, lambda y, a, b: b(a(y))), (["b", "a"], True, lambda y, a, b: a(b(y)))):
        set_adapter(model, names, stacked=stacked)
        torch.testing.assert_close(logits(model, inputs), oracle(combine), **CLOSE)
    assert set(trainable(model)) == set(adapter_parameters(model))


# ------------------------------------------------------------------------------------------------ soup

def test_soup_is_the_mean_of_the_parameters(small_model, small_inputs):
    inputs, config = small_inputs(), AdapterConfig("houlsby", bottleneck=4, train_layer_norms=True)
    model = with_two(small_model(), config)
    alone = logits(model, inputs)
    assert soup(model, {"a": 0.3, "b": 0.7}, "c") is model
    assert torch.equal(logits(model, inputs), alone) and list(attached(model).configs) == ["a", "b", "c"]
    a, b, c = (list(adapter_parameters(model, name).values()) for name in "abc")
    for one, other, mean in zip(a, b, c, strict=True):
        torch.testing.assert_close(mean, 0.3 * one + 0.7 * other)
    assert all(mean is not one for one, mean in zip(a, c))
    soup(model, {"a": 1.0}, "copy")
    set_adapter(model, "copy")
    assert torch.equal(logits(model, inputs), alone)


def test_soup_of_ia3_and_of_norms(small_model):
    for config in (IA3Config(), LNTuningConfig()):
        model = soup(with_two(small_model(), config), {"a": 0.5, "b": 0.5}, "c")
        for one, other, mean in zip(*(adapter_parameters(model, name).values() for name in "abc"), strict=True):
            torch.testing.assert_close(mean, (one + other) / 2)


def test_soup_refuses(small_model):
    model = with_two(small_model(), AdapterConfig(bottleneck=4), AdapterConfig(bottleneck=2))
    for weights, message in (({}, "name at least one adapter"),
                             ({"x": 1.0}, "there is no adapter 'x'; this model has a, b"),
                             ({"a": float("nan")}, "the weight of 'a' must be a finite number; got nan"),
                             ({"a": 0.5, "b": 0.5}, "'a' and 'b' differ in their settings, layers or shapes")):
        with pytest.raises(ValueError, match=message):
            soup(model, weights, "c")
    assert list(attached(model).configs) == ["a", "b"]
    with pytest.raises(ValueError, match="the mean of A and the mean of B do not make the mean of B·A"):
        soup(with_two(small_model(), LoRAConfig(r=2)), {"a": 0.5, "b": 0.5}, "c")


# ------------------------------------------------------------------------------------------------ routing

METHODS = {**{placement: AdapterConfig(placement, bottleneck=4, activation="gelu",
                                       train_layer_norms=placement == "houlsby") for placement in PLACEMENTS},
           "ia3": IA3Config(), "lora": LoRAConfig(r=3, target_modules="all-linear"), "norms": LNTuningConfig()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SIX)
def test_each_row_speaks_as_if_alone(family, method, small_model, small_inputs):
    config = METHODS[method]
    if method == "norms" and family in ("opt", "bert"):
        config = LNTuningConfig({"opt": ["final_layer_norm"], "bert": ["LayerNorm"]}[family])
    model = with_two(small_model(family, "float64"), config)
    inputs = {key: torch.cat([value, value]) for key, value in small_inputs(family).items()}
    rows = ["a", None, "b", "a"]
    before = logits(model, inputs)
    with routed(model, rows):
        together = logits(model, {key: value for key, value in inputs.items() if key != "labels"})
    assert torch.equal(logits(model, inputs), before)                        # outside the block, as it was
    for name in ("a", "b", None):
        picked = [i for i, row in enumerate(rows) if row == name]
        if name is None:
            with disabled(model):
                alone = logits(model, rows_of(inputs, picked))
        else:
            set_adapter(model, name)
            alone = logits(model, rows_of(inputs, picked))
        torch.testing.assert_close(together[picked], alone, **CLOSE)
    assert not torch.allclose(together[0], together[2])                      # the same text, another adapter


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["houlsby", "parallel", "lora"])
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_generation_is_routed_too(family, method, beams, small_model):
    model = with_two(small_model(family, "float64"), METHODS[method])
    ids = torch.arange(15).reshape(3, 5) + 3
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    rows = ["b", "a", "b"]
    with routed(model, rows):
        together = model.generate(ids, **settings)
    for i, name in enumerate(rows):
        set_adapter(model, name)
        assert torch.equal(model.generate(ids[i:i + 1], **settings)[0], together[i])


@pytest.mark.parametrize("method", ["houlsby", "lora", "ia3"])
def test_gradients_are_those_of_the_rows_alone(method, small_model, small_inputs):
    inputs = small_inputs()
    model = with_two(small_model(dtype="float64"), METHODS[method])
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    with routed(model, ["b", "a"]):
        model(**rows_of(inputs, [0, 1])).logits.square().sum().backward()
    got = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    for name, i in (("b", 0), ("a", 1)):
        model.zero_grad()
        set_adapter(model, name)
        model(**rows_of(inputs, [i])).logits.square().sum().backward()
        for key, parameter in adapter_parameters(model, name).items():
            torch.testing.assert_close(got[key], parameter.grad, **CLOSE)
            assert got[key].any()


@pytest.mark.parametrize("configs", [
    (AdapterConfig("pfeiffer", bottleneck=4, layers_to_transform=0),
     AdapterConfig("houlsby", bottleneck=2, drop_layers=0)),
    (IA3Config(["q_proj", "down_proj"], ["down_proj"]), IA3Config(["k_proj"], [])),
    (LNTuningConfig(["norm"]), LNTuningConfig(["input_layernorm"]))])
def test_adapters_in_different_layers_are_routed(configs, small_model, small_inputs):
    inputs = small_inputs()
    model = with_two(small_model(dtype="float64"), *configs)
    with routed(model, ["a", "b"]):
        together = logits(model, inputs)
    for i, name in enumerate("ab"):
        set_adapter(model, name)
        torch.testing.assert_close(together[i:i + 1], logits(model, rows_of(inputs, [i])), **CLOSE)


def test_half_precision_rows(small_model, small_inputs):
    model = with_two(small_model(dtype="bfloat16"), METHODS["houlsby"])
    with routed(model, ["a", None]):
        together = logits(model, small_inputs())
    assert together.dtype == torch.bfloat16
    with disabled(model):
        alone = logits(model, small_inputs())
    torch.testing.assert_close(together[1], alone[1], rtol=2e-2, atol=2e-2)


def test_leaving_the_block_restores_everything_also_after_an_error(small_model, small_inputs):
    for config in (METHODS["houlsby"], METHODS["lora"]):
        model = with_two(small_model(), config)
        before = logits(model, small_inputs())
        with pytest.raises(ZeroDivisionError), routed(model, ["a", "b"]):
            raise ZeroDivisionError
        assert torch.equal(logits(model, small_inputs()), before)
        layers = [layer for _, layer in adapter_layers(model)]
        assert not any("forward" in layer.__dict__ or getattr(layer, "rows", None) for layer in layers)
        with pytest.raises(ValueError, match="routed: 3 adapters for a batch of 2 rows; name one for each row"):
            with routed(model, ["a", "b", "a"]):
                logits(model, small_inputs())
        assert torch.equal(logits(model, small_inputs()), before)


def test_routing_refuses(small_model):
    model = with_two(small_model(), METHODS["lora"])
    with pytest.raises(ValueError, match="there is no adapter 'x'; this model has a, b"), routed(model, ["a", "x"]):
        pass
    with pytest.raises(ValueError, match="name an adapter"), routed(model, []):
        pass
    with routed(model, ["a"]), pytest.raises(ValueError, match="routed already"), routed(model, ["b"]):
        pass
    merge(model)
    with pytest.raises(ValueError, match="an adapter is merged"), routed(model, ["a"]):
        pass
    hyper = attach(small_model(), HyperConfig(2, 3, 4))
    with pytest.raises(ValueError, match="HyperAdapters acts on the whole model"), routed(hyper, ["default"]):
        pass
    with pytest.raises(ValueError, match="no adapters attached"), routed(small_model(), ["a"]):
        pass
