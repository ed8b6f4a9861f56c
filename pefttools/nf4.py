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
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pefttools import chunks, nf4_compiled, nf4_kernels, nf4_state
from pefttools.blockwise import nearest_codes, pack, unpack
from pefttools.codebook import FP4_CODE, NF4_CODE, nf4_codebook
from pefttools.double_quant import dequantize_8bit, dynamic_map, level_of_bin, quantize_8bit

__all__ = ["BLOCK_SIZES", "FP4_CODE", "NF4_CODE", "NF4Tensor", "dequantize_nf4", "nearest_codes", "nf4_codebook",
           "pack", "quantize_4bit", "quantize_nf4", "unpack"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)     # those that bitsandbytes has
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
    if code is None or code.shape != (16,) or not code.isfinite().all():
        raise ValueError(f'quant_type must be "nf4", "fp4" or sixteen finite levels; got {quant_type!r}.')
    if w.dtype not in DTYPES:
        raise TypeError(f"w must be float32, float16 or bfloat16; got {w.dtype}. Convert it first: w.float().")
    _check_block_size(block_size)
    flat, code = w.detach().reshape(-1), code.detach().float().to(w.device)
    compiled = _plain(flat) and _compiled(compiled, flat.numel())
    if _plain(flat):
        packed, absmax = nf4_kernels.encode(flat, code, block_size, compiled)
    else:
        codes, absmax = nearest_codes(flat, code, block_size)
        zero = int(nearest_codes(flat.new_zeros(1), code)[0])   # fills up an odd number of codes
        packed = pack(nn.functional.pad(codes, (0, len(codes) % 2), value=zero))
    if not all(math.isfinite(part.max()) for part in absmax.split(1 << 14) if len(part)):     # NaN is the largest
        raise ValueError(_where(w))
    q = NF4Tensor(packed.unsqueeze(-1), absmax, code.clone(), w.shape, w.dtype, block_size,
                  quant_type if isinstance(quant_type, str) else "custom")
    return _nested(q, compiled) if double_quant else q


def dequantize_nf4(q: NF4Tensor, out: Tensor | None = None, compiled: bool | None = None) -> Tensor:
    """The weight that q stands for, in its shape and dtype; or written to `out`, in that one's. See `NF4Tensor`."""
    return q.dequantize(out, compiled=compiled)


# ------------------------------------------------------------------------------------------------ the quantized weight

