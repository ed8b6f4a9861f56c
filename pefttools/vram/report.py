"""Memory as a table with a bar for each term, whether it fits, and the same as plain data for JSON.

    weights      ████████████████████████                 5.3 GiB   38 %
    constants    ▎                                        0.1 GiB    1 %
    activations  █████████████▊                           3.1 GiB   22 %
    …
    on the device  13.9 GiB = 13.2 reserved + 0.7 CUDA context      ✓ T4 has 14.6 GiB usable: 0.7 GiB to spare

Bars share one scale: the larger of what is needed and what the GPU has. Colour repeats what bar and word say, and
only a terminal gets it; where a terminal cannot show blocks, bars are made of #.
"""
from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from pefttools.vram.memory import TERMS, Memory
from pefttools.vram.plan_text import job_dict, name_of, short
from pefttools.vram.units import GiB, gib
from pefttools.vram.verdict import Budget, Verdict

EIGHTHS = " ▏▎▍▌▋▊▉█"
# Okabe and Ito's colours that are told apart by the colour-blind, as the nearest of the terminal's 256
COLOURS = {"weights": 25, "constants": 32, "adapter": 36, "gradients": 178, "optimizer": 172, "activations": 166,
           "logits": 175, "temporary": 244}


def bar(part: float, whole: float, width: int, blocks: bool = True) -> str:
    """`width` columns for `whole`: the share of `part`, to an eighth of a column (of # to a whole one)."""
    eighths = round(8 * width * max(0.0, min(1.0, part / whole))) if whole else 0
    if not blocks:
        return "#" * round(eighths / 8)
    if part > 0 and whole:
        eighths = max(1, eighths)                              # what is there is seen
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")


def shows_blocks(stream: TextIO | None) -> bool:
    try:
        EIGHTHS.encode(getattr(stream, "encoding", None) or "utf-8")
        return True
    except (UnicodeEncodeError, LookupError):
        return False


def shows_colour(stream: TextIO | None) -> bool:
    """A terminal, unless NO_COLOR is set (no-color.org) or it is a dumb one."""
    return bool(stream and stream.isatty()) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def to_text(memory: Memory, gpu: Any = None, *, stream: TextIO | None = None, width: int = 40,
            verdict: Verdict | None = None) -> str:
    """The table. `gpu`: a name, an amount or a Budget to compare with; `stream`: where it will be printed."""
    blocks, colour = shows_blocks(stream), shows_colour(stream)
    budget = None if gpu is None else Budget.of(gpu)
    whole = max(memory.device, budget.usable if budget else 0)
    job = memory.job
    by = {"formula": "by the formula", "simulator": "by the simulator"}.get(memory.by, f"by {memory.by}")
    lines = [
        f"{name_of(job.model)} · {short(job)} · {by}",
        f"{memory.trainable:,} of {memory.parameters:,} parameters are trained; the peak is at {memory.peak_at}",
        "",
    ]
    rows = [(name, memory.terms.get(name, 0)) for name in TERMS]
    rows += [("rounding", memory.reserved - memory.total), ("context", memory.context)]
    for name, size in rows:
        drawn = bar(size, whole, width, blocks)
        if colour and name in COLOURS:
            drawn = f"\x1b[38;5;{COLOURS[name]}m{drawn}\x1b[0m" + " " * (width - len(drawn))
        lines.append(f"  {name:12} {drawn:{width}} {size / GiB:8.2f} GiB {100 * size / memory.device:4.0f} %".rstrip())
    lines += ["", f"  allocated {gib(memory.total, 2)}, reserved {gib(memory.reserved, 2)}, with CUDA's context "
                  f"{gib(memory.device, 2)} on the device"]
    if budget:
        lines += ["", *("  " + line for line in fit_lines(memory, budget, verdict, blocks))]
    lines += [f"  Note: {note}" for note in memory.notes]
    return "\n".join(lines)


def fit_lines(memory: Memory, budget: Budget, verdict: Verdict | None, blocks: bool = True) -> list[str]:
    """Whether it fits: one line, and one more where the formula alone could not tell."""
    room = budget.usable - memory.device
    mark = ("✓ " if room >= 0 else "✗ ") if blocks else ""
    share = f" ({100 * memory.device / budget.usable:.0f} % used)" if room >= 0 else ""
    lines = [f"{mark}{'fits' if room >= 0 else 'does not fit'} on {budget.name}: {gib(budget.usable, 2)} usable, "
             f"{gib(abs(room), 2)} {'to spare' if room >= 0 else 'too much'}{share}"]
    if verdict is not None and verdict.by == "formula" and verdict.fits is None:
        lines.append(
            f"near the edge: the simulator may say {gib(verdict.low, 2)} to {gib(verdict.high, 2)}; --simulate decides"
        )
    return lines


def to_dict(
    memory: Memory, gpu: Any = None, *, timeline: bool = False, verdict: Verdict | None = None
) -> dict[str, Any]:
    """Plain data for JSON; bytes are whole numbers. `timeline`: with the simulator's moments."""
    found: dict[str, Any] = {
        "job": job_dict(memory.job), "by": memory.by, "terms": dict(memory.terms), "allocated_bytes": memory.total,
        "reserved_bytes": memory.reserved, "context_bytes": memory.context, "device_bytes": memory.device,
        "peak_at": memory.peak_at, "trainable": memory.trainable, "parameters": memory.parameters,
        "holders": dict(memory.holders), "notes": list(memory.notes)}
    if timeline:
        found["timeline"] = [{"phase": m.phase, "where": m.where, "terms": dict(m.terms)} for m in memory.timeline]
    if gpu is not None:
        budget = Budget.of(gpu)
        found["gpu"] = {"name": budget.name, "usable_bytes": budget.usable, "room_bytes": budget.usable - memory.device,
                        "fits": memory.device <= budget.usable if verdict is None else verdict.fits,
                        "decided_by": memory.by if verdict is None else verdict.by}
    return found


def show(memory: Memory, gpu: Any = None, stream: TextIO | None = None) -> None:
    """Print the table where it suits: bars and colours as the stream can show them."""
    stream = stream or sys.stdout
    print(to_text(memory, gpu, stream=stream), file=stream)
