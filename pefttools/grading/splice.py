"""Only the answers come out of a submission; everything else comes from the pristine notebook.

    pristine   [title][setup][about][answer ░░░][check][about][answer ░░░][check] …
    submitted  [?][answer ███][??][answer ███ retyped][✂] …
    spliced    [title][setup][about][answer ███][check][about][answer ███][check] …      + what had to be repaired

Metadata, tags, outputs, extra cells and edited checks never arrive. An answer is recognised by nbgrader's `grade_id`,
else by its cell id, else by its first line `# exercise: name`; that survives Colab, VS Code, old formats and copied
cells. Cells that belong to an answer though nothing marks them (the lower half of a split cell; a new cell under a
stub that defines what the stub asks for) are taken with it. Grading runs every hand-in through this first, and the
reader's own copies are carried into a new version of a chapter with it. Nothing here raises on what a submission
contains: an unreadable file is a `BadSubmission`, the rest is repaired.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from pefttools.grading.reading import CELLS_LIMIT, LIMIT, BadSubmission, cell_source, read_notebook

__all__ = [
    "CELLS_LIMIT",
    "CELL_LIMIT",
    "LIMIT",
    "BadSubmission",
    "answer_names",
    "cell_source",
    "check_name",
    "identity",
    "marked",
    "read_notebook",
    "splice",
]

CELL_LIMIT = 2**18  # characters of one answer: a long one has some thousands

MARKER = re.compile(r"\s*#+[ \t]*exercise[ \t]*:[ \t]*([A-Za-z0-9_-]+)", re.I)
DEFINES = re.compile(r"^(?:(?:async[ \t]+)?def|class)[ \t]+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)", re.M)
ASKS = re.compile(r"^(?:(?:async[ \t]+)?def|class)[ \t]+(\w+)|^(\w+)[ \t]*=[ \t]*\.\.\.", re.M)


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
    ours = {cell.get("id"): cell_source(cell) for cell in (previous or pristine)["cells"]}
    names = answer_names(pristine)
    known = {*ours, *names, *(cell.get("id") for cell in pristine["cells"])} - {None}
    given = _Given(submitted, known, names, {_squeeze(text) for text in ours.values()})
    repairs = _Repairs()
    old = {_nbgrader(cell).get("grade_id"): cell_source(cell) for cell in previous["cells"]} if previous else {}
    for cell in result.cells:
        cell.source = cell_source(cell) or ""  # in a file it is a list of lines
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        name = _nbgrader(cell).get("grade_id")
        if name in names:
            if previous is not None and old.get(name) is None and name not in given.where:
                continue  # an exercise that this version of the chapter brought
            answer = _answer(name, given, old.get(name) or cell.source, repairs)
            if answer is not None:
                cell.source = answer
    for name in names:
        check = f"check-{name}"
        if check in ours and check not in given.where:
            repairs.add("The check cell was missing and is put back", name)
        elif check in ours and any(_squeeze(given.texts[n]) != _squeeze(ours[check]) for n in given.where[check]):
            repairs.add("The check cell had been edited and is put back as it was", name)
    extra = len(given.own - given.taken)
    if extra:
        repairs.add(
            f"{extra} code cell{'s' * (extra > 1)} of your own {'is' if extra == 1 else 'are'} left out: "
            "only the answer cells are taken"
        )
    return result, repairs.sentences()


class _Given:
    """A submission's cells with their texts and what each of them is, looked at once."""

    def __init__(self, submitted: Any, known: set[str], names: list[str], pristine: set[str]) -> None:
        cells = submitted.get("cells") if isinstance(submitted, dict) else None
        self.cells: list[Any] = cells if isinstance(cells, list) else []
        self.texts = [cell_source(cell) for cell in self.cells]
        who = [identity(cell, known) for cell in self.cells]
        times: dict[str | None, int] = {}
        for name in who:
            times[name] = times.get(name, 0) + 1
        for n, name in enumerate(who):  # a copy of another answer's cell, with a first line of its own
            other = marked(self.texts[n], names) if name in names and times[name] > 1 else None
            who[n] = other or name
        self.where: dict[str, list[int]] = {}
        for n, name in enumerate(who):
            if name is not None:
                self.where.setdefault(name, []).append(n)
        self.own = {n for n, name in enumerate(who) if name is None and self._is_own(n, pristine)}
        self.taken: set[int] = set()

    def _is_own(self, n: int, pristine: set[str]) -> bool:
        if not isinstance(self.cells[n], dict) or self.cells[n].get("cell_type") != "code":
            return False
        text = _squeeze(self.texts[n])
        return text != "" and text not in pristine

    def belongs(self, last: int, missing: set[str]) -> list[int]:
        """The own cells below cell `last` that go with it: its cut-off end, and what defines a name still missing."""
        found, n = [], last + 1
        while n < len(self.cells) and n in self.own:
            text = self.texts[n] or ""
            cut_off = text.lstrip("\n")[:1] in (" ", "\t") and n == (found[-1] if found else last) + 1
            if cut_off or (missing and len(text) <= CELL_LIMIT and missing & _names(DEFINES, text)):
                found.append(n)
                missing = missing - _names(DEFINES, text)
            n += 1
        return found


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


