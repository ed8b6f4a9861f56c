"""LoRA: a frozen weight plus a trained update of rank r.

    y = W₀ x + b + ΔW x,      ΔW = (α/r) · B · A,      A: [r, d_in],  B: [d_out, r]

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3; the scale α/r and
the start (A random, B zero) are in section 4.1. rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) scales by α/√r instead.

              x  [..., d_in]
             ╱              ╲
      ┌────────────┐      ┌─────┐
      │     W₀     │      │  A  │  [r, d_in]   random at the start
      │   frozen   │      └──┬──┘
      │            │         │     [..., r]     the bottleneck: everything learned passes through r numbers
      │            │      ┌──┴──┐
      │[d_out,d_in]│      │  B  │  [d_out, r]  zero at the start, so that y is W₀ x + b exactly
      └──────┬─────┘      └──┬──┘
              ╲              ╱ · α/r
               ───── + ─────
                     y  [..., d_out]

A worked number: 2048 → 2048 (q_proj of Llama-3.2-1B) has 4,194,304 weights. At r = 8, A and B have
8·2048 + 2048·8 = 32,768, which is 0.78 % of them. GPT-3 (96 layers, d = 12,288), r = 4 on q and v: 18,874,368.

In this order: pure functions, the module, the configuration that `pefttools.inject.attach` takes.
"""
from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------ pure functions

def lora_scale(r: int, alpha: float, rslora: bool = False) -> float:
    """The factor in front of B·A: α/r, or α/√r with `rslora`. Raises ValueError unless r is a whole number ≥ 1."""
    if not isinstance(r, numbers.Integral) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be a whole number, 1 or more (the rank of the update); got {r!r}. Try r=8.")
    return alpha / math.sqrt(r) if rslora else alpha / r


def lora_forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float, bias: Tensor | None = None,
                 rslora: bool = False) -> Tensor:
    """x Wᵀ + b + (α/r) (x Aᵀ) Bᵀ, without ever forming ΔW.

    x [..., d_in], weight [d_out, d_in], A [r, d_in], B [d_out, r], bias [d_out] → [..., d_out], in the dtype of x Wᵀ.
    Where A and B have another dtype than x (usually float32 beside a bfloat16 weight), the path through them runs
    in theirs and only the sum is rounded, as in peft. Raises ValueError naming the tensor whose shape does not fit.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [d_out, d_in]; got shape {list(weight.shape)}.")
    d_out, d_in = weight.shape
    _check_factors(A, B, d_in, d_out)
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise ValueError(f"x must be [..., d_in={d_in}], as wide as weight {list(weight.shape)}; got {list(x.shape)}.")
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"bias must be [d_out={d_out}]; got shape {list(bias.shape)}.")
    return _add_update(F.linear(x, weight, bias), x, A, B, lora_scale(len(A), alpha, rslora))


def lora_delta(A: Tensor, B: Tensor, alpha: float, rslora: bool = False) -> Tensor:
    """ΔW = (α/r) B A: A [r, d_in], B [d_out, r] → [d_out, d_in]. What `merge` adds to the weight."""
    if A.dim() != 2 or B.dim() != 2:
        raise ValueError(f"A must be [r, d_in] and B [d_out, r]; got {list(A.shape)} and {list(B.shape)}.")
    _check_factors(A, B, A.shape[1], B.shape[0])
    return B @ A * lora_scale(len(A), alpha, rslora)


def lora_init(d_in: int, d_out: int, r: int, generator: torch.Generator | None = None,
              dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(A [r, d_in], B [d_out, r]) at the start of training, as in peft: A Kaiming-uniform with a = √5, B zero.

    That A is uniform in ±1/√d_in. (The paper's A is Gaussian; what matters is that exactly one of the two is zero:
    then ΔW = 0 at the start, and the other factor still receives a gradient.)
    """
    lora_scale(r, 1.0)  # is r a rank at all?
    if r > min(d_in, d_out):
        raise ValueError(
            f"r = {r} is more than min(d_in={d_in}, d_out={d_out}) = {min(d_in, d_out)}. A {d_out}×{d_in} matrix has "
            f"no higher rank than that, so a larger r adds parameters and nothing that B·A could not express already. "
            f"Use r ≤ {min(d_in, d_out)}.")
    A = torch.empty(r, d_in, dtype=dtype)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return A, torch.zeros(d_out, r, dtype=dtype)


