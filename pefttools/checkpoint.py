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
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from pefttools.inject import adapter_layers, adapter_parameters, attach, attached, trainable
from pefttools.lora import LoRAConfig
from pefttools.targets import find_targets

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
METHODS = {"LORA": LoRAConfig}  # peft_type → configuration, which has to_peft() and from_peft(fields)
# Fields of adapter_config.json that do not change what the adapter computes. Any other field that a method's to_peft()
# does not write must be empty, or the adapter is refused: reading it without that field would give wrong outputs.
WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
                  "init_lora_weights", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
                  "runtime_config", "qalora_group_size", "target_modules", "layers_to_transform"}


# ------------------------------------------------------------------------------------------------ saving

def save_adapter(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the attached adapter to `folder` (made if need be) and return it. A merged adapter is saved as well.

    Each file appears whole or not at all. Raises ValueError without an adapter, for NaN or infinite entries (what was
    saved before is kept), or if parameters outside the adapter are trainable, since the file has no place for them.
    """
    config = attached(model).config
    parameters = adapter_parameters(model)
    if others := [name for name in trainable(model) if name not in parameters]:
        raise ValueError(f"save_adapter: trainable, but no part of the adapter, so not in its files: {_some(others)}. "
                         f"Freeze them with requires_grad_(False); if they were trained, save them yourself before.")
    if broken := [name for name, parameter in parameters.items() if not parameter.isfinite().all()]:
        raise ValueError(f"save_adapter: NaN or infinite entries in {_some(broken)}: training has diverged. Nothing "
                         f"was written. Lower the learning rate, or load an earlier checkpoint.")
    tensors = {_file_key(name): parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    fields = config.to_peft() | {
        "target_modules": _targets_for_peft(model, config), "layers_to_transform": _layers_for_peft(config),
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None, "inference_mode": True}

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_adapter: {folder} is a file; give the path of a folder.")
    config_text = json.dumps(fields, indent=2, sort_keys=True).encode()
    _write_both(folder, to_safetensors(tensors, metadata={"format": "pt"}), config_text)
    return folder


def _write_both(folder: Path, weights: bytes, config: bytes) -> None:
    """Both files, written in full and flushed to the disk beside the old ones, then renamed over them."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        for name, content in ((WEIGHTS, weights), (CONFIG, config)):
            with open(scratch / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    # Both are whole now. Whoever is stopped between the next lines finds the rest in `scratch`, and a load says so:
    # new weights must not be read with old settings, so settings that differ go first.
    old = folder / CONFIG
    if old.exists() and old.read_bytes() != config:
        old.unlink()
    os.replace(scratch / WEIGHTS, folder / WEIGHTS)
    os.replace(scratch / CONFIG, folder / CONFIG)
    scratch.rmdir()


def _targets_for_peft(model: nn.Module, config: Any) -> list[str] | str:
    """What config says; for "all-linear" the names it stands for in this model, as peft writes them."""
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() != "all-linear":
        return targets
    if isinstance(targets, str):
        names = attached(model).names
        targets = {name.rsplit(".", 1)[-1] for name in names}  # short, unless that selects more than was attached
        if sum(name.rsplit(".", 1)[-1] in targets for name, _ in model.named_modules()) > len(names):
            targets = names
    return sorted(targets)


def _layers_for_peft(config: Any) -> list[int] | int | None:
    layers = config.layers_to_transform
    return layers if layers is None or isinstance(layers, int) else list(layers)


# ------------------------------------------------------------------------------------------------ loading

def load_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Attach the adapter saved in `folder` (by us or by peft) to `model`, trainable, and return the same model.

    If an adapter with the same settings is attached already, its values are replaced and its parameters stay the same
    objects, so an optimizer over them goes on working. Everything is checked before the model is changed. Raises
    FileNotFoundError for a missing folder or file, ValueError for one that is damaged, for settings that this
    library does not have, and for an adapter of another base model (missing or unexpected layers, other shapes).
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_weights(folder)

    layers = dict(adapter_layers(model))
    if layers:
        _check_same_settings(model, config, layers, folder)
        expected = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model).items()}
    else:
        expected = {f"{name}.{key}": shape for name, base in find_targets(model, config, strict=False).items()
                    for key, shape in config.shapes(base).items()}
    _check_fits(tensors, {_file_key(name): shape for name, shape in expected.items()}, folder)

    if not layers:
        attach(model, config, strict=False)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(tensors[_file_key(name)])
    return model


