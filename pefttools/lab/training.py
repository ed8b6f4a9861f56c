"""The training loop, whole: AdamW, warm-up and decay, gradient accumulation, clipping, checkpoints that resume."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from pefttools.lab.text import IGNORE, batches, collate, encoded


@dataclass
class History:
    """What a run did, step by step. `loss` is the mean per target token of each optimizer step, in nats."""

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    tokens: int = 0  # target tokens seen
    seconds: float = 0.0

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
          stop_after: int | None = None) -> History:
    """Train every parameter of `model` that requires a gradient, for `steps` optimizer steps.

    model: any causal LM of transformers, with or without an adapter attached; it is left in eval mode.
    data: rows for `encode`, or rows that hold `input_ids` and `labels` already.
    lr: the peak learning rate. warmup: share of the steps. batch_size: rows per forward; an optimizer step sees
    batch_size × grad_accum rows, and its gradient is that of the mean over all their target tokens.
    folder: where to keep a checkpoint; a run that was stopped goes on from it and ends with the same weights.
    stop_after: stop early after this many optimizer steps (the checkpoint is kept).
    Raises ValueError if nothing is trainable or a checkpoint belongs to another run.
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient: attach an adapter, or unfreeze what should train")
    if steps < 1 or grad_accum < 1 or batch_size < 1:
        raise ValueError(f"steps, batch_size and grad_accum must be at least 1, got {steps}, {batch_size}, {grad_accum}")
    rows = encoded(data, tokenizer, max_length)
    plan = batches(rows, batch_size, steps * grad_accum, seed)
    device = next(iter(params.values())).device
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=weight_decay)
    history, first = History(), 0
    torch.manual_seed(seed)  # dropout
    run = {"steps": steps, "lr": lr, "batch_size": batch_size, "grad_accum": grad_accum, "warmup": warmup,
           "clip": clip, "weight_decay": weight_decay, "seed": seed, "rows": len(rows), "trainable": sorted(params)}
    checkpoint = Path(folder) / "checkpoint.pt" if folder else None
    if checkpoint and checkpoint.exists():
        first = restore(checkpoint, run, params, optimizer, history)
    model.train()
    bar = progress_bar(steps, first, progress)
    last = min(steps, stop_after or steps)
    for step in range(first, last):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, math.ceil(warmup * steps))
        micro = [collate([rows[i] for i in plan[step * grad_accum + j]], tokenizer.pad_token_id) for j in range(grad_accum)]
        targets = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in micro)  # of the whole step: tokens weigh alike
        total = 0.0
        for batch in micro:
            loss = loss_sum(model, {k: v.to(device) for k, v in batch.items()}) / targets
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {total} at step {step + 1}: lower lr (now {lr}) or check the labels")
        torch.nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
        optimizer.zero_grad()
        history.loss.append(total)
        history.lr.append(optimizer.param_groups[0]["lr"])
        history.tokens += targets
        history.seconds += time.perf_counter() - began
        bar.update(1)
        bar.set_postfix(loss=f"{total:.3f}")
        if checkpoint and ((step + 1) % save_every == 0 or step + 1 == last):
            keep(checkpoint, run, params, optimizer, history, step + 1)
    bar.close()
    model.eval()
    return history


def progress_bar(total: int, first: int, show: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=first, disable=not show, unit="step", desc="train")


def keep(path: Path, run: dict, params: dict, optimizer, history: History, step: int) -> None:
    """Write a checkpoint beside the old one, then swap: a kill at any moment leaves a whole checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save({"run": run, "step": step, "params": {n: p.detach().cpu() for n, p in params.items()},
                "optimizer": optimizer.state_dict(), "history": vars(history), "rng": torch.get_rng_state()}, part)
    os.replace(part, path)


def restore(path: Path, run: dict, params: dict, optimizer, history: History) -> int:
    """Load a checkpoint into the parameters and the optimizer. Returns the step to go on with."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as e:  # a damaged file raises half a dozen kinds of error
        raise ValueError(f"{path} is not a whole checkpoint ({type(e).__name__}): delete it to start this run again") from e
    if not isinstance(saved, dict) or not {"run", "step", "params", "optimizer", "history", "rng"} <= saved.keys():
        raise ValueError(f"{path} is a file of something else, not a checkpoint of lab.train: move it away, or use another folder")
    changed = [k for k in run if saved["run"].get(k) != run[k]]
    if changed:
        said = ", ".join(k if k == "trainable" else f"{k} was {saved['run'].get(k)} and is {run[k]}" for k in changed)
        raise ValueError(f"{path} belongs to another run ({said}): use another folder, or delete it to start again")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(saved["params"][name])
    optimizer.load_state_dict(saved["optimizer"])
    vars(history).update(saved["history"])
    torch.set_rng_state(saved["rng"])
    return saved["step"]
