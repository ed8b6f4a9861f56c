"""From a chapter's one source to the notebooks that students, instructors and nbgrader open.

    solutions/02_lora.py ──parse──► nbgrader source ──release──► course/02_lora/lora.ipynb      committed, no solutions
                                         ├──► grading/source/02_lora/lora.ipynb                 what nbgrader calls "source"
                                         └──► solutions/02_lora.ipynb                           the instructor's, opened or executed

A chapter is a py:percent file (jupytext) with a YAML head (`title`, `minutes`, `needs`, `gpu`) and light markers on its cells:

    # %% [markdown] exercise="lora-forward"        what to write; the builder puts the heading above
    # %% exercise="lora-forward"                   the answer cell, with ### BEGIN SOLUTION … ### END SOLUTION
    # %% check="lora-forward"                      ends in check("lora-forward", …): that line's value is the score
    # %% [markdown] hint="lora-forward" level="nudge"      nudge, shape or code: a drop-down
    # %% question="lora-q-scale"                   empty: text, options, answer cell and check come from the Question

The build is a pure function of the source and the registry of exercises: the same bytes each time, so that a plain
comparison of files finds a `course/` that was edited by hand or not built again. Cell ids are the exercise's name, or a
hash of the cell's own text, so that a change in one cell does not touch the others. How solutions are taken out is in
`release.py`.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pefttools.grading.question import Question

REPO = "peft-course/peft-course"  # the GitHub repository that badges and Colab installs point to; the one place to change it
BRANCH = "main"

HINTS = {"nudge": "a nudge", "shape": "the shapes", "code": "almost the code"}
MARKERS = ("exercise", "check", "hint", "question")

SETUP = '''\
# On Colab this installs what is missing there (and never touches its torch or numpy). Anywhere else it does nothing.
import importlib.util
import subprocess
import sys

if "google.colab" in sys.modules:
    needed = {{"pefttools": "git+https://github.com/{repo}@{branch}", "peft": "peft", "bitsandbytes": "bitsandbytes"}}
    missing = [source for module, source in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing], check=True)'''


class BuildError(ValueError):
    """A chapter that cannot be built. The message starts with `file:line:`."""


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


@dataclass
class _Cell:
    kind: str  # "code" or "markdown"
    text: str
    marks: dict[str, str]  # the markers above, and "level"
    tags: list[str]
    line: int


# ---------------------------------------------------------------------------------------------------- reading


def registry(chapter: str) -> dict[str, Any]:
    """The exercises and questions of one chapter, by name, from `pefttools.grading.exercises`."""
    from pefttools.grading.exercises import tasks

    return {task.name: task for task in tasks(chapter)}


def is_question(entry: Any) -> bool:
    """Whether an entry of the registry is multiple choice."""
    return isinstance(entry, Question)


def read_chapter(path: str | Path, entries: dict[str, Any] | None = None) -> Chapter:
    """Parse `solutions/NN_name.py` and build nbgrader's source notebook from it.

    `entries` are the chapter's exercises and questions by name (default: the registry's). Raises `BuildError` naming
    file and line for whatever would give students a broken chapter.
    """
    path = Path(path)
    found = re.fullmatch(r"(\d\d)_([a-z][a-z0-9_]*)", path.stem)
    if not found:
        raise BuildError(f"{path.name}:1: a chapter's file is named NN_name.py, such as 02_lora.py")
    head, cells = _parse(path)
    chapter = Chapter(path=path, name=path.stem, short=found[2], head=head, notebook=None)
    entries = registry(path.stem) if entries is None else entries
    _validate(path, cells, entries)
    _assemble(chapter, cells, entries)
    return chapter


def _parse(path: Path) -> tuple[dict[str, Any], list[_Cell]]:
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
            raise BuildError(f"{path.name}:{line}: unknown marker {sorted(unknown)[0]!r}; known are {', '.join(MARKERS)}, level, tags")
        if len([m for m in marks if m in MARKERS]) > 1:
            raise BuildError(f"{path.name}:{line}: one cell, one marker; this one has {', '.join(m for m in marks if m in MARKERS)}")
        tags = cell.metadata.get("tags", [])
        if not isinstance(tags, list):
            raise BuildError(f'{path.name}:{line}: tags are a list, tags=["gpu"]; got {tags!r}')
        cells.append(_Cell(cell.cell_type, cell.source, marks, list(tags), line))
    return head, cells


# ---------------------------------------------------------------------------------------------------- checking


def _validate(path: Path, cells: list[_Cell], entries: dict[str, Any]) -> None:
    """Raise `BuildError` for the first thing that is wrong with a chapter's markers."""

    def fail(cell: _Cell | None, message: str) -> None:
        raise BuildError(f"{path.name}:{cell.line if cell else 1}: {message}")

    known = ", ".join(sorted(entries)) or "none yet"
    seen: dict[str, dict[str, _Cell]] = {}  # name → {"text" | "exercise" | "check" | "question": cell}
    for cell in cells:
        mark = next((m for m in MARKERS if m in cell.marks), None)
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
            fail(cell, f"{name!r} is {'a question' if is_question(entries[name]) else 'an exercise'}; write "
                       f"{'question' if is_question(entries[name]) else 'exercise'}={name!r}")
        if mark == "question" and cell.text.strip():
            fail(cell, f"the question cell of {name!r} stays empty; its text comes from the Question")
        if role == "exercise" and not regions(cell, path):
            fail(cell, f"the answer cell of {name!r} has no ### BEGIN SOLUTION … ### END SOLUTION")
        if role == "check":
            if "exercise" not in place:
                fail(cell, f"the check of {name!r} stands before its exercise cell")
            if not ends_in_check(cell.text, name):
                fail(cell, f'the check cell of {name!r} must end in check("{name}", …): nbgrader reads that line as the score')
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
            fail(None, f"{'question' if is_question(entry) else 'exercise'} {name!r} is registered for this chapter but never used in it")


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


