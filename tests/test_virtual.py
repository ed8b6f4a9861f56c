"""Virtual tokens in whole models: prompt tuning, P-tuning and prefix tuning, against peft, in six families.

What peft 0.21.2 does with transformers 5.23, and this library with it (made by the tests below; "=": equal to peft):

             forward + gradients     generate: greedy, sampling, beams, left padding     generate(use_cache=False)
    llama    =                       =                                                   =  (peft's prefix: raises)
    qwen2    =                       =                                                   =
    gpt2     =                       =                                                   =
    opt      =                       =                                                   =  (peft's prefix: raises)
    bert     =  (as FEATURE_EXTRACTION; peft's TOKEN_CLS does not widen the labels)      –
    t5       =  (prompt: at the encoder; prefix: at the decoder)   =                     =  (peft's prefix: first token)

Ours without the cache gives the tokens that it gives with it, everywhere.
"""
from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from pefttools.checkpoint import load_adapter, save_adapter
from pefttools.inject import (adapter_parameters, attach, count_parameters, delete_adapter, detach, disabled, merge,
                              set_adapter, trainable, unmerge)
from pefttools.prefix import PrefixTuningConfig
from pefttools.prompt import PromptTuningConfig
from pefttools.ptuning import PTuningConfig
from pefttools.virtual import VirtualTokens
from pefttools.virtual_inputs import by_name, shift_positions, widen, widen_mask

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bert", "t5")
DECODERS = FAMILIES[:4]
P = 5
OURS = {"prompt": PromptTuningConfig(P), "mlp": PTuningConfig(P, hidden=16),
        "lstm": PTuningConfig(P, hidden=16, kind="LSTM"), "prefix": PrefixTuningConfig(P),
        "projected": PrefixTuningConfig(P, projection=True, hidden=16)}
TASK = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}
PEFT_FAILS_WITHOUT_CACHE = {(family, method) for family in ("llama", "opt") for method in ("prefix", "projected")}


def config_of(method, **options):
    """A configuration of its own for each model: `install` notes the model's dimensions in it."""
    return copy.deepcopy(OURS[method]) if not options else type(OURS[method])(**(vars(OURS[method]) | options))


def peft_config(method, family):
    import peft

    task = {"task_type": TASK.get(family, "CAUSAL_LM"), "num_virtual_tokens": P}
    return {"prompt": lambda: peft.PromptTuningConfig(**task),
            "mlp": lambda: peft.PromptEncoderConfig(**task, encoder_hidden_size=16),
            "lstm": lambda: peft.PromptEncoderConfig(**task, encoder_hidden_size=16,
                                                     encoder_reparameterization_type="LSTM"),
            "prefix": lambda: peft.PrefixTuningConfig(**task),
            "projected": lambda: peft.PrefixTuningConfig(**task, prefix_projection=True, encoder_hidden_size=16),
            }[method]()


