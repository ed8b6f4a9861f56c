"""What waits for the backward pass, by name: a tensor that two operations need is there once.

    q, k and v read the same normed input:        kept.keep("normed", 2·N·h) three times is 2·N·h bytes
"""
from __future__ import annotations

from dataclasses import dataclass

from pefttools.vram.job import Job
from pefttools.vram.terms.tensors import block


@dataclass(frozen=True)
class Tokens:
    """B rows of T tokens, N = B·T of them; S keys that each row attends to."""

    B: int
    T: int
    S: int

    @property
    def N(self) -> int:
        return self.B * self.T


def tokens_of(job: Job) -> Tokens:
    """Prompt and P-tuning lengthen every row by P; a prefix lengthens the keys alone."""
    from pefttools.vram.terms.adapters import virtual_tokens

    P = virtual_tokens(job) if job.method in ("prompt", "ptuning", "prefix") else 0
    T = job.seq + (P if job.method != "prefix" else 0)
    return Tokens(job.batch, T, T + (P if job.method == "prefix" else 0))


class Kept(dict[str, int]):
    """{name: bytes}; each in blocks of the allocator."""

    def keep(self, name: str, n: int) -> None:
        self[name] = max(self.get(name, 0), block(n))

    @property
    def total(self) -> int:
        return sum(self.values())
