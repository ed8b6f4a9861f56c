"""Trainable parameters of formula, library and peft: equal, for every method and preset.

Every preset has two of its decoder layers here, which are alike; `python -m pefttools.vram.counts` builds them all.
"""
from __future__ import annotations

import pytest

from pefttools.vram.counts import compare, exists, job_of, main, presets, with_layers
from pefttools.vram.job import METHODS
from pefttools.vram.shape import shape_of
from pefttools.vram.terms.adapters import trainable

METHODS_ONCE = [method for method in METHODS if method not in ("qlora", "qdora")]  # the same adapters as lora and dora
FAMILIES = ("tiny", "gpt2", "opt-125m", "gemma-2b", "gemma-2-2b", "gemma-3-1b", "qwen2.5-0.5b", "mistral-7b",
            "llama-3.2-1b")


@pytest.mark.parametrize("name", presets())
def test_formula_and_library(name):
    counts = list(compare(name, METHODS_ONCE, layers=2, libraries=("pefttools",), r=2))
    kind = with_layers(name, 2).model_type
    assert [count.method for count in counts] == [m for m in METHODS_ONCE if exists(kind, m, "pefttools")]
    assert len(counts) >= len(METHODS_ONCE) - 2         # OPT has neither LLaMA-Adapter nor layer norms to tune
    assert [count for count in counts if not count.agree] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_formula_and_peft(name):
    counts = list(compare(name, METHODS_ONCE, layers=2, libraries=("peft",), r=2))
    assert sum(count.peft is not None for count in counts) >= 5
    assert [count for count in counts if not count.agree] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in presets() if name not in FAMILIES])
def test_formula_and_peft_on_the_others(name):
    counts = compare(name, METHODS_ONCE, layers=2, libraries=("peft",), r=2)
    assert [count for count in counts if not count.agree] == []


@pytest.mark.parametrize("method", ["full", "lora", "dora", "ia3", "bottleneck", "prefix"])
def test_all_layers_of_one(method):
    assert all(count.agree for count in compare("gpt2", [method]))


@pytest.mark.parametrize("name", presets())
def test_the_count_of_all_layers_is_that_of_one_times_their_number(name):
    """What makes two layers enough: each layer adds the same."""
    two, three = (with_layers(name, n) for n in (2, 3))
    s2, s3, all_layers = shape_of(two), shape_of(three), shape_of(with_layers(name, None))
    for method in METHODS_ONCE:
        if not exists(two.model_type, method, "pefttools") or method in ("llama_adapter", "prompt", "ptuning"):
            continue
        a, b, whole = (trainable(job_of(config, method, "pefttools"), s)
                       for config, s in ((two, s2), (three, s3), (with_layers(name, None), all_layers)))
        assert whole == a + (b - a) * (all_layers.L - 2)


def test_other_settings():
    from pefttools.vram.counts import built

    config = with_layers("llama-3.2-1b", 2)
    s = shape_of(config)
    for method, library, fields in [
            ("bottleneck", "pefttools", {"options": {"placement": "houlsby"}, "width": 8}),
            ("bottleneck", "pefttools", {"options": {"placement": "bapna", "scale": "learned"}}),
            ("bottleneck", "pefttools", {"options": {"placement": "input_output", "bottleneck": 5}}),
            ("bottleneck", "pefttools", {"options": {"train_layer_norms": True}}),
            ("prefix", "pefttools", {"options": {"projection": True, "hidden": 24}}),
            ("prefix", "peft", {"options": {"prefix_projection": True, "encoder_hidden_size": 24}}),
            ("ptuning", "pefttools", {"options": {"kind": "LSTM", "hidden": 16}}),
            ("ptuning", "peft", {"options": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16}}),
            ("lora", "peft", {"targets": r".*layers\.1\..*_proj"}),
            ("lora", "pefttools", {"targets": ("q_proj", "down_proj"), "options": {"layers_to_transform": [1]}}),
            ("ia3", "pefttools", {"targets": ("k_proj", "up_proj"), "options": {"feedforward_modules": ["up_proj"]}})]:
        job = job_of(config, method, library, **fields)
        assert trainable(job, s) == built(job), (method, fields)


def test_the_command(capsys):
    assert main(["tiny", "--layers", "2"]) == 0
    said = capsys.readouterr().out
    assert "DIFFERS" not in said and "agree." in said and "llama_adapter" in said
