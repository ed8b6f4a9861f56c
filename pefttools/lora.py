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

In this order: pure functions, then the module. Its arithmetic is in `pefttools.lora_update`, made for memory and speed;
its settings are in `pefttools.lora_config`, other starts than (A random, B zero) in `pefttools.lora_starts`.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pefttools.layer import AdapterLayer
from pefttools.lora_config import LoRAConfig, check_rank, check_rank_fits, features
from pefttools.lora_init import BaseMayChange, initialise
from pefttools.lora_starts import lora_init
from pefttools.lora_update import add_update, linear_with_update, plain_update

__all__ = ["LoRAConfig", "LoRALinear", "lora_delta", "lora_forward", "lora_init", "lora_scale"]


# ------------------------------------------------------------------------------------------------ pure functions

def lora_scale(r: int, alpha: float, rslora: bool = False) -> float:
    """The factor in front of B·A: α/r, or α/√r with `rslora`. Raises ValueError unless r is a whole number ≥ 1."""
    check_rank(r)
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
    return plain_update(F.linear(x, weight, bias), x, A, B, lora_scale(len(A), alpha, rslora))


def lora_delta(A: Tensor, B: Tensor, alpha: float, rslora: bool = False) -> Tensor:
    """ΔW = (α/r) B A: A [r, d_in], B [d_out, r] → [d_out, d_in]. What `merge` adds to the weight."""
    if A.dim() != 2 or B.dim() != 2:
        raise ValueError(f"A must be [r, d_in] and B [d_out, r]; got {list(A.shape)} and {list(B.shape)}.")
    _check_factors(A, B, A.shape[1], B.shape[0])
    return B @ A * lora_scale(len(A), alpha, rslora)


def _check_factors(A: Tensor, B: Tensor, d_in: int, d_out: int) -> None:
    if A.dim() != 2 or A.shape[1] != d_in:
        raise ValueError(f"A must be [r, d_in={d_in}]; got shape {list(A.shape)}.")
    if B.dim() != 2 or B.shape[0] != d_out:
        raise ValueError(f"B must be [d_out={d_out}, r]; got shape {list(B.shape)}.")
    if A.shape[0] != B.shape[1]:
        raise ValueError(f"A {list(A.shape)} and B {list(B.shape)} must share r: A has {A.shape[0]} rows, "
                         f"B has {B.shape[1]} columns.")


# ------------------------------------------------------------------------------------------------ the module

