"""Walking through a large tensor in chunks that stay in the cache, on several threads; and memory for it.

    thread 1   ├─chunk─┼─chunk─┼─chunk─┼──┤                       one buffer a thread, used for each of its chunks
    thread 2                              ├─chunk─┼─chunk─┼─chunk─┼──┤

Why not leave the threads to torch, whose operations have their own? Looking up in a table (index_select) has none; and
a chunk's operations are so short that waiting for each other after every one of them costs more than they gain.
Torch lets go of Python's lock while an operation runs, so Python threads do.
"""
from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18                  # weights at a time: 1 MiB of float32. A multiple of every block size


def in_chunks(kernel: Any, *tensors: Tensor) -> None:
    """kernel(*rows, scratch) for all rows of the tensors, a chunk at a time, in one stretch for each thread."""
    blocks, size = tensors[0].shape
    rows = max(1, CHUNK // size)
    threads = min(torch.get_num_threads(), 2 * blocks * size // CHUNK) or 1
    stretch = math.ceil(blocks / threads)

    def work(start: int) -> None:
        scratch, last = None, None
        for part in zip(*(t[start:start + stretch].split(rows) for t in tensors), strict=True):
            if len(part[0]) != last:
                scratch, last = kernel.scratch(*part), len(part[0])
            kernel(*part, scratch)

    if threads == 1:
        if blocks:
            work(0)
        return
    inference = torch.is_inference_mode_enabled()                    # modes belong to a thread

    def run(start: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(start)

    list(_pool(torch.get_num_threads(), os.getpid()).map(run, range(0, blocks, stretch)))


@functools.lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use one thread each. `process`: a fork has none of its parent's threads."""
    ready = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()          # a thread's first look at its number takes over the common one: get that done
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "pefttools-nf4", initializer=start)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)       # for this thread nothing changes; for threads still to come, the 1 is undone
    return pool


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