def sharp(model):
    """Larger weights: a small random model repeats one token for ever, and then any two generations are equal."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                words = model.config.model_type == "t5" and name in ("shared.weight", "lm_head.weight")
                parameter.mul_(0.1 if words else 6.0)       # T5 begins with embeddings of variance 1
    return model


@pytest.fixture
def pair(small_model):
    """pair(family, method) → (model with our adapter, peft's model with the same numbers)."""
    def make(family, method, dtype="float32"):
        from peft import get_peft_model

        base = sharp(small_model(family, dtype, tied=family != "t5"))
        theirs = get_peft_model(copy.deepcopy(base), peft_config(method, family)).eval()
        options = {} if method in ("prefix", "projected") else {"count_padding": True}
        ours = attach(base, config_of(method, **options))
        ours.prompt_encoder["default"].load_state_dict(theirs.prompt_encoder["default"].state_dict())
        return ours, theirs

    return make


def inputs_of(family, small_inputs):
    inputs = small_inputs(family)
    return {key: value for key, value in inputs.items() if not (family == "bert" and key == "labels")}


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# ------------------------------------------------------------------------------------------------ the pieces

def test_masks_are_widened_once_and_wrong_ones_are_named():
    mask = torch.tensor([[0, 1, 1]])
    assert widen_mask(mask, 5, 2).tolist() == [[1, 1, 0, 1, 1]] and widen_mask(mask, 5, 2).dtype == mask.dtype
    assert widen_mask(widen_mask(mask, 5, 2), 5, 2).tolist() == [[1, 1, 0, 1, 1]]
    assert widen_mask(None, 5, 2) is None
    with pytest.raises(ValueError, match="cannot go on from a cache"):
        widen_mask(mask, 3, 2, whole=False)
    with pytest.raises(ValueError, match=r"must cover the 4 positions of the text.*6"):
        widen_mask(mask, 6, 2)
    with pytest.raises(ValueError, match="plain attention_mask"):
        widen_mask(torch.ones(1, 1, 3, 3), 5, 2)
    with pytest.raises(ValueError, match="dict"):
        widen_mask({"full_attention": mask}, 5, 2)


def test_labels_and_positions():
    assert widen(torch.tensor([[7, 8]]), 2, -100).tolist() == [[-100, -100, 7, 8]]
    positions = torch.tensor([[0, 0, 1], [0, 1, 2]])
    assert shift_positions(positions, 2, insert=True).tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 3, 4]]
    assert shift_positions(positions, 2, insert=False).tolist() == [[2, 2, 3], [2, 3, 4]]
    assert shift_positions(positions.expand(3, 2, 3), 2, insert=True).shape == (3, 2, 5)


def test_arguments_by_position_and_by_name(small_model):
    model = small_model("llama")
    ids = torch.zeros(1, 2)
    assert by_name(model, (ids,), {"labels": None}) == {"input_ids": ids, "labels": None}
    assert set(by_name(model, (ids, ids), {})) == {"input_ids", "attention_mask"}


# ------------------------------------------------------------------------------------------------ against peft

@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_pefts(family, method, pair, small_inputs):
    ours, theirs = pair(family, method)
    inputs = inputs_of(family, small_inputs)
    got, expected = ours(**inputs), theirs(**inputs)
    assert torch.equal(got.logits, expected.logits)
    if family != "bert":
        assert torch.equal(got.loss, expected.loss)
    with disabled(ours):
        base = ours(**inputs).logits
    assert (base - got.logits[:, -base.shape[1]:]).abs().max() > 0.05
    for output in (got, expected):
        (output.logits * torch.linspace(-1, 1, output.logits.numel()).view_as(output.logits)).sum().backward()
    encoders = ours.prompt_encoder["default"], theirs.prompt_encoder["default"]
    for (key, mine), (other, its) in zip(*(encoder.named_parameters() for encoder in encoders), strict=True):
        assert key == other and mine.grad.any() and relative(mine.grad, its.grad) <= 1e-5, key
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_dtypes_are_pefts(dtype, method, pair, small_inputs):
    ours, theirs = pair("llama", method, dtype)
    inputs = small_inputs("llama")
    got, expected = ours(**inputs), theirs(**inputs)
    assert got.logits.dtype == getattr(torch, dtype) and torch.equal(got.logits, expected.logits)
    assert {p.dtype for p in adapter_parameters(ours).values()} == {torch.float32}
    got.loss.backward(), expected.loss.backward()
    grads = [model.prompt_encoder["default"].embedding.weight.grad for model in (ours, theirs)]
    assert relative(*grads) <= 1e-2


