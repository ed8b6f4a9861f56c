"""Data of several lengths: the batch that needs most, for a run must survive its worst batch.

    rows of 90, 400, 512, 2048 tokens in batches of 2, each padded to its longest row:

        90  ▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪·······    B · max(lengths) tokens go through the model, padding as well;
       400  ▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪▪    the worst batch holds the longest row: 2 · 2048

Sorting rows into batches of similar length saves time and average memory, never the worst batch. Only a shorter limit
does, and `share_cut` says what it costs.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pefttools.vram.job import Job


@dataclass(frozen=True)
class Lengths:
    """What the planner must know of the data. `seq`: the longest row after cutting; `padded`: rows differ in length."""

    rows: int
    seq: int
    shortest: int
    mean: float
    p50: int
    p95: int
    p99: int
    padded: bool

    def __str__(self) -> str:
        return (f"{self.rows:,} rows of {self.shortest:,} to {self.seq:,} tokens (mean {self.mean:,.0f}, half within "
                f"{self.p50:,}, 99 % within {self.p99:,})")


def lengths_of(lengths: Iterable[int], max_length: int | None = None) -> Lengths:
    """Summarize token counts, each cut at `max_length`. ValueError for no rows, or a length that is none."""
    given = list(lengths)
    if not given:
        raise ValueError(
            "lengths is empty: give the number of tokens of each row, such as [len(r['input_ids']) for r in rows]."
        )
    for n in given:
        if isinstance(n, bool) or int(n) != n or n < 1:
            raise ValueError(f"lengths holds {n!r}: each is a row's number of tokens, a whole number of at least 1.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length}: tokens to keep of a row, at least 1.")
    cut = sorted(min(int(n), max_length or int(n)) for n in given)

    def quantile(share: float) -> int:
        return cut[max(0, math.ceil(share * len(cut)) - 1)]

    return Lengths(len(cut), cut[-1], cut[0], sum(cut) / len(cut), quantile(0.5), quantile(0.95), quantile(0.99),
                   cut[0] != cut[-1])


def share_cut(lengths: Iterable[int], max_length: int) -> float:
    """The share of rows that lose tokens at this limit, 0 to 1."""
    given = list(lengths)
    return sum(n > max_length for n in given) / len(given)


def worst_batch(job: Job, lengths: Iterable[int], max_length: int | None = None, multiple: int = 1) -> Job:
    """The job of the batch that needs most: the longest row, and padding (a mask) where a batch can hold two lengths.

    `multiple`: the collator pads to a multiple of it (8 for fp16 tensor cores, say).
    """
    if multiple < 1:
        raise ValueError(f"multiple={multiple}: pad to a multiple of at least 1.")
    known = lengths_of(lengths, max_length)
    seq = math.ceil(known.seq / multiple) * multiple
    rows = min(job.batch, known.rows)
    mask = rows > 1 and known.padded or seq != known.seq
    return job.but(batch=rows, seq=seq, padded=job.padded or mask)
