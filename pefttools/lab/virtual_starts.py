"""What the start of virtual tokens does, on the bundled model: prompt and prefix tuning from several starts, and gates.

    python -m pefttools.lab.virtual_starts [--to pefttools/lab/virtual_starts.json] [--only prompt …]

Two stages for each way to start. The learning rate is chosen with a seed and held-out rows of its own (CHOOSE), then
three other seeds are trained at it and measured on other held-out rows. A seed draws the start and the order of the
data. Every run is kept in the JSON file as it ends, so that a stopped script goes on where it was. Chapter 07 shows
`table()` and `gates()` and trains two of the rows again, in small.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".json")
TEXT = "Write the Python function that is asked for, and nothing else. Begin with ```python\ndef"
LENGTH, STEPS, BATCH, CHOOSE, SEEDS = 20, 60, 8, 100, (0, 1, 2)
RATES = {"prompt": (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0), "prefix": (3e-2, 1e-1, 3e-1, 1.0, 3.0), "prefix-mlp": (3e-3, 1e-2, 3e-2),
         "p-tuning": (3e-4, 1e-3, 3e-3, 1e-2), "gate": (1e-2, 3e-2, 1e-1, 3e-1)}
# name: (family, start); RATES has the learning rates of a family
WAYS = {
    "prompt, random": ("prompt", "random"), "prompt, words": ("prompt", "vocab"), "prompt, text": ("prompt", "text"),
    "prefix, random": ("prefix", "random"), "prefix, zero": ("prefix", "zero"), "prefix, text": ("prefix", "text"),
    "prefix through an MLP": ("prefix-mlp", "random"), "P-tuning (MLP)": ("p-tuning", "random"),
    "gate from 0": ("gate", "zero"), "gate from 1": ("gate", "one"), "no gate": ("gate", "none"),
}


def configuration(family: str, start: str, tokenizer, length: int = LENGTH):
    """The configuration that `attach` takes for a family and a start."""
    from pefttools.llama_adapter import LlamaAdapterConfig
    from pefttools.prefix import PrefixTuningConfig
    from pefttools.prompt import PromptTuningConfig
    from pefttools.ptuning import PTuningConfig

    text = {"text": TEXT, "tokenizer": tokenizer} if start == "text" else {}
    if family == "prompt":
        return PromptTuningConfig(length, init=start, **text)
    if family == "prefix":
        return PrefixTuningConfig(length, init=start, **text)
    if family == "prefix-mlp":
        return PrefixTuningConfig(length, projection=True)
    return PTuningConfig(length) if family == "p-tuning" else LlamaAdapterConfig(length // 2, layers=6)


def set_gates(model, start: str) -> None:
    """A gate's start: "zero" (the method's), "one", or "none", where it stays at one and is not trained."""
    from pefttools.inject import adapter_parameters

    for name, parameter in adapter_parameters(model).items():
        if "gate" in name and start != "zero":
            parameter.data.fill_(1.0)
            parameter.requires_grad_(start == "one")


def run(base, rows, held_out, name: str, lr: float, seed: int, steps: int = STEPS, batch: int = BATCH) -> dict:
    """Attach, train, measure, detach: {"start", "end": held-out loss before and after, "curve": training loss}."""
    from pefttools.inject import attach, detach
    from pefttools.lab import held_out_loss, train

    family, start = WAYS[name]
    attach(base.model, configuration(family, start, base.tokenizer), seed=seed)
    try:
        if family == "gate":
            set_gates(base.model, start)
        before = held_out_loss(base.model, base.tokenizer, held_out)
        try:
            history = train(base.model, rows, base.tokenizer, steps=steps, lr=lr, batch_size=batch, seed=seed,
                            progress=False)
        except FloatingPointError:               # the loss is not a number any more: this rate is too high
            return {"start": round(before, 4), "end": None, "curve": []}
        return {"start": round(before, 4), "end": round(held_out_loss(base.model, base.tokenizer, held_out), 4),
                "curve": [round(value, 3) for value in history.loss]}
    finally:
        detach(base.model)


# ------------------------------------------------------------------------------------------------ what was measured

def results(path: Path = RESULTS) -> dict:
    """{name: {learning rate: {seed: run}}}, as it lies in the file."""
    return json.loads(path.read_text()) if path.exists() else {}


def best_rate(runs: dict) -> str:
    """The learning rate that the choosing seed found best."""
    ended = {lr: seeds[str(CHOOSE)]["end"] for lr, seeds in runs.items() if seeds.get(str(CHOOSE), {}).get("end")}
    return min(ended, key=ended.get)


def table(found: dict | None = None) -> list[dict]:
    """One row per way: lr, seeds, and mean and standard deviation over the seeds of the loss before and after."""
    rows = []
    for name, runs in (results() if found is None else found).items():
        lr = best_rate(runs)
        done = [run for seed, run in runs[lr].items() if int(seed) in SEEDS and run["end"] is not None]
        if len(done) > 1:
            start, end = [run["start"] for run in done], [run["end"] for run in done]
            rows.append({"name": name, "lr": float(lr), "seeds": len(done), "start": statistics.mean(start),
                         "end": statistics.mean(end), "sd": statistics.stdev(end), "ends": end})
    return rows


def curves(name: str, found: dict | None = None) -> list[list[float]]:
    """The training loss of every step, one list for each seed, at the chosen learning rate."""
    runs = (results() if found is None else found)[name]
    return [run["curve"] for seed, run in runs[best_rate(runs)].items() if int(seed) in SEEDS and run["curve"]]


def main(argv: list[str] | None = None) -> None:
    from pefttools.lab import encoded, load_base, load_data

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=list(WAYS), help="ways whose names begin so")
    args = parser.parse_args(argv)
    base = load_base("tiny", quiet=True)
    rows = encoded(load_data("train"), base.tokenizer)
    shuffled = load_data("held_out").shuffle(seed=0)
    report, choose = shuffled.select(range(96)), shuffled.select(range(192, 256))
    found = results(args.to)

    def once(name: str, lr: str, seed: int) -> None:
        seeds = found.setdefault(name, {}).setdefault(lr, {})
        if str(seed) not in seeds:
            seeds[str(seed)] = run(base, rows, choose if seed == CHOOSE else report, name, float(lr), seed)
            if seed == CHOOSE:
                seeds[str(seed)]["curve"] = []
            args.to.write_text(json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n")
            print(name, lr, seed, seeds[str(seed)]["start"], seeds[str(seed)]["end"], flush=True)

    names = [name for name in WAYS if any(name.startswith(start) for start in args.only)]
    for name in names:
        for lr in RATES[WAYS[name][0]]:
            once(name, f"{lr:g}", CHOOSE)
    for seed in SEEDS:
        for name in names:
            once(name, best_rate(found[name]), seed)


if __name__ == "__main__":
    main()
