"""Double quantization: the absmax of every 64 weights costs 32 bits, so the absmaxes are quantized too.

    offset = mean(absmax),      absmax ≈ offset + absmax₂[j] · dynamic[code₈],      one absmax₂ per 256 absmaxes

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3: absmaxes are all positive, so their mean is taken off first
and a signed 8-bit type used (the dynamic type of `pefttools.codebook.dynamic_codebook`).

    weights      ■■■■…■ 64   ■■■■…■ 64   ■■■■…■ 64    …  256 blocks = 16,384 weights
    absmax          ●            ●           ●         …   float32: 32/64 = 0.5 bit a weight
    code₈           ○            ○           ○         …   8/64 = 0.125 bit a weight
    absmax₂         └────────────┴───────────┴──── ● ───   32/16384 = 0.002 bit a weight

A worked number: 4 + 0.5 = 4.5 bits a weight become 4 + 0.125 + 0.00195 = 4.127, so 0.373 are saved: 3 GB of a
model of 65 billion weights. The error of normal weights grows from 0.09195 to 0.09198.

**Parity with bitsandbytes on the CPU.** Its CPU kernel does not look for the nearest level. It rounds the scaled value
to one of 65,536 points of [-1, 1] and takes the level nearest to *that* point, from a table: `quantize_8bit` does so
too, and its codes are equal. On CUDA bitsandbytes takes the nearest level; `nearest=True` does that, and differs in
about 0.2 % of the codes.
"""
from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pefttools.codebook import dynamic_codebook, midpoints

NESTED_BLOCK = 256   # absmaxes that share one absmax₂
_BINS = 65536


def quantize_8bit(x: Tensor, block_size: int = NESTED_BLOCK, nearest: bool = False) -> tuple[Tensor, Tensor]:
    """x float32 [n], any sign → (codes uint8 [n], absmax float32 [ceil(n/block_size)]) of the dynamic type.

    Equal to `bitsandbytes.functional.quantize_blockwise` on the CPU in every bit (`nearest`: to its CUDA kernel's
    rule); in a block of zeros all codes are 0, as there. Raises ValueError where x is not finite.
    """
    x = x.detach().reshape(-1).float()
    n, blocks = x.numel(), math.ceil(x.numel() / block_size)
    x = torch.nn.functional.pad(x, (0, blocks * block_size - n)).view(blocks, block_size)
    absmax = x.abs().amax(-1) if blocks else x.new_zeros(0)
    if not absmax.isfinite().all():
        raise ValueError("x must be finite to be quantized; it has NaN or infinite entries.")
    s = (x * (1.0 / absmax).unsqueeze(-1)).nan_to_num(0.0).clamp(-1, 1)                  # 0/0 in a block of zeros
    if nearest:
        codes = torch.bucketize(s, midpoints(dynamic_map(x.device))).to(torch.uint8)
    else:
        codes = level_of_bin(x.device)[((s + 1) * 0.5 * (_BINS - 1) + 0.5).long()]
    codes[absmax == 0] = 0
    return codes.view(-1)[:n].clone(), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, code: Tensor | None = None,
                    block_size: int = NESTED_BLOCK) -> Tensor:
    """codes uint8 [n], absmax [ceil(n/block_size)] → float32 [n]: code[codes] · absmax of the block."""
    code = dynamic_map(codes.device) if code is None else code
    values = code.index_select(0, codes.view(-1).int())
    full = len(codes) - len(codes) % block_size
    if full == len(codes):
        values.view(-1, block_size).mul_(absmax.view(-1, 1))
    else:
        values[:full].view(-1, block_size).mul_(absmax[:full // block_size].unsqueeze(-1))
        values[full:] *= absmax[-1]
    return values


@functools.cache
def dynamic_map(device: torch.device = torch.device("cpu")) -> Tensor:
    """`dynamic_codebook()`, made once a device. Not to be written to."""
    return dynamic_codebook().to(device)


@functools.cache
def level_of_bin(device: torch.device) -> Tensor:
    """uint8 [65536]: the level nearest to -1 + 2i/65535, as bitsandbytes' CPU kernel tabulates it."""
    points = -1.0 + 2.0 * torch.arange(_BINS, dtype=torch.float32, device="cpu") / (_BINS - 1)
    return torch.bucketize(points, midpoints(dynamic_codebook())).to(torch.uint8).to(device)
