"""From kinds to the three splits, their files and the data card."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from pefttools.lab.tasks import KINDS
from pefttools.lab.tasks.core import Kind, Slots, draw_slots, row_of

SEED = 2024
ROWS_PER_KIND = {"train": 120, "held_out": 9, "new_kinds": 12}
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
    part = "train" if split == "train" else "held_out"
    rows: dict[tuple[str, str], tuple[Slots, dict]] = {}
    for _ in range(20 * count):
        slots, wording = draw_slots(kind, rng, part, split)
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
    lines = ["---", "license: apache-2.0", "language: en", "tags: [code, python, synthetic]", "configs:",
             "- config_name: default", "  data_files:"]
    lines += [line for split in splits for line in (f"  - split: {split}", f"    path: {split}.jsonl.gz")]
    lines += ["---", "", "# Small Python tasks", "",
              "Instructions with the Python that answers them, and tests that tell whether an answer is right. The rows are",
              "made by `pefttools/lab/tasks`; this file and its numbers too (`python -m pefttools.lab.tasks --write`,",
              f"seed {seed}). The columns `instruction`, `input`, `output` and `text` are those of",
              "`flytech/python-codes-25k`; no row comes from there.", "",
              "| column | what it holds |", "|---|---|",
              "| instruction | the task in words, with the names and constants the code must use |",
              "| input | an example, or data the task refers to; often empty |",
              "| output | the answer, a fenced block of Python |",
              "| text | instruction, input (if any) and output, each on a line of its own |",
              "| kind, family | the kind of task, and the family it belongs to |",
              "| tests | pieces of Python that run after the answer, in the same namespace, each ending in an assertion |",
              "", "## Splits", "",
              "| split | rows | kinds | wordings | with input | tests a row | characters of text, median and largest |",
              "|---|---|---|---|---|---|---|"]
    for split, rows in splits.items():
        kinds = kinds_of(split)
        wordings = sum(len(kind.held_out) * (split != "train") + len(kind.wordings) * (split != "held_out")
                       for kind in kinds)
        lengths = [len(row["text"]) for row in rows]
        lines.append(f"| {split} | {len(rows):,} | {len(kinds)} | {wordings} | {sum(bool(r['input']) for r in rows):,} | "
                     f"{sum(len(row['tests']) for row in rows) / len(rows):.1f} | {median(lengths):.0f}, {max(lengths)} |")
    lines += ["", "- **train**: for fine-tuning, shuffled.",
              "- **held_out**: the kinds of train, with other wordings of the instruction (and other openings, such as",
              "  \"Make a function\"), and other constants: no name of a function or class occurs in train, and the numbers,",
              "  words, letters, fields and separators of a row are ones that its kind never has in train. (Choices, such",
              "  as \"ascending\" or \"at least\", months and units are in both.) An answer copied from train, even with the",
              "  right name put in, is wrong.",
              "- **new_kinds**: kinds of task that are not in train at all.", "",
              "In held_out and new_kinds the kinds take turns: the first n rows are a fair sample.", "",
              "## Kinds", "", "| family | kind | train | held_out | new_kinds | an instruction |", "|---|---|---|---|---|---|"]
    counts = {split: Counter(row["kind"] for row in rows) for split, rows in splits.items()}
    first = {row["kind"]: row for rows in splits.values() for row in reversed(rows)}
    for family in families:
        for kind in KINDS:
            if kind.family == family:
                shown = first[kind.name]["instruction"].replace("|", "\\|")
                numbers = " | ".join(str(counts[split][kind.name] or "") for split in splits)
                lines.append(f"| {family} | {kind.name} | {numbers} | {shown} |")
    lines += ["", "## Licence", "", "Apache-2.0, as the rest of this repository. The rows are made by rules; they hold no",
              "text of other people, and nothing about persons.", ""]
    return "\n".join(lines)
