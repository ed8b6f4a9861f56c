"""Save and load what was trained in an intrinsic subspace: d numbers and the seed of P, in one safetensors file.

    intrinsic.vector [d]      (and intrinsic.scales with `said`)
    check [≤ 64]              the first entries of P·(1, 2, …): does the seed still draw the same P?
    metadata                  config (d, projection, said, seed) and each parameter's name and shape, in order

peft has no such method, so this is a format of our own. A worked number: d = 200 makes 0.8 kB of numbers for a model
of any size; the list of shapes takes more.
"""
from __future__ import annotations

import json
import os
from dataclasses import asdict

import torch
from torch import Tensor, nn

from pefttools.inject import attach, detach
from pefttools.intrinsic import IntrinsicConfig, IntrinsicSubspace, hashed_update, movable


def save_intrinsic(model: nn.Module, file: str | os.PathLike) -> None:
    """Write the d trained numbers as safetensors, with the settings, the seed and the shapes of θ as its metadata.

    Raises ValueError if the model has no subspace.
    """
    from safetensors.torch import save_file

    if not isinstance(subspace := getattr(model, "intrinsic", None), IntrinsicSubspace):
        raise ValueError("save_intrinsic: this model has no intrinsic subspace: attach(model, IntrinsicConfig(d=200)).")
    tensors = {f"intrinsic.{key}": p.detach().contiguous().cpu() for key, p in subspace.named_parameters()}
    shapes = {key.replace(".parametrizations.", ".").removesuffix(".original"): list(p.shape)
              for key, p in movable(model).items() if not key.startswith("intrinsic.")}
    metadata = {"method": "intrinsic", "config": json.dumps(asdict(subspace.config)), "shapes": json.dumps(shapes)}
    save_file(tensors | {"check": _check(subspace)}, file, metadata)


def load_intrinsic(model: nn.Module, file: str | os.PathLike) -> nn.Module:
    """Attach the subspace of `save_intrinsic` to the same base model, and return the model.

    Raises FileNotFoundError, and ValueError for another kind of file, another model, or a torch whose generator draws
    another P from the seed; the model is then as it was.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}
    if metadata.get("method") != "intrinsic":
        raise ValueError(f"load_intrinsic: {file} was not written by save_intrinsic.")
    shapes, saved = {key: list(p.shape) for key, p in movable(model).items()}, json.loads(metadata["shapes"])
    if shapes != saved:
        differ = [key for key in [*saved, *shapes] if saved.get(key) != shapes.get(key)] or ["the order"]
        raise ValueError(f"load_intrinsic: this is another model than the one it was trained in; {differ[0]} is "
                         f"{shapes.get(differ[0])} here and was {saved.get(differ[0])}.")
    attach(model, IntrinsicConfig(**json.loads(metadata["config"])))
    if not torch.allclose(_check(model.intrinsic), tensors.pop("check"), rtol=1e-3):
        detach(model)
        raise ValueError("load_intrinsic: this torch draws other random numbers from the seed than the one that saved "
                         "the file, so P cannot be made again. Load it with the version that trained it.")
    model.intrinsic.load_state_dict({key.removeprefix("intrinsic."): value for key, value in tensors.items()})
    return model


@torch.no_grad()
def _check(subspace: IntrinsicSubspace) -> Tensor:
    module, _, parameters = subspace.before[0]
    row = next(module.parametrizations[key][0].row for key in parameters if key in module.parametrizations)[:64]
    vector = torch.arange(1.0, len(subspace.vector) + 1, device=row.device, dtype=subspace.vector.dtype)
    return (row @ vector if row.dim() == 2 else hashed_update(vector, row, subspace.D)).cpu()
