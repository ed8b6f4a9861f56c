"""Will the fine-tune fit on the GPU that is here? Asked before anything is loaded, and compared with what it took.

    lengths of the rows ──► worst batch ──► formula; near the edge the simulator ──► fits, or the nearest that does
                                                          │
                    what torch counted while it ran ──► planned 4.1 GiB, peak 4.2 GiB

Without a GPU there is nothing to plan for, and it says so: what a process holds on a CPU has Python, torch and the
allocator's own habits in it. What is planned is transformers' loss, which keeps a little more than `lab.train`'s own.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pefttools.lab.finetune_config import Settings, WrongQuestion
from pefttools.vram.job import Job


class DoesNotFit(ValueError):
    """The plan says that there is not enough memory: nothing was loaded."""


@dataclass(frozen=True)
class Planned:
    """What was found before the run: the planner's Memory (None where nothing could be planned), its job, its judge."""

    memory: Any
    job: Job
    judge: Any


def plan_for(settings: Settings, job: Job, lengths: list[int], say: Callable[[str], None]) -> Planned | None:
    """Plan the worst batch on the GPU and say what it needs; None where there is no GPU to fit into.

    Raises DoesNotFit where it does not (unless settings.anyway), WrongQuestion for a GPU that does not exist.
    """
    from pefttools.vram.lengths import lengths_of
    from pefttools.vram.reasons import advice, too_much
    from pefttools.vram.units import gib
    from pefttools.vram.verdict import Judge

    budget = budget_here(settings.gpu)
    say(f"Data: {lengths_of(lengths)}.")
    if budget is None:
        say("Memory: this machine has no GPU, and the plan is of GPU memory: it does not apply here. "
            "(--gpu t4 --plan-only asks for a GPU elsewhere.)")
        return None
    job = worst(settings, job, lengths, budget)
    judge = Judge(budget)
    try:
        verdict = judge(job)
    except ValueError as error:
        if "not known here" in str(error):                     # a model of the hub whose shapes no preset has
            say(f"Memory: not planned, for the shapes of {job.model!r} are not known before it is loaded.")
            return Planned(None, job, judge)
        raise WrongQuestion(str(error)) from None
    who = "simulated" if verdict.by == "simulator" else f"by the formula: {gib(verdict.low)} to {gib(verdict.high)}"
    if verdict.fits:
        say(f"Memory: the worst batch, {job.batch} × {job.seq} tokens, needs {gib(verdict.needs)} ({who}); "
            f"{budget.name} has {gib(budget.usable)}.")
    else:
        said = f"Memory: the worst batch {too_much(verdict, budget)} ({who}).\n{advice(verdict, judge)}"
        if not settings.anyway:
            raise DoesNotFit(f"{said}\nNothing was loaded. --anyway goes on all the same.")
        say(f"{said}\nGoing on, as --anyway says.")
    return Planned(verdict.memory, job, judge)


def worst(settings: Settings, job: Job, lengths: list[int], budget: Any) -> Job:
    """The job of the batch that needs most, in the dtype that it will have on that GPU."""
    from pefttools.vram.lengths import worst_batch

    dtype = settings.precision if settings.precision != "auto" else "bfloat16" if budget.bf16 else "float16"
    full = job.method == "full"
    return worst_batch(job.but(gpu=budget.gpu, dtype=dtype, master=full and dtype != "float32"), lengths)


def budget_here(gpu: str | None) -> Any:
    """The budget of `--gpu`, or of the GPU here: all the memory that its driver reports, as if it were ours alone."""
    from pefttools.vram.verdict import Budget

    if gpu is not None:
        try:
            return Budget.of(gpu)
        except ValueError as error:
            raise WrongQuestion(str(error)) from None
    import torch

    if not torch.cuda.is_available():
        return None
    # not what is free: our own context exists by now, and cannot be told apart from what other processes hold
    total = torch.cuda.mem_get_info()[1]
    name = torch.cuda.get_device_name()
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        known = Budget.of(name).gpu
    except ValueError:
        known = None
    return Budget(name, total, known, bf16)


# ------------------------------------------------------------------------------------------------ what it took

@dataclass(frozen=True)
class Peak:
    """The most memory that was held, in bytes. kind "gpu": torch's counters while it trained, and `loading`: the most
    allocated before, when the model was loaded and quantized; what else the process had on the GPU is in both. kind
    "process": the process's resident memory since it began, which on a CPU is all there is (Python, torch, and whatever
    a notebook did before are in it)."""

    kind: str
    allocated: int = 0
    reserved: int = 0
    loading: int = 0
    resident: int = 0


def count_anew() -> int:
    """Set torch's counters to what is held now; returns the most that was allocated before, 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def peak_now(loading: int = 0) -> Peak:
    import torch

    if torch.cuda.is_available():
        return Peak("gpu", torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), loading, resident())
    return Peak("process", resident=resident())


def resident() -> int:
    """The largest resident size that this process ever had, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:                                        # Windows
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", 0)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def compared(memory: Any, peak: Peak, longest: int | None = None) -> str:
    """planned 4.10 GiB, peak 4.20 GiB (+2.4 %), of tensors; on a CPU what applies. longest: tokens of a row."""
    from pefttools.vram.units import gib, mib

    if peak.kind == "process":
        return (f"the process held at most {mib(peak.resident, 0)} (resident, with Python and torch); no GPU was "
                "planned for")
    if memory is None:
        return f"peak {gib(peak.allocated, 2)} of tensors, {gib(peak.reserved, 2)} reserved; nothing was planned"
    off = 100 * (peak.allocated / memory.total - 1)
    short = f"; the longest row that was trained on had {longest} tokens, planned were {memory.job.seq}" \
        if longest is not None and longest < memory.job.seq else ""
    load = f"; loading took {gib(peak.loading, 2)} before" if peak.loading > peak.allocated else ""
    return (f"planned {gib(memory.total, 2)}, peak {gib(peak.allocated, 2)} ({off:+.1f} %); reserved: planned "
            f"{gib(memory.reserved, 2)}, peak {gib(peak.reserved, 2)}{short}{load}")
