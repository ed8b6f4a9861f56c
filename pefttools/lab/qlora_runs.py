"""Full fine-tuning, LoRA and QLoRA at equal steps on the bundled model, several seeds; and four ways to ship an adapter.

    python -m pefttools.lab.qlora_runs [--to pefttools/lab/qlora_runs.json] [--seeds 0 1 2]

Every way trains on the same rows in the same order for one seed; a seed draws the adapter's start and the order. Learning
rates are not swept: 4e-3 for both LoRA and QLoRA (LoRA's best of a few short trials on this data), 1e-3 for full
fine-tuning (customary). A QLoRA run is then shipped in four ways (`SHIPPED`) and measured in each. Every run is kept in
the JSON file as it ends, so that a stopped script goes on where it was. Chapter 05 shows `table()` and `shipped()` and
trains the three ways again, in small.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".json")
RATES = {"full": 1e-3, "LoRA": 4e-3, "QLoRA": 4e-3}
STEPS, BATCH, R, ALPHA, LOSS_ROWS, ANSWERS, SEEDS = 300, 8, 16, 32, 192, 150, (0, 1, 2)
SHIPPED = ("kept apart", "into dequantized 16 bits", "into the original 16 bits", "into 4 bits again")


def prepared(base, way: str, seed: int):
    """A copy of the bundled model made ready for a way: all trains, or LoRA on every linear layer, on 4 bits for QLoRA."""
    from pefttools.inject import attach
    from pefttools.lora import LoRAConfig
    from pefttools.qlora import quantize_model

    model = copy.deepcopy(base)
    if way == "full":
        return model.requires_grad_(True)
    if way == "QLoRA":
        quantize_model(model)
    return attach(model, LoRAConfig(r=R, alpha=ALPHA, target_modules="all-linear"), seed=seed)


def ship(trained, original, way: str):
    """A copy of a trained QLoRA model without adapters (or as it is), in one of the ways of `SHIPPED`; bfloat16 is rounded to.

    Matrices that are said to be in 16 bits hold bfloat16's values in float32, so that every way computes alike.
    """
    import torch
    from torch import nn

    from pefttools.inject import adapter_layers
    from pefttools.qlora import NF4Linear

    model = copy.deepcopy(trained)
    if way == "kept apart":
        return model
    for name, layer in list(adapter_layers(model)):
        frozen = layer.base_layer
        start = original.get_submodule(name).weight.detach() if way == "into the original 16 bits" \
            else frozen.dequantize(torch.float32)
        plain = nn.Linear(frozen.in_features, frozen.out_features, bias=False, device="meta")
        weight = start + layer.delta()
        weight = weight if way == "into 4 bits again" else weight.bfloat16().float()
        plain.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(name, NF4Linear(plain) if way == "into 4 bits again" else plain)
    return model.eval()


def logits_of(model, tokenizer, rows):
    """[targets, vocabulary]: the logits that predict the answers' tokens."""
    import torch

    from pefttools.lab import collate, encoded

    batch = collate(encoded(rows, tokenizer), tokenizer.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != -100].float()


def measure(model, tokenizer, held_out, loss_rows: int = LOSS_ROWS, answers: int = ANSWERS) -> dict:
    from pefttools.lab import evaluate, held_out_loss

    found = {"loss": round(held_out_loss(model, tokenizer, held_out.shuffle(seed=0).select(range(loss_rows))), 4)}
    return found | {"pass": evaluate(model, tokenizer, held_out, n=answers).pass_at_1}


# ------------------------------------------------------------------------------------------------ what was measured

def results(path: Path = RESULTS) -> dict:
    """{seed: {way: run}}, as it lies in the file."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(found: dict | None = None) -> dict[str, dict[str, list[float]]]:
    """way → {"loss", "pass": one number per seed}."""
    found = results() if found is None else found
    return {way: {key: [runs[way][key] for runs in found.values() if way in runs] for key in ("loss", "pass")} for way in RATES}


def shipped(found: dict | None = None) -> dict[str, dict[str, list[float]]]:
    """way to ship → {"loss", "pass", "logits": one number per seed}; "logits": relative distance from kept apart."""
    found = results() if found is None else found
    runs = [seed["QLoRA"]["shipped"] for seed in found.values() if "QLoRA" in seed]
    return {way: {key: [run[way][key] for run in runs] for key in ("loss", "pass", "logits")} for way in SHIPPED}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main(argv: list[str] | None = None) -> None:
    from pefttools.lab import encoded, load_base, load_data, train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    args = parser.parse_args(argv)
    base = load_base("tiny", quiet=True)
    rows, held_out = encoded(load_data("train"), base.tokenizer), load_data("held_out")
    few = held_out.shuffle(seed=3).select(range(32))
    found = results(args.to)
    for seed in args.seeds:
        for way, lr in RATES.items():
            runs = found.setdefault(str(seed), {})
            if way in runs:
                continue
            model = prepared(base.model, way, seed)
            history = train(model, rows, base.tokenizer, steps=STEPS, lr=lr, batch_size=BATCH, seed=seed, progress=False)
            run = {"curve": [round(v, 3) for v in history.smooth()[::10]]}
            if way == "QLoRA":
                apart, run["shipped"] = logits_of(model, base.tokenizer, few), {}
                for how in SHIPPED:
                    other = ship(model, base.model, how)
                    distance = (logits_of(other, base.tokenizer, few) - apart).norm() / apart.norm()
                    run["shipped"][how] = measure(other, base.tokenizer, held_out) | {"logits": round(distance.item(), 5)}
                run |= {key: run["shipped"]["kept apart"][key] for key in ("loss", "pass")}
            else:
                run |= measure(model, base.tokenizer, held_out)
            runs[way] = run
            args.to.write_text(json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n")
            print(seed, way, {k: v for k, v in run.items() if k != "curve"}, flush=True)


if __name__ == "__main__":
    main()