@pytest.mark.parametrize("method", ["prompt", "lstm", "prefix", "projected"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
def test_generated_tokens_are_pefts(family, method, pair, small_inputs):
    ours, theirs = pair(family, method)
    inputs = small_inputs(family)
    mask = inputs["attention_mask"].clone()
    if family != "t5":
        mask[0, :4] = 0                              # a batch padded on the left
    fixed = {"input_ids": inputs["input_ids"], "attention_mask": mask, "max_new_tokens": 9, "pad_token_id": 0,
             "eos_token_id": 60}
    ways = {"greedy": {"do_sample": False}, "without cache": {"do_sample": False, "use_cache": False},
            "sampling": {"do_sample": True, "temperature": 2.0}, "beams": {"num_beams": 3, "do_sample": False}}
    results = {}
    for way, options in ways.items():
        torch.manual_seed(3)
        results[way] = ours.generate(**fixed, **options)
        torch.manual_seed(3)
        if way == "without cache" and (family, method) in PEFT_FAILS_WITHOUT_CACHE:
            with pytest.raises(RuntimeError):
                theirs.generate(**fixed, **options)
            continue
        expected = theirs.generate(**fixed, **options)
        if way == "without cache" and family == "t5" and method in ("prefix", "projected"):
            assert not torch.equal(expected, results["greedy"])       # peft leaves the prefix out after the first token
            continue
        assert torch.equal(results[way], expected), way
    assert torch.equal(results["greedy"], results["without cache"])
    assert len({tuple(row.tolist()) for row in results["sampling"]}) == 2
    torch.manual_seed(3)
    with disabled(ours):
        assert not torch.equal(ours.generate(**fixed, **ways["sampling"]), results["sampling"])


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix"])
def test_a_row_generates_the_same_alone_and_beside_a_longer_one(family, method, small_model, small_inputs):
    model = attach(sharp(small_model(family, tied=family != "t5")), config_of(method), seed=1)
    ids, mask = small_inputs(family)["input_ids"], torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": 60}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)[0, 12:]
    alone = model.generate(input_ids=ids[:1, 5:], **options)[0, 7:]
    assert together[:len(alone)].tolist() == alone.tolist()


def test_in_peft_it_does_not_and_count_padding_is_that(pair, small_inputs):
    ours, theirs = pair("llama", "prompt")
    ids, mask = small_inputs("llama")["input_ids"], torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"max_new_tokens": 1, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}

    def first_logits(model, ids, mask):
        return model.generate(input_ids=ids, attention_mask=mask, **options).logits[0][0]

    together = [first_logits(model, ids, mask) for model in (ours, theirs)]
    alone = [first_logits(model, ids[:1, 5:], mask[:1, 5:]) for model in (ours, theirs)]
    assert torch.equal(*together) and torch.equal(*alone)
    assert relative(together[1], alone[1]) > 0.01
    ours.prompt_encoder.count_padding = False
    assert relative(first_logits(ours, ids, mask), alone[1]) < 1e-5


# ------------------------------------------------------------------------------------------------ any way to call it

@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", DECODERS)
def test_every_way_to_call_gives_the_same(family, method, small_model, small_inputs):
    from transformers import DynamicCache

    model = attach(small_model(family), config_of(method), seed=1)
    ids = small_inputs(family)["input_ids"]
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits
    T = ids.shape[1]
    assert expected.shape[1] == T + (P if method == "prompt" else 0)
    named = {"input_ids": ids, "attention_mask": mask}
    in_order = (ids, None, mask) if family == "gpt2" else (ids, mask)      # GPT-2's second argument is the cache
    same = {"by position": model(*in_order), "no mask": model(ids), "no cache": model(**named, use_cache=False),
            "embeddings": model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask),
            "an empty cache": model(**named, past_key_values=DynamicCache(config=model.config)),
            "the whole mask": model(ids, attention_mask=torch.ones(2, P + T, dtype=torch.long)),
            "positions": model(**named, position_ids=torch.arange(T).expand(2, T))}
    for way, output in same.items():
        torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-6, msg=way)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, expected[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix"])
def test_step_by_step_through_the_cache_is_all_at_once(method, small_model, small_inputs):
    model = attach(small_model("llama"), config_of(method), seed=1)
    ids = small_inputs("llama")["input_ids"]
    expected = model(ids).logits[:, -12:]
    first = model(ids[:, :7])
    cache = first.past_key_values
    assert cache.get_seq_length() == P + 7
    pieces = [first.logits[:, -7:]]
    for width, kwargs in ((2, {}), (3, {"attention_mask": torch.ones(2, 12, dtype=torch.long)})):
        at = sum(piece.shape[1] for piece in pieces)
        pieces.append(model(ids[:, at:at + width], past_key_values=cache, **kwargs).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_an_empty_text_and_one_row_and_a_static_cache(method, small_model):
    model = attach(small_model("llama"), config_of(method))
    if method == "prompt":       # the base model itself, and so a prefix, cannot read a text of no words
        assert model(torch.zeros(1, 0, dtype=torch.long)).logits.shape[1] == P
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="static"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, torch.ones(1, 2, dtype=torch.long))
    assert model.generate(ids, max_new_tokens=2, pad_token_id=0, eos_token_id=None).shape == (1, 5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_no_words_and_words_twice_are_refused_by_the_model(method, small_model):
    model = attach(small_model("llama"), config_of(method))
    for arguments in ({}, {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 32)}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**arguments)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_speculation_gives_the_same_and_going_on_from_a_cache_that_generate_gave_is_refused(method, small_model):
    model = attach(sharp(small_model("llama")), config_of(method), seed=1)
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), expected)
    given_back = model.generate(ids, return_dict_in_generate=True, **options)
    longer = torch.cat([given_back.sequences, torch.tensor([[4, 5, 6, 7, 8, 9, 10, 11]])], dim=1)
    with pytest.raises(ValueError, match="cannot go on from a cache"):
        model.generate(longer, past_key_values=given_back.past_key_values, **options)


