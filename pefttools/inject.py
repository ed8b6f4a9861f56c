"""Put a method into any model, train only what it added, take it out again.

    attach(model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]), seed=0)

          model.layers.0.self_attn.q_proj = Linear   ──►   LoRALinear(base_layer=that Linear, lora_A, lora_B)
          every other parameter            trainable ──►   frozen (and remembered, so that detach can restore it)

A method takes part by two small objects, and nothing here knows which method it is:

    config   .target_modules, .layers_to_transform   which layers
             .shapes(base) -> {name: shape}          the adapter parameters for this layer; raises if it cannot wrap it
             .build(base, generator) -> layer        the module that takes the layer's place
    layer    .base_layer                             the layer it wraps, unchanged
             .adapter_parameters() -> {name: Parameter}     what is trained and saved; no guessing from names
             .enabled, .merged, .merge(), .unmerge()

Which layers `target_modules` selects is in `pefttools.targets`. peft does all this in peft/tuners/tuners_utils.py.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from pefttools.targets import find_targets


@runtime_checkable
class AdapterConfig(Protocol):
    """What `attach` needs to know of a method."""

    target_modules: Any
    layers_to_transform: Any

    def shapes(self, base: nn.Module) -> dict[str, tuple[int, ...]]: ...
    def build(self, base: nn.Module, generator: torch.Generator | None = None) -> nn.Module: ...


@dataclass
class Attachment:
    """What `attach` notes on the model, and `detach` needs."""

    config: AdapterConfig
    names: list[str]                   # the modules that were wrapped, in the model's order
    requires_grad: dict[str, bool]     # of every parameter before


# ------------------------------------------------------------------------------------------------ in and out

def attach(model: nn.Module, config: AdapterConfig, seed: int = 0, strict: bool = True) -> nn.Module:
    """Wrap the layers that `config` selects, freeze everything but what the method added, and return the same model.

    `seed` draws the random part of the adapters; torch's global generator is left alone. `strict=False` ignores names
    that select nothing, as peft does, as long as one selects something. Checks come first: where this raises, the
    model is as it was. Raises ValueError if adapters are attached already or nothing is selected (with the names that
    exist), TypeError if `model` or `config` is not one, or a selected layer cannot be wrapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module; got {type(model).__name__}. From load_base(), pass .model.")
    if isinstance(config, type) or not isinstance(config, AdapterConfig):
        raise TypeError(f"config must be a configuration of pefttools such as LoRAConfig(r=8); got {config!r}.")
    if any(True for _ in adapter_layers(model)):
        raise ValueError("attach: this model has adapters already. Call detach(model) first, or load the base anew.")
    targets = find_targets(model, config, strict)

    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    try:
        layers = {name: config.build(module, generator) for name, module in targets.items()}
    except BaseException:
        _restore(model, requires_grad)
        raise
    model.requires_grad_(False)
    for name, layer in layers.items():
        _replace(model, name, layer)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    model._pefttools = Attachment(config, list(targets), requires_grad)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the adapters out: the same layers with bit-identical weights, `requires_grad` as before `attach`.

    Merged layers are unmerged first, exactly. The trained adapter is gone unless saved. A model without adapters is
    returned as it is.
    """
    layers = dict(adapter_layers(model))
    if not layers:
        return model
    attachment = attached(model)
    for name, layer in layers.items():
        layer.unmerge()
        _replace(model, name, layer.base_layer)
    _restore(model, attachment.requires_grad)
    del model._pefttools
    return model


def attached(model: nn.Module) -> Attachment:
    """What `attach` noted on this model. Raises ValueError if it has no adapters, or they were put in otherwise."""
    attachment = getattr(model, "_pefttools", None)
    if attachment is None:
        raise ValueError("this model has no adapters attached: call attach(model, config) first, and pass the same "
                         "model here (not a part of it, nor a wrapper around it).")
    return attachment


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _restore(model: nn.Module, requires_grad: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(requires_grad.get(name, parameter.requires_grad))


# ------------------------------------------------------------------------------------------------ what was added

def adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every module that lists adapter parameters, in the model's order."""
    for name, module in model.named_modules():
        if callable(getattr(module, "adapter_parameters", None)):
            yield name, module


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the attached method added, by full name: this is what is saved."""
    return {f"{name}.{key}" if name else key: parameter
            for name, layer in adapter_layers(model) for key, parameter in layer.adapter_parameters().items()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that training will change, by name: `AdamW(trainable(model).values(), lr=…)`.

    After `attach` these are the adapter parameters; whatever else you unfreeze by hand is here too. Without adapters
    it is the whole model, as for full fine-tuning.
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total), equal to peft's `get_nb_trainable_parameters`: a tied weight counts once."""
    sizes = [(_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def _numel(parameter: nn.Parameter) -> int:
    # bitsandbytes' 4-bit weight holds two codes in each byte.
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)


# ------------------------------------------------------------------------------------------------ on, off, merged

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
    """Fold every adapter into its weight: no cost at inference. Merging twice is merging once; `unmerge` is exact.

    Raises ValueError without adapters, inside `disabled(model)`, and where a weight is tied (merging into an output
    head that shares its weight with the embedding would change both); and what a layer's `merge` raises. The model is
    then as it was.
    """
    layers = list(_layers_of(model, "merge"))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    for name, layer in layers:
        if not layer.enabled:
            raise ValueError(f"merge: the adapter of {name!r} is disabled. Merge outside of `with disabled(model)`.")
        if len(shared := owners[id(layer.base_layer.weight)]) > 1:
            raise ValueError(f"merge: {' and '.join(shared)} are one tied tensor, and merging into one would change "
                             f"the other. Leave {name.rsplit('.', 1)[-1]!r} out of target_modules, or untie the weights.")
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
