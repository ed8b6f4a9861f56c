"""A preset's configuration for the formula, without transformers: the question of the command line is answered at once.

    config_of("llama-3.2-1b")       transformers' own class: brings torch along, about 1.5 s
    plain_config("llama-3.2-1b")    the preset's fields under the same names: nothing is imported

The formula only reads fields, and a preset states all that decide a size; what transformers would add is in DEFAULTS. A
test compares the shapes of every preset with those of transformers' class.
"""
from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pefttools.vram.preset_data import PRESETS
from pefttools.vram.presets import config_of, preset_name
from pefttools.vram.shape import FAMILIES

# transformers' defaults of fields that the formula reads and the presets leave out: GPT2Config, OPTConfig
DEFAULTS = {"gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "n_inner": None}, "opt": {"enable_bias": True}}
PATTERN = {"gemma2": 2, "gemma3_text": 6}                      # every so manieth layer looks back to the beginning


def plain_config(model: Any) -> Any:
    """Fields of the model for `shape_of`; transformers' configuration where it is no preset. Raises as that does."""
    if not isinstance(model, str) or Path(model).is_dir() or Path(model).suffix == ".json":
        return config_of(model)
    return _of_preset(preset_name(model)) or config_of(model)


@functools.cache
def _of_preset(name: str) -> Any:
    fields = PRESETS[name][0]
    if fields["model_type"] not in FAMILIES:                   # the formula will say that it does not know it
        return None
    added = dict(DEFAULTS.get(fields["model_type"], {}))
    if every := PATTERN.get(fields["model_type"]):
        added["layer_types"] = ["sliding_attention" if layer % every else "full_attention"
                                for layer in range(1, fields["num_hidden_layers"] + 1)]
    return SimpleNamespace(**{**added, **fields})
