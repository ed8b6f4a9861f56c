"""The bundled data set: small programming tasks with executable tests (see `data/README.md`, made by `lab/tasks`).

    load_data("train")        for fine-tuning
    load_data("held_out")     the same kinds of task, other wordings and other constants
    load_data("new_kinds")    kinds of task that are not in train

A row is instruction, input, output, text, kind, family, tests. The model is given `prompt_of(row)` and has to write
`answer_of(row)`; `row["text"]` is the two joined.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "held_out", "new_kinds")


def load_data(split: str = "train", folder: str | Path = FOLDER) -> Dataset:
    """The rows of a split as a `datasets.Dataset`.

    Raises ValueError for an unknown split, FileNotFoundError when a file is missing, and ValueError when one is damaged
    (its checksum is not the one in `splits.json`).
    """
    rows = load_rows(split, folder)
    from datasets import Dataset, Features, Value
    from datasets import List as ListOf

    text = Value("string")
    features = Features({column: ListOf(text) if column == "tests" else text for column in rows[0]})
    return Dataset.from_list(rows, features=features)


def load_rows(split: str = "train", folder: str | Path = FOLDER) -> list[dict[str, Any]]:
    """The rows of a split as plain dicts; raises as `load_data` does."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}; the splits are {', '.join(SPLITS)}")
    folder = Path(folder)
    index, packed = folder / "splits.json", folder / f"{split}.jsonl.gz"
    remake = "`python -m pefttools.lab.tasks --write` makes the files again"
    for path in (index, packed):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {remake}")
    try:
        expected = json.loads(index.read_text(encoding="utf-8"))["splits"][split]["sha256"]
        raw = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{split} in {folder} cannot be read ({error}); {remake}") from error
    except Exception as error:  # zlib.error is not a subclass of any of the above
        raise ValueError(f"{packed} is damaged ({error}); {remake}") from error
    if hashlib.sha256(raw).hexdigest() != expected:
        raise ValueError(f"{packed} is not the file that {index.name} describes (checksums differ); {remake}")
    return [json.loads(line) for line in raw.decode("utf-8").splitlines()]


def prompt_of(row: Mapping[str, Any]) -> str:
    """What the model is given: the instruction, the input if there is one, each with a line end."""
    given = row.get("input") or ""
    return row["instruction"] + "\n" + (given + "\n" if given else "")


def answer_of(row: Mapping[str, Any]) -> str:
    """What the model has to write: the fenced block of Python."""
    return row["output"]
