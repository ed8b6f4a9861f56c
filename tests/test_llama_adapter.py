"""LLaMA-Adapter: the gated prefix, against peft's AdaptionPrompt, and the zero start."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.inject import (adapter_parameters, attach, count_parameters, delete_adapter, detach, disabled, merge,
                              set_adapter, trainable)
from pefttools.llama_adapter import LlamaAdapter, LlamaAdapterConfig, gated_prefix, rotate

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
FAMILIES = ("llama", "mistral", "gpt2")      # those that peft has


@pytest.fixture
def model_of(small_model):
    def make(family, dtype="float32"):
        import transformers as tf

        if family != "mistral":
            return small_model(family, dtype)
        torch.manual_seed(0)
        return tf.MistralForCausalLM(tf.MistralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=61, sliding_window=None)).to(getattr(torch, dtype)).eval()

    return make


def theirs_of(model, length=5, layers=2):
    from peft import AdaptionPromptConfig, get_peft_model

    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=length, adapter_layers=layers)
    return get_peft_model(model, config).eval()


def open_gates(model, gate=0.7):
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "gate" in name:
                parameter.fill_(gate)
    return model


@pytest.fixture
def pair(model_of):
    """pair(family) → (ours, peft's), with the same prompts and open gates."""
    def make(family, dtype="float32"):
        base = model_of(family, dtype)
        theirs = theirs_of(copy.deepcopy(base))
        ours = open_gates(attach(base, LlamaAdapterConfig(5, 2), seed=1))
        its = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, parameter in adapter_parameters(ours).items():
                its[counterpart(name)].copy_(parameter)
        return ours, theirs

    return make


def counterpart(name):
    return "base_model.model." + name.replace(".default", "")


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# ------------------------------------------------------------------------------------------------ the functions

@settings(max_examples=30, deadline=None)
@given(B=st.integers(0, 2), H_kv=st.integers(1, 2), groups=st.integers(1, 3), T=st.integers(0, 4), P=st.integers(1, 4),
       d_h=st.integers(1, 6), g=st.floats(-2, 2), tanh=st.booleans())
def test_it_is_attention_over_the_prefix_alone_times_the_gate(B, H_kv, groups, T, P, d_h, g, tanh):
    q, k, v = (torch.randn(*shape, dtype=torch.float64)
               for shape in ((B, H_kv * groups, T, d_h), (P, H_kv, d_h), (P, H_kv, d_h)))
    gate = torch.tensor([g], dtype=torch.float64)
    got = gated_prefix(q, k, v, gate, tanh)
    K, V = (t.transpose(0, 1).expand(B, -1, -1, -1) for t in (k, v))
    expected = F.scaled_dot_product_attention(q, K, V, enable_gqa=True) * (gate.tanh() if tanh else gate)
    torch.testing.assert_close(got, expected)


def test_gradcheck_in_float64():
    q, k, v = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
               for shape in ((1, 4, 2, 3), (3, 2, 3), (3, 2, 3)))
    gate = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    for tanh in (False, True):
        assert torch.autograd.gradcheck(lambda *t, tanh=tanh: gated_prefix(*t, tanh), (q, k, v, gate))


def test_positions_are_rotated_as_in_llama():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, cos, sin = torch.randn(2, 4, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert torch.equal(rotate(q, cos, sin), apply_rotary_pos_emb(q, q, cos, sin)[0])


# ------------------------------------------------------------------------------------------------ against peft

@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_pefts(family, pair, small_inputs):
    ours, theirs = pair(family)
    inputs = small_inputs("llama")
    got, expected = ours(**inputs), theirs(**inputs)
    assert relative(got.logits, expected.logits) <= 1e-6
    with disabled(ours):
        assert relative(ours(**inputs).logits, expected.logits) > 0.05
    got.loss.backward(), expected.loss.backward()
    its = dict(theirs.named_parameters())
    for name, parameter in adapter_parameters(ours).items():
        assert parameter.grad.any() and relative(parameter.grad, its[counterpart(name)].grad) <= 2e-6, name
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    assert set(trainable(ours)) == set(adapter_parameters(ours))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_dtypes_are_pefts(family, dtype, pair, small_inputs):
    ours, theirs = pair(family, dtype)
    inputs = small_inputs("llama")
    got, expected = ours(**inputs).logits, theirs(**inputs).logits
    assert got.dtype == expected.dtype == getattr(torch, dtype)
    assert relative(got.float(), expected.float()) <= 1e-2
    its = {p.dtype for name, p in theirs.named_parameters() if "adaption" in name}
    assert {p.dtype for p in adapter_parameters(ours).values()} == its


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_are_pefts_with_and_without_cache(family, pair, small_inputs):
    ours, theirs = pair(family)
    ids, mask = small_inputs("llama")["input_ids"], torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 60,
               "do_sample": True, "temperature": 0.5}
    results = []
    for model, extra in ((ours, {}), (theirs, {}), (ours, {"use_cache": False})):
        torch.manual_seed(0)
        results.append(model.generate(**options, **extra))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert len(set(results[0][:, 12:].flatten().tolist())) > 4


@pytest.mark.parametrize("family", FAMILIES)
def test_files_load_in_peft_and_the_other_way_round(family, pair, model_of, small_inputs, tmp_path):
    from peft import PeftModel

    ours, theirs = pair(family)
    inputs = small_inputs("llama")
    expected = theirs(**inputs).logits
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(model_of(family), tmp_path / "ours").eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    for folder in ("ours", "theirs"):
        model = load_adapter(model_of(family), tmp_path / folder)
        assert relative(model(**inputs).logits, expected) <= 1e-6
        load_adapter(model, tmp_path / folder)                            # over itself


