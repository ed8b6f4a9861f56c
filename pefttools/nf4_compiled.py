"""Encoding and decoding 4-bit blocks in C (`nf4.c`), built by the machine's own compiler in half a second.

The same arithmetic as `pefttools.nf4_kernels`, so the same bytes, with nothing written to memory in between. Why not
`torch.compile`: it takes many seconds the first time, and again for other shapes, and its decoder, which looks up one
level at a time, is no faster than eager torch; this one is as fast as a copy in memory.

On processors with AVX-512, sixteen weights go through one register, and the sixteen levels lie in another: a look-up
is one instruction (vpermd; vpermw for 16-bit weights, 32 at a time). Elsewhere plain C does it.

When it is used, unless a call says `compiled=True` or `False`:

    PEFTTOOLS_COMPILED=1, use(True)      always; RuntimeError where there is no compiler
    PEFTTOOLS_COMPILED=0, use(False)     never
    neither                              once this process has put `WORTH` weights through the eager kernels and there
                                         is a compiler: by then the eager kernels have taken about as long as the
                                         build will, so that a short program never waits for it and a long one soon
                                         has it

The library is built once a process in a temporary folder and holds no state.
"""
from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pefttools.nf4_tensor import NF4Tensor

SOURCE = Path(__file__).with_name("nf4.c")
NATIVE = (torch.float32, torch.bfloat16, torch.float16)           # what C reads and writes
THREAD = 1 << 16                               # weights that are worth another thread: some 10 microseconds of work
NESTED_THREAD = 1 << 12                        # absmaxes that are
WORTH = 1 << 26                                # weights that take eager torch about as long as the build
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")          # no fused multiply-add: the same bits as torch


