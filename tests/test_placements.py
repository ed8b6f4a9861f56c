"""pefttools.placements: where adapters stand, against each family's block by hand in float64; and life in a model."""
from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from pefttools.adapters import bottleneck_size
from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.inject import (adapter_layers, adapter_parameters, attach, count_parameters, delete_adapter, detach,
                              disabled, merge, set_adapter, trainable, unmerge)
from pefttools.placements import AdapterConfig, count
from pefttools.sites import PLACEMENTS, find_sites, norms_of
from pefttools.sublayers import SUBLAYERS, Sublayers, layers_of

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bert", "t5")
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def stir(model, name=None, seed=7, size=0.2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def trained(model, placement, seed=7, **settings):
    settings = {"bottleneck": 4, "activation": "gelu"} | settings
    return stir(attach(model, AdapterConfig(placement, **settings)), seed=seed)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def own_modules(model):
    """The hooks that this library may have left behind (transformers has its own)."""
    return [hook for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values() if type(getattr(hook, "__self__", hook)).__module__.startswith("pefttools")]


# ------------------------------------------------------------------------------------------------ by hand

def delta(h, adapter, scale):
    """s · (W_up gelu(W_down h + b) + b_up), from the tensors alone."""
    t = adapter.state_dict()
    if "norm.weight" in t:
        h = torch.nn.functional.layer_norm(h, h.shape[-1:], t["norm.weight"], t["norm.bias"])
    z = h @ t["down.weight"].T + t["down.bias"]
    return scale * ((0.5 * z * (1 + torch.erf(z / 2 ** 0.5))) @ t["up.weight"].T + t["up.bias"])


def block(family, L, h, attend, after_attention, after_ff, beside):
    """One layer of a model of this family: L its modules, without adapters; the last three give what is added where."""
    if family in ("llama", "qwen2"):
        a = attend(L.self_attn, L.input_layernorm(h))
        h = h + a + after_attention(a)
        n = L.post_attention_layernorm(h)
        f = L.mlp.down_proj(L.mlp.act_fn(L.mlp.gate_proj(n)) * L.mlp.up_proj(n))
        return h + f + after_ff(f) + beside(n)
    if family == "gpt2":
        a = attend(L.attn, L.ln_1(h))
        h = h + a + after_attention(a)
        n = L.ln_2(h)
        f = L.mlp.c_proj(L.mlp.act(L.mlp.c_fc(n)))
        return h + f + after_ff(f) + beside(n)
    if family == "opt":
        a = attend(L.self_attn, L.self_attn_layer_norm(h))
        h = h + a + after_attention(a)
        n = L.final_layer_norm(h)
        f = L.fc2(torch.relu(L.fc1(n)))
        return h + f + after_ff(f) + beside(n)
    if family == "bert":
        a = L.attention.output.dense(attend(L.attention.self, h))
        h = L.attention.output.LayerNorm(h + a + after_attention(a))
        f = L.output.dense(L.intermediate.intermediate_act_fn(L.intermediate.dense(h)))
        return L.output.LayerNorm(h + f + after_ff(f) + beside(h))
    if family == "t5":
        a = attend(L.layer[0].SelfAttention, L.layer[0].layer_norm(h))
        h = h + a + after_attention(a)
        if L.is_decoder:
            h = h + attend(L.layer[1].EncDecAttention, L.layer[1].layer_norm(h))
        ff = L.layer[-1]
        n = ff.layer_norm(h)
        f = ff.DenseReluDense.wo(torch.relu(ff.DenseReluDense.wi(n)))
        return h + f + after_ff(f) + beside(n)
    raise AssertionError(family)


def plain(name):
    return name.replace(".base_layer", "")


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel", "bapna"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_the_papers_figure(family, placement, small_model, small_inputs):
    model, base = (small_model(family, "float64") for _ in range(2))
    trained(model, placement)
    adapters = {plain(name): getattr(layer, "after" if placement == "bapna" else "bottleneck")["default"]
                for name, layer in adapter_layers(model)}
    names = list(layers_of(base))
    seen, attention = {}, {}

    def note(name, into):
        return lambda module, args, kwargs, output: into.__setitem__(name, (args, kwargs, output))

    for name, module in list(model.named_modules()):
        if plain(name) in names and not name.endswith("base_layer"):
            module.register_forward_hook(note(name, seen), with_kwargs=True)
        elif type(module).__name__.endswith(("Attention",)) and type(module).__name__ != "BertAttention":
            module.register_forward_hook(note(plain(name), attention), with_kwargs=True)
    logits(model, small_inputs(family))
    assert len(seen) == len(names)

    used = set()
    for name in names:
        L, (args, _, output) = base.get_submodule(name), seen[name]

        def attend(module, n):
            where = next(key for key, m in base.named_modules() if m is module)
            a, kw, _ = attention[where]
            a, kw = ((n, *a[1:]), kw) if a else (a, kw | {"hidden_states": n})
            return module(*a, **(kw | ({"past_key_values": None} if "past_key_values" in kw else {})))[0]

        def added(kinds, paths, scale, name=name):
            def add(h):
                for path in paths:
                    if placement in kinds and f"{name}{path}" in adapters:
                        used.add(f"{name}{path}")
                        return delta(h, adapters[f"{name}{path}"], scale)
                return torch.zeros_like(h)
            return add

        with torch.no_grad():
            y = block(family, L, args[0], attend,
                      added({"houlsby"}, [".self_attn.o_proj", ".attn.c_proj", ".self_attn.out_proj",
                                          ".attention.output.dense", ".layer.0.SelfAttention.o"], 1.0),
                      added({"houlsby", "pfeiffer"}, [".mlp.down_proj", ".mlp.c_proj", ".fc2", ".output.dense",
                                                      ".layer.1.DenseReluDense.wo", ".layer.2.DenseReluDense.wo"], 1.0),
                      added({"parallel"}, [".mlp", ".fc2", ".output", ".layer.1.DenseReluDense",
                                           ".layer.2.DenseReluDense"], 4.0))
            y = y + added({"bapna"}, [""], 1.0)(y)
        torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, y, **EXACT)
    assert used == set(adapters) and len(used) == len(names) * (2 if placement == "houlsby" else 1)


