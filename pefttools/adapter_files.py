"""The two files of an adapter: written whole or not at all, read with every damage named.

    folder/adapter_config.json  folder/adapter_model.safetensors

Nothing here knows a model or a method; that is `pefttools.checkpoint`.
"""
from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_both(folder: Path, weights: bytes, config: bytes) -> None:
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


def read_fields(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. FileNotFoundError or ValueError, with what was left of an interrupted save."""
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
    return fields


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors. Never unpickles; FileNotFoundError or ValueError where it is no good."""
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
        raise ValueError(f"load_adapter: {path} has entries that are NaN, infinite or no floats, in {some(broken)}.")
    return tensors


def some(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
