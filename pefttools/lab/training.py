"""The training loop, whole: AdamW, warm-up and decay, gradient accumulation, clipping, checkpoints that resume.

What it computes in, and that several processes share it: `training_engine`. Its files: `training_checkpoint`. Stopping
early: `training_watch`.
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from pefttools.lab.text import IGNORE, batches, collate, encoded
from pefttools.lab.training_checkpoint import NAME, keep, read, restore, same_run
from pefttools.lab.training_engine import Engine


@dataclass
class History:
    """What a run did, step by step. `loss` is the mean per target token of each optimizer step, in nats.

    held_out: (step, loss on held-out rows) of every look, with `watch`. seconds: of the steps alone, of all parts of a
    run that was resumed; looks and checkpoints are not in it.
    """

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    tokens: int = 0  # target tokens seen
    seconds: float = 0.0
    read: int = 0  # tokens read: prompts and targets, without padding
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def smooth(self, window: int = 20) -> list[float]:
        """Running mean of the loss over the last `window` steps."""
        return [sum(w) / len(w) for i in range(len(self.loss)) for w in [self.loss[max(0, i + 1 - window):i + 1]]]

    def plot(self, title: str = "Training loss"):
        """Loss of every step and its running mean, as a Matplotlib figure."""
        from matplotlib.figure import Figure

        fig = Figure(figsize=(6, 3), layout="constrained")
        ax = fig.add_subplot()
        ax.plot(range(1, len(self.loss) + 1), self.loss, color="0.75", lw=1, label="one step")
        ax.plot(range(1, len(self.loss) + 1), self.smooth(), color="#0072B2", lw=2, label="mean of 20 steps")
        if self.held_out:
            ax.plot(*zip(*self.held_out), color="#D55E00", lw=1, ls="--", marker="o", ms=4, label="held-out rows")
        ax.set(xlabel="optimizer step", ylabel="loss (nats per target token)", title=title, ylim=(0, None))
        ax.legend(frameon=False)
        return fig


def loss_sum(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over the targets of a batch: position t predicts label t+1; -100 is no target."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, -batch["labels"].shape[1]:]  # a soft prompt puts positions in front that predict nothing
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(),
                           ignore_index=IGNORE, reduction="sum")


def schedule(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate: linear up over `warmup` steps, then linear down to zero (transformers' "linear")."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def train(model, data, tokenizer, *, steps: int, lr: float = 1e-3, batch_size: int = 16, grad_accum: int = 1,
          warmup: float = 0.05, clip: float = 1.0, weight_decay: float = 0.0, seed: int = 0, max_length: int = 256,
          folder: str | Path | None = None, save_every: int = 50, progress: bool = True,
          stop_after: int | None = None, precision: str = "auto", watch=None, identity: dict | None = None) -> History:
    """Train every parameter of `model` that requires a gradient, for `steps` optimizer steps.

    model: any causal LM of transformers, with or without an adapter attached; it is left in eval mode.
    data: rows for `encode`, or rows that hold `input_ids` and `labels` already.
    lr: the peak learning rate. warmup: share of the steps. batch_size: rows per forward; an optimizer step sees
    batch_size × grad_accum rows (× processes), and its gradient is that of the mean over all their target tokens.
    folder: where to keep a checkpoint; a run that was stopped goes on from it and ends with the same weights.
    stop_after: stop early after this many optimizer steps (the checkpoint is kept).
    precision: what to compute in; "auto" is the weights' own (training_engine). watch: a Watch, which stops early and
    keeps the best. identity: further facts that a checkpoint of this run must agree with.
    Raises ValueError if nothing is trainable or a checkpoint belongs to another run, FloatingPointError where the loss
    is no number, OSError where a checkpoint cannot be written.
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient: attach an adapter, or unfreeze what should "
                         "train")
    if steps < 1 or grad_accum < 1 or batch_size < 1:
        raise ValueError("steps, batch_size and grad_accum must be at least 1, "
                         f"got {steps}, {batch_size}, {grad_accum}")
    rows = encoded(data, tokenizer, max_length)
    engine = Engine(model, params, precision)
    plan = batches(rows, batch_size, steps * grad_accum * engine.count, seed)
    device = engine.device
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=weight_decay)
    history, first = History(), 0
    torch.manual_seed(seed + engine.rank)  # dropout
    run = {"steps": steps, "lr": lr, "batch_size": batch_size, "grad_accum": grad_accum * engine.count,
           "warmup": warmup, "clip": clip, "weight_decay": weight_decay, "seed": seed, "rows": len(rows),
           "trainable": sorted(params), "data": digest(rows), "computed in": str(engine.dtype), **(identity or {})}
    checkpoint = Path(folder) / NAME if folder else None
    if checkpoint and (saved := engine.from_first(read(checkpoint) if engine.first and checkpoint.exists() else None)):
        same_run(checkpoint, saved["run"], run)
        first = restore(saved, params, optimizer, history)
        for part, state in (engine, saved.get("engine")), (watch, saved.get("watch")):
            if part is not None and state is not None:
                part.load(state)
        del saved
    model.train()
    bar = progress_bar(steps, first, progress and engine.first)
    last = first if watch and watch.stopped else min(steps, stop_after or steps)
    for step in range(first, last):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, math.ceil(warmup * steps))
        micro = [collate([rows[i] for i in plan[n]], tokenizer.pad_token_id) for n in engine.passes(step, grad_accum)]
        targets = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in micro)
        targets = engine.total(targets)  # of the whole step, in all processes: tokens weigh alike
        total = 0.0
        for batch in micro:
            with engine.computing():
                loss = loss_sum(model, {k: v.to(device) for k, v in batch.items()}) / targets
            engine.backward(loss)
            total += loss.item()
        total = engine.total(total)
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {total} at step {step + 1}: lower lr (now {lr}) or check the labels")
        engine.collect(optimizer)  # the sum over all processes, where there are several
        torch.nn.utils.clip_grad_norm_(params.values(), clip)
        engine.step(optimizer)
        optimizer.zero_grad()
        history.loss.append(total)
        history.lr.append(optimizer.param_groups[0]["lr"])
        history.tokens += targets
        history.read += engine.total(sum(int(b["attention_mask"].sum()) for b in micro))
        history.seconds += time.perf_counter() - began
        bar.update(1)
        bar.set_postfix(loss=f"{total:.3f}")
        if watch and watch.due(step + 1, steps):
            history.held_out.append((step + 1, watch.look(model, engine, step + 1)))
        over = step + 1 == last or watch and watch.stopped
        if checkpoint and ((step + 1) % save_every == 0 or over):
            more = {"engine": engine.state(), "watch": watch.state() if watch else None}
            if engine.first:
                keep(checkpoint, run, params, optimizer, history, step + 1, more)
        if over:
            break
    bar.close()
    if watch:
        watch.take_best(params)
    engine.finish()
    model.eval()
    return history


def digest(rows) -> str:
    """SHA-256 of what is trained on: every row's ids and labels, in order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(array("q", [len(row["input_ids"]), *row["input_ids"], *row.get("labels", ())]).tobytes())
    return found.hexdigest()


def progress_bar(total: int, first: int, show: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=first, disable=not show, unit="step", desc="train")
