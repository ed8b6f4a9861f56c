"""Grade a folder of hand-ins: one gradebook, one CSV, one page of feedback for each, and nobody's file stops the rest.

    FOLDER ──collect──► hand-ins ──splice──► grading/submitted/STUDENT/CHAPTER/ ──nbgrader autograde──► gradebook.db
                                                                      └──► autograded/ ──► feedback/, grades.csv

`FOLDER` has nbgrader's layout (STUDENT/CHAPTER/name.ipynb) or is any pile of notebooks (alice.ipynb, alice_lora.ipynb,
bob/whatever.ipynb): which chapter a notebook belongs to is read from its cells, whose it is from its path. What is in
the files is spliced into the pristine chapter first, so what nbgrader gets is always whole. Hand-ins that have not
changed since they were graded are not run again. The gradebook is nbgrader's own: formgrader, manual grades and late
penalties work on it.

Student code still runs in a kernel of the instructor's here, as in stock nbgrader: grade only people you know.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pefttools.grading.build import find_root, sources, write
from pefttools.grading.chapter import Chapter, dumps, read_chapter
from pefttools.grading.splice import BadSubmission, answer_names, identity, read_notebook, splice


class GradeError(ValueError):
    """Grading cannot start at all: the folder, the chapter or the gradebook is at fault, not a submission."""


@dataclass
class HandIn:
    """One file that somebody handed in."""

    student: str
    path: Path
    chapter: str = ""  # "02_lora", once recognised
    notebook: Any = None
    problem: str = ""  # why no answers can be taken from it
    notes: list[str] = field(default_factory=list)


@dataclass
class Result:
    """One row of the table. `status` is "graded", "unchanged" (graded before) or "failed" (see `problem`)."""

    student: str
    chapter: str
    file: str
    status: str
    score: float = 0.0
    max_score: float = 0.0
    seconds: float = 0.0
    repairs: list[str] = field(default_factory=list)
    problem: str = ""
    feedback: str = ""
    digest: str = ""  # of what was graded: the spliced notebook and the exercises' definitions


def grade(
    submissions: str | Path | None = None,
    chapter: str | None = None,
    out: str | Path | None = None,
    *,
    root: str | Path | None = None,
    force: bool = False,
    entries: Callable[[str], dict[str, Any]] | None = None,
    log: Callable[[str], Any] = print,
) -> list[Result]:
    """Grade every notebook under `submissions` (default: `out`/submitted, where `nbgrader collect` puts them).

    `chapter` ("02_lora", "lora" or "02") grades only that chapter's. `out` is the grading folder (default: `grading/`
    in the course's `root`). `force` also grades what has not changed. `entries` replaces the registry of exercises.
    Writes gradebook.db, grades.csv and feedback/ into `out`, logs a table, and returns its rows.
    Raises `GradeError` where nothing can be graded at all; a bad submission is a row of the table with its reason.
    """
    from pefttools.grading.nbgrader_config import write_config

    root = find_root(root)
    out = Path(out).resolve() if out is not None else root / "grading"
    folder = Path(submissions).resolve() if submissions is not None else out / "submitted"
    if not folder.exists():
        raise GradeError(f"there is no folder {submissions or folder}: name the one that holds the submissions")
    write_config(root, out)
    with _environment():
        api = _nbgrader(root, out)
        pristine = {}
        for path in sources(root, [chapter] if chapter else ()):
            made = read_chapter(path, entries(path.stem) if entries else None)
            pristine[made.name] = (made, _register(api, made, out))
        if not pristine:
            raise GradeError(f"no chapters in {root / 'solutions'}")
        hand_ins = collect(folder, {name: notebook for name, (_, notebook) in pristine.items()}, out)
        if chapter:  # other chapters' hand-ins are none of this run's business
            hand_ins = [h for h in hand_ins if h.chapter or not h.problem.startswith(UNKNOWN)]
        if not hand_ins:
            raise GradeError(
                f"no notebooks (*.ipynb) under {folder}" + (f" for chapter {chapter!r}" if chapter else "")
            )
        results, definitions = [], _definitions()
        for hand_in in _progress(hand_ins):
            try:
                results.append(_grade_one(hand_in, pristine, api, out, force, definitions))
            except Exception as error:  # one bad submission never stops the others
                results.append(
                    Result(
                        hand_in.student,
                        hand_in.chapter,
                        str(hand_in.path),
                        "failed",
                        problem=f"{type(error).__name__}: {error}",
                    )
                )
        _export(api, out)
    results.sort(key=lambda r: (r.chapter, r.student))
    log(table(results))
    log(f"\nGrades: {out / 'grades.csv'}   feedback: {out / 'feedback'}   gradebook: {out / 'gradebook.db'}")
    return results


# ---------------------------------------------------------------------------------------------------- collecting

UNKNOWN = "No exercise of"


def collect(folder: Path, pristine: dict[str, Any], out: Path | None = None) -> list[HandIn]:
    """Every notebook under a folder (or the one file), read, with its student and chapter; the newest of duplicates."""
    paths = (
        [folder]
        if folder.is_file()
        else sorted(
            p for p in folder.rglob("*.ipynb") if not any(part.startswith(".") for part in p.relative_to(folder).parts)
        )
    )
    base = folder.parent if folder.is_file() else folder
    found: dict[tuple[str, str], HandIn] = {}
    for path in paths:
        hand_in = HandIn(_student(path.relative_to(base), base.name, pristine), path)
        try:
            if path.is_symlink() or not path.resolve().is_relative_to(base.resolve()):
                raise BadSubmission(f"{path.name} is a link, and links are not followed.")
            hand_in.notebook = read_notebook(_original(path, out))
            hand_in.chapter = recognise(hand_in.notebook, pristine) or ""
            if not hand_in.chapter:
                raise BadSubmission(f"{UNKNOWN} {', '.join(pristine)} was found in {path.name}.")
        except BadSubmission as error:
            hand_in.problem = str(error)
            named = [name for name in pristine if {name, name[3:]} & {*path.parts, *re.split(r"[ _\-.]", path.stem)}]
            hand_in.chapter = named[0] if len(named) == 1 and not hand_in.problem.startswith(UNKNOWN) else ""
        key = (hand_in.student, hand_in.chapter or path.name)
        other = found.get(key)
        if other is not None:
            newer, older = sorted((hand_in, other), key=lambda h: (not h.problem, h.path.lstat().st_mtime), reverse=True)
            newer.notes = [
                *newer.notes,
                *older.notes,
                f"Another file for this chapter, {older.path.name}, is older or unreadable and was not graded.",
            ]
            hand_in = newer
        found[key] = hand_in
    return list(found.values())


def recognise(notebook: dict[str, Any], pristine: dict[str, Any]) -> str | None:
    """The chapter that most of a notebook's recognisable answer cells belong to, or None."""
    count = {
        name: len({identity(cell, set(names)) for cell in notebook["cells"]} - {None})
        for name, names in ((name, answer_names(nb)) for name, nb in pristine.items())
    }
    best = max(count, key=lambda name: count[name], default=None)
    return best if best is not None and count[best] else None


