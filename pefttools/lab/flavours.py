"""LoRA's relatives on the bundled model, with error bars: learning rates, ranks, batch sizes, layers, dropout.

    python -m pefttools.lab.flavours [--to pefttools/lab/flavours.json] [--only rate rank …]

Every run trains a fresh copy for a hundred steps and measures the held-out loss on two sets of rows: one to choose by
(which learning rate is best), one to report. A seed draws the start and the order of the data; there are three for
everything, and five for each method at its best rate. Every run is kept in the JSON file as it ends, so that a stopped
script goes on where it was. About forty minutes of one core. Chapter 08 shows the results and trains some of the runs
again, in small.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".json")
SEEDS, MORE_SEEDS = (0, 1, 2), (3, 4)      # methods are compared at their best rates: there, two more
STEPS, BATCH, R, ALPHA, RATIO = 100, 4, 8, 16, 16.0
METHODS = ("full", "LoRA", "LoRA+", "DoRA")
# each method has its best inside its own five
LOW, HIGH = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RATES = {"full": LOW, "LoRA": HIGH, "LoRA+": LOW, "DoRA": HIGH}
RANKS, RANK_RATE = (4, 16, 64), 1e-3
BATCHES, BATCH_ROWS, BATCH_RATES = (2, 32), 384, {"full": (3e-4, 1e-3, 3e-3), "LoRA": (3e-3, 1e-2, 3e-2)}
PLACES, PLACE_RATE = {"all 6 layers": None, "top 2": (4, 5), "middle 2": (2, 3), "bottom 2": (0, 1)}, 3e-3
DROPOUTS, DROPOUT_ROWS, DROPOUT_STEPS, DROPOUT_RATE = (0.0, 0.5), 16, 100, 1e-2


def put_on(model, method: str, seed: int, r: int = R, alpha: float = ALPHA, layers=None, dropout: float = 0.0,
           rslora: bool = False) -> None:
    """Attach the method; "full" makes every parameter train instead."""
    from pefttools.dora import DoRAConfig
    from pefttools.inject import attach
    from pefttools.lora import LoRAConfig

    if method == "full":
        model.requires_grad_(True)
        return
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    attach(model, (DoRAConfig if method == "DoRA" else LoRAConfig)(
        r=r, alpha=alpha, dropout=dropout, rslora=rslora, target_modules=names, layers_to_transform=layers), seed=seed)


def fit(model, rows, tokenizer, method: str, lr: float, seed: int, steps: int, batch: int) -> list[float]:
    """AdamW as in lab.train, and for LoRA+ with B's rate RATIO times as high. Returns the loss of every step."""
    import torch

    from pefttools.lab.text import IGNORE, batches, collate
    from pefttools.lab.training import loss_sum, schedule

    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fast = [p for name, p in named.items() if method == "LoRA+" and "lora_B" in name]
    slow = [p for p in named.values() if not any(p is q for q in fast)]
    groups = [{"params": slow, "lr": lr, "factor": 1.0}, {"params": fast, "lr": lr, "factor": RATIO}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    torch.manual_seed(seed)                                                      # dropout
    losses, warmup = [], math.ceil(0.05 * steps)
    model.train()
    for step, plan in enumerate(batches(rows, batch, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"] * schedule(step + 1 if step < warmup else step, steps, warmup)
        some = collate([rows[i] for i in plan], tokenizer.pad_token_id)
        loss = loss_sum(model, some) / int((some["labels"][:, 1:] != IGNORE).sum())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def run(base, rows, choose, report, method: str, lr: float, seed: int, steps: int = STEPS, batch: int = BATCH,
        **options) -> dict:
    """Attach, train, measure, take off again: {"choose", "end": held-out losses; "train": loss of the last steps}."""
    from pefttools.inject import detach
    from pefttools.lab.evaluation import held_out_loss

    model, tokenizer = base
    before = {name: t.clone() for name, t in model.state_dict().items()} if method == "full" else None
    trained = [(p, p.requires_grad) for p in model.parameters()]
    put_on(model, method, seed, **options)
    try:
        losses = fit(model, rows, tokenizer, method, lr, seed, steps, batch)
        found = {"choose": held_out_loss(model, tokenizer, choose) if choose is not None else None,
                 "end": held_out_loss(model, tokenizer, report), "train": statistics.mean(losses[-5:])}
        return {key: value if value is None else round(value, 4) for key, value in found.items()}
    except FloatingPointError:
        return {"choose": None, "end": None, "train": None}
    finally:
        model.eval()
        if before is None:
            detach(model)
        else:
            model.load_state_dict(before)
        for p, was in trained:
            p.requires_grad_(was)


def plan() -> list[tuple[str, str, str, dict]]:
    """Everything that is run: (experiment, row, column, the arguments of `run`), seeds apart."""
    todo = [("rate", method, f"{lr:g}", {"method": method, "lr": lr}) for method in METHODS for lr in RATES[method]]
    for r in RANKS:                       # the two scales agree at r = 8
        todo.append(("rank", "α/r", str(r), {"method": "LoRA", "lr": RANK_RATE, "r": r, "alpha": float(ALPHA)}))
        todo.append(("rank", "α/√r", str(r), {"method": "LoRA", "lr": RANK_RATE, "r": r, "rslora": True,
                                              "alpha": ALPHA / math.sqrt(R)}))
    for name, layers in PLACES.items():   # two layers with three times the rank: as many parameters
        todo.append(("layers", name, "", {"method": "LoRA", "lr": PLACE_RATE, "layers": layers,
                                          "r": R * (1 if layers is None else 3), "alpha": ALPHA
                                          * (1 if layers is None else 3)}))
    for size in BATCHES:
        for method, rates in BATCH_RATES.items():
            todo += [("batch", f"{method}, {size}", f"{lr:g}", {"method": method, "lr": lr, "batch": size,
                                                                "steps": BATCH_ROWS // size}) for lr in rates]
    for p in DROPOUTS:
        todo.append(("dropout", f"{p:g}", "", {"method": "LoRA", "lr": DROPOUT_RATE, "dropout": p,
                                               "steps": DROPOUT_STEPS}))
    return todo


# ------------------------------------------------------------------------------------------------ what was measured

def results(path: Path = RESULTS) -> dict:
    """{experiment: {row: {column: {seed: run}}}}, as it lies in the file."""
    return json.loads(path.read_text()) if path.exists() else {}


def summary(runs: dict, key: str = "end", seeds: tuple[int, ...] = SEEDS + MORE_SEEDS) -> dict | None:
    """{"mean", "sd", "ends"} over those of the seeds that one cell has; None where one of them ended in NaN."""
    ends = [run[key] for seed, run in runs.items() if int(seed) in seeds]
    if any(end is None for end in ends):
        return None
    return {"mean": statistics.mean(ends), "sd": statistics.stdev(ends) if len(ends) > 1 else 0.0, "ends": ends}


def best(columns: dict) -> tuple[str, dict]:
    """The column (a learning rate) with the lowest mean on the rows to choose by, and its summary on the others.

    SEEDS choose, which all columns have; MORE_SEEDS, which only the chosen one has, are in the summary.
    """
    means = {name: found["mean"] for name, runs in columns.items() if (found := summary(runs, "choose", SEEDS))}
    name = min(means, key=means.get)
    return name, summary(columns[name])


def main(argv: list[str] | None = None) -> None:
    from pefttools.lab import encoded, load_base, load_data

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=["rate", "rank", "layers", "batch", "dropout"])
    args = parser.parse_args(argv)
    base = load_base("tiny", quiet=True)
    rows = encoded(load_data("train"), base.tokenizer)
    shuffled = load_data("held_out").shuffle(seed=0)
    report, choose = (encoded(shuffled.select(some), base.tokenizer) for some in (range(32), range(192, 224)))
    found = results(args.to)
    todo = [entry for name in args.only for entry in plan() if entry[0] == name]

    def once(experiment: str, row: str, column: str, options: dict, seed: int) -> None:
        cell = found.setdefault(experiment, {}).setdefault(row, {}).setdefault(column, {})
        length = options.get("steps", STEPS)
        if cell.get(str(seed), {}).get("steps") != length:
            data = rows if experiment != "dropout" else rows[DROPOUT_ROWS * seed:DROPOUT_ROWS * (seed + 1)]
            cell[str(seed)] = run(base, data, choose, report, seed=seed, **options) | {"steps": length}
            text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).replace("},", "},\n") + "\n"
            part = args.to.with_suffix(".part")
            part.write_text(text)
            part.replace(args.to)
            print(experiment, row, column, seed, cell[str(seed)], flush=True)

    for seed in SEEDS:
        for entry in todo:
            once(*entry, seed)
    for seed in MORE_SEEDS if "rate" in args.only else ():
        for method in METHODS:
            lr = best(found["rate"][method])[0]
            once("rate", method, lr, {"method": method, "lr": float(lr)}, seed)


if __name__ == "__main__":
    main()
