"""From a row of instruction data to tensors: what the model reads, and what it is asked to predict.

    ids     <|begin_of_text|> Write a function …  ```python  def f ( x ) : …  ```  <|end_of_text|>  <pad> <pad>
    labels       -100          -100 …             the same ids as above …        <|end_of_text|>  -100  -100
                 └────────── prompt ───────────┘ └─────────── answer ────────────┘               └ padding ┘

A label of -100 is ignored by the loss. The prompt is not a target (the model is not asked to write instructions),
padding is not a target, and the end-of-text token *is* one: a model that never saw it as a target never stops.
Labels are not shifted here; transformers' models (and `lab.training.loss_sum`) compare position t with label t+1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

IGNORE = -100  # torch.nn.functional.cross_entropy's default `ignore_index`


def steps(full: int, quick: int = 3) -> int:
    """`full`, or `quick` when the environment says PEFTTOOLS_QUICK=1 (the test suite): same code, shorter run."""
    return quick if os.environ.get("PEFTTOOLS_QUICK") == "1" else full


def encode(row: Mapping, tokenizer, max_length: int = 256) -> dict[str, list[int]]:
    """One row as `{"input_ids": [...], "labels": [...]}`, both of the same length, unpadded.

    A row longer than `max_length` loses the *beginning of its prompt* (after the begin token): the answer and its end
    stay whole. Raises ValueError if the answer alone does not fit.
    """
    from pefttools.lab.data import answer_of, prompt_of

    prompt = tokenizer(prompt_of(row), add_special_tokens=False)["input_ids"]
    answer = tokenizer(answer_of(row), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    room = max_length - len(answer) - len(begin)
    if room < 0:
        raise ValueError(f"the answer has {len(answer)} tokens and max_length is {max_length}: "
                         f"raise max_length to at least {len(answer) + len(begin)} or drop the row")
    prompt = begin + (prompt[-room:] if room else [])
    return {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}


def collate(rows: Sequence[Mapping], pad_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of different lengths as one batch: `input_ids`, `attention_mask`, `labels`, each [B, T] int64.

    Padded to the longest row (not to a fixed length). Padding is decided by position, never by comparing ids with
    `pad_id`, so that it stays right where the pad token is the end-of-text token.
    """
    if not rows:
        raise ValueError("collate needs at least one row")
    if pad_id is None:
        raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token (load_base does), or pass another pad_id")
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    T = max(len(r["input_ids"]) for r in rows)
    ids = torch.full((len(rows), T), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        at = slice(0, n) if side == "right" else slice(T - n, T)
        ids[i, at] = torch.tensor(row["input_ids"])
        mask[i, at] = 1
        if "labels" in row:
            labels[i, at] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def encoded(data, tokenizer, max_length: int = 256) -> list[dict[str, list[int]]]:
    """Every row of `data` through `encode`; rows that already hold `input_ids` are taken as they are."""
    return [row if "input_ids" in row else encode(row, tokenizer, max_length) for row in data]


def batches(rows: Sequence[Mapping], batch_size: int, count: int, seed: int = 0) -> list[list[int]]:
    """Row numbers of `count` batches, epoch after epoch, drawn without replacement within an epoch.

    Rows of similar length share a batch (sorted within pools of 16 batches), so that little of a batch is padding;
    the order of batches is shuffled. A function of its arguments alone: a resumed run sees the same batches.
    """
    if not len(rows):
        raise ValueError("there are no rows to train on")
    rng = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(rows))
    lengths = [len(r["input_ids"]) for r in rows]
    plan: list[list[int]] = []
    while len(plan) < count:
        order = torch.randperm(len(rows), generator=rng).tolist()
        epoch = []
        for start in range(0, len(order), 16 * batch_size):
            pool = sorted(order[start:start + 16 * batch_size], key=lengths.__getitem__)
            epoch += [pool[i:i + batch_size] for i in range(0, len(pool) - batch_size + 1, batch_size)]
        plan += [epoch[i] for i in torch.randperm(len(epoch), generator=rng).tolist()]
    return plan[:count]
