"""What is attached to a model: the adapter layers, their parameters, what trains, and how much that is.

`pefttools.inject` puts adapters in and takes them out; everybody who only looks, looks from here.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Attachment:
    """What `attach` notes on the model, and `detach` needs."""

    configs: dict[str, Any]            # adapter name → its configuration, in the order of attaching
    layers: dict[str, list[str]]       # adapter name → the modules that it sits in, in the model's order
    requires_grad: dict[str, bool]     # of every parameter before

    @property
    def config(self) -> Any:
        """The first adapter's configuration."""
        return next(iter(self.configs.values()))

    @property
    def names(self) -> list[str]:
        """The modules that were wrapped."""
        return list(dict.fromkeys(name for names in self.layers.values() for name in names))


def attached(model: nn.Module) -> Attachment:
    """What `attach` noted on this model. Raises ValueError if it has no adapters, or they were put in otherwise."""
    attachment = getattr(model, "_pefttools", None)
    if attachment is None:
        raise ValueError("this model has no adapters attached: call attach(model, config) first, and pass the same "
                         "model here (not a part of it, nor a wrapper around it).")
    return attachment


# ------------------------------------------------------------------------------------------------ what was added

def adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every module that lists adapter parameters, in the model's order."""
    for name, module in model.named_modules():
        if callable(getattr(module, "adapter_parameters", None)):
            yield name, module


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """What the attached method added (with `name`, that one adapter only), by full name."""
    return {f"{where}.{key}" if where else key: parameter
            for where, layer in adapter_layers(model) for key, parameter in layer.adapter_parameters(name).items()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that training will change, by name: `AdamW(trainable(model).values(), lr=…)`.

    After `attach` these are the active adapters' parameters; whatever else you unfreeze by hand is here too. Without
    adapters it is the whole model, as for full fine-tuning.
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total), equal to peft's `get_nb_trainable_parameters`: a tied weight counts once."""
    sizes = [(_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def _numel(parameter: nn.Parameter) -> int:
    # A 4-bit weight, ours or bitsandbytes', holds two codes in each byte.
    packed = parameter.dtype == torch.uint8 or type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)


# ------------------------------------------------------------------------------------------------ for those who put in and take out

def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def set_flags(model: nn.Module, requires_grad: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(requires_grad.get(name, parameter.requires_grad))


def train_the_active(model: nn.Module) -> None:
    for _, layer in adapter_layers(model):
        for name in layer.names:
            for parameter in layer.adapter_parameters(name).values():
                parameter.requires_grad_(name in layer.active)
