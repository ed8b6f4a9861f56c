"""A linear layer on a 4-bit weight: dequantized when it is used and forgotten at once.

    y = x · dequantize(q)ᵀ + b          q: NF4 codes, two to a byte, and a scale for each block of 64
    ∂y/∂x:   g · dequantize(q)          dequantized a second time, so that nothing of full size waits in between
    ∂y/∂q:   none                       the codes are frozen

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, equations 5 and 6.

    forward    q ──dequantize──► W ──► x Wᵀ + b       W lives in a scratch buffer that all layers share
    (waiting)  q                                      kept for backward: q, which is the layer's own anyway
    backward   q ──dequantize──► W ──► g W

A worked number: 2048 → 8192 (up_proj of Llama-3.2-1B) has 16,777,216 weights: 32 MiB in bfloat16, 8.25 MiB here
(4.127 bits each, the scales quantized once more). A step needs one scratch of 32 MiB for all such layers together.

In this order: the function with its own gradient, its scratch, the layer. Equal to bitsandbytes' `Linear4bit` in
training mode, and its state dict can be read there and the other way round. The codes are made in `pefttools.nf4`.
"""
from __future__ import annotations

import sys
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pefttools.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4


# ------------------------------------------------------------------------------------------------ pure functions

def nf4_linear(x: Tensor, q: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """x · dequantize(q)ᵀ + bias, with gradients for x and bias: x [..., d_in], q [d_out, d_in] → [..., d_out].

    Computed in x's dtype, which bias must have too. Keeps nothing but q for backward. Raises ValueError for a width
    that does not fit.
    """
    if x.dim() == 0 or x.shape[-1] != q.shape[1]:
        raise ValueError(f"x must be [..., d_in={q.shape[1]}], as wide as the quantized weight {list(q.shape)}; "
                         f"got {list(x.shape)}.")
    return _Product.apply(x, q, bias, False)


def nf4_linear_back(g: Tensor, q: NF4Tensor) -> Tensor:
    """g · dequantize(q), the gradient of x in `nf4_linear`: g [..., d_out] → [..., d_in]."""
    return _Product.apply(g, q, None, True)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, or x W if `back`; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: NF4Tensor, bias: Tensor | None, back: bool) -> Tensor:
        ctx.q, ctx.back = q, back
        weight = _in_scratch(q, x.dtype)
        return x @ weight if back else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        of_x = _Product.apply(g, ctx.q, None, not ctx.back) if ctx.needs_input_grad[0] else None
        of_bias = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, None


# A fresh buffer of this size comes from the system page by page, which takes several times as long as filling it; so
# each thread keeps one, as large as the largest weight it has dequantized. It is in use only within one product.
_scratch = threading.local()