def test_a_cache_without_the_prefix_is_refused(small_model):
    model = attach(small_model("llama"), config_of("prefix"))
    with disabled(model):
        cache = model(torch.tensor([[1, 2]])).past_key_values
    with pytest.raises(ValueError, match="without this prefix"):
        model(torch.tensor([[3]]), past_key_values=cache)


def test_token_types_and_labels_of_tokens_are_widened_and_those_of_rows_are_not(small_model):
    import transformers as tf

    model = attach(small_model("bert"), config_of("prompt"))
    ids = torch.tensor([[1, 2, 3]])
    assert model(ids, token_type_ids=torch.ones_like(ids), labels=ids).logits.shape == (1, 3 + P, 61)
    rows = attach(tf.BertForSequenceClassification(model.config).eval(), config_of("prompt"))
    assert rows(ids, labels=torch.tensor([1])).loss.isfinite()
    tokens = attach(tf.BertForTokenClassification(model.config).eval(), config_of("prompt"))
    assert tokens(ids, labels=ids % 2).logits.shape == (1, 3 + P, 2)


# ------------------------------------------------------------------------------------------------ in, out, on, off

@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attached_frozen_disabled_and_detached_without_a_trace(family, method, small_model, small_inputs):
    model = small_model(family)
    inputs = inputs_of(family, small_inputs)
    with torch.no_grad():       # with gradients attention may take another kernel before than after the base is frozen
        before = model(**inputs).logits
    state, modules = set(model.state_dict()), [name for name, _ in model.named_modules()]
    attach(model, config_of(method))
    assert set(trainable(model)) == set(adapter_parameters(model)) and not model.prompt_encoder.training
    assert not torch.equal(model(**inputs).logits[:, -9:], before[:, -9:])
    with disabled(model), torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(TypeError, match="nothing to merge"):
        merge(model)
    unmerge(model)
    detach(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert set(model.state_dict()) == state and [name for name, _ in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_copies_and_pickles_have_tokens_of_their_own(method, small_model, small_inputs):
    model = attach(small_model("llama"), config_of(method))
    ids = small_inputs("llama")["input_ids"]
    before = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, before)
        with torch.no_grad():
            for parameter in adapter_parameters(copied).values():
                parameter.zero_()
        assert not torch.equal(copied(ids).logits, before) and torch.equal(model(ids).logits, before)
        assert copied.prompt_encoder._model[0] is copied
        detach(copied)
        assert not copied._forward_pre_hooks and not hasattr(copied, "prompt_encoder")
        assert torch.equal(model(ids).logits, before)


def test_the_seed_decides_and_the_global_generator_is_left_alone(small_model):
    for method in OURS:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        models = [attach(small_model("llama"), config_of(method), seed=seed) for seed in (1, 1, 2)]
        a, b, c = (torch.cat([p.flatten() for p in adapter_parameters(model).values()]) for model in models)
        torch.manual_seed(5)
        assert torch.equal(a, b) and not torch.equal(a, c)
        model = small_model("llama")
        torch.set_rng_state(before)
        attach(model, config_of(method))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix"])
def test_several_adapters_switched_weighted_and_stacked(method, small_model, small_inputs):
    model = attach(small_model("llama"), config_of(method), seed=1)
    ids = small_inputs("llama")["input_ids"]
    first = model(ids).logits
    attach(model, config_of(method), seed=2, name="second")
    assert torch.equal(model(ids).logits, first)
    set_adapter(model, "second")
    second = model(ids).logits
    assert not torch.equal(second, first) and all(name.startswith("prompt_encoder.second") for name in trainable(model))
    set_adapter(model, {"default": 0.0, "second": 1.0})
    torch.testing.assert_close(model(ids).logits, second)
    set_adapter(model, {"default": 0.5, "second": 0.5})
    half = model(ids).logits
    tokens = (model.prompt_encoder["default"]() + model.prompt_encoder["second"]()) / 2
    torch.testing.assert_close(model.prompt_encoder.tokens(), tokens)
    assert not torch.allclose(half, first) and not torch.allclose(half, second)
    attach(model, config_of(method, length=3), seed=3, name="short")
    with pytest.raises(ValueError, match="of one length.*stacked"):
        set_adapter(model, ["default", "short"])
    set_adapter(model, ["short", "default"], stacked=True)
    assert model.prompt_encoder.length == 8
    in_order = torch.cat([model.prompt_encoder[name]() for name in ("short", "default")])
    assert torch.equal(model.prompt_encoder.tokens(), in_order)
    assert model.generate(ids, max_new_tokens=3, pad_token_id=0, eos_token_id=None).shape == (2, 15)
    set_adapter(model, "default")
    assert torch.equal(model(ids).logits, first)
    delete_adapter(model, "short")
    assert model.prompt_encoder.names == ["default", "second"]
    with pytest.raises(ValueError, match="already"):
        attach(model, config_of(method), name="second")
    with pytest.raises(ValueError, match="active"):
        attach(model, config_of(method), name="active")
    assert model.prompt_encoder.names == ["default", "second"]


def test_a_model_that_has_a_prompt_encoder_of_its_own_is_refused(small_model):
    model = small_model("llama")
    model.prompt_encoder = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="prompt_encoder"):
        attach(model, PromptTuningConfig(2))


