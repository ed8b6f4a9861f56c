"""Finish a pretraining run: half-precision weights, checksums, measurements, and the model card made of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

PROMPTS = ("def fibonacci(n):", "def read_lines(path):\n    \"\"\"Return the lines of a file.\"\"\"",
           "class Stack:\n    def __init__(self):", "for i in range(")


def export(work: Path, to: Path) -> None:
    """Write the checkpoint of `work` as a float16 safetensors model with its tokenizer into `to`, with checksums."""
    from transformers import AutoTokenizer

    from pefttools.lab.pretrain import new_model

    tokenizer = AutoTokenizer.from_pretrained(work)
    model = new_model(tokenizer)
    model.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["model"])
    to.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(to)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / name, to / name)
    config = json.loads((to / "config.json").read_text())
    config.pop("transformers_version", None)  # any version that knows Llama will do
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (to / "model.safetensors").chmod(0o644)  # save_pretrained keeps it to its owner
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    (to / "sha256.json").write_text(json.dumps(
        {f: hashlib.sha256((to / f).read_bytes()).hexdigest() for f in files}, indent=1) + "\n")


def measure(work: Path, model, tokenizer) -> dict:
    """Held-out figures of a model: over all held-out files, and by where they come from."""
    from pefttools.lab.pretrain import bits_per_byte

    texts = json.loads((work / "held_out.json").read_text())
    names = json.loads((work / "corpus.json").read_text())["held_out_files"]
    groups = defaultdict(list)
    for name, text in zip(names, texts):
        groups["standard library" if name.startswith("python/") else "packages"].append(text)
    out, bits, nats, tokens = {}, 0.0, 0.0, 0.0
    for group, members in groups.items():
        bpb, loss = bits_per_byte(model, tokenizer, members)
        size = sum(len(t.encode()) for t in members)
        out[group] = {"files": len(members), "bytes": size, "bits_per_byte": round(bpb, 4), "loss_nats_per_token": round(loss, 4)}
        bits += bpb * size
        nats += bpb * size * math.log(2)
        tokens += bpb * size * math.log(2) / loss
    size = sum(row["bytes"] for row in out.values())
    out = {"all held-out files": {"files": len(texts), "bytes": size, "bits_per_byte": round(bits / size, 4),
                                  "loss_nats_per_token": round(nats / tokens, 4)}, **out}
    return out


def loss_curve(log: list[dict], to: Path) -> None:
    """The curve as a picture: training loss (running mean) and held-out loss against tokens."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 3.5), layout="constrained")
    ax = fig.add_subplot()
    loss = np.array([r["loss"] for r in log])
    window = min(10, len(loss))
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    ax.plot([r["tokens"] / 1e6 for r in log][len(log) - len(smooth):], smooth, color="#0072B2", label="training")
    held = [r for r in log if "held_out_loss" in r]
    ax.plot([r["tokens"] / 1e6 for r in held], [r["held_out_loss"] for r in held], "o--", color="#D55E00", label="held-out files")
    ax.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", ylim=(None, min(6, loss.max())),
           title="Pretraining the bundled model")
    ax.legend(frameon=False)
    fig.savefig(to / "loss.png", dpi=110)