@pytest.mark.parametrize("placement", ["input", "output", "input_output"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_input_and_output_stand_before_the_first_and_after_the_last_layer(family, layers, placement, small_model,
                                                                          small_inputs):
    model, base = (small_model(family, "float64", layers=layers) for _ in range(2))
    trained(model, placement)
    stacks = {}
    for name, (stack, _) in layers_of(base).items():
        stacks.setdefault(stack, []).append(name)
    wanted = {names[0 if where == "before" else -1]: where for names in stacks.values() for where in ("before", "after")
              if ("input" if where == "before" else "output") in placement}
    adapters = {(name, where): getattr(layer, where)["default"] for name, layer in adapter_layers(model)
                for where in ("before", "after") if len(getattr(layer, where))}
    assert set(adapters) >= set(wanted.items())
    assert len(adapters) == len(stacks) * (2 if placement == "input_output" else 1)
    for (name, where), adapter in adapters.items():
        if where == "before":
            base.get_submodule(name).register_forward_pre_hook(
                lambda module, args, adapter=adapter: (args[0] + delta(args[0], adapter, 1.0), *args[1:]))
        else:
            def behind(module, args, out, adapter=adapter):
                h = out[0] if isinstance(out, tuple) else out
                h = h + delta(h, adapter, 1.0)
                return (h, *out[1:]) if isinstance(out, tuple) else h

            base.get_submodule(name).register_forward_hook(behind)
    torch.testing.assert_close(logits(model, small_inputs(family)), logits(base, small_inputs(family)), **EXACT)


# ------------------------------------------------------------------------------------------------ in and out

@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_life_in_a_model(family, placement, small_model, small_inputs, tmp_path):
    model, inputs = small_model(family), small_inputs(family)
    before, keys = logits(model, inputs), list(model.state_dict())
    norms = placement in ("houlsby", "bapna")
    trained_config = AdapterConfig(placement, bottleneck=4, activation="gelu", train_layer_norms=norms)
    attach(model, trained_config)
    assert torch.equal(logits(model, inputs), before)                           # identity at the start
    stir(model)
    after = logits(model, inputs)
    assert not torch.allclose(after, before)
    with disabled(model):
        assert torch.equal(logits(model, inputs), before)

    model(**inputs).loss.backward()
    parameters = adapter_parameters(model)
    assert set(trainable(model)) == set(parameters)
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in parameters)

    save_adapter(model, tmp_path)
    loaded = load_adapter(small_model(family), tmp_path)
    assert torch.equal(logits(loaded, inputs), after)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), after)
    stir(twin, seed=3)
    assert not torch.equal(logits(twin, inputs), after) and torch.equal(logits(model, inputs), after)
    again = pickle.load(io.BytesIO(pickle.dumps(model)))
    assert torch.equal(logits(again, inputs), after)
    for each in (model, twin, again):
        detach(each)
        assert torch.equal(logits(each, inputs), before)
        assert list(each.state_dict()) == keys and not own_modules(each)


