"""Fully sharded data parallelism, as accelerate sets it up: one GPU of N, from the ledger of one that holds everything.

    every GPU:   1/N of each parameter, gradient and optimizer state      +  its own batch's activations and logits
                 all of the decoder layer at work, and of the next one    +  all gradients of a layer until shared out

    forward    gather 0 │ gather 1 │ gather 2 │ …          layer i is whole from the start of i−1 to its own end
               ─ run 0 ─┼─ run 1 ──┼─ run 2 ──┼─
    backward   gather n │ gather n−1 │ …                   layer i is whole from the start of i+1's to its own end
               ─ back n ┼─ back n−1 ─┼─ …                  its gradients until the end of i−1's: then 1/N of them

Units are the decoder layers (transformer_auto_wrap_policy); what is outside of them (embedding, last norm, head) is the
root, which is gathered at the start of the forward pass and kept until the end of the backward pass, as FSDP does with
its root. One unit ahead is gathered (backward_prefetch=BACKWARD_PRE; forward: the rate limiter's second all-gather). A
unit is gathered in the dtype that it is stored in (4-bit codes as they are). Source: torch/distributed/fsdp
(_runtime_utils.py, _flat_param.py), accelerate's FullyShardedDataParallelPlugin with its defaults.

Stated, not run: there is one process here. When a layer's backward pass begins is read off the ledger: its first saved
activation is freed.

    the worked number: Llama-3.1-8B, full fine-tuning, bfloat16, N = 8: states 8.03e9 · (2 + 2 + 4) / 8 bytes a GPU, and
    gathered at most the root (2 · 128,256 · 4096 · 2 bytes) and two layers (218.1e6 · 2 bytes each)
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from pefttools.vram.ledger import FOREVER, Ledger, Life

UNIT = re.compile(r"^(?:.*\.)?(?:layers|h|blocks|layer|block)\.\d+(?=\.|$)")
STATES = ("weights", "constants", "adapter", "gradients", "optimizer")
RULES = ("FSDP by stated rules: 1/N of parameters, gradients and optimizer; the layer at work and the next one whole; "
         "the root whole from forward to backward",)


def unit_of(where: str) -> str:
    """The decoder layer that a module is in, or "" for the root."""
    match = UNIT.match(where)
    return match.group(0) if match else ""


def shard(ledger: Ledger, gpus: int) -> list[Life]:
    """The lives on one of `gpus` GPUs. Raises ValueError for fewer than one."""
    if gpus < 1:
        raise ValueError(f"gpus={gpus}: at least one is needed.")
    whole: dict[str, int] = {}                                   # bytes of each unit's parameters
    for life in ledger.lives:
        if life.phase == "build" and life.term in ("weights", "constants", "adapter"):
            whole[unit_of(life.where)] = whole.get(unit_of(life.where), 0) + life.bytes
    passes = list(_passes(ledger))
    lives = []
    for life in ledger.lives:
        term = Ledger.term_of(life)
        if term not in STATES:
            lives.append(life)
        elif term == "gradients":
            lives += _gradient(life, passes, gpus)
        else:
            lives.append(replace(life, bytes=-(-life.bytes // gpus), term=term))
    for each in passes:
        lives += [Life(whole[unit], start, unit or "root", phase, False, None, "weights", end, (), "all-gather")
                  for unit, start, end, phase in each.gathered() if whole.get(unit) and end > start]
    return lives


class Pass:
    """One forward and backward pass: when each unit runs. Ticks of the ledger's clock."""

    def __init__(self, forward: tuple[int, int], backward: tuple[int, int]) -> None:
        self.forward, self.backward = forward, backward
        self.runs: dict[str, tuple[int, int]] = {}                # unit → its forward
        self.backs: dict[str, int] = {}                           # unit → the start of its backward

    def ends(self) -> dict[str, int]:
        """unit → the end of its backward: where the next one's begins."""
        order = sorted(self.backs, key=self.backs.__getitem__)
        starts = [self.backs[unit] for unit in order] + [self.backward[1]]
        return dict(zip(order, starts[1:]))

    def gathered(self) -> Iterable[tuple[str, float, float, str]]:
        """(unit, from, to, phase) of each whole copy of a unit's parameters."""
        yield "", self.forward[0], self.backward[1], "forward"
        before = None
        for unit, (start, end) in self.runs.items():
            yield unit, before if before is not None else start, end, "forward"
            before = start
        ends, order = self.ends(), sorted(self.backs, key=self.backs.__getitem__)
        for number, unit in enumerate(order):
            yield unit, self.backs[order[number - 1]] if number else self.backward[0], ends[unit], "backward"


def _passes(ledger: Ledger) -> Iterable[Pass]:
    marks = ledger.marks
    for number, mark in enumerate(marks):
        if mark.phase != "backward":
            continue
        end = marks[number + 1].tick if number + 1 < len(marks) else ledger.clock
        each = Pass((marks[number - 1].tick, mark.tick), (mark.tick, end))
        for tick, name, came in ledger.visits:
            if unit_of(name) != name or not name:
                continue
            if each.forward[0] <= tick <= each.forward[1]:
                each.runs[name] = (tick, tick) if came else (each.runs[name][0], tick)
            elif came and each.backward[0] <= tick < end:                         # run again: checkpointing
                each.backs.setdefault(name, tick)
        for life in ledger.lives:
            unit = unit_of(life.where)
            if unit in each.runs and each.forward[0] < life.born <= each.forward[1] and mark.tick < life.died < end \
                    and Ledger.term_of(life) == "activations":
                each.backs[unit] = min(each.backs.get(unit, FOREVER), life.died)
        yield each


def _gradient(life: Life, passes: list[Pass], gpus: int) -> list[Life]:
    """Whole until the layer before it is through, then a shard until the step after it."""
    unit = unit_of(life.where)
    for each in passes:
        if each.backward[0] <= life.born <= each.backward[1]:
            ends = each.ends()
            order = sorted(each.backs, key=each.backs.__getitem__)
            at = order.index(unit) + 1 if unit in each.backs else len(order)
            shared = min(life.died, ends[order[at]] if at < len(order) else each.backward[1])
            part = replace(life, bytes=-(-life.bytes // gpus), term="gradients", born=shared)
            return [replace(life, died=shared), part] if shared < life.died else [life]
    return [replace(life, bytes=-(-life.bytes // gpus))]