@functools.cache
def library() -> ctypes.CDLL:
    """The built kernels. Raises RuntimeError where there is no C compiler or it fails, with its words."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise RuntimeError("compiled=True needs a C compiler, and none of cc, gcc, clang is on the PATH. Install one "
                           "(Debian, Ubuntu: apt install gcc; macOS: xcode-select --install), or use compiled=False.")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "nf4.so")
        # Not every clang knows the first, and Apple's not OpenMP; without it the work is done on one thread.
        for flags in (("-march=native", "-fopenmp", *FLAGS), ("-march=native", *FLAGS), FLAGS):
            try:
                subprocess.run([*compiler.split(), *flags, str(SOURCE), "-o", str(built)], check=True,
                               capture_output=True, text=True)
                return _typed(ctypes.CDLL(str(built)))        # once loaded, the file is not needed
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", "") or error
    raise RuntimeError(f"compiled=True: {compiler} could not build the kernels: {reason} Use compiled=False.")


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, long = ctypes.c_void_p, ctypes.c_long
    for dtype in NATIVE:
        for name, pointers in (("encode", 5), ("decode", 8)):
            function = getattr(library, f"{name}_{str(dtype)[6:]}")
            function.restype, function.argtypes = None, [pointer] * pointers + [long, long, ctypes.c_int]
    library.encode_nested.restype, library.encode_nested.argtypes = None, [pointer] * 5 + [long, ctypes.c_int]
    return library


# ------------------------------------------------------------------------------------------------ whether

def use(on: bool | None = True) -> None:
    """Whether calls that leave `compiled` open are to use these kernels; None: as in the beginning. True builds them at
    once; raises as `library`."""
    global _asked, _seen
    if on:
        library()
    _asked, _seen = on, 0


def in_use() -> bool | None:
    """What `use` was last told; to begin with, what the environment variable PEFTTOOLS_COMPILED says."""
    return _asked


def wanted(weights: int) -> bool:
    """Whether a call on so many weights, which leaves `compiled` open, is to use these kernels. Counts them."""
    global _asked, _seen
    if _asked is None and _seen < WORTH:
        _seen += weights
        return False
    if _asked is None:
        try:
            library()
        except (OSError, RuntimeError):        # nobody asked for a compiler, so none is missed
            _asked = False
            return False
    return _asked is not False


_asked: bool | None = {"0": False, "1": True}.get(os.environ.get("PEFTTOOLS_COMPILED", ""))
_seen = 0


# ------------------------------------------------------------------------------------------------ the two kernels

def encode(w: Tensor, packed: Tensor, absmax: Tensor, bounds: Tensor, order: Tensor) -> None:
    """w [blocks, block_size] → packed uint8 [blocks, block_size/2] and absmax float32 [blocks, 1], which are filled.

    bounds float32 [15]: midpoints of the sorted levels; order uint8 [16]: the code of each.
    """
    w = w.contiguous()
    tables = torch.nn.functional.pad(bounds, (0, 1), value=torch.inf), order.int()       # 16, as a register has
    blocks, size = w.shape
    if 2 * packed.numel() != w.numel() or absmax.numel() != blocks:
        raise ValueError(f"{packed.numel()} packed bytes and {absmax.numel()} absmaxes do not fit a weight in blocks "
                         f"{list(w.shape)}.")
    _call("encode", w.dtype, (w, packed, absmax, *tables), blocks, size, w.numel())


def encode_nested(absmax: Tensor, offset: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """absmax float32 [n], offset float32 [], level uint8 [65536] → (codes uint8 [n], nested_absmax float32
    [ceil(n/256)]) of absmax − offset, all finite. What `double_quant.quantize_8bit` does."""
    absmax, n = absmax.contiguous(), len(absmax)
    codes = torch.empty(n, dtype=torch.uint8, device="cpu")
    nested = torch.empty(-(-n // 256), dtype=torch.float32, device="cpu")
    if offset.numel() != 1 or level.numel() != 65536 or not level.is_contiguous():
        raise ValueError(f"offset must be one number and level have 65536; got {list(offset.shape)}, "
                         f"{list(level.shape)}.")
    library().encode_nested(*(t.data_ptr() for t in (absmax, offset, level, codes, nested)), n,
                            min(torch.get_num_threads(), n // NESTED_THREAD))
    return codes, nested


def decode(q: NF4Tensor, out: Tensor) -> None:
    """The weight that q stands for, to `out`, contiguous, with as many entries, of a dtype in `NATIVE`."""
    n, size = out.numel(), q.block_size
    blocks = -(-n // size)
    absmax, nested = (None, (q.absmax, q.nested_absmax.float(), q.nested_code.float(), q.offset.float())) \
        if q.nested else (q.absmax.float(), (None,) * 4)
    if (2 * q.packed.numel() < n or q.absmax.numel() != blocks or q.code.numel() != 16 or q.packed.dtype != torch.uint8
            or q.nested and (q.nested_absmax.numel() * 256 < blocks or q.nested_code.numel() != 256
                             or q.absmax.dtype != torch.uint8)):
        raise ValueError(f"{q.packed.numel()} packed bytes and {q.absmax.numel()} absmaxes do not fit {n} weights in "
                         f"blocks of {size}.")
    _call("decode", out.dtype, (q.packed, out, q.code.float(), absmax, *nested), n, size, n)


def _call(name: str, dtype: torch.dtype, tensors: tuple[Tensor | None, ...], count: int, size: int, n: int) -> None:
    """C reads and writes where it is told to, so every tensor must be in one piece; the callers compare the sizes."""
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.is_contiguous()):
            raise ValueError(f"a tensor of shape {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device} is "
                             f"scattered or not in the CPU's memory.")
    getattr(library(), _NAMES[name, dtype])(*[None if tensor is None else tensor.data_ptr() for tensor in tensors],
                                            count, size, min(torch.get_num_threads(), n // THREAD))


_NAMES = {(name, dtype): f"{name}_{str(dtype)[6:]}" for name in ("encode", "decode") for dtype in NATIVE}