@pytest.mark.parametrize("placement", ["houlsby", "parallel", "bapna"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing_are_those_without(family, placement, small_model, small_inputs):
    model, inputs = trained(small_model(family), placement).train(), small_inputs(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "attn_dropout", "dropout_prob", "dropout_rate", "p"):
        for module in model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    got, runs = [], []
    queries = (".q_proj", ".c_attn", ".query", ".q")
    inner = next(module for name, module in model.named_modules() if name.endswith(queries))
    inner.register_forward_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        assert len(runs) == (1 + 2 if checkpointing else 1)              # it did run again
        got.append({name: p.grad.clone() for name, p in adapter_parameters(model).items()})
    assert all(grad.any() for grad in got[0].values())
    for name, grad in got[0].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("placement", ["houlsby", "parallel", "bapna", "input_output"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_generate_with_and_without_a_cache_agree(family, placement, small_model):
    model = trained(small_model(family, "float64"), placement)
    ids = torch.arange(10).reshape(2, 5) + 3
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
                "output_scores": True, "return_dict_in_generate": True}
    cached, fresh = (model.generate(ids, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached.sequences, fresh.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(fresh.scores), rtol=1e-8, atol=1e-9)
    with disabled(model):
        assert not torch.allclose(model.generate(ids, **settings).scores[0], cached.scores[0])


@pytest.mark.parametrize("placement", ["bapna", "input_output"])
def test_recorded_hidden_states_have_the_adapter_in_them(placement, small_model, small_inputs):
    inputs, model = small_inputs("llama"), small_model("llama", "float64")
    model(**inputs, output_hidden_states=True)              # transformers puts its own hooks in at the first time
    trained(model, placement)
    assert own_modules(model)
    last = {"bapna": "model.layers.1", "input_output": "model.layers.0"}[placement]
    with torch.no_grad():
        seen = []
        handle = model.get_submodule(last).register_forward_hook(lambda module, args, output: seen.append(output))
        states = model(**inputs, output_hidden_states=True).hidden_states
        handle.remove()
    assert len(states) == 4 and torch.equal(states[2 if placement == "bapna" else 1], seen[0])
    with torch.no_grad(), disabled(model):
        plain_states = model(**inputs, output_hidden_states=True).hidden_states
    changed = [not torch.equal(a, b) for a, b in zip(states, plain_states)]
    assert changed == ([False, True, True, True] if placement == "bapna" else [True, True, True, True])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_half_precision_models_get_adapters_in_32_bits(placement, dtype, small_model, small_inputs):
    model = trained(small_model("llama", dtype), placement, train_layer_norms=True)
    assert {p.dtype for name, p in adapter_parameters(model).items() if "ln_tuning" not in name} == {torch.float32}
    assert {p.dtype for name, p in adapter_parameters(model).items() if "ln_tuning" in name} == {getattr(torch, dtype)}
    output = model(**small_inputs("llama"))
    assert output.logits.dtype == getattr(torch, dtype)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_parameters(model).values())


def test_dropout_only_while_training(small_model, small_inputs):
    model, inputs = trained(small_model(), "houlsby", dropout=0.5), small_inputs()
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))


# ------------------------------------------------------------------------------------------------ which, how many

@pytest.mark.parametrize("keep, drop, left", [(None, [0, 1], {2}), ([0, 2], None, {0, 2}), (1, None, {1}),
                                              (None, 2, {0, 1}), ([0, 1], [1], {0}), (range(2), None, {0, 1})])
def test_layers_are_kept_and_dropped_by_number(keep, drop, left, small_model):
    for family in ("llama", "t5"):
        model = attach(small_model(family), AdapterConfig("houlsby", bottleneck=2, layers_to_transform=keep,
                                                          drop_layers=drop, train_layer_norms=True))
        names = [name for name, _ in adapter_layers(model)]
        number = {int(part) for name in names for part in name.replace("layers.", "block.").split("block.")[1:]
                  for part in [part.split(".")[0]]}
        assert number == left
        stacks = 2 if family == "t5" else 1
        bottlenecks = [layer for _, layer in adapter_layers(model) if hasattr(layer, "bottleneck")]
        assert len(bottlenecks) == 2 * stacks * len(left)


@pytest.mark.parametrize("placement, adapters, norm", [("houlsby", 6, 0), ("pfeiffer", 3, 0), ("parallel", 3, 0),
                                                       ("bapna", 3, 1), ("input", 1, 0), ("output", 1, 0),
                                                       ("input_output", 2, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_by_formula(family, placement, adapters, norm, small_model):
    model = attach(small_model(family), AdapterConfig(placement, reduction_factor=4))
    expected = adapters * (2 * 8 * 32 + 32 + 8 + norm * 2 * 32) * (2 if family == "t5" else 1)
    assert count_parameters(model)[0] == expected
    assert expected == count(32, 8, adapters * (2 if family == "t5" else 1), bool(norm))


def test_the_numbers_in_the_docstring():
    one = bottleneck_size(2048, 64)
    assert (one, 16 * one, 32 * one, count(2048, 64, 16, layer_norm=True), 2 * one) == \
        (264_256, 4_228_096, 8_456_192, 4_293_632, 528_512)


def test_norms_trained_too_are_those_of_the_layers_with_adapters(small_model):
    model = attach(small_model("bert"), AdapterConfig("houlsby", bottleneck=2, train_layer_norms=True, drop_layers=[0]))
    norms = {name for name, layer in adapter_layers(model) if hasattr(layer, "ln_tuning_layers")}
    assert norms == {f"bert.encoder.layer.{i}.{part}.LayerNorm" for i in (1, 2)
                     for part in ("attention.output", "output")}


def test_defaults_are_the_papers():
    model_width = 48
    assert AdapterConfig().width(model_width) == 3 and AdapterConfig(reduction_factor=100).width(model_width) == 1
    assert AdapterConfig("parallel").adapter(8).scale == 4 and AdapterConfig("houlsby").adapter(32).scale == 1
    assert AdapterConfig("bapna").adapter(32).layer_norm == "before"
    assert AdapterConfig("pfeiffer").adapter(32).layer_norm is False
    assert AdapterConfig("bapna", layer_norm=False).adapter(32).layer_norm is False
    assert AdapterConfig("parallel", scale=0.5).adapter(8).scale == 0.5
    assert AdapterConfig("parallel", scale="learned").adapter(8).scale.requires_grad


# ------------------------------------------------------------------------------------------------ other families

@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox", "phi", "roberta",
                                    "xlm-roberta", "camembert", "electra", "mt5"])
def test_the_table_fits_the_other_families_too(family):
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 61, "max_position_embeddings": 64, "head_dim": 8, "num_key_value_heads": 2,
             "pad_token_id": 0, "embedding_size": 32}
    if family == "mt5":
        model = tf.MT5ForConditionalGeneration(tf.MT5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4,
                                                            vocab_size=61, decoder_start_token_id=0)).eval()
    else:
        kind = tf.AutoModelForMaskedLM if "bert" in family or family == "electra" else tf.AutoModelForCausalLM
        model = kind.from_config(tf.AutoConfig.for_model(family, **sizes)).eval()
    assert model.config.model_type == family
    inputs = {"input_ids": torch.arange(1, 13).reshape(2, 6)} | ({"decoder_input_ids": torch.ones(2, 3).long()}
                                                                 if family == "mt5" else {})
    before = logits(model, inputs)
    for placement in PLACEMENTS:
        attach(model, AdapterConfig(placement, bottleneck=4, activation="gelu", train_layer_norms=True))
        assert torch.equal(logits(model, inputs), before), placement
        stir(model)
        output = model(**inputs).logits
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model).values()), placement
        detach(model)
        assert torch.equal(logits(model, inputs), before), placement
    if family == "qwen3":                                # the norms of queries and keys are not the layer's
        norms = {name.rsplit(".", 1)[1] for name in norms_of(model, list(layers_of(model)), 32)}
        assert norms == {"input_layernorm", "post_attention_layernorm"}
    stacks = 2 if family == "mt5" else 1
    assert len(find_sites(model, "houlsby")) == 4 * stacks and len(find_sites(model, "parallel")) == 2 * stacks


