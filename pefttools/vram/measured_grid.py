"""Measure a grid of fine-tuning steps on a GPU, and compare the simulator with what was measured.

    python -m pefttools.vram.measurement --grid --to measured.csv      each row in its own process; goes on where it was
    python -m pefttools.vram.measurement --validate measured.csv       simulator against each row: no GPU needed

    Llama-3.2-1B and 3B × full, LoRA, QLoRA, DoRA, bottleneck, prefix × batch 1, 4 × 512, 2048 tokens × checkpointing ×
    attention (eager at 512 tokens only, whose matrices of T × T at 2048 fit nowhere)           = 144 rows

Weights are random: memory does not depend on their values. Each row is three optimizer steps of a new process (a used
allocator would answer otherwise); the third is the steady one, whose peak the simulator predicts. A row that ran out of
memory is recorded as "oom" and not tried again; one that failed otherwise is. Unrun where it was written: no GPU.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from pefttools.vram.job import Job
from pefttools.vram.measurement import NoGPU, gpu_missing, measure, read_table

METHODS = ("full", "lora", "qlora", "dora", "bottleneck", "prefix")
STEPS = 3


def grid(models: tuple[str, ...] = ("llama-3.2-1b", "llama-3.2-3b"), dtype: str = "bfloat16") -> Iterator[Job]:
    """The jobs, the small ones first."""
    for model, seq, batch, method, checkpointing, attention in product(
        models, (512, 2048), (1, 4), METHODS, (False, True), ("sdpa", "eager")
    ):
        if attention == "eager" and seq > 512:
            continue
        yield Job(model, method, batch, seq, checkpointing=checkpointing, attention=attention, dtype=dtype)


def key_of(job: dict[str, Any]) -> str:
    """A job as text, for finding it again; which GPU it was planned for does not matter."""
    return json.dumps({**job, "gpu": None}, sort_keys=True)


def done(rows: list[dict[str, Any]], device: str) -> set[str]:
    """The jobs that this device has answered: measured, or found too large."""
    return {
        key_of(row["job"]) for row in rows if row["job"] and row["device"] == device and row["outcome"] in ("ok", "oom")
    }


def run_row(job: Job, table: Path, device: str = "cuda") -> int:
    """Build the model of `job`, take STEPS steps under `measure`; 0 measured, 3 out of memory."""
    import torch

    try:
        with measure("grid", job, table) as m:
            with m.phase("build"):
                model = build(job, device)
            optimizer = optimizer_of(job, model)
            for n in range(STEPS):
                with m.phase(f"step {n + 1}"):
                    step(model, optimizer, job, device)
    except torch.cuda.OutOfMemoryError:
        return 3
    return 0


def build(job: Job, device: str) -> Any:
    """The model of the job with random weights on the device, quantized and with its adapter, in train mode."""
    import torch
    from transformers import AutoModelForCausalLM

    from pefttools.vram.presets import config_of
    from pefttools.vram.skeleton import attach_ours, attach_peft, enable_checkpointing, peft_config

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(job.model), dtype=getattr(torch, job.dtype),
                                                 attn_implementation="eager" if job.attention == "eager" else "sdpa")
    if job.quantization:
        from pefttools.qlora import quantize_model

        quantize_model(model, double_quant=job.quantization == "nf4-dq", progress=False)
    if job.checkpointing:
        enable_checkpointing(model)
    if job.method != "full":
        model = attach_peft(model, peft_config(job), job) if job.library == "peft" else attach_ours(model, job)
    return model.train()


def optimizer_of(job: Job, model: Any) -> Any:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    if job.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=1e-4, foreach=True)
    if job.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=1e-4, foreach=True)
    if "adamw" in job.optimizer:
        from pefttools.adamw import adamw

        return adamw(
            model, 1e-4, bits=8 if job.optimizer.endswith("8bit") else 32, paged=job.optimizer.startswith("paged")
        )
    from transformers.optimization import Adafactor

    return Adafactor(trained, lr=1e-4, relative_step=False, scale_parameter=False)


def step(model: Any, optimizer: Any, job: Job, device: str) -> None:
    """As vram/step.py runs it without data: zero_grad, `accumulate` passes with transformers' loss, clip, step."""
    import torch

    optimizer.zero_grad(set_to_none=True)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for _ in range(job.accumulate):
        ids = torch.randint(vocabulary, (job.batch, job.seq), device=device)
        inputs = {"input_ids": ids, "labels": ids.clone()}
        if job.padded:
            inputs["attention_mask"] = torch.ones_like(ids)
            inputs["attention_mask"][0, -1] = 0
        loss = model(**inputs, use_cache=False, num_items_in_batch=ids.numel()).loss
        (loss / job.accumulate if job.accumulate > 1 else loss).backward()
    if job.clip:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0, foreach=True)
    optimizer.step()


# ------------------------------------------------------------------------------------------------ against the simulator

