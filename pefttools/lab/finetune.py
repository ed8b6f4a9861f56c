"""`pefttools finetune`: a fine-tune as one command, its memory planned before anything is loaded.

    pefttools finetune tiny --method lora --steps 200 --out my_adapter
    pefttools finetune llama-3.2-1b --data mine.jsonl --method qlora --batch 4 --accumulate 4 --out my_adapter

    rows ──► lengths ──► plan on this GPU ──► load_base ──► quantize, attach ──► lab.train ──► save_adapter
                              └ does not fit: says what would, and stops (--anyway goes on)

Every step is a call that the chapters explain; nothing is computed here. Exit codes: 0 done, 1 it was tried and
failed or would not fit, 2 the question was wrong.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from pefttools.lab.finetune_memory import WrongQuestion, dtype_here, memory_allows
from pefttools.vram.job import METHODS, Job, among

FIELDS = ("instruction", "input", "output")
SPLITS = ("train", "held_out", "new_kinds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="tiny, llama-3.2-1b, a hub id or a folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="for the adapter (peft's files) and the checkpoint"
    )
    parser.add_argument(
        "--data",
        default="train",
        metavar="SPLIT|FILE",
        help=f"a split of the course's data ({', '.join(SPLITS)}), or a JSON Lines file whose rows have "
        f"{', '.join(FIELDS)} (default: %(default)s)",
    )
    parser.add_argument("--method", default="lora", help=f"{', '.join(METHODS)} (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--lr",
        type=float,
        help="peak learning rate (default: 1e-5 for full and 2e-4 for adapters; on tiny 1e-3 and 1e-2)",
    )
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="rows of one pass (default: %(default)s)")
    parser.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="passes added up to one step (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=512,
        metavar="N",
        help="longer rows lose the beginning of their prompt (default: %(default)s)",
    )
    parser.add_argument("--r", type=int, default=16, metavar="N", help="rank of LoRA and DoRA (default: %(default)s)")
    parser.add_argument("--alpha", type=float, help="LoRA's alpha (default: the rank)")
    parser.add_argument("--targets", help="modules, such as q_proj,v_proj or all-linear (default: the method's)")
    parser.add_argument(
        "--length",
        type=int,
        default=20,
        metavar="N",
        help="virtual tokens of prompts and prefixes (default: %(default)s)",
    )
    parser.add_argument(
        "--width", type=int, default=64, metavar="N", help="of a bottleneck adapter (default: %(default)s)"
    )
    parser.add_argument("--checkpointing", action="store_true", help="run each layer again in the backward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-every", type=int, default=50, metavar="N", help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--gpu", help="plan for this GPU instead of the one that is here")
    parser.add_argument("--plan-only", action="store_true", help="say whether it fits, and stop")
    parser.add_argument("--anyway", action="store_true", help="go on where the plan says that it does not fit")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    try:
        return finetune(args)
    except (ValueError, TypeError) as error:
        if os.environ.get("PEFTTOOLS_TRACEBACK"):
            raise
        print(f"pefttools finetune: {error}", file=sys.stderr)
        return 2 if isinstance(error, WrongQuestion) else 1
    except FloatingPointError as error:                        # lab.train's: the loss is no number
        print(f"pefttools finetune: {error}", file=sys.stderr)
        return 1


def finetune(args: argparse.Namespace) -> int:
    job, rows = question(args)
    tokenizer = tokenizer_for(args.model)
    encoded = encode_rows(rows, tokenizer, args.max_length)
    lengths = [len(row["input_ids"]) for row in encoded]
    if not memory_allows(args, job, lengths) and not args.anyway:
        return 1
    if args.plan_only:
        return 0
    from pefttools.lab.base import load_base
    from pefttools.lab.training import train

    base = load_base(args.model, dtype=dtype_here(args.model))
    if len(base.tokenizer) != len(tokenizer):                  # load_base fell back to another model than was asked for
        encoded = encode_rows(rows, base.tokenizer, args.max_length)
    prepare(base.model, job, args)
    history = train(base.model, encoded, base.tokenizer, steps=args.steps, lr=rate(args), batch_size=args.batch,
                    grad_accum=args.accumulate, seed=args.seed, max_length=args.max_length, folder=args.out,
                    save_every=args.save_every, progress=not args.quiet)
    where = save(base, job, args.out)
    first, last = history.smooth()[0], history.smooth()[-1]
    print(f"{args.steps} steps, {history.tokens:,} target tokens, loss {first:.3f} → {last:.3f} (mean of 20 steps), "
          f"{history.seconds:.0f} s. Saved in {where}")
    return 0


# ------------------------------------------------------------------------------------------------ what was asked

def question(args: argparse.Namespace) -> tuple[Job, list[dict[str, Any]]]:
    """The job and the rows; everything that can be found wrong before something is loaded is found here."""
    try:
        among("method", args.method, METHODS)
        for name in ("steps", "batch", "accumulate", "max_length", "save_every"):
            if getattr(args, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(args, name)}: a whole number of at least 1 is needed."
                )
        options = (
            {}
            if args.alpha is None or "lora" not in args.method and "dora" not in args.method
            else {"alpha": args.alpha}
        )
        targets = args.targets and (tuple(args.targets.split(",")) if "," in args.targets else args.targets)
        job = Job(args.model, args.method, args.batch, args.max_length, r=args.r, targets=targets, length=args.length,
                  width=args.width, options=options, accumulate=args.accumulate, checkpointing=args.checkpointing,
                  keep_outputs=False)                          # lab.train's logits are gone once the loss is there
        return job, read_rows(args.data)
    except ValueError as error:
        raise WrongQuestion(str(error)) from None


def read_rows(data: str) -> list[dict[str, Any]]:
    """The rows of a split, or of a JSON Lines file with instruction, input (may be missing) and output."""
    path = Path(data)
    if data in SPLITS and not path.is_file():
        from pefttools.lab.data import load_rows

        return load_rows(data)
    if not path.is_file():
        raise ValueError(f"--data {data}: no such file, and no split; the splits are {', '.join(SPLITS)}.")
    rows = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {n} is no JSON ({error}). One object a line is needed: "
                             f'{{"instruction": "…", "input": "", "output": "…"}}.') from None
        missing = [
            name
            for name in ("instruction", "output")
            if not isinstance(row, dict) or not isinstance(row.get(name), str)
        ]
        if missing:
            raise ValueError(f"{path}, line {n} has no text in {missing[0]!r}; a row needs instruction and output "
                             f"(and may have input).")
        rows.append({name: row.get(name) or "" for name in FIELDS})
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def encode_rows(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    from pefttools.lab.text import encode

    found = []
    for n, row in enumerate(rows, 1):
        try:
            found.append(encode(row, tokenizer, max_length))
        except ValueError as error:
            raise WrongQuestion(f"row {n} of the data: {error} (--max-length)") from None
    return found


def tokenizer_for(model: str) -> Any:
    """The tokenizer alone, for the plan comes before gigabytes are loaded; the bundled one where there is none."""
    from pefttools.lab.base import LLAMA_1B, TINY, hub_fault, tokenizer_of

    if model == "tiny":
        return tokenizer_of(TINY, local_files_only=True)
    offline = not Path(model).is_dir() and bool(hub_fault())
    for name in LLAMA_1B if model.lower() == "llama-3.2-1b" else (model,):
        try:
            return tokenizer_of(name, local_files_only=offline)
        except Exception:                                      # load_base will say what is wrong with it
            continue
    return tokenizer_of(TINY, local_files_only=True)


def rate(args: argparse.Namespace) -> float:
    """The peak learning rate: what the chapters found for the bundled model; elsewhere what is common for each kind."""
    if args.lr is not None:
        return args.lr
    full = args.method == "full"
    return (1e-3 if full else 1e-2) if args.model == "tiny" else (1e-5 if full else 2e-4)


# ------------------------------------------------------------------------------------------------ the model

def prepare(model: Any, job: Job, args: argparse.Namespace) -> None:
    """Quantize, attach, checkpoint: as the job says."""
    if job.quantization:
        from pefttools.qlora import quantize_model

        quantize_model(model, double_quant=job.quantization == "nf4-dq")
    if job.method == "full":
        model.requires_grad_(True)
    else:
        from pefttools.inject import attach
        from pefttools.vram.skeleton import our_config

        attach(model, our_config(job), seed=args.seed)
    if job.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save(base: Any, job: Job, out: Path) -> Path:
    """peft's two files; of a full fine-tune the model and its tokenizer as transformers saves them."""
    if job.method == "full":
        base.model.save_pretrained(out)
        base.tokenizer.save_pretrained(out)
        return out
    from pefttools.checkpoint import save_adapter

    return save_adapter(base.model, out)
