"""Put a method into any model, train only what it added, take it out again.

    attach(model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]), seed=0)

          model.layers.0.self_attn.q_proj = Linear   ──►   LoRALinear(base_layer=that Linear, lora_A, lora_B)
          every other parameter            trainable ──►   frozen (and remembered, so that detach can restore it)

    attach(model, LoRAConfig(r=4), name="french")         a second adapter in the same layers; it does not act yet
    set_adapter(model, "french")                          now it does, and the first does not
    set_adapter(model, {"default": 0.7, "french": 0.3})   both, weighted

A method takes part by two small objects, and nothing here knows which method it is:

    config   .target_modules, .layers_to_transform, .default_targets(model)     which layers (see pefttools.targets)
             .shapes(base) -> {key in the file: shape}      the adapter's tensors for a layer; raises if it cannot wrap it
             .build(base, generator, name) -> layer         the module that takes the layer's place
    layer    a pefttools.layer.AdapterLayer

Methods that change the input of the whole model rather than layers (prompt and prefix tuning) have a config with
`.install(model, generator, name)` instead of `build`: see pefttools.virtual. peft does all this in
peft/tuners/tuners_utils.py and peft/peft_model.py.
"""
from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from pefttools.attached import (Attachment, adapter_layers, adapter_parameters, attached, count_parameters, replace,
                                set_flags, train_the_active, trainable)
from pefttools.merging import check_not_tied, disabled, merge, unmerge
from pefttools.several import delete_adapter, set_adapter
from pefttools.targets import find_targets

__all__ = ["Attachment", "adapter_layers", "adapter_parameters", "attach", "attached", "count_parameters",
           "delete_adapter", "detach", "disabled", "merge", "set_adapter", "trainable", "unmerge"]


@runtime_checkable
class AdapterConfig(Protocol):
    """What `attach` needs to know of a method that wraps layers."""

    def shapes(self, base: nn.Module) -> dict[str, tuple[int, ...]]: ...
    def build(self, base: nn.Module, generator: torch.Generator | None = None, name: str = "default") -> nn.Module: ...


@runtime_checkable
class WholeModelConfig(Protocol):
    """What `attach` needs to know of a method that changes what goes into the model."""

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]: ...
    def install(self, model: nn.Module, generator: torch.Generator | None = None, name: str = "default") -> nn.Module: ...


# ------------------------------------------------------------------------------------------------ in and out

def attach(model: nn.Module, config: AdapterConfig | WholeModelConfig, seed: int = 0, strict: bool = True,
           name: str = "default") -> nn.Module:
    """Wrap the layers that `config` selects, freeze everything but what the method added, and return the same model.

    `seed` draws the random part of the adapters; torch's global generator is left alone. `strict=False` ignores
    targets that select nothing, as peft does, as long as one selects something. A model that has adapters gets a
    further one of the same method under another `name`; who acts stays as it was until `set_adapter`. Checks come
    first: where this raises, the model is as it was. Raises ValueError if the name is taken or does not suit, if
    another method is attached, or nothing is selected (with the names that exist); TypeError if `model` or `config`
    is not one, or a selected layer cannot be wrapped.
    """
    _check_arguments(model, config, name)
    config = copy.copy(config)         # methods note on it what they find in this model
    existing = {target.replace(".base_layer.", "."): layer for target, layer in adapter_layers(model)}
    note = attached(model) if existing else None
    if note:
        _check_second(note, config, name, existing)
    flags = {target: parameter.requires_grad for target, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    targets = {} if isinstance(config, WholeModelConfig) else find_targets(model, config, strict)
    if getattr(config, "changes_base", False):
        check_not_tied(model, targets, "attach", "the start changes the weight, and with it")
    new, extended = {}, []
    try:
        if isinstance(config, WholeModelConfig):
            if note:
                extended = list(existing.values())
                extended[0].add(name, config, generator)
            else:
                config.install(model, generator, name)
        for target, module in targets.items():
            if target in existing:
                extended.append(existing[target])
                existing[target].add(name, config, generator)
            else:
                new[target] = config.build(module, generator, name)
    except BaseException:
        for layer in extended:
            layer.remove(name)
        for layer in new.values():
            layer.restore_base()                       # a start such as PiSSA's has changed the weight
        set_flags(model, flags)
        raise
    model.requires_grad_(False)
    for target in reversed(new):                       # what is inside a wrapped block first
        replace(model, target, new[target])
        if note:
            new[target].active = {}
    if note:
        note.configs[name], note.layers[name] = config, list(targets)
    else:
        model._pefttools = Attachment({name: config}, {name: list(targets)}, flags)
    train_the_active(model)
    return model


def _check_arguments(model: nn.Module, config: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module; got {type(model).__name__}. From load_base(), pass .model.")
    if isinstance(config, type) or not isinstance(config, (AdapterConfig, WholeModelConfig)):
        raise TypeError(f"config must be a configuration of pefttools such as LoRAConfig(r=8); got {config!r}.")
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name must be a word without dots, for it becomes a part of the parameters' names, and no "
                         f"method of a torch module; got {name!r}. Try name=\"second\".")


def _check_second(note: Attachment, config: Any, name: str, layers: dict[str, nn.Module]) -> None:
    if name in note.configs:
        raise ValueError(f"attach: this model has adapters already, one of them called {name!r}. Call detach(model) "
                         f"first, or give this one a name of its own: attach(model, config, name=\"second\").")
    if type(config) is not type(note.config):
        raise ValueError(f"attach: this model has adapters of a {type(note.config).__name__} already, and those of a "
                         f"{type(config).__name__} cannot stand beside them. Call detach(model) first.")
    if any(layer.merged for layer in layers.values()):
        raise ValueError("attach: an adapter is merged into this model. Call unmerge(model) first.")


def detach(model: nn.Module) -> nn.Module:
    """Take all adapters out: the same layers with bit-identical weights, `requires_grad` as before `attach`.

    Merged layers are unmerged first, exactly. The trained adapters are gone unless saved. A model without adapters is
    returned as it is.
    """
    layers = dict(adapter_layers(model))
    if not layers:
        return model
    attachment = attached(model)
    for name in reversed(layers):                      # what is inside a wrapped block first
        layer = layers[name]
        layer.unmerge()
        if hasattr(layer, "uninstall"):
            layer.uninstall()
        else:
            layer.restore_base()
            replace(model, name, layer.base_layer)
    set_flags(model, attachment.requires_grad)
    del model._pefttools
    return model
