"""`pefttools vram`: the calculator on the command line.

    pefttools vram llama-3.1-8b --method qlora --batch 4 --seq 2048 --gpu t4         a table; exit 1 if it does not fit
    pefttools vram llama-3.1-8b --plan --seq 1024 --gpu t4 --tasks 20                what fits, and why the rest loses
    pefttools vram llama-3.1-8b --method qlora --seq 512 --gpu t4 --largest batch    the edge, both sides simulated
    pefttools vram --list gpus

Exit codes: 0 it fits (or nothing was asked of a GPU), 1 it does not, 2 the question was wrong. The formula answers at
once; near the edge of a GPU the simulator is asked without being told to (`--formula` keeps it out).
"""
from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pefttools.vram.flags import add_arguments, job_fields
from pefttools.vram.job import METHODS, Job

LISTS = ("models", "gpus", "methods")
__all__ = ["add_arguments", "answer", "run"]


def run(args: argparse.Namespace) -> int:
    """The command; a wrong question is a sentence on stderr and 2."""
    try:
        return answer(args)
    except (ValueError, TypeError) as error:
        import os

        if os.environ.get("PEFTTOOLS_TRACEBACK"):
            raise
        print(f"pefttools vram: {error}", file=sys.stderr)
        return 2


def answer(args: argparse.Namespace) -> int:
    if args.list:
        return list_known(args.list, args.json)
    asked = [flag for flag in ("plan", "largest", "simulate", "formula") if getattr(args, flag)]
    if len(asked) > 1 and set(asked) != {"plan", "formula"}:
        raise ValueError(f"--{asked[0]} and --{asked[1]} are two questions: ask one.")
    if (args.plan or args.largest) and args.gpu is None:
        raise ValueError(f"--{asked[0]} needs a GPU: --gpu t4, or --gpu 24GiB (--list gpus names them).")
    if args.model is None and args.largest != "model":
        raise ValueError("which model? Such as: pefttools vram llama-3.2-1b (--list models names the presets).")
    given = job_fields(args)
    if args.plan:
        return run_plan(args, given)
    if args.largest:
        return run_largest(args, given)
    return run_one(args, given)


def run_one(args: argparse.Namespace, given: dict[str, Any]) -> int:
    from pefttools.vram import report
    from pefttools.vram.verdict import Budget, Judge

    budget = None if args.gpu is None else Budget.of(args.gpu)
    if budget and budget.gpu and "dtype" not in given and not budget.bf16:
        given["dtype"] = "float16"                             # of the same size; a T4 only emulates bfloat16
    job = Job(args.model, gpu=budget.gpu if budget else None, **given)
    judge = Judge(budget or 1 << 62, watch=watcher())
    verdict = judge.by_simulator(job) if args.simulate else judge.by_formula(job)
    if budget and verdict.fits is None and not args.formula:
        verdict = judge.by_simulator(job)
    if args.json:
        print(
            json.dumps(
                report.to_dict(verdict.memory, budget, timeline=args.simulate, verdict=verdict if budget else None),
                indent=1,
                ensure_ascii=False,
            )
        )
    else:
        print(report.to_text(verdict.memory, budget, stream=sys.stdout, verdict=verdict))
    if budget and verdict.fits is False:
        from pefttools.vram.reasons import advice, too_much

        if not args.json:
            print(f"\n  It {too_much(verdict, budget)}.\n  {advice(verdict, judge, exact=args.simulate)}")
        return 1
    return 0


def watcher() -> Any:
    """A line on a terminal for each simulation, overwritten by the next; nothing where nobody watches."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a package that nobody needs here
    if not sys.stderr.isatty():
        return None

    def watch(job: Job) -> None:
        from pefttools.vram.plan_text import short

        print(f"\rsimulating {short(job)} …\x1b[K\r", end="", file=sys.stderr, flush=True)

    return watch


def run_plan(args: argparse.Namespace, given: dict[str, Any]) -> int:
    from pefttools.vram.planner import plan
    from pefttools.vram.verdict import Judge

    lengths = None
    if args.lengths:
        words = args.lengths.read_text(encoding="utf-8").split()
        if wrong := [word for word in words if not word.isdigit()]:
            raise ValueError(
                f"{args.lengths} holds {wrong[0]!r}: whole numbers of tokens are needed, one for each row."
            )
        lengths = [int(word) for word in words]
    methods = args.methods.split(",") if args.methods else given.get("method")
    given.pop("method", None)
    chosen = {"effective_batch": given.pop("batch", None), "r": given.pop("r", None), "gpus": given.pop("gpus", None),
              "checkpointing": given.pop("checkpointing", None), "optimizers": given.pop("optimizer", None),
              "attention": given.pop("attention", None), "methods": methods}
    accumulate = given.pop("accumulate", 1)
    if chosen["effective_batch"] is not None:
        chosen["effective_batch"] *= accumulate
    seq = given.pop("seq", None)
    judge = Judge(args.gpu, watch=watcher())
    found = plan(
        args.model,
        args.gpu,
        judge=judge,
        seq=seq or (None if lengths else 512),
        lengths=lengths,
        tasks=args.tasks,
        objective=args.objective,
        **chosen,
        **given,
    )
    print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False) if args.json else found)
    return 0 if found.best else 1


def run_largest(args: argparse.Namespace, given: dict[str, Any]) -> int:
    from pefttools.vram.largest import largest
    from pefttools.vram.verdict import Judge

    judge = Judge(args.gpu, watch=watcher())
    found = largest(args.largest, args.model, args.gpu, judge=judge, multiple=args.multiple, **given)
    print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False) if args.json else found)
    return 0 if found.value is not None else 1


def list_known(what: str, as_json: bool) -> int:
    from pefttools.vram.gpus import GPUS
    from pefttools.vram.job import among
    from pefttools.vram.preset_data import PRESETS
    from pefttools.vram.units import gib

    among("--list", what, (*LISTS, "all"))
    known: dict[str, dict[str, Any]] = {
        "models": {name: count for name, (_, count, *_) in PRESETS.items()},
        "gpus": {name: gpu.usable for name, gpu in GPUS.items()}, "methods": METHODS}
    wanted = LISTS if what == "all" else (what,)
    if as_json:
        print(json.dumps({each: known[each] for each in wanted}, indent=1, ensure_ascii=False))
        return 0
    words = {"models": lambda n: f"{n:,} parameters", "gpus": lambda n: f"{gib(n, 2)} usable", "methods": str}
    for each in wanted:
        print(f"{each}:")
        for name, value in known[each].items():
            print(f"  {name:22} {words[each](value)}")
    return 0
