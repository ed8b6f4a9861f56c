"""DoRA's formula as one node of autograd that keeps little: the arithmetic behind `pefttools.dora`.

    v = W₀x + s·B·Ax        n = ‖W₀ + s·B·A‖ of each row        c = m/n        y = c∘v + b

The norm n counts as a constant in the gradient (Liu et al. 2024, arXiv:2402.09353, section 4.3). With g the gradient of
y, and sums over tokens:

    dx = W₀ᵀ(c∘g) + s·Aᵀ Bᵀ(c∘g)      dB = s·(c∘g)(Ax)ᵀ      dA = s·Bᵀ(c∘g) xᵀ      dm = Σ g∘v / n

Autograd would keep x, Ax, W₀x and BAx for that, some twice and most in float32. Here x waits, as it came, and vectors.
With all seven linear layers adapted, a layer of width h (q, k: those of queries and keys, m: of the MLP) keeps for a
token, in bfloat16, 12h + 4q + 4k + 8m bytes: 98 KiB at Llama-3.2-1B's 2048, 2048, 512, 8192, where peft keeps 293.

W₀x, which dm needs, is then computed a second time. In float32, where a product costs most, it is kept instead, and in
narrow layers too. What pays for the second product: peft forms B·A out of an identity matrix, and W₀ + ΔW, in several
whole copies at each forward; here some rows of them at a time, in the cache.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def dora_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W₀ + s·B·A‖ of each row: weight [d_out, d_in], A [r, d_in], B [d_out, r] → [d_out], in float32 or more.

    W₀ + ΔW is formed for some rows at a time, in a buffer of 2 MiB that stays in the processor's cache: about a tenth
    of the time that forming it whole takes, and as fast as ‖W₀‖² + 2s·B(AW₀ᵀ) + s²·B(AAᵀ)Bᵀ, whose digits are lost
    where ΔW nearly cancels W₀. Nothing is remembered from one call to the next, so no weight can be out of date. A row
    of zeros has no direction; its norm is given as the smallest number, not 0, so that it stays zero (NaN in peft).
    """
    dtype = torch.promote_types(torch.promote_types(A.dtype, weight.dtype), torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    d_out, d_in = weight.shape
    rows = max(1, 2 ** 19 // max(1, d_in))
    norm, buffer = A.new_empty(d_out), A.new_empty(min(rows, d_out), d_in)
    for start in range(0, d_out, rows):
        some, some_B = weight[start:start + rows], B[start:start + rows]
        total = buffer[:some.shape[0]]
        if some.dtype == dtype:
            torch.addmm(some, some_B, A, alpha=scaling, out=total)
        else:
            total.copy_(some).addmm_(some_B, A, alpha=scaling)
        torch.linalg.vector_norm(total, dim=1, out=norm[start:start + rows])
    return norm.clamp_(min=torch.finfo(dtype).tiny)


def dora_product(x: Tensor, A: Tensor, B: Tensor, m: Tensor, bias: Tensor | None,
                 weight: Tensor | Callable[[], Tensor], scaling: float, added: bool = False) -> Tensor:
    """The formula; `weight` is a tensor or, for quantized layers, a function that gives it.

    `added`: only what comes to the base layer's output W₀x + b: (c − 1) ∘ W₀x + c ∘ sBAx, for when x here is another.
    """
    rewritten = torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()
    if rewritten or not callable(weight) and weight.requires_grad:          # the weight is to be trained along with it
        W = weight() if callable(weight) else weight
        c = m / dora_norm(W, A, B, scaling).to(m.dtype)
        y = (c - 1 if added else c) * F.linear(x, W) + c * F.linear(F.linear(x.to(A.dtype), A), B) * scaling
        return (y if bias is None else y + bias).to(x.dtype)
    # Keep W₀x for dm, or compute it twice? In 16 bits a second product is cheap, and memory is why one computes in
    # them; narrow layers have memory to spare.
    keep = x.element_size() > 2 or x.shape[-1] < 1024
    return _DoRA.apply(x, A, B, m, bias, weight, scaling, added, keep)


def autocasts(x: Tensor) -> bool:
    """Whether autocast chooses dtypes where x is; torch does not know the question for the meta device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


class _DoRA(torch.autograd.Function):
    """`dora_product` with the gradients of the docstring above, keeping x and vectors; with `keep` W₀x and Ax too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, m: Tensor, bias: Tensor | None,
                weight: Tensor | Callable[[], Tensor], scaling: float, added: bool, keep: bool) -> Tensor:
        W = weight() if callable(weight) else weight
        norm = dora_norm(W, A, B, scaling).to(m.dtype)
        c = m / norm
        flat = x.reshape(-1, x.shape[-1])                                                    # [T, d_in]
        Wx = F.linear(flat, W)                                                               # [T, d_out]
        Ax, scBt = A @ flat.to(A.dtype).T, B.T * (scaling * c)                               # [r, T], [r, d_out]
        y = Ax.T @ scBt if bias is None else torch.addmm(bias.to(A.dtype), Ax.T, scBt)
        y.addcmul_(Wx, c - 1 if added else c)
        keep = keep and ctx.needs_input_grad[3]
        saved = (Wx, Ax) if keep else (None, None)
        ctx.save_for_backward(x, A, B, m, norm, *saved, None if callable(weight) else weight)
        ctx.weight, ctx.scaling, ctx.added = weight if callable(weight) else None, scaling, added
        return y.to(x.dtype).view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        if autocasts(g):                                     # somebody called backward inside of it
            with torch.autocast(g.device.type, enabled=False):
                return _DoRA.backward(ctx, g)
        x, A, B, m, norm, Wx, Ax, weight = ctx.saved_tensors
        if torch.is_grad_enabled():                          # to be differentiated again: they are functions of x and A
            Wx = Ax = None
        of_x, of_A, of_B, of_m, of_bias = ctx.needs_input_grad[:5]
        W = ctx.weight() if weight is None and (of_x or of_m and Wx is None) else weight
        flat, c, s = x.reshape(-1, x.shape[-1]), m / norm, ctx.scaling                       # [T, d_in], [d_out]
        g = g.reshape(-1, g.shape[-1])
        g_, x_ = g.to(A.dtype), flat.to(A.dtype)                                             # [T, d_out], [T, d_in]
        sc = s * c
        dx = dA = dB = dm = None
        if of_x or of_A:
            sBcg = (B.T * sc) @ g_.T                                                         # [r, T]
        if of_A:
            dA = sBcg @ x_
        if of_B or of_m:
            gAx = (A @ x_.T if Ax is None else Ax) @ g_                                      # [r, d_out]
        if of_B:
            dB = (gAx * sc).T.contiguous()
        if of_m:
            dm = (g_ * (F.linear(flat, W) if Wx is None else Wx)).sum(0).add_((B.T * gAx).sum(0), alpha=s) / norm
        if of_x:
            dx = (g_ * (c - 1 if ctx.added else c)).to(g.dtype) @ W
            dx = (dx.addmm_(sBcg.T, A) if dx.dtype == A.dtype else dx.add_(sBcg.T @ A)).view(x.shape)
        return dx, dA, dB, dm, g_.sum(0) if of_bias else None, None, None, None, None