def steady(row: dict[str, Any]) -> tuple[int, int]:
    """(allocated, reserved) at the peak of the last step."""
    steps = [p for p in row["phases"] if p["phase"].startswith("step")]
    return (
        (steps[-1]["peak_allocated"], steps[-1]["peak_reserved"])
        if steps
        else (row["peak_allocated"], row["peak_reserved"])
    )


def validate(table: Path) -> list[dict[str, Any]]:
    """The simulator's figures for every measured row: errors as shares of what was measured."""
    from pefttools.vram.gpus import find_gpu
    from pefttools.vram.plan_text import job_from
    from pefttools.vram.simulator import simulate

    found = []
    for row in read_table(table):
        if row["job"] is None or row["outcome"] not in ("ok", "oom"):
            continue
        try:
            gpu = find_gpu(row["device"]).name
        except ValueError:
            gpu = None
        memory = simulate(job_from({**row["job"], "gpu": gpu}))
        entry = {
            "job": memory.job,
            "device": row["device"],
            "outcome": row["outcome"],
            "simulated": (memory.total, memory.reserved),
        }
        if row["outcome"] == "ok":
            measured = steady(row)
            entry |= {
                "measured": measured,
                "errors": tuple(s / m - 1 for s, m in zip(entry["simulated"], measured, strict=True)),
            }
        else:
            entry["agrees"] = memory.device > row["total_memory"] - row["outside"]
        found.append(entry)
    return found


def table_of(entries: list[dict[str, Any]]) -> str:
    """The comparison as Markdown, with its summary."""
    from pefttools.vram.plan_text import name_of, short
    from pefttools.vram.units import gib

    lines = [
        "| device | model | configuration | measured | simulated | error, allocated | error, reserved |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        head = f"| {e['device']} | {name_of(e['job'].model)} | {short(e['job'])}"
        if e["outcome"] == "oom":
            lines.append(
                f"{head} | out of memory | {gib(e['simulated'][1], 2)} | "
                f"{'agrees' if e['agrees'] else 'should have fitted'} | |"
            )
        else:
            lines.append(
                f"{head} | {gib(e['measured'][0], 2)} | {gib(e['simulated'][0], 2)} | "
                f"{100 * e['errors'][0]:+.1f} % | {100 * e['errors'][1]:+.1f} % |"
            )
    for k, what in enumerate(("allocated", "reserved")):
        errors = sorted(abs(e["errors"][k]) for e in entries if e["outcome"] == "ok")
        if errors:
            p95 = errors[min(len(errors) - 1, round(0.95 * len(errors)))]
            lines += [
                "",
                f"{what}: {len(errors)} rows, median error {100 * median(errors):.1f} %, "
                f"95 % within {100 * p95:.1f} %, "
                f"worst {100 * errors[-1]:.1f} %",
            ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pefttools.vram.measurement", description="Measure on a GPU; compare with the simulator."
    )
    parser.add_argument("--grid", action="store_true", help="measure the grid on this machine's GPU")
    parser.add_argument(
        "--to", type=Path, default=Path("measured.csv"), help="the table to append to (default: %(default)s)"
    )
    parser.add_argument(
        "--row", metavar="JSON", help="measure one job, given as its fields (what --grid starts for each row)"
    )
    parser.add_argument("--validate", type=Path, metavar="TABLE", help="the simulator against the rows of a table")
    parser.add_argument("--models", default="llama-3.2-1b,llama-3.2-3b", help="of the grid (default: %(default)s)")
    args = parser.parse_args(argv)
    from pefttools.vram.plan_text import job_from

    try:
        if args.validate:
            if not args.validate.is_file():
                raise ValueError(f"--validate {args.validate}: there is no such table.")
            print(table_of(validate(args.validate)))
            return 0
        if args.row:
            return run_row(job_from(json.loads(args.row)), args.to)
        if args.grid:
            return run_grid(tuple(args.models.split(",")), args.to)
    except NoGPU as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"measurement: {error}", file=sys.stderr)
        return 2
    parser.print_help()
    return 2


def run_grid(models: tuple[str, ...], table: Path) -> int:
    """Every job of the grid that this GPU has not answered yet, each in its own process."""
    if sentence := gpu_missing():
        raise NoGPU(sentence)
    import torch
    from tqdm.auto import tqdm

    from pefttools.vram.plan_text import job_dict, short

    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    jobs = list(grid(models, "bfloat16" if bf16 else "float16"))
    known = done(read_table(table), torch.cuda.get_device_name())
    failed = []
    for job in tqdm([job for job in jobs if key_of(job_dict(job)) not in known], desc="grid", unit="row"):
        command = [
            sys.executable,
            "-m",
            "pefttools.vram.measurement",
            "--to",
            str(table),
            "--row",
            json.dumps(job_dict(job)),
        ]
        if subprocess.run(command, check=False).returncode not in (0, 3):
            failed.append(short(job))
    print(
        f"{table}: {len(jobs)} rows in the grid, {len(failed)} failed{': ' + '; '.join(failed[:5]) if failed else ''}"
    )
    return 1 if failed else 0
