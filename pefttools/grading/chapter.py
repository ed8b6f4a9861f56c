"""A chapter as a notebook: nbgrader's source, with the solutions in, made from the cells of `solutions/NN_name.py`.

    [title][setup] … for each exercise [about][answer][check][hints], for each question [about][answer][check] …

A pure function of the source and the registry of exercises. Cell ids are the exercise's name, or a hash of the cell's
own text, so that a change in one cell does not touch the others.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pefttools.grading.source import HINTS, BuildError, Cell, is_question, parse, regions, registry, validate

# The GitHub repository that badges and Colab installs point to; the one place to change it.
REPO = "peft-course/peft-course"
BRANCH = "main"

SETUP = """\
# On Colab this installs what is missing or too old there; anywhere else it does nothing. It may be run twice. torch and
# numpy are only looked at: another one under a running kernel would break what is loaded.
import importlib.metadata
import importlib.util
import subprocess
import sys


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def older(found, least):
    def numbers(text):
        return [int("0" + "".join(filter(str.isdigit, part))) for part in text.split(".")[:2]]

    return numbers(found) < numbers(least)


if "google.colab" in sys.modules:
    least = {{"transformers": "5.0", "tokenizers": "0.22", "huggingface_hub": "1.0", "datasets": "4.0", "peft": "0.18",
             "accelerate": "1.2", "bitsandbytes": "0.49", "safetensors": "0.5"}}
    wanted = [f"{{name}}>={{number}}" for name, number in least.items() if older(version(name), number)]
    if importlib.util.find_spec("pefttools") is None:
        wanted.append("pefttools @ git+https://github.com/{repo}@{branch}")
    if wanted:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *wanted], check=True)
        importlib.invalidate_caches()
        if stale := [name for name in least if name in sys.modules and f"{{name}}>={{least[name]}}" in wanted]:
            print("Now choose Runtime, Restart session, and run all again. Loaded in an old version:", ", ".join(stale))
    for name, number in {{"torch": "2.6", "numpy": "1.26"}}.items():
        if older(version(name), number):
            print(f"{{name}} {{version(name)}} is older than {{number}}; it is left as it is, and things may fail.")"""


@dataclass
class Chapter:
    """One parsed chapter: `name` is "02_lora", `short` is "lora"; `notebook` is nbgrader's source, solutions in."""

    path: Path
    name: str
    short: str
    head: dict[str, Any]
    notebook: Any
    solutions: list[str] = field(default_factory=list)  # the text of each solution region, for the leak test
    lines: dict[str, int] = field(default_factory=dict)  # cell id → line in the .py file

    @property
    def released(self) -> str:
        """Where the student's notebook goes, relative to the course's root."""
        return f"course/{self.name}/{self.short}.ipynb"


def read_chapter(path: str | Path, entries: dict[str, Any] | None = None) -> Chapter:
    """Parse `solutions/NN_name.py` and build nbgrader's source notebook from it.

    `entries` are the chapter's exercises and questions by name (default: the registry's). Raises `BuildError` naming
    file and line for whatever would give students a broken chapter.
    """
    path = Path(path)
    found = re.fullmatch(r"(\d\d)_([a-z][a-z0-9_]*)", path.stem)
    if not found:
        raise BuildError(f"{path.name}:1: a chapter's file is named NN_name.py, such as 02_lora.py")
    head, cells = parse(path)
    chapter = Chapter(path=path, name=path.stem, short=found[2], head=head, notebook=None)
    entries = registry(path.stem) if entries is None else entries
    validate(path, cells, entries)
    _assemble(chapter, cells, entries)
    return chapter


