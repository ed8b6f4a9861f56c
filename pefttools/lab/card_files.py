"""An adapter's folder before anything is loaded: is it whole, what is in it, which base does it name?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

SHOWN = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
         "num_virtual_tokens", "placement", "bottleneck", "reduction_factor", "adapter_len", "adapter_layers",
         "layers_to_transform", "modules_to_save", "bias", "base_model_name_or_path")


class NotAnAdapter(ValueError):
    """What was given is no adapter that can be measured; the message says what is missing or broken."""


def files_of(folder: Path) -> dict[str, Any]:
    """Sizes, SHA-256 and settings of an adapter's files. Raises NotAnAdapter, with what would do."""
    from pefttools.adapter_files import CONFIG, WEIGHTS, read_fields, read_weights

    try:
        fields = read_fields(folder)
        tensors = read_weights(folder)
    except (OSError, ValueError) as error:
        left = " A save was interrupted in there." if folder.is_dir() and any(folder.glob(".saving-*")) \
            and "interrupted" not in str(error) else ""
        raise NotAnAdapter(f"{words(error)}{left} An adapter is a folder with {CONFIG} and {WEIGHTS}, as "
                           "save_adapter or peft writes them.") from None
    found = {name: {"bytes": (folder / name).stat().st_size,
                    "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()} for name in (CONFIG, WEIGHTS)}
    config = {name: fields[name] for name in SHOWN if fields.get(name) not in (None, [], {})}
    named = str(config.get("base_model_name_or_path", ""))
    if Path(named).is_absolute():  # where it lay on the machine that trained it is nobody's business
        config["base_model_name_or_path"] = Path(named).name
    return {"files": found, "config": config, "tensors": len(tensors),
            "numbers": sum(t.numel() for t in tensors.values())}


def words(error: BaseException) -> str:
    """An error of `load_adapter` without its name in front."""
    return str(error).removeprefix("load_adapter: ")


def base_named(config: dict[str, Any]) -> str:
    """The base that the configuration names; the bundled one where it names none, or a folder of that name."""
    named = str(config.get("base_model_name_or_path") or "tiny")
    return "tiny" if Path(named).name == "tiny" else named
