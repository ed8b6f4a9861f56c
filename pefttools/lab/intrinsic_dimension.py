"""Measure the intrinsic dimension of the bundled task: train in random subspaces of growing dimension, several seeds.

    python -m pefttools.lab.intrinsic_dimension [--to FILE] [--processes 2] [--only 1000 10000]

Every run trains for the same steps on the same number of rows; a seed draws P and the order of the rows, so a spread
over seeds holds both. Results go into the JSON file that chapter 01 reads, after each run: a stopped script goes on
where it was. `d` = 0 stands for training all parameters. The learning rate of a subspace is FACTOR · FULL_LR · √(D/d):
the step on d that moves each parameter FACTOR times as far as full fine-tuning's step does (see pefttools.intrinsic).
`--tune` tries factors instead of taking FACTOR, on training rows that nobody trains on, and keeps them as "tuned".
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
STEPS, BATCH, ROWS = 80, 8, 192            # optimizer steps, rows in each, held-out rows that the loss is taken over
FULL_LR, FACTOR = 1e-3, 10.0
DIMENSIONS = (0, 300, 1_000, 3_000, 10_000, 30_000, 50_000, 100_000)
SEEDS = (0, 1, 2)
LORA_LR = 1e-2                              # customary here, not tuned
LORA = {"LoRA r=1 on q, v": {"r": 1, "alpha": 2, "target_modules": ["q_proj", "v_proj"]},
        "LoRA r=1 everywhere": {"r": 1, "alpha": 2, "target_modules": "all-linear"}}


def learning_rate(d: int, D: int, factor: float | None = None) -> float:
    """The peak learning rate for a subspace of d of D dimensions; d = 0 is full fine-tuning, whose factor is 1."""
    if not d:
        return FULL_LR * (factor or 1)
    return FULL_LR * (factor or FACTOR) * (D / d) ** 0.5


@functools.cache
def rows_and_start(tuning: bool) -> tuple[list, list, float]:
    """(rows to train on, rows to take the loss over, the untouched model's loss there), made once in a process."""
    from pefttools.lab import encoded, held_out_loss, load_base, load_data

    model, tokenizer = load_base("tiny", quiet=True)
    rows = load_data("train").shuffle(seed=0)
    judged = rows.select(range(ROWS)) if tuning else load_data("held_out").shuffle(seed=0).select(range(ROWS))
    rows, judged = encoded(rows.select(range(ROWS, len(rows))), tokenizer), encoded(judged, tokenizer)
    return rows, judged, held_out_loss(model, tokenizer, judged)


def one(d: int, seed: int, steps: int = STEPS, factor: float | None = None, lora: str = "") -> dict[str, Any]:
    """Train once; the loss before and after on held-out rows, or with a `factor` to try, on rows kept out of training.

    lora: a name of LORA trains that instead; d is then what the result counts.
    """
    import torch

    from pefttools.inject import attach, count_parameters
    from pefttools.intrinsic import IntrinsicConfig, movable
    from pefttools.lab import held_out_loss, load_base, train
    from pefttools.lora import LoRAConfig

    torch.set_num_threads(1)
    model, tokenizer = load_base("tiny", quiet=True)
    D = sum(p.numel() for p in movable(model).values())
    rows, judged, before = rows_and_start(factor is not None)
    lr = learning_rate(d, D, factor)
    if lora:
        attach(model, LoRAConfig(**LORA[lora]), seed=seed)
        d, lr = count_parameters(model)[0], LORA_LR
    elif d:
        attach(model, IntrinsicConfig(d=d, seed=seed))
    train(model, rows, tokenizer, steps=steps, lr=lr, batch_size=BATCH, seed=seed, progress=False)
    found = {"d": d, "seed": seed, "lr": lr, "before": before, "loss": held_out_loss(model, tokenizer, judged), "D": D}
    return found | ({"name": lora} if lora else {})


def read(file: str | Path = FILE) -> dict[str, Any]:
    """The kept results: steps, batch, rows, D, before (the untouched model's loss), runs [{d, seed, lr, loss}, …],
    tuned [{d, factor, loss}, …].

    A run of LoRA has its name as well, and its number of trainable parameters as d.
    """
    return json.loads(Path(file).read_text())


def keep(file: Path, runs: list[dict[str, Any]], tuned: list[dict[str, Any]] = ()) -> None:
    runs = sorted(runs, key=lambda r: (r.get("name", ""), r["d"], r["seed"]))
    head = {"steps": STEPS, "batch": BATCH, "rows": ROWS, "factor": FACTOR, "full_lr": FULL_LR, "D": runs[0]["D"],
            "before": round(runs[0]["before"], 5)}
    kept = [{"d": r["d"], "seed": r["seed"], "lr": float(f"{r['lr']:.4g}"), "loss": round(r["loss"], 5)}
            | ({"name": r["name"]} if "name" in r else {}) for r in runs]
    text = json.dumps(head)[:-1] + "".join(f', "{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in (
        ("tuned", tuned), ("runs", kept))) + "}\n"
    part = file.with_suffix(".part")
    part.write_text(text)
    os.replace(part, file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=FILE)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", type=int, help="these dimensions only")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--join", nargs="*", type=Path, default=[], help="first take in the runs kept in these files")
    parser.add_argument("--tune", nargs="*", type=float, help="factors to try")
    parser.add_argument("--steps", type=int, help="with --tune: fewer steps")
    args = parser.parse_args(argv)
    chosen = DIMENSIONS if args.only is None else args.only
    runs: list[dict[str, Any]] = []
    tuned: list[dict[str, Any]] = []
    for file in [args.to, *args.join]:
        if file.exists():
            kept = read(file)
            tuned += kept["tuned"]
            runs += [r | {"D": kept["D"], "before": kept["before"]} for r in kept["runs"]]
    runs = list({(r.get("name", r["d"]), r["seed"]): r for r in runs}.values())
    if args.join:
        keep(args.to, runs, tuned)
    done = {(r.get("name", r["d"]), r["seed"]) for r in runs}
    if args.tune:
        jobs = [(d, 0, args.steps or STEPS, factor) for d in chosen for factor in args.tune]
    else:  # a seed at a time: what there is after a stop is a whole picture
        jobs = [(d, seed) for seed in args.seeds for d in chosen if (d, seed) not in done]
        jobs += [(0, seed, STEPS, None, name) for seed in args.seeds for name in LORA if (name, seed) not in done and not args.only]
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(one, *job): job for job in jobs}
        for future in as_completed(waiting):
            result = future.result()
            print(waiting[future], result, flush=True)
            if args.tune:
                tuned.append({"d": result["d"], "factor": waiting[future][3], "loss": round(result["loss"], 5)})
            else:
                runs.append(result)
            if runs:
                keep(args.to, runs, sorted(tuned, key=lambda t: (t["d"], t["factor"])))


if __name__ == "__main__":
    main()
