"""DoRA: LoRA that learns the length of each row of the weight apart from its direction.

    W' = m · (W₀ + ΔW) / ‖W₀ + ΔW‖,      y = W' x + b,      ΔW = s·B·A,   s = α/r

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, equation 5. m [d_out] is trained and
starts at ‖W₀‖, so that W' = W₀. The paper writes x W, and takes the norm of each column; here, as in torch, W is
[d_out, d_in], so it is the norm of each ROW: one number for each output (dim=1, as in peft).

             x  [..., d_in]
        ╱              ╲
    ┌──────┐         ┌───┐
    │  W₀  │         │ A │  [r, d_in]
    │frozen│         └─┬─┘
    │      │         ┌─┴─┐
    │      │         │ B │  [d_out, r]
    └──┬───┘         └─┬─┘
        ╲              ╱ · s
         ───── + ─────
               · m / ‖W₀ + ΔW‖      one factor for each output; 1 at the start
               + b
               y  [..., d_out]

A worked number: W₀ = [[3, 4]], ΔW = [[3, 4]], m = 5: the norm is 10, so W' = 5/10 · [[6, 8]] = [[3, 4]]. What ΔW adds
along W₀ goes into the norm and out again; only m can make the row longer, and ΔW only turns it.

The norm counts as a constant in the gradient (section 4.3). `pefttools.dora_product` has the arithmetic, made for
memory and speed; what is here is the paper's formula, the module, and its settings.
"""
from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.dora_product import autocasts, dora_norm, dora_product
from pefttools.lora import LoRAConfig, LoRALinear, lora_scale
from pefttools.lora_init import dense_weight, is_quantized

__all__ = ["DoRAConfig", "DoRALinear", "dora_forward", "dora_norm"]


def dora_forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, alpha: float,
                 bias: Tensor | None = None, rslora: bool = False) -> Tensor:
    """m ∘ (W₀x + s·B·A x) / ‖W₀ + s·B·A‖ + b, with gradients for all (the norm counts as a constant).

    x [..., d_in], weight [d_out, d_in], A [r, d_in], B [d_out, r], magnitude and bias [d_out] → [..., d_out] in x's
    dtype; A, B and magnitude may have more bits. Raises ValueError naming the tensor whose shape does not fit.
    """
    d_out, d_in = weight.shape if weight.dim() == 2 else (None, None)
    r = len(A) if A.dim() == 2 else None
    for name, tensor, shape in (("weight", weight, (d_out, d_in)), ("A", A, (r, d_in)), ("B", B, (d_out, r)),
                                ("magnitude", magnitude, (d_out,)), ("bias", bias, (d_out,))):
        if tensor is not None and tuple(tensor.shape) != shape:
            wanted = {"weight": "d_out, d_in", "A": f"r, d_in={d_in}", "B": f"d_out={d_out}, r={r}"}
            raise ValueError(f"{name} must be [{wanted.get(name, f'd_out={d_out}')}]; got shape {list(tensor.shape)}.")
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise ValueError(f"x must be [..., d_in={d_in}], as wide as weight {list(weight.shape)}; got {list(x.shape)}.")
    return dora_product(x, A, B, magnitude, bias, weight, lora_scale(len(A), alpha, rslora))


# ------------------------------------------------------------------------------------------------ the module

class DoRALinear(LoRALinear):
    """A given linear layer, frozen, with a DoRA on it: [..., d_in] → [..., d_out]. One adapter acts at a time.

    `base`: nn.Linear, GPT-2's Conv1D, or a quantized one (dequantized in forward and again in backward). As LoRALinear,
    and besides A and B it holds `lora_magnitude_vector.default.weight` [d_out], which starts at ‖W₀ + ΔW‖ in the dtype
    of A and B: the layer then computes what `base` does, up to how the bias is rounded. (peft rounds that first norm to
    the weight's 16 bits.) Each forward computes the norm anew, so merge for long generation. Dropout is peft's: the
    base layer sees all of x, what is added to its output sees less.
    """

    holds = (*LoRALinear.holds, "lora_magnitude_vector")

    def add(self, name: str, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
        super().add(name, config, generator)
        if config.init is not True:                              # A, B and the base weight are others now
            self.lora_magnitude_vector[name].weight.data = self._norm(name)

    def put(self, name: str, config: LoRAConfig, A: Tensor, B: Tensor) -> None:
        if not hasattr(self, "lora_magnitude_vector"):
            self.lora_magnitude_vector = nn.ModuleDict()
        super().put(name, config, A, B)
        holder = nn.Module()                                     # peft's key has a .weight at its end
        holder.weight = nn.Parameter(self._norm(name))
        self.lora_magnitude_vector[name] = holder

    def _norm(self, name: str) -> Tensor:
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        return dora_norm(dense_weight(self.base_layer), A, B, self.scaling[name]).to(A.dtype)

    def check_active(self, weights: dict[str, float], stacked: bool) -> None:
        super().check_active(weights, stacked)
        if len(weights) > 1:
            raise ValueError(f"set_adapter: {', '.join(weights)} are DoRAs of one weight. Each sets the length of its "
                             f"rows, so they do not add up: choose one.")

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.enabled or not self.active:
            return self.base_layer(x)
        (name, share), = self.active.items()
        A, B, m = (getattr(self, part)[name].weight for part in self.holds)
        base, dropout, scaling = self.base_layer, self.lora_dropout[name], share * self.scaling[name]
        autocast = autocasts(x)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if is_quantized(base):
            dtype = getattr(base, "compute_dtype", None) or dtype
            weight = functools.partial(dense_weight, base, dtype)
        else:
            weight = dense_weight(base).to(dtype) if autocast else dense_weight(base)
        apart = dropout.training and isinstance(dropout, nn.Dropout) or _listened_to(base)
        result, inside = (base(x), dropout(x)) if apart else (None, x)
        with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
            y = dora_product(inside.to(dtype), A, B, m, None if apart else base.bias, weight, scaling, added=apart)
        return (result + y if apart else y).to(dtype if autocast and not is_quantized(base) else x.dtype)

    def merged_tensors(self) -> dict[str, Tensor]:
        (name, share), = self.active.items()
        A, B, m = (getattr(self, part)[name].weight for part in self.holds)
        W = dense_weight(self.base_layer)
        total = W + B @ A * (share * self.scaling[name])
        norm = torch.linalg.norm(total, dim=1).clamp_min(torch.finfo(total.dtype).tiny)      # as in dora_norm
        weight = (m / norm)[:, None] * total
        return {"weight": weight if isinstance(self.base_layer, nn.Linear) else weight.T.contiguous()}

    @staticmethod
    def file_key(key: str) -> str:
        """lora_magnitude_vector.default.weight → lora_magnitude_vector, without the .weight, as in peft's files."""
        key = LoRALinear.file_key(key)
        return key.removesuffix(".weight") if key.startswith("lora_magnitude_vector") else key


def _listened_to(base: nn.Module) -> bool:
    """Whether calling the base does more than multiply: by a hook, or a forward that somebody has put over its own."""
    return bool("forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
                or base._backward_pre_hooks)


# ------------------------------------------------------------------------------------------------ the configuration

@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """As LoRAConfig, for linear layers: which of them get a DoRA, and of what size."""

    layer = DoRALinear

    def shapes(self, base: nn.Module) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(base)
        return shapes | {"lora_magnitude_vector": shapes["lora_B.weight"][:1]}

    def to_peft(self) -> dict[str, Any]:
        return super().to_peft() | {"use_dora": True}
