"""pefttools.hyper and hyper_config: what the network writes, against plain adapters; counts, tasks, files, training."""
from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from pefttools.adapters import bottleneck_size
from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.hyper import HyperAdapters, hyper_size, norm_after
from pefttools.hyper_config import HyperConfig, fold
from pefttools.inject import (adapter_layers, adapter_parameters, attach, count_parameters, delete_adapter, detach,
                              disabled, merge, set_adapter, trainable)
from pefttools.placements import AdapterConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SIX = ("llama", "qwen2", "gpt2", "opt", "bert", "t5")
SMALL = HyperConfig(bottleneck=3, e=5, hidden=7)


def stir(model, name=None, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def two_tasks(model, config=SMALL):
    return stir(attach(attach(model, config, name="cola"), config, seed=1, name="rte"))


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def by_hand(frame, name, site):
    """The adapter that the network writes for a task and a place, from the paper's equations."""
    s = {key: p.detach() for key, p in frame.shared.items()}
    i, j = frame.where[site]
    address = torch.cat([frame.tasks[name].detach(), s["layers"][i], s["positions"][j]])
    address = s["W_2"] @ torch.relu(s["W_1"] @ address + s["b_1"]) + s["b_2"]
    d, m = frame.d_model, frame.config.bottleneck
    shapes = {"down.weight": (m, d), "down.bias": (m,), "up.weight": (d, m), "up.bias": (d,), "norm.weight": (d,),
              "norm.bias": (d,)}
    return {key: (s[f"{key.replace('.', '_')}_weight"] @ address + s[f"{key.replace('.', '_')}_bias"]).reshape(shape)
            for key, shape in shapes.items() if key.startswith("norm") <= frame.config.layer_norm}


# ------------------------------------------------------------------------------------------------ what it computes

@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("family", SIX)
def test_equals_plain_adapters_with_the_weights_it_writes(family, layer_norm, small_model, small_inputs):
    config = HyperConfig(bottleneck=3, e=5, hidden=7, layer_norm=layer_norm)
    model, inputs = two_tasks(small_model(family, "float64"), config), small_inputs(family)
    for task in ("rte", "cola"):
        set_adapter(model, task)
        oracle = attach(small_model(family, "float64"), AdapterConfig(
            "houlsby", 3, activation="gelu", layer_norm="after" if layer_norm else False))
        layers = list(adapter_layers(oracle))
        assert len(layers) == len(model.hyper_adapters.where)
        for site, (_, layer) in enumerate(layers):
            layer.bottleneck["default"].load_state_dict(by_hand(model.hyper_adapters, task, site))
        torch.testing.assert_close(logits(model, inputs), logits(oracle, inputs), rtol=1e-9, atol=1e-10)
    twin = fold(copy.deepcopy(model), "rte")
    set_adapter(model, "rte")
    torch.testing.assert_close(logits(twin, inputs), logits(model, inputs), rtol=1e-9, atol=1e-10)
    assert not hasattr(twin, "hyper_adapters") and hasattr(model, "hyper_adapters")


def test_layers_and_positions_have_addresses_of_their_own(small_model):
    model = two_tasks(small_model("t5"))
    frame = model.hyper_adapters
    # encoder layers are 0, 1, 2 and decoder layers 3, 4, 5; attention is 0 and the feed-forward 1
    assert frame.where == [(i, j) for i in range(6) for j in (0, 1)]
    written = [frame.generated(site)["down.weight"] for site in range(12)]
    assert all(not torch.allclose(a, b) for k, a in enumerate(written) for b in written[:k])
    bert = attach(small_model("bert"), SMALL)
    assert bert.hyper_adapters.where == [(i, j) for i in range(3) for j in (0, 1)]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_gradcheck(layer_norm):
    config = HyperConfig(bottleneck=2, e=3, hidden=4, layer_norm=layer_norm)
    frame = HyperAdapters([(torch.nn.Linear(5, 5), 0, 0), (torch.nn.Linear(5, 5), 0, 1)], 5, config,
                          torch.Generator().manual_seed(0), torch.float64)
    frame.add("a", config, torch.Generator().manual_seed(1))
    frame.active = {"a": 1.0}
    g = torch.Generator().manual_seed(2)
    names = list(dict(frame.named_parameters()))
    values = [(p.detach() + 0.4 * torch.randn(p.shape, generator=g, dtype=p.dtype)).requires_grad_()
              for p in frame.parameters()]
    h = torch.randn(3, 5, generator=g, dtype=torch.float64, requires_grad=True)

    class Run(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.frame = frame

        def forward(self, h):
            return self.frame.update(0, h) + 2 * self.frame.update(1, h)

    run = Run()
    assert torch.autograd.gradcheck(
        lambda h, *v: torch.func.functional_call(run, {f"frame.{n}": x for n, x in zip(names, v)}, h), (h, *values))


def test_norm_after_is_layer_norm_by_hand():
    u, gamma, beta = (torch.randn(*s, dtype=torch.float64) for s in ((4, 6), (6,), (6,)))
    centred = u - u.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma + beta
    torch.testing.assert_close(norm_after(u, gamma, beta), expected)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_count_by_formula(layer_norm, small_model):
    config = HyperConfig(bottleneck=3, e=5, hidden=7, layer_norm=layer_norm)
    model = attach(small_model(), config, name="a")
    assert count_parameters(model)[0] == hyper_size(32, 3, 3, 1, 5, 7, layer_norm)
    numbers = [torch.Size(shape).numel() for shape in config.shapes(model).values()]
    assert sum(numbers) == hyper_size(32, 3, 3, 1, 5, 7, layer_norm)
    for name in "bcd":
        attach(model, config, name=name)
    assert sum(p.numel() for p in adapter_parameters(model).values()) == hyper_size(32, 3, 3, 4, 5, 7, layer_norm)
    assert hyper_size(32, 3, 3, 4, 5, 7) - hyper_size(32, 3, 3, 1, 5, 7) == 3 * 5          # a task costs e numbers


def test_the_numbers_in_the_docstring():
    assert hyper_size(768, 24, 24, 8, 64, 128) == 2_582_616
    assert 8 * 48 * bottleneck_size(768, 24) == 14_459_904


# ------------------------------------------------------------------------------------------------ life in a model

@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("family", SIX)
def test_life_in_a_model(family, layer_norm, small_model, small_inputs, tmp_path):
    config = HyperConfig(bottleneck=3, e=5, hidden=7, layer_norm=layer_norm)
    model, inputs = small_model(family), small_inputs(family)
    before, keys = logits(model, inputs), list(model.state_dict())
    attach(model, config)
    assert torch.equal(logits(model, inputs), before)                      # what is written last is zero at the start
    stir(model)
    after = logits(model, inputs)
    assert not torch.allclose(after, before)
    with disabled(model):
        assert torch.equal(logits(model, inputs), before)
    model(**inputs).loss.backward()
    assert set(trainable(model)) == set(adapter_parameters(model))
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model).values())

    save_adapter(model, tmp_path)
    loaded = load_adapter(small_model(family), tmp_path)
    assert torch.equal(logits(loaded, inputs), after)
    twin = stir(copy.deepcopy(model), seed=1)
    assert torch.equal(logits(model, inputs), after) and not torch.equal(logits(twin, inputs), after)
    again = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert torch.equal(logits(again, inputs), after)
    for each in (model, twin, again):
        detach(each)
        assert torch.equal(logits(each, inputs), before) and list(each.state_dict()) == keys
        assert not any("pefttools" in repr(hook) for m in each.modules() for hook in m._forward_hooks.values())