def test_what_is_no_whole_model_of_transformers_is_refused(small_model):
    for model in (torch.nn.Linear(2, 2), small_model("llama").model.layers[0]):
        with pytest.raises(TypeError, match="model of transformers.*" + type(model).__name__):
            attach(model, PromptTuningConfig(2))


def test_counts_at_the_size_of_llama_1b():
    """The worked numbers of the four docstrings, in a model without memory."""
    import transformers as tf

    from pefttools.llama_adapter import LlamaAdapterConfig

    config = tf.LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                            num_key_value_heads=8, head_dim=64, vocab_size=128_256, tie_word_embeddings=True)
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    base = 1_235_814_400
    for method, expected in ((PromptTuningConfig(20), 40_960), (PTuningConfig(20), 12_630_016),
                             (PrefixTuningConfig(20), 327_680), (PrefixTuningConfig(20, projection=True), 8_677_888),
                             (LlamaAdapterConfig(10, 8), 163_848)):
        assert count_parameters(attach(model, method)) == (expected, base + expected)
        detach(model)


# ------------------------------------------------------------------------------------------------ files

@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_files_load_in_peft_and_the_other_way_round(family, method, pair, small_model, small_inputs, tmp_path):
    from peft import PeftModel

    def base():
        return sharp(small_model(family, tied=family != "t5"))

    ours, theirs = pair(family, method)
    inputs = inputs_of(family, small_inputs)
    expected = theirs(**inputs).logits
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert relative(loaded(**inputs).logits, expected) <= 1e-4    # an LSTM runs another kernel without gradients
    for folder in ("ours", "theirs"):
        model = load_adapter(base(), tmp_path / folder)
        assert relative(model(**inputs).logits, expected) <= 1e-4
        assert set(trainable(model)) == {"prompt_encoder.default.embedding.weight"}
        again = load_adapter(model, save_adapter(model, tmp_path / "again"))               # over itself
        assert relative(again(**inputs).logits, expected) <= 1e-4
    if family == "t5" and method in ("prefix", "projected"):
        return                       # its keys are as wide in a model of another width
    wrong = sharp(small_model(family, hidden=64))
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(wrong, tmp_path / "theirs")
    assert not hasattr(wrong, "prompt_encoder")


