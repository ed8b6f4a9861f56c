"""From a ledger's lives to a Memory: who held what at the peak, the timeline, what the allocator reserved.

    lives ──► ± bytes in the order of the clock ──► running sums by term ──► the largest sum after `start`: the peak
       └────► the allocator, replayed ──────────────────────────────────────► reserved
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pefttools.vram.allocator import replay, round_size
from pefttools.vram.ledger import FOREVER, Ledger, Life
from pefttools.vram.memory import TERMS, Memory, Moment

POINTS = 400                                # of the timeline; the peak is one of them


def read(job: Any, lives: Sequence[Life], start: float, counts: tuple[int, int], emptied: Iterable[float] = (),
         context: int = 0, notes: tuple[str, ...] = ()) -> Memory:
    """The peak from tick `start` on. `emptied`: ticks at which the cache was emptied; `counts`: (trainable, all)."""
    terms = [Ledger.term_of(life) for life in lives]
    events = [(life.born, round_size(life.bytes), term, life) for life, term in zip(lives, terms)]
    events += [(life.died, -round_size(life.bytes), term, life) for life, term in zip(lives, terms)
               if life.died < FOREVER]
    events.sort(key=lambda event: (event[0], event[1] > 0))         # what goes makes room for what comes
    now, total = dict.fromkeys(TERMS, 0), 0
    best: tuple[int, float, dict[str, int], Any] = (-1, 0, dict(now), None)
    high = best
    moments: list[Moment] = []
    stride, count = -(-sum(event[0] >= start for event in events) // POINTS) or 1, 0
    for tick, size, term, life in events:
        now[term] += size
        total += size
        if tick < start:
            continue
        if total > high[0]:
            high = (total, tick, dict(now), life)
            if total > best[0]:
                best = high
        count += 1
        if count % stride == 0:
            moments.append(_moment(high))
            high = (-1, 0, {}, None)
    if high[3] is not None:
        moments.append(_moment(high))
    _, tick, peak, life = best
    moment = _moment(best)
    at = "step" if moment.phase == "step" else f"{moment.phase}: {moment.where}"
    reserved = replay(_actions(events, emptied)).peak_reserved
    return Memory(job, "simulator", peak, at, reserved, context, *counts, tuple(moments), _holders(lives, terms, tick),
                  notes)


def _moment(high: tuple[int, float, dict[str, int], Any]) -> Moment:
    life = high[3]
    phase = "loss" if life.phase == "forward" and life.wide and not life.where.endswith("head") else life.phase
    return Moment(phase, life.where or life.op.removeprefix("aten.").split(".")[0], high[2])


def _holders(lives: Sequence[Life], terms: Sequence[str], tick: float) -> dict[str, int]:
    held: dict[str, int] = {}
    for life, term in zip(lives, terms):
        if term == "activations" and life.born <= tick < life.died:
            held[life.where] = held.get(life.where, 0) + round_size(life.bytes)
    return dict(sorted(held.items(), key=lambda item: -item[1]))


def _actions(events: list[tuple[float, int, str, Life]], emptied: Iterable[float]) -> Iterable[tuple[int, Any]]:
    waiting = sorted(emptied, reverse=True)
    for tick, size, _, life in events:
        while waiting and tick > waiting[-1]:
            waiting.pop()
            yield 0, None
        yield (1 if size > 0 else -1), life