def regions(cell: _Cell, path: Path) -> list[str]:
    """The text of each BEGIN/END SOLUTION region of a cell; `BuildError` when they do not pair up."""
    found, start = [], None
    lines = cell.text.split("\n")
    for n, line in enumerate(lines):
        if "BEGIN SOLUTION" in line:
            if start is not None:
                raise BuildError(f"{path.name}:{cell.line + n + 1}: BEGIN SOLUTION inside a solution that has not ended")
            start = n
        elif "END SOLUTION" in line:
            if start is None:
                raise BuildError(f"{path.name}:{cell.line + n + 1}: END SOLUTION without BEGIN SOLUTION")
            found.append("\n".join(lines[start + 1 : n]))
            start = None
    if start is not None:
        raise BuildError(f"{path.name}:{cell.line + start + 1}: BEGIN SOLUTION without END SOLUTION")
    return found


# ---------------------------------------------------------------------------------------------------- assembling


def _assemble(chapter: Chapter, cells: list[_Cell], entries: dict[str, Any]) -> None:
    """Fill `chapter.notebook`, `.solutions` and `.lines` from the checked cells."""
    out: list[dict[str, Any]] = []
    ids: dict[str, int] = {}

    def put(kind: str, text: str, cell: _Cell | None, slug: str | None = None, nbgrader: dict | None = None) -> None:
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

    def put_answer(name: str, code: str, cell: _Cell) -> None:
        chapter.solutions.extend(regions(_Cell("code", code, {}, [], cell.line), chapter.path))
        put("code", f"# exercise: {name}\n{code}", cell, name,
            {"grade": False, "grade_id": name, "locked": False, "solution": True})

    def put_check(name: str, code: str, cell: _Cell) -> None:
        put("code", code, cell, f"check-{name}",
            {"grade": True, "grade_id": f"check-{name}", "locked": True, "points": entries[name].points, "solution": False})

    put("markdown", _title(chapter, entries), None, "title")
    put("code", SETUP.format(repo=REPO, branch=BRANCH), None, "setup")
    number = 0
    hints: dict[str, int] = {}
    for cell in cells:
        mark = next((m for m in MARKERS if m in cell.marks), None)
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
            text = (f"<details><summary>Hint {hints[name]}: {HINTS[cell.marks['level']]}</summary>\n\n{cell.text}\n\n</details>")
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
    facts.append(f"{_count(sum(e.points for e in entries.values()), 'point')} in {' and '.join(p for p in parts if p[0] != '0')}")
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
    return f"### Exercise · {entry.title} · {entry.stars} · {entry.minutes} min · {_count(entry.points, 'point')}"


def _question(number: int, entry: Any) -> str:
    return f"### Question {number} · {_count(entry.points, 'point')}\n\n{entry.markdown()}"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


# ---------------------------------------------------------------------------------------------------- writing


def find_root(start: str | Path | None = None) -> Path:
    """The course's root: the nearest folder at or above `start` (default: here) with a `solutions/` folder in it."""
    start = Path(start or ".").resolve()
    for folder in (start, *start.parents, Path(__file__).resolve().parents[2]):
        if (folder / "solutions").is_dir():
            return folder
    raise BuildError(f"no solutions/ folder at or above {start}: run this in a checkout of the course")


