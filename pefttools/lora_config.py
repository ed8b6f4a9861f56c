"""LoRA's settings: which layers get one, and of what size; and the same as fields of peft's adapter_config.json."""
from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from pefttools.lora_targets import DEFAULT_TARGETS
from pefttools.targets import default_for, is_linear


def check_rank(r: int) -> None:
    """Raise ValueError unless r is a whole number, 1 or more."""
    if not isinstance(r, numbers.Integral) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be a whole number, 1 or more (the rank of the update); got {r!r}. Try r=8.")


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get LoRA, and of what size. Defaults are peft's.

    `target_modules`: a sequence of names ("q_proj" means every layer whose name ends in ".q_proj"), or a string:
    "all-linear" (every linear layer but the output head), or a regular expression for the whole name, or None: what
    peft takes for this family of models. `layers_to_transform`: only in these layers, counted from 0 (with names only).
    `init`: how A and B start (pefttools.lora_starts): True, "gaussian", "orthogonal", "pissa", "olora", "loftq", False.
    Raises ValueError for an r, alpha, dropout or init that makes no sense.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rslora: bool = False
    target_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    init: str | bool = True

    layer: ClassVar[type | None] = None                        # what `build` makes; None: what the base layer needs
    without_effect: ClassVar[tuple[str, ...]] = ("fan_in_fan_out",)     # the base layer says which way it is stored

    def __post_init__(self) -> None:
        check_rank(self.r)
        if not isinstance(self.alpha, numbers.Real) or not math.isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(f"alpha must be a finite number other than 0 (at 0 the update never acts); got "
                             f"{self.alpha!r}. Common choices: alpha=r or alpha=2*r.")
        if not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability in [0, 1); got {self.dropout!r}. Try dropout=0.05, or 0.")
        if self.init is not True:
            from pefttools.lora_init import check_start

            object.__setattr__(self, "init", check_start(self.init))

    @property
    def scaling(self) -> float:
        """α/r, or α/√r with rslora."""
        return self.alpha / math.sqrt(self.r) if self.rslora else self.alpha / self.r

    @property
    def changes_base(self) -> bool:
        """Whether the start puts a residual in the place of the base weight (PiSSA, OLoRA, LoftQ)."""
        if self.init is True:
            return False
        from pefttools.lora_init import changes_base

        return changes_base(self.init)

    def default_targets(self, model: nn.Module) -> list[str] | str:
        """What peft takes for this family of models. Raises ValueError for one that it does not know."""
        found = DEFAULT_TARGETS.get(getattr(getattr(model, "config", None), "model_type", None))
        return found if isinstance(found, str) else default_for(model, DEFAULT_TARGETS, "LoRA")

    def shapes(self, base: nn.Module) -> dict[str, tuple[int, ...]]:
        """What the file holds of the adapter that `build(base)` makes. Raises where LoRA cannot wrap `base`."""
        if isinstance(base, nn.Embedding) and self.layer is None:
            return {"lora_embedding_A": (self.r, base.num_embeddings), "lora_embedding_B": (base.embedding_dim, self.r)}
        d_in, d_out = features(base)
        check_rank_fits(self.r, d_in, d_out)
        return {"lora_A.weight": (self.r, d_in), "lora_B.weight": (d_out, self.r)}

    def build(self, base: nn.Module, generator: torch.Generator | None = None, name: str = "default") -> nn.Module:
        """The layer to put in the place of `base`, with the adapter `name` in it."""
        from pefttools.lora import LoRALinear

        layer = self.layer or LoRALinear
        if isinstance(base, nn.Embedding) and self.layer is None:
            from pefttools.lora_layers import LoRAEmbedding as layer
        return layer(base, self.r, self.alpha, self.dropout, self.rslora, generator, self.init, name)

    def to_peft(self) -> dict[str, Any]:
        """The fields of peft's adapter_config.json that say the same (`target_modules` apart)."""
        start = {"init_lora_weights": True}
        if self.init is not True:
            from pefttools.lora_init import start_to_peft

            start = start_to_peft(self.init)
        return {"peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout,
                "use_rslora": self.rslora, "use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {},
                "fan_in_fan_out": False, **start}

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> LoRAConfig:
        """From the fields of peft's adapter_config.json. KeyError for a missing one, ValueError for a value we lack."""
        from pefttools.lora_init import start_from_peft

        return cls(r=fields["r"], alpha=fields["lora_alpha"], dropout=fields.get("lora_dropout", 0.0),
                   rslora=fields.get("use_rslora", False), target_modules=fields["target_modules"],
                   layers_to_transform=fields.get("layers_to_transform"), init=start_from_peft(fields))


def features(base: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer, quantized or GPT-2's Conv1D too. Raises TypeError for anything else."""
    if not is_linear(base):
        raise TypeError(f"this is a {type(base).__name__}, and LoRA wraps linear layers (nn.Linear, GPT-2's Conv1D, "
                        f"4-bit ones) and nn.Embedding.")
    return (base.in_features, base.out_features) if hasattr(base, "in_features") else (base.nx, base.nf)


def check_rank_fits(r: int, d_in: int, d_out: int) -> None:
    """Raise ValueError where r is more than any d_out×d_in matrix can have."""
    check_rank(r)
    if r > min(d_in, d_out):
        raise ValueError(
            f"r = {r} is more than min(d_in={d_in}, d_out={d_out}) = {min(d_in, d_out)}. A {d_out}×{d_in} matrix has "
            f"no higher rank than that, so a larger r adds parameters and nothing that B·A could not express already. "
            f"Use r ≤ {min(d_in, d_out)}.")
