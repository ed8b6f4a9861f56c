"""NF4 on its own: quantize and dequantize against bitsandbytes' CPU kernels, dequantize against a copy in memory.

Bit-identity comes first: packed codes and scales must equal bitsandbytes' byte for byte, and the dequantized weight bit
for bit, or the row has no time. The nested statistics of double quantization are compared the same way; its offset is a
mean that torch rounds differently on another number of threads, and both sides run on the same.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pefttools.bench.harness import QUICK, Effort, Times, attempt, compare, interleave
from pefttools.bench.layers import DTYPES, name_of

SHAPES = [(2048, 2048), (512, 2048), (8192, 2048)]      # d_out, d_in: 2048→2048, →512, →8192
EAGER, COMPILED = 3.0, 20.0                             # times as fast as bitsandbytes, issue "The library"
QUANTIZE = Effort(seconds=5.0)
EACH, EAGER_EACH = Effort(seconds=2.0), Effort(seconds=0.5)     # of the processes that measure dequantizing


def weight(d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


def theirs(w: Tensor, double_quant: bool = False) -> tuple[Tensor, Any]:
    """bitsandbytes' (packed codes, quantization state)."""
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(w, blocksize=64, compress_statistics=double_quant, quant_type="nf4")


def check_identical(ours: Any, packed: Tensor, state: Any) -> None:
    """Raises ValueError naming the first part that is not bitsandbytes' bit for bit."""
    parts = {"packed codes": (ours.packed, packed), "absmax": (ours.absmax, state.absmax)}
    if state.nested:
        parts |= {"nested absmax": (ours.nested_absmax, state.state2.absmax), "offset": (ours.offset, state.offset)}
    for name, (a, b) in parts.items():
        if a.dtype != b.dtype or not torch.equal(a.reshape(-1), b.reshape(-1)):
            raise ValueError(f"{name} is not bitsandbytes' bit for bit, so the times are not compared")


def quantize_rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """The group "quantize": eager and compiled, plain and with double quantization."""
    eager = EAGER if torch.get_num_threads() == 1 else None      # the bound is for one thread
    for row, w, double in _cases(quick):
        for what, compiled, bound in (("ours, eager", False, eager), ("ours, compiled", True, COMPILED)):
            yield attempt({"row": row, "what": f"{what} × as fast as bitsandbytes", "unit": "×", "sense": "≥",
                           "bound": bound}, lambda: _quantize(row, w, double, what, compiled, bound, quick))


def _cases(quick: bool) -> Iterator[tuple[str, Tensor, bool]]:
    for d_out, d_in in SHAPES[1:2] if quick else SHAPES:
        for dtype in DTYPES:
            for double in (False, True):
                yield (f"{d_in}→{d_out} {name_of(dtype)}{', double quantization' if double else ''}",
                       weight(d_out, d_in, dtype), double)


def _quantize(row: str, w: Tensor, double: bool, what: str, compiled: bool, bound: float | None,
              quick: bool) -> dict[str, Any]:
    from pefttools.nf4 import quantize_nf4

    ways: dict[str, Callable[[], Any]] = {
        what: lambda: quantize_nf4(w, double_quant=double, compiled=compiled), "bitsandbytes": lambda: theirs(w, double)}
    check_identical(ways[what](), *theirs(w, double))
    return compare(row, interleave(ways, QUICK if quick else QUANTIZE), what, "bitsandbytes", bound, faster=True)


def dequantize_rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """The group "dequantize": into a new tensor and into a reused one, compiled and eager; beside them a memory copy."""
    for row, w, double in _cases(quick):
        found: list[dict[str, Any]] = []
        yield attempt({"row": row, "what": "ours × as fast as bitsandbytes", "unit": "×", "sense": "≥", "bound": 1.0},
                      lambda: _dequantize(row, w, double, quick, found))
        yield from found


def _dequantize(row: str, w: Tensor, double: bool, quick: bool, found: list[dict[str, Any]]) -> dict[str, Any]:
    from bitsandbytes.functional import dequantize_4bit

    from pefttools.nf4 import dequantize_nf4, quantize_nf4

    packed, state = theirs(w, double)
    q = quantize_nf4(w, double_quant=double)
    check_identical(q, packed, state)
    buffer, expected = torch.empty_like(w), dequantize_4bit(packed, state)
    if not all(torch.equal(dequantize_nf4(q, compiled=compiled), expected) for compiled in (None, False)):
        raise ValueError("the dequantized weight is not bitsandbytes' bit for bit, so the times are not compared")
    times: Times = interleave({
        "ours": lambda: dequantize_nf4(q), "ours, reused buffer": lambda: dequantize_nf4(q, out=buffer),
        "bitsandbytes": lambda: dequantize_4bit(packed, state),
        "copy_": lambda: buffer.copy_(w), "clone": w.clone}, QUICK if quick else EACH)
    # In rounds of its own, since it takes long and leaves nothing of the others' data in the cache.
    without = interleave({"ours, eager": lambda: dequantize_nf4(q, compiled=False),
                          "bitsandbytes": lambda: dequantize_4bit(packed, state)}, QUICK if quick else EAGER_EACH)
    to_copy = {f"{name} / {copy}": times.ratio(name, copy).median
               for name, copy in (("ours", "clone"), ("ours, reused buffer", "copy_"), ("bitsandbytes", "clone"))}
    found += [compare(row, times, "ours, reused buffer", "bitsandbytes", 1.0, faster=True, beside=to_copy),
              compare(row, without, "ours, eager", "bitsandbytes", 1.0, faster=True)]
    return compare(row, times, "ours", "bitsandbytes", 1.0, faster=True, beside=to_copy)
