"""Walking through a large tensor in chunks that stay in the cache; looking up in a table; and memory for the result.

    ├─chunk─┼─chunk─┼─chunk─┼──┤      one buffer for all of them; each as large as the caches of torch's threads
                                      together have room for
"""
from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18                  # weights at a time, for each thread: 1 MiB of float32. A multiple of every block size
_PROCESS = os.getpid()


def in_chunks(kernel: Any, *tensors: Tensor) -> None:
    """kernel(*rows, scratch) for all rows of the tensors, a chunk at a time; the threads are torch's own."""
    threads = torch.get_num_threads()
    if threads > 1 and os.getpid() != _PROCESS:      # a fork has none of its parent's threads, and OpenMP waits for them
        torch.set_num_threads(1)
        try:
            in_chunks(kernel, *tensors)
        finally:
            torch.set_num_threads(threads)
        return
    rows = max(1, CHUNK * threads // tensors[0].shape[1])
    scratch, last = None, None
    for part in [tensors] if len(tensors[0]) <= rows else zip(*(t.split(rows) for t in tensors), strict=True):
        if len(part[0]) != last:
            scratch, last = kernel.scratch(*part), len(part[0])
        kernel(*part, scratch)


def index(shape: int | tuple[int, ...]) -> Tensor:
    """Memory for the indices of `look_up`, of the dtype that it takes on this number of threads."""
    return new(shape, torch.int64 if torch.get_num_threads() > 1 else torch.int32)


def look_up(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[i, j] = table[rows[i, j]]. index_select is quicker than gather, but stays on one thread."""
    if rows.dtype == torch.int64:
        torch.gather(table.expand(len(rows), -1), 1, rows, out=out)
    else:
        torch.index_select(table, 0, rows.view(-1), out=out.view(-1))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def new(shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty, whatever torch's default dtype and device are set to."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def empty(shape: torch.Size, **kind: Any) -> Tensor:
    """torch.empty in pages of 2 MiB instead of 4 KiB, where Linux gives them on request, for 32 MiB and more.

    Memory that is new to the process arrives a page at a time, when first written to, and that takes several times as
    long as the writing. From 32 MiB on the C library takes every tensor's memory anew from the system; below, it soon
    keeps what is freed. With fewer pages, a large new tensor is dequantized in a fraction of the time.
    """
    out = torch.empty(shape, **kind)
    if sys.platform == "linux" and out.nbytes >= 1 << 25:
        start, end = -(-out.data_ptr() // 4096) * 4096, (out.data_ptr() + out.nbytes) // 4096 * 4096
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return out                                             # a refusal changes nothing but the time
