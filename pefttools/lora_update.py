"""LoRA's sum, W₀x + b + s·B(Ax), as one node of autograd that keeps little and copies less.

    forward    z = x Aᵀ  [T, r]       y = x W₀ᵀ + b + s·z Bᵀ                                    [T, d_out]
    backward   ζ = s·Bᵀ gᵀ  [r, T]    dx = g W₀ + ζᵀ A     dA = ζ x     dB = s·(zᵀ g)ᵀ      (g: the gradient of y)

Written as tensor operations (`plain_update` below) the same sum is six nodes. Beside a bfloat16 weight they keep x a
second time, in float32: in a layer of Llama-3.2-1B with all seven linear layers adapted (r = 16), 155 KiB of
activations for each token. This keeps x as it came (once, however many layers share it), and z: 99 KiB. The order of
peft's operations is kept, so that outputs are equal to the last bit. What is gained in time comes from three things:

- a product with a side of r numbers takes several times as long the wrong way round on a CPU: zᵀ g, never gᵀ z;
- where 16-bit numbers meet float32 ones, rows are taken in pieces, so that their copies stay in the cache;
- sums are written into the product that came first, instead of into fresh memory.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from pefttools.nf4 import NF4Tensor
from pefttools.nf4_linear import NF4Linear, nf4_linear, nf4_linear_back
from pefttools.targets import is_linear

# Numbers a thread, when it is alone and with others: 1 MiB in float32, in the cache, and too small for malloc to fetch
# fresh pages; for several threads larger, since they are started for each piece and wait for each other after it.
PIECE, SHARED_PIECE = 2**18, 2**19


def plain_update(result: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """result + scale · (x Aᵀ) Bᵀ in the dtype of result. `x.to` copies nothing where the dtypes already agree."""
    update = F.linear(F.linear(x.to(A.dtype), A), B) * scale          # [..., d_in] → [..., r] → [..., d_out]
    return (result + update).to(result.dtype)


def add_update(result: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The same as `plain_update`, in less memory: result [..., d_out], x [..., d_in], A [r, d_in], B [d_out, r]."""
    if _is_rewritten():
        return plain_update(result, x, A, B, scale)
    return _Update.apply(result, x, None, None, A, B, scale)


def linear_with_update(base: nn.Module, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """add_update(base(x), x, A, B, scale), all in one node where calling the base does nothing but multiply."""
    weight = None if _is_rewritten() else _frozen_weight(base, x)
    if weight is None:
        return add_update(base(x), x, A, B, scale)
    return _Update.apply(None, x, weight, base.bias, A, B, scale)


def _frozen_weight(base: nn.Module, x: Tensor) -> Tensor | NF4Tensor | None:
    """The [d_out, d_in] by which `base` multiplies x, if that and its bias are all it does: a plain nn.Linear, Conv1D
    (whose weight is [d_in, d_out]) or NF4Linear, frozen, and nobody listens to it by a hook. Else None."""
    if not (type(base) in (nn.Linear, NF4Linear) or type(base).__name__ == "Conv1D" and is_linear(base)):
        return None
    bias = base.bias
    if (base.weight.requires_grad or bias is not None and bias.requires_grad or "forward" in vars(base)
            or base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
            or nn.modules.module._has_any_global_hook()):
        return None
    if type(base) is NF4Linear:
        casts = base.compute_dtype not in (None, x.dtype) or bias is not None and bias.dtype != x.dtype
        return None if casts else base.quantized
    return base.weight if type(base) is nn.Linear else base.weight.t()


def _is_rewritten() -> bool:
    """Whether autocast chooses dtypes, or torch.func, forward AD or torch.compile rewrite operations."""
    return torch._C._is_any_autocast_enabled() or torch._C._are_functorch_transforms_active() \
        or torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0


class _Update(torch.autograd.Function):
    """Of `result`, or where that is None of x Wᵀ + b, where W is a tensor or quantized (then dequantized twice)."""

    @staticmethod
    def forward(ctx: FunctionCtx, result: Tensor | None, x: Tensor, weight: Tensor | NF4Tensor | None,
                bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        q = weight if isinstance(weight, NF4Tensor) else None
        if result is None:
            y = (F.linear if q is None else nf4_linear)(x, weight, bias).contiguous()
        else:
            y = result.clone(memory_format=torch.contiguous_format)
        # Times a power of two rounds nothing, so that it does not matter to the bits when it is done.
        exact = math.frexp(scale)[0] in (0.5, -0.5) and A.dtype in (torch.float32, torch.float64)
        z, dtype = [], torch.promote_types(y.dtype, A.dtype)
        for some_x, some_y in _pieces(A.dtype, _rows(x), _rows(y)):
            z.append(F.linear(some_x.to(A.dtype), A))                        # [rows, r]
            total = some_y.to(dtype)
            if exact and dtype == A.dtype:
                total.addmm_(z[-1], B.t(), alpha=scale)
            else:
                total.add_((z[-1] @ B.t()).mul_(scale))
            if dtype != y.dtype:
                some_y.copy_(total)
        ctx.save_for_backward(x, weight if q is None else None, A, B, z[0] if len(z) == 1 else torch.cat(z))
        ctx.scale, ctx.q = scale, q
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, z = ctx.saved_tensors
        wants_result, wants_x, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        rows, g_rows = _rows(x), _rows(g)
        if torch.is_grad_enabled():                     # to be differentiated again: z is a function of x and A
            z = rows.to(A.dtype) @ A.t()
        dx = rows                                       # or, where it is wanted, what is added to below:
        if wants_x:
            dx = nf4_linear_back(g_rows, ctx.q) if ctx.q is not None else torch.zeros_like(rows) if weight is None \
                else g_rows @ weight
        dA = dB = None
        scaled = _times(B, ctx.scale).t()               # [r, d_out]
        for some_x, some_g, some_z, some_dx in _pieces(A.dtype, rows, g_rows, z, dx):
            some_g = some_g.to(A.dtype)
            if wants_x or wants_A:
                zeta = scaled @ some_g.t()                                   # [r, rows]
            if wants_x:
                _add_product(some_dx, zeta.t(), A)
            if wants_A:
                dA = _add_product(dA, zeta, some_x.to(A.dtype))
            if wants_B:
                dB = _add_product(dB, some_z.t(), some_g)
        if wants_x and x.dim() != 2:
            dx = dx.view(x.shape)
        return (g if wants_result else None, dx if wants_x else None, None, None, dA,
                _times(dB, ctx.scale).t() if wants_B else None, None)


def _rows(t: Tensor) -> Tensor:
    """[..., d] → [rows, d]."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _times(t: Tensor, scale: float) -> Tensor:
    """t · scale; with α = r, peft's default, nothing is to be done."""
    return t if scale == 1 else t * scale


def _pieces(dtype: torch.dtype, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The same rows of each: all at once, unless they have to be copied to `dtype` and that would leave the cache.

    Nearly equal pieces, since one of a single row would be multiplied by another kernel, whose last bit may differ.
    """
    x, y, *_ = tensors                                  # [rows, d_in], [rows, d_out], and others as narrow as these
    if x.device.type != "cpu" or x.dtype == y.dtype == dtype:
        return [tensors]
    threads = torch.get_num_threads()
    count = math.ceil(x.shape[0] * max(x.shape[1], y.shape[1]) / (PIECE if threads == 1 else threads * SHARED_PIECE))
    return list(zip(*[t.tensor_split(count) for t in tensors])) if count > 1 else [tensors]


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in the dtype of total and into it, rounded before the sum as peft's gradients are."""
    if total is None:
        return left @ right
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_((left @ right).to(total.dtype))
