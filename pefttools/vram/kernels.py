"""What CUDA's kernels keep and take, where PyTorch on another device would choose others.

`torch.nn.functional.scaled_dot_product_attention` is one name for several kernels, and which of them runs decides what
waits for the backward pass (B rows, T tokens, H heads of width d, S keys; e bytes a number):

    kernel      chosen where                                          keeps beside q, k, v        takes in backward
    flash       no mask, 16 bits, d ≤ 256, capability ≥ 8.0           out; lse 4·B·H·T            dq 4·B·H·T·d, δ 4·BHT
    efficient   otherwise, heads of q and k equal, 8 divides d        out; lse 4·B·H·T; mask in e dq 4·B·H·T·d, δ 4·BHT
    math        otherwise (a T4 without a mask where k has fewer heads     the H·T·S matrix, twice
                than q: transformers then asks for enable_gqa)

Sources: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (`can_use_flash_attention`, `can_use_mem_…`),
flash_attn/flash_api.cpp (`mha_fwd`, `mha_bwd`), attention.cu and attention_backward.cu (`_efficient_attention_forward`,
`…_backward`), attention.cpp (`convert_boolean_attn_mask`, `preprocess_mask`). cuDNN's attention, which PyTorch
prefers on some Hopper cards, keeps what flash keeps; it is counted as flash.

A boolean mask [B, 1, T, S], as transformers makes it for padded rows or a prefix, becomes numbers in every layer,
padded to a multiple of 16 columns: 2·B·T·S bytes a layer that wait for the backward pass.

Dropout: one fused kernel that keeps a mask of one byte a number (on a CPU: the noise in the input's dtype).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEFAULT_CAPABILITY = (8, 0)                # where no GPU is named: an A100
HALF = (torch.float16, torch.bfloat16)


def cublas_workspace(capability: tuple[int, int]) -> int:
    """Bytes that PyTorch takes for cuBLAS, once for each thread that multiplies (the caller's, and autograd's).

    aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`:
    2 · 4096 KiB + 8 · 16 KiB, on Hopper and later 32 MiB.
    """
    return 32 << 20 if capability[0] >= 9 else (2 * 4096 + 8 * 16) << 10


# ------------------------------------------------------------------------------------------------ which kernel

def choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool,
           capability: tuple[int, int] = DEFAULT_CAPABILITY) -> str:
    """"flash", "efficient" or "math" for q [B, H, T, d], k and v [B, H_kv, S, d], as CUDA decides."""
    if q.dim() != 4 or not q.numel() or not k.numel():
        return "math"
    d, same_width = q.shape[-1], q.shape[-1] == k.shape[-1] == v.shape[-1]
    square = q.shape[-2] == k.shape[-2]
    if (mask is None and q.dtype in HALF and same_width and d <= 256 and capability >= (8, 0)
            and (square or not is_causal) and q.shape[1] % k.shape[1] == 0):
        return "flash"
    aligned = 8 if q.dtype in HALF else 4
    dtype_fits = q.dtype in (torch.float16, torch.float32) or q.dtype == torch.bfloat16 and capability >= (8, 0)
    if q.shape[1] == k.shape[1] and dtype_fits and d % aligned == 0 and v.shape[-1] % aligned == 0:
        return "efficient"
    return "math"


# ------------------------------------------------------------------------------------------------ flash

class _Flash(torch.autograd.Function):
    """`_scaled_dot_product_flash_attention` without numbers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, d = q.shape
        out = q.new_empty(B, T, H, d).transpose(1, 2)
        lse = q.new_empty(B, H, T, dtype=torch.float32)
        rng = q.new_empty(2, dtype=torch.int64)
        ctx.save_for_backward(q, k, v, out, lse, rng)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse, rng = ctx.saved_tensors
        B, H, T, d = q.shape
        S, kv_heads = k.shape[2], k.shape[1]
        g = g.transpose(1, 2).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        rows, width = _up(T, 128), _up(d, 32 if d <= 128 else 64)
        delta = q.new_empty(B, H, rows, dtype=torch.float32)
        dq_sum = q.new_empty(B, rows, H, width, dtype=torch.float32)
        if kv_heads != H:                                   # a gradient for each head of q, then summed over the group
            wide = [k.new_empty(B, S, H, d) for _ in range(2)]
            del wide
        del delta, dq_sum
        return dq, dk, dv


# ------------------------------------------------------------------------------------------------ memory-efficient

class _Efficient(torch.autograd.Function):
    """`_scaled_dot_product_efficient_attention` without numbers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gradient: bool) -> Tensor:
        B, H, T, _ = q.shape
        out = q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(B, H, _up(T, 32) if gradient else 0, dtype=torch.float32)
        if v.shape[-1] > 128 and q.dtype in HALF:           # wider than a block keeps in registers: sums in float32
            accumulator = q.new_empty(B, T, H, v.shape[-1], dtype=torch.float32)
            del accumulator
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        B, H, T, d = q.shape
        g = g.transpose(1, 2).contiguous()
        dq, dk, dv = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
        delta = q.new_empty(B, H, T, dtype=torch.float32)
        sums = [q.new_empty(B, H, _up(T, 128), _up(d, 32), dtype=torch.float32)]     # dq, split over blocks of keys
        if d > 128:                                         # dk and dv do not fit into registers either
            sums += [q.new_empty(B, H, _up(k.shape[2], 128), _up(d, 32), dtype=torch.float32) for _ in range(2)]
        del delta, sums
        return dq, dk, dv, torch.empty_like(bias) if ctx.needs_input_grad[3] else None, None


def _as_numbers(mask: Tensor, q: Tensor) -> Tensor:
    """A boolean mask in q's dtype (0 and −∞), its rows padded to a multiple of 16; expanded to all heads."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, torch.zeros((), dtype=q.dtype, device=mask.device),
                           torch.full((), -math.inf, dtype=q.dtype, device=mask.device))
    S = mask.shape[-1]
    if S % 16:
        mask = F.pad(mask, (0, 16 - S % 16))[..., :S]
    return mask.expand(*q.shape[:3], S)


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
              capability: tuple[int, int] = DEFAULT_CAPABILITY, wanted: str = "sdpa") -> Tensor:
    """scaled_dot_product_attention's result and memory on CUDA, without numbers."""
    kernel = choose(q, k, v, attn_mask, is_causal, capability)
    if wanted == "flash" and q.dtype in HALF:
        kernel, attn_mask = "flash", None                   # flash_attn's own package: rows are unpadded, no mask
    if kernel == "flash":
        d = q.shape[-1]
        if d % 8:
            q, k, v = (F.pad(t, (0, 8 - d % 8)) for t in (q, k, v))
        return _Flash.apply(q, k, v)[..., :d]
    if kernel == "efficient":
        bias = None if attn_mask is None else _as_numbers(attn_mask, q)
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        return _Efficient.apply(q, k, v, bias, gradient)
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale,
                                                             enable_gqa=enable_gqa)[0]


class CUDAKernels(TorchFunctionMode):
    """`with CUDAKernels(capability):` attention and dropout as a GPU of that compute capability would do them.

    `autocast`: products in that dtype, as torch.autocast("cuda") does; the cast weights are kept until `forget()`
    (autocast's cache, cleared at the end of its block, and what the graph saved lives on).
    """

    def __init__(self, capability: tuple[int, int] = DEFAULT_CAPABILITY, wanted: str = "sdpa",
                 autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.capability, self.wanted, self.autocast = capability, wanted, autocast
        self._cast: dict[Tensor, Tensor] = {}

    def forget(self) -> None:
        self._cast.clear()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast is not None and func in _CAST:
            args = tuple(self._lower(value) for value in args)
            kwargs = {key: self._lower(value) for key, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs, capability=self.capability, wanted=self.wanted)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.autocast)
        if value not in self._cast:
            self._cast[value] = value.to(self.autocast)
        return self._cast[value]


# torch/csrc/autocast: the lower-precision list, as far as language models call it
_CAST = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.addmm, torch.mm,
         F.scaled_dot_product_attention}


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    result = torch.native_dropout(input, p, True)[0]
    return input.copy_(result) if inplace else result


# ------------------------------------------------------------------------------------------------ inside one kernel

def workspaces(func: Any, args: Any, result: Any) -> Iterator[int]:
    """Bytes that the CUDA kernel of this operation allocates and frees inside itself, beyond its results."""
    name = func._schema.name if hasattr(func, "_schema") else str(func)
    rule = _RULES.get(name)
    if rule is not None:
        yield from rule(args, result)


def _embedding_backward(args: Any, result: Tensor) -> Iterator[int]:
    # Embedding.cu: more than 3072 indices are sorted; both orders in int64, and cub's copy of them
    count = args[1].numel()
    if count > 3072:
        yield 4 * 8 * count


def _fft(args: Any, result: Tensor) -> Iterator[int]:
    # cuFFT's plan for more than one dimension takes a work area of the transform's size (cufftGetSize)
    if len(args[1]) > 1:
        yield result.untyped_storage().nbytes()


_RULES: dict[str, Callable[[Any, Any], Iterator[int]]] = {
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::_fft_c2c": _fft,
    "aten::_fft_r2c": _fft,
    "aten::_fft_c2r": _fft,
}


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
