"""The gradebook in the forms that learning platforms import.

    nbgrader export                                                        grades.csv, nbgrader's own form
    nbgrader export --exporter=pefttools.grading.exports.CanvasExport      all chapters in one file, a column each
    nbgrader export --exporter=pefttools.grading.exports.MoodleExport --assignment '["02_lora"]'    one file a chapter

    gradebook.db ─points, penalties, comments─┐
                                              ├─► rows ─► CSV in which no cell is a formula
    received/people.json ─names, numbers──────┘

Canvas' form: `Student, ID, SIS User ID, SIS Login ID, Section`, a column for each assignment, points possible in the
first row. Moodle's is its grading worksheet: `Identifier, Full name, Email address, Grade, Feedback comments`. Who has
no graded hand-in gets an empty cell, which both platforms leave as it is there, not a zero.

Names and texts come from people; a cell that a spreadsheet would run ("=cmd|…") is made text with an apostrophe.
"""

from __future__ import annotations

import csv
import html
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbgrader.api import MissingEntry
from nbgrader.plugins import ExportPlugin
from sqlalchemy.engine import make_url
from traitlets import Dict, Unicode

from pefttools.grading.roster import read_people

STARTS = "=+-@\t\r\n|%＝＋－＠"  # what spreadsheets take for the beginning of a formula, full-width forms included
COMMENT = 2_000


def harmless(value: Any) -> str:
    """A text cell that no spreadsheet runs."""
    text = "" if value is None else str(value)
    text = "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
    return (
        f"'{text}"
        if text.lstrip(" \u00a0\u3000\ufeff'\"")[:1] in tuple(STARTS) or text[:1] in tuple("\t\n\r")
        else text
    )


def number(value: float | None) -> str:
    """A grade as both platforms read it: no thousands separator, a point, no needless digits."""
    return "" if value is None else f"{round(float(value), 4):.4f}".rstrip("0").rstrip(".")


def score(gradebook: Any, chapter: str, student: str) -> float | None:
    """The points of a graded hand-in less nbgrader's late penalty, at least 0; None where there is none."""
    try:
        found = gradebook.find_submission(chapter, student)
    except MissingEntry:
        return None
    return max(0.0, found.score - (found.late_submission_penalty or 0.0))


def canvas(
    gradebook: Any,
    people: dict[str, Any] | None = None,
    chapters: Iterable[str] | None = None,
    assignments: dict[str, str] | None = None,
    students: Iterable[str] | None = None,
) -> str:
    """Canvas' gradebook form. `assignments` says what Canvas calls a chapter: {"02_lora": "LoRA (4711)"}.

    A column whose name Canvas does not know becomes a new assignment there.
    """
    every = _chapters(gradebook, chapters)
    names = [(assignments or {}).get(chapter.name, chapter.name) for chapter in every]
    rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *map(harmless, names)]]
    rows.append(["    Points Possible", "", "", "", "", *(number(chapter.max_score) for chapter in every)])
    for student in _students(gradebook, students):
        who = _person(people, student.id)
        sortable = ", ".join(part for part in (student.last_name, student.first_name) if part)
        login = "" if who.get("lms") == "canvas" else student.id
        rows.append(
            [
                harmless(sortable or who.get("name") or student.id),
                _digits(_latest(who)) if who.get("lms") == "canvas" else "",
                "",
                harmless(login),
                "",
                *(number(score(gradebook, chapter.name, student.id)) for chapter in every),
            ]
        )
    return _csv(rows)


def moodle(
    gradebook: Any, chapter: str, people: dict[str, Any] | None = None, students: Iterable[str] | None = None
) -> str:
    """Moodle's grading worksheet for one chapter."""
    rows = [["Identifier", "Full name", "Email address", "Grade", "Feedback comments"]]
    for student in _students(gradebook, students):
        who = _person(people, student.id)
        participant = _digits(who.get("ids", {}).get(chapter, "")) if who.get("lms") == "moodle" else ""
        full = (
            " ".join(part for part in (student.first_name, student.last_name) if part) or who.get("name") or student.id
        )
        points = score(gradebook, chapter, student.id)
        rows.append(
            [
                f"Participant {participant}" if participant else "",
                harmless(full),
                harmless(student.email),
                number(points),
                harmless(comments(gradebook, chapter, student.id)) if points is not None else "",
            ]
        )
    return _csv(rows)


