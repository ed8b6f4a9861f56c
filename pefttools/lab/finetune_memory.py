"""Will the fine-tune fit on the GPU that is here? Asked before anything is loaded, and answered with what would.

    lengths of the rows ──► worst batch ──► formula; near the edge the simulator ──► fits, or the nearest that does

Without a GPU there is nothing to plan for, and it says so. What is planned is transformers' loss, which keeps a little
more than `lab.train`'s own.
"""
from __future__ import annotations

import argparse
from typing import Any

from pefttools.vram.job import Job


class WrongQuestion(ValueError):
    """Something that was asked for does not exist: nothing was tried."""


def memory_allows(args: argparse.Namespace, job: Job, lengths: list[int]) -> bool:
    """Plan the worst batch on the GPU and print it. True where it fits, or where there is no GPU to fit into."""
    from pefttools.vram.lengths import lengths_of, worst_batch
    from pefttools.vram.reasons import advice, too_much
    from pefttools.vram.units import gib
    from pefttools.vram.verdict import Judge

    budget = budget_here(args.gpu)
    print(f"Data: {lengths_of(lengths)}.")
    if budget is None:
        print(
            "Memory: this machine has no GPU, and the plan is of GPU memory: it does not apply here. "
            "(--gpu t4 --plan-only "
            "asks for a GPU elsewhere.)"
        )
        return True
    job = worst_batch(job.but(gpu=budget.gpu, dtype="bfloat16" if budget.bf16 else "float16"), lengths)
    judge = Judge(budget)
    try:
        verdict = judge(job)
    except ValueError as error:
        if "not known here" in str(error):                     # a model of the hub whose shapes no preset has
            print(f"Memory: not planned, for the shapes of {job.model!r} are not known before it is loaded.")
            return True
        raise WrongQuestion(str(error)) from None
    who = "simulated" if verdict.by == "simulator" else f"by the formula: {gib(verdict.low)} to {gib(verdict.high)}"
    if verdict.fits:
        print(
            f"Memory: the worst batch, {job.batch} × {job.seq} tokens, needs {gib(verdict.needs)} ({who}); "
            f"{budget.name} has "
            f"{gib(budget.usable)}."
        )
        return True
    print(
        f"Memory: the worst batch {too_much(verdict, budget)} ({who}).\n{advice(verdict, judge)}"
        + ("\nGoing on, as --anyway says." if args.anyway else "\nNothing was loaded. --anyway goes on all the same.")
    )
    return False


def budget_here(gpu: str | None) -> Any:
    """The budget of `--gpu`, or of the GPU that is here: all the memory that its driver reports, as if it were ours alone."""
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


def dtype_here(model: str) -> Any:
    """float32 on a CPU; on a GPU bfloat16 where it has it, else float16, as the plan assumed."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
