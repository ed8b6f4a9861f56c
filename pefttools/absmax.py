"""Absmax int8: the simplest quantization. One scale for a row or a block, whole numbers from -127 to 127.

    a = max |w|  over the row (or block),      q = round(127 · w / a),      ŵ = q · a / 127

Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 2.1 (absmax quantization) and 3.1 (row-wise, which they
call vector-wise). Outliers, columns of the input with an entry of 6 or more, are kept apart in 16 bits (section 3.2).

    w        0.3   -1.2    0.05   0.61         a = 1.2
    127/a     ↓      ↓       ↓      ↓          · 105.83
    q         32   -127      5     65          int8
    a/127     ↓      ↓       ↓      ↓
    ŵ      0.302   -1.2   0.047  0.614         largest error 0.004: at most a/254 = 0.0047

The error of any weight is at most a/254, half a step. One outlier makes all steps of its row or block larger: that is
why blocks are small. Row-wise at 2048 columns, int8 costs 8 + 32/2048 = 8.016 bits a weight; blocks of 64, 8.5.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 127          # int8 without -128, so that -w and w have the same magnitude


def quantize_rowwise(w: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """w [rows, columns] → (int8 [rows, columns], absmax float32 [rows], columns with outliers or None).

    With `threshold` > 0 (LLM.int8(): 6.0), entries of that magnitude or more do not count for the absmax and become 0,
    and so does, if there is more than one row, all of their columns, whose numbers are returned: they are computed
    apart in 16 bits. Rounding is to the nearest, ties to even. Equal to `bitsandbytes.functional.int8_vectorwise_quant`
    on the CPU in every bit, except that a row of zeros gives zeros (there 0 · ∞ = NaN is cast to int8) and w itself is
    not written to. Raises ValueError for a shape that is not [rows, columns] and for NaN or infinite entries.
    """
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"w must be floating point [rows, columns]; got {w.dtype} {list(w.shape)}. Reshape to 2-D.")
    w = w.detach()
    columns = None
    if threshold > 0:
        outlier = w.abs() >= threshold
        columns = outlier.any(0).nonzero().view(-1)
        w = w.masked_fill(outlier, 0)
    absmax = _absmax(w)
    q = _to_int8(w, absmax)
    if columns is not None and len(w) > 1:
        q[:, columns] = 0
    return q, absmax, columns


def dequantize_rowwise(q: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """int8 [rows, columns], absmax [rows] → q · absmax · (1/127), each product rounded to float32.

    Equal to bitsandbytes' `int8_vectorwise_dequant` in every bit. (The first product overflows for absmax > 2.7e36.)
    """
    return (q * absmax.view(-1, 1) * (1 / LEVELS)).to(dtype)


def quantize_blockwise(w: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """w of any shape → (int8 of that shape, absmax float32 [ceil(n/block_size)]): blocks run through the flattened w.

    The last block may be shorter. Raises ValueError for block_size < 1 and for NaN or infinite entries.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be 1 or more; got {block_size}. Common: 64.")
    blocks = _blocks(w.detach(), block_size)
    absmax = _absmax(blocks)
    return _to_int8(blocks, absmax).view(-1)[:w.numel()].view(w.shape), absmax


def dequantize_blockwise(q: Tensor, absmax: Tensor, block_size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """int8 of any shape, absmax [ceil(n/block_size)] → q · absmax/127, of that shape."""
    values = _blocks(q, block_size) * (absmax.view(-1, 1) / LEVELS)
    return values.view(-1)[:q.numel()].view(q.shape).to(dtype)


def error_bound(absmax: Tensor) -> Tensor:
    """The largest error that rounding can make in a row or block: half a step, absmax/254."""
    return absmax / (2 * LEVELS)


# ------------------------------------------------------------------------------------------------ helpers

def _blocks(w: Tensor, block_size: int) -> Tensor:
    """[…] → [blocks, block_size], the last filled up with zeros, which change no absmax."""
    n = w.numel()
    blocks = math.ceil(n / block_size)
    return torch.nn.functional.pad(w.reshape(-1), (0, blocks * block_size - n)).view(blocks, block_size)


def _absmax(w: Tensor) -> Tensor:
    absmax = w.abs().amax(-1).float() if w.numel() else torch.zeros(len(w), device=w.device)
    if not absmax.isfinite().all():
        row = (~absmax.isfinite()).nonzero()[0].item()
        raise ValueError(f"w has NaN or infinite entries, first in row or block {row}; int8 has no code for them.")
    return absmax


def _to_int8(w: Tensor, absmax: Tensor) -> Tensor:
    """round(w · (127/absmax)), with the scale in float32 as in bitsandbytes."""
    scale = (float(LEVELS) / absmax).unsqueeze(-1)
    if not scale.isfinite().all():              # rows of zeros, or so small that float32 has no room for their scale
        w, scale = w.double(), LEVELS / absmax.double().clamp(min=5e-324).unsqueeze(-1)
        scale = scale.masked_fill(absmax.unsqueeze(-1) == 0, 0.0)
    return torch.round(w * scale).to(torch.int8)
