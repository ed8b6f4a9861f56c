"""Quantization in blocks as the formula has it, for reading, on any device. `pefttools.nf4_kernels` is the fast way.

    absmax = max |w| over a block,   s = w / absmax,   code = how many midpoints between the sorted levels lie below s

(Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, section 2.) Then two codes to a
byte, the first in the upper half, which is bitsandbytes' order:

    codes      10     0     7    12           uint8, of which 4 bits are used
    bits     1010  0000  0111  1100
    bytes      0xA0        0x7C               uint8 [n/2]

byte = 16 · first + second. An odd number of codes is filled up with a 0.
"""
from __future__ import annotations

import torch
from torch import Tensor

from pefttools.codebook import NF4_CODE, midpoints


def nearest_codes(w: Tensor, code: Tensor = NF4_CODE, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """w [n] → (uint8 [n], absmax [ceil(n/block_size)]): the number of the nearest level, ties to the lower.

    w · (1/absmax) where bitsandbytes multiplies, w / absmax in a last block that is not full, where it divides.
    """
    full = w.numel() - w.numel() % block_size
    blocks, rest = w[:full].reshape(-1, block_size).float(), w[full:].float()
    absmax = blocks.abs().amax(-1)
    s = (blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(-1)).view(-1)
    if len(rest):
        absmax = torch.cat([absmax, rest.abs().amax().clamp(min=1e-38).unsqueeze(0)])
        s = torch.cat([s, rest / absmax[-1]])
    levels, order = code.to(w.device).sort(stable=True)
    return order[torch.bucketize(s, midpoints(levels), out_int32=True)].to(torch.uint8), absmax


def pack(codes: Tensor) -> Tensor:
    """uint8 [n] of 0…15 → uint8 [ceil(n/2)]."""
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """uint8 [n/2] → uint8 [n], the inverse of `pack`."""
    return torch.stack([packed >> 4, packed & 15], -1).view(-1)