def _add_update(result: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """result + scale · (x Aᵀ) Bᵀ in the dtype of result. `x.to` copies nothing where the dtypes already agree."""
    update = F.linear(F.linear(x.to(A.dtype), A), B) * scale          # [..., d_in] → [..., r] → [..., d_out]
    return (result + update).to(result.dtype)


def _check_factors(A: Tensor, B: Tensor, d_in: int, d_out: int) -> None:
    if A.dim() != 2 or A.shape[1] != d_in:
        raise ValueError(f"A must be [r, d_in={d_in}]; got shape {list(A.shape)}.")
    if B.dim() != 2 or B.shape[0] != d_out:
        raise ValueError(f"B must be [d_out={d_out}, r]; got shape {list(B.shape)}.")
    if A.shape[0] != B.shape[1]:
        raise ValueError(f"A {list(A.shape)} and B {list(B.shape)} must share r: A has {A.shape[0]} rows, "
                         f"B has {B.shape[1]} columns.")


# ------------------------------------------------------------------------------------------------ the module

class LoRALinear(nn.Module):
    """A given nn.Linear, frozen, plus the update (α/r)·B·A: [..., d_in] → [..., d_out].

    It wraps the layer, so the layer itself comes back untouched when the adapter is taken off. State-dict keys are
    peft's: `base_layer.weight`, `lora_A.default.weight` [r, d_in], `lora_B.default.weight` [d_out, r]. A and B are
    float32 beside a weight of 16 bits or fewer (peft's default). Dropout acts on the adapter's input only.

    `generator` draws A; without one, torch's global generator does. Raises TypeError unless `base` is an nn.Linear,
    and ValueError for an r, alpha or dropout that makes no sense.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
                 generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be an nn.Linear; got {type(base).__name__}.")
        _check_settings(r, alpha, dropout)
        self.base_layer = base
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scaling = lora_scale(r, alpha, rslora)
        self.enabled, self.merged = True, False

        dtype = base.weight.dtype if base.weight.dtype in (torch.float32, torch.float64) else torch.float32
        A, B = (t.to(base.weight.device) for t in lora_init(base.in_features, base.out_features, r, generator, dtype))
        # Dictionaries of one, named "default", because those are peft's state-dict keys.
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout) if dropout > 0 else nn.Identity()})
        self.lora_A = nn.ModuleDict({"default": _linear_of(A)})
        self.lora_B = nn.ModuleDict({"default": _linear_of(B)})
        base.requires_grad_(False)
        self.train(base.training)  # a new module is in training mode; its dropout must not be where the model is not

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained and saved, by the name it has in this module. Everything else stays frozen."""
        return {"lora_A.default.weight": self.lora_A["default"].weight,
                "lora_B.default.weight": self.lora_B["default"].weight}

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)                                                               # [..., d_out]
        if self.merged or not self.enabled:
            return result
        A, B = self.lora_A["default"].weight, self.lora_B["default"].weight
        x = self.lora_dropout["default"](x.to(A.dtype))
        return _add_update(result, x, A, B, self.scaling)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """ΔW [d_out, d_in], in the dtype of A and B."""
        return lora_delta(self.lora_A["default"].weight, self.lora_B["default"].weight, self.alpha, self.rslora)

    @torch.no_grad()
    def merge(self) -> None:
        """Put W₀ + ΔW in the place of W₀: from here on the layer costs what a plain nn.Linear costs.

        Merging twice is merging once. The sum is rounded to the weight's dtype, so outputs differ from the unmerged
        ones: measured 6e-7 in float32, 9e-4 in float16, 7e-3 in bfloat16 (largest difference / largest output;
        512 → 512, r = 16, ‖ΔW‖ = 0.16 ‖W₀‖). W₀ is kept while merged, which costs one weight of memory. Raises
        TypeError where the weight is not a floating-point tensor (a quantized layer), ValueError where the sum is
        not finite; the layer is then unchanged.
        """
        if self.merged:
            return
        weight = self.base_layer.weight
        if not weight.is_floating_point():
            raise TypeError(f"merge: the weight is stored as {weight.dtype} (quantized), and adding to its codes means "
                            f"nothing. Keep the adapter apart, or dequantize the layer first.")
        merged = (weight + self.delta()).to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"merge: W₀ + ΔW has NaN or infinite entries in {weight.dtype}; the adapter has diverged, "
                             f"or its update is too large for this dtype. Nothing was changed.")
        self.register_buffer("_original", weight.data, persistent=False)  # a buffer, so that .to(device) takes it along
        weight.data = merged
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W₀ back. Unmerging twice is unmerging once, and it is exact: error 0 in every dtype.

        It is exact because W₀ was kept. Subtracting ΔW again, as peft does, leaves rounding errors in W₀: measured
        8e-8 in float32, 7e-4 in float16, 6e-3 in bfloat16 (largest error / largest weight, same layer as in `merge`).
        """
        if not self.merged:
            return
        self.base_layer.weight.data = self._original
        del self._original
        self.merged = False

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, scaling={self.scaling:g}, merged={self.merged}"


def _linear_of(weight: Tensor) -> nn.Linear:
    """An nn.Linear without bias that holds this weight; made on the meta device, so that it draws no random numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _check_settings(r: int, alpha: float, dropout: float) -> None:
    lora_scale(r, 1.0)
    if not isinstance(alpha, numbers.Real) or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"alpha must be a finite number other than 0 (at 0 the update never acts); got {alpha!r}. "
                         f"Common choices: alpha=r or alpha=2*r.")
    if not isinstance(dropout, numbers.Real) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a probability in [0, 1); got {dropout!r}. Try dropout=0.05, or 0.")


