"""Several adapters in one model: who acts, with which weight, and who goes.

    attach(model, LoRAConfig(r=8))                        the first acts
    attach(model, LoRAConfig(r=4), name="french")         the second waits
    set_adapter(model, "french")                          one instead of the other: one base, switched per task
    set_adapter(model, ["default", "french"])             both: their updates add up, as in peft
    set_adapter(model, {"default": 0.7, "french": 0.3})   both, weighted
"""
from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

from torch import nn

from pefttools.attached import adapter_layers, attached, replace, train_the_active


def set_adapter(model: nn.Module, names: str | Sequence[str] | Mapping[str, float], stacked: bool = False) -> nn.Module:
    """Choose who acts: one adapter, several (their updates add up), or several with weights: {"a": 0.7, "b": 0.3}.

    Those that act are trained, the others frozen, as in peft. `stacked` (bottleneck adapters): one after the other in
    the given order instead of side by side. Raises ValueError for an unknown name, a weight that is not finite, a
    merged model, or adapters that cannot act together; the model is then as it was.
    """
    weights = {names: 1.0} if isinstance(names, str) else dict(names) if isinstance(names, Mapping) \
        else dict.fromkeys(names, 1.0)
    known = attached(model).configs
    if unknown := [name for name in weights if name not in known]:
        raise ValueError(f"set_adapter: there is no adapter {unknown[0]!r}; this model has {', '.join(known)}.")
    if not weights:
        raise ValueError("set_adapter: name at least one adapter; for the base model alone use `with disabled(model)`.")
    for name, weight in weights.items():
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"set_adapter: the weight of {name!r} must be a finite number; got {weight!r}.")
    layers = [layer for _, layer in adapter_layers(model)]
    if any(layer.merged for layer in layers):
        raise ValueError("set_adapter: an adapter is merged into this model. Call unmerge(model) first.")
    of_layer = [{name: float(w) for name, w in weights.items() if name in layer.names} for layer in layers]
    for layer, some in zip(layers, of_layer):
        if some:
            layer.check_active(some, stacked)
    for layer, some in zip(layers, of_layer):
        layer.active, layer.stacked = some, stacked
    train_the_active(model)
    return model


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Forget one of several adapters. Raises ValueError for an unknown name, the last one (use `detach`), one that acts."""
    note = attached(model)
    if name not in note.configs:
        raise ValueError(f"delete_adapter: there is no adapter {name!r}; this model has {', '.join(note.configs)}.")
    if len(note.configs) == 1:
        raise ValueError(f"delete_adapter: {name!r} is the only adapter. Call detach(model) to take it out.")
    if any(name in layer.active for _, layer in adapter_layers(model)):
        others = [other for other in note.configs if other != name]
        raise ValueError(f"delete_adapter: {name!r} acts. Call set_adapter(model, {others[0]!r}) first.")
    del note.configs[name], note.layers[name]
    for where, layer in reversed(list(adapter_layers(model))):
        layer.remove(name)
        if not layer.names:
            layer.restore_base()
            replace(model, where, layer.base_layer)
    return model
