"""Adapters on disk, in peft's format: what is saved here loads in peft, and the other way round.

    folder/adapter_config.json         the method's settings under peft's names: r, lora_alpha, target_modules, …
    folder/adapter_model.safetensors   base_model.model.<name of the layer>.lora_A.weight [r, d_in], ….lora_B.weight

peft puts "base_model.model." in front and leaves out the adapter's own name ("default") (`get_peft_model_state_dict` in
peft/utils/save_and_load.py). The base model's weights are not in the file: r = 8 on q and v of the bundled model is
172 KB, which mean nothing without the model they were trained on.

Nothing half-done is ever left: a save writes beside the old files and then renames, a load checks everything before
it touches the model.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from pefttools.adapter_files import CONFIG, WEIGHTS, read_fields, read_weights, some, write_both
from pefttools.attached import adapter_layers, adapter_parameters, attached, trainable
from pefttools.inject import attach
from pefttools.methods import config_from_peft
from pefttools.targets import find_targets, plain_modules

PREFIX = "base_model.model."
# Fields of adapter_config.json that do not change what the adapter computes (a configuration may list more, in
# `without_effect`). Any other field that a method's to_peft() does not write must be empty, or the adapter is refused:
# reading it without that field would give wrong outputs.
WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
                  "init_lora_weights", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
                  "runtime_config", "qalora_group_size", "target_modules", "layers_to_transform"}


# ------------------------------------------------------------------------------------------------ saving

def save_adapter(model: nn.Module, folder: str | os.PathLike, name: str | None = None) -> Path:
    """Write the attached adapter to `folder` (made if need be) and return it. A merged adapter is saved as well.

    Of several adapters, `name` says which; without it, the one that acts. Each file appears whole or not at all.
    Raises ValueError without an adapter, for an unknown name or where several act, for NaN or infinite entries (what
    was saved before is kept), or if parameters outside the adapters are trainable: the file has no place for them.
    """
    note = attached(model)
    name = _which(model, name)
    config = note.configs[name]
    parameters = adapter_parameters(model)
    if others := [parameter for parameter in trainable(model) if parameter not in parameters]:
        raise ValueError(f"save_adapter: trainable, but no part of the adapter, so not in its files: {some(others)}. "
                         f"Freeze them with requires_grad_(False); if they were trained, save them yourself before.")
    tensors = _file_tensors(model, name)
    broken = [key for key, parameter in adapter_parameters(model, name).items() if not parameter.isfinite().all()]
    if broken := broken or [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"save_adapter: NaN or infinite entries in {some(broken)}: training has diverged. Nothing "
                         f"was written. Lower the learning rate, or load an earlier checkpoint.")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    fields = {"task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
              "base_model_name_or_path": getattr(model, "name_or_path", None) or None, "inference_mode": True}
    if hasattr(config, "target_modules"):
        fields |= {"target_modules": _targets_for_peft(model, config, note.layers[name]),
                   "layers_to_transform": _layers_for_peft(config)}
    fields |= config.to_peft()
    if "fan_in_fan_out" in fields:     # GPT-2's Conv1D stores [d_in, d_out]; peft warns where this does not say so
        fields["fan_in_fan_out"] = any(type(getattr(layer, "base_layer", None)).__name__ == "Conv1D"
                                       for _, layer in adapter_layers(model))

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_adapter: {folder} is a file; give the path of a folder.")
    config_text = json.dumps(fields, indent=2, sort_keys=True).encode()
    write_both(folder, to_safetensors(tensors, metadata={"format": "pt"}), config_text)
    return folder


def _which(model: nn.Module, name: str | None) -> str:
    known = attached(model).configs
    if name is None:
        acting = list(dict.fromkeys(a for _, layer in adapter_layers(model) for a in layer.active))
        if len(acting) != 1:
            raise ValueError(f"save_adapter: several adapters act ({', '.join(acting)}); say which one to save: "
                             f"save_adapter(model, folder, name={acting[0]!r}).")
        return acting[0]
    if name not in known:
        raise ValueError(f"save_adapter: there is no adapter {name!r}; this model has {', '.join(known)}.")
    return name


def _file_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What the file holds of this adapter: {complete key: tensor}. Not copied."""
    return {_complete(where, layer, key): tensor for where, layer in adapter_layers(model) if name in layer.names
            for key, tensor in layer.file_tensors(name).items()}


def _complete(where: str, layer: nn.Module, key: str) -> str:
    # methods that change the whole model's input give keys that are complete ("prompt_embeddings")
    return key if hasattr(layer, "uninstall") else f"{PREFIX}{where.replace('.base_layer.', '.')}.{key}"


