"""A chapter's source as instructors write it: a py:percent file (jupytext) with light markers on its cells.

    # ---
    # title: LoRA                                  the head, YAML: title, minutes, needs, gpu
    # ---
    # %% [markdown] exercise="lora-forward"        what to write; the builder puts the heading above
    # %% exercise="lora-forward"                   the answer cell, with ### BEGIN SOLUTION … ### END SOLUTION
    # %% check="lora-forward"                      ends in check("lora-forward", …): that line's value is the score
    # %% [markdown] hint="lora-forward" level="nudge"      nudge, shape or code: a drop-down
    # %% question="lora-q-scale"                   empty: text, options, answer cell and check come from the Question
    # %% tags=["gpu"]                              any other cell is copied as it is

`parse` reads it, `validate` refuses, with file and line, whatever would give students a broken chapter.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pefttools.grading.question import Question

HINTS = {"nudge": "a nudge", "shape": "the shapes", "code": "almost the code"}
MARKERS = ("exercise", "check", "hint", "question")


class BuildError(ValueError):
    """A chapter that cannot be built. The message starts with `file:line:`."""


@dataclass
class Cell:
    """One cell of a chapter's source."""

    kind: str  # "code" or "markdown"
    text: str
    marks: dict[str, str]  # one of MARKERS, and "level"
    tags: list[str]
    line: int

    @property
    def mark(self) -> str | None:
        """Which of MARKERS it carries."""
        return next((mark for mark in MARKERS if mark in self.marks), None)


def registry(chapter: str) -> dict[str, Any]:
    """The exercises and questions of one chapter, by name, from `pefttools.grading.exercises`."""
    from pefttools.grading.exercises import tasks

    return {task.name: task for task in tasks(chapter)}


def is_question(entry: Any) -> bool:
    """Whether an entry of the registry is multiple choice."""
    return isinstance(entry, Question)


def parse(path: Path) -> tuple[dict[str, Any], list[Cell]]:
    """Head and cells of a py:percent file, each cell with its line."""
    import jupytext
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        notebook = jupytext.reads(text, fmt="py:percent")
    except Exception as error:
        raise BuildError(f"{path.name}:1: jupytext cannot read this file as py:percent: {error}") from error
    raw = list(notebook.cells)
    head: dict[str, Any] = {}
    if raw and raw[0].cell_type == "raw" and raw[0].source.startswith("---"):
        try:
            head = yaml.safe_load(raw.pop(0).source.strip().strip("-")) or {}
        except yaml.YAMLError as error:
            raise BuildError(f"{path.name}:1: the head between '# ---' lines is not YAML: {error}") from error
    if not isinstance(head, dict) or not head.get("title"):
        raise BuildError(f"{path.name}:1: the head between '# ---' lines needs a title (and minutes, needs)")
    starts = [n for n, line in enumerate(text.splitlines(), 1) if re.match(r"# ?%%(\s|$)", line)]
    if len(starts) < len(raw):  # jupytext opens a first cell by itself when code stands above the first marker
        starts = [1, *starts]
    cells = []
    for n, cell in enumerate(raw):
        line = starts[n] if n < len(starts) else starts[-1]
        if cell.cell_type not in ("code", "markdown"):
            raise BuildError(f"{path.name}:{line}: a {cell.cell_type} cell; only code and markdown are used")
        marks = {key: cell.metadata[key] for key in (*MARKERS, "level") if key in cell.metadata}
        unknown = set(cell.metadata) - {*MARKERS, "level", "tags", "lines_to_next_cell", "name", "title"}
        if unknown:
            raise BuildError(
                f"{path.name}:{line}: unknown marker {sorted(unknown)[0]!r}; "
                f"known are {', '.join(MARKERS)}, level, tags"
            )
        if len([m for m in marks if m in MARKERS]) > 1:
            raise BuildError(
                f"{path.name}:{line}: one cell, one marker; this one has {', '.join(m for m in marks if m in MARKERS)}"
            )
        tags = cell.metadata.get("tags", [])
        if not isinstance(tags, list):
            raise BuildError(f'{path.name}:{line}: tags are a list, tags=["gpu"]; got {tags!r}')
        cells.append(Cell(cell.cell_type, cell.source, marks, list(tags), line))
    return head, cells


