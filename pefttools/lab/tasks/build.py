"""From kinds to the three splits, their files and the data card."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median

from pefttools.lab.tasks import KINDS
from pefttools.lab.tasks.core import Kind, Slots, draw_slots, row_of

SEED = 2024
ROWS_PER_KIND = {"train": 170, "held_out": 11, "new_kinds": 7}
COLUMNS = ("instruction", "input", "output", "text", "kind", "family", "tests")
FOLDER = Path(__file__).resolve().parent.parent / "data"
INDEX = "splits.json"


def kinds_of(split: str) -> list[Kind]:
    """The kinds of a split, in order."""
    if split not in ROWS_PER_KIND:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(ROWS_PER_KIND)}")
    return [kind for kind in KINDS if kind.new == (split == "new_kinds")]


def draw_rows(kind: Kind, split: str, count: int, seed: int = SEED) -> list[tuple[Slots, dict]]:
    """`count` different rows of one kind, each with its slots. Each kind has a random generator of its own, so that a
    new kind leaves the others' rows as they are."""
    rng = random.Random(f"{seed}/{split}/{kind.name}")
    rows: dict[tuple[str, str], tuple[Slots, dict]] = {}
    for _ in range(20 * count):
        slots, wording = draw_slots(kind, rng, split)
        row = row_of(kind, slots, wording)
        rows.setdefault((row["instruction"], row["input"]), (slots, row))
        if len(rows) == count:
            return list(rows.values())
    raise ValueError(f"kind {kind.name!r}: only {len(rows)} different rows of {count}; give it more slots or wordings")


def build(split: str, seed: int = SEED) -> list[dict]:
    """The rows of a split. Train is shuffled; the other two go round the kinds, so that any first n rows are a fair
    sample of the kinds."""
    count = ROWS_PER_KIND[split] if split in ROWS_PER_KIND else 0
    groups = [[row for _, row in draw_rows(kind, split, count, seed)] for kind in kinds_of(split)]
    rng = random.Random(f"{seed}/{split}")
    if split == "train":
        rows = [row for group in groups for row in group]
        rng.shuffle(rows)
        return rows
    rng.shuffle(groups)
    return [row for turn in zip(*groups, strict=True) for row in turn]


def to_bytes(rows: Iterable[dict]) -> bytes:
    """JSON lines, in a fixed order of keys."""
    return "".join(json.dumps({column: row[column] for column in COLUMNS}, ensure_ascii=False) + "\n"
                   for row in rows).encode()


def write(folder: Path = FOLDER, seed: int = SEED) -> dict:
    """Write `<split>.jsonl.gz`, the index with counts and checksums (of the uncompressed rows), and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {split: build(split, seed) for split in ROWS_PER_KIND}
    index = {"seed": seed, "columns": list(COLUMNS), "splits": {}}
    for split, rows in splits.items():
        raw = to_bytes(rows)
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(raw, 9, mtime=0))
        index["splits"][split] = {"rows": len(rows), "kinds": len({row["kind"] for row in rows}), "bytes": len(raw),
                                  "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(splits, seed), encoding="utf-8")
    return index


def card(splits: dict[str, list[dict]], seed: int) -> str:
    """The data card, every number in it counted from the rows."""
    families = sorted({row["family"] for rows in splits.values() for row in rows})
    counts = {split: Counter(row["kind"] for row in rows) for split, rows in splits.items()}
    first = {row["kind"]: row["instruction"] for rows in reversed(splits.values()) for row in reversed(rows)}
    files = "\n".join(f"  - split: {split}\n    path: {split}.jsonl.gz" for split in splits)
    sizes = "\n".join(f"| {split} | {len(rows):,} | {len(counts[split])} | {wordings_in(split)} | "
                      f"{sum(bool(row['input']) for row in rows):,} | {mean(len(row['tests']) for row in rows):.1f} | "
                      f"{median(len(row['text']) for row in rows):.0f}, {max(len(row['text']) for row in rows)} |"
                      for split, rows in splits.items())
    table = "\n".join(f"| {family} | {kind.name} | "
                      f"{' | '.join(str(counts[split][kind.name] or '') for split in splits)} | "
                      f"{first[kind.name].replace('|', BAR)} |"
                      for family in families for kind in KINDS if kind.family == family)
    return CARD.format(files=files, seed=seed, sizes=sizes, table=table, families=len(families))


def wordings_in(split: str) -> int:
    """How many wordings of the instruction the kinds of a split have there, openings not counted."""
    parts = {"train": ("wordings",), "held_out": ("held_out",), "new_kinds": ("wordings", "held_out")}[split]
    return sum(len(getattr(kind, part)) for kind in kinds_of(split) for part in parts)


BAR = "\\|"
CARD = """---
license: apache-2.0
language: en
tags: [code, python, synthetic]
configs:
- config_name: default
  data_files:
{files}
---

# Small Python tasks

Instructions with the Python that answers them, and tests that tell whether an answer is right. The rows are made by
`pefttools/lab/tasks`, and so is this card with every number in it (`python -m pefttools.lab.tasks --write`, seed
{seed}). The columns `instruction`, `input`, `output` and `text` are those of `flytech/python-codes-25k`; no row comes
from there.

| column | what it holds |
|---|---|
| instruction | the task in words, with the names and constants that the code must use |
| input | an example, or data that the task refers to; empty in about half of the rows |
| output | the answer, a fenced block of Python |
| text | instruction, input (if any) and output, each on a line of its own |
| kind, family | the kind of task, and the family (of {families}) it belongs to |
| tests | Python to run after the answer and in its namespace, each piece ending in an assertion |

Tests of the family `files` write and read in the current folder: run them in an empty one.

## Splits

| split | rows | kinds | wordings | rows with input | tests a row | characters of text: median, largest |
|---|---|---|---|---|---|---|
{sizes}

- **train**: for fine-tuning, shuffled.
- **held_out**: the kinds of train with other wordings of the instruction (and other openings, such as "Make a
  function") and other constants: no function or class has a name that occurs in train, and the numbers, words, letters,
  fields and separators of a row are ones that its kind never has in train. Choices ("ascending", "at least"), months,
  units and names of arguments are in both. No answer of train passes, even with the right name put in.
- **new_kinds**: kinds of task that are not in train at all.

In held_out and new_kinds the kinds take turns, so that the first n rows are a fair sample.

Every row's own output passes its tests; the same code with any one constant or choice changed, or with the constants of
another row, does not (`--check` runs them all).

## Kinds

| family | kind | train | held_out | new_kinds | an instruction |
|---|---|---|---|---|---|
{table}

## Licence

Apache-2.0, as the rest of this repository. The rows are made by rules; they hold no text of other people, and nothing
about persons.
"""
