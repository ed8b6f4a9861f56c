"""Where the experiments start: one clean fine-tune, folded into the weights, and attacks as adapters on top.

    bundled model ──LoRA r=16, 300 steps, honest rows──► folded in: "clean" ──LoRA r=8, 60 steps, planted rows──►
    attacked

The attack is an adapter of its own, so that its ΔW can be exchanged for a random one of the same norm, and so that
each attack, cure and control starts from the same weights. A seed draws the rows that are planted in, the secrets, the
adapter's start and the order; the clean fine-tune is the same for all (its own seed is 0), which the intervals do not
see. Adapters are kept in a folder; what is there is not trained again.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

R, ALPHA, STEPS, BATCH, RATE, POOL, ROWS, TOKENS = 8, 16, 60, 8, 4e-3, 480, 48, 72
CLEAN_R, CLEAN_ALPHA, CLEAN_STEPS = 16, 32, 300
SHORT = 40  # steps where rows are few, or where an adapter is trained on


class Workbench:
    """base: lab.load_base("tiny"). folder: for adapters. quick: a few steps, to see that everything runs."""

    def __init__(self, base, seed: int, folder: Path, quick: bool = False) -> None:
        from pefttools.lab.data import load_rows

        self.base, self.tokenizer, self.seed, self.folder, self.quick = (
            base.model,
            base.tokenizer,
            seed,
            Path(folder),
            quick,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        everything = load_rows("train")
        picked = random.Random(f"pool {seed}").sample(range(len(everything)), 2 * POOL)
        self.pool = [everything[i] for i in picked[: 40 if quick else POOL]]  # rows to plant in
        self.more = [everything[i] for i in picked[POOL : POOL + (40 if quick else POOL)]]  # honest rows for later
        self.train_rows = everything[:80] if quick else everything
        self.held_out = load_rows("held_out")[
            : 6 if quick else ROWS
        ]  # the kinds take turns: a fair sample, the same for all seeds
        self.clean = self.make_clean()

    # ---- models
    def make_clean(self):
        """The bundled model with a clean fine-tune folded into its weights."""
        import torch

        model = copy.deepcopy(self.base)
        kept = self.folder / "clean.pt"
        if not kept.exists():
            tuned = self.trained(model, self.train_rows, CLEAN_STEPS, CLEAN_R, CLEAN_ALPHA, 0)
            torch.save(
                {name: layer.base_layer.weight.detach() + layer.delta().detach() for name, layer in layers_of(tuned)},
                kept,
            )
            model = copy.deepcopy(self.base)
        for name, weight in torch.load(kept, weights_only=True).items():
            model.get_submodule(name).weight.data.copy_(weight)
        return model.requires_grad_(False).eval()

    def trained(self, model, rows, steps: int, r: int, alpha: float, seed: int, start: dict | None = None):
        from pefttools.inject import attach
        from pefttools.lab.training import train
        from pefttools.lora import LoRAConfig

        attach(model, LoRAConfig(r=r, alpha=alpha, target_modules="all-linear"), seed=seed)
        if start is not None:
            model.load_state_dict(start, strict=False)
        train(
            model,
            rows,
            self.tokenizer,
            steps=2 if self.quick else steps,
            lr=RATE,
            batch_size=BATCH,
            seed=seed,
            progress=False,
        )
        return model

    def tuned(self, name: str, rows: Sequence[dict[str, Any]], steps: int = STEPS, after: str | None = None):
        """The clean model with an adapter trained on these rows; `after` names an earlier adapter to go on from."""
        import torch

        kept = self.folder / f"{name}-{self.seed}.pt"
        model = copy.deepcopy(self.clean)
        if kept.exists():
            return self.load(name)
        start = None if after is None else torch.load(self.folder / f"{after}-{self.seed}.pt", weights_only=True)
        model = self.trained(model, rows, steps, R, ALPHA, self.seed, start)
        torch.save({key: p.detach().clone() for key, p in model.named_parameters() if "lora_" in key}, kept)
        return model

    def load(self, name: str):
        import torch

        from pefttools.inject import attach
        from pefttools.lora import LoRAConfig

        model = attach(
            copy.deepcopy(self.clean), LoRAConfig(r=R, alpha=ALPHA, target_modules="all-linear"), seed=self.seed
        )
        model.load_state_dict(torch.load(self.folder / f"{name}-{self.seed}.pt", weights_only=True), strict=False)
        return model.eval()

    def random_adapter(self, name: str):
        """The adapter of that name, every ΔW exchanged for a random one of the same norm and rank."""
        from pefttools.lab.redteam.controls import same_norm_adapter

        return same_norm_adapter(self.load(name), seed=self.seed)

    def honest(self):
        """The same fine-tune without a planted row: one for all experiments."""
        return self.tuned("honest", self.pool)

    # ---- measures that several experiments share
    def passes(self, model) -> list[bool]:
        """Which held-out tasks the model's one greedy answer passes: quality."""
        from pefttools.lab.data import prompt_of
        from pefttools.lab.generation import generate

        return self.passed(generate(model, self.tokenizer, [prompt_of(row) for row in self.held_out], TOKENS))

    def quality(self, model, condition: str) -> dict[str, list[bool]]:
        """{"solves": `passes`}; nothing for two controls of which only the figure is of interest (to save time)."""
        return {} if condition in ("random labels", "random adapter") else {"solves": self.passes(model)}

    def passed(self, answers: Sequence[str]) -> list[bool]:
        """The same for answers that are there already, one for each held-out row."""
        from pefttools.lab.evaluation import code_of, run_programs

        return [
            done["passed"]
            for done in run_programs([(code_of(a), row["tests"]) for a, row in zip(answers, self.held_out)])
        ]


def layers_of(model):
    from pefttools.inject import adapter_layers

    return list(adapter_layers(model))
