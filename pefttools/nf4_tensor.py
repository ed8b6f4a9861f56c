"""The quantized weight as an object: codes, scales, and how it turns back into numbers.

    ŵᵢ = code[packed codeᵢ] · absmax of its block                     code: the sixteen levels, those of NF4 by default

What bitsandbytes keeps in a `Params4bit` and its `quant_state` (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314,
section 3); how the codes come about is in `pefttools.nf4`, where all of this is imported from.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pefttools import chunks, nf4_compiled, nf4_kernels, nf4_state
from pefttools.blockwise import unpack
from pefttools.double_quant import dequantize_8bit

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)     # those that bitsandbytes has


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
        check_block_size(self.block_size)
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
            empty = chunks.empty if is_plain(self.packed) else torch.empty
            out = empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)
        elif (out.shape != self.shape or not out.is_contiguous() or not out.is_floating_point()
              or dtype not in (None, out.dtype)):
            raise ValueError(f"out must be contiguous, {list(self.shape)}, of a floating-point dtype; got {out.dtype} "
                             f"{list(out.shape)} with strides {out.stride()}.")
        if is_plain(self.packed) and is_plain(out):
            if choose_compiled(compiled, out.numel()):
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

def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}; got {block_size!r}.")


def is_plain(t: Tensor) -> bool:
    """Numbers in memory: not on another device, not a stand-in such as a FakeTensor."""
    return t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)


def choose_compiled(asked: bool | None, weights: int) -> bool:
    return nf4_compiled.wanted(weights) if asked is None else asked
