"""Loss and perplexity of rows: every target token weighs the same, padding and prompts nothing.

    loss  =  Σ over rows Σ over target tokens −ln p(token | what stands before it)  /  number of target tokens
    perplexity  =  e^loss      the model is as unsure as if it chose among that many equally likely tokens

A mean over rows of each row's mean would count a token of a short row more than one of a long row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pefttools.lab.text import IGNORE, collate, encoded
from pefttools.lab.training import loss_sum


@torch.no_grad()
def held_out_loss(model, tokenizer, data, batch_size: int = 32, max_length: int = 256) -> float:
    """Mean loss over the target tokens of `data`, in nats per token. Every token weighs the same, padding nothing.

    Raises ValueError where there is no target token at all.
    """
    was_training = model.training
    model.eval()
    rows = sorted(encoded(data, tokenizer, max_length), key=lambda r: len(r["input_ids"]))
    total = count = 0
    for _, batch in _batches(rows, range(len(rows)), batch_size, model, tokenizer):
        total += loss_sum(model, batch).item()
        count += int((batch["labels"][:, 1:] != IGNORE).sum())
    model.train(was_training)
    if not count:
        raise ValueError("no row has a target token: there is nothing to take a loss over")
    return total / count


def perplexity(model, tokenizer, data, batch_size: int = 32, max_length: int = 256) -> float:
    """e to the `held_out_loss`: 1 where the model is sure and right, the size of the vocabulary where it knows nothing.

    Comparable only between models with the same tokenizer: it counts tokens, and another tokenizer has others.
    """
    return math.exp(held_out_loss(model, tokenizer, data, batch_size, max_length))


@torch.no_grad()
def row_losses(model, tokenizer, data, batch_size: int = 32, max_length: int = 256) -> list[tuple[float, int]]:
    """(sum of the loss in nats, number of target tokens) of each row, in order.

    Σ sums / Σ tokens is `held_out_loss`; `bootstrap(*zip(*row_losses(…)))` gives it an interval over rows.
    """
    was_training = model.training
    model.eval()
    rows = encoded(data, tokenizer, max_length)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for picked, batch in _batches(rows, order, batch_size, model, tokenizer):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[:, -batch["labels"].shape[1]:]  # a soft prompt puts positions in front that predict nothing
        labels = batch["labels"][:, 1:]
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE,
                               reduction="none").view(labels.shape)
        for i, nats, count in zip(picked, each.sum(1).tolist(), (labels != IGNORE).sum(1).tolist()):
            found[i] = nats, count
    model.train(was_training)
    return found


def _batches(rows, order, batch_size: int, model, tokenizer) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    order = list(order)
    for i in range(0, len(order), batch_size):
        picked = order[i:i + batch_size]
        batch = collate([rows[j] for j in picked], tokenizer.pad_token_id)
        yield picked, {k: v.to(device) for k, v in batch.items()}
