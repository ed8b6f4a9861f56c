"""Only the answers come out of a submission; everything else comes from the pristine notebook.

    pristine   [title][setup][about][answer ░░░][check][about][answer ░░░][check] …
    submitted  [?][answer ███][??][answer ███ retyped][✂] …
    spliced    [title][setup][about][answer ███][check][about][answer ███][check] …      + what had to be repaired

Metadata, tags, outputs, extra cells and edited checks never arrive. An answer is recognised by nbgrader's `grade_id`,
else by its cell id, else by its first line `# exercise: name`; that survives Colab, VS Code, old formats and copied
cells. Grading runs every hand-in through this first, and the reader's own copies are carried into a new version of a
chapter with it. Nothing here raises on what a submission contains: an unreadable file is a `BadSubmission`, the rest is
repaired.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIMIT = 50 * 2**20  # bytes; a chapter is some 60 kB, one with every figure in it a few MB
CELL_LIMIT = 2**18  # characters of one answer: a long one has some thousands
CELLS_LIMIT = 5_000

MARKER = re.compile(r"\s*#+[ \t]*exercise[ \t]*:[ \t]*([A-Za-z0-9_-]+)", re.I)


class BadSubmission(ValueError):
    """A file from which no answers can be taken; the message is one sentence for the student and the instructor."""


# ---------------------------------------------------------------------------------------------------- reading


def read_notebook(path: str | Path, limit: int = LIMIT) -> dict[str, Any]:
    """The notebook in a file as a dict with a list of cells, whatever its format version.

    Tolerates a byte-order mark, UTF-16, and notebooks of format 3. Raises `BadSubmission` for what is no notebook.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise BadSubmission(f"{path.name} is not a file." if path.exists() else f"{path.name} does not exist.")
        size = path.stat().st_size
        if size > limit:
            raise BadSubmission(
                f"{path.name} has {size / 2**20:.0f} MiB; the limit is {limit / 2**20:.0f} MiB. "
                "Clear the outputs and hand it in again."
            )
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BadSubmission(f"{path.name} cannot be read: {error.strerror or error}.") from error
    if not data.strip():
        raise BadSubmission(f"{path.name} is empty.")
    if data[:4] == b"PK\x03\x04":
        raise BadSubmission(f"{path.name} is a zip archive, not a notebook; unpack it first.")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        found = json.loads(data.decode(encoding, errors="replace"))
    except RecursionError as error:
        raise BadSubmission(f"{path.name} is nested too deeply to be a notebook.") from error
    except ValueError as error:
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise BadSubmission(f"{path.name} is not a notebook: its JSON is broken{where}. Download it again.") from error
    if not isinstance(found, dict):
        raise BadSubmission(f"{path.name} is JSON, but not a notebook.")
    cells = found.get("cells")
    sheets = found.get("worksheets")
    if not isinstance(cells, list) and isinstance(sheets, list):  # format 3 and older
        cells = [
            cell
            for sheet in sheets
            if isinstance(sheet, dict) and isinstance(sheet.get("cells"), list)
            for cell in sheet["cells"]
        ]
    if not isinstance(cells, list):
        raise BadSubmission(f"{path.name} is JSON, but not a notebook: it has no list of cells.")
    if len(cells) > CELLS_LIMIT:
        raise BadSubmission(f"{path.name} has {len(cells)} cells; the limit is {CELLS_LIMIT}.")
    return {**found, "cells": cells}


def cell_source(cell: Any) -> str | None:
    """A cell's text whatever form it has (string, list of lines, format 3's `input`); None if there is none."""
    if not isinstance(cell, dict):
        return None
    source = cell.get("source", cell.get("input"))
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str):
        return None
    source = source.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    return source.encode("utf-8", errors="replace").decode("utf-8")  # half a surrogate pair cannot be written to a file


def _nbgrader(cell: Any) -> dict[str, Any]:
    metadata = cell.get("metadata") if isinstance(cell, dict) else None
    found = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


def answer_names(pristine: Any) -> list[str]:
    """The names of a pristine notebook's answer cells, in order."""
    return [_nbgrader(cell)["grade_id"] for cell in pristine["cells"] if _nbgrader(cell).get("solution")]


def check_name(cell: Any) -> str | None:
    """The exercise that a pristine notebook's cell checks, or None: what the judge takes over from the kernel."""
    name = _nbgrader(cell).get("grade_id", "")
    return name.removeprefix("check-") if _nbgrader(cell).get("grade") and name.startswith("check-") else None


def identity(cell: Any, known: Iterable[str]) -> str | None:
    """The known name that a submitted cell goes by: nbgrader's grade_id, else its id, else its first line; or None."""
    if not isinstance(cell, dict):
        return None
    metadata = cell.get("metadata") if isinstance(cell.get("metadata"), dict) else {}
    for name in (
        _nbgrader(cell).get("grade_id"),
        cell.get("id"),
        metadata.get("id"),
    ):  # Colab keeps the id in the metadata
        if isinstance(name, str) and name in known:
            return name
    return marked(cell_source(cell), known)


def marked(source: str | None, known: Iterable[str]) -> str | None:
    """The known name in a first line `# exercise: name`, or None."""
    found = MARKER.match(source or "")
    return found[1].lower() if found and found[1].lower() in known else None


# ---------------------------------------------------------------------------------------------------- splicing


