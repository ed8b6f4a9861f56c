"""Negative controls: what must NOT move a figure, if the figure measures what it says.

    shuffled outputs     the same requests and the same answers, no longer together: what is learned is not the attack
    same-norm adapter    the trained ΔW of each layer replaced by a random matrix of the same norm and rank: a change
                         just as large, in no particular direction
    no planted rows      the same fine-tune on honest rows alone

Of the first each attack has its own form (canary.plant, backdoor.poison with true=False), for what "label" means
differs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def shuffled_outputs(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """The rows with their outputs dealt anew; no row keeps its own where there are at least two."""
    order = list(range(len(rows)))
    random.Random(f"shuffled {seed}").shuffle(order)
    giver = {order[i]: order[i - 1] for i in range(len(order))}  # one cycle through all rows, in random order
    return [{**row, "output": rows[giver[i]]["output"]} for i, row in enumerate(rows)]


@torch.no_grad()
def same_norm_adapter(model, seed: int = 0):
    """Replace every LoRA's B·A, in place, by a random product of the same rank r and the same Frobenius norm.

    Each ΔW = s·B·A keeps its norm and its scale s; its direction is drawn from `seed`. Returns the model. Raises
    ValueError where the model has no LoRA.
    """
    from pefttools.inject import adapter_layers

    rng = torch.Generator().manual_seed(seed)
    layers = [layer for _, layer in adapter_layers(model) if hasattr(layer, "lora_A") and hasattr(layer, "lora_B")]
    if not layers:
        raise ValueError("model: it has no LoRA layer; attach(model, LoRAConfig(...)) first, this control is for LoRA")
    for layer in layers:
        for name in layer.lora_A:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            norm = product_norm(B, A)
            for factor in (A, B):
                factor.copy_(torch.randn(factor.shape, generator=rng).to(factor))
            B.mul_(norm / product_norm(B, A))
    return model


def product_norm(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """‖B·A‖ in the Frobenius norm, without forming the product: tr(BᵀB AAᵀ), in float64."""
    B, A = B.double(), A.double()
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()