@pytest.mark.parametrize("method", OURS)
def test_the_fields_of_the_file_are_pefts(method, pair, tmp_path):
    import json

    ours, theirs = pair("qwen2", method)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, its = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    for field, value in its.items():
        if value is not None and field not in ("peft_version", "auto_mapping", "base_model_name_or_path"):
            assert mine.get(field) == value, field
    assert type(config_of(method)).from_peft(its).to_peft() == attached_config(ours).to_peft()


def attached_config(model):
    return model._pefttools.config


# ------------------------------------------------------------------------------------------------ in the laboratory

@pytest.mark.parametrize("config, lr", [
    (PromptTuningConfig(4, init="vocab"), 5e-2), (PTuningConfig(4, hidden=32), 1e-3),
    (PrefixTuningConfig(4), 2e-2), (PrefixTuningConfig(4, projection=True), 1e-3)])
def test_trains_generates_and_is_evaluated_in_the_laboratory(config, lr):
    from pefttools.lab import evaluate, generate, held_out_loss, load_base, load_data, train, train_with_trainer

    base = load_base("tiny")
    model = attach(base.model, copy.deepcopy(config))
    rows = list(load_data("train"))[:4]
    before = held_out_loss(model, base.tokenizer, rows)
    history = train(model, rows, base.tokenizer, steps=6, lr=lr, batch_size=4, progress=False)
    after = held_out_loss(model, base.tokenizer, rows)
    assert after < before and history.loss[-1] < history.loss[0]
    prompts = ["Write a function that adds two numbers.", "x"]
    assert generate(model, base.tokenizer, prompts, 6) == [generate(model, base.tokenizer, p, 6) for p in prompts]
    assert 0 <= train_with_trainer(model, rows, base.tokenizer, steps=1, batch_size=4, progress=False).loss[0] < 10
    assert 0 <= evaluate(model, base.tokenizer, list(load_data("held_out"))[:2], max_new_tokens=4).pass_at_1 <= 1


@pytest.mark.parametrize("method", ["prompt", "mlp"])
def test_checkpointing_gives_the_same_gradients(method, small_model, small_inputs):
    model = attach(small_model("llama"), config_of(method)).train()
    inputs = small_inputs("llama")
    grads = []
    for on in (False, True):
        model.gradient_checkpointing_enable() if on else None
        model(**inputs).loss.backward()
        grads.append([p.grad.clone() for p in trainable(model).values()])
        model.zero_grad()
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_nothing_but_torch_is_imported():
    import subprocess
    import sys

    code = "import sys, pefttools.prompt, pefttools.prefix_cache, pefttools.ptuning, pefttools.llama_adapter;" \
           "print([m for m in ('transformers', 'peft', 'bitsandbytes') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_signatures_of_the_frame_are_those_of_an_adapter_layer():
    from pefttools.layer import AdapterLayer

    for name in ("add", "remove", "check_active", "adapter_parameters", "file_tensors", "read_file_tensors", "merge"):
        ours, layer = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (VirtualTokens, AdapterLayer))
        assert ours == layer, name