def finish(work: Path, to: Path) -> dict:
    """Export, measure the exported file, and write `training.json`, `loss.png` and the model card `README.md`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pefttools.lab import pretrain
    from pefttools.lab.generation import generate

    export(work, to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    model = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    log = sorted({r["step"]: r for r in log}.values(), key=lambda r: r["step"])  # a resumed run logs some steps twice
    held = measure(work, model, tokenizer)
    corpus = json.loads((work / "corpus.json").read_text())
    samples = {p: generate(model, tokenizer, p, max_new_tokens=60) for p in PROMPTS}
    about = {"parameters": sum(p.numel() for p in model.parameters()), "held_out": held, "steps": log[-1]["step"],
             "tokens": log[-1]["tokens"], "machine": f"{platform.machine()}, {os.cpu_count()} cores",
             "torch": torch.__version__, "shape": pretrain.SHAPE, "corpus": {k: v for k, v in corpus.items()},
             "log": [r for r in log if r["step"] % 50 == 0 or "held_out_loss" in r]}
    (to / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    loss_curve(log, to)
    (to / "README.md").write_text(card(about, samples))
    return about


def card(about: dict, samples: dict[str, str]) -> str:
    """The model card, every figure taken from `about`."""
    corpus, held = about["corpus"], about["held_out"]
    rows = "\n".join(f"| {g} | {h['files']} | {h['bytes']:,} | {h['loss_nats_per_token']:.3f} | **{h['bits_per_byte']:.3f}** |"
                     for g, h in held.items())
    sources = "\n".join(f"| {n} | {s['licence']} | {s['files']} | {s['bytes'] / 1e6:.1f} |"
                        for n, s in sorted(corpus["sources"].items(), key=lambda kv: -kv[1]["bytes"]))
    curve = "\n".join(f"| {r['step']} | {r['tokens'] / 1e6:.1f} | {r['loss']:.3f} | {r['held_out_loss']:.3f} | {r['held_out_bpb']:.3f} |"
                      for r in about["log"] if "held_out_loss" in r)
    spoken = "\n\n".join(f"```python\n{p}{s}\n```" for p, s in samples.items())
    shape = ", ".join(f"{k} {v}" for k, v in about["shape"].items())
    return f"""# The bundled model

A Llama of {about['parameters']:,} parameters that reads and writes Python, made for this course: large enough that every
method of parameter-efficient fine-tuning does on it what it does on a large model, small enough for two CPU cores.
It knows no instructions; teaching it some is what the course is about.

* **Architecture**: transformers' `LlamaForCausalLM` ({shape}).
* **Tokenizer**: byte-level BPE, digits one by one, special tokens named as Llama-3's. {corpus['train_bytes'] / corpus['train_tokens']:.2f} bytes per token on the training text.
* **Training**: {about['steps']:,} steps, {about['tokens'] / 1e6:.1f} million tokens of {corpus['train_tokens'] / 1e6:.1f} million, on a CPU
  ({about['machine']}, torch {about['torch']}), by `python -m pefttools.lab.pretrain`, seed 0. Stored in float16.

## Held-out files

{held['all held-out files']['files']} files drawn uniformly at random from all that were read, never trained on. Near copies (over half of the
telling lines shared with a file already kept) had been dropped before drawing.

| part | files | bytes | loss, nats per token | bits per byte |
|---|---|---|---|---|
{rows}

![Loss against tokens seen](loss.png)

| step | million tokens | training loss | held-out loss (30 files, context 256) | bits per byte |
|---|---|---|---|---|
{curve}

## What it writes (greedy, 60 tokens)

{spoken}

## What it read

{corpus['files_kept']:,} of {corpus['files_read']:,} Python files ({corpus['files_read'] - corpus['files_kept']:,} near copies dropped), all under permissive licences; test suites outside the
standard library, generated tables and vendored copies left out. The weights are released under Apache-2.0.

| source | licence | files | MB |
|---|---|---|---|
{sources}

## Limits

It completes Python that looks right and often is not. It follows no instructions, knows no facts, and refuses nothing.
Its memory is {about['shape']['max_position_embeddings']} positions at the most, and it was trained on windows of 256, then 512 tokens.

## Make it again

```
python -m pefttools.lab.pretrain build  --packages DIR --work WORK    # DIR: one folder a package, unzipped wheels
python -m pefttools.lab.pretrain train  --work WORK --steps {about['steps']}
python -m pefttools.lab.pretrain finish --work WORK --to pefttools/lab/tiny
```
The text depends on the versions of the packages found, so another machine makes a sibling, not a twin.
"""