def _targets_for_peft(model: nn.Module, config: Any, names: list[str]) -> list[str] | str:
    """What config says; for "all-linear" the names it stands for in this model, as peft writes them."""
    targets = config.target_modules
    if targets is None and hasattr(config, "default_targets"):
        targets = config.default_targets(model)
    if targets is None or isinstance(targets, str) and targets.lower() == "all-linear":
        targets = {name.rsplit(".", 1)[-1] for name in names}  # short, unless that selects more than was attached
        plain = plain_modules(model)
        if sum(name.rsplit(".", 1)[-1] in targets for name in plain) > len(names):
            targets = names
    return targets if isinstance(targets, str) else sorted(targets)


def _layers_for_peft(config: Any) -> list[int] | int | None:
    layers = getattr(config, "layers_to_transform", None)
    return layers if layers is None or isinstance(layers, int) else list(layers)


# ------------------------------------------------------------------------------------------------ loading

def load_adapter(model: nn.Module, folder: str | os.PathLike, name: str = "default") -> nn.Module:
    """Attach the adapter saved in `folder` (by us or by peft) to `model` under `name`, and return the same model.

    In a model without adapters it acts at once and is trainable; beside others it waits for `set_adapter`. If one with
    this name and the same settings is attached already, its values are replaced and its parameters stay the same
    objects, so an optimizer over them goes on working. Everything is checked before the model is changed. Raises
    FileNotFoundError for a missing folder or file, ValueError for one that is damaged, for settings that this
    library does not have, and for an adapter of another base model (missing or unexpected layers, other shapes).
    """
    folder = Path(folder)
    config = _config_of(read_fields(folder), folder / CONFIG)
    tensors = _without_base(model, read_weights(folder))

    here = any(True for _ in adapter_layers(model)) and name in attached(model).configs
    if here:
        _check_same_settings(model, config, name, folder)
        expected = {key: tuple(tensor.shape) for key, tensor in _file_tensors(model, name).items()}
    elif hasattr(config, "install"):
        expected = config.shapes(model)
    else:
        expected = {f"{PREFIX}{target}.{key}": shape
                    for target, base in find_targets(model, config, strict=False).items()
                    for key, shape in config.shapes(base).items()}
    _check_fits(tensors, expected, folder)

    if not here:
        attach(model, config, strict=False, name=name)
    for where, layer in adapter_layers(model):
        if name in layer.names:
            layer.read_file_tensors(name, {key: tensors[_complete(where, layer, key)]
                                           for key in layer.file_tensors(name)})
    return model


def _config_of(fields: dict[str, Any], path: Path) -> Any:
    """The configuration of these fields, unless they say something that this library would leave out."""
    try:
        config = config_from_peft(fields)
    except KeyError as error:
        raise ValueError(f"load_adapter: {path} has no field {error}; it is damaged or not from peft.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {path}: {error}") from None
    harmless = WITHOUT_EFFECT | set(getattr(config, "without_effect", ()))
    ours = config.to_peft()
    refused = [f"{name}={value!r}" for name, value in sorted(fields.items()) if name not in harmless
               and value != ours.get(name) and (value or ours.get(name))]
    if refused:
        raise ValueError(f"load_adapter: {path} uses what this library does not have: {', '.join(refused)}. "
                         f"Load it with peft.PeftModel.from_pretrained.")
    return config


def _without_base(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """peft saves an embedding beside the adapter on it. Left out where it is the model's own; else it is reported."""
    adapters = adapter_parameters(model)
    own = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters(
        remove_duplicate=False) if name not in adapters}
    return {key: tensor for key, tensor in tensors.items()
            if (base := own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))) is None
            or base.shape != tensor.shape or not torch.equal(base.detach().cpu(), tensor.to(base.dtype))}


def _check_same_settings(model: nn.Module, config: Any, name: str, folder: Path) -> None:
    if any(layer.merged for _, layer in adapter_layers(model)):
        raise ValueError("load_adapter: an adapter is merged into this model. Call unmerge(model) first, or "
                         "detach(model).")
    here, there = attached(model).configs[name].to_peft(), config.to_peft()
    differing = [f"{field} is {here.get(field)!r} in the model and {there.get(field)!r} in {folder}"
                 for field in here | there if field != "lora_dropout" and here.get(field) != there.get(field)]
    if differing:
        raise ValueError(f"load_adapter: the model has another adapter attached: {'; '.join(differing)}. "
                         f"Call detach(model) first, or load this one under a name of its own.")


def _check_fits(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    problems = []
    if missing := [key for key in expected if key not in tensors]:
        problems.append(f"missing from the file: {some(missing)}")
    if unexpected := sorted(key for key in tensors if key not in expected):
        problems.append(f"in the file, but without a place in the model: {some(unexpected)}")
    if other := [f"{key} is {list(tensors[key].shape)} in the file and {list(shape)} in the model"
                 for key, shape in expected.items() if key in tensors and tuple(tensors[key].shape) != shape]:
        problems.append(f"other shapes: {some(other)}")
    if problems:
        raise ValueError(f"load_adapter: {folder / WEIGHTS} does not fit this model; was the adapter made for another "
                         f"base? {'; '.join(problems)}. The model is unchanged.")
