"""Several LoRAs made into one new one: the adapter of a task sum, of a negated task, of a merge.

    wanted    ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ                                     wᵢ: given weights,  sᵢ: each adapter's α/r

    kind      A                           B                          rank      ΔW
    svd       V_kᵀ of ΔW = U Σ Vᵀ         U_k Σ_k                    k         the nearest of rank k
    cat       [w₁s₁A₁; w₂s₂A₂; …]         [B₁, B₂, …]                Σ rᵢ      exact
    linear    Σ ±√|wᵢsᵢ| Aᵢ               Σ √|wᵢsᵢ| Bᵢ               r         with cross terms BᵢAⱼ: a rough guess

    magnitude_prune, dare_linear, ties    as linear, over pruned factors: a share `density` of the entries is kept
                                          (the largest; random ones, divided by density; the largest that agree in sign)

The new scale is 1. To act with weights without a new adapter, `set_adapter(model, {"a": 0.7, "b": 0.3})` is exact and
costs both. TIES: Yadav et al. 2023, arXiv:2306.01708; DARE: Yu et al. 2024, arXiv:2311.03099. As peft's
`add_weighted_adapter` (peft/tuners/lora/model.py, peft/utils/merge_utils.py).

A worked number: A₁ = A₂ = [1], B₁ = [2], B₂ = [4], s = w = 1: ΔW = 6; cat and svd give 6, linear (2 + 4)·(1 + 1) = 12.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pefttools.attached import adapter_layers, attached, train_the_active
from pefttools.lora_config import LoRAConfig, check_rank

SAME_RANK = ("linear", "magnitude_prune", "dare_linear", "ties")


# ------------------------------------------------------------------------------------------------ pure functions

def combined(factors: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float], kind: str = "svd",
             rank: int | None = None, density: float = 1.0,
             generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(A, B) of the new adapter, of scale 1, from [(A₁ [r₁, d_in], B₁ [d_out, r₁]), …] and scales wᵢsᵢ."""
    if kind == "cat":
        return (torch.cat([A * scale for (A, _), scale in zip(factors, scales)]),
                torch.cat([B for _, B in factors], dim=1))
    if kind == "svd":
        U, S, Vh = torch.linalg.svd(sum(B @ A * scale for (A, B), scale in zip(factors, scales)), full_matrices=False)
        return Vh[:rank], U[:, :rank] * S[:rank]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales)]     # the sign goes to one of the two
    return (_weighted([A for A, _ in factors], signed, kind, density, generator),
            _weighted([B for _, B in factors], roots, kind, density, generator))


def _weighted(tensors: list[Tensor], weights: list[float], kind: str, density: float,
              generator: torch.Generator | None) -> Tensor:
    if kind != "linear" and density < 1:
        tensors = [_random(t, density, generator) if kind == "dare_linear" else _largest(t, density) for t in tensors]
    stacked = torch.stack(tensors)
    scaled = stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(-1, 1, 1)
    if kind != "ties":
        return scaled.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agree = stacked.sign() == elected
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    kept = torch.zeros_like(tensor).flatten()
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view_as(tensor)


