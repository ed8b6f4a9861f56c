"""The flags of `pefttools vram`: every field of a Job, and what can be asked of it; and back to the fields.

    --batch 4 --checkpointing --no-clip --options scale=4   ──►   {"batch": 4, "checkpointing": True, "clip": False, …}
"""
from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from pefttools.vram.job import ATTENTION, DTYPES, LIBRARIES, METHODS, OPTIMIZERS, QUANTIZATIONS, Job

CHOICES = {"method": METHODS, "dtype": DTYPES, "adapter_dtype": DTYPES, "optimizer": OPTIMIZERS, "attention": ATTENTION,
           "library": LIBRARIES}
HELP = {
    "method": "what is trained",
    "batch": "rows of one pass on one GPU (with --plan: of one optimizer step)",
    "seq": "tokens in a row, padding included",
    "r": "rank of LoRA and DoRA",
    "targets": "modules, such as q_proj,v_proj or all-linear",
    "length": "virtual tokens of prompts and prefixes",
    "width": "of a bottleneck adapter",
    "options": "a further field of the method's configuration, NAME=VALUE; repeatable",
    "quantization": "of the frozen base: none, nf4 or nf4-dq (default: what the method says)",
    "dtype": "of the base",
    "adapter_dtype": "of what is trained",
    "optimizer": "",
    "accumulate": "passes added up to one optimizer step",
    "attention": "sdpa: what torch would choose",
    "gpus": "more than 1: sharded by FSDP",
    "clip": "no clipping of gradients",
    "checkpointing": "run each layer again in the backward pass",
    "padded": "rows of several lengths: a mask is passed",
    "master": "full: weights in float32, computed in --dtype (autocast)",
    "keep_outputs": "the logits are let go before the backward pass, as Trainer does; many scripts keep them",
    "shapes": "batches trained on before, ROWSxTOKENS, such as 4x100,4x512",
    "library": "whose layers",
    "gpu": "such as t4, a100-80 (--list gpus), or an amount such as 24GiB",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of a Job as a flag, and what can be asked of it."""
    parser.add_argument("model", nargs="?", help="a preset (--list models), or a folder or file with a config.json")
    job = parser.add_argument_group("the training step")
    for field in fields(Job):
        if field.name == "model":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        text = HELP.get(field.name, "")
        if field.default is True:
            job.add_argument(f"--no-{flag[2:]}", dest=field.name, action="store_false", default=None, help=text)
        elif field.default is False:
            job.add_argument(flag, action="store_true", default=None, help=text)
        elif field.name == "options":
            job.add_argument(flag, action="append", metavar="NAME=VALUE", help=text)
        elif isinstance(field.default, int):
            job.add_argument(flag, type=int, metavar="N", help=f"{text} (default: {field.default})")
        else:
            known = CHOICES.get(field.name)
            what = f"{text + ': ' if text else ''}{', '.join(known)}" if known else text
            said = (
                f" (default: {field.default})" if isinstance(field.default, str) and field.default != "method" else ""
            )
            job.add_argument(flag, metavar=field.name.upper(), help=what + said)
    ask = parser.add_argument_group("what is asked")
    ask.add_argument(
        "--simulate", action="store_true", help="run the real step without data (seconds) instead of the formula"
    )
    ask.add_argument("--formula", action="store_true", help="the formula only, also near the edge of the GPU")
    ask.add_argument("--plan", action="store_true", help="search: what fits on --gpu, in order, and why the rest loses")
    ask.add_argument("--largest", metavar="WHAT", help="the largest batch, seq, r, length or model that fits on --gpu")
    ask.add_argument("--multiple", type=int, default=1, metavar="N", help="with --largest: only multiples of N")
    ask.add_argument("--tasks", type=int, default=1, metavar="N", help="with --plan: fine-tunes of this base to serve")
    ask.add_argument(
        "--methods",
        metavar="A,B",
        help="with --plan: the methods to choose from (default: --method, or the common ones)",
    )
    ask.add_argument(
        "--objective", default="exact", help="with --plan: exact, cost, serving or memory (default: %(default)s)"
    )
    ask.add_argument(
        "--lengths", type=Path, metavar="FILE", help="with --plan: token counts of the data, separated by white space"
    )
    ask.add_argument("--json", action="store_true", help="print JSON")
    ask.add_argument(
        "--list", nargs="?", const="all", metavar="WHAT", help="list models, gpus or methods (default: all)"
    )


def job_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given, without the model and the GPU."""
    given = {f.name: getattr(args, f.name) for f in fields(Job) if f.name not in ("model", "gpu")
             and getattr(args, f.name, None) is not None}
    if "targets" in given and "," in given["targets"]:
        given["targets"] = tuple(part.strip() for part in given["targets"].split(",") if part.strip())
    if "quantization" in given and given["quantization"].lower() == "none":
        given["quantization"] = None
    elif "quantization" in given and given["quantization"] not in QUANTIZATIONS:
        from pefttools.vram.job import among

        among("quantization", given["quantization"], [str(q or "none") for q in QUANTIZATIONS])
    if "shapes" in given:
        pairs = [part.lower().split("x") for part in given["shapes"].split(",")]
        if not all(len(pair) == 2 and all(word.strip().isdigit() for word in pair) for pair in pairs):
            raise ValueError(f"--shapes {given['shapes']!r}: ROWSxTOKENS is needed, such as --shapes 4x100,4x512.")
        given["shapes"] = tuple((int(rows), int(tokens)) for rows, tokens in pairs)
    if "options" in given:
        given["options"] = dict(option(text) for text in given["options"])
    return given


def option(text: str) -> tuple[str, Any]:
    """"placement=houlsby" → ("placement", "houlsby"); numbers, true, false, null and lists as JSON writes them."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--options {text!r}: NAME=VALUE is needed, such as --options placement=houlsby.")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value
