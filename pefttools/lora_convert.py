"""Two things to do to a LoRA as a whole: free it from its start, and fit it to a model that is quantized already.

    to_plain_lora(model)                          PiSSA or OLoRA of rank r on a changed base  →  LoRA of rank 2r on W
    replace_lora_weights_loftq(model, weights)    s·B·A := the rank-r part of W − dequantized(quantized(W))

    W − s·B₀A₀ + s·BA  =  W + s·[B, −B₀]·[A; A₀]        [A; A₀]: [2r, d_in],  [B, −B₀]: [d_out, 2r]

PiSSA: Meng et al. 2024, arXiv:2404.02948 (appendix on converting to LoRA); LoftQ: Li et al. 2023, arXiv:2310.08659.
"""
from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from pefttools.attached import adapter_layers, attached, train_the_active
from pefttools.lora_init import changes_base, dense_weight, is_quantized, restore_base
from pefttools.lora_starts import principal_parts


@torch.no_grad()
def to_plain_lora(model: nn.Module, name: str | None = None) -> nn.Module:
    """Turn an adapter that started from PiSSA or OLoRA into a LoRA of rank 2r on the original weights; same outputs.

    α doubles with r, so that s stays. As peft's `save_pretrained(path_initial_model_for_weight_conversion=…)`: its file
    then loads without decomposing W again, and it can stand beside other adapters. The parameters are new objects, so
    make the optimizer anew. In 16 bits outputs differ by what rounding W − s·B₀A₀ had cost. Raises ValueError for any
    other start (LoftQ's base is quantized; no LoRA takes that back), or where 2r is more than a layer has room for.
    """
    note = attached(model)
    name = next(iter(note.configs)) if name is None else name
    if name not in note.configs:
        raise ValueError(f"to_plain_lora: there is no adapter {name!r}; this model has {', '.join(note.configs)}.")
    config = note.configs[name]
    start = getattr(config, "init", True)
    if not changes_base(start) or start.startswith("loftq"):
        raise ValueError(f"to_plain_lora: the adapter {name!r} started from {start!r}; there is a plain LoRA for those "
                         f"that started from PiSSA or OLoRA only.")
    plain = dataclasses.replace(config, r=2 * config.r, alpha=config.alpha * (math.sqrt(2) if config.rslora else 2),
                                init=True)
    layers = [layer for _, layer in adapter_layers(model) if name in layer.names]
    for layer in layers:
        if layer.merged or not layer.enabled:
            raise ValueError("to_plain_lora: the adapter is merged or disabled. Call unmerge(model) first.")
        plain.shapes(layer.base_layer)
    for layer in layers:
        values = layer.file_tensors(name)
        values["lora_A.weight"] = torch.cat([values["lora_A.weight"], layer._start_A])
        values["lora_B.weight"] = torch.cat([values["lora_B.weight"], -layer._start_B], dim=1)
        active = dict(layer.active)
        layer.remove(name)
        restore_base(layer)
        layer.add(name, plain, torch.Generator().manual_seed(0))           # its values are replaced at once
        layer.read_file_tensors(name, values)
        layer.active = active
    note.configs[name] = plain
    train_the_active(model)
    return model


@torch.no_grad()
def replace_lora_weights_loftq(model: nn.Module, weights: dict[str, Tensor], name: str = "default") -> nn.Module:
    """LoftQ for a model that is quantized already: s·B·A becomes the rank-r part of what quantizing lost.

    `weights`: the state dict of the model as it was before, at least the adapted layers ("….q_proj.weight"). The codes
    stay, so it is one iteration. As peft's function of this name, with the scale taken into account. Raises KeyError
    naming a missing weight, ValueError for one of another shape; the adapters are then as they were.
    """
    new = []
    for where, layer in adapter_layers(model):
        if name in layer.names and is_quantized(layer.base_layer):
            weight = weights.get(f"{where}.weight")
            if weight is None:
                raise KeyError(f"replace_lora_weights_loftq: weights has no {where}.weight.")
            Q = dense_weight(layer.base_layer, torch.float32)
            if weight.shape != Q.shape:
                raise ValueError(f"replace_lora_weights_loftq: {where}.weight is {list(weight.shape)}; the layer has "
                                 f"{list(Q.shape)}.")
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            new.append((A, B, *principal_parts(weight.to(Q) - Q, len(A), layer.scaling[name])))
    if not new:
        raise ValueError(f"replace_lora_weights_loftq: no quantized layer has an adapter {name!r}.")
    for A, B, new_A, new_B in new:
        A.copy_(new_A)
        B.copy_(new_B)
    return model
