"""Where bottleneck adapters are put, by one word: attach(model, AdapterConfig("houlsby", bottleneck=64)).

      one layer of the model             houlsby   pfeiffer   parallel    bapna     input, output
      x ─┬──────────────┐                                                           before the first layer
         attention      │
         │ ◄────────────│──────────────── δ
         + ◄────────────┘
         ├──────────────┬──────────────┐
         feed-forward   │              └──────────────── δ
         │ ◄────────────│──────────────── δ ────── δ     │
         + ◄────────────┴────────────────────────────────┘
         │ ◄──────────────────────────────────────────────────────── δ
         y                                                                          after the last layer

    houlsby   after attention and after the feed-forward, each before its residual sum: 2 in a layer (arXiv:1902.00751)
    pfeiffer  after the feed-forward only: 1 in a layer (Pfeiffer et al. 2021, arXiv:2005.00247; where their search over
              variants also moves the residual and a norm, the position is Houlsby's second one here)
    bapna     after the whole layer, residual sum included, reading LN(h) by a norm of its own (Bapna & Firat 2019,
              arXiv:1909.08478)
    parallel  beside the feed-forward, fed by what that is given, with s = 4 (He et al. 2022, arXiv:2110.04366)
    input     one in the model: on what goes into the first layer (T5: of each stack)
    output    one: on what comes out of the last layer, before the final norm;  input_output: both

A worked number: Llama-3.2-1B (16 layers, d = 2048), m = 64: one adapter has 264,256 parameters (`bottleneck_size`);
pfeiffer and parallel 4,228,096; houlsby 8,456,192; bapna, with its norms (2d each), 4,293,632; input_output 528,512.

In T5 the self-attention counts as "attention", and the attention to the encoder gets no adapter. Where a model has
dropout between a projection and the residual sum, the adapter stands before it. `train_layer_norms` trains the norms of
the same layers too, as Houlsby et al. do, by `pefttools.ln_tuning`. peft has no such method: a saved adapter has peft's
two files with peft_type "BOTTLENECK", which load here.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pefttools.adapter_layers import AfterLayer, BesideLayer, BlockLayer, BottleneckLayer, ResidualLayer, TappedLayer
from pefttools.adapters import BottleneckAdapter, bottleneck_size, check_settings, whole
from pefttools.layer import AdapterLayer
from pefttools.ln_tuning import LNTuningLayer, norm_shapes
from pefttools.sites import PLACEMENTS, Site, find_sites, norms_of
from pefttools.sublayers import Notes, as_list, features, pick_layers
from pefttools.targets import is_linear

LAYERS: dict[str, type[BottleneckLayer]] = {
    layer.kind: layer for layer in (AfterLayer, BesideLayer, ResidualLayer, TappedLayer, BlockLayer)}


@dataclass(frozen=True)
class AdapterConfig:
    """Bottleneck adapters: where, how narrow, and of which kind. See the module's docstring for the placements.

    `bottleneck` is m itself; or `reduction_factor`, d_model / m (16 if neither is given). `scale` is s, a number or
    "learned"; None is the paper's: 4 for parallel, else 1. `layer_norm`: False, "before" or "after"; None is the
    paper's: "before" for bapna, else none. `layers_to_transform`: only in these layers, counted from 0; `drop_layers`:
    in all but these (the lowest matter least: Houlsby et al., section 3.6). Raises ValueError for what makes no sense.
    """

    placement: str = "pfeiffer"
    bottleneck: int | None = None
    reduction_factor: float | None = None
    activation: str = "relu"
    scale: float | str | None = None
    dropout: float = 0.0
    layer_norm: bool | str | None = None
    init: str = "zero"
    train_layer_norms: bool = False
    layers_to_transform: Sequence[int] | int | None = None
    drop_layers: Sequence[int] | int | None = None
    _sites: Notes = field(default_factory=Notes, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {self.placement!r}.")
        if self.bottleneck is not None and self.reduction_factor is not None:
            raise ValueError(f"give bottleneck (the width m) or reduction_factor (d_model / m), and not both; got "
                             f"bottleneck={self.bottleneck!r} and reduction_factor={self.reduction_factor!r}.")
        if self.reduction_factor is not None and not self.reduction_factor > 0:
            raise ValueError(f"reduction_factor must be a number above 0; got {self.reduction_factor!r}. Try 16.")
        check_settings(1 if self.bottleneck is None else self.bottleneck, self.activation, self._scale, self.dropout,
                       self._norm, self.init)
        if not self._everywhere and (self.layers_to_transform is not None or self.drop_layers is not None):
            raise ValueError(f"layers_to_transform and drop_layers choose among layers, and placement="
                             f"{self.placement!r} has none but the first and the last.")

    @property
    def _everywhere(self) -> bool:
        return self.placement not in ("input", "output", "input_output")

    @property
    def _scale(self) -> float | str:
        return (4.0 if self.placement == "parallel" else 1.0) if self.scale is None else self.scale

    @property
    def _norm(self) -> bool | str:
        return ("before" if self.placement == "bapna" else False) if self.layer_norm is None else self.layer_norm

    def width(self, d_model: int) -> int:
        """m for this d_model."""
        if self.bottleneck is not None:
            return self.bottleneck
        return max(1, int(d_model / (16 if self.reduction_factor is None else self.reduction_factor)))

    def adapter(self, d_model: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
                device: torch.device | str | None = None) -> BottleneckAdapter:
        """One adapter with these settings."""
        return BottleneckAdapter(d_model, self.width(d_model), self.activation, self._scale, self.dropout, self._norm,
                                 self.init, generator, dtype, device)

    # ---- what pefttools.inject asks
    def targets(self, model: nn.Module, strict: bool = True) -> dict[str, nn.Module]:
        """The modules that get an adapter (or are norms to be trained), by name; what each is for is noted."""
        layers = pick_layers(model, self.layers_to_transform, self.drop_layers)
        sites = find_sites(model, self.placement, layers)
        if self.train_layer_norms:
            d_model = next(iter(sites.values()))[1].d_model
            sites |= {name: (norm, Site("norm", d_model)) for name, norm in norms_of(model, layers, d_model).items()}
        for module, site in sites.values():
            self._sites[module] = site
        return {name: module for name, (module, _) in sites.items()}

    def site(self, base: nn.Module) -> Site:
        """What `base` was selected for. A linear layer needs no selection where adapters come after one."""
        site = self._sites.get(base)
        if site is None and is_linear(base) and self.placement in ("houlsby", "pfeiffer"):
            return Site("after", features(base)[1])
        if site is None:
            raise ValueError(f"what placement={self.placement!r} does with a {type(base).__name__} depends on its "
                             f"place in the model: call config.targets(model) first (attach does).")
        return site

    def shapes(self, base: nn.Module) -> dict[str, tuple[int, ...]]:
        """The tensors in the file, after the module's own name."""
        site = self.site(base)
        if site.kind == "norm":
            return {f"ln_tuning_layers.{key}": shape for key, shape in norm_shapes(base).items()}
        one = self.adapter(site.d_model, torch.Generator(), device="meta").state_dict()
        return {f"{held}.{key}": tuple(tensor.shape)
                for held in site.where or ("bottleneck",) for key, tensor in one.items()}

    def build(self, base: nn.Module, generator: torch.Generator | None = None, name: str = "default") -> AdapterLayer:
        site = self.site(base)
        layer = LNTuningLayer(base) if site.kind == "norm" else \
            TappedLayer(base, site.source) if site.kind == "tapped" else LAYERS[site.kind](base)
        layer.add(name, self, generator)
        layer.active = {name: 1.0}
        return layer

    # ---- files
    def to_peft(self) -> dict[str, Any]:
        return {"peft_type": "BOTTLENECK", "placement": self.placement, "bottleneck": self.bottleneck,
                "reduction_factor": self.reduction_factor, "activation": self.activation, "scale": self.scale,
                "dropout": self.dropout, "layer_norm": self.layer_norm, "init": self.init,
                "train_layer_norms": self.train_layer_norms,
                "layers_to_transform": as_list(self.layers_to_transform), "drop_layers": as_list(self.drop_layers)}

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> AdapterConfig:
        return cls(**{name: fields[name] for name in cls().to_peft() if name != "peft_type"})


def count(d_model: int, bottleneck: int, adapters: int, layer_norm: bool = False) -> int:
    """Parameters of so many adapters: adapters · (2md + d + m), and 2d more for each where it has a norm of its own."""
    whole("adapters", adapters)
    return adapters * (bottleneck_size(d_model, bottleneck) + (2 * d_model if layer_norm else 0))
