"""The reader's own copies of the chapters, and how they follow the course without losing a line that was written.

    course/02_lora/lora.ipynb ──first start──► my_course/02_lora/lora.ipynb              what the reader works in
             │ changes (git pull)                        │ written in
             └────────► splice(new chapter, reader's file) ──► my_course/02_lora/lora.ipynb
                                                reader's file ──► my_course/old/02_lora/lora_2026-01-31_10-15-00.ipynb

`my_course/.pefttools/` holds each chapter as the reader's copy was made from it: whether the chapter has changed since,
and which answers the reader wrote, both come from comparing with it. It can be lost without harm to any answer.
The splice is the one that grading uses: only answer cells travel. Cells that the reader added stay in the kept file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

MEMORY = ".pefttools"
OLD = "old"


class WorkspaceError(ValueError):
    """The reader's folder cannot be made or brought up to date at all; the message says why and what would do."""


@dataclass(frozen=True)
class Change:
    """What `sync` did with one file. `what` is "new", "replaced", "carried", "set aside" or "left alone"."""

    file: str  # relative to the reader's folder: "02_lora/lora.ipynb"
    what: str
    note: str
    kept: Path | None = None  # where the reader's former file lies now

    def __str__(self) -> str:
        return f"{self.file}: {self.note}"


def sync(course: Path | str, mine: Path | str, *, wait: float = 60.0) -> list[Change]:
    """Bring the reader's copies in `mine` up to date with the chapters in `course`; returns what was changed.

    Nothing of the reader's is overwritten: a file that differs from the chapter it came from is kept under `mine/old`
    before anything is put in its place. A second call changes nothing. One file that cannot be read or written becomes
    a Change ("left alone") and does not stop the others.
    wait: seconds to wait for another process that updates the same folder.
    Raises WorkspaceError where there is no course, or no folder can be made.
    """
    course, mine = Path(course).resolve(), Path(mine).resolve()
    files = course_files(course)
    if mine == course or course in mine.parents:
        raise WorkspaceError(f"mine={str(mine)!r} lies in the course itself; choose a folder outside of {course}")
    try:
        (mine / MEMORY).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise WorkspaceError(
            f"the folder for your copies, {mine}, cannot be made ({e.strerror}); "
            "name another with `pefttools lab --mine FOLDER`"
        ) from e
    changes = []
    with locked(mine / MEMORY / "lock", wait):
        for file in files:
            try:
                change = update(course, mine, file)
            except OSError as e:
                change = Change(file, "left alone", f"left alone, for it cannot be read or written ({e.strerror or e})")
            if change:
                changes.append(change)
    return changes


def course_files(course: Path) -> list[str]:
    """The files of a course, relative and sorted; hidden ones and caches are none of it."""
    files = []
    for path in sorted(course.rglob("*")) if course.is_dir() else []:
        parts = path.relative_to(course).parts
        if path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in parts):
            files.append("/".join(parts))
    if not any(f.endswith(".ipynb") for f in files):
        raise WorkspaceError(
            f"course={str(course)!r} holds no chapters (no .ipynb file): a clone of the repository brings "
            "them along, instructors make them with `make build`"
        )
    return files


