"""Where adapters are put, and what that is worth, on the bundled model; and a hypernetwork that meets a new task.

    python -m pefttools.lab.adapter_places [--to pefttools/lab/adapter_places.json] [--only houlsby …]

Two stages for each way. The learning rate is chosen with a seed and held-out rows of its own (CHOOSE), then three other
seeds are trained at it and measured on other held-out rows. A seed draws the start and the order of the data. The ways
have one width m and one number of steps, so they differ in parameters; `table()` says in how many. Every run is kept in
the JSON file as it ends, so that a stopped script goes on where it was. Chapter 06 shows `table()` and trains two of the
rows again, in small.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".json")
M, STEPS, BATCH, CHOOSE, SEEDS = 16, 40, 8, 100, (0, 1, 2)
RATES = {"bottleneck": (1e-2, 3e-2), "vector": (3e-2, 1e-1), "half": (1e-2,)}   # half: the rate that "houlsby" chose
LOWER, UPPER = (0, 1, 2), (3, 4, 5)          # the bundled model's six layers in two halves
# name: (family, placement, further settings of AdapterConfig); RATES has the learning rates of a family
WAYS: dict[str, tuple[str, str, dict]] = {
    "houlsby": ("bottleneck", "houlsby", {}), "pfeiffer": ("bottleneck", "pfeiffer", {}),
    "parallel": ("bottleneck", "parallel", {}), "bapna": ("bottleneck", "bapna", {}),
    "input and output": ("bottleneck", "input_output", {}), "IA³": ("vector", "ia3", {}),
    "norms alone": ("vector", "norms", {}),
    "houlsby and norms": ("bottleneck", "houlsby", {"train_layer_norms": True}),
    "houlsby, upper half": ("half", "houlsby", {"drop_layers": LOWER}),
    "houlsby, lower half": ("half", "houlsby", {"drop_layers": UPPER}),
}
KNOWN_TASKS, NEW_TASK = ("lists", "strings", "numbers"), "sorting"


def configuration(name: str, m: int = M):
    """The configuration that `attach` takes for a way."""
    from pefttools.ia3 import IA3Config
    from pefttools.ln_tuning import LNTuningConfig
    from pefttools.placements import AdapterConfig

    _, placement, settings = WAYS[name]
    if placement in ("ia3", "norms"):
        return IA3Config() if placement == "ia3" else LNTuningConfig()
    return AdapterConfig(placement, bottleneck=m, **settings)


def run(base, rows, held_out, name: str, lr: float, seed: int, steps: int = STEPS, batch: int = BATCH) -> dict:
    """Attach, train, measure, detach: {"trained": how many numbers, "end": held-out loss, "curve": training loss}."""
    from pefttools.inject import attach, count_parameters, detach
    from pefttools.lab import held_out_loss, train

    attach(base.model, configuration(name), seed=seed)
    try:
        trained = count_parameters(base.model)[0]
        try:
            history = train(base.model, rows, base.tokenizer, steps=steps, lr=lr, batch_size=batch, seed=seed,
                            progress=False)
        except FloatingPointError:               # the loss is not a number any more: this rate is too high
            return {"trained": trained, "end": None, "curve": []}
        return {"trained": trained, "end": round(held_out_loss(base.model, base.tokenizer, held_out), 4),
                "curve": [round(value, 3) for value in history.loss]}
    finally:
        detach(base.model)


# ------------------------------------------------------------------------------------------------ several tasks at once

def of_family(rows, *families: str) -> list:
    """The rows of a data set that are of these families, as a list of dicts."""
    return [row for row in rows if row["family"] in families]


def train_jointly(model, tokenizer, by_task: Mapping[str, Sequence], steps: int, lr: float = 3e-3, batch: int = BATCH,
                  seed: int = 0) -> list[float]:
    """Tasks in turn, one batch each, with one optimizer for all that acts in any of them; the loss of every step.

    `by_task`: adapter name → its encoded rows. For a hypernetwork the tasks train one network together.
    """
    import torch

    from pefttools.inject import adapter_parameters, set_adapter
    from pefttools.lab import batches, collate, loss_sum

    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=lr, weight_decay=0.0)
    each = -(-steps // len(by_task))
    plans = {task: iter(batches(rows, batch, each, seed)) for task, rows in by_task.items()}
    names, losses = list(by_task), []
    model.train()
    for step in range(steps):
        task = names[step % len(names)]
        set_adapter(model, task)
        picked = collate([by_task[task][i] for i in next(plans[task])], tokenizer.pad_token_id)
        loss = loss_sum(model, picked) / (picked["labels"][:, 1:] != -100).sum()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 5) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter_parameters(model).values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def meet_a_new_task(base, train_rows, held_out, seed: int, first: int = 60, then: int = 30) -> dict[str, float]:
    """A hypernetwork learns KNOWN_TASKS; then NEW_TASK, by its embedding alone. Held-out losses of the new task.

    Beside it: the base model; the network with the embedding of a known task; and a plain Houlsby adapter trained from
    the beginning with as many steps and the same rows.
    """
    import torch

    from pefttools.hyper_config import HyperConfig
    from pefttools.inject import attach, detach, set_adapter
    from pefttools.lab import encoded, held_out_loss, train

    model, tokenizer = base.model, base.tokenizer
    test = of_family(held_out, NEW_TASK)
    known = {task: encoded(of_family(train_rows, task), tokenizer) for task in KNOWN_TASKS}
    new = encoded(of_family(train_rows, NEW_TASK), tokenizer)
    found = {"base": held_out_loss(model, tokenizer, test)}
    for number, task in enumerate(KNOWN_TASKS):
        attach(model, HyperConfig(bottleneck=M, e=32, hidden=64), seed=seed + 10 * number, name=task)
    try:
        train_jointly(model, tokenizer, known, first, seed=seed)
        for task in KNOWN_TASKS:
            set_adapter(model, task)
            found[f"as {task}"] = held_out_loss(model, tokenizer, test)
        attach(model, HyperConfig(bottleneck=M, e=32, hidden=64), seed=seed + 99, name=NEW_TASK)
        frame = model.hyper_adapters
        with torch.no_grad():                    # start from the mean of the tasks that it knows
            frame.tasks[NEW_TASK].copy_(torch.stack([frame.tasks[task] for task in KNOWN_TASKS]).mean(0))
        set_adapter(model, NEW_TASK)
        found["mean embedding"] = held_out_loss(model, tokenizer, test)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == f"hyper_adapters.tasks.{NEW_TASK}")
        train(model, new, tokenizer, steps=then, lr=0.1, batch_size=BATCH, seed=seed, progress=False)
        found["embedding trained"] = held_out_loss(model, tokenizer, test)
    finally:
        detach(model)
    attach(model, configuration("houlsby"), seed=seed)
    try:
        train(model, new, tokenizer, steps=then, lr=1e-2, batch_size=BATCH, seed=seed, progress=False)
        found["plain adapter"] = held_out_loss(model, tokenizer, test)
    finally:
        detach(model)
    return {name: round(value, 4) for name, value in found.items()}


# ------------------------------------------------------------------------------------------------ what was measured

def results(path: Path = RESULTS) -> dict:
    """{name: {learning rate: {seed: run}}}, as it lies in the file, and under "hyper" {seed: losses}."""
    return json.loads(path.read_text()) if path.exists() else {}


def best_rate(name: str, runs: dict) -> str:
    """The learning rate that the choosing seed found best, of those that RATES has for this way."""
    allowed = [f"{lr:g}" for lr in RATES[WAYS[name][0]]]
    ended = {lr: runs[lr][str(CHOOSE)]["end"] for lr in allowed if runs.get(lr, {}).get(str(CHOOSE), {}).get("end")}
    return min(ended, key=ended.get)


def table(found: dict | None = None) -> list[dict]:
    """One row per way: lr, seeds, trained, and mean and standard deviation over the seeds of the held-out loss."""
    rows = []
    for name, runs in (results() if found is None else found).items():
        if name not in WAYS:
            continue
        lr = best_rate(name, runs)
        done = [run for seed, run in runs[lr].items() if int(seed) in SEEDS and run["end"] is not None]
        if len(done) > 1:
            ends = [run["end"] for run in done]
            rows.append({"name": name, "lr": float(lr), "seeds": len(done), "trained": done[0]["trained"],
                         "end": statistics.mean(ends), "sd": statistics.stdev(ends), "ends": ends})
    return rows


def new_task(found: dict | None = None) -> dict[str, tuple[float, float]]:
    """What `meet_a_new_task` found: {name: (mean, standard deviation over seeds)}."""
    runs = list((results() if found is None else found).get("hyper", {}).values())
    return {name: (statistics.mean(r[name] for r in runs), statistics.stdev(r[name] for r in runs)) for name in runs[0]}


def main(argv: list[str] | None = None) -> None:
    from pefttools.lab import encoded, load_base, load_data

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=[*WAYS, "hyper"], help="ways whose names begin so")
    args = parser.parse_args(argv)
    base = load_base("tiny", quiet=True)
    data, shuffled = load_data("train"), load_data("held_out").shuffle(seed=0)
    rows = encoded(data, base.tokenizer)
    report, choose = shuffled.select(range(96)), shuffled.select(range(192, 256))
    found = results(args.to)

    def keep() -> None:
        args.to.write_text(json.dumps(found, separators=(",", ":"), ensure_ascii=False).replace('},"', '},\n"') + "\n")

    def once(name: str, lr: str, seed: int) -> None:
        seeds = found.setdefault(name, {}).setdefault(lr, {})
        if str(seed) not in seeds:
            seeds[str(seed)] = run(base, rows, choose if seed == CHOOSE else report, name, float(lr), seed)
            seeds[str(seed)]["curve"] = []
            keep()
            print(name, lr, seed, seeds[str(seed)]["end"], flush=True)

    names = [name for name in WAYS if any(name.startswith(start) for start in args.only)]
    for name in names:
        for lr in RATES[WAYS[name][0]]:
            once(name, f"{lr:g}", CHOOSE)
    for seed in SEEDS:
        for name in names:
            once(name, best_rate(name, found[name]), seed)
    for seed in SEEDS if any("hyper".startswith(start) for start in args.only) else ():
        if str(seed) not in found.setdefault("hyper", {}):
            found["hyper"][str(seed)] = meet_a_new_task(base, list(data), list(shuffled), seed)
            keep()
            print("hyper", seed, found["hyper"][str(seed)], flush=True)


if __name__ == "__main__":
    main()