def test_a_model_of_unknown_family_says_so_and_a_row_in_the_table_is_enough(small_model, small_inputs, monkeypatch):
    model = small_model("llama")
    monkeypatch.setattr(model.config, "model_type", "my_model")
    with pytest.raises(ValueError, match="model type 'my_model'.*known are llama, mistral.*SUBLAYERS"):
        attach(model, AdapterConfig())
    monkeypatch.setitem(SUBLAYERS, "my_model", Sublayers("layers", "self_attn.o_proj", "mlp.down_proj", "mlp"))
    assert len(list(adapter_layers(attach(model, AdapterConfig("houlsby"))))) == 6
    with pytest.raises(ValueError, match="a model without a configuration"):
        attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), AdapterConfig())


# ------------------------------------------------------------------------------------------------ wrong arguments

@pytest.mark.parametrize("settings, message", [
    ({"placement": "houlby"}, "placement must be one of houlsby, pfeiffer, bapna.*got 'houlby'"),
    ({"bottleneck": 4, "reduction_factor": 16}, "give bottleneck .* or reduction_factor .* and not both"),
    ({"reduction_factor": 0}, "reduction_factor must be a number above 0; got 0"),
    ({"bottleneck": 0}, "bottleneck must be a whole number, 1 or more; got 0"),
    ({"activation": "swish"}, "activation must be one of relu.*got 'swish'"),
    ({"scale": 0.0}, "scale must be a finite number other than 0"),
    ({"dropout": 1}, "dropout must be a probability"),
    ({"layer_norm": "both"}, "layer_norm must be one of"),
    ({"init": "normal"}, "init must be one of"),
    ({"placement": "input", "drop_layers": 0}, "placement='input' has none but the first and the last"),
])
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**settings)


