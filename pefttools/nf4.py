"""NF4: a weight in 4.5 bits, or 4.127 with double quantization, that dequantizes to nearly the same.

    for each block of 64 weights:   absmax = max |w|,    codeᵢ = the level of NF4 nearest to wᵢ / absmax
    ŵᵢ = NF4[codeᵢ] · absmax

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, sections 2 and 3; the sixteen levels are derived in
`pefttools.codebook`, double quantization is in `pefttools.double_quant`; the formula, for reading, in
`pefttools.blockwise`, and the fast loops, which give the same bits, in `pefttools.nf4_kernels`.

    w [d_out, d_in], row by row     0.30  -1.20   0.03   0.55  …   block of 64, absmax = 1.20
    w / absmax                      0.25  -1.00   0.03   0.46
    nearest level                  0.246  -1.00   0.00  0.441
    its number                        10      0      7     12
    packed, two to a byte            0xA0          0x7C             the first in the upper four bits
    dequantized                    0.295  -1.20   0.00  0.529

A worked number: 2048 → 2048 (q_proj of Llama-3.2-1B), 4,194,304 weights, is 8 MiB in bfloat16; in NF4 2 MiB of codes
and 0.25 MiB of absmax. Normal weights come back with a relative error of 0.092.

**Equal to bitsandbytes 0.50.2 on the CPU, in every bit**: codes, absmax, and the statistics of double quantization
(whose offset is a mean, which torch sums in an order that depends on the number of threads). Dequantized weights too,
save where bitsandbytes is wrong: with AVX-512, for in_features that are not a multiple of the block size. Ties between
two levels go to the lower. bitsandbytes' CUDA kernels round differently in a few places.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pefttools import nf4_compiled, nf4_kernels
from pefttools.blockwise import nearest_codes, pack, unpack
from pefttools.codebook import FP4_CODE, NF4_CODE, nf4_codebook
from pefttools.double_quant import dynamic_map, level_of_bin, quantize_8bit
from pefttools.nf4_tensor import BLOCK_SIZES, NF4Tensor, check_block_size, choose_compiled, is_plain

__all__ = ["BLOCK_SIZES", "FP4_CODE", "NF4_CODE", "NF4Tensor", "dequantize_nf4", "nearest_codes", "nf4_codebook",
           "pack", "quantize_4bit", "quantize_nf4", "unpack"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ------------------------------------------------------------------------------------------------ pure functions

def quantize_nf4(w: Tensor, block_size: int = 64, double_quant: bool = False,
                 compiled: bool | None = None) -> NF4Tensor:
    """w of any shape, float32, float16 or bfloat16 → NF4Tensor. Blocks run through the flattened w; the last may be
    short.

    compiled: with the C kernels of `pefttools.nf4_compiled` (the same bits; RuntimeError without a compiler), or with
    eager torch; None: whichever is sooner done, as described there. Raises TypeError for another dtype, ValueError for
    another block size than `BLOCK_SIZES` and for NaN or infinite entries, naming the first.
    """
    return quantize_4bit(w, "nf4", block_size, double_quant, compiled)


def quantize_4bit(w: Tensor, quant_type: str | Tensor = "nf4", block_size: int = 64, double_quant: bool = False,
                  compiled: bool | None = None) -> NF4Tensor:
    """`quantize_nf4` for "nf4", "fp4" or any sixteen levels in a float32 tensor, such as `codebook.lloyd_max()`."""
    code = {"nf4": NF4_CODE, "fp4": FP4_CODE}.get(quant_type) if isinstance(quant_type, str) else quant_type
    if code is None or code.shape != (16,) or code is quant_type and not code.isfinite().all():
        raise ValueError(f'quant_type must be "nf4", "fp4" or sixteen finite levels; got {quant_type!r}.')
    if w.dtype not in DTYPES:
        raise TypeError(f"w must be float32, float16 or bfloat16; got {w.dtype}. Convert it first: w.float().")
    check_block_size(block_size)
    flat, code = w.detach().reshape(-1), code.detach().float().to(w.device)
    compiled = is_plain(flat) and choose_compiled(compiled, flat.numel())
    if is_plain(flat):
        packed, absmax = nf4_kernels.encode(flat, code, block_size, compiled)
    else:
        codes, absmax = nearest_codes(flat, code, block_size)
        zero = int(nearest_codes(flat.new_zeros(1), code)[0])   # fills up an odd number of codes
        packed = pack(nn.functional.pad(codes, (0, len(codes) % 2), value=zero))
    if not all(math.isfinite(part.max()) for part in absmax.split(1 << 14) if len(part)):     # NaN is the largest
        raise ValueError(_where(w))
    nested = _nested(absmax, compiled) if double_quant else {"absmax": absmax}
    return NF4Tensor(packed.unsqueeze(-1), code=code.clone(), shape=w.shape, dtype=w.dtype, block_size=block_size,
                     quant_type=quant_type if isinstance(quant_type, str) else "custom", **nested)


def dequantize_nf4(q: NF4Tensor, out: Tensor | None = None, compiled: bool | None = None) -> Tensor:
    """q → the weight [*q.shape] it stands for, in its dtype; or written to `out`, in that one's. See `NF4Tensor`."""
    return q.dequantize(out, compiled=compiled)


# ------------------------------------------------------------------------------------------------ helpers

def _nested(absmax: Tensor, compiled: bool) -> dict[str, Tensor]:
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    if not math.isfinite(offset):
        raise ValueError("double_quant: the mean of the absmaxes is beyond float32. Use double_quant=False.")
    codes, nested_absmax = nf4_compiled.encode_nested(absmax, offset, level_of_bin(absmax.device)) if compiled \
        else quantize_8bit(absmax - offset)
    return {"absmax": codes, "nested_absmax": nested_absmax, "nested_code": dynamic_map(codes.device).clone(),
            "offset": offset}


def _where(w: Tensor) -> str:
    bad = ~w.detach().isfinite()
    first = tuple(bad.nonzero()[0].tolist())
    return (f"w must be finite: {int(bad.sum())} of its {w.numel()} entries are NaN or infinite, the first at "
            f"{list(first)} ({w[first].item()}). Its block would have no absmax.")
