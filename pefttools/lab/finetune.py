"""`pefttools finetune`: a fine-tune as one command, its memory planned before anything is loaded.

    pefttools finetune tiny --method lora --steps 200 --out my_adapter
    pefttools finetune llama-3.2-1b --data mine.csv --method qlora --batch 4 --accumulate 4 --out my_adapter
    pefttools finetune --config my_adapter/run.yaml --out again
    accelerate launch --multi_gpu -m pefttools finetune --config run.yaml

The same from Python: `run_method` (finetune_run.py). Every step is a call that the chapters explain; nothing is
computed here. Exit codes: 0 done, 1 it was tried and failed or would not fit, 2 the question was wrong, 130 stopped.
"""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pefttools.lab.finetune_config import Settings, WrongQuestion, add_arguments, from_arguments
from pefttools.lab.finetune_memory import DoesNotFit, Peak
from pefttools.lab.finetune_oom import OutOfMemory
from pefttools.lab.finetune_run import Result, run_method

__all__ = ["DoesNotFit", "OutOfMemory", "Peak", "Result", "Settings", "WrongQuestion", "add_arguments", "run",
           "run_method"]


def run(args: argparse.Namespace) -> int:
    """The command: exit code. PEFTTOOLS_TRACEBACK=1 shows where an error came from."""
    from pefttools.lab.finetune_run import run as finetune

    settings = None
    try:
        settings = from_arguments(args)
        if settings.out is None and not settings.plan_only:
            raise WrongQuestion("--out FOLDER is missing: where the adapter and the checkpoint go.")
        finetune(settings)
        if "torch" in sys.modules:
            from pefttools.lab.training_engine import leave

            leave()
        return 0
    except DoesNotFit as error:
        if os.environ.get("RANK", "0") == "0":                 # each process of several finds the same
            print(error)
        return 1
    except (ValueError, TypeError, OSError, OutOfMemory, FloatingPointError) as error:
        if os.environ.get("PEFTTOOLS_TRACEBACK"):
            raise
        print(f"pefttools finetune: {error}", file=sys.stderr)
        return 2 if isinstance(error, WrongQuestion) else 1
    except KeyboardInterrupt:
        if settings and settings.out and (Path(settings.out) / "checkpoint.pt").exists():
            print(f"\nStopped. The same command goes on from the last checkpoint in {settings.out}.", file=sys.stderr)
        return 130