def test_it_learns_from_its_start_as_fast_as_plain_adapters(small_model, small_inputs):
    losses = []
    for config in (HyperConfig(bottleneck=4, e=8, hidden=8), AdapterConfig("houlsby", bottleneck=4, activation="gelu")):
        model, inputs = attach(small_model(tied=False), config), small_inputs()
        optimizer = torch.optim.Adam(trainable(model).values(), lr=0.03)
        for step in range(40):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            losses += [loss.item()] if step in (0, 39) else []
    first, last, plain_first, plain_last = losses
    assert first == plain_first and last < first - 0.1 and last < plain_last + 0.05


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gradients_with_checkpointing_are_those_without(family, small_model, small_inputs):
    model, inputs = two_tasks(small_model(family)).train(), small_inputs(family)
    for module in model.modules():
        for name in ("p", "dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    got = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**inputs).loss.backward()
        got.append({name: p.grad.clone() for name, p in trainable(model).items()})
    assert all(grad.any() for grad in got[0].values())
    for name, grad in got[0].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-5, atol=1e-7)


def test_tasks_switch_and_share(small_model, small_inputs):
    model, inputs = two_tasks(small_model()), small_inputs()
    shared = {f"hyper_adapters.shared.{key}" for key in model.hyper_adapters.shared}
    assert set(trainable(model)) == shared | {"hyper_adapters.tasks.cola"}
    cola = logits(model, inputs)
    set_adapter(model, "rte")
    rte = logits(model, inputs)
    assert set(trainable(model)) == shared | {"hyper_adapters.tasks.rte"} and not torch.allclose(cola, rte)
    set_adapter(model, "cola")
    assert torch.equal(logits(model, inputs), cola) and set(trainable(model)) == shared | {"hyper_adapters.tasks.cola"}

    frame = model.hyper_adapters
    set_adapter(model, {"cola": 0.25, "rte": 0.75})
    with torch.no_grad():
        frame.tasks["mean"] = torch.nn.Parameter(0.25 * frame.tasks["cola"] + 0.75 * frame.tasks["rte"])
        mixed = frame.generated(0)
        for key, tensor in frame.generated(0, {"mean": 1.0}).items():
            torch.testing.assert_close(mixed[key], tensor)
        del frame.tasks["mean"]
    with pytest.raises(ValueError, match="stacked=True"):
        set_adapter(model, ["cola", "rte"], stacked=True)
    set_adapter(model, "rte")
    delete_adapter(model, "cola")
    assert torch.equal(logits(model, inputs), rte) and frame.names == ["rte"]


