"""The settings of a random subspace, and which parameters move in it. See `pefttools.intrinsic`."""
from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from pefttools.intrinsic import IntrinsicSubspace


def movable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that can move: floating point, not bitsandbytes' packed codes; a tied one once."""
    return {name: p for name, p in model.named_parameters()
            if p.is_floating_point() and getattr(p, "quant_state", None) is None}


@dataclass(frozen=True)
class IntrinsicConfig:
    """`attach(model, IntrinsicConfig(d=200))`. The seed of P is here, and not `attach`'s, because it is saved.

    `projection`: "hashed" (O(D) memory and time) or "dense" (O(D·d), for models of a few thousand parameters).
    """

    d: int = 200
    projection: str = "hashed"
    said: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.d, numbers.Integral) or isinstance(self.d, bool) or self.d < 1:
            raise ValueError(f"d must be a whole number, 1 or more (the dimension of the subspace); got {self.d!r}.")
        if self.projection not in ("hashed", "dense"):
            raise ValueError(f"projection must be 'hashed' or 'dense'; got {self.projection!r}.")

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The trained tensors for this model."""
        m = len(movable(model)) * self.said
        return {"intrinsic.vector": (self.d - m,)} | ({"intrinsic.scales": (m,)} if m else {})

    def install(self, model: nn.Module, generator: torch.Generator | None = None,
                name: str = "default") -> IntrinsicSubspace:
        """Put the subspace into `model`, as `model.intrinsic`. Raises ValueError for a d that does not fit."""
        from pefttools.intrinsic import IntrinsicSubspace

        return IntrinsicSubspace(model, self, name)

    def to_peft(self) -> dict[str, Any]:
        raise TypeError("peft has no intrinsic subspace, so there is no adapter_config.json for it: save it with "
                        "pefttools.intrinsic_file.save_intrinsic(model, file).")
