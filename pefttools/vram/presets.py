"""The configuration of a model, offline: by a name, a dictionary, a folder with a config.json, or as it is.

    config_of("llama-3.2-1b")            a preset: `preset_data.py`, with their published shapes
    config_of("meta-llama/Llama-3.2-1B") the same by the name of its repository (in any case; nothing is downloaded)
    config_of("models/mine")             a folder with a config.json, or the file
    config_of({"model_type": "llama", "hidden_size": 2048, …})
    config_of(LlamaConfig(…))            a transformers configuration, or a model that has one

transformers fills a missing field with a default (hidden_size 4096 for every Llama), so that a configuration with a
hole in it is one of another model. Here a hole is an error, which says which field it is and what it decides.
"""
from __future__ import annotations

import difflib
import functools
import json
import re
from pathlib import Path
from typing import Any

from pefttools.vram.preset_data import ALIASES, PRESETS

# Fields without which a causal language model has no size: the common name, and what it decides.
NEEDED = {
    "hidden_size": "h, the width of the residual stream: every weight's and every activation's size",
    "num_hidden_layers": "L, how many decoder layers there are",
    "num_attention_heads": "H, how many queries a token has: width of attention, and its H·T·T matrix",
    "vocab_size": "V, the rows of the embedding and of the head: the logits are 14·V bytes a token",
}
FEED_FORWARD = {"llama": "intermediate_size", "mistral": "intermediate_size", "qwen2": "intermediate_size",
                "qwen3": "intermediate_size", "gemma": "intermediate_size", "gemma2": "intermediate_size",
                "gemma3_text": "intermediate_size", "phi": "intermediate_size", "phi3": "intermediate_size",
                "gpt_neox": "intermediate_size", "opt": "ffn_dim"}
HEADS = {"gemma": "head_dim", "gemma2": "head_dim", "gemma3_text": "head_dim"}      # not hidden_size / heads there


def config_of(model: Any) -> Any:
    """A transformers configuration of the model; nothing is downloaded.

    Raises ValueError for a name that is unknown (with the nearest ones), a type that transformers does not have, or a
    field that is missing (which, and what it decides); TypeError for anything that is no model.
    """
    if isinstance(model, dict):
        return _from_fields(model, "the dictionary")
    if isinstance(model, (str, Path)):
        return _from_text(str(model))
    config = getattr(model, "config", model)
    if not hasattr(config, "model_type") or not hasattr(config, "to_dict"):
        raise TypeError(f"model={model!r}: a name such as \"llama-3.2-1b\", a folder with a config.json, a dictionary "
                        f"of its fields, or a configuration of transformers is needed.")
    return _checked(config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config)


def _from_text(text: str) -> Any:
    path = Path(text)
    if path.is_dir() or path.name == "config.json" or path.suffix == ".json":
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"model={text!r}: there is no file {path}.")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path} holds a {type(fields).__name__}, and a configuration is a dictionary of fields.")
        return _from_fields(fields, str(path))
    return _of_preset(preset_name(text))


@functools.cache
def _names() -> dict[str, str]:
    """What a model may be called, without case, dots and dashes → its preset."""
    names = {key: key for key in PRESETS} | ALIASES
    for key, (_, _, repositories) in PRESETS.items():
        names |= {repo: key for repo in repositories} | {repo.split("/")[-1]: key for repo in repositories}
    return {_plain(name): key for name, key in names.items()}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower())


def preset_name(name: str) -> str:
    """The key of PRESETS for a name or a repository's. Raises ValueError for an unknown one, with the nearest."""
    plain, names = _plain(name), _names()
    for each in (plain, plain.split("/")[-1]):
        if each in names:
            return names[each]
    near = difflib.get_close_matches(plain.split("/")[-1], [n for n in names if "/" not in n], n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(dict.fromkeys(names[n] for n in near))}?" if near else ""
    raise ValueError(f"model={name!r} is not known here, and is no folder with a config.json.{hint} There are "
                     f"{', '.join(PRESETS)}. For another model, save its config.json and give the folder.")


def _of_preset(name: str) -> Any:
    return _from_fields(PRESETS[name][0], f"the preset {name}")


def parameters_of_preset(name: str) -> int:
    """How many parameters the model's page states, tied ones once."""
    return PRESETS[preset_name(name)][1]


def _from_fields(fields: dict[str, Any], where: str) -> Any:
    from transformers import CONFIG_MAPPING

    kind = fields.get("model_type")
    if kind is None:
        raise ValueError(f"{where} has no field 'model_type', which says what the layers are: \"llama\", \"qwen2\", "
                         f"\"gpt2\" ….")
    if isinstance(fields.get("text_config"), dict):                       # a model of images and text: its text part
        return _from_fields(fields["text_config"], f"text_config of {where}")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=3, cutoff=0.5)
        raise ValueError(f"{where} has model_type={kind!r}, which this transformers does not have"
                         + (f"; the nearest: {', '.join(near)}." if near else "."))
    cls = CONFIG_MAPPING[kind]
    names = getattr(cls, "attribute_map", {})
    wanted = NEEDED | ({FEED_FORWARD[kind]: "m, the width of the feed-forward part: most of the weights and "
                                            "activations"} if kind in FEED_FORWARD else {}) \
        | ({HEADS[kind]: "the width of one head, which is not hidden_size / heads in this family"}
           if kind in HEADS else {})
    for name, why in wanted.items():
        if fields.get(name) is None and fields.get(names.get(name, name)) is None:
            raise ValueError(f"{where} lacks the field {names.get(name, name)!r} of a {kind} model: {why}.")
    own = {key: value for key, value in fields.items() if key not in ("model_type", "transformers_version")}
    try:
        config = cls(**own)
    except Exception as error:                            # huggingface_hub's validation has exceptions of its own
        if not isinstance(error, (TypeError, ValueError, AttributeError, ArithmeticError)) \
                and "alidation" not in type(error).__name__:
            raise
        raise ValueError(f"{where} is no configuration of a {kind} model: {error}") from None
    return _checked(config)


def _checked(config: Any) -> Any:
    for name, why in NEEDED.items():
        value = getattr(config, name, None)
        if value is None:
            raise ValueError(f"the configuration of a {config.model_type} lacks {name!r}: {why}.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} in the configuration of a {config.model_type}: a whole number of at "
                             f"least 1 is needed ({why}).")
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ValueError(f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={heads}, and "
                         f"there is no head_dim.")
    if isinstance(kv, int) and kv and heads % kv:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv}: each key is "
                         f"shared by as many queries.")
    return config


def meta_model(config: Any, dtype: str = "bfloat16", layers: int | None = None) -> Any:
    """The causal language model of a configuration on the meta device: shapes and ties without memory."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    if layers is not None:
        config = copy.deepcopy(config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except ValueError as error:
        if "Unrecognized configuration" in str(error):
            raise ValueError(f"model_type={config.model_type!r} is no causal language model of transformers.") from None
        raise