def _answer(name: str, given: _Given, stub: str, repairs: _Repairs) -> str | None:
    """The source for one answer cell, or None where the pristine stub stays."""
    at = given.where.get(name, [])
    if not at:
        repairs.add("The answer cell is missing: it counts as not written", name)
        return None
    readable = [n for n in at if given.texts[n] is not None]
    if not readable:
        repairs.add("The answer cell has no readable text: it counts as not written", name)
        return None
    if any(given.cells[n].get("cell_type") != "code" for n in readable):
        repairs.add("The answer cell was no longer a code cell: its text is taken as code", name)
    if not any(_nbgrader(given.cells[n]).get("grade_id") == name for n in readable):
        by = "first line" if marked(given.texts[readable[0]], (name,)) else "id"
        repairs.add(f"The answer cell had lost its metadata: it was recognised by its {by}", name)
    # A copied cell begins with the marker again; a cell that was split in two does not: its halves belong together.
    groups: list[list[int]] = []
    for n in readable:
        if groups and not marked(given.texts[n], (name,)):
            groups[-1].append(n)
        else:
            groups.append([n])
    text = {group[0]: "\n".join(_code(given.texts[n], given.cells[n]) for n in group) for group in groups}
    stub_text = _squeeze(stub)
    written = [n for n in text if _squeeze(text[n]) != stub_text]
    joined = len(readable) > 1 and len(groups) == 1
    for group in groups:
        blank = _squeeze(text[group[0]]) == stub_text
        if blank and written:
            continue
        have = set() if blank else _names(DEFINES, text[group[0]][: CELL_LIMIT + 1])
        below = given.belongs(group[-1], _names(ASKS, stub) - have)
        if not below:
            continue
        given.taken.update(below)
        parts = [given.texts[n] or "" for n in below]
        if not blank:
            repairs.add("The answer was split over several cells: its parts were put together", name)
        else:
            repairs.add("The answer stood in a cell of your own under the answer cell: it was taken from there", name)
            written.append(group[0])
        if not blank or not re.search(r"^raise\b", stub, re.M):  # a stub that raises at once would hide what follows
            parts.insert(0, text[group[0]])
        text[group[0]] = "\n".join(parts)
    if not written:
        return None
    checked = given.where.get(f"check-{name}", [len(given.cells)])[0]
    # what the check would have seen when the notebook ran from top to bottom
    before = [n for n in written if n < checked]
    chosen = before[-1] if before else written[0]
    if len(readable) > 1:
        taken = (
            "its parts were put together"
            if joined
            else f"the {'last written one before its check' if before else 'first written one'} was taken"
        )
        repairs.add(f"The answer cell occurs {len(readable)} times: {taken}", name)
    if len(text[chosen]) > CELL_LIMIT:
        repairs.add(f"The answer has more than {CELL_LIMIT:,} characters: it counts as not written", name)
        return None
    return text[chosen]


def _code(text: str | None, cell: Any) -> str:
    """A cell's text as code: without the fence that somebody put around it in a text cell."""
    text = text or ""
    inside = text.strip()
    if cell.get("cell_type") == "code" or not inside.startswith("```") or not inside.endswith("```"):
        return text
    first, _, rest = inside.partition("\n")
    return rest[:-3].rstrip("\n") if rest and "`" not in first[3:] and "```" not in rest[:-3] else text


def _names(pattern: re.Pattern[str], text: str) -> set[str]:
    return {found[1] or found[2] for found in pattern.finditer(text)}


def _squeeze(text: str | None) -> str:
    return "\n".join(line.rstrip() for line in (text or "").strip().split("\n"))