def _student(path: Path, folder: str, chapters: dict[str, Any]) -> str:
    """Whose a file is: the first folder that is not a chapter's, else the file's name without the chapter's."""
    shorts = [name for chapter in chapters for name in (chapter, chapter[3:])]
    people = [part for part in path.parts[:-1] if part not in shorts]
    if people:
        name = people[0]
    else:
        name = re.sub(r"\s*\(\d+\)$", "", path.stem)  # "alice_lora (1)" of a browser that downloaded twice
        for short in sorted(shorts, key=len, reverse=True):
            if name.endswith(short):
                name = name[: -len(short)].rstrip(" _-.") or folder
                break
    # nbgrader finds files by glob patterns, and writes its CSV without quotes
    return re.sub(r"[^\w.@ -]", "_", name).strip(". ") or "unnamed"


def _original(path: Path, out: Path | None) -> Path:
    """What was handed in, where `path` is what an earlier run put in its place."""
    if out is None or not path.is_relative_to(out / "submitted"):
        return path
    kept = out / "received" / path.relative_to(out / "submitted")
    mark = kept.with_suffix(".spliced")
    same = kept.is_file() and mark.is_file() and mark.read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    return kept if same else path


# ---------------------------------------------------------------------------------------------------- one hand-in


def _grade_one(
    hand_in: HandIn, pristine: dict[str, tuple[Chapter, Any]], api: Any, out: Path, force: bool, definitions: str
) -> Result:
    student, name = hand_in.student, hand_in.chapter
    result = Result(student, name, str(hand_in.path), "failed", repairs=list(hand_in.notes), problem=hand_in.problem)
    with api.gradebook as gradebook:
        gradebook.update_or_create_student(student)  # so that grades.csv has a row for whoever handed in anything
    if hand_in.problem:
        return result
    chapter, notebook = pristine[name]
    spliced, repairs = splice(notebook, hand_in.notebook)
    result.repairs += repairs
    if repairs:
        spliced["cells"].insert(0, _repair_cell(repairs))
    text = dumps(spliced)
    result.digest = hashlib.sha256((text + definitions).encode()).hexdigest()
    report = out / "reports" / name / f"{student}.json"
    page = out / "feedback" / student / name / f"{chapter.short}.html"
    before = _read_report(report)
    if (
        not force
        and before is not None
        and before.digest == result.digest
        and before.status == "graded"
        and page.is_file()
    ):
        found = _score(api, name, student)  # anew from the gradebook: somebody may have graded by hand since
        if found is not None:
            before.status, before.file, before.repairs = "unchanged", str(hand_in.path), result.repairs
            before.score, before.max_score = found
            return before
    _put(hand_in, chapter, text, out, result)
    start = time.perf_counter()
    outcome = api.autograde(name, student, force=True)
    if not outcome["success"]:
        result.problem = _reason(outcome)
    else:
        result.score, result.max_score = _score(api, name, student) or (0.0, 0.0)
        result.status = "graded"
        feedback = api.generate_feedback(name, student, force=True)
        result.feedback = str(page) if feedback["success"] else ""
        if not feedback["success"]:
            result.problem = f"graded, but no feedback page: {_reason(feedback)}"
    result.seconds = time.perf_counter() - start
    write(report, json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")
    return result


def _score(api: Any, name: str, student: str) -> tuple[float, float] | None:
    from nbgrader.api import MissingEntry

    with api.gradebook as gradebook:
        try:
            found = gradebook.find_submission(name, student)
        except MissingEntry:
            return None
        return found.score, found.max_score


def _put(hand_in: HandIn, chapter: Chapter, text: str, out: Path, result: Result) -> None:
    """The spliced notebook into nbgrader's submitted/, alone but for a time stamp; the original goes to received/."""
    target = out / "submitted" / hand_in.student / chapter.name / f"{chapter.short}.ipynb"
    kept = out / "received" / hand_in.student / chapter.name / f"{chapter.short}.ipynb"
    kept.parent.mkdir(parents=True, exist_ok=True)
    source = _original(hand_in.path, out)
    if source != kept:
        shutil.copyfile(source, kept)
    write(kept.with_suffix(".spliced"), hashlib.sha256(text.encode()).hexdigest())
    stamp = hand_in.path.parent / "timestamp.txt"
    when = ""
    if stamp.is_file() and not stamp.is_symlink() and stamp.stat().st_size < 1000:
        from nbgrader.utils import parse_utc

        when = stamp.read_text(encoding="utf-8", errors="replace").strip()
        try:
            parse_utc(when)
        except (ValueError, OverflowError):
            result.repairs.append("The time stamp beside the notebook is not a time and was left out.")
            when = ""
    if target.parent.is_dir():  # nothing else that lies there may stand beside the kernel
        shutil.rmtree(target.parent)
    write(target, text)
    if when:
        write(target.parent / "timestamp.txt", when + "\n")


def _repair_cell(repairs: list[str]) -> dict[str, Any]:
    lines = "\n".join(f"- {repair}" for repair in repairs)
    return {
        "cell_type": "markdown",
        "id": "repairs",
        "metadata": {},
        "source": f"**Before grading, this hand-in was repaired:**\n\n{lines}",
    }


def _read_report(path: Path) -> Result | None:
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _definitions() -> str:
    """A digest of the exercises' definitions: when they change, hand-ins are graded again."""
    folder = Path(__file__).parent
    files = sorted([*(folder / "exercises").glob("*.py"), *folder.glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _reason(outcome: dict[str, Any]) -> str:
    """The last line of what nbgrader logged that says something."""
    text = f"{outcome.get('error', '')}\n{outcome.get('log', '')}"
    if "DeadKernelError" in text or "Kernel died" in text:
        return "The kernel died: the code ended the process or ran out of memory."
    lines = [line.strip() for line in text.split("\n") if re.match(r"\s*[\w.]*(Error|Exception|Exit)\b.*:", line)]
    lines = [line for line in lines if "NbGraderException" not in line] or ["nbgrader stopped without saying why"]
    return lines[-1][:300]


# ---------------------------------------------------------------------------------------------------- nbgrader


def _nbgrader(root: Path, out: Path) -> Any:
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import Config, PyFileConfigLoader

    try:  # the file in the grading folder, so that the instructor's settings in it count here as well
        config = PyFileConfigLoader("nbgrader_config.py", path=str(out)).load_config()
    except Exception as error:
        raise GradeError(f"{out / 'nbgrader_config.py'}: {type(error).__name__}: {error}") from error
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)  # nbgrader's log is captured per submission
    config = Config(config)
    return NbGraderAPI(CourseDirectory(config=config), config=config)


def _register(api: Any, chapter: Chapter, out: Path) -> Any:
    """Put a chapter's cells and points into the gradebook; returns the pristine notebook.

    What `nbgrader generate_assignment` does, without writing into course/.
    """
    from nbgrader.preprocessors import SaveCells

    from pefttools.grading.release import release

    pristine = release(chapter)
    write(out / "source" / chapter.name / f"{chapter.short}.ipynb", dumps(chapter.notebook))
    with api.gradebook as gradebook:
        gradebook.update_or_create_assignment(chapter.name)
    resources = {"nbgrader": {"notebook": chapter.short, "assignment": chapter.name, "db_url": api.coursedir.db_url}}
    try:
        SaveCells().preprocess(pristine, resources)
    except RuntimeError as error:
        raise GradeError(
            f"{chapter.path.name} has other exercises than when its first submissions were graded, and nbgrader does "
            f"not mix the two in one gradebook: move {out / 'gradebook.db'} away to grade everybody anew, or "
            "grade into another folder (out=…)"
        ) from error
    return pristine


def _export(api: Any, out: Path) -> None:
    from nbgrader.plugins import CsvExportPlugin

    with api.gradebook as gradebook:
        CsvExportPlugin(to=str(out / "grades.csv")).export(gradebook)


@contextmanager
def _environment() -> Iterator[None]:
    """The kernels' environment (`configure` sets it) for the time of a run, then ours back; nbgrader's noise off."""
    from sqlalchemy.exc import SAWarning

    before = dict(os.environ)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)  # nbgrader's queries under SQLAlchemy 2.1; harmless
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _progress(hand_ins: list[HandIn]) -> Iterator[HandIn]:
    from tqdm.auto import tqdm

    bar = tqdm(hand_ins, unit="hand-in", disable=None if len(hand_ins) > 1 else True)
    for hand_in in bar:
        bar.set_postfix_str(f"{hand_in.student} {hand_in.chapter}")
        yield hand_in


# ---------------------------------------------------------------------------------------------------- the table


def table(results: list[Result]) -> str:
    """The rows as text: who, what, score of maximum, seconds; beneath each what was repaired or went wrong."""
    head = ("student", "chapter", "score", "of", "seconds", "")
    rows = [
        (
            r.student,
            r.chapter or "?",
            f"{r.score:g}" if r.status != "failed" else "–",
            f"{r.max_score:g}",
            f"{r.seconds:.1f}",
            r.status,
        )
        for r in results
    ]
    width = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(
            c.ljust(w) if n in (0, 1, 5) else c.rjust(w) for n, (c, w) in enumerate(zip(row, width, strict=True))
        ).rstrip()

    lines = [line(head), "  ".join("─" * w for w in width[:-1])]
    for row, result in zip(rows, results, strict=True):
        lines.append(line(row))
        lines += [f"    {text}" for text in (*result.repairs, *filter(None, [result.problem]))]
    failed = sum(r.status == "failed" for r in results)
    lines.append(
        f"{len(results)} hand-ins, {len(results) - failed} graded" + (f", {failed} could not be" if failed else "")
    )
    return "\n".join(lines)