def splice(pristine: Any, submitted: Any, previous: Any = None) -> tuple[Any, list[str]]:
    """Put the submission's answers into a copy of the pristine notebook.

    `previous` is the pristine notebook that the submission was made from, where that is another version and is known:
    answers left as they stood there count as not written, so that a changed stub reaches the reader, and what the
    chapter itself changed is not taken for the reader's edit.
    Returns the notebook (a NotebookNode without outputs) and, in plain sentences, what was repaired or left out.
    """
    import nbformat

    result = nbformat.from_dict(copy.deepcopy(pristine))
    cells = submitted.get("cells") if isinstance(submitted, dict) else None
    cells = cells if isinstance(cells, list) else []
    ours = {cell.get("id"): cell_source(cell) for cell in (previous or pristine)["cells"]}
    names = answer_names(pristine)
    known = {*ours, *names, *(cell.get("id") for cell in pristine["cells"])} - {None}
    who = [identity(cell, known) for cell in cells]
    repairs = _Repairs()
    old = {name: _source_of(previous, name) for name in names} if previous is not None else {}
    for cell in result.cells:
        cell.source = cell_source(cell) or ""  # in a file it is a list of lines
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        name = _nbgrader(cell).get("grade_id")
        if name in names:
            if previous is not None and old[name] is None and name not in who:
                continue  # an exercise that this version of the chapter brought
            answer = _answer(name, cells, who, old.get(name) or cell.source, repairs)
            if answer is not None:
                cell.source = answer
    for name in names:
        if f"check-{name}" in ours and f"check-{name}" not in who:
            repairs.add("The check cell was missing and is put back", name)
        elif _differs(f"check-{name}", cells, who, ours):
            repairs.add("The check cell had been edited and is put back as it was", name)
    texts = {_squeeze(text) for text in ours.values()}
    extra = sum(
        1
        for cell, name in zip(cells, who, strict=True)
        if name is None
        and isinstance(cell, dict)
        and cell.get("cell_type") == "code"
        and _squeeze(cell_source(cell)) not in texts
        and _squeeze(cell_source(cell))
    )
    if extra:
        repairs.add(
            f"{extra} code cell{'s' * (extra > 1)} of your own {'is' if extra == 1 else 'are'} left out: "
            "only the answer cells are taken"
        )
    return result, repairs.sentences()


class _Repairs:
    """Sentences in the order of their first use, each with the exercises it is about."""

    def __init__(self) -> None:
        self._about: dict[str, list[str]] = {}

    def add(self, sentence: str, name: str | None = None) -> None:
        self._about.setdefault(sentence, []).extend([name] if name else [])

    def sentences(self) -> list[str]:
        return [
            f"{sentence} ({', '.join(names)})." if names else f"{sentence}." for sentence, names in self._about.items()
        ]


def _answer(name: str, cells: list[Any], who: list[str | None], stub: str, repairs: _Repairs) -> str | None:
    """The source for one answer cell, or None where the pristine stub stays."""
    at = [n for n, found in enumerate(who) if found == name]
    if not at:
        repairs.add("The answer cell is missing: it counts as not written", name)
        return None
    unreadable = [n for n in at if cell_source(cells[n]) is None]
    readable = [n for n in at if n not in unreadable]
    if not readable:
        repairs.add("The answer cell has no readable text: it counts as not written", name)
        return None
    if any(cells[n].get("cell_type") != "code" for n in readable):
        repairs.add("The answer cell was no longer a code cell: its text is taken as code", name)
    if not any(_nbgrader(cells[n]).get("grade_id") == name for n in readable):
        by = "first line" if marked(cell_source(cells[readable[0]]), (name,)) else "id"
        repairs.add(f"The answer cell had lost its metadata: it was recognised by its {by}", name)
    # A copied cell begins with the marker again; a cell that was split in two does not: its halves belong together.
    groups: list[list[int]] = []
    for n in readable:
        if groups and not marked(cell_source(cells[n]), (name,)):
            groups[-1].append(n)
        else:
            groups.append([n])
    checked = next((n for n, found in enumerate(who) if found == f"check-{name}"), len(cells))
    text = {group[0]: "\n".join(cell_source(cells[n]) or "" for n in group) for group in groups}
    written = [n for n in text if _squeeze(text[n]) != _squeeze(stub)]
    if not written:
        return None
    before = [
        n for n in written if n < checked
    ]  # what the check would have seen when the notebook ran from top to bottom
    chosen = before[-1] if before else written[0]
    if len(readable) > 1:
        taken = (
            "its parts were put together"
            if len(groups) == 1
            else f"the {'last written one before its check' if before else 'first written one'} was taken"
        )
        repairs.add(f"The answer cell occurs {len(readable)} times: {taken}", name)
    if len(text[chosen]) > CELL_LIMIT:
        repairs.add(f"The answer has more than {CELL_LIMIT:,} characters: it counts as not written", name)
        return None
    return text[chosen]


def _differs(name: str, cells: list[Any], who: list[str | None], ours: dict[str, str | None]) -> bool:
    return name in ours and any(
        _squeeze(cell_source(cell)) != _squeeze(ours[name])
        for cell, found in zip(cells, who, strict=True)
        if found == name
    )


def _source_of(notebook: Any, name: str) -> str | None:
    return next((cell_source(cell) for cell in notebook["cells"] if _nbgrader(cell).get("grade_id") == name), None)


def _squeeze(text: str | None) -> str:
    return "\n".join(line.rstrip() for line in (text or "").strip().split("\n"))
