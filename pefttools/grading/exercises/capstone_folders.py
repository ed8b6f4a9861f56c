"""The adapters that `run-it` is compared with: a right one, and what is wrong in how many ways.

    "pefttools.grading.exercises.capstone_folders:untrained"      a folder, made from `capstone_adapter/` when first asked for

`capstone_adapter/` is LoRA of rank 1 on all linear layers of the bundled model, 400 steps of 8 rows at 1e-2, seed 0:
`python -m pefttools.grading.exercises.capstone_folders --train` makes it again.
"""
from __future__ import annotations

import argparse
import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("capstone_adapter")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGE_CONFIG, LARGE_WEIGHTS = "llama_1b_config.json", "llama_1b_model.safetensors"

_root: list[Path] = []
_made: dict[str, str] = {}


def __getattr__(name: str) -> str:
    """The folder of this name; made once in a process."""
    if name not in MAKERS:
        raise AttributeError(name)
    if name not in _made:
        if not _root:
            _root.append(Path(tempfile.mkdtemp(prefix="pefttools-adapters-")))
            atexit.register(shutil.rmtree, _root[0], ignore_errors=True)
        folder = _root[0] / name
        folder.mkdir()
        MAKERS[name](folder)
        _made[name] = str(folder)
    return _made[name]


def written(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors,
            **fields: Any) -> None:
    """The right adapter with its tensors changed, and with other settings."""
    from safetensors.torch import load_file, save_file

    tensors = change({name: t.float() for name, t in load_file(SOURCE / WEIGHTS).items()})
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(json.loads((SOURCE / CONFIG).read_text()) | fields))


def scaled(factor: float) -> Callable:
    return lambda tensors: {name: t * factor if ".lora_B." in name else t for name, t in tensors.items()}


def renamed(rule: Callable[[str], str]) -> Callable:
    return lambda tensors: {rule(name): t for name, t in tensors.items()}


def one_entry(value: float) -> Callable:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[min(tensors)].view(-1)[0] = value
        return tensors
    return change


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same ΔW at twice the rank: B with a column of zeros, A with a row that then has no effect."""
    return {name: torch.cat([t, torch.zeros_like(t)], 1) if ".lora_B." in name else torch.cat([t, t], 0)
            for name, t in tensors.items()}


def weights_of_the_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".lora_A.weight", ".weight"): torch.ones(2, 2) for name in tensors if ".lora_A." in name}


def large(folder: Path, layers: int = 16, trained: bool = True,
          names: tuple[str, str] = (LARGE_CONFIG, LARGE_WEIGHTS)) -> None:
    """An adapter of Llama-3.2-1B's shapes (r = 1 on q and v), random."""
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for kind, d_out in (("q_proj", 2048), ("v_proj", 512)):
            where = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
            tensors[f"{where}.lora_A.weight"] = torch.randn(1, 2048, generator=rng) / 45
            tensors[f"{where}.lora_B.weight"] = torch.randn(d_out, 1, generator=rng) * 0.01 * trained
    save_file(tensors, folder / names[1])
    (folder / names[0]).write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 2,
                                               "target_modules": ["q_proj", "v_proj"]}))


def beside(**settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        written(folder)
        large(folder, **settings)
    return make


def without(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        written(folder)
        (folder / name).unlink()
    return make


MAKERS: dict[str, Callable[[Path], None]] = {
    "reference": written,
    "in_float32": lambda folder: written(folder, inference_mode=False),
    "twice_the_rank": lambda folder: written(folder, doubled, r=2, lora_alpha=4),
    "with_the_large_one": beside(),
    "untrained": lambda folder: written(folder, scaled(0.0)),
    "stopped_early": lambda folder: written(folder, scaled(0.25)),
    "diverged": lambda folder: written(folder, scaled(-8.0)),
    "of_the_large_model": lambda folder: large(folder, names=(CONFIG, WEIGHTS)),
    "not_a_number": lambda folder: written(folder, one_entry(float("nan"))),
    "no_configuration": without(CONFIG),
    "no_weights": without(WEIGHTS),
    "another_rank": lambda folder: written(folder, r=8),
    "whole_model": lambda folder: written(folder, weights_of_the_model),
    "names_of_the_model": lambda folder: written(
        folder, renamed(lambda name: name.removeprefix("base_model.model.").replace(".weight", ".default.weight"))),
    "another_method": lambda folder: written(folder, peft_type="IA3"),
    "large_one_broken": beside(layers=15),
    "large_one_untrained": beside(trained=False),
}


def train(to: Path, steps: int = 400) -> None:
    """Train the right one and write it in float16."""
    from safetensors.torch import load_file, save_file

    from pefttools.checkpoint import save_adapter
    from pefttools.inject import attach
    from pefttools.lab import load_base, load_data
    from pefttools.lab import train as fit
    from pefttools.lora import LoRAConfig

    base = load_base("tiny", device="cpu", quiet=True)
    attach(base.model, LoRAConfig(r=1, alpha=2, target_modules="all-linear"), seed=0)
    fit(base.model, load_data("train"), base.tokenizer, steps=steps, lr=1e-2, batch_size=8)
    save_adapter(base.model, to)
    tensors = {name: t.half() for name, t in load_file(to / WEIGHTS).items()}
    save_file(tensors, to / WEIGHTS)
    fields = json.loads((to / CONFIG).read_text()) | {"base_model_name_or_path": "pefttools/lab/tiny"}
    (to / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    for name in (CONFIG, WEIGHTS):
        (to / name).chmod(0o644)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", required=True)
    parser.add_argument("--steps", type=int, default=400)
    train(SOURCE, parser.parse_args().steps)
