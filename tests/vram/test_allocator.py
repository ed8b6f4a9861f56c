"""The caching allocator's rules, each by a case worked out by hand from c10/cuda/CUDACachingAllocator.cpp."""
from __future__ import annotations

from types import SimpleNamespace

import pytest

from pefttools.vram.allocator import MIB, CachingAllocator, OutOfMemory, replay, round_size, segment_size


@pytest.mark.parametrize("size, block", [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (10 * MIB + 1, 10 * MIB + 512)])
def test_blocks_are_multiples_of_512(size, block):
    assert round_size(size) == block


@pytest.mark.parametrize("size, segment", [(512, 2 * MIB), (MIB, 2 * MIB), (MIB + 512, 20 * MIB),
                                           (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)])
def test_segments(size, segment):
    assert segment_size(size) == segment


def test_small_blocks_share_a_segment():
    a = CachingAllocator()
    for _ in range(4):
        a.malloc(512 * 1024)
    assert (a.reserved, a.allocated) == (2 * MIB, 2 * MIB)
    a.malloc(1)
    assert a.reserved == 4 * MIB


def test_small_and_large_pools_do_not_mix():
    a = CachingAllocator()
    a.free(a.malloc(4 * MIB))
    assert a.reserved == 20 * MIB
    a.malloc(1000)
    assert a.reserved == 22 * MIB


def test_the_best_fit_is_taken():
    a = CachingAllocator()
    large, walls, small = a.malloc(40 * MIB), a.malloc(30 * MIB), a.malloc(20 * MIB)
    a.free(large), a.free(small)
    block = a.malloc(19 * MIB + 512 * 1024)
    assert a.reserved == 90 * MIB and block.size == 20 * MIB     # the rest, half a MiB, stays in the block
    assert walls.size == 30 * MIB


def test_a_rest_of_more_than_one_mib_is_split_off_and_used():
    a = CachingAllocator()
    a.free(a.malloc(40 * MIB))
    a.malloc(15 * MIB), a.malloc(25 * MIB)
    assert a.reserved == 40 * MIB == a.allocated


def test_free_neighbours_become_one_block():
    a = CachingAllocator()
    a.free(a.malloc(30 * MIB))
    parts = [a.malloc(10 * MIB) for _ in range(3)]
    assert a.reserved == 30 * MIB
    for part in (parts[0], parts[2], parts[1]):
        a.free(part)
    a.malloc(30 * MIB)
    assert a.reserved == 30 * MIB


def test_fragments_make_reserved_exceed_allocated():
    a = CachingAllocator()
    a.free(a.malloc(40 * MIB))
    first, second = a.malloc(20 * MIB), a.malloc(20 * MIB)
    a.free(first)
    a.malloc(24 * MIB)                                          # 20 MiB are free, and too few
    assert (a.allocated, a.reserved) == (44 * MIB, 64 * MIB) and second.size == 20 * MIB


def test_empty_cache_gives_back_whole_segments_only():
    a = CachingAllocator()
    kept, gone = a.malloc(2 * MIB), a.malloc(50 * MIB)          # the first in a segment of 20 MiB
    a.free(gone)
    a.empty_cache()
    assert a.reserved == 20 * MIB and kept.size == 2 * MIB
    assert a.peak_reserved == 70 * MIB


def test_a_full_card_gives_back_its_cache_before_it_gives_up():
    a = CachingAllocator(capacity=100 * MIB)
    a.free(a.malloc(60 * MIB))
    a.malloc(80 * MIB)
    assert (a.retries, a.reserved) == (1, 80 * MIB)
    with pytest.raises(OutOfMemory, match="in use"):
        a.malloc(30 * MIB)


def test_replay_equals_calls_one_by_one():
    one, two = SimpleNamespace(bytes=30 * MIB), SimpleNamespace(bytes=5 * MIB)
    a = replay([(1, one), (1, two), (-1, one), (0, None)])
    assert (a.allocated, a.reserved, a.peak_reserved, a.peak_allocated) == (5 * MIB, 20 * MIB, 50 * MIB, 35 * MIB)


def test_everything_freed_is_one_free_block_for_each_segment():
    import random

    draw, a, held = random.Random(0), CachingAllocator(), []
    for _ in range(2000):
        if held and draw.random() < 0.5:
            a.free(held.pop(draw.randrange(len(held))))
        else:
            held.append(a.malloc(draw.choice([100, 5000, 700_000, 3 * MIB, 17 * MIB])))
        assert a.allocated <= a.reserved
    for block in held:
        a.free(block)
    assert a.allocated == 0
    a.empty_cache()
    assert a.reserved == 0
