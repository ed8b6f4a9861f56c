"""Early stopping: the loss on held-out rows every few steps, the best parameters kept, an end when nothing gets better.

    watch = Watch(held_out_rows, tokenizer, every=50, patience=3)
    history = train(model, rows, tokenizer, steps=1000, watch=watch, folder="run")
    watch.step, watch.loss                       where the held-out loss was lowest; the model has these parameters now

    held-out loss   1.9   1.4   1.2   1.3   1.3   1.4       patience 3: three looks in a row without a new best
                                 ▲ best                 ■ stop

The held-out rows have no part in the gradient, but they choose the step: the loss at the best of n looks is a little
lower than on rows that chose nothing. Report what rows of a third kind say.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pefttools.lab.text import IGNORE, collate, encoded
from pefttools.lab.training_checkpoint import values_of


class Watch:
    """Looks at `data` (rows as for `lab.train`) every `every` steps and after the last one.

    patience: stop after so many looks in a row without a lower loss; 0 never stops, and the best is kept all the same.
    Raises ValueError for no rows, or numbers that make no sense.
    """

    def __init__(self, data: Sequence[Any], tokenizer: Any, every: int, patience: int = 0, batch_size: int = 16,
                 max_length: int = 256) -> None:
        if every < 1 or patience < 0:
            raise ValueError(f"every must be at least 1 and patience at least 0, got {every} and {patience}")
        rows = sorted(encoded(data, tokenizer, max_length), key=lambda row: len(row["input_ids"]))
        self.batches = [collate(rows[i:i + batch_size], tokenizer.pad_token_id)
                        for i in range(0, len(rows), batch_size)]
        self.targets = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in self.batches)
        if not self.targets:
            raise ValueError("the held-out rows have no target token: there is nothing to take a loss over")
        self.every, self.patience = every, patience
        self.loss, self.step, self.stale = math.inf, 0, 0  # of the best look, and looks since
        self.best: dict[str, torch.Tensor] = {}

    @property
    def stopped(self) -> bool:
        return bool(self.patience) and self.stale >= self.patience

    def due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step == last

    @torch.no_grad()
    def look(self, model: nn.Module, engine: Any, step: int) -> float:
        """The loss now, in nats per target token; the parameters are kept if it is the lowest. Processes share rows."""
        from pefttools.lab.training import loss_sum

        training = model.training
        model.eval()
        total = 0.0
        for batch in self.batches[engine.rank::engine.count]:
            with engine.computing():
                total += loss_sum(model, {k: v.to(engine.device) for k, v in batch.items()}).item()
        model.train(training)
        loss = engine.total(total) / self.targets
        if loss < self.loss:
            self.loss, self.step, self.stale, self.best = loss, step, 0, values_of(engine.params)
        else:  # NaN as well
            self.stale += 1
        return loss

    @torch.no_grad()
    def take_best(self, params: dict[str, nn.Parameter]) -> None:
        """Give the parameters the values of the best look."""
        for name, value in self.best.items():
            params[name].copy_(value)

    # ---- for the checkpoint
    def state(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step, "stale": self.stale, "best": self.best}

    def load(self, state: dict[str, Any]) -> None:
        self.loss, self.step, self.stale, self.best = state["loss"], state["step"], state["stale"], state["best"]
