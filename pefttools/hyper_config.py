"""The settings of a hypernetwork, how it gets into a model, and how its adapters are written out for good.

    attach(model, HyperConfig(bottleneck=24), name="cola")
    attach(model, HyperConfig(bottleneck=24), name="rte")       a second task: one more embedding of e numbers
    set_adapter(model, "rte")
    fold(model)                                                 plain adapters for "rte", and no network any more

What it computes is in `pefttools.hyper` (Mahabadi et al. 2021, arXiv:2106.04489). Every projection at the end of an
attention or a feed-forward gets a forward hook that adds its adapter's update (Houlsby's places, see
`pefttools.placements`); in T5 the layers of the encoder and of the decoder are numbered through. peft has no such
method: the files are peft's two with peft_type "HYPER", and load here.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pefttools.adapters import check_settings, whole
from pefttools.hyper import ATTRIBUTE, Behind, HyperAdapters, shared_tensors
from pefttools.placements import AdapterConfig
from pefttools.sites import find_sites
from pefttools.sublayers import as_list, pick_layers


@dataclass(frozen=True)
class HyperConfig:
    """Adapters after attention and after the feed-forward (Houlsby's places), written by one network.

    `bottleneck` m; `e` the width of the embeddings; `hidden` the MLP's. The defaults of e and hidden are the paper's.
    """

    bottleneck: int = 24
    e: int = 64
    hidden: int = 128
    activation: str = "gelu"
    layer_norm: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    drop_layers: Sequence[int] | int | None = None

    def __post_init__(self) -> None:
        check_settings(self.bottleneck, self.activation, 1.0, 0.0, False, "zero")
        whole("e", self.e)
        whole("hidden", self.hidden)

    def one(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """{name in BottleneckAdapter: shape} of what is generated for one site."""
        m = self.bottleneck
        return {"down.weight": (m, d_model), "down.bias": (m,), "up.weight": (d_model, m), "up.bias": (d_model,)} \
            | ({"norm.weight": (d_model,), "norm.bias": (d_model,)} if self.layer_norm else {})

    def sites(self, model: nn.Module) -> tuple[list[tuple[nn.Module, int, int]], int]:
        """([(projection, number of its layer among all stacks' layers, 0 attention or 1 feed-forward)], d_model)."""
        layers = pick_layers(model, self.layers_to_transform, self.drop_layers)
        ends = set(find_sites(model, "pfeiffer", layers))
        found = find_sites(model, "houlsby", layers)
        number = {layer: i for i, layer in enumerate(layers)}
        return [(module, next(number[layer] for layer in layers if name.startswith(f"{layer}.")), int(name in ends))
                for name, (module, _) in found.items()], next(iter(found.values()))[1].d_model

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The tensors in the file, by their complete keys."""
        sites, d_model = self.sites(model)
        shared = shared_tensors(self, d_model, 1 + max(i for _, i, _ in sites), torch.Generator())
        return {f"{ATTRIBUTE}.task": (self.e,)} | {f"{ATTRIBUTE}.shared.{key}": tuple(tensor.shape)
                                                   for key, tensor in shared.items()}

    def install(self, model: nn.Module, generator: torch.Generator | None = None,
                name: str = "default") -> HyperAdapters:
        """Put the network into `model.hyper_adapters`, and a hook on every projection."""
        sites, d_model = self.sites(model)
        like = next(p for p in model.parameters() if p.is_floating_point())
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        frame = HyperAdapters(sites, d_model, self, generator, dtype, like.device)
        frame.add(name, self, generator)
        frame.active = {name: 1.0}
        frame._model = (model,)                  # in a tuple, so that the model is not taken for a part of it
        setattr(model, ATTRIBUTE, frame.train(model.training))
        frame._hooks = [module.register_forward_hook(Behind(frame, site)) for site, (module, _, _) in enumerate(sites)]
        return frame

    def to_peft(self) -> dict[str, Any]:
        return {"peft_type": "HYPER", "bottleneck": self.bottleneck, "e": self.e, "hidden": self.hidden,
                "activation": self.activation, "layer_norm": self.layer_norm,
                "layers_to_transform": as_list(self.layers_to_transform), "drop_layers": as_list(self.drop_layers)}

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> HyperConfig:
        return cls(**{name: fields[name] for name in cls().to_peft() if name != "peft_type"})


def fold(model: nn.Module, name: str | None = None) -> nn.Module:
    """Replace the hypernetwork by the plain adapters that it writes for one task (None: the active one).

    Equal outputs, without the cost of writing the adapters at every step; the other tasks are gone from this model.
    """
    from pefttools.inject import adapter_layers, attach, detach

    frame = getattr(model, ATTRIBUTE, None)
    if frame is None:
        raise ValueError("fold: this model has no hypernetwork; attach(model, HyperConfig(…)) puts one in.")
    if name is not None and name not in frame.tasks:
        raise ValueError(f"fold: there is no task {name!r}; this model has {', '.join(frame.tasks)}.")
    weights, config = frame.active if name is None else {name: 1.0}, frame.config
    with torch.no_grad():
        written = [frame.generated(site, weights) for site in range(len(frame.where))]
    detach(model)
    attach(model, AdapterConfig("houlsby", config.bottleneck, activation=config.activation,
                                layer_norm="after" if config.layer_norm else False,
                                layers_to_transform=config.layers_to_transform, drop_layers=config.drop_layers))
    for (_, layer), tensors in zip(adapter_layers(model), written, strict=True):
        layer.bottleneck["default"].load_state_dict(tensors)
    return model