@pytest.mark.parametrize("settings, message", [
    ({"layers_to_transform": 3}, "layers_to_transform: there is no layer 3; the layers are 0 to 2"),
    ({"drop_layers": [1, 7]}, "drop_layers: there is no layer 7"),
    ({"drop_layers": range(3)}, "drop_layers: no layer is left"),
])
def test_layers_that_do_not_exist(settings, message, small_model):
    with pytest.raises(ValueError, match=message):
        attach(small_model(), AdapterConfig(**settings))


def test_it_cannot_be_merged_and_says_why(small_model):
    model = trained(small_model(), "houlsby")
    with pytest.raises(TypeError, match="no weight of the base layer can express.*Keep the adapter attached"):
        merge(model)
    unmerge(model)


def test_another_placement_in_the_same_module_is_refused_and_changes_nothing(small_model, small_inputs):
    inputs = small_inputs("opt")
    model = trained(small_model("opt"), "pfeiffer")
    before = logits(model, inputs)
    with pytest.raises(ValueError, match="placement='parallel'.*Use one placement for all"):
        attach(model, AdapterConfig("parallel", bottleneck=4), name="second")
    assert torch.equal(logits(model, inputs), before) and list(next(adapter_layers(model))[1].names) == ["default"]


def test_a_second_placement_beside_the_first(small_model, small_inputs):
    inputs = small_inputs()
    model = trained(small_model(dtype="float64"), "houlsby")
    alone = {}
    alone["default"] = logits(model, inputs)
    stir(attach(model, AdapterConfig("bapna", bottleneck=4), name="second"), "second", seed=2)
    other = attach(small_model(dtype="float64"), AdapterConfig("bapna", bottleneck=4), name="second")
    stir(other, "second", seed=2)
    alone["second"] = logits(other, inputs)
    for name, expected in alone.items():
        set_adapter(model, name)
        torch.testing.assert_close(logits(model, inputs), expected, **EXACT)
    detach(model)
    assert torch.equal(logits(model, inputs), logits(small_model(dtype="float64"), inputs))


