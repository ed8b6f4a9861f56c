"""Memory ran out all the same: what happened, as a sentence, and what the planner knows that needs less.

A plan is of one step of one process that has the GPU to itself; others may hold some of it. So what did not fit counts
as the limit, and configurations are named that take at most nine tenths, and six tenths, of its tensors.
"""
from __future__ import annotations

from pefttools.lab.finetune_config import Settings
from pefttools.lab.finetune_memory import budget_here, worst
from pefttools.vram.job import Job

SHARES = (0.9, 0.6)
CPU = 1 << 60  # bytes: a budget that refuses nothing


class OutOfMemory(RuntimeError):
    """Memory ran out while it ran, with what would need less."""


def ran_out(error: BaseException) -> bool:
    """Whether this is memory that ran out: torch's own error on a GPU, its allocator's or Python's on a CPU."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error)
    signs = ("DefaultCPUAllocator", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)


def what_would_need_less(settings: Settings, job: Job, lengths: list[int], kept: str) -> OutOfMemory:
    """The planner's nearest configurations that need less than the one that did not fit, as an error to raise."""
    from pefttools.vram.reasons import in_steps, nearest
    from pefttools.vram.units import gib
    from pefttools.vram.verdict import Budget, Judge

    budget = budget_here(settings.gpu) or Budget("this machine", CPU)
    short = worst(settings, job, lengths, budget)
    if settings.gpu is None and budget.usable == CPU:          # a CPU computes in float32 unless asked otherwise
        short = short.but(dtype="float32" if settings.precision == "auto" else settings.precision, master=False)
    said = [f"memory ran out with {short.batch} × {short.seq} tokens a pass ({short.method})."]
    try:
        judge = Judge(budget)
        verdict = judge.by_formula(short)
        verdict = verdict if verdict.memory else judge.by_simulator(short)
        context = verdict.memory.context
        for share in SHARES:                                   # of the bytes of this configuration
            limit = context + int(share * (verdict.high - context))
            found = nearest(short, Judge(Budget(budget.name, limit, budget.gpu, budget.bf16)), exact=False)
            if found is None:
                continue
            words = " and ".join(in_steps(short, found.job))
            line = f"{words[0].upper()}{words[1:]}: {gib(found.memory.total, 2)} by the planner, where this is " \
                   f"{gib(verdict.memory.total, 2)}."
            if line not in said:
                said.append(line)
    except ValueError:
        said.append(f"The planner does not know {short.model!r}; half the batch (--batch {max(1, settings.batch // 2)} "
                    f"--accumulate {settings.accumulate * 2}) or --checkpointing need less.")
    if budget.usable == CPU:
        said.append("(The planner's figures are of a GPU; what helps is the same on a CPU.)")
    return OutOfMemory("\n".join([*said, kept]))
