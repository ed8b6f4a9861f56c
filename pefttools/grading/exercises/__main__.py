"""The table of all exercises and questions.

    python -m pefttools.grading.exercises                          on the screen
    python -m pefttools.grading.exercises --to docs/exercises.md   as a page; a test compares it with the registry
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pefttools.grading.exercises import chapters, exercises, questions, title

HEAD = """\
# Exercises and questions

Written by `python -m pefttools.grading.exercises --to docs/exercises.md`. A *mistake* is a wrong implementation that the
check tells apart by name; an *alternative* is another right one, which must pass. `tests/grading/test_exercises.py`
runs every one of them: reference all points, blank "not written yet", each mistake its own message.
"""


def table() -> str:
    """One line an exercise: points, minutes, difficulty, numbers of mistakes and alternatives; sums a chapter."""
    lines = []
    for chapter in chapters():
        own, asked = exercises(chapter), questions(chapter)
        points, minutes = (sum(getattr(entry, name) for entry in (*own, *asked)) for name in ("points", "minutes"))
        lines.append(
            f"{title(chapter)}: {len(own)} exercises, {len(asked)} questions, {points} points, {minutes} minutes"
        )
        lines.append(f"  {'name':<28} {'points':>6} {'min':>4} {'':>4} {'mistakes':>8} {'alternatives':>12}  title")
        for entry in own:
            lines.append(
                f"  {entry.name:<28} {entry.points:>6} {entry.minutes:>4} {entry.stars:>4} {len(entry.mistakes):>8} "
                f"{len(entry.alternatives):>12}  {entry.title}"
            )
        for entry in asked:
            lines.append(
                f"  {entry.name:<28} {entry.points:>6} {entry.minutes:>4} {'?':>4} {len(entry.options):>5} options"
            )
    return "\n".join(lines) or "no exercises yet"


def page() -> str:
    """The same as Markdown, with the sums of the course."""
    every = [entry for chapter in chapters() for entry in exercises(chapter)]
    asked = sum(len(questions(chapter)) for chapter in chapters())
    mistakes, others = (sum(len(getattr(entry, name)) for entry in every) for name in ("mistakes", "alternatives"))
    lines = [HEAD, f"In all: **{len(every)} exercises** with **{mistakes} mistakes** and {others} alternatives, {asked} questions."]
    for chapter in chapters():
        own = exercises(chapter)
        lines += ["", f"## {title(chapter)}", "", f"{len(own)} exercises, {len(questions(chapter))} questions, "
                  f"{sum(e.points for e in (*own, *questions(chapter)))} points.", "",
                  "| exercise | | difficulty | points | minutes | mistakes | alternatives |", "|---|---|---|---|---|---|---|"]
        lines += [f"| `{e.name}` | {e.title} | {e.stars} | {e.points} | {e.minutes} | {len(e.mistakes)} | "
                  f"{len(e.alternatives)} |" for e in own]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pefttools.grading.exercises")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the page here")
    given = parser.parse_args()
    if given.to:
        given.to.write_text(page(), encoding="utf-8")
    else:
        print(table())
