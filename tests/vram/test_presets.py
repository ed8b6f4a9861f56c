"""Presets have exactly as many parameters as the models' pages say; wrong configurations say what is wrong."""
from __future__ import annotations

import json

import pytest

from pefttools.vram.preset_data import PRESETS
from pefttools.vram.presets import config_of, meta_model, parameters_of_preset, preset_name

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
         "intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name):
    model = meta_model(config_of(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters_of_preset(name)


def test_the_bundled_model_is_the_preset():
    assert config_of("pefttools/lab/tiny").to_diff_dict().keys() >= {"hidden_size"}
    bundled, preset = config_of("pefttools/lab/tiny"), config_of("tiny")
    assert all(getattr(bundled, name) == getattr(preset, name) for name in PRESETS["tiny"][0])


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("text, name", [
    ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"), ("Llama 2 7 B", "llama-2-7b"),
    ("unsloth/llama-3.2-3b", "llama-3.2-3b"), ("Llama-3.3-70B", "llama-3.1-70b"), ("TinyLlama", "tinyllama-1.1b"),
    ("QWEN2.5-0.5B", "qwen2.5-0.5b"),
    ("mistral-7b-v0.2", "mistral-7b"), ("gpt3", "gpt-3-175b"), ("openai-community/gpt2", "gpt2"),
    ("Phi-3-mini-4k-instruct", "phi-3-mini"), ("StableLM Alpha 3B", "stablelm-alpha-3b")], ids=str)
def test_names(text, name):
    assert preset_name(text) == name


def test_ways_to_give_a_model(tmp_path):
    from transformers import LlamaConfig

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for given in (LLAMA, tmp_path, str(tmp_path / "config.json"), config_of(LLAMA), meta_model(config_of(LLAMA))):
        assert config_of(given).hidden_size == 64
    assert config_of(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})).num_hidden_layers == 2
    assert config_of({"model_type": "llava", "text_config": LLAMA}).hidden_size == 64


@pytest.mark.parametrize("missing", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                     "vocab_size"])
def test_a_missing_field_is_named_with_what_it_decides(missing):
    with pytest.raises(ValueError, match=f"lacks the field '{missing}' of a llama model: .+"):
        config_of({name: value for name, value in LLAMA.items() if name != missing})


@pytest.mark.parametrize("given, error, words", [
    ("lama-3.2-1b", ValueError, "Did you mean llama-3.2-1b"),
    ("mixtral", ValueError, "is not known here.*mistral-7b"),
    ("nowhere/config.json", ValueError, "there is no file"),
    ({"hidden_size": 3}, ValueError, "no field 'model_type'"),
    ({"model_type": "lama"}, ValueError, "does not have; the nearest: llama"),
    ({"model_type": "gpt2", "n_embd": 64}, ValueError, "lacks the field 'n_layer'"),
    ({"model_type": "gemma", **{k: v for k, v in LLAMA.items() if k != "model_type"}}, ValueError, "'head_dim'"),
    (LLAMA | {"num_attention_heads": 0}, ValueError, "num_attention_heads|by zero"),
    (LLAMA | {"num_hidden_layers": 0}, ValueError, "num_hidden_layers=0.*at least 1"),
    (LLAMA | {"hidden_size": "64"}, ValueError, "hidden_size"),
    (7, TypeError, "a name such as"), (None, TypeError, "a name such as")],
    ids=["typo", "unknown", "no-file", "no-type", "type", "gpt2", "gemma", "heads-0", "layers-0", "text", "int",
         "none"])
def test_wrong_models(given, error, words):
    with pytest.raises(error, match=words):
        config_of(given)


def test_a_file_that_is_no_configuration(tmp_path):
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        config_of(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds a list"):
        config_of(tmp_path)


def test_no_causal_language_model():
    from transformers import ViTConfig

    with pytest.raises(ValueError, match="vocab_size"):
        config_of(ViTConfig())
