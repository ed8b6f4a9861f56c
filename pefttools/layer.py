"""The frame of every adapter: a given layer, frozen, with named adapters around it.

    layer                                   AdapterLayer
      .base_layer        the module it wraps, unchanged
      .<attribute>.<adapter name>…          the adapters' parameters; the attributes are listed in `holds`
      .active            {adapter name: weight} of those that act
      .enabled           False inside `disabled(model)`
      .merged            whether the active adapters are folded into the base layer's own weights

LoRA on one linear layer with two adapters, "default" and "french": `holds = ("lora_A", "lora_B")`, and the state dict
has base_layer.weight, lora_A.default.weight, lora_A.french.weight, lora_B.default.weight, lora_B.french.weight: the
keys that peft has (its frame is `BaseTunerLayer` in peft/tuners/tuners_utils.py). In files peft leaves the adapter's
name out: lora_A.weight.

A method writes `add` (make an adapter's parameters), `forward`, and `merged_tensors` if it can be merged.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AdapterLayer(nn.Module):
    """Base class of all layers that wrap another: names, parameters, files, merging. See the module's docstring."""

    holds: tuple[str, ...] = ()          # attributes that are ModuleDicts or ParameterDicts keyed by adapter name
    can_stack = False                    # whether several adapters can act one after the other

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        base_layer.requires_grad_(False)
        self.base_layer = base_layer
        self.active: dict[str, float] = {}
        self.stacked = False             # several at once: one after the other, rather than side by side
        self.enabled, self.merged = True, False

    # ---- what a method writes
    def add(self, name: str, config: Any, generator: torch.Generator | None = None) -> None:
        """Make the parameters of a new adapter `name` with the settings of `config`. It does not act yet."""
        raise NotImplementedError

    def check_active(self, weights: dict[str, float], stacked: bool) -> None:
        """Raise ValueError unless these adapters can act together in this layer."""
        if stacked and not self.can_stack:
            raise ValueError(f"stacked=True: the adapters of a {type(self).__name__} act side by side; only bottleneck "
                             f"adapters can stand one after the other.")

    def merged_tensors(self) -> dict[str, Tensor]:
        """{"weight": …} (and "bias" if it changes): base_layer's tensors with the active adapters folded in."""
        raise TypeError(f"{type(self).__name__} computes something that no weight of the base layer can express, so "
                        f"it cannot be merged. Keep the adapter attached.")

    def restore_base(self) -> None:
        """Called when the adapters go: undo what a start such as PiSSA's did to the base layer. Most do nothing."""

    # Some models look at a layer's weight (T5 at its dtype).
    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    # ---- names and parameters
    @property
    def names(self) -> list[str]:
        """The adapters that this layer has, in the order in which they were added."""
        return list(dict.fromkeys(name for attribute in self.holds for name in getattr(self, attribute)))

    def adapter_parameters(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """What is trained, of all adapters or of one, by its name in this module ("lora_A.default.weight")."""
        return {f"{attribute}.{key}": parameter for attribute in self.holds
                for key, parameter in getattr(self, attribute).named_parameters()
                if name is None or key.split(".", 1)[0] == name}

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        for attribute in self.holds:
            if name in getattr(self, attribute):
                del getattr(self, attribute)[name]
        self.active.pop(name, None)

    # ---- files: peft's keys are those of the module without the adapter's name
    def file_tensors(self, name: str) -> dict[str, Tensor]:
        """What is saved of one adapter, by its key in the file after the layer's own name ("lora_A.weight")."""
        return {self.file_key(key): parameter.detach() for key, parameter in self.adapter_parameters(name).items()}

    @torch.no_grad()
    def read_file_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take the values that `file_tensors` gives; the parameters stay the same objects."""
        for key, parameter in self.adapter_parameters(name).items():
            parameter.copy_(tensors[self.file_key(key)])

    @staticmethod
    def file_key(key: str) -> str:
        """lora_A.default.weight → lora_A.weight"""
        attribute, _, *rest = key.split(".")
        return ".".join([attribute, *rest])

    # ---- merging
    @torch.no_grad()
    def merge(self) -> None:
        """Fold the active adapters into the base layer's weights: from here on the layer costs what the base costs.

        Merging twice is merging once. The originals are kept while merged, which costs one weight of memory, so that
        `unmerge` is exact in every dtype. Raises TypeError where the weight is not a floating-point tensor (a
        quantized layer) or the method cannot be merged, ValueError where the result is not finite; the layer is then
        unchanged.
        """
        if self.merged:
            return
        weight = getattr(self.base_layer, "weight", None)
        if weight is not None and not weight.is_floating_point():
            raise TypeError(f"merge: the weight is stored as {weight.dtype} (quantized), and adding to its codes means "
                            f"nothing. Keep the adapter apart, or dequantize the layer first.")
        merged = {key: tensor.to(getattr(self.base_layer, key).dtype) for key, tensor in self.merged_tensors().items()}
        for key, tensor in merged.items():
            if not tensor.isfinite().all():
                raise ValueError(f"merge: the {key} with the adapter in it has NaN or infinite entries in "
                                 f"{tensor.dtype}; the adapter has diverged, or its update is too large for this "
                                 f"dtype. Nothing was changed.")
        for key, tensor in merged.items():
            # buffers, so that .to(device) takes them along
            self.register_buffer(f"_original_{key}", getattr(self.base_layer, key).data, persistent=False)
            getattr(self.base_layer, key).data = tensor
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base layer's own tensors back, exactly. Unmerging twice is unmerging once."""
        if not self.merged:
            return
        for key in ("weight", "bias"):
            if hasattr(self, f"_original_{key}"):
                getattr(self.base_layer, key).data = getattr(self, f"_original_{key}")
                delattr(self, f"_original_{key}")
        self.merged = False