def sources(root: Path, names: Iterable[str] = ()) -> list[Path]:
    """The chapters' source files, all or those named ("02_lora", "lora", "02" or a path)."""
    every = sorted(p for p in (root / "solutions").glob("[0-9][0-9]_*.py"))
    chosen = []
    for name in names:
        stem = Path(name).stem
        match = [p for p in every if stem in (p.stem, p.stem[3:], p.stem[:2])]
        if not match:
            raise BuildError(f"no chapter {name!r} in solutions/; there are: {', '.join(p.stem for p in every) or 'none'}")
        chosen += match
    return chosen or every


def dumps(notebook: Any) -> str:
    """A notebook's text: byte for byte what nbgrader's own exporter would write (sorted keys, newline at the end)."""
    import nbformat

    return nbformat.writes(nbformat.from_dict(notebook), version=4).rstrip("\n") + "\n"


def build(
    root: str | Path | None = None,
    names: Iterable[str] = (),
    *,
    check: bool = False,
    execute: bool = False,
    entries: Callable[[str], dict[str, Any]] = registry,
    log: Callable[[str], Any] = print,
) -> list[str]:
    """Build chapters; return the released paths that changed (with `check`: that would change; nothing is written).

    Without `names` every chapter is built, and a released chapter whose source is gone is reported as drift. With
    `execute` the instructor's notebooks are run, so that they hold outputs (minutes; PEFTTOOLS_QUICK=1 shortens).
    `entries` gives a chapter's exercises by name (tests replace it).
    Raises `BuildError` for a faulty chapter; nothing is written for it.
    """
    from pefttools.grading.nbgrader_config import write_config
    from pefttools.grading.release import release

    root = find_root(root)
    names = list(names)
    if not check:
        write_config(root)
    changed = []
    for path in sources(root, names):
        chapter = read_chapter(path, entries(path.stem))
        text = dumps(release(chapter))
        target = root / chapter.released
        old = target.read_text(encoding="utf-8") if target.is_file() else None
        if text != old:
            changed.append(chapter.released)
            log(f"{'differs' if check else 'wrote'} {chapter.released}" + (f": {_difference(old, text)}" if check else ""))
        if check:
            continue
        source = dumps(chapter.notebook)
        write(root / "grading" / "source" / chapter.name / f"{chapter.short}.ipynb", source)
        instructor = root / "solutions" / f"{chapter.name}.ipynb"
        if execute:
            log(f"running {instructor.relative_to(root)} …")
            write(instructor, dumps(run(chapter.notebook, root)))
        else:
            write(instructor, source)
        if text != old:
            write(target, text)
    if not names:
        built = {p.stem for p in sources(root)}
        for stale in sorted((root / "course").glob("[0-9][0-9]_*")):
            if stale.name not in built:
                changed.append(f"course/{stale.name}")
                log(f"course/{stale.name} has no source solutions/{stale.name}.py: remove it")
    return changed


def _difference(old: str | None, new: str) -> str:
    """The first place where two notebooks' texts part, in one line."""
    if old is None:
        return "it has not been built yet; run `make build`"
    for n, (was, now) in enumerate(_zip(old.splitlines(), new.splitlines()), 1):
        if was != now:
            return f"line {n} is {was.strip()[:70]!r}, the build gives {now.strip()[:70]!r}; run `make build`, never edit course/"
    return "only line ends differ; run `make build`"


def _zip(a: list[str], b: list[str]) -> Iterator[tuple[str, str]]:
    from itertools import zip_longest

    return zip_longest(a, b, fillvalue="(end)")


def write(path: Path, text: str) -> None:
    """Write a text file with Unix line ends, also over one that nbgrader left read-only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.stat().st_mode & 0o200:  # nbgrader leaves files read-only
        path.chmod(0o644)
    path.write_text(text, encoding="utf-8", newline="\n")


def run(notebook: Any, folder: str | Path, *, allow_errors: bool = False, timeout: int = 1800) -> Any:
    """Execute a notebook in a fresh kernel with `folder` as its working directory; returns it with outputs."""
    import nbformat
    from nbclient import NotebookClient

    from pefttools.grading.nbgrader_config import KERNEL_ARGUMENTS, paths

    notebook = nbformat.from_dict(notebook)
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", allow_errors=allow_errors,
                   extra_arguments=KERNEL_ARGUMENTS, resources={"metadata": {"path": str(folder)}}).execute(env={**os.environ, **paths()})
    return notebook