def comments(gradebook: Any, chapter: str, student: str) -> str:
    """What goes into Moodle's comment: points per exercise, and what a grader wrote. Moodle shows it as HTML."""
    lines = []
    for notebook in gradebook.find_submission(chapter, student).notebooks:
        lines += [
            f"{html.escape(grade.name.removeprefix('check-'))}: {number(grade.score)} of {number(grade.max_score)}"
            for grade in sorted(notebook.grades, key=lambda grade: grade.name)
        ]
        lines += [html.escape(said.comment)[:COMMENT] for said in notebook.comments if said.comment]
    return "<br>".join(lines)


def write_exports(gradebook: Any, out: str | Path, assignments: dict[str, str] | None = None) -> list[Path]:
    """`grades-canvas.csv` and one `grades-moodle-CHAPTER.csv` for each chapter, into the grading folder; the paths."""
    out = Path(out)
    people = read_people(out / "received" / "people.json")
    made = [_write(out / "grades-canvas.csv", canvas(gradebook, people, assignments=assignments))]
    for chapter in _chapters(gradebook, None):
        made.append(_write(out / f"grades-moodle-{chapter.name}.csv", moodle(gradebook, chapter.name, people)))
    return made


# -------------------------------------------------------------------------------------------------- nbgrader's plugins


class _PlatformExport(ExportPlugin):
    people = Unicode("", help="the grading folder's people.json; by default beside an SQLite gradebook").tag(
        config=True
    )

    def _people(self) -> dict[str, Any]:
        if self.people:
            return read_people(Path(self.people))
        url = make_url(getattr(getattr(self.parent, "coursedir", None), "db_url", "") or "sqlite://")
        beside = Path(url.database).parent if url.drivername.startswith("sqlite") and url.database else Path()
        return read_people(beside / "received" / "people.json")


class CanvasExport(_PlatformExport):
    """`nbgrader export --exporter=pefttools.grading.exports.CanvasExport`"""

    assignments = Dict({}, help="what Canvas calls a chapter: {'02_lora': 'LoRA (4711)'}").tag(config=True)

    def export(self, gradebook: Any) -> None:
        text = canvas(gradebook, self._people(), self.assignment or None, self.assignments, self.student or None)
        self.log.info("Wrote %s", _write(Path(self.to or "grades-canvas.csv"), text))


class MoodleExport(_PlatformExport):
    """`nbgrader export --exporter=pefttools.grading.exports.MoodleExport`: a file for each chapter."""

    def export(self, gradebook: Any) -> None:
        every = _chapters(gradebook, self.assignment or None)
        for chapter in every:
            to = Path(self.to or "grades-moodle.csv")
            if len(every) > 1 or not self.to:
                to = to.with_name(f"{to.stem}-{chapter.name}{to.suffix or '.csv'}")
            self.log.info("Wrote %s", _write(to, moodle(gradebook, chapter.name, self._people(), self.student or None)))


# ---------------------------------------------------------------------------------------------------- helpers


def _chapters(gradebook: Any, chosen: Iterable[str] | None) -> list[Any]:
    wanted = None if chosen is None else set(map(str, chosen))
    return sorted((a for a in gradebook.assignments if wanted is None or a.name in wanted), key=lambda a: a.name)


def _students(gradebook: Any, chosen: Iterable[str] | None) -> list[Any]:
    wanted = None if chosen is None else set(map(str, chosen))
    return sorted((s for s in gradebook.students if wanted is None or s.id in wanted), key=lambda s: s.id)


def _person(people: dict[str, Any] | None, student: str) -> dict[str, Any]:
    return next((entry for entry in (people or {}).values() if entry["student"] == student), {})


def _latest(who: dict[str, Any]) -> str:
    return next(reversed(list(who.get("ids", {}).values())), "")


def _digits(value: Any) -> str:
    return str(value) if str(value).isdigit() else ""


def _csv(rows: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\r\n").writerows(rows)
    return file.getvalue()


def _write(path: Path, text: str) -> Path:
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8", newline="")
    os.replace(new, path)
    return path
