"""LoRA+: B learns faster than A.

    η_B = λ · η_A,      λ about 16,      η_A = lr

Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354, section 4: with one rate
for both, either A hardly learns or B is unstable as the model gets wide; what works is η_A ~ 1/width and η_B ~ 1.

    group                   parameters                                      rate                weight decay
    0                       A, and whatever trains besides                  lr                  weight_decay
    1                       both factors of an embedding                    lr_embedding        weight_decay
    2                       B, and what has one dimension (DoRA's m)        lr · ratio          weight_decay
    3                       of those: biases and layer norms                lr · ratio          0

A worked number: lr = 1e-4 and ratio = 16: A trains at 1e-4, B at 1.6e-3. The groups are those of peft's
`create_loraplus_optimizer` (peft/optimizers/loraplus.py), in its order.
"""
from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import torch
from torch import nn

from pefttools.attached import trainable


def loraplus_groups(model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0,
                    lr_embedding: float = 1e-6) -> list[dict[str, Any]]:
    """The four parameter groups of the table for what is trainable in `model`; every parameter is in exactly one.

    For any torch optimizer: `AdamW(loraplus_groups(model, lr=1e-4))`. A group may be empty. Raises ValueError for a
    rate or ratio that is not a finite number above 0, a negative decay, or a model in which no LoRA trains.
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("lr_embedding", lr_embedding), ("weight_decay", weight_decay)):
        least = "0 or more" if name == "weight_decay" else "above 0"
        if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0 or \
                value == 0 and name != "weight_decay":
            raise ValueError(f"{name} must be a finite number {least}; got {value!r}. Common: lr=1e-4, ratio=16.")
    parameters = trainable(model)
    if not any("lora_B" in name or "lora_embedding_B" in name for name in parameters):
        raise ValueError("loraplus: no LoRA trains in this model. Call attach(model, LoRAConfig(r=8)) first.")
    norms = tuple(getattr(sys.modules.get("transformers.pytorch_utils"), "ALL_LAYERNORM_LAYERS", [nn.LayerNorm]))
    in_norms = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}

    rates = [lr, lr_embedding, lr * ratio, lr * ratio]
    groups = [{"params": [], "weight_decay": 0.0 if i == 3 else weight_decay, "lr": rate}
              for i, rate in enumerate(rates)]
    for name, parameter in parameters.items():
        if "lora_embedding_" in name:
            group = 1
        elif "lora_B" in name or parameter.ndim == 1:
            group = 3 if "bias" in name or id(parameter) in in_norms else 2
        else:
            group = 0
        groups[group]["params"].append(parameter)
    return groups


def loraplus_optimizer(model: nn.Module, optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW, *, lr: float,
                       ratio: float = 16.0, weight_decay: float = 0.0, lr_embedding: float = 1e-6,
                       **options: Any) -> torch.optim.Optimizer:
    """`optimizer_cls` over `loraplus_groups(…)`; `options` go to it (betas, …). Raises what that function raises."""
    return optimizer_cls(loraplus_groups(model, lr, ratio, weight_decay, lr_embedding), lr=lr, **options)