@pytest.mark.parametrize("placement", ["bapna", "input_output", "houlsby"])
def test_several_in_wrapped_layers_with_wrapped_parts(placement, small_model, small_inputs):
    """A layer with an adapter, whose norms are adapters' too: the second and third find the model's own modules."""
    inputs, config = small_inputs(), AdapterConfig("bapna", bottleneck=4, train_layer_norms=True)
    third = AdapterConfig(placement, bottleneck=2)
    model = small_model(dtype="float64")
    for name, each in (("a", config), ("b", config), ("c", third), ("d", third)):
        stir(attach(model, each, name=name), name, seed=ord(name))
    for name, each in (("a", config), ("b", config), ("c", third), ("d", third)):
        other = stir(attach(small_model(dtype="float64"), each, name=name), name, seed=ord(name))
        set_adapter(model, name)
        torch.testing.assert_close(logits(model, inputs), logits(other, inputs), **EXACT)
    for name in "abc":
        delete_adapter(model, name)
    torch.testing.assert_close(logits(model, inputs), logits(other, inputs), **EXACT)
    detach(model)
    assert torch.equal(logits(model, inputs), logits(small_model(dtype="float64"), inputs)) and not own_modules(model)


@pytest.mark.parametrize("placement", ["parallel", "bapna"])
def test_two_threads_at_once(placement, small_model):
    from concurrent.futures import ThreadPoolExecutor

    model = trained(small_model("opt"), placement)
    texts = [torch.full((1, 8), i) for i in range(1, 9)]
    alone = [logits(model, {"input_ids": ids}) for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ids: logits(model, {"input_ids": ids}), texts * 5))
    assert all(torch.equal(got, alone[i % 8]) for i, got in enumerate(together))


def test_a_wrapper_that_was_never_put_in_changes_nothing(small_model, small_inputs):
    for family, placement in (("llama", "bapna"), ("opt", "parallel")):
        model, inputs = small_model(family), small_inputs(family)
        before, config = logits(model, inputs), AdapterConfig(placement, bottleneck=4)
        for base in config.targets(model).values():
            layer = config.build(base)
            with torch.no_grad():
                for parameter in layer.adapter_parameters().values():
                    parameter += 1
        assert torch.equal(logits(model, inputs), before)


def test_the_last_projection_alone_cannot_know_what_the_first_was_given(small_model):
    model = trained(small_model("opt"), "parallel")
    with pytest.raises(RuntimeError, match="was not called before this one"):
        model.model.decoder.layers[0].fc2(torch.zeros(2, 48))


@pytest.mark.filterwarnings("ignore")
def test_peft_refuses_our_file_clearly(small_model, tmp_path):
    from peft import PeftModel

    save_adapter(trained(small_model(), "houlsby"), tmp_path)
    with pytest.raises((KeyError, ValueError, TypeError), match="BOTTLENECK"):
        PeftModel.from_pretrained(small_model(), str(tmp_path))


def test_a_file_of_another_model_is_refused(small_model, tmp_path):
    save_adapter(trained(small_model(), "houlsby"), tmp_path)
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(small_model(hidden=48), tmp_path)
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(small_model(layers=2), tmp_path)


def test_a_configuration_without_its_model_says_what_to_do():
    with pytest.raises(ValueError, match=r"placement='parallel' does with a Linear.*config.targets\(model\) first"):
        AdapterConfig("parallel").build(torch.nn.Linear(4, 4))
    layer = AdapterConfig("houlsby", bottleneck=2).build(torch.nn.Linear(3, 6))
    assert layer.bottleneck["default"].d_model == 6
    assert AdapterConfig("houlsby", bottleneck=2).shapes(torch.nn.Linear(3, 6)) == {
        "bottleneck.down.weight": (2, 6), "bottleneck.down.bias": (2,), "bottleneck.up.weight": (6, 2),
        "bottleneck.up.bias": (6,)}
