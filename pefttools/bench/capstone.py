"""Chapter 11's table on a real GPU, as a T4 would run it: Llama-3.2-1B's configuration, random weights, 14.56 GiB.

    python -m pefttools.bench.capstone --to docs/capstone_gpu.md           every method, each in a process of its own
    python -m pefttools.bench.capstone --method qlora --steps 20           one of them: a line of JSON

    plan (capstone_plan, for a T4) ──► model from its configuration ──► quantize, attach ──► lab.train in float16
                                                 memory capped, flash attention off ──► torch's counters ──► the table

Memory and speed do not depend on what the weights are, so random ones will do; loss and forgetting do, and are not here.
What a T4 has and another GPU is made to have: float16, the memory-efficient and the math kernel of attention, the room.
What is not imitated: its speed, its CUDA context, cuBLAS's workspace (larger from compute capability 9.0 on). So the
page names the device, and tokens/s are that device's. Without a GPU it says so and ends with exit code 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pefttools.lab.capstone import LARGE, METHODS, MiB, job_for, predictor, room_of
from pefttools.lab.capstone_plan import plan_it
from pefttools.lab.colab import Place

MODEL = "llama-3.2-1b"
OUT_OF_MEMORY = 3


def t4() -> Place:
    """The card that is planned for."""
    from pefttools.vram.gpus import GPUS

    return Place(True, "T4", GPUS["t4"].capability, GPUS["t4"].usable)


def planned() -> dict[str, Any]:
    """What fits on a T4, method by method."""
    return plan_it(METHODS, LARGE.examples, room_of(t4(), 0), predictor(MODEL, LARGE.max_length, LARGE, t4()))


def rows_like(count: int, vocabulary: int, longest: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random ids in rows of 60 to `longest` tokens, the first as long as can be; a third of each is prompt."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        n = longest if number == 0 else draw.randint(min(60, longest), longest)
        ids = [draw.randrange(3, vocabulary) for _ in range(n)]
        rows.append({"input_ids": ids, "labels": [-100] * (n // 3) + ids[n // 3:]})
    return rows


@contextlib.contextmanager
def like_a_t4(device: str) -> Iterator[None]:
    """No flash attention, no cuDNN attention, no more memory than a T4 has; as it was, afterwards."""
    import torch

    if device != "cuda":
        yield
        return
    kernels = torch.backends.cuda
    before = kernels.flash_sdp_enabled(), kernels.cudnn_sdp_enabled()
    kernels.enable_flash_sdp(False)
    kernels.enable_cudnn_sdp(False)
    torch.cuda.set_per_process_memory_fraction(fraction(torch.cuda.mem_get_info()[1]))
    try:
        yield
    finally:
        kernels.enable_flash_sdp(before[0])
        kernels.enable_cudnn_sdp(before[1])
        torch.cuda.set_per_process_memory_fraction(1.0)


def fraction(total: int) -> float:
    """The share of a GPU's memory that a T4 has for torch: its own less a CUDA context; at most all of it."""
    return min(1.0, room_of(t4(), 0) / total)


def run_one(method: str, choice: dict[str, Any], steps: int, device: str = "cuda", model: Any = MODEL,
            scale: Any = LARGE) -> dict[str, Any]:
    """Train one method as planned: peak of allocated and reserved bytes, tokens/s. `model`: a preset or a
    configuration."""
    import torch

    from pefttools.lab.training import train
    from pefttools.vram.measured_grid import build

    job = job_for(model, method, choice["batch"], choice["checkpointing"], scale.max_length, scale, t4())
    if device != "cuda":
        job = job.but(dtype="float32")
    with like_a_t4(device):
        built = build(job, device)
        vocabulary = built.get_input_embeddings().weight.shape[0]
        rows = rows_like(steps * scale.examples, vocabulary, scale.max_length)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        precision = "float16" if device == "cuda" else "auto"
        history = train(built, rows, SimpleNamespace(pad_token_id=0), steps=steps, lr=1e-5, batch_size=choice["batch"],
                        grad_accum=choice["accumulate"], max_length=scale.max_length, progress=False,
                        precision=precision)
        peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device == "cuda" else (0, 0)
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    return {"method": method, **choice, "steps": steps, "trainable": trained, "measured": peak[0], "reserved": peak[1], "tokens_per_second": history.read / history.seconds,
            "seconds": history.seconds, "minutes for the first run": history.seconds / steps * scale.first / 60}


def page(rows: list[dict[str, Any]], device: str) -> str:
    """The table as Markdown; every figure from the rows."""
    lines = ["# Chapter 11's table on a GPU", "",
             "Made by `python -m pefttools.bench.capstone --to docs/capstone_gpu.md`: Llama-3.2-1B's configuration with random weights,",
             f"float16, memory capped at what a T4 leaves to torch, attention without flash kernels. Rows of 60 to {LARGE.max_length} tokens,",
             f"{LARGE.examples} in a step. Planned before by the formula, for a T4; measured by torch's counters.", "",
             f"Device: **{device}**. Memory is that of a T4 up to cuBLAS's workspace; tokens/s are this device's.", "",
             "| method | trainable | rows × passes | checkpointing | planned MiB | measured MiB | difference | reserved MiB | tokens/s |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['method']} | | | | | {row['missing']} | | | |")
            continue
        lines.append(f"| {row['method']} | {row['trainable']:,} | {row['batch']} × {row['accumulate']} | "
                     f"{'yes' if row['checkpointing'] else 'no'} | {row['bytes'] / MiB:,.0f} | {row['measured'] / MiB:,.0f} | "
                     f"{row['bytes'] / row['measured'] - 1:+.1%} | {row['reserved'] / MiB:,.0f} | {row['tokens_per_second']:,.0f} |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pefttools.bench.capstone", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/capstone_gpu.md"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--method", choices=METHODS, help="this one only, here; prints a line of JSON")
    args = parser.parse_args(argv)
    from pefttools.vram.measurement import gpu_missing

    if missing := gpu_missing():
        print(missing)
        return 0
    import torch

    plan = planned()
    if args.method:
        if plan[args.method] is None:
            print(json.dumps({"method": args.method, "missing": "does not fit, by the plan"}))
            return 0
        try:
            print(json.dumps(run_one(args.method, plan[args.method], args.steps)))
        except torch.cuda.OutOfMemoryError:
            return OUT_OF_MEMORY
        return 0
    rows = []
    for method in METHODS:
        command = [sys.executable, "-m", "pefttools.bench.capstone", "--method", method, "--steps", str(args.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == OUT_OF_MEMORY:
            rows.append({"method": method, "missing": "out of memory"})
        elif done.returncode:
            raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
        else:
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    args.to.write_text(page(rows, torch.cuda.get_device_name()), encoding="utf-8")
    args.to.with_suffix(".json").write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
