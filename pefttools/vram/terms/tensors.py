"""Lists of tensors: how many numbers each has, and how many such there are. Bytes come from lists, never from a sum.

    block(n) = ⌈n / 512⌉ · 512            the allocator gives memory in multiples of 512 bytes (kMinBlockSize)

For one large tensor that is nothing; for 1,000 vectors of 300 bytes it is 70 % more. `bytes_of` rounds each tensor.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

BLOCK = 512


class Tensors(NamedTuple):
    """`count` tensors of `numel` numbers each."""

    numel: int
    count: int = 1


def block(n: int) -> int:
    """Bytes of the allocator's block for n bytes; none for none."""
    return -(-n // BLOCK) * BLOCK


def numbers(tensors: Iterable[Tensors]) -> int:
    """How many numbers there are in all."""
    return sum(numel * count for numel, count in tensors)


def bytes_of(tensors: Iterable[Tensors], size: float) -> int:
    """Their bytes, each tensor rounded up to a block, at `size` bytes a number."""
    return sum(count * block(int(-(-numel * size // 1))) for numel, count in tensors)