def validate(path: Path, cells: list[Cell], entries: dict[str, Any]) -> None:
    """Raise `BuildError` for the first thing that is wrong with a chapter's markers."""

    def fail(cell: Cell | None, message: str) -> None:
        raise BuildError(f"{path.name}:{cell.line if cell else 1}: {message}")

    known = ", ".join(sorted(entries)) or "none yet"
    seen: dict[str, dict[str, Cell]] = {}  # name → {"text" | "exercise" | "check" | "question": cell}
    for cell in cells:
        mark = cell.mark
        regions(cell, path)
        if mark is None:
            if "BEGIN SOLUTION" in cell.text and cell.kind == "code":
                fail(cell, "a solution in a cell with no exercise marker; students would never get a stub for it")
            continue
        name = cell.marks[mark]
        if name not in entries:
            fail(cell, f"{mark}={name!r} is not an exercise or question of this chapter; known are: {known}")
        role = "text" if mark == "exercise" and cell.kind == "markdown" else mark
        place = seen.setdefault(name, {})
        if mark == "hint":
            if cell.kind != "markdown":
                fail(cell, f"the hint for {name!r} must be a markdown cell")
            if cell.marks.get("level") not in HINTS:
                fail(cell, f"the hint for {name!r} needs a level: {', '.join(HINTS)}")
            continue
        if role in place:
            fail(cell, f"{mark}={name!r} occurs twice; first in line {place[role].line}")
        if (mark == "question") != is_question(entries[name]):
            fail(
                cell,
                f"{name!r} is {'a question' if is_question(entries[name]) else 'an exercise'}; write "
                f"{'question' if is_question(entries[name]) else 'exercise'}={name!r}",
            )
        if mark == "question" and cell.text.strip():
            fail(cell, f"the question cell of {name!r} stays empty; its text comes from the Question")
        if role == "exercise" and not regions(cell, path):
            fail(cell, f"the answer cell of {name!r} has no ### BEGIN SOLUTION … ### END SOLUTION")
        if role == "check":
            if "exercise" not in place:
                fail(cell, f"the check of {name!r} stands before its exercise cell")
            if not ends_in_check(cell.text, name):
                fail(
                    cell,
                    f'the check cell of {name!r} must end in check("{name}", …): nbgrader reads that line as the score',
                )
        place[role] = cell
    for name, place in seen.items():
        if "exercise" in place and "check" not in place:
            fail(place["exercise"], f'exercise {name!r} has no check cell (# %% check="{name}")')
        if "text" in place and "exercise" not in place:
            fail(place["text"], f'exercise {name!r} is described but has no answer cell (# %% exercise="{name}")')
        if "text" not in place and "exercise" in place:
            fail(place["exercise"], f'exercise {name!r} has no description (# %% [markdown] exercise="{name}")')
    for name, entry in entries.items():
        if not {"exercise", "question"} & set(seen.get(name, {})):
            fail(
                None,
                f"{'question' if is_question(entry) else 'exercise'} {name!r} is registered for this chapter "
                "but never used in it",
            )


def ends_in_check(code: str, name: str) -> bool:
    """Whether the last statement of a cell is `check("name", …)`: any other value there would count as full marks."""
    try:
        last = ast.parse(code).body[-1]
    except (SyntaxError, IndexError):
        return False
    call = last.value if isinstance(last, ast.Expr) else None
    return (
        isinstance(call, ast.Call)
        and getattr(call.func, "id", getattr(call.func, "attr", None)) == "check"
        and bool(call.args)
        and isinstance(call.args[0], ast.Constant)
        and call.args[0].value == name
        and not code.rstrip().endswith(";")  # IPython shows nothing for a line ending in ';', and nothing is full marks
    )


def regions(cell: Cell, path: Path) -> list[str]:
    """The text of each BEGIN/END SOLUTION region of a cell; `BuildError` when they do not pair up."""
    found, start = [], None
    lines = cell.text.split("\n")
    for n, line in enumerate(lines):
        if "BEGIN SOLUTION" in line:
            if start is not None:
                raise BuildError(
                    f"{path.name}:{cell.line + n + 1}: BEGIN SOLUTION inside a solution that has not ended"
                )
            start = n
        elif "END SOLUTION" in line:
            if start is None:
                raise BuildError(f"{path.name}:{cell.line + n + 1}: END SOLUTION without BEGIN SOLUTION")
            found.append("\n".join(lines[start + 1 : n]))
            start = None
    if start is not None:
        raise BuildError(f"{path.name}:{cell.line + start + 1}: BEGIN SOLUTION without END SOLUTION")
    return found