@dataclass
class NF4Tensor:
    """A quantized weight; its parts are bitsandbytes'. Raises ValueError where their sizes do not fit together.

    packed         uint8 [ceil(n/2), 1]            two codes a byte
    absmax         float32 [blocks], or, with double quantization, uint8 [blocks]
    code           float32 [16]                    the levels
    shape, dtype   those of the weight that was quantized
    block_size     weights that share an absmax: blocks = ceil(n/block_size)
    quant_type     "nf4", "fp4", or "custom" for other levels
    nested_absmax  float32 [ceil(blocks/256)], nested_code float32 [256], offset float32 []: of double quantization
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int = 64
    quant_type: str = "nf4"
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        _check_block_size(self.block_size)
        n = math.prod(self.shape)
        blocks = math.ceil(n / self.block_size)
        sizes = {"packed": (n + 1) // 2, "absmax": blocks, "code": 16}
        if self.nested:
            sizes |= {"nested_absmax": math.ceil(blocks / 256), "nested_code": 256, "offset": 1}
        for name, size in sizes.items():
            got = None if getattr(self, name) is None else getattr(self, name).numel()
            if got != size:
                raise ValueError(f"{name} must have {size} entries for a weight {list(self.shape)} in blocks of "
                                 f"{self.block_size}; got {got}.")
        if self.packed.dtype != torch.uint8 or self.nested != (self.absmax.dtype == torch.uint8):
            raise ValueError(f"packed must be uint8, and absmax if and only if there is a nested_absmax; got "
                             f"{self.packed.dtype} and {self.absmax.dtype}.")

    @property
    def nested(self) -> bool:
        """Whether double quantized."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """What this weight takes: codes and statistics. The tables of levels, 64 and 1024 bytes, are not counted."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def bits_per_parameter(self) -> float:
        """8 · nbytes / n: 4.5 with blocks of 64, 4.127 with double quantization."""
        return 8 * self.nbytes / math.prod(self.shape)

    def scales(self) -> Tensor:
        """absmax float32 [blocks], dequantized if need be."""
        if not self.nested:
            return self.absmax.float()
        return dequantize_8bit(self.absmax, self.nested_absmax, self.nested_code).add_(self.offset)

    def dequantize(self, out: Tensor | None = None, dtype: torch.dtype | None = None,
                   compiled: bool | None = None) -> Tensor:
        """code · absmax in float32, rounded once to `dtype` (default: that of the original) or to that of `out`.

        `out`: a contiguous tensor of the weight's shape, to write to instead of a new one; with one buffer for all
        layers, nothing is allocated. Raises ValueError where `out` does not fit.
        """
        if out is None:
            empty = chunks.empty if _plain(self.packed) else torch.empty
            out = empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)
        elif (out.shape != self.shape or not out.is_contiguous() or not out.is_floating_point()
              or dtype not in (None, out.dtype)):
            raise ValueError(f"out must be contiguous, {list(self.shape)}, of a floating-point dtype; got {out.dtype} "
                             f"{list(out.shape)} with strides {out.stride()}.")
        if _plain(self.packed) and _plain(out):
            if _compiled(compiled, out.numel()):
                target = out if out.dtype in nf4_compiled.NATIVE else torch.empty_like(out, dtype=torch.float32)
                nf4_compiled.decode(self, target)
                if target is not out:
                    out.detach().copy_(target)
                elif not out.is_inference():                    # C wrote behind autograd's back
                    torch.autograd.graph.increment_version(out)
            else:
                packed, flat = self.packed.detach().reshape(-1), out.detach().view(-1)
                nf4_kernels.decode(packed, self.scales(), self.code, self.block_size, flat)
        else:
            n = out.numel()
            codes = unpack(self.packed.detach().reshape(-1))[:n].int()
            out.detach().view(-1).copy_(self.code[codes] * self.scales().repeat_interleave(self.block_size)[:n])
        return out

    def to(self, device: torch.device | str) -> NF4Tensor:
        """A copy with its tensors on `device`."""
        return replace(self, **{name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)})

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The tensors under which bitsandbytes' Linear4bit saves itself; see `pefttools.nf4_state`."""
        return nf4_state.to_tensors(self, prefix)

    @classmethod
    def from_state_dict(cls, tensors: dict[str, Tensor], prefix: str = "weight") -> NF4Tensor:
        """From such tensors, ours or bitsandbytes'. Raises KeyError for what is missing, ValueError for what is odd."""
        return cls(**nf4_state.from_tensors(tensors, prefix))


# ------------------------------------------------------------------------------------------------ helpers

def _nested(q: NF4Tensor, compiled: bool) -> NF4Tensor:
    offset = q.absmax.mean() if len(q.absmax) else q.absmax.new_zeros(())
    if not offset.isfinite():
        raise ValueError("double_quant: the mean of the absmaxes is beyond float32. Use double_quant=False.")
    codes, nested_absmax = nf4_compiled.encode_nested(q.absmax, offset, level_of_bin(q.absmax.device)) if compiled \
        else quantize_8bit(q.absmax - offset)
    return replace(q, absmax=codes, nested_absmax=nested_absmax, nested_code=dynamic_map(codes.device).clone(),
                   offset=offset)


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}; got {block_size!r}.")


def _plain(t: Tensor) -> bool:
    """Numbers in memory: not on another device, not a stand-in such as a FakeTensor."""
    return t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)


def _compiled(asked: bool | None, weights: int) -> bool:
    return nf4_compiled.wanted(weights) if asked is None else asked


def _where(w: Tensor) -> str:
    bad = ~w.detach().isfinite()
    first = tuple(bad.nonzero()[0].tolist())
    return (f"w must be finite: {int(bad.sum())} of its {w.numel()} entries are NaN or infinite, the first at "
            f"{list(first)} ({w[first].item()}). Its block would have no absmax.")
