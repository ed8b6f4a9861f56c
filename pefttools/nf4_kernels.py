"""Fast encoding and decoding of 4-bit blocks in eager torch: bit for bit what bitsandbytes computes on the CPU.

Encoding finds, for s = w · (1/absmax), how many of the 15 midpoints between levels lie strictly below s. The obvious
`torch.bucketize` searches by bisection, and no processor can predict its branches. Here it is one look-up in a table:

    s in [-1, 1]   ──·32760, + 32768, cut──►   bin 8…65528   ──table──►   code, or "16 + …" = look again

    bins  …|    |    |    |  ⋮ |    |    |…          fifteen of the 65,536 bins contain a midpoint ⋮ (or nearly do).
    code     5    5    5   16+5  6    6              About 3 weights in 10,000 fall there; those are bucketized.

Decoding looks up a byte, that is two codes, and finds two levels in a table of 256 pairs; then multiplies by absmax.

Both walk through the weights as `pefttools.chunks` has it, on as many threads as torch has (`torch.get_num_threads()`).
Scratch memory: some 5 MiB a thread to encode, 2 MiB to decode.

`pefttools.nf4` calls these two for CPU tensors; `compiled=True` exchanges the loop's body for one written in C.
"""
from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pefttools import nf4_compiled
from pefttools.chunks import in_chunks, index, look_up, new
from pefttools.codebook import midpoints

_SMALLEST = 1e-38                # bitsandbytes divides by no less
_BINS, _SCALE = 1 << 16, 32760   # a little less than half the bins, so that rounding never leaves the table
_AGAIN = 16                      # the bit that marks a bin with a midpoint in it


# ------------------------------------------------------------------------------------------------ encode

