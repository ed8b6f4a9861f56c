"""Adapters off for a while, folded into their weights, and out of them again.

    with disabled(model): …        y = W₀ x                        the base model speaks
    merge(model)                   W = W₀ + ΔW, y = W x            no cost at inference
    unmerge(model)                 W₀ again, exactly: it was kept

What folding means is each layer's own (`merged_tensors` in `pefttools.layer`). These are imported from
`pefttools.inject`, beside `attach` and `detach`.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from pefttools.attached import adapter_layers


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """`with disabled(model):` the base model speaks. Afterwards everything is as before, after an exception too.

    Merged layers are unmerged inside the block, and merged again at its end. Raises ValueError without adapters.
    """
    layers = [layer for _, layer in _layers_of(model, "disabled")]
    before = [(layer.enabled, layer.merged) for layer in layers]
    try:
        for layer in layers:
            layer.unmerge()
            layer.enabled = False
        yield model
    finally:
        for layer, (enabled, merged) in zip(layers, before):
            layer.enabled = enabled
            if merged:
                layer.merge()


def merge(model: nn.Module) -> nn.Module:
    """Fold the active adapters into their weights: no cost at inference. Merging twice is merging once; `unmerge` is exact.

    Raises ValueError without adapters, inside `disabled(model)`, and where a weight is tied (merging into an output
    head that shares its weight with the embedding would change both); and what a layer's `merge` raises. The model is
    then as it was.
    """
    layers = list(_layers_of(model, "merge"))
    for name, layer in layers:
        if not layer.enabled:
            raise ValueError(f"merge: the adapter of {name!r} is disabled. Merge outside of `with disabled(model)`.")
    check_not_tied(model, {name: getattr(layer, "base_layer", None) for name, layer in layers}, "merge",
                    "merging into one would change")
    done = []
    for name, layer in layers:
        try:
            fresh = not layer.merged
            layer.merge()
        except (TypeError, ValueError) as error:
            for other in done:
                other.unmerge()
            raise type(error)(f"{name}: {error}") from None
        if fresh:
            done.append(layer)
    return model


def check_not_tied(model: nn.Module, layers: dict[str, Any], who: str, why: str) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    for name, layer in layers.items():
        if len(shared := owners.get(id(getattr(layer, "weight", None)), [])) > 1:
            raise ValueError(f"{who}: {' and '.join(shared)} are one tied tensor, and {why} the other. Leave "
                             f"{name.rsplit('.', 1)[-1]!r} out of target_modules, or untie the weights.")


def unmerge(model: nn.Module) -> nn.Module:
    """Take every adapter out of its weight again, exactly; twice is once. Raises ValueError without adapters."""
    for _, layer in _layers_of(model, "unmerge"):
        layer.unmerge()
    return model


def _layers_of(model: nn.Module, who: str) -> list[tuple[str, nn.Module]]:
    layers = list(adapter_layers(model))
    if not layers:
        raise ValueError(f"{who}: this model has no adapters. Call attach(model, config) first.")
    return layers