# ------------------------------------------------------------------------------------------------ the configuration

@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get LoRA, and of what size. Defaults are peft's (which leaves `target_modules` to the model family).

    `target_modules`: a sequence of names ("q_proj" means every layer whose name ends in ".q_proj"), or a string:
    "all-linear" (every linear layer but the output head), or a regular expression for the whole name.
    `layers_to_transform`: only in these layers, counted from 0 (with a sequence of names only).
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rslora: bool = False
    target_modules: Sequence[str] | str = ("q_proj", "v_proj")
    layers_to_transform: Sequence[int] | int | None = None

    def __post_init__(self) -> None:
        _check_settings(self.r, self.alpha, self.dropout)

    def shapes(self, base: nn.Module) -> dict[str, tuple[int, ...]]:
        """The adapter parameters that `build(base)` makes, with their shapes. Raises where LoRA cannot wrap `base`."""
        if not isinstance(base, nn.Linear):
            later = " (GPT-2's Conv1D is not supported yet)" if type(base).__name__ == "Conv1D" else ""
            raise TypeError(f"this is a {type(base).__name__}, and LoRA wraps nn.Linear only{later}.")
        if self.r > min(base.in_features, base.out_features):
            lora_init(base.in_features, base.out_features, self.r)  # says why that buys nothing
        return {"lora_A.default.weight": (self.r, base.in_features),
                "lora_B.default.weight": (base.out_features, self.r)}

    def build(self, base: nn.Linear, generator: torch.Generator | None = None) -> LoRALinear:
        """The layer to put in the place of `base`."""
        return LoRALinear(base, self.r, self.alpha, self.dropout, self.rslora, generator)

    def to_peft(self) -> dict[str, Any]:
        """The fields of peft's adapter_config.json that say the same (`target_modules` apart)."""
        return {"peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout,
                "use_rslora": self.rslora, "use_dora": False, "bias": "none", "init_lora_weights": True,
                "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False}

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> LoRAConfig:
        """From the fields of peft's adapter_config.json. KeyError for a missing one, ValueError for a value we lack."""
        init = fields.get("init_lora_weights", True)
        if init not in (True, False, None, "gaussian", "orthogonal", "eva"):
            raise ValueError(f"init_lora_weights={init!r} also changes the base weights, which is not supported.")
        return cls(r=fields["r"], alpha=fields["lora_alpha"], dropout=fields.get("lora_dropout", 0.0),
                   rslora=fields.get("use_rslora", False), target_modules=fields["target_modules"],
                   layers_to_transform=fields.get("layers_to_transform"))