# ------------------------------------------------------------------------------------------------ in, out, on, off

@pytest.mark.parametrize("family", (*FAMILIES, "qwen2"))
def test_it_starts_as_the_base_model_exactly_and_leaves_it_so(family, model_of, small_inputs):
    model = model_of(family)
    inputs = small_inputs("llama")
    with torch.no_grad():
        before = model(**inputs).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attach(model, LlamaAdapterConfig(5, 2))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    model(**inputs).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad.any() == ("gate" in name), name             # at g = 0 the gate learns first
    open_gates(model)
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, before)
        with disabled(model):
            assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(TypeError, match="cannot be merged"):
        merge(model)
    detach(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], value) for name, value in state.items())


def test_only_the_top_layers_are_wrapped(small_model):
    model = attach(small_model("llama"), LlamaAdapterConfig(4, 2))
    assert [isinstance(layer.self_attn, LlamaAdapter) for layer in model.model.layers] == [False, True, True]
    assert set(adapter_parameters(model)) == {f"model.layers.{i}.self_attn.{what}.default" for i in (1, 2)
                                              for what in ("adaption_prompt", "adaption_gate")}


def test_a_row_generates_the_same_alone_and_beside_a_longer_one(small_model, small_inputs):
    model = open_gates(attach(small_model("llama"), LlamaAdapterConfig(5, 3)), 5.0)
    ids, mask = small_inputs("llama")["input_ids"], torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"max_new_tokens": 1, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(input_ids=ids, attention_mask=mask, **options).logits[0][0]
    alone = model.generate(input_ids=ids[:1, 5:], **options).logits[0][0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_several_adapters_add_up_with_their_weights(small_model, small_inputs):
    model = open_gates(attach(small_model("llama", "float64"), LlamaAdapterConfig(3, 1), seed=1))
    ids = small_inputs("llama")["input_ids"]
    attach(model, LlamaAdapterConfig(6, 1), seed=2, name="second")
    open_gates(model)
    first = model(ids).logits
    seen = []
    model.model.layers[2].self_attn.register_forward_hook(lambda m, a, k, out: seen.append(out[0]), with_kwargs=True)
    for weights in ({"default": 1.0}, {"second": 1.0}, {"default": 0.25, "second": 2.0}):
        set_adapter(model, weights)
        model(ids)
    with disabled(model):
        model(ids)
    one, two, both, none = seen
    torch.testing.assert_close(both - none, 0.25 * (one - none) + 2 * (two - none))
    set_adapter(model, "default")
    assert torch.equal(model(ids).logits, first)
    delete_adapter(model, "second")
    assert model.model.layers[2].self_attn.names == ["default"]


def test_the_authors_gate_saves_as_one_that_peft_reads(small_model, small_inputs, tmp_path):
    from peft import PeftModel

    inputs = small_inputs("llama")
    model = open_gates(attach(small_model("llama"), LlamaAdapterConfig(5, 2, tanh=True)), 0.8)
    expected = model(**inputs).logits
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(small_model("llama"), tmp_path).eval()
    assert relative(loaded(**inputs).logits, expected) <= 1e-6
    gates = [p for name, p in adapter_parameters(model).items() if "gate" in name]
    load_adapter(model, tmp_path)
    assert torch.allclose(gates[0], torch.tensor([0.8])) and relative(model(**inputs).logits, expected) <= 1e-5
    save_adapter(open_gates(attach(small_model("llama"), LlamaAdapterConfig(5, 2)), 1.5), tmp_path)
    with pytest.raises(ValueError, match="which no tanh"):
        load_adapter(model, tmp_path)


def test_checkpointing_gives_the_same_gradients(small_model, small_inputs):
    model = open_gates(attach(small_model("llama"), LlamaAdapterConfig(5, 2))).train()
    grads = []
    for on in (False, True):
        model.gradient_checkpointing_enable() if on else None
        model(**small_inputs("llama")).loss.backward()
        grads.append([p.grad.clone() for p in trainable(model).values()])
        model.zero_grad()
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_wrong_models_and_settings_are_named(small_model):
    for family in ("bert", "t5", "opt"):
        with pytest.raises(ValueError, match=f"{family}.*Prefix tuning"):
            attach(small_model(family), LlamaAdapterConfig())
    with pytest.raises(ValueError, match="layers=8, but this model has 3"):
        attach(small_model("llama"), LlamaAdapterConfig())
    for options in ({"length": 0}, {"layers": 0}, {"layers": 1.5}):
        with pytest.raises(ValueError, match="whole number"):
            LlamaAdapterConfig(**options)
    with pytest.raises(TypeError, match="got Linear"):
        LlamaAdapter(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="whole self-attention"):
        LlamaAdapterConfig.from_peft({"adapter_len": 1, "adapter_layers": 1, "target_modules": "mlp"})


def test_trains_in_the_laboratory():
    from pefttools.lab import held_out_loss, load_base, load_data, train

    base = load_base("tiny")
    attach(base.model, LlamaAdapterConfig(8, 2))
    rows = list(load_data("train"))[:4]
    before = held_out_loss(base.model, base.tokenizer, rows)
    train(base.model, rows, base.tokenizer, steps=6, lr=3e-2, batch_size=4, progress=False)
    assert held_out_loss(base.model, base.tokenizer, rows) < before


def test_the_numbers_in_the_module_docstring():
    assert 8 * (10 * 2048 + 1) == 163_848 and round(100 * 163_848 / 1_235_814_400, 3) == 0.013
