"""Grade a class: `pefttools grade CHAPTER` or `pefttools grade FOLDER`; in parallel, in sandboxes, and so that it
may be killed at any moment and go on.

    FOLDER ─collect─► hand-ins ─splice─► digest ── as noted? ────────────────────────────────► "unchanged"
                                           │ else
                                           ├─ judged before, by a run that was killed ─┐
                                           └─ pool of workers: judge_one ─► judged/ ───┴─► one writer
             noted ◄─ autograded/ feedback/ ◄─ gradebook ◄────────────────────────────────────┘
             at the end: report.html, report.csv, grades.csv

The gradebook is nbgrader's own: formgrader, manual grades, late penalties and all its commands work on it. Nobody's
hand-in stops the others. See run.py (all of them), classroom.py (the folder),
judging.py (one hand-in), pool.py (workers), gradebook.py (the writer).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pefttools.grading.build import find_root, sources
from pefttools.grading.classroom import Classroom, GradeError, Result
from pefttools.grading.report import table
from pefttools.grading.run import Run
from pefttools.grading.sandbox import available, refusal

__all__ = ["GradeError", "Result", "grade", "table"]


def grade(
    submissions: str | Path | None = None,
    chapter: str | None = None,
    out: str | Path | None = None,
    *,
    root: str | Path | None = None,
    force: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    sandbox: bool = True,
    seed: int | None = None,
    new_seed: bool = False,
    db: str | None = None,
    entries: Callable[[str], dict[str, Any]] | None = None,
    log: Callable[[str], Any] = print,
) -> list[Result]:
    """Grade every notebook under `submissions` (default: `out`/submitted, where `nbgrader collect` puts them).

    `chapter` ("02_lora", "lora" or "02") grades only that chapter's. `out` is the grading folder (default: `grading/`
    in the course's `root`). `force` also grades what has not changed. `workers` hand-ins are judged at a time (default:
    one a core), or as many as the Dask cluster at `scheduler` takes. `sandbox=False` runs submitted code as you.
    `seed` draws the exercises' inputs (default: the one kept in `out`, or a `new_seed`). `db` is the gradebook's URL
    (default: nbgrader_config.py's). `entries`, a function at a module's top, replaces the registry of exercises.
    Writes the gradebook, grades.csv, report.html, report.csv and feedback/ into `out`, logs a table, returns its rows.
    Raises `GradeError` where nothing can be graded at all; a bad submission is a row of the table with its reason.
    """
    from pefttools.grading.nbgrader_config import write_config

    if sandbox and scheduler is None and available() is not None:
        raise GradeError(refusal())
    if workers is not None and workers < 1:
        raise GradeError(f"workers is {workers}; it must be at least 1")
    root = find_root(root)
    room = Classroom(root, Path(out).resolve() if out is not None else root / "grading")
    folder = Path(submissions).resolve() if submissions is not None else room.out / "submitted"
    if not folder.exists():
        raise GradeError(f"there is no folder {submissions or folder}: name the one that holds the submissions")
    write_config(root, room.out)
    with _environment():
        config = _config(room.out)
        with room.lock(db or config.CourseDirectory.db_url):
            run = Run(room, config, entries, sandbox, room.seed(seed, new_seed), force, log)
            run.open(db, sources(root, [chapter] if chapter else ()))
            with run.writer:
                results = run.grade(folder, chapter, workers, scheduler)
    log(table(results))
    log(f"\nReport: {room.out / 'report.html'}   grades: {room.out / 'grades.csv'}   "
        f"feedback: {room.out / 'feedback'}   gradebook: {run.writer.where}")
    return results


def _config(out: Path) -> Any:
    """The file in the grading folder, so that the instructor's settings in it count here as well."""
    from traitlets.config import Config, PyFileConfigLoader

    try:
        return Config(PyFileConfigLoader("nbgrader_config.py", path=str(out)).load_config())
    except Exception as error:
        raise GradeError(f"{out / 'nbgrader_config.py'}: {type(error).__name__}: {error}") from error


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
