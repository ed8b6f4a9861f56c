"""What a run says at its end: a table on the terminal, report.html to read, report.csv to work with.

Names of files and messages come from hand-ins: in the page they are escaped and nothing on it acts; in the CSV no cell
is a formula.
"""

from __future__ import annotations

import csv
import html
import io
import time
from pathlib import Path
from typing import Any

from pefttools.grading.classroom import Result, write
from pefttools.grading.exports import harmless
from pefttools.grading.sandbox import UNSAFE

COLUMNS = ("student", "chapter", "status", "score", "max_score", "seconds", "repairs", "limits", "problem", "sandbox",
           "seed", "file", "feedback")
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:.3em .7em;
border-bottom:1px solid #8886}td.n{text-align:right;font-variant-numeric:tabular-nums}ul{margin:0;padding-left:1.1em}
.failed{font-weight:600}.warning{border-left:5px solid #b00;padding:.5em 1em;background:#b001}"""
WORDS = {"graded": "✓ graded", "unchanged": "= as before", "failed": "✗ not graded"}


def table(results: list[Result]) -> str:
    """The rows as text: who, what, score of maximum, seconds; beneath each what was repaired or went wrong."""
    head = ("student", "chapter", "score", "of", "seconds", "")
    rows = [(_plain(r.student), r.chapter or "?", f"{r.score:g}" if r.status != "failed" else "–", f"{r.max_score:g}",
             f"{r.seconds:.1f}", r.status) for r in results]
    width = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(c.ljust(w) if n in (0, 1, 5) else c.rjust(w)
                         for n, (c, w) in enumerate(zip(row, width, strict=True))).rstrip()

    lines = [line(head), "  ".join("─" * w for w in width[:-1])]
    for row, result in zip(rows, results, strict=True):
        lines.append(line(row))
        lines += [f"    {_plain(text)}" for text in _said(result)]
    lines.append(summary(results))
    if any(not r.sandbox for r in results):
        lines.append(f"WARNING: {sum(not r.sandbox for r in results)} of these were {UNSAFE}.")
    return "\n".join(lines)


def summary(results: list[Result]) -> str:
    """ "24 hand-ins, 23 graded, 1 could not be" """
    failed = sum(r.status == "failed" for r in results)
    return (f"{len(results)} hand-ins, {len(results) - failed} graded" + (f", {failed} could not be" if failed else ""))


def _said(result: Result) -> list[str]:
    return [*result.repairs, *(f"Limit: {limit}" for limit in result.limits), *filter(None, [result.problem])]


def _plain(text: str) -> str:
    """Text for a terminal: nothing that moves the cursor or ends the line."""
    return "".join(c if c.isprintable() else " " for c in text)


def write_reports(out: Path, results: list[Result], about: dict[str, Any]) -> None:
    """report.html and report.csv into the grading folder. `about`: what to say of the run, name by name."""
    write(out / "report.html", page(out, results, about))
    write(out / "report.csv", rows(results))


def rows(results: list[Result]) -> str:
    """The results as CSV, a row each."""
    file = io.StringIO()
    made = csv.writer(file, lineterminator="\r\n")
    made.writerow(COLUMNS)
    for r in results:
        known = r.status != "failed"
        made.writerow([harmless(r.student), harmless(r.chapter), r.status, f"{r.score:g}" if known else "",
                       f"{r.max_score:g}" if known else "", f"{r.seconds:.2f}", harmless("\n".join(r.repairs)),
                       harmless("\n".join(r.limits)), harmless(r.problem), "yes" if r.sandbox else "NO",
                       "" if r.seed is None else r.seed, harmless(r.file), harmless(r.feedback)])
    return file.getvalue()


def page(out: Path, results: list[Result], about: dict[str, Any]) -> str:
    """The report as one HTML page that loads nothing and runs nothing."""
    text = lambda value: html.escape(str(value).encode("utf-8", "replace").decode())  # noqa: E731
    unsafe = sum(not r.sandbox for r in results)
    lines = ["<!DOCTYPE html>", "<html lang='en'><head><meta charset='utf-8'>",
             "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">",
             "<meta name='viewport' content='width=device-width, initial-scale=1'>",
             f"<title>Grading report</title><style>{STYLE}</style></head><body>", "<h1>Grading report</h1>",
             f"<p>{text(summary(results))}. {text(time.strftime('%Y-%m-%d %H:%M'))}.</p>"]
    if unsafe:
        lines.append(f"<p class='warning'><strong>{unsafe} of these were {text(UNSAFE)}.</strong></p>")
    lines.append("<p>" + "; ".join(f"{text(name)}: {text(value)}" for name, value in about.items()) + "</p>")
    lines.append("<table><thead><tr>" + "".join(f"<th scope='col'>{name}</th>" for name in (
        "Student", "Chapter", "Result", "Score", "Of", "Seconds", "Repairs, limits, problems", "Sandbox", "Feedback"))
        + "</tr></thead><tbody>")
    for r in results:
        said = "".join(f"<li>{text(item)}</li>" for item in _said(r))
        link = _link(out, r.feedback)
        lines.append(
            f"<tr><th scope='row'>{text(r.student)}</th><td>{text(r.chapter or '?')}</td>"
            f"<td class='{text(r.status)}'>{text(WORDS.get(r.status, r.status))}</td>"
            f"<td class='n'>{'–' if r.status == 'failed' else f'{r.score:g}'}</td><td class='n'>{r.max_score:g}</td>"
            f"<td class='n'>{r.seconds:.1f}</td><td>{f'<ul>{said}</ul>' if said else ''}</td>"
            f"<td>{'yes' if r.sandbox else '<strong>no</strong>'}</td>"
            f"<td>{f'<a href={chr(34)}{text(link)}{chr(34)}>page</a>' if link else ''}</td></tr>")
    return "\n".join([*lines, "</tbody></table></body></html>", ""])


def _link(out: Path, feedback: str) -> str:
    from urllib.parse import quote

    path = Path(feedback)
    return quote(path.relative_to(out).as_posix()) if feedback and path.is_relative_to(out) else ""
