"""Prefix tuning's settings: what `attach` needs to know, and peft's `adapter_config.json`. See `pefttools.prefix`."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pefttools.prefix import INITS, PrefixTuning, prefix_of_text
from pefttools.virtual import VirtualTokens
from pefttools.virtual_config import VirtualConfig, dimensions, drawing, place, tiled


@dataclass
class PrefixTuningConfig(VirtualConfig):
    """projection: train through the MLP of section 4.3, of width `hidden` (that of the keys where None).

    init: "random", "zero" or "text", with text and `tokenizer`, or a list of token ids; repeated or cut to `length`.
    """

    projection: bool = False
    hidden: int | None = None
    init: str = "random"
    text: str | Sequence[int] | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)

    peft_type = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {self.init!r}.")
        if self.init == "text" and self.projection:
            raise ValueError("init=\"text\" gives keys and values, and projection=True computes them by an MLP, which "
                             "cannot be told to give those. Leave out one of the two.")
        self.check_text()

    def token_dim(self, model: nn.Module) -> int:
        """H_kv · d_h, the width of one layer's keys, where prompt tuning has the width of the embeddings."""
        about = dimensions(model.config)
        return about["kv_heads"] * about["head_dim"]

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeddings": (self.length, dimensions(model.config)["num_layers"] * 2 * self.token_dim(model))}

    def frame(self, model: nn.Module) -> VirtualTokens:
        from pefttools.prefix_cache import PrefixTokens

        return PrefixTokens(model)

    def describe(self, model: nn.Module) -> None:
        super().describe(model)
        self.model_fields["num_attention_heads"] = dimensions(model.config)["kv_heads"]

    def encoder(self, model: nn.Module, generator: torch.Generator | None = None) -> PrefixTuning:
        self.describe(model)
        with drawing(generator):
            encoder = PrefixTuning(model.config, self.length, (self.hidden or self.token_dim(model)) if self.projection
                                   else None, self.init, self.submodules(model))
        if self.init == "text":
            encoder.embedding.weight.data.copy_(prefix_of_text(model, tiled(self.ids(), self.length)))
        return place(encoder, model)

    def to_peft(self) -> dict[str, Any]:
        fields = super().to_peft()
        return fields | {"prefix_projection": self.projection,
                         "encoder_hidden_size": self.hidden or fields.get("token_dim")}

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> PrefixTuningConfig:
        return cls._from_peft(fields, projection=bool(fields.get("prefix_projection")),
                              hidden=fields.get("encoder_hidden_size"))
