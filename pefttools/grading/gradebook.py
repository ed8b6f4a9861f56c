"""The one writer: what was judged goes into nbgrader's gradebook, one student in one transaction.

    judged notebook ──IgnorePattern, SaveAutoGrades, AssignLatePenalties, …──► gradebook.db      autograded/…/lora.ipynb
                      nbgrader's own, those of c.Autograde.autograde_preprocessors without what executes

nbgrader opens the database anew in each step and commits after each cell: a second a student, and a kill leaves half a
student. Here the same preprocessors get one open gradebook, whose commit waits for the end. While another program holds
the database (formgrader on SQLite), the writer waits and says so.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbgrader.api import Gradebook, MissingEntry
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import Execute
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from traitlets.config import Config
from traitlets.utils.importstring import import_item

from pefttools.grading.chapter import Chapter
from pefttools.grading.classroom import write

LOCKED = ("database is locked", "database table is locked", "lock timeout", "deadlock detected")
REMIND = 60.0  # seconds between two messages while waiting


class _Later:
    """A database session whose commit only sends what has changed; `really` commits."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, "flush" if name == "commit" else name)

    def really(self) -> None:
        self._session.commit()


class _Open(Gradebook):
    """nbgrader's gradebook, kept open: `close` does nothing until `end`."""

    def close(self) -> None:
        pass

    def end(self) -> None:
        super().close()


