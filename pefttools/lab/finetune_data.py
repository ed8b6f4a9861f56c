"""The rows of a fine-tune: read, some of them held out, encoded, and what was done to them said.

    data ──read_rows──► rows ──┬──► encode ──► trained on        a row longer than max_length loses the beginning of
                               └──► encode ──► looked at         its prompt; an answer that is longer is a fault
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pefttools.lab.finetune_config import Settings, WrongQuestion
from pefttools.lab.rows import Faults, read_rows

SHARE = 0.1  # of the rows, held out where --eval-every is given and nothing else is said


def gather(settings: Settings, rows: Any, held_out: Any, say: Callable[[str], None]) -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows to look at) of the settings, or of `rows` and `held_out` where these are given in Python.

    Raises WrongQuestion for everything that is wrong with them.
    """
    def read(data: Any) -> list[dict]:
        return read_rows(data, settings.columns, settings.skip_bad, say)

    try:
        found = read(settings.data if rows is None else rows)
        if not settings.eval_every:
            return found, []
        held_out = settings.held_out if held_out is None else held_out
        share = share_of(held_out)
        return (found, read(held_out)) if share is None else split(found, share, settings.seed)
    except ValueError as error:
        raise WrongQuestion(str(error)) from None


def looked_at(settings: Settings, rows: Any, held_out: Any) -> Any:
    """What is held out where nothing is said: the course's split for its train split, else a share of the rows."""
    if not settings.eval_every or settings.held_out is not None or held_out is not None:
        return settings.held_out
    return "held_out" if rows is None and settings.data == "train" and not Path("train").is_file() else SHARE


def share_of(held_out: Any) -> float | None:
    """The share, where a number was given; None for rows, a file or a split."""
    try:
        share = float(held_out)
    except (TypeError, ValueError):
        return None
    if not 0 < share < 1:
        raise WrongQuestion(f"--held-out {held_out}: a share of the rows between 0 and 1, or rows as for --data.")
    return share


def split(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(the rest, round(share · n) of the rows, at least one), drawn with `seed`."""
    import torch

    if len(rows) < 2:
        raise WrongQuestion("one row cannot be both trained on and held out: give --held-out.")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = set(drawn[:min(len(rows) - 1, max(1, round(share * len(rows))))])
    return [row for n, row in enumerate(rows) if n not in aside], [rows[n] for n in sorted(aside)]


def encode_rows(rows: list[dict], tokenizer: Any, settings: Settings, what: str, say: Callable[[str], None]
                ) -> list[dict]:
    """Every row as tokens. Rows that lose the beginning of their prompt are counted; an answer that does not fit is a
    fault: WrongQuestion, or left out with skip_bad."""
    from pefttools.lab.text import encode

    limit = settings.max_length
    found, faults, cut = [], Faults(what), 0
    for n, row in enumerate(rows, 1):
        try:
            found.append(encode(row, tokenizer, limit))
        except ValueError as error:
            faults.add(f"row {n}", f"does not fit into --max-length {limit}: {str(error).split(':')[0]}", "too long")
            continue
        if len(found[-1]["input_ids"]) == limit:               # cut, or just as long
            cut += len(encode(row, tokenizer, 1 << 30)["input_ids"]) > limit
    try:
        faults.settle(len(rows), settings.skip_bad, say)
    except ValueError as error:
        raise WrongQuestion(str(error)) from None
    if cut:
        say(f"Cut: {cut:,} of {len(rows):,} rows of {what} are longer than {limit} tokens and lose the beginning of "
            "their prompt.")
    return found
