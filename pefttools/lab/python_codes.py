"""flytech/python-codes-25k from the hub, checked and cut down to a sensible subset; without the hub, the bundled rows.

    found = load(2000)                     announces what was taken, and why
    found.rows                             dicts with instruction, input, output, text: for `encode` and `train`
    found.record()                         name, revision, counts, digest: what belongs into a run's notes

    hub (a pinned revision) ──► columns and types ──► filters ──► n rows, drawn with a seed
      └ silent, refuses, damaged: the bundled rows   └ no code, not Python, too long, seen before: counted, left out

About the data set, from its card and its files as others have published them (it could not be reached from where this
was written): 24,813 different rows, licence MIT, who or what wrote them is not said. The repository holds them twice,
as `.json` and as `.jsonl`, so a plain `load_dataset` gives every row twice; here one file is asked for. `text` joins
the columns by spaces; we join them by line ends, as `prompt_of` and `answer_of` do, so `text` is written anew.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pefttools.lab.data import load_rows

NAME = "flytech/python-codes-25k"
FILE = "python-codes-25k.json"           # the one that source 000 reads
# The head of `main` since May 2024, as three public repositories that use the set have written it down. It was not
# checked against the hub here; a hub that does not know it says so, and load(revision=…) takes another.
REVISION = "0ed98ff2a76c5d133d8c157b814189a5a17ebd20"
COLUMNS = ("instruction", "input", "output", "text")
MAX_CHARS = 1200                         # of a row's text: some 350 tokens of Llama-3's, most rows have fewer
MIN_CODE = 20                            # characters of a program: below, there is nothing to learn


@dataclass
class Codes:
    """What `load` found. `left_out`: reason → rows; `revision`: the commit that was really read, "" for bundled
    rows."""

    rows: list[dict[str, Any]]
    name: str
    revision: str
    why: str
    read: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What has to be known to draw these rows again."""
        return {"name": self.name, "revision": self.revision, "why": self.why, "read": self.read,
                "left_out": self.left_out, "rows": len(self.rows), "sha256": digest(self.rows)}

    def __repr__(self) -> str:
        out = ", ".join(f"{n:,} {reason}" for reason, n in self.left_out.items()) or "none"
        return f"Codes({self.name}{f' at {self.revision[:12]}' if self.revision else ''}: {len(self.rows):,} of " \
               f"{self.read:,} rows; left out: {out}. {self.why})"


def load(n: int = 2000, *, revision: str | None = REVISION, seed: int = 0, max_chars: int = MAX_CHARS,
         fallback: bool = True, quiet: bool = False) -> Codes:
    """`n` sensible rows of the hub's data set, or of the bundled one where the hub gives none.

    revision: a commit, a tag or a branch; None takes the newest, and `Codes.revision` says which that was.
    fallback: False raises what the hub's fault was instead of taking the bundled rows.
    Raises ValueError for n < 1; for a file that is not the data set (a missing column, a value that is no text: such a
    file is never trained on, and never silently replaced).
    """
    if n < 1:
        raise ValueError(f"n={n}: at least one row is needed.")
    try:
        path, commit = fetch(revision)
    except HubFault as fault:
        if not fallback:
            raise
        rows, out = sensible(load_rows("train"), max_chars=max_chars)
        read = len(rows) + sum(out.values())
        found = Codes(draw(rows, n, seed), "the bundled rows", "", f"because {fault}", read, out)
    else:
        every = checked(parsed(path), f"{NAME} ({path.name})")
        rows, out = sensible(every, max_chars=max_chars)
        found = Codes(draw(rows, n, seed), NAME, commit, "as asked", len(every), out)
    if not quiet:
        print(found)
    return found


# ------------------------------------------------------------------------------------------------ from the hub

class HubFault(RuntimeError):
    """The hub did not give the file; the message says why and what would help."""


def fetch(revision: str | None) -> tuple[Path, str]:
    """(the file in the local cache, the commit it belongs to). Raises HubFault."""
    from huggingface_hub import hf_hub_download

    from pefttools.lab.base import hub_fault, reason

    silent = hub_fault()
    try:
        path = Path(hf_hub_download(NAME, FILE, repo_type="dataset", revision=revision, local_files_only=bool(silent)))
    except Exception as error:
        said = reason(error).replace("model", "data set")
        said = f"{silent}, and {NAME} is not in the local cache" if silent else said
        raise HubFault(f"{NAME} at {revision or 'its newest revision'}: {said}") from error
    return path, path.parent.name            # …/snapshots/<commit>/python-codes-25k.json


def parsed(path: Path) -> list[Any]:
    """The rows of a JSON array, or of JSON lines. Raises ValueError for anything else, with what to do."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, it is no JSON ({error}): delete it from the local cache and load "
                         f"again.") from None


def checked(rows: Iterable[Any], where: str = "the data") -> list[dict[str, str]]:
    """The rows, if each has the four columns with texts in them. Raises ValueError: which row, which column, what it
    holds."""
    rows = list(rows)
    if not rows:
        raise ValueError(f"{where} holds no rows.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}, row {number} is {type(row).__name__}, not an object with {', '.join(COLUMNS)}.")
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"{where}, row {number} has no column {missing[0]!r}; it has "
                             f"{', '.join(map(str, row))[:200]}. The schema is {', '.join(COLUMNS)}: is this another data "
                             "set, or another revision of it?")
        for name in COLUMNS:
            if not isinstance(row[name], str):
                raise ValueError(f"{where}, row {number}: {name} is {type(row[name]).__name__} ({row[name]!r:.60}); a text "
                                 "is needed.")
    return rows


# ------------------------------------------------------------------------------------------------ a sensible subset

def code_in(output: str) -> str:
    """The program of an answer: what stands in its first ```python fence, or all of it."""
    from pefttools.lab.evaluation import code_of

    return code_of(output)


def is_python(code: str) -> bool:
    """Whether it parses. (Nothing is run; a null byte or nesting without end is no Python either.)"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")              # of what is in the code, such as an invalid escape
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def sensible(rows: Iterable[Mapping[str, Any]],
             max_chars: int = MAX_CHARS) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(the rows worth training on, {reason: how many were left out}); the first of equal rows stays.

    Left out, in this order: nothing asked or next to no program; longer than `max_chars` in all; no Python; the same
    question with the same answer as a row before, up to white space.
    """
    kept, out, seen = [], Counter(), set()
    for row in rows:
        question, answer = f"{row['instruction']}\n{row['input']}", row["output"]
        code = code_in(answer)
        key = (" ".join(question.split()), " ".join(answer.split()))
        if not row["instruction"].strip() or len(code.strip()) < MIN_CODE:
            out["empty"] += 1
        elif len(question) + len(answer) > max_chars:
            out[f"longer than {max_chars:,} characters"] += 1
        elif not is_python(code):
            out["not Python"] += 1
        elif key in seen:
            out["seen before"] += 1
        else:
            seen.add(key)
            kept.append(as_ours(row))
    return kept, dict(out)


def as_ours(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `text` as our prompt and answer make it: the model is trained on what it will be asked."""
    from pefttools.lab.data import answer_of, prompt_of

    row = dict(row)
    row["text"] = prompt_of(row) + answer_of(row)
    return row


def draw(rows: list[dict[str, Any]], n: int, seed: int) -> list[dict[str, Any]]:
    """`n` of the rows (all, where there are fewer), shuffled with `seed`."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in order[:n]]


def digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """Of the rows' texts, in order: two runs with the same digest saw the same data."""
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps([row["instruction"], row["input"], row["output"]]).encode())
    return content.hexdigest()[:16]
