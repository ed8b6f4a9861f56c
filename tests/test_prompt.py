"""Prompt tuning: the functions, the ways to start, the numbers of the docstring. Whole models: test_virtual.py."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pefttools.inject import adapter_parameters, attach, count_parameters, detach
from pefttools.prompt import PromptTuning, PromptTuningConfig, prompt_init, soft_prompt
from pefttools.virtual_config import tiled

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=30, deadline=None)
@given(B=st.integers(0, 3), T=st.integers(0, 5), P=st.integers(1, 5), d=st.integers(1, 6))
def test_a_soft_prompt_is_in_front_of_every_row(B, T, P, d):
    embeds, prompt = torch.randn(B, T, d), torch.randn(P, d)
    joined = soft_prompt(embeds, prompt)
    assert joined.shape == (B, P + T, d) and torch.equal(joined[:, P:], embeds)
    assert all(torch.equal(row[:P], prompt) for row in joined)


def test_in_the_dtype_of_the_words_and_wrong_widths_are_named():
    embeds = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert soft_prompt(embeds, torch.randn(2, 4)).dtype == torch.bfloat16
    strided = embeds.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(soft_prompt(strided, torch.ones(2, 4))[:, 2:], embeds)
    with pytest.raises(ValueError, match=r"\[B, T, d\].*\[2, 3, 4\] and \[2, 5\]"):
        soft_prompt(embeds, torch.randn(2, 5))
    with pytest.raises(ValueError, match="embeds must be"):
        soft_prompt(embeds[0], torch.randn(2, 4))


def test_gradcheck_in_float64():
    embeds, prompt = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (2, 4)))
    assert torch.autograd.gradcheck(soft_prompt, (embeds, prompt))
    module = PromptTuning(prompt.detach())
    assert torch.autograd.gradcheck(
        lambda p: torch.func.functional_call(module, {"embedding.weight": p}, ()) ** 2, (prompt,))


def test_a_prompt_of_words_is_the_words(small_model):
    """What a soft prompt computes at word embeddings is what the model computes for those words."""
    model = small_model("llama")
    words, ids = [7, 3, 9, 3], torch.tensor([[1, 2, 3, 4, 5]])
    expected = model(torch.cat([torch.tensor([words]), ids], dim=1)).logits
    attach(model, PromptTuningConfig(4, init="text", text=words))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_the_ways_to_start(small_model):
    words = small_model("llama").get_input_embeddings().weight
    g = torch.Generator().manual_seed(0)
    random = prompt_init(words, 500, "random", generator=g)
    assert random.dtype == torch.float32 and abs(random.std() - 1) < 0.02 and abs(random.mean()) < 0.02
    vocabulary = prompt_init(words, 40, "vocab", generator=g)
    rows = {tuple(row.tolist()) for row in words.detach()}
    assert all(tuple(row.tolist()) in rows for row in vocabulary) and len(vocabulary.unique(dim=0)) > 10
    assert not prompt_init(words, 3, "zero").any()
    text = prompt_init(words, 5, "text", ids=[4, 8])
    assert torch.equal(text, words.detach()[[4, 8, 4, 8, 4]])
    assert torch.equal(prompt_init(words, 1, "text", ids=[4, 8]), words.detach()[[4]])
    assert prompt_init(words.bfloat16(), 2, "vocab").dtype == torch.float32
    assert tiled([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1] and tiled((5,), 2) == [5, 5]
    with pytest.raises(ValueError, match="no tokens"):
        tiled([], 3)


@pytest.mark.filterwarnings("ignore")
def test_started_from_text_as_peft_does(tmp_path):
    from peft import PromptTuningConfig as Theirs
    from peft import get_peft_model

    from pefttools.lab import load_base
    from pefttools.lab.base import TINY

    text = "Write a Python function."
    base = load_base("tiny")
    ours = attach(base.model, PromptTuningConfig(9, init="text", text=text, tokenizer=base.tokenizer))
    theirs = get_peft_model(load_base("tiny").model, Theirs(
        task_type="CAUSAL_LM", num_virtual_tokens=9, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(TINY)))
    assert torch.equal(*(model.prompt_encoder["default"].embedding.weight for model in (ours, theirs)))


@pytest.mark.filterwarnings("ignore")
def test_random_is_pefts_distribution(small_model):
    from peft import PromptTuningConfig as Theirs
    from peft import get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(small_model("llama"), Theirs(task_type="CAUSAL_LM", num_virtual_tokens=300))
    ours = attach(small_model("llama"), PromptTuningConfig(300))
    a, b = (m.prompt_encoder["default"].embedding.weight.detach().flatten().sort().values for m in (ours, theirs))
    assert (a - b)[200:-200].abs().max() < 0.08          # quantile by quantile


def test_encoder_decoders_have_twice_the_rows_as_in_peft_and_half_of_them_learn(small_model, small_inputs):
    model = attach(small_model("t5"), PromptTuningConfig(4))
    assert model.prompt_encoder["default"].embedding.weight.shape == (8, 32)
    model(**small_inputs("t5")).loss.backward()
    grad = model.prompt_encoder["default"].embedding.weight.grad
    assert grad[:4].any(dim=1).all() and not grad[4:].any()
    detach(model)
    attach(model, PromptTuningConfig(4, num_transformer_submodules=1))
    assert model.prompt_encoder["default"].embedding.weight.shape == (4, 32)
    with pytest.raises(ValueError, match="encoder–decoder"):
        attach(small_model("llama"), PromptTuningConfig(4, num_transformer_submodules=2))


def test_embeddings_narrower_than_the_model(small_model):
    """OPT may embed words in fewer dimensions than it computes in; peft takes the wrong width there."""
    import transformers as tf

    torch.manual_seed(0)
    model = tf.OPTForCausalLM(tf.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=61, word_embed_proj_dim=16,
        max_position_embeddings=64)).eval()
    attach(model, PromptTuningConfig(3))
    assert model.prompt_encoder["default"].embedding.weight.shape == (3, 16)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 5, 61)


def test_float64_stays_and_sixteen_bits_train_in_float32(small_model):
    for dtype, expected in (("float64", torch.float64), ("bfloat16", torch.float32)):
        model = attach(small_model("llama", dtype), PromptTuningConfig(3))
        assert {p.dtype for p in adapter_parameters(model).values()} == {expected}
        assert model(torch.tensor([[1, 2]])).logits.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("options, message", [
    ({"length": 0}, "length must be a whole number"), ({"length": 2.5}, "2.5"), ({"length": True}, "True"),
    ({"init": "words"}, "init must be one of random, vocab, text, zero"), ({"init": "text"}, "go together"),
    ({"text": "a"}, "go together"), ({"num_transformer_submodules": 3}, "1, 2 or None")])
def test_settings_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PromptTuningConfig(**options)


def test_a_text_without_a_tokenizer_leaves_the_model_alone(small_model):
    model = small_model("llama")
    with pytest.raises(ValueError, match="tokenizer"):
        attach(model, PromptTuningConfig(3, init="text", text="a b c"))
    assert not hasattr(model, "prompt_encoder") and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no tokens"):
        attach(model, PromptTuningConfig(3, init="text", text=[]))


def test_the_numbers_in_the_module_docstring(small_model):
    assert 20 * 2048 == 40_960 and round(100 * 40_960 / 1_235_814_400, 3) == 0.003
    model = attach(small_model("llama"), PromptTuningConfig(20))
    assert count_parameters(model)[0] == 20 * 32
    assert isinstance(model.prompt_encoder["default"].embedding, nn.Embedding)