def _in_scratch(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """W [d_out, d_in], valid until the next call in this thread."""
    if q.packed.device.type != "cpu" or type(q.packed) not in (Tensor, nn.Parameter):
        return dequantize_nf4(q, out=torch.empty(q.shape, dtype=dtype, device=q.packed.device))
    count = q.shape.numel() * dtype.itemsize
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < count:
        _scratch.buffer = buffer = None                          # let the small one go before the large one is made
        with torch.inference_mode(False):                        # of use outside of inference_mode as well
            _scratch.buffer = buffer = torch.empty(count, dtype=torch.uint8)
    return dequantize_nf4(q, out=buffer[:count].view(dtype).view(q.shape))


def release_scratch() -> int:
    """Free this thread's scratch buffer, and say how many bytes it had: those of the largest dequantized weight.

    It is in no parameter, buffer, copy or file; the next forward makes it again.
    """
    buffer, _scratch.buffer = getattr(_scratch, "buffer", None), None
    return 0 if buffer is None else buffer.numel()


# ------------------------------------------------------------------------------------------------ the module

class NF4Linear(nn.Module):
    """A linear layer whose weight is stored in NF4: [..., in_features] → [..., out_features], as `base` to 4 bits.

    `base` is an nn.Linear or GPT-2's Conv1D, and stays as it is. `weight` holds the packed codes, uint8
    [in·out/2, 1], and is never trained; `bias` is a frozen copy. `compute_dtype`: what to multiply in; None is
    autocast's dtype, else x's. The result has x's dtype. `.to(dtype)` casts the bias and leaves the codes and scales.

    Raises TypeError for another `base`, or one that is quantized already, ValueError for a weight with NaN or
    infinite entries, or a block size that does not exist.
    """

    def __init__(self, base: nn.Module, block_size: int = 64, double_quant: bool = True,
                 compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not is_plain_linear(base):
            raise TypeError(f"base must be an nn.Linear or transformers' Conv1D; got {type(base).__name__}"
                            + (", which is quantized already." if isinstance(base, NF4Linear) else "."))
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise ValueError(f"compute_dtype must be a floating-point dtype such as torch.bfloat16; got "
                             f"{compute_dtype}.")
        weight = base.weight.detach()
        self._hold(quantize_nf4(weight if isinstance(base, nn.Linear) else weight.T, block_size, double_quant))
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        self.compute_dtype = compute_dtype
        self.train(base.training)

    def _hold(self, q: NF4Tensor) -> None:
        self.out_features, self.in_features = q.shape
        # One object is both: copies, pickles and moves of the module keep them together.
        q.packed = self.weight = nn.Parameter(q.packed, requires_grad=False)
        self._q = q

    @property
    def quantized(self) -> NF4Tensor:
        """The codes and scales; `.packed` is `self.weight`."""
        if self._q.packed is not self.weight:                    # somebody replaced the parameter
            self._q.packed = self.weight
        return self._q

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] that the codes stand for, by default in the original's dtype."""
        out = torch.empty(self._q.shape, dtype=dtype or self._q.dtype, device=self.weight.device)
        return dequantize_nf4(self.quantized, out=out)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An nn.Linear that computes the same, for instance to merge an adapter into."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(linear.weight.dtype, copy=True), requires_grad=False)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        device, dtype = x.device.type, self.compute_dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):          # or it would cast the dequantized weight once more
                return self._product(x, dtype or torch.get_autocast_dtype(device))
        return self._product(x, dtype or x.dtype)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        bias = None if self.bias is None else self.bias.to(dtype)
        return nf4_linear(x.to(dtype), self.quantized, bias).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        # fn moves, casts, or both. Codes are no numbers, and a rounded scale would shift a whole block: moved only.
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype or tensor.dtype != torch.uint8 else tensor.to(result.device)

        super()._apply(moved, recurse)
        q = self.quantized
        for name, tensor in vars(q).items():
            if isinstance(tensor, Tensor) and tensor is not self.weight:
                setattr(q, name, tensor.to(self.weight.device))
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)                             # weight, bias
        destination |= {prefix + key: tensor for key, tensor in self.quantized.state_dict("weight").items()
                        if key != "weight"}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool,
                              missing_keys: list, unexpected_keys: list, error_msgs: list) -> None:
        here = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()
                if key == prefix + "weight" or key.startswith(prefix + "weight.")}
        rest = {key: tensor for key, tensor in state_dict.items() if key.removeprefix(prefix) not in here}
        if "weight" in here:
            try:
                self._read(here, local_metadata.get("assign_to_params_buffers", False))
            except (KeyError, ValueError, RuntimeError, StopIteration) as error:
                error_msgs.append(f"{prefix}weight: {error}")
            rest[prefix + "weight"] = self.weight
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _read(self, tensors: dict[str, Tensor], assign: bool) -> None:
        if len(tensors) == 1:
            raise ValueError("the state dict has a weight that is not in 4 bits. Load it into the model before "
                             "quantize_model.")
        tensors["weight"] = tensors["weight"].view(torch.uint8).reshape(-1, 1)       # quant_storage may be any dtype
        q = NF4Tensor.from_state_dict(tensors, "weight")
        if q.shape != self._q.shape:
            raise ValueError(f"the state dict has a weight of shape {list(q.shape)}, this layer {list(self._q.shape)}.")
        for name, tensor in vars(q).items():
            if isinstance(tensor, Tensor):
                setattr(q, name, tensor.detach().to(self.weight.device, copy=not assign))
        self.weight.data, q.packed = q.packed, self.weight
        self._q = q

    def extra_repr(self) -> str:
        q = self._q
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"block_size={q.block_size}, double_quant={q.nested}, compute_dtype={self.compute_dtype}")


def is_plain_linear(module: nn.Module) -> bool:
    """nn.Linear or transformers' Conv1D, and no subclass, as in transformers: bitsandbytes' layers do more."""
    return type(module) in (nn.Linear, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear))
