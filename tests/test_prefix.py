"""Prefix tuning: attention written out, the prefix's layout, its starts and its MLP. Whole models: test_virtual.py."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.inject import attach, count_parameters, detach, disabled, trainable
from pefttools.prefix import (PrefixTuning, PrefixTuningConfig, join_prefix, prefix_attention, prefix_count,
                              prefix_of_text, split_prefix)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def tensors(B, H, H_kv, T, S, P, d_h, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, H, T, d_h), (B, H_kv, S, d_h), (B, H_kv, S, d_h), (P, H_kv, d_h), (P, H_kv, d_h))
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


def by_sdpa(q, k, v, prefix_k, prefix_v, causal):
    B, P = len(q), len(prefix_k)
    K, V = (torch.cat([p.permute(1, 0, 2)[None].expand(B, -1, -1, -1), t], dim=2)
            for p, t in ((prefix_k, k), (prefix_v, v)))
    T, S = q.shape[2], k.shape[2]
    mask = torch.ones(T, P + S, dtype=torch.bool)
    if causal:
        mask[:, P:] = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return F.scaled_dot_product_attention(q, K, V, attn_mask=mask, enable_gqa=True)


# ------------------------------------------------------------------------------------------------ the functions

@settings(max_examples=60, deadline=None)
@given(B=st.integers(1, 3), H_kv=st.integers(1, 3), groups=st.integers(1, 3), T=st.integers(1, 5),
       earlier=st.integers(0, 3), P=st.integers(0, 4), d_h=st.integers(1, 8), causal=st.booleans())
def test_attention_with_a_prefix_is_attention_over_more_keys(B, H_kv, groups, T, earlier, P, d_h, causal):
    given_ = tensors(B, H_kv * groups, H_kv, T, T + earlier, P, d_h)
    got = prefix_attention(*given_, causal=causal)
    torch.testing.assert_close(got, by_sdpa(*given_, causal), rtol=1e-6, atol=1e-6)


def test_it_is_an_average_over_the_prefix_and_the_words_with_no_prefix_none():
    q, k, v, prefix_k, prefix_v = tensors(2, 4, 2, 3, 3, 5, 8)
    torch.testing.assert_close(prefix_attention(q, k, v, prefix_k[:0], prefix_v[:0]),
                               F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    # the first word sees itself and the whole prefix: one average of all those values
    one = prefix_attention(q[:, :, :1] * 0, k[:, :, :1], v[:, :, :1], prefix_k, prefix_v)
    mean = (prefix_v.sum(0)[None] + v[:, :, 0]) / 6
    torch.testing.assert_close(one[:, :, 0], mean.repeat_interleave(2, dim=1))


def test_gradcheck_in_float64():
    given_ = [t.requires_grad_() for t in tensors(1, 4, 2, 3, 4, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(prefix_attention, given_)
    assert torch.autograd.gradcheck(lambda *t: prefix_attention(*t, causal=False, scale=0.3), given_)


@pytest.mark.parametrize("change, message", [
    ({"prefix_k": (5, 4, 8)}, r"as many heads as the keys.*\[5, 4, 8\]"), ({"prefix_v": (4, 2, 8)}, r"\[4, 2, 8\]"),
    ({"q": (2, 3, 3, 8)}, "H a multiple of H_kv"), ({"q": (2, 4, 9, 8)}, "S ≥ T"), ({"v": (2, 2, 4, 8)}, "k and v")])
def test_shapes_that_do_not_fit_are_named(change, message):
    given_ = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), tensors(2, 4, 2, 3, 3, 5, 8)))
    with pytest.raises(ValueError, match=message):
        prefix_attention(**(given_ | {name: torch.randn(*shape) for name, shape in change.items()}))


def test_the_layout_is_pefts():
    flat = torch.arange(2 * 3 * 2 * 4 * 5).float().view(2, -1)
    pairs = split_prefix(flat, 3, 4, 5)
    # peft_model.py, get_prompt: view, permute, split
    theirs = flat[None].view(1, 2, 6, 4, 5).permute([2, 0, 3, 1, 4]).split(2)
    for (k, v), both in zip(pairs, theirs, strict=True):
        assert torch.equal(k.transpose(0, 1), both[0, 0]) and torch.equal(v.transpose(0, 1), both[1, 0])
    assert torch.equal(join_prefix(pairs), flat)


# ------------------------------------------------------------------------------------------------ in a model

@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_of_a_real_layer_is_the_function(implementation, small_model, small_inputs):
    """The first layer of a Llama with a prefix: its output before W_o, from its own q, k and v."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = small_model("llama")
    model.set_attn_implementation(implementation)
    attach(model, PrefixTuningConfig(5), seed=1)
    attention, seen = model.model.layers[0].self_attn, {}
    attention.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    attention.o_proj.register_forward_pre_hook(lambda m, args: seen.update(output=args[0]))
    model(**small_inputs("llama"))
    x = seen["hidden_states"]
    q, k, v = (getattr(attention, name)(x).unflatten(-1, (-1, 8)).transpose(1, 2)
               for name in ("q_proj", "k_proj", "v_proj"))
    q, k = apply_rotary_pos_emb(q, k, *seen["position_embeddings"])
    P_k, P_v = model.prompt_encoder["default"].keys_and_values()[0]
    expected = prefix_attention(q, k, v, P_k, P_v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["output"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_a_prefix_of_a_text_is_the_text(family, small_model):
    """Started from a real text, the prefix does exactly what the text in front of the input does."""
    model = small_model(family)
    text, ids = [5, 9, 2, 7], torch.tensor([[1, 2, 3, 4], [8, 8, 1, 0]])
    expected = model(torch.cat([torch.tensor([text, text]), ids], dim=1)).logits[:, 4:]
    attach(model, PrefixTuningConfig(4, init="text", text=text))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)
    attach(model, PrefixTuningConfig(4, init="text", text=text), name="second")      # while another one acts
    weights = [model.prompt_encoder[name].embedding.weight for name in ("default", "second")]
    assert torch.equal(*weights)


def test_started_from_text_as_peft_does(small_model):
    from peft import PrefixTuningConfig as Theirs
    from peft import get_peft_model
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    text = [5, 9, 2, 7, 1]
    base = small_model("llama")
    cache = base(torch.tensor([text])).past_key_values
    theirs = get_peft_model(base, Theirs(task_type="CAUSAL_LM", num_virtual_tokens=4))
    expected = initialize_kv_prefix_from_past_key_values(
        theirs, past_key_values=[(layer.keys, layer.values) for layer in cache.layers])
    torch.testing.assert_close(prefix_of_text(small_model("llama"), text[:4]), expected, rtol=1e-6, atol=1e-7)


def test_the_other_starts_are_pefts(small_model):
    from peft import PrefixTuningConfig as Theirs
    from peft import get_peft_model

    zero = attach(small_model("llama"), PrefixTuningConfig(5, init="zero"))
    theirs = get_peft_model(small_model("llama"), Theirs(task_type="CAUSAL_LM", num_virtual_tokens=5,
                                                         init_weights="zero")).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert not zero.prompt_encoder["default"]().any() and torch.equal(zero(ids).logits, theirs(ids).logits)
    with disabled(zero):       # keys of zero still take attention from the words: no no-op, whatever it is called
        assert not torch.allclose(zero(ids).logits, theirs(ids).logits)
    projected = attach(small_model("llama"), PrefixTuningConfig(5, init="zero", projection=True))
    encoder = projected.prompt_encoder["default"]
    assert not encoder().any() and encoder.embedding.weight.any()
    random = PrefixTuning(small_model("llama").config, 200).embedding.weight
    assert abs(random.std() - 1) < 0.02 and abs(random.mean()) < 0.02


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_mlp_is_folded_away(family, small_model, small_inputs, tmp_path):
    model = attach(small_model(family), PrefixTuningConfig(4, projection=True, hidden=8))
    inputs, encoder = small_inputs(family), model.prompt_encoder["default"]
    d, L = (16 if family == "llama" else 32), 3
    assert count_parameters(model)[0] == prefix_count(4, L, d // 8, 8, hidden=8) == 4 * d + (d + 1) * 8 + 9 * L * 2 * d
    before = model(**inputs).logits
    folder = save_adapter(model, tmp_path / "unfolded")
    encoder.fold()
    assert torch.equal(model(**inputs).logits, before)
    assert count_parameters(model)[0] == prefix_count(4, L, d // 8, 8) == 4 * L * 2 * d
    assert set(trainable(model)) == {"prompt_encoder.default.embedding.weight"}
    weight = encoder.embedding.weight
    encoder.fold()
    assert encoder.embedding.weight is weight
    loaded = load_adapter(small_model(family), folder)
    torch.testing.assert_close(loaded(**inputs).logits, before)
    model(**inputs).loss.backward()
    assert weight.grad.any()


def test_gradients_through_the_mlp_in_float64(small_model):
    module = PrefixTuning(small_model("llama").config, 2, hidden=3).double()
    names, values = zip(*((name, p.detach().clone().requires_grad_()) for name, p in module.named_parameters()))
    assert torch.autograd.gradcheck(lambda *v: torch.func.functional_call(module, dict(zip(names, v)), ()), values)


def test_encoder_decoders_read_every_other_part_as_in_peft(small_model, small_inputs):
    model = attach(small_model("t5", layers=4), PrefixTuningConfig(2))
    assert model.prompt_encoder["default"].order == [0, 2, 0, 2]
    model(**small_inputs("t5")).loss.backward()
    grad = model.prompt_encoder["default"].embedding.weight.grad.view(2, 4, -1)
    assert grad[:, [0, 2]].any(-1).all() and not grad[:, [1, 3]].any()
    detach(model)
    attach(model, PrefixTuningConfig(2, num_transformer_submodules=1))
    assert model.prompt_encoder["default"].order == [0, 1, 2, 3]
    model(**small_inputs("t5")).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.view(2, 4, -1).any(-1).all()


def test_head_dimensions_that_are_not_the_width_over_the_heads():
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=12, vocab_size=61)
    model = attach(tf.LlamaForCausalLM(config).eval(), PrefixTuningConfig(3))
    assert model.prompt_encoder["default"].embedding.weight.shape == (3, 2 * 2 * 2 * 12)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0, eos_token_id=None).shape == (1, 4)


def test_a_sliding_window_is_kept(small_model):
    """Where attention sees only the last w positions, the prefix is what lies before the text, and slides out."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.MistralConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, vocab_size=61, sliding_window=6)
    model = tf.MistralForCausalLM(config).eval()
    text, ids = [5, 9, 2, 7], torch.tensor([[1, 2, 3, 4, 5]])
    expected = model(torch.cat([torch.tensor([text]), ids], dim=1)).logits[:, 4:]
    attach(model, PrefixTuningConfig(4, init="text", text=text))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options, message", [
    ({"length": 0}, "length must be"), ({"init": "vocab"}, "init must be one of random, zero, text"),
    ({"init": "text"}, "go together"), ({"init": "text", "text": [1], "projection": True}, "Leave out one")])
def test_settings_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixTuningConfig(**options)


def test_a_text_needs_a_causal_cache(small_model):
    for family in ("bert", "t5"):
        with pytest.raises(ValueError, match="causal cache"):
            attach(small_model(family), PrefixTuningConfig(2, init="text", text=[1]))


def test_the_numbers_in_the_module_docstring():
    assert prefix_count(20, 16, 8, 64) == 327_680 and round(100 * 327_680 / 1_235_814_400, 3) == 0.027
    assert prefix_count(20, 16, 32, 64) == 4 * 327_680
    assert prefix_count(20, 16, 8, 64, hidden=512) == 8_677_888


def test_the_public_names_are_here():
    from pefttools import prefix

    assert prefix.PromptTuning.__module__ == "pefttools.prompt"
    assert prefix.LlamaAdapter.__module__ == "pefttools.llama_adapter"
    with pytest.raises(AttributeError, match="nothing_such"):
        prefix.nothing_such  # noqa: B018