def update(course: Path, mine: Path, file: str) -> Change | None:
    """Bring one file up to date; None where there was nothing to say."""
    new, target, memory = (course / file).read_bytes(), mine / file, mine / MEMORY / file
    if target.is_symlink():
        target = target.resolve()  # write where the reader put the file, rather than replace the link
    then = memory.read_bytes() if memory.is_file() else None

    def remember() -> None:
        if then != new:
            write(memory, new)

    def put(what: str, note: str, data: bytes = new, aside: bool = False) -> Change:
        kept = keep(target, mine, file) if aside else None
        write(target, data)
        remember()  # last: cut off before it, the next call does the same again
        return Change(file, what, note.format(kept=kept and kept.relative_to(mine).as_posix()), kept)

    if not target.exists():
        return put("new", "a fresh copy, for yours was removed" if then else "new")
    if not target.is_file():
        return Change(file, "left alone", "left alone, for yours is not a file")
    current = target.read_bytes()
    if current == new:
        return remember()
    if current == then:
        return put("replaced", "replaced by its new version; you had not written in it")
    if not file.endswith(".ipynb"):
        return None if then == new else put("replaced", "replaced by its new version; yours is now {kept}", aside=True)

    from pefttools.grading.splice import BadSubmission, read_notebook

    try:
        submitted = read_notebook(target)
    except BadSubmission as e:
        return put("set aside", f"{braced(e)} Your file is now {{kept}}, and a fresh copy is in its place", aside=True)
    if then == new:
        return None
    pristine, previous = notebook(new), notebook(then) if then else None
    if previous is None and holds(submitted, pristine):  # no memory, but this is the present version with answers in it
        return remember()
    try:
        data, note = carried(submitted, pristine, previous)
    except Exception as e:  # whatever a damaged notebook does to the splice: the file is safe and the course opens
        why = braced(f"{type(e).__name__}: {e}")
        return put(
            "set aside",
            f"your answers could not be carried into the new version ({why}); your file is now {{kept}}",
            aside=True,
        )
    if data == current:  # an earlier call did this and was cut off before it could remember
        return remember()
    return put("carried", note + "; your file as it was is now {kept}", data, aside=True)


def carried(submitted: Any, pristine: Any, previous: Any) -> tuple[bytes, str]:
    """The new version with the reader's answers in it, and a sentence about them.

    previous: the version that the reader's file was made from, or None where that is not known.
    """
    from pefttools.grading.chapter import dumps
    from pefttools.grading.splice import splice

    merged, _ = splice(pristine, submitted, previous)
    have = written(merged, pristine)
    note = f"new version, with your {len(have)} answer{'' if len(have) == 1 else 's'} in it" if have else "new version"
    if previous is not None:
        lost = [name for name in written(splice(previous, submitted)[0], previous) if name not in answers(pristine)]
        if lost:
            note += f" (it has no place any more for: {braced(', '.join(lost))})"
    return dumps(merged).encode(), note


# ── notebooks ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def notebook(data: bytes) -> Any:
    """One of the course's own notebooks."""
    import nbformat

    return nbformat.reads(data.decode(), as_version=4)


def answers(nb: Any) -> dict[str, str]:
    """{exercise: source of its answer cell} of one of the course's own notebooks."""
    marks = ((cell.source, cell.metadata.get("nbgrader", {})) for cell in nb.cells)
    return {mark["grade_id"]: source for source, mark in marks if mark.get("solution")}


def written(nb: Any, blank: Any) -> list[str]:
    """The exercises whose answer in `nb` is not the stub in `blank`."""
    stubs = answers(blank)
    return [name for name, text in answers(nb).items() if text != stubs.get(name)]


def holds(submitted: Any, pristine: Any) -> bool:
    """Whether every cell of the chapter that is no answer stands unchanged in the reader's notebook."""
    from pefttools.grading.splice import cell_source

    have = {cell_source(cell) for cell in submitted["cells"]}
    return all(cell.source in have for cell in pristine.cells if not cell.metadata.get("nbgrader", {}).get("solution"))


def braced(text: object) -> str:
    """Text that goes into a template for str.format as it stands."""
    return str(text).replace("{", "{{").replace("}", "}}")


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def write(path: Path, data: bytes) -> None:
    """All of `data` or nothing: a full disk or a killed process leaves the former file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def keep(path: Path, mine: Path, file: str) -> Path:
    """Copy the reader's file under `old/`, with date and time in its name; returns where it lies."""
    folder, stem, suffix = mine / OLD / Path(file).parent, Path(file).stem, Path(file).suffix
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    n = 1
    while (kept := folder / f"{stem}_{stamp}{'' if n == 1 else f'_{n}'}{suffix}").exists():
        n += 1
    write(kept, path.read_bytes())
    return kept


@contextlib.contextmanager
def locked(path: Path, wait: float) -> Iterator[None]:
    """One process at a time; a killed one leaves no lock behind. Where the file system has no locks, go on without."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise WorkspaceError(
            f"another process has been updating {path.parent.parent} for {wait:g} s; try again when it is done"
        ) from None
    except (OSError, NotImplementedError):
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
