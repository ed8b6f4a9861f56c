"""Several adapters of one model used together.

    set_adapter(model, "a")                         switch       each request through its own        pefttools.several
    set_adapter(model, {"a": 0.5, "b": 0.5})        average      Σ w_i δ_i(h), of what they compute
    set_adapter(model, ["a", "b"], stacked=True)    stack        a first, and b reads what a made of it
    soup(model, {"a": 0.5, "b": 0.5}, "c")          soup         Σ w_i θ_i, of their parameters: costs what one costs
    with routed(model, ["a", "b", None]): …         route        row i of the batch through its own adapter, at once

Soup: Wortsman et al. 2022, "Model soups", arXiv:2203.05482; of adapters: Chronopoulou et al. 2023, "AdapterSoup",
arXiv:2302.07027. Because the activation stands between the two matrices, averaging the parameters is not averaging the
outputs; only for adapters that were trained from one start is it known to be close.

Routing is what a server of many adapters needs: one batch, one pass through the frozen model, and a small piece for
each adapter in it. (LoRA's servers do the same: S-LoRA, arXiv:2311.03285.)

       batch        frozen layer        + adapter
       row 0  ─┐                   ┌─►   δ_a(row 0)
       row 1  ─┼──►  one matrix  ──┼─►   δ_b(row 1)          equal to running each row alone
       row 2  ─┘      product      └─►   (the base model)
"""
from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.adapter_layers import BottleneckLayer
from pefttools.attached import adapter_layers, attached
from pefttools.inject import attach
from pefttools.layer import AdapterLayer


# ------------------------------------------------------------------------------------------------ soup

@torch.no_grad()
def soup(model: nn.Module, weights: Mapping[str, float], name: str) -> nn.Module:
    """A further adapter `name` whose parameters are Σ w_i θ_i of those given. It waits for `set_adapter`, as any other.

    Meant for weights that sum to 1. Not for LoRA, where the mean of A and the mean of B do not make the mean of B·A:
    there, `set_adapter` with weights is exact. Raises ValueError for an unknown adapter, for adapters in different
    layers, of different shapes or settings, for a weight that is not finite.
    """
    note = attached(model)
    if not weights:
        raise ValueError("soup: name at least one adapter with its weight, such as {\"a\": 0.5, \"b\": 0.5}.")
    for other, weight in weights.items():
        if other not in note.configs:
            raise ValueError(f"soup: there is no adapter {other!r}; this model has {', '.join(note.configs)}.")
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"soup: the weight of {other!r} must be a finite number; got {weight!r}.")
    first, *others = weights
    if any("lora_A" in getattr(layer, "holds", ()) for _, layer in adapter_layers(model)):
        raise ValueError("soup: the mean of A and the mean of B do not make the mean of B·A. For LoRA, "
                         "set_adapter(model, {\"a\": 0.5, \"b\": 0.5}) is the exact average.")
    tensors = {other: _values(model, other) for other in weights}
    for other in others:
        ours, theirs = ({key: tensor.shape for key, tensor in tensors[n].items()} for n in (first, other))
        if ours != theirs or note.configs[first] != note.configs[other]:
            raise ValueError(f"soup: {first!r} and {other!r} differ in their settings, layers or shapes: "
                             f"{note.configs[first]} and {note.configs[other]}. A mean needs the same.")
    attach(model, note.configs[first], name=name)
    for where, layer in adapter_layers(model):
        if first in layer.names:
            layer.read_file_tensors(name, {key: sum(weight * tensors[other][where, key]
                                                    for other, weight in weights.items())
                                           for key in layer.file_tensors(first)})
    return model


def _values(model: nn.Module, name: str) -> dict[tuple[str, str], Tensor]:
    return {(where, key): tensor for where, layer in adapter_layers(model) if name in layer.names
            for key, tensor in layer.file_tensors(name).items()}


# ------------------------------------------------------------------------------------------------ routing

@contextlib.contextmanager
def routed(model: nn.Module, rows: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside the block, row i of every batch goes through the adapter rows[i] alone; None is the base model.

    Works for bottleneck adapters, and for every method whose layers treat one token like another: LoRA, DoRA, IA³,
    layer-norm tuning. `generate` with beams is fine: the beams of a row stay with it. To train with gradient
    checkpointing, call backward inside the block: it runs the layers once more. Raises ValueError for an unknown
    adapter, a merged model, methods without layers of their own (prompts), and, when the model runs, a batch that does
    not have these rows.
    """
    known = attached(model).configs
    rows = [rows] if isinstance(rows, str) else list(rows)
    if not rows:
        raise ValueError("routed: name an adapter (or None for the base model) for each row of the batch.")
    if unknown := [name for name in rows if name is not None and name not in known]:
        raise ValueError(f"routed: there is no adapter {unknown[0]!r}; this model has {', '.join(known)}.")
    layers = [layer for _, layer in adapter_layers(model)]
    if any(layer.merged for layer in layers):
        raise ValueError("routed: an adapter is merged into this model. Call unmerge(model) first.")
    if foreign := [type(layer).__name__ for layer in layers if not isinstance(layer, AdapterLayer)]:
        raise ValueError(f"routed: {foreign[0]} acts on the whole model and not row by row. Run one batch for each "
                         f"adapter, with set_adapter between them.")
    if any("forward" in layer.__dict__ or getattr(layer, "rows", None) for layer in layers):
        raise ValueError("routed: this model is routed already; leave that block first.")
    try:
        for layer in layers:
            if isinstance(layer, BottleneckLayer):
                layer.rows = rows
            else:
                layer.forward = partial(_forward_by_row, layer, rows)
        yield model
    finally:
        for layer in layers:
            if isinstance(layer, BottleneckLayer):
                layer.rows = None
            else:
                layer.__dict__.pop("forward", None)


def _forward_by_row(layer: AdapterLayer, rows: list[str | None], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's own forward, once for each adapter, on that adapter's rows of x."""
    forward, active = type(layer).forward, layer.active
    if x.dim() == 0 or len(x) % len(rows):
        raise ValueError(f"routed: {len(rows)} adapters for a batch of {len(x) if x.dim() else 0} rows; name one for "
                         f"each row.")
    owner = [name for name in rows for _ in range(len(x) // len(rows))]
    names = [name if name in layer.names else None for name in owner]
    order, pieces = [], []
    try:
        for name in dict.fromkeys(names):
            at = [i for i, other in enumerate(names) if other == name]
            layer.active = {} if name is None else {name: 1.0}
            pieces.append(forward(layer, x[torch.tensor(at, device=x.device)], *args, **kwargs))
            order += at
    finally:
        layer.active = active
    back = torch.tensor(order, device=x.device).argsort()
    return torch.cat(pieces)[back] if pieces else forward(layer, x, *args, **kwargs)
