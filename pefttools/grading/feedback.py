"""One page of feedback for one student: what was expected, what came, what it looks like, what to read.

    judged notebook ──nbgrader: GetGrades──► page(nb, resources) ──► feedback/STUDENT/CHAPTER/name.html

nbgrader's own page is the notebook run through a template that loads scripts from the web and keeps whatever HTML the
student wrote. This one is written from data: the points in the gradebook, the verdict's box, the answer's text, its
output. It is an nbconvert exporter set as `c.GenerateFeedback.exporter_class`, so that `nbgrader generate_feedback`,
formgrader's button and `pefttools grade` all write this page, and none of them the other.

Nothing of a check cell is shown but the judge's verdict: neither its source nor a traceback through it, so hidden tests
stay hidden. Nothing on the page acts (see clean.py), and it is one file that needs no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbconvert.exporters import Exporter
from traitlets import default

from pefttools.grading import clean
from pefttools.grading.parts import Part, as_number, parts, repairs, title

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SHOWN = 40_000  # characters of one answer
OUTPUTS = 40
PICTURES = 16 * 2**20  # characters of all pictures on a page


class FeedbackExporter(Exporter):
    """nbconvert's way to `page`."""

    output_mimetype = "text/html"

    @default("file_extension")
    def _file_extension_default(self) -> str:
        return ".html"

    def from_notebook_node(self, nb: Any, resources: Any = None, **kw: Any) -> tuple[str, Any]:
        """The page of a judged notebook, after nbgrader's preprocessors have put the gradebook's points into it."""
        nb, resources = super().from_notebook_node(nb, resources, **kw)
        return page(nb, resources.get("nbgrader", {})), resources


def page(nb: Any, about: dict[str, Any] | None = None) -> str:
    """The whole page. `about` is nbgrader's: student, assignment, score, max_score, late_penalty."""
    about = about or {}
    graded = parts(nb)
    judged = nb.metadata.get("pefttools") if isinstance(nb.metadata.get("pefttools"), dict) else {}
    score = about.get("score", sum(part.score for part in graded))
    most = about.get("max_score", sum(part.points for part in graded))
    chapter, student = str(about.get("assignment", "")), str(about.get("student", ""))
    name = title(nb) or chapter
    penalty = about.get("late_penalty") or 0
    late = f" after {penalty:g} points off for being late" if penalty else ""
    left = [PICTURES]
    body = [
        f"<header><h1>{clean.text(name, 200)}</h1><p class='quiet'>Feedback for {clean.text(student, 200)}"
        f"{f' · {clean.text(chapter, 200)}' if chapter and chapter != name else ''}</p>"
        f"<p class='total'><strong>{_number(score)} of {_number(most)} points</strong>{late}</p></header>",
        "<main>",
        *_notes(nb, judged),
        _summary(graded),
        *(_section(number, part, left) for number, part in enumerate(graded, 1)),
        "</main>",
    ]
    return (
        f"<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        "<meta name='referrer' content='no-referrer'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{clean.text(f'Feedback · {name} · {student}', 300)}</title>\n<style>\n{_css()}</style>\n"
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _css() -> str:
    return (Path(__file__).with_name("feedback.css")).read_text(encoding="utf-8")


def _notes(nb: Any, judged: dict[str, Any]) -> list[str]:
    limits = [
        f"{hit.get('cell', 'the notebook')}: {hit.get('words') or hit.get('limit', '')}"
        if isinstance(hit, dict)
        else str(hit)
        for hit in judged.get("limits") or judged.get("limits_hit") or []
    ]
    made = [
        _note("Repaired before grading", repairs(nb, judged)),
        _note("Limits that were reached", limits),
    ]
    if judged.get("sandbox") is False:
        made.append(_note("How this was graded", ["The code was run without a sandbox (--unsafe-no-sandbox)."]))
    return [note for note in made if note]


def _note(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{clean.text(line, 1000)}</li>" for line in lines[:50])
    return f"<aside class='note' aria-label='{title}'><h2>{title}</h2><ul>{items}</ul></aside>"


def _summary(parts: list[Part]) -> str:
    rows = "".join(
        f"<tr><th scope='row'><a href='#part-{number}'>{clean.text(part.title, 200)}</a></th><td>{_word(part)}</td>"
        f"<td class='number'>{_number(part.score)} of {_number(part.points)}</td></tr>"
        for number, part in enumerate(parts, 1)
    )
    head = "<tr><th scope='col'>Exercise</th><th scope='col'>Result</th><th scope='col' class='number'>Points</th></tr>"
    return f"<table><caption>Summary</caption><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _section(number: int, part: Part, left: list[int]) -> str:
    points = f"{_number(part.score)} of {_number(part.points)}"
    lines = [
        f"<section aria-labelledby='part-{number}'><h2 id='part-{number}'>{clean.text(part.title, 200)}</h2>",
        "" if part.box and part.said.startswith(f"{points} point") else f"<p>{_word(part)} · {points} points</p>",
        part.box,
        *(f"<p>{words}</p>" for words in part.words),
    ]
    if part.score < part.points and part.section:
        lines.append(
            f"<p>To read again: the chapter’s section “{clean.text(part.section, 200)}”, down to this exercise.</p>"
        )
    if part.comment:
        lines.append(f"<h3>Comment</h3><div>{clean.markdown(part.comment)}</div>")
    if part.answer is not None and not part.blank:
        lines.append("<h3>Your answer</h3>")
        if part.answer.cell_type == "code":
            code = clean.text(part.answer.source, SHOWN)
            lines.append(f"<pre class='code' tabindex='0' aria-label='Your code'><code>{code}</code></pre>")
            lines += _outputs(part, left)
        else:
            lines.append(f"<div>{clean.markdown(part.answer.source)}</div>")
    return "\n".join(line for line in [*lines, "</section>"] if line)


def _outputs(part: Part, left: list[int]) -> list[str]:
    made = []
    for output in list(part.answer.get("outputs", []))[:OUTPUTS]:
        kind, data = output.get("output_type"), output.get("data", {})
        if kind == "stream":
            made.append(_output(output.get("text"), "What it printed"))
        elif kind == "error":
            lines = output.get("traceback") or [f"{output.get('ename', '')}: {output.get('evalue', '')}"]
            made.append(_output("\n".join(str(line) for line in lines), "The error it ended with", " error"))
        elif isinstance(data, dict) and "image/png" in data:
            left[0] -= len(data["image/png"])
            words = f"A picture that your code for “{part.title}” drew"
            made.append(clean.picture(data["image/png"] if left[0] > 0 else None, words))
        elif isinstance(data, dict) and "text/plain" in data:
            made.append(_output(data["text/plain"], "What it gave"))
    return ["<h3>What came of running it</h3>", *made] if made else []


def _output(text: Any, label: str, more: str = "") -> str:
    return f"<pre class='output{more}' tabindex='0' aria-label='{label}'>{clean.text(text)}</pre>"


def _word(part: Part) -> str:
    """The result in a mark, a word and a colour."""
    if part.points and part.score >= part.points:
        look = "full", "✓ Passed"
    elif part.score > 0:
        look = "part", "◐ In part"
    elif part.blank:
        look = "none", "○ Not written"
    else:
        look = "none", "✗ Not yet"
    return f"<span class='word {look[0]}'>{look[1]}</span>"


def _number(value: Any) -> str:
    return f"{round(as_number(value), 2):g}"
