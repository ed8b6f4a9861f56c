"""What the allocator reserves beyond what is allocated: rounding, and room that is cut into pieces.

    reserved ≈ allocated + 20 MiB + 1/32 of what comes and goes + ½ · min(optimizer state, the loss's logits)

PyTorch's caching allocator asks the GPU for segments: 2 MiB for blocks up to 1 MiB, 20 MiB for blocks below 10 MiB, and
above that for what is needed, rounded up to 2 MiB (c10/cuda/CUDACachingAllocator.cpp). It gives none back.

    step 1    logits take segments ───► freed ───► the optimizer's first step puts its state into them, for good
    step 2    logits need segments again: what is left between the pieces of state is too small, so new ones are taken

(With accumulation the gradients of the first pass do the same to the second's logits, and count as state here.)

So up to min(state, logits) of room is lost once, between nothing and all of it; the middle is taken. The rest is small,
or all or nothing (one block of state in a segment of logits costs that segment), and a matter of the order of things
that a closed form does not know. The margin is stated, not derived or fitted; `simulate` replays the allocator, and its
`reserved` is the one to trust. docs/vram_grid.md has how far apart they are.
"""
from __future__ import annotations

LARGE_BUFFER = 20 * 2**20
SHARE = 32                                # 1/32 of what comes and goes


def margin(moving: int, state: int, logits: int) -> int:
    """Bytes reserved beyond the allocated. moving: what comes and goes; state: the optimizer's; logits: of the loss."""
    return LARGE_BUFFER + moving // SHARE + min(state, logits) // 2