def _read_config(folder: Path) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(f"load_adapter: there is no folder {folder}.")
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        rest = f", though {WEIGHTS} is: the save was interrupted, or this file was not copied" \
            if (folder / WEIGHTS).exists() else ""
        if left := sorted(folder.glob(f".saving-*/{CONFIG}")):
            rest += f". What was being saved is in {left[-1].parent}: move its files up"
        raise FileNotFoundError(f"load_adapter: {CONFIG} is not in {folder}{rest}.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"load_adapter: {path} is damaged, it is not JSON ({error}). Save or copy it again.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"load_adapter: {path} must hold one JSON object; it holds a {type(fields).__name__}.")
    method = METHODS.get(str(fields.get("peft_type")))
    if method is None:
        raise ValueError(f"load_adapter: {path} has peft_type={fields.get('peft_type')!r}; "
                         f"known here: {list(METHODS)}.")
    try:
        config = method.from_peft(fields)
    except KeyError as error:
        raise ValueError(f"load_adapter: {path} has no field {error}; it is damaged or not from peft.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {path}: {error}") from None
    ours = config.to_peft()
    refused = [f"{name}={value!r}" for name, value in sorted(fields.items()) if name not in WITHOUT_EFFECT
               and value != ours.get(name) and (value or ours.get(name))]
    if refused:
        raise ValueError(f"load_adapter: {path} uses what this library does not have: {', '.join(refused)}. "
                         f"Load it with peft.PeftModel.from_pretrained.")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        pickled = " There is an adapter_model.bin, a pickle, which can run code when read: load it with peft and save " \
                  "it again as safetensors." if (folder / "adapter_model.bin").exists() else ""
        raise FileNotFoundError(f"load_adapter: {WEIGHTS} is not in {folder}.{pickled}")
    content = path.read_bytes()
    try:
        tensors = parse_safetensors(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"load_adapter: {path} ({len(content)} bytes) is truncated or damaged: {error}. "
                         f"Copy it again, or go back to an earlier save.") from None
    if broken := sorted(name for name, t in tensors.items() if not t.is_floating_point() or not t.isfinite().all()):
        raise ValueError(f"load_adapter: {path} has entries that are NaN, infinite or no floats, in {_some(broken)}.")
    return tensors


def _check_same_settings(model: nn.Module, config: Any, layers: dict[str, nn.Module], folder: Path) -> None:
    if any(layer.merged for layer in layers.values()):
        raise ValueError("load_adapter: an adapter is merged into this model. Call unmerge(model) first, or "
                         "detach(model).")
    here, there = attached(model).config.to_peft(), config.to_peft()
    differing = [f"{name} is {here.get(name)!r} in the model and {there.get(name)!r} in {folder}"
                 for name in here | there if name != "lora_dropout" and here.get(name) != there.get(name)]
    if differing:
        raise ValueError(f"load_adapter: the model has another adapter attached: {'; '.join(differing)}. "
                         f"Call detach(model) first.")


def _check_fits(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    problems = []
    if missing := [key for key in expected if key not in tensors]:
        problems.append(f"missing from the file: {_some(missing)}")
    if unexpected := sorted(key for key in tensors if key not in expected):
        problems.append(f"in the file, but without a place in the model: {_some(unexpected)}")
    if other := [f"{key} is {list(tensors[key].shape)} in the file and {list(shape)} in the model"
                 for key, shape in expected.items() if key in tensors and tuple(tensors[key].shape) != shape]:
        problems.append(f"other shapes: {_some(other)}")
    if problems:
        raise ValueError(f"load_adapter: {folder / WEIGHTS} does not fit this model; was the adapter made for another "
                         f"base? {'; '.join(problems)}. The model is unchanged.")


def _file_key(name: str) -> str:
    layer, _, rest = name.rpartition(".default")
    return PREFIX + layer + rest


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