class Writer:
    """Writes into the gradebook of `config` (as nbgrader_config.py gives it). Use as a context manager."""

    def __init__(self, config: Config, db: str | None = None, log: Callable[[str], Any] = print) -> None:
        self.log = log
        self.coursedir = CourseDirectory(config=config)
        if db:
            self.coursedir.db_url = db
        self.config = config
        self.classes = self._preprocessors()
        self.seconds = 0.0  # that were spent writing
        self.gradebook = self._patiently(lambda: _Open(self.coursedir.db_url, self.coursedir.course_id))

    def _preprocessors(self) -> list[Any]:
        """What `nbgrader autograde` runs after executing: its configured preprocessors without an Execute."""
        from nbgrader.converters import Autograde

        every = Autograde(coursedir=self.coursedir, config=self.config).autograde_preprocessors
        found = [import_item(each) if isinstance(each, str) else each for each in every]
        return [each for each in found if not issubclass(each, Execute)]

    @property
    def where(self) -> str:
        """The gradebook's file, or its address without a password."""
        url = make_url(self.coursedir.db_url)
        return url.database if url.drivername.startswith("sqlite") else url.render_as_string(hide_password=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.gradebook.end()

    # ---------------------------------------------------------------------------------------- writing

    def register(self, chapter: Chapter, pristine: Any) -> None:
        """A chapter's cells and points, as `nbgrader generate_assignment` writes them, but not into course/.

        Raises RuntimeError where there are submissions to other exercises than the chapter has now.
        """
        from nbgrader.preprocessors import SaveCells

        def register() -> None:
            self.gradebook.update_or_create_assignment(chapter.name)
            with _given(self.gradebook, [SaveCells]):
                SaveCells(config=self.config).preprocess(pristine, self._resources("", chapter))

        self._in_one(register)

    def student(self, name: str) -> None:
        """A row for whoever handed in anything, so that the exported grades have one."""
        self._in_one(lambda: self.gradebook.update_or_create_student(name))

    def write(self, student: str, chapter: Chapter, notebook: Any, timestamp: str = "") -> tuple[float, float, Any]:
        """(score, maximum, notebook for autograded/): a judged notebook's grades, all of them or none."""
        import copy

        def save() -> tuple[float, float, Any]:
            book = self.gradebook
            book.update_or_create_student(student)
            when = {"timestamp": timestamp} if timestamp else {}
            book.update_or_create_submission(chapter.name, student, **when)
            judged, resources = copy.deepcopy(notebook), self._resources(student, chapter)
            with _given(book, self.classes):
                for each in self.classes:
                    judged, resources = each(config=self.config)(judged, resources)
            found = book.find_submission(chapter.name, student)
            book.db.refresh(found)
            return found.score, found.max_score, judged

        started = time.monotonic()
        try:
            return self._in_one(save)
        finally:
            self.seconds += time.monotonic() - started

    def score(self, chapter: str, student: str) -> tuple[float, float] | None:
        """(score, maximum) as the gradebook has them now, by hand and with penalties; None without a submission."""
        def read() -> tuple[float, float] | None:
            try:
                found = self.gradebook.find_submission(chapter, student)
            except MissingEntry:
                return None
            return found.score, found.max_score

        try:
            return self._patiently(read)
        finally:
            self.gradebook.db.rollback()  # ends the reading, and with it the database's lock

    def feedback(self, student: str, chapter: Chapter, graded: Any, to: Path) -> None:
        """The student's page, with the points that the gradebook has."""
        import copy

        from nbgrader.preprocessors import GetGrades

        from pefttools.grading.feedback import FeedbackExporter

        def read() -> tuple[Any, Any]:
            with _given(self.gradebook, [GetGrades]):
                return GetGrades(config=self.config)(copy.deepcopy(graded), self._resources(student, chapter))

        try:
            notebook, resources = self._patiently(read)
        finally:
            self.gradebook.db.rollback()
        text, _ = FeedbackExporter(config=self.config).from_notebook_node(notebook, resources)
        write(to, text)

    def export(self, out: Path) -> None:
        """Everybody's grades: nbgrader's own CSV and the learning platforms' forms."""
        from nbgrader.plugins import CsvExportPlugin

        from pefttools.grading.exports import write_exports

        scratch = out / ".grades.csv.part"
        self._patiently(lambda: CsvExportPlugin(to=str(scratch), config=self.config).export(self.gradebook))
        scratch.replace(out / "grades.csv")
        self._patiently(lambda: write_exports(self.gradebook, out))
        self.gradebook.db.rollback()

    # ---------------------------------------------------------------------------------------- around it

    def _resources(self, student: str, chapter: Chapter) -> dict[str, Any]:
        return {"unique_key": chapter.short, "nbgrader": {
            "student": student, "assignment": chapter.name, "notebook": chapter.short,
            "db_url": self.coursedir.db_url}}

    def _in_one(self, action: Callable[[], Any]) -> Any:
        """Run `action` with every commit in it put off to its end; nothing of it is kept if it fails."""
        def once() -> Any:
            session = self.gradebook.db
            self.gradebook.db = _Later(session)
            try:
                result = action()
                self.gradebook.db.really()
                return result
            except BaseException:
                session.rollback()
                raise
            finally:
                self.gradebook.db = session

        return self._patiently(once)

    def _patiently(self, action: Callable[[], Any]) -> Any:
        """Run `action`, again and again while the database is locked by another program."""
        said = 0.0
        while True:
            try:
                with _quiet():
                    return action()
            except Exception as error:
                if not _is_lock(error):
                    raise
            if hasattr(self, "gradebook"):
                self.gradebook.db.rollback()
            if time.monotonic() - said > REMIND:
                said = time.monotonic()
                self.log("The gradebook is in use by another program (formgrader, or an nbgrader command): waiting "
                         "until it is free. Nothing is lost; Ctrl-C stops, and the same command goes on later.")
            time.sleep(0.5)


def _is_lock(error: BaseException | None) -> bool:
    """Whether a lock is the reason, however nbgrader wrapped it."""
    while error is not None:
        if isinstance(error, SQLAlchemyError) or type(error).__name__ == "InvalidEntry":
            if any(word in str(error) for word in LOCKED):
                return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _given(gradebook: Gradebook, classes: list[type]) -> Iterator[None]:
    """In these classes' modules, `Gradebook(…)` gives the open one."""
    modules = {sys.modules[base.__module__] for each in classes for base in each.__mro__}
    before = [(module, module.Gradebook) for module in modules if getattr(module, "Gradebook", None) is Gradebook]
    for module, _ in before:
        module.Gradebook = lambda *_, **__: gradebook
    try:
        yield
    finally:
        for module, was in before:
            module.Gradebook = was


@contextmanager
def _quiet() -> Iterator[None]:
    """nbgrader logs a traceback for each failure that it passes on as well."""
    loggers = [logging.getLogger("traitlets"), logging.getLogger("nbgrader")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
