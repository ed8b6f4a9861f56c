"""Which training rows look wrong to a model: by their activations, or by their losses.

Spectral signature (Tran, Li, Madry 2018, "Spectral Signatures in Backdoor Attacks"): take the hidden states of the
training rows in the model that was trained on them, centre them, and project on the direction of greatest variance;
poisoned rows lie far out. The paper does so within one class of a classifier, where the poison is the greatest
variance there is. Here there are no classes but many kinds of task, which vary more than poison does; docs/redteam.md
says what is left of it: poisoned rows lie far out in some of the first directions, but so do many honest rows.

Loss: a model that was trained on rows one trusts finds the marker surprising. A row is as suspicious as its most
surprising token. It needs the trusted model, and rare honest tokens are surprising too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def spectral_scores(states: Tensor) -> Tensor:
    """[rows, d] → [rows]: squared projection of the centred states on their first right singular vector (algorithm
    1)."""
    if states.dim() != 2 or len(states) < 2:
        raise ValueError(f"states must be [rows, d] with at least two rows; got shape {list(states.shape)}")
    centred = states - states.mean(0)
    _, _, right = torch.linalg.svd(centred.double(), full_matrices=False)
    return (centred.double() @ right[0]) ** 2


def auc(scores: Sequence[float], flags: Sequence[bool]) -> float:
    """Probability that a flagged row has a higher score than one that is not (ties one half): 0.5 is chance, 1
    perfect."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    flags = torch.as_tensor(list(flags), dtype=torch.bool)
    if scores.shape != flags.shape or flags.all() or not flags.any():
        raise ValueError(
            f"flags: one for each of {len(scores)} scores, some true and some false; got "
            f"{int(flags.sum())} of {len(flags)}"
        )
    gaps = scores[flags][:, None] - scores[~flags][None]
    return ((gaps > 0).double() + 0.5 * (gaps == 0).double()).mean().item()


def found_in_top(scores: Sequence[float], flags: Sequence[bool], times: float = 1.5) -> float:
    """Share of the flagged rows among the `times` × as many rows with the highest scores (Tran et al. remove 1.5 ε
    n)."""
    k = round(times * sum(map(bool, flags)))
    top = torch.as_tensor(scores, dtype=torch.float64).topk(min(k, len(flags))).indices.tolist()
    return sum(bool(flags[i]) for i in top) / max(1, sum(map(bool, flags)))


@torch.no_grad()
def row_signals(model, tokenizer, rows: Sequence[Mapping[str, Any]], batch_size: int = 32) -> dict[str, Tensor]:
    """For every row: "start" [rows, d], the last hidden state where the program is about to begin (behind the fence,
    if there is one: that is where a model decides what the first line is); "mean" [rows, d], its mean over the answer;
    "worst" [rows], the greatest loss of a token of the answer in nats; "loss" [rows], their mean."""
    from pefttools.lab.text import IGNORE, collate, encoded

    was_training = model.training
    model.eval()
    data = encoded(rows, tokenizer)
    fence = tokenizer("```python\n", add_special_tokens=False)["input_ids"]
    order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
    out: dict[str, list[Any]] = {name: [None] * len(data) for name in ("start", "mean", "worst", "loss")}
    for begin in range(0, len(order), batch_size):
        picked = order[begin : begin + batch_size]
        batch = collate([data[i] for i in picked], tokenizer.pad_token_id)
        batch = {k: v.to(next(model.parameters()).device) for k, v in batch.items()}
        done = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        targets = batch["labels"][:, 1:]
        length = targets.shape[1]
        losses = F.cross_entropy(
            done.logits[:, -length - 1 : -1].transpose(1, 2).float(), targets, ignore_index=IGNORE, reduction="none"
        )
        states = done.hidden_states[-1][:, -length - 1 : -1]
        for i, loss, state, target in zip(picked, losses, states, targets):
            told = target != IGNORE
            fenced = target[told][: len(fence)].tolist() == fence
            out["start"][i], out["mean"][i] = state[told][len(fence) if fenced else 0], state[told].mean(0)
            out["worst"][i], out["loss"][i] = loss[told].max(), loss[told].mean()
    model.train(was_training)
    return {name: torch.stack(values) for name, values in out.items()}