class LoRALinear(BaseMayChange, AdapterLayer):
    """A given linear layer, frozen, plus the update (α/r)·B·A: [..., d_in] → [..., d_out].

    It wraps the layer (nn.Linear, GPT-2's Conv1D, a 4-bit one), so the layer itself comes back untouched when the
    adapter is taken off. State-dict keys are peft's: `base_layer.weight`, `lora_A.default.weight` [r, d_in],
    `lora_B.default.weight` [d_out, r]. A and B are float32 beside a weight of 16 bits or fewer (peft's default).
    Dropout acts on the adapter's input only. Several adapters (`add`) may differ in r, alpha and dropout (`settings`);
    those that act (`active`: {name: weight}) add up, Σ weight·(α/r)·B·A. `r` and `alpha` are those of the first.

    Merged, W₀ + ΔW is rounded to the weight's dtype, so that outputs differ from the unmerged ones: measured 6e-7 in
    float32, 9e-4 in float16, 7e-3 in bfloat16 (largest difference / largest output; 512 → 512, r = 16, ‖ΔW‖ = 0.16
    ‖W₀‖). Unmerged again, W₀ is exact in every dtype, because it was kept. Subtracting ΔW instead, as peft does, leaves
    errors in W₀: measured 8e-8, 7e-4 and 6e-3 (largest error / largest weight, same layer).

    `generator` draws A; without one, torch's global generator does. `init` is explained in LoRAConfig. Raises TypeError
    unless `base` is a linear layer, and ValueError for an r, alpha, dropout or init that makes no sense.
    """

    holds = ("lora_A", "lora_B")

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
                 generator: torch.Generator | None = None, init: str | bool = True, name: str = "default") -> None:
        config = LoRAConfig(r, alpha, dropout, rslora, init=init)
        check_rank_fits(r, *features(base))
        super().__init__(base)
        self.settings: dict[str, LoRAConfig] = {}
        self._scaling: dict[str, float] = {}
        # Dictionaries by name, because those are peft's state-dict keys.
        self.lora_dropout, self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.train(base.training)  # a new module is in training mode; its dropout must not be where the model is not
        self.add(name, config, generator)
        self.active = {name: 1.0}

    # ---- adapters
    def add(self, name: str, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
        A, B = lora_init(*features(self.base_layer), config.r, generator)
        self.put(name, config, A, B)
        if config.init is not True or hasattr(self, "_before_start"):      # a start that changed W is not shared
            try:
                initialise(self, name, config.init, generator)
            except BaseException:
                self.remove(name)
                raise

    def put(self, name: str, config: LoRAConfig, A: Tensor, B: Tensor) -> None:
        """A new adapter of these values. They go to the weight's device; in float64 beside float64, else float32."""
        weight = self.base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.lora_A[name], self.lora_B[name] = (_linear_of(t.to(weight.device, dtype).contiguous()) for t in (A, B))
        self.lora_dropout[name] = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.lora_dropout[name].train(self.training)
        self.settings[name], self._scaling[name] = config, config.scaling

    def remove(self, name: str) -> None:
        super().remove(name)
        for notes in (self.lora_dropout, self.settings, self._scaling):
            if name in notes:
                del notes[name]

    r = property(lambda self: next(iter(self.settings.values())).r)
    alpha = property(lambda self: next(iter(self.settings.values())).alpha)

    @property
    def scaling(self) -> dict[str, float]:
        """{name: α/r}. `layer.scaling = 0.5` sets it for all adapters of this layer."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = dict.fromkeys(self._scaling, value)

    # Some models look at a layer's weight (T5 at its dtype).
    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    # ---- what it computes
    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.enabled or not self.active:
            return self.base_layer(x)
        if len(self.active) == 1:
            (name, share), = self.active.items()
            if not isinstance(self.lora_dropout[name], nn.Dropout) or not self.training:
                A, B = self.lora_A[name].weight, self.lora_B[name].weight
                return linear_with_update(self.base_layer, x, A, B, share * self._scaling[name])
        result = total = self.base_layer(x)                                                       # [..., d_out]
        for name, share in self.active.items():
            A, B = self.lora_A[name].weight, self.lora_B[name].weight
            if len(self.active) > 1:
                total = total.to(torch.promote_types(total.dtype, A.dtype))         # rounded once, at the end
            dropped = self.lora_dropout[name](x.to(A.dtype))
            total = add_update(total, dropped, A, B, share * self._scaling[name])
        return total.to(result.dtype)

    @torch.no_grad()
    def delta(self, name: str | None = None) -> Tensor:
        """ΔW [d_out, d_in] of one adapter, or of those that act with their weights, in the dtype of A and B."""
        shares = self.active if name is None else {name: 1.0}
        return sum(self.lora_B[name].weight @ self.lora_A[name].weight * (share * self._scaling[name])
                   for name, share in shares.items())

    def merged_tensors(self) -> dict[str, Tensor]:
        weight, delta = self.base_layer.weight, self.delta()
        return {"weight": weight + (delta if isinstance(self.base_layer, nn.Linear) else delta.T)}  # Conv1D: transposed

    def extra_repr(self) -> str:
        each = (f"{name}: r={c.r}, alpha={c.alpha}" for name, c in self.settings.items())
        return f"{', '.join(each)}, merged={self.merged}"



def _linear_of(weight: Tensor) -> nn.Linear:
    """An nn.Linear without bias that holds this weight; made on the meta device, so that it draws no random numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