@torch.no_grad()
def encode(w: Tensor, code: Tensor, block_size: int, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """w [n] on the CPU → packed uint8 [ceil(n/2)], first weight in the high half; absmax float32 [ceil(n/block_size)].

    Infinite or NaN weights give an absmax that is not finite, and bytes that mean nothing.
    """
    n, full = w.numel(), w.numel() - w.numel() % block_size
    packed, absmax = new((n + 1) // 2, torch.uint8), new(math.ceil(n / block_size))
    bounds, order, table = _tables(tuple(code.tolist()))
    blocks = (w[:full].view(-1, block_size), packed[:full // 2].view(-1, block_size // 2),
              absmax[:full // block_size].unsqueeze(-1))
    if compiled:
        nf4_compiled.encode(*blocks, bounds, order)
    elif full:
        in_chunks(_Encoder(bounds, order, table), *blocks)
    if full < n:                             # a block that is not full: bitsandbytes divides, and its absmax is ≥ 1e-38
        x = w[full:].float()
        absmax[-1] = x.abs().max().clamp(min=_SMALLEST)
        codes = order[torch.bucketize(torch.nn.functional.pad(x / absmax[-1], (0, n % 2)), bounds)]
        packed[full // 2:] = codes[::2] << 4 | codes[1::2]
    return packed, absmax


class _Encoder:
    """Encodes a chunk of whole blocks: w [blocks, block_size] → packed [blocks, block_size/2], absmax [blocks, 1]."""

    def __init__(self, bounds: Tensor, order: Tensor, table: Tensor) -> None:
        self.bounds, self.order, self.table, self.half = bounds, order, table, new(()).fill_(_BINS / 2)

    def scratch(self, w: Tensor, packed: Tensor, absmax: Tensor) -> tuple[Tensor, ...]:
        return (new(w.shape), new(w.shape), index(w.shape), new(w.shape, torch.uint8), new(absmax.shape),
                new(w.numel() // 8, torch.int64), new(packed.shape, torch.int16))

    def __call__(self, w: Tensor, packed: Tensor, absmax: Tensor, scratch: tuple[Tensor, ...]) -> None:
        one, two, bins, codes, inverse, marks, halves = scratch
        x = w if w.dtype == torch.float32 else one.copy_(w)
        torch.amax(torch.abs(x, out=two), -1, keepdim=True, out=absmax)
        if not math.isfinite(absmax.max()):
            return
        s = torch.mul(x, torch.clamp(absmax, min=_SMALLEST, out=inverse).reciprocal_(), out=one)
        bins.copy_(torch.add(self.half, s, alpha=_SCALE, out=two))
        look_up(self.table, bins, codes)
        codes = codes.view(-1)
        marks = torch.bitwise_and(codes.view(torch.int64), _AGAIN * 0x0101010101010101, out=marks)  # of eight at a time
        again = marks.nonzero().view(-1)
        if len(again):
            codes.view(-1, 8)[again] = self.order[torch.bucketize(s.view(-1, 8)[again], self.bounds)]
        pairs = codes.view(torch.int16).view(packed.shape)                       # first code + 256 · second
        halves = torch.bitwise_right_shift(pairs, 8, out=halves).add_(pairs, alpha=16)
        packed.copy_(halves)                                                     # the lowest byte: 16 · first + second


@functools.lru_cache(maxsize=16)
def _tables(code: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Midpoints float32 [15] of the sorted levels; code of each uint8 [16]; code of each bin uint8 [65536]."""
    levels = torch.tensor(code, dtype=torch.float32, device="cpu")
    order = torch.argsort(levels, stable=True)
    bounds = midpoints(levels[order])
    edges = torch.arange(_BINS + 1, dtype=torch.float64, device="cpu") - _BINS / 2
    margin = 0.05                # s and its bin are off by at most 0.01 bins, from three roundings to float32
    low = torch.bucketize((edges[:-1] - margin) / _SCALE, bounds.double())
    high = torch.bucketize((edges[1:] + margin) / _SCALE, bounds.double(), right=True)
    order = order.to(torch.uint8)
    return bounds, order, order[low] | (low != high).to(torch.uint8) * _AGAIN


# ------------------------------------------------------------------------------------------------ decode

@torch.no_grad()
def decode(packed: Tensor, absmax: Tensor, code: Tensor, block_size: int, out: Tensor) -> Tensor:
    """packed uint8 [ceil(n/2)], absmax float32 [ceil(n/block_size)] → out [n]: code · absmax, rounded once."""
    n, full = out.numel(), out.numel() - out.numel() % block_size
    whole = (out, packed, absmax) if full == n else (out[:full], packed[:full // 2], absmax[:full // block_size])
    if full:
        in_chunks(_Decoder(code), whole[0].view(-1, block_size), whole[1].view(-1, block_size // 2),
                  whole[2].view(-1, 1))
    if full < n:
        tail = packed[full // 2:]
        out[full:] = code[torch.stack([tail >> 4, tail & 15], -1).view(-1)[:n - full].int()] * absmax[-1]
    return out


class _Decoder:
    """Decodes a chunk of whole blocks: packed [blocks, block_size/2], absmax [blocks, 1] → out [blocks, block_size]."""

    def __init__(self, code: Tensor) -> None:
        self.table = _pairs(tuple(code.tolist()))

    def scratch(self, out: Tensor, packed: Tensor, absmax: Tensor) -> tuple[Tensor, ...]:
        pairs = new(packed.numel() if out.dtype != torch.float32 else 0, torch.float64)
        return index(packed.shape), pairs

    def __call__(self, out: Tensor, packed: Tensor, absmax: Tensor, scratch: tuple[Tensor, ...]) -> None:
        octets, pairs = scratch
        values = out
        if out.dtype == torch.float32 and out.data_ptr() % 8 == 0:      # straight to where they belong
            pairs = out.view(-1).view(torch.float64)
        else:
            pairs = pairs if len(pairs) else new(packed.numel(), torch.float64)
            values = pairs.view(torch.float32).view(out.shape)
        look_up(self.table, octets.copy_(packed), pairs.view(packed.shape))
        torch.mul(values, absmax, out=values)
        if values is not out:            # in two steps: torch's product of one dtype in another is the slower
            out.copy_(values)


@functools.lru_cache(maxsize=16)
def _pairs(code: tuple[float, ...]) -> Tensor:
    """The two levels of each byte, two float32 in the eight bytes of a float64: [256]. One look-up moves both."""
    levels = torch.tensor(code, dtype=torch.float32, device="cpu")
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], -1).view(-1).view(torch.float64)