def _random(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    draws = torch.full(tensor.shape, density).bernoulli(generator=generator)
    return tensor * draws.to(tensor) / density


# ------------------------------------------------------------------------------------------------ on a model

@torch.no_grad()
def add_weighted_adapter(model: nn.Module, names: Sequence[str], weights: Sequence[float], new_name: str,
                         kind: str = "svd", rank: int | None = None, density: float = 1.0, seed: int = 0) -> nn.Module:
    """Add the adapter `new_name` = Σ weight·adapter to `model` and return the model. It waits for `set_adapter`.

    `names`, `weights`: adapters attached to this model, and a number for each, negative ones allowed. `kind`: see the
    module. `rank`: of "svd"; by default the largest of them. `density`: what the pruning kinds keep, in (0, 1]. `seed`
    draws for "dare_linear". A layer that only some of them have combines those. One adapter alone is "linear".

    Raises ValueError for an unknown or taken name, unequal numbers of names and weights, an unknown kind, adapters of
    different r in a kind that adds factors, adapters that are no plain LoRA (a DoRA's ΔW does not add up), or a model
    with an adapter merged or disabled.
    """
    note = attached(model)
    names, weights = list(names), [float(weight) for weight in weights]
    kind = "linear" if len(names) == 1 and kind in (*SAME_RANK, "svd", "cat") else kind
    _check(model, names, weights, new_name, kind, density)
    configs = [note.configs[name] for name in names]
    r = sum(c.r for c in configs) if kind == "cat" else max(c.r for c in configs)
    if kind == "svd" and rank is not None:
        check_rank(r := rank)
    where = {path: layer for path, layer in adapter_layers(model) if set(names) & set(layer.names)}
    new = dataclasses.replace(configs[0], r=r, alpha=r, rslora=False, init=True)
    if any((c.target_modules, c.layers_to_transform) != (new.target_modules, new.layers_to_transform) for c in configs):
        new = dataclasses.replace(new, target_modules=sorted(where), layers_to_transform=None)

    generator, made = torch.Generator().manual_seed(seed), {}
    for path, layer in where.items():
        here = [(name, weight * layer.scaling[name]) for name, weight in zip(names, weights) if name in layer.names]
        A, B = combined([_factors(layer, name) for name, _ in here], [scale for _, scale in here], kind, r, density,
                        generator)
        missing = r - len(A)             # a layer that lacks one of them: rows of zeros, so that r is one number
        made[path] = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
    for path, layer in where.items():
        layer.put(new_name, new, *made[path])
    note.configs[new_name], note.layers[new_name] = new, list(where)
    train_the_active(model)
    return model


def _factors(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    if hasattr(layer, "lora_embedding_A"):
        return layer.lora_embedding_A[name].detach(), layer.lora_embedding_B[name].detach()
    return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()


def _check(model: nn.Module, names: list[str], weights: list[float], new_name: str, kind: str, density: float) -> None:
    configs = attached(model).configs
    if unknown := [name for name in names if name not in configs]:
        raise ValueError(f"names: there is no adapter {unknown[0]!r}; this model has {', '.join(configs)}.")
    if not names or len(names) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights: give one finite number for each of the adapters {names}; got {weights}.")
    if not new_name or new_name in configs or "." in new_name:
        raise ValueError(f"new_name must be a new name without dots; got {new_name!r} beside {', '.join(configs)}.")
    if kind not in (*SAME_RANK, "svd", "cat"):
        raise ValueError(f"kind must be one of svd, cat, {', '.join(SAME_RANK)}; got {kind!r}.")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], the share of entries that is kept; got {density}.")
    chosen = [configs[name] for name in names]
    if any(not isinstance(c, LoRAConfig) or c.layer is not None for c in chosen):
        raise ValueError("add_weighted_adapter: only plain LoRA adapters add up to a LoRA; of these, one is a "
                         f"{next(type(c).__name__ for c in chosen if not isinstance(c, LoRAConfig) or c.layer)}.")
    if kind in SAME_RANK and len({c.r for c in chosen}) > 1:
        raise ValueError(f"kind={kind!r} adds the factors, so all adapters must have the same r; they have "
                         f"{[c.r for c in chosen]}. Take kind=\"svd\" or \"cat\".")
    for path, layer in adapter_layers(model):
        if layer.merged or not layer.enabled:
            raise ValueError("add_weighted_adapter: an adapter is merged or disabled. Call unmerge(model) first.")
        if hasattr(layer, "_before_start"):
            raise ValueError(f"add_weighted_adapter: the adapter's start changed the weight of {path}. Make it a plain "
                             f"LoRA first: pefttools.lora_convert.to_plain_lora(model).")
