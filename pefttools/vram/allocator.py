"""PyTorch's caching allocator, replayed: from allocations to torch.cuda.max_memory_reserved().

    request ──round up to 512 B──► block       ≤ 1 MiB: small pool        > 1 MiB: large pool
                                                  │                          │
       a free block of the pool, best fit:        │ none                     │ none
       the smallest that is large enough;         ▼                          ▼
       the rest of it stays a free block       segment of 2 MiB        < 10 MiB: segment of 20 MiB
                                                                       else: rounded up to 2 MiB
    reserved = Σ segments (what cudaMalloc gave)          allocated = Σ blocks in use

A block is split where the rest is at least 512 B (small pool) or more than 1 MiB (large pool); a freed block is joined
with free neighbours of its segment; a segment that is one free block can be given back (empty_cache, or when cudaMalloc
finds no memory left). So reserved exceeds allocated by what lies in rests too small, or too scattered, for what comes.

Source: c10/cuda/CUDACachingAllocator.cpp (kMinBlockSize 512, kSmallSize 1 MiB, kSmallBuffer 2 MiB, kLargeBuffer 20 MiB,
kMinLargeAlloc 10 MiB, kRoundLarge 2 MiB; `round_size`, `get_allocation_size`, `should_split`, `get_free_block`,
`free_block`). One stream; default settings (no expandable segments, no max_split_size, no power-of-two rounding).
A worked number: 11 MiB asked for = a segment of 12 MiB; 9 MiB = one of 20 MiB, where two of them fit.
"""
from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any

KIB, MIB = 1 << 10, 1 << 20
MIN_BLOCK, SMALL_SIZE, SMALL_BUFFER = 512, MIB, 2 * MIB
LARGE_BUFFER, MIN_LARGE, ROUND_LARGE = 20 * MIB, 10 * MIB, 2 * MIB


def round_size(size: int) -> int:
    """Bytes of the block for a request of `size`: the next multiple of 512, at least 512."""
    return max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)


def segment_size(size: int) -> int:
    """Bytes that are asked of cudaMalloc for a (rounded) block of `size` when no free block fits."""
    if size <= SMALL_SIZE:
        return SMALL_BUFFER
    if size < MIN_LARGE:
        return LARGE_BUFFER
    return -(-size // ROUND_LARGE) * ROUND_LARGE


class OutOfMemory(RuntimeError):
    """The capacity that was given does not do."""


class Block:
    """A piece of a segment. `before`, `after`: its neighbours there."""

    __slots__ = ("size", "small", "free", "before", "after", "start", "asked")

    def __init__(self, size: int, small: bool, start: int) -> None:
        self.size, self.small, self.start, self.free, self.asked = size, small, start, False, 0
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """`block = allocator.malloc(bytes)`, `allocator.free(block)`; then `.peak_reserved`, `.peak_allocated`, in bytes.

    `capacity`: of the card in bytes, for cudaMalloc; None is without end. Raises OutOfMemory where even the
    cache's free segments, given back, do not make room.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.reserved = self.allocated = self.requested = 0
        self.peak_reserved = self.peak_allocated = 0
        self.retries = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}      # by pool: (size, start), sorted
        self._at: dict[int, Block] = {}                                             # free blocks by start
        self._next = 0                                                              # addresses are never used twice

    def malloc(self, size: int) -> Block:
        rounded = round_size(size)
        small = rounded <= SMALL_SIZE
        block = self._take(rounded, small) or self._segment(rounded, small)
        rest = block.size - rounded
        if rest >= MIN_BLOCK if small else rest > SMALL_SIZE:
            other = Block(rest, small, block.start + rounded)
            other.before, other.after = block, block.after
            if block.after is not None:
                block.after.before = other
            block.after, block.size = other, rounded
            self._give(other)
        block.asked = size
        self.allocated += block.size
        self.requested += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        self.allocated -= block.size
        self.requested -= block.asked
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._withdraw(other)
                if other is block.before:
                    block.start, block.before = other.start, other.before
                    if block.before is not None:
                        block.before.after = block
                else:
                    block.after = other.after
                    if block.after is not None:
                        block.after.before = block
                block.size += other.size
        self._give(block)

    def empty_cache(self) -> None:
        """Give back every segment that is one free block."""
        for block in [b for b in self._at.values() if b.before is None and b.after is None]:
            self._withdraw(block)
            self.reserved -= block.size

    def reset_peaks(self) -> None:
        self.peak_reserved, self.peak_allocated = self.reserved, self.allocated

    # ---- blocks
    def _take(self, size: int, small: bool) -> Block | None:
        pool = self._free[small]
        at = bisect_left(pool, (size, -1))
        if at == len(pool):
            return None
        block = self._at[pool[at][1]]
        self._withdraw(block)
        return block

    def _segment(self, size: int, small: bool) -> Block:
        wanted = segment_size(size)
        if self.capacity is not None and self.reserved + wanted > self.capacity:
            self.retries += 1
            self.empty_cache()
            if self.reserved + wanted > self.capacity:
                raise OutOfMemory(f"{self.allocated} bytes are in use and {wanted} more are wanted; the card has "
                                  f"{self.capacity}.")
        self.reserved += wanted
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = Block(wanted, small, self._next)
        self._next += wanted + MIN_BLOCK                     # a gap: neighbours are of one segment only
        return block

    def _give(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.start))
        self._at[block.start] = block

    def _withdraw(self, block: Block) -> None:
        block.free = False
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.start))]
        del self._at[block.start]


def replay(actions: Iterable[tuple[int, Any]], capacity: int | None = None) -> CachingAllocator:
    """Run (+1, life), (−1, life) and (0, None) for empty_cache, where `life.bytes` is what was asked for."""
    allocator = CachingAllocator(capacity)
    held: dict[int, Block] = {}
    for what, life in actions:
        if what > 0:
            held[id(life)] = allocator.malloc(life.bytes)
        elif what < 0:
            allocator.free(held.pop(id(life)))
        else:
            allocator.empty_cache()
    return allocator
