"""What there is to say about each graded cell of a judged notebook.

[heading][about][answer, its output, a grader's comment][check, its points, the verdict's box] … ──► Part, Part, …
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Any

from pefttools.grading import clean

HEADLINE = re.compile(r"<strong>([^<]*)</strong>")


@dataclass
class Part:
    """What there is to say about one graded cell."""

    name: str
    title: str = ""
    score: float = 0.0
    points: float = 0.0
    box: str = ""  # the verdict, as HTML of ours
    said: str = ""  # the points as the box says them: a grader may have changed them since
    blank: bool = False
    answer: Any = None
    comment: str = ""
    section: str = ""  # the heading above it in the chapter
    words: list[str] = field(default_factory=list)


def parts(nb: Any) -> list[Part]:
    """Every graded cell in the order of the chapter, with its answer cell."""
    answers = {}
    heading, parts = "", []
    titles: dict[str, str] = {}
    for cell in nb.cells:
        marks = cell.metadata.get("nbgrader", {})
        if cell.cell_type == "markdown" and not marks and cell.get("id") != "repairs":
            found = re.search(r"^#{1,4} +(.+)$", cell.source, re.M)
            if found and found[1].startswith("Exercise ·"):
                titles[str(cell.get("id", "")).removeprefix("about-")] = found[1].split("·")[1].strip()
            elif found:
                heading = found[1].strip()
        if marks.get("solution"):
            answers[marks.get("grade_id")] = cell
        if not (marks.get("grade") or marks.get("task")):
            continue
        name = str(marks.get("grade_id", ""))
        own = name.removeprefix("check-")
        part = Part(own, points=as_number(marks.get("points")), score=as_number(marks.get("score")), section=heading)
        part.answer = cell if marks.get("solution") else answers.get(own)
        source = part.answer.metadata.get("nbgrader", {}) if part.answer is not None else marks
        part.comment = str(source.get("comment") or marks.get("comment") or "")
        if not marks.get("solution"):
            _read_verdict(part, cell)
        part.title = part.title or titles.get(own) or own.replace("-", " ")
        parts.append(part)
    return parts


def _read_verdict(part: Part, cell: Any) -> None:
    for output in cell.get("outputs", []):
        box = output.get("data", {}).get("text/html") if output.get("output_type") == "execute_result" else None
        if isinstance(box, list):
            box = "".join(box)
        if isinstance(box, str):
            # The check in the student's notebook draws from another seed than grading did.
            part.box = clean.markup(
                box.replace("These inputs to try it yourself:", "Inputs like these to try it yourself:")
            )
            headline = HEADLINE.search(box)
            said = [html.unescape(piece) for piece in headline[1].split(" · ")] if headline else []
            part.title = " · ".join(said[1:-1])
            part.said = said[-1] if said else ""
            part.blank = bool(said) and said[0].startswith("○")
        elif output.get("output_type") == "error":  # a test of nbgrader's own kind: its name only, its text is hidden
            part.words.append(f"The test stopped with {clean.text(str(output.get('ename', 'an error')), 100)}.")


def title(nb: Any) -> str:
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^# +(.+)$", cell.source, re.M)):
            return found[1].strip()
    return ""


def repairs(nb: Any, judged: dict[str, Any]) -> list[str]:
    """What was repaired before grading: from the notebook's metadata, or the cell that grading put on top."""
    found = judged.get("repairs")
    if isinstance(found, list):
        return [str(repair) for repair in found]
    cell = next((cell for cell in nb.cells if cell.get("id") == "repairs" and cell.cell_type == "markdown"), None)
    return re.findall(r"^- (.+)$", cell.source, re.M) if cell is not None else []


def as_number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and value == value else 0.0