def test_a_file_of_another_network_is_not_read_over_one_that_others_use(small_model, small_inputs, tmp_path):
    model, inputs = two_tasks(small_model()), small_inputs()
    expected = {}
    for name in ("cola", "rte"):
        set_adapter(model, name)
        expected[name] = logits(model, inputs)
        save_adapter(model, tmp_path / name)
    fresh = load_adapter(small_model(), tmp_path / "cola", name="cola")
    load_adapter(fresh, tmp_path / "cola", name="cola")
    assert torch.equal(logits(fresh, inputs), expected["cola"])
    stir(model, seed=2)
    with pytest.raises(ValueError, match="shared network is not the one in the model, on which cola relies"):
        load_adapter(model, tmp_path / "rte", name="rte")


def test_generate(small_model):
    model = two_tasks(small_model(dtype="float64"))
    ids = torch.arange(10).reshape(2, 5)
    cached, fresh = (model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
                     for cache in (True, False))
    assert torch.equal(cached, fresh)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, small_model, small_inputs):
    model = two_tasks(small_model("llama", dtype))
    output = model(**small_inputs("llama"))
    assert output.logits.dtype == getattr(torch, dtype)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())


def test_some_layers_only(small_model, small_inputs):
    config = HyperConfig(bottleneck=3, e=5, hidden=7, drop_layers=[0])
    model = stir(attach(small_model(), config))
    assert model.hyper_adapters.where == [(0, 0), (0, 1), (1, 0), (1, 1)]
    expected = logits(model, small_inputs())
    torch.testing.assert_close(logits(fold(model), small_inputs()), expected, rtol=1e-4, atol=1e-5)


def test_wrong_arguments(small_model, tmp_path):
    for settings, message in (({"bottleneck": 0}, "bottleneck must be a whole number"), ({"e": 0}, "e must be a whole"),
                              ({"hidden": 1.5}, "hidden must be a whole"),
                              ({"activation": "x"}, "activation must be one")):
        with pytest.raises(ValueError, match=message):
            HyperConfig(**settings)
    model = two_tasks(small_model())
    with pytest.raises(ValueError, match="tasks share one hypernetwork, so 'third' must have its settings"):
        attach(model, HyperConfig(bottleneck=9), name="third")
    assert sorted(model.hyper_adapters.tasks) == ["cola", "rte"]
    with pytest.raises(TypeError, match="cannot be merged.*fold"):
        merge(model)
    with pytest.raises(ValueError, match="fold: there is no task 'sst'; this model has cola, rte"):
        fold(model, "sst")
    with pytest.raises(ValueError, match="fold: this model has no hypernetwork"):
        fold(small_model())