def _assemble(chapter: Chapter, cells: list[Cell], entries: dict[str, Any]) -> None:
    """Fill `chapter.notebook`, `.solutions` and `.lines` from the checked cells."""
    out: list[dict[str, Any]] = []
    ids: dict[str, int] = {}

    def put(kind: str, text: str, cell: Cell | None, slug: str | None = None, nbgrader: dict | None = None) -> None:
        if slug is None:
            slug = f"{'text' if kind == 'markdown' else 'code'}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        ids[slug] = ids.get(slug, 0) + 1
        slug = slug if ids[slug] == 1 else f"{slug}-{ids[slug]}"
        metadata: dict[str, Any] = {}
        if cell is not None and cell.tags:
            metadata["tags"] = cell.tags
        if nbgrader is not None:
            metadata["nbgrader"] = {"schema_version": 3, "task": False, **nbgrader}
        made = {"cell_type": kind, "id": slug, "metadata": metadata, "source": text}
        if kind == "code":
            made |= {"execution_count": None, "outputs": []}
        chapter.lines[slug] = cell.line if cell is not None else 1
        out.append(made)

    def put_answer(name: str, code: str, cell: Cell) -> None:
        chapter.solutions.extend(regions(Cell("code", code, {}, [], cell.line), chapter.path))
        put(
            "code",
            f"# exercise: {name}\n{code}",
            cell,
            name,
            {"grade": False, "grade_id": name, "locked": False, "solution": True} | by_hand(name),
        )

    def by_hand(name: str) -> dict[str, Any]:
        """nbgrader takes an answer cell that is graded itself for one that somebody has to read."""
        points = getattr(entries[name], "by_hand", 0)
        return {"grade": True, "points": points} if points else {}

    def put_check(name: str, code: str, cell: Cell) -> None:
        put(
            "code",
            code,
            cell,
            f"check-{name}",
            {
                "grade": True,
                "grade_id": f"check-{name}",
                "locked": True,
                "points": entries[name].points,
                "solution": False,
            },
        )

    put("markdown", _title(chapter, entries), None, "title")
    put("code", SETUP.format(repo=REPO, branch=BRANCH), None, "setup")
    number = 0
    hints: dict[str, int] = {}
    for cell in cells:
        mark = cell.mark
        name = cell.marks.get(mark, "") if mark else ""
        if mark is None:
            if cell.text.strip():
                put(cell.kind, cell.text, cell)
        elif mark == "exercise" and cell.kind == "markdown":
            put("markdown", f"{_heading(entries[name])}\n\n{cell.text}", cell, f"about-{name}")
        elif mark == "exercise":
            put_answer(name, cell.text, cell)
        elif mark == "check":
            put_check(name, cell.text, cell)
        elif mark == "hint":
            hints[name] = hints.get(name, 0) + 1
            summary = f"<summary>Hint {hints[name]}: {HINTS[cell.marks['level']]}</summary>"
            text = f"<details>{summary}\n\n{cell.text}\n\n</details>"
            if out[-1]["id"] == f"hints-{name}":  # consecutive hints share a cell: a ladder, not a pile
                out[-1]["source"] += f"\n\n{text}"
            else:
                put("markdown", text, cell, f"hints-{name}")
        else:
            number += 1
            entry, variable = entries[name], name.replace("-", "_")
            put("markdown", _question(number, entry), cell, f"about-{name}")
            letters = _either([f'"{letter}"' for letter in sorted(entry.options)])
            put_answer(name, f'### BEGIN SOLUTION {letters}\n{variable} = "{entry.right}"\n### END SOLUTION', cell)
            put_check(name, f'check("{name}", {variable})', cell)
    chapter.notebook = {"cells": out, "metadata": _metadata(chapter.head), "nbformat": 4, "nbformat_minor": 5}


def _metadata(head: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "colab": {"provenance": [], "toc_visible": True},
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    if head.get("gpu"):  # Colab then offers a T4 by itself
        metadata["accelerator"] = "GPU"
        metadata["colab"]["gpuType"] = "T4"
    return metadata


def _title(chapter: Chapter, entries: dict[str, Any]) -> str:
    """Badge, title, and one line of facts; what the reader will be able to do is the author's next cell."""
    link = f"https://colab.research.google.com/github/{REPO}/blob/{BRANCH}/{chapter.released}"
    badge = f"[![Open this chapter in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
    facts = []
    if chapter.head.get("minutes"):
        facts.append(f"about {chapter.head['minutes']} minutes")
    exercises = sum(not is_question(e) for e in entries.values())
    parts = [_count(exercises, "exercise"), _count(len(entries) - exercises, "question")]
    facts.append(
        f"{_count(sum(e.points + getattr(e, 'by_hand', 0) for e in entries.values()), 'point')} in {' and '.join(p for p in parts if p[0] != '0')}"
    )
    needs = chapter.head.get("needs") or []
    needs = needs if isinstance(needs, list) else re.split(r"[,\s]+", str(needs).strip())
    if needs:
        links = [f"[{n}](../{n}/{n.split('_', 1)[-1]}.ipynb)" for n in needs]
        facts.append(f"needs {', '.join(links)}")
    line = " · ".join(facts)
    return f"{badge}\n\n# {chapter.name[:2]} · {chapter.head['title']}\n\n{line[:1].upper()}{line[1:]}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _heading(entry: Any) -> str:
    by_hand = f", and {entry.by_hand} by hand" if getattr(entry, "by_hand", 0) else ""
    return f"### Exercise · {entry.title} · {entry.stars} · {entry.minutes} min · {_count(entry.points, 'point')}{by_hand}"


def _question(number: int, entry: Any) -> str:
    return f"### Question {number} · {_count(entry.points, 'point')}\n\n{entry.markdown()}"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def dumps(notebook: Any) -> str:
    """A notebook's text: byte for byte what nbgrader's own exporter would write (sorted keys, newline at the end)."""
    import nbformat

    return nbformat.writes(nbformat.from_dict(notebook), version=4).rstrip("\n") + "\n"
