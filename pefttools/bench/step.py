"""A whole training step of the bundled model: 8 rows of 128 tokens, forward, backward, AdamW; ours against peft.

Each way has a model of its own with the same weights, and adapters of rank 16 on every linear layer. QLoRA's base is
NF4 with double quantization on both sides, bitsandbytes' under peft.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.bench import production
from pefttools.bench.harness import QUICK, Effort, attempt, compare, interleave
from pefttools.bench.memory import peak_bytes

R, ROWS, TOKENS = 16, 8, 128


def base() -> nn.Module:
    """The bundled model, in training mode."""
    from pefttools.lab import load_base

    return load_base("tiny", quiet=True).model.train()


def ours(kind: str) -> nn.Module:
    from pefttools.inject import attach

    model = base()
    if kind == "DoRA":
        from pefttools.dora import DoRAConfig as Config
    else:
        from pefttools.lora import LoRAConfig as Config
    if kind == "QLoRA":
        from pefttools.qlora import quantize_model

        quantize_model(model, double_quant=True)
    return attach(model, Config(r=R, alpha=R, target_modules="all-linear"))


def theirs(kind: str) -> nn.Module:
    model = production.quantize(base()) if kind == "QLoRA" else base()
    return production.adapted(model, R, dora=kind == "DoRA")


def training_step(model: nn.Module) -> Callable[[], Tensor]:
    """A callable that does one step on fixed tokens and returns the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss

    return run


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """The group "step": time, and peak of what a step allocates, for each method."""
    effort = QUICK if quick else Effort(seconds=30.0, least=15, most=40)
    for kind in ("LoRA", "DoRA", "QLoRA"):
        row = f"{kind}, r={R}, all linear layers"

        def measure() -> dict[str, Any]:
            ways = {"ours": training_step(ours(kind)), "peft": training_step(theirs(kind)),
                    "full": training_step(base())}
            losses = {name: ways[name]().item() for name in ("ours", "peft")}      # B = 0: the base's own loss
            if abs(losses["ours"] - losses["peft"]) > 1e-4 * losses["peft"]:
                raise ValueError(f"the first losses differ, {losses}: the two sides do not train the same model")
            peaks = {name: peak_bytes(way) for name, way in ways.items()}          # the states of AdamW exist by now
            times = interleave(ways, effort, warm_up=1)
            beside = {f"{name} / full": times.ratio(name, "full").median for name in ("ours", "peft")}
            memory = {f"peak memory, ours / {name}": peaks["ours"] / peaks[name] for name in ("peft", "full")}
            return compare(row, times, "ours", "peft", beside={**beside, **memory})

        yield attempt({"row": row, "what": "ours / peft", "unit": "×"}, measure)
