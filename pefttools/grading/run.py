"""One run of the grader: which hand-ins are new, who judges them, and the order in which a graded one is put down.

    _prepare   splice, digest: "unchanged", judged before, or a job for the pool
    _judge     jobs out, judged notebooks in; each is on disk before the writer comes to it
    _finish    gradebook, autograded/, feedback/, and last the note that it is done
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

from pefttools.grading.build import write as write_source
from pefttools.grading.chapter import Chapter, dumps, read_chapter
from pefttools.grading.classroom import Classroom, GradeError, Result
from pefttools.grading.digests import definitions, digest_of
from pefttools.grading.intake import UNKNOWN, HandIn, collect
from pefttools.grading.judging import JudgedResult, Job, entries_spec, judge_one
from pefttools.grading.pool import WorkerLost, default_workers, executor
from pefttools.grading.report import write_reports
from pefttools.grading.sandbox import Limits
from pefttools.grading.source import registry
from pefttools.grading.splice import splice

MEMORY = 2**30  # bytes that a worker and its kernel usually take, with room
GRACE = 300.0  # seconds beyond the limit for a notebook, after which a worker counts as hung


@dataclass
class _Task:
    """A hand-in on its way."""

    result: Result
    hand_in: HandIn
    chapter: Chapter
    text: str = ""
    judged: JudgedResult | None = None
    on_disk: Event = field(default_factory=Event)


class Run:
    """One run: its settings, the chapters, and the writer."""

    def __init__(self, room: Classroom, config: Any, entries: Any, sandbox: bool, seed: int, force: bool, log: Any):
        self.room, self.config, self.sandbox, self.seed, self.force, self.log = room, config, sandbox, seed, force, log
        self.entries, self.spec = entries or registry, entries_spec(entries)
        self.settings = _plain(config.get("JudgedExecute", {}))
        self.chapters: dict[str, tuple[Chapter, Any, str]] = {}

    def open(self, db: str | None, paths: list[Path]) -> None:
        """Open the gradebook and put the chapters into it."""
        from pefttools.grading.gradebook import Writer
        from pefttools.grading.release import release

        if not paths:
            raise GradeError(f"no chapters in {self.room.root / 'solutions'}")
        read = [(path, self.entries(path.stem)) for path in paths]
        made = [(read_chapter(path, entries), entries) for path, entries in read]
        self.writer = Writer(self.config, db, self.log)
        for chapter, entries in made:
            pristine = release(chapter)
            write_source(self.room.out / "source" / chapter.name / f"{chapter.short}.ipynb", dumps(chapter.notebook))
            try:
                self.writer.register(chapter, pristine)
            except RuntimeError as error:
                raise GradeError(
                    f"{chapter.path.name} has other exercises than when its first submissions were graded, and "
                    f"nbgrader does not mix the two in one gradebook: move {self.writer.where} away to grade everybody "
                    "anew, or grade into another folder (--out)") from error
            self.chapters[chapter.name] = chapter, pristine, definitions(entries)

    def grade(self, folder: Path, chapter: str | None, workers: int | None, scheduler: str | None) -> list[Result]:
        """The rows of the table, in its order."""
        started = time.perf_counter()
        self.remote = bool(scheduler)  # workers elsewhere do not see the files of this machine
        hand_ins = collect(folder, {name: pristine for name, (_, pristine, _) in self.chapters.items()}, self.room.out)
        if chapter:  # other chapters' hand-ins are none of this run's business
            hand_ins = [h for h in hand_ins if h.chapter or not h.problem.startswith(UNKNOWN)]
        if not hand_ins:
            of = f" for chapter {chapter!r}" if chapter else ""
            raise GradeError(f"no notebooks (*.ipynb) under {folder}{of}")
        results, tasks = [], []
        for hand_in in hand_ins:
            result = Result(hand_in.student, hand_in.chapter, str(hand_in.path), "failed", repairs=list(hand_in.notes),
                            problem=hand_in.problem, sandbox=self.sandbox, seed=self.seed)
            results.append(result)
            self.writer.student(result.student)  # so that grades.csv has a row for whoever handed in anything
            if not hand_in.problem and (task := self._guarded(result, self._prepare, hand_in, result)):
                tasks.append(task)
        new = [task for task in tasks if task.judged is None]
        for task in tasks:
            if task.judged is not None:  # by a run that was killed before it could write it
                self._guarded(task.result, self._finish, task)
        workers = min(workers or default_workers(MEMORY), max(1, len(new)))
        if new:
            self._judge(new, workers, scheduler)
        self.writer.export(self.room.out)
        results.sort(key=lambda r: (r.chapter, r.student))
        took = time.perf_counter() - started
        write_reports(self.room.out, results, {
            "judged in this run": len(new), "seconds": f"{took:.0f}", "at a time": scheduler or workers,
            "seed": self.seed, "seconds of the writer": f"{self.writer.seconds:.1f}"})
        return results

    # ---------------------------------------------------------------------------------------- one hand-in

    def _prepare(self, hand_in: HandIn, result: Result) -> _Task | None:
        """Splice it. None where it is graded already; else a task, perhaps one that only has to be written."""
        chapter, pristine, defined = self.chapters[hand_in.chapter]
        spliced, repairs = splice(pristine, hand_in.notebook)
        result.repairs += repairs
        if repairs:
            spliced["cells"].insert(0, _repair_cell(repairs))
        text = dumps(spliced)
        beside = {name: _sha256(path) for name, path in sorted(hand_in.artefacts.items())}
        result.digest = digest_of(text, defined, self.seed, self.sandbox, self.settings.get("limit", {}),
                                  *([beside] if beside else []))
        before = self.room.noted(chapter.name, result.student)
        page = self.room.page(result.student, chapter)
        if not self.force and before is not None and before.digest == result.digest and before.status == "graded":
            found = self.writer.score(chapter.name, result.student)  # somebody may have graded by hand since
            if found is not None and page.is_file():
                for name in ("seconds", "limits", "feedback"):
                    setattr(result, name, getattr(before, name))
                result.status, (result.score, result.max_score) = "unchanged", found
                return None
        result.repairs += self.room.put(hand_in, chapter, text)
        hand_in.notebook = None
        kept = None if self.force else self.room.kept(chapter.name, result.student, result.digest)
        return _Task(result, hand_in, chapter, text, kept)

    def _job(self, task: _Task) -> Job:
        result = task.result
        files = {name: path.read_bytes() if self.remote else str(path) for name, path in task.hand_in.artefacts.items()}
        return Job(result.student, result.chapter, task.text, result.digest, seed_of(result), self.sandbox,
                   self.settings, self.spec, files)

    def _finish(self, task: _Task) -> None:
        """Write a judged hand-in: gradebook, autograded/, feedback/, and last the note that it is done."""
        import nbformat

        result, judged, chapter = task.result, task.judged, task.chapter
        notebook = nbformat.reads(judged.text, as_version=4)
        when = self.room.timestamp(result.student, chapter)
        result.score, result.max_score, graded = self.writer.write(result.student, chapter, notebook, when)
        self.room.put_graded(result.student, chapter, dumps(graded))
        about = notebook.metadata.get("pefttools", {})
        result.limits = [f"{hit.get('cell', '')}: {hit.get('words') or hit.get('limit', '')}"
                         for hit in about.get("limits", [])]
        result.seconds, result.status = judged.seconds, "graded"
        page = self.room.page(result.student, chapter)
        try:
            self.writer.feedback(result.student, chapter, graded, page)
            result.feedback = str(page)
        except Exception as error:
            result.problem = f"graded, but no feedback page: {type(error).__name__}: {error}"
        self.room.note(result)

    def _guarded(self, result: Result, action: Callable[..., Any], *args: Any) -> Any:
        """`action(*args)`; where it fails, that is this hand-in's row of the table, and None."""
        try:
            return action(*args)
        except Exception as error:
            result.status, result.problem = "failed", _words(error)
            return None

    # ---------------------------------------------------------------------------------------- all of them

    def _judge(self, tasks: list[_Task], workers: int, scheduler: str | None) -> None:
        limits = replace(Limits(), **{k: v for k, v in self.settings.get("limit", {}).items() if hasattr(Limits, k)})
        done = 0
        try:
            with executor(workers, limits.notebook_seconds + GRACE, scheduler) as pool:
                for task, future in _progress(self._submit(pool, tasks)):
                    try:
                        task.judged = future.result()
                        task.on_disk.wait(60)
                        self._finish(task)
                        done += 1
                    except (Exception, CancelledError) as error:
                        task.result.status, task.result.problem = "failed", _words(error)
        except KeyboardInterrupt:
            self.log(f"\nStopped. {done} of {len(tasks)} hand-ins were graded in this run and are kept; "
                     "the same command goes on with the others.")
            raise

    def _submit(self, pool: Executor, tasks: list[_Task]) -> dict[Future, _Task]:
        def keep(task: _Task, future: Future) -> None:  # at once, in a thread: before the writer comes to it
            try:
                if not future.cancelled() and future.exception() is None:
                    self.room.keep(future.result())
            finally:
                task.on_disk.set()

        futures = {}
        for task in tasks:
            future = pool.submit(judge_one, self._job(task))
            future.add_done_callback(functools.partial(keep, task))
            futures[future] = task
        return futures


def _progress(futures: dict[Future, _Task]) -> Iterator[tuple[_Task, Future]]:
    from tqdm.auto import tqdm

    with tqdm(total=len(futures), unit="hand-in", disable=None if len(futures) > 1 else True) as bar:
        for future in as_completed(list(futures)):
            task = futures.pop(future)
            bar.set_postfix_str(f"{task.result.student} {task.result.chapter}")
            yield task, future
            bar.update()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _words(error: BaseException) -> str:
    if isinstance(error, WorkerLost):
        return str(error)
    return f"{type(error).__name__}: {error}"[:600]


def seed_of(result: Result) -> int:
    """The seed of one hand-in: from the class's (it is in the digest), the student and what was handed in.

    The same for the same work, so that a regrade gives the same; another for a second try, for feedback shows the
    inputs and the expected values of the first.
    """
    return int.from_bytes(hashlib.sha256(f"{result.digest} {result.student}".encode()).digest()[:4], "big") >> 1


def _repair_cell(repairs: list[str]) -> dict[str, Any]:
    lines = "\n".join(f"- {repair}" for repair in repairs)
    return {"cell_type": "markdown", "id": "repairs", "metadata": {},
            "source": f"**Before grading, this hand-in was repaired:**\n\n{lines}"}


def _plain(section: Any) -> dict[str, Any]:
    """JudgedExecute's settings as plain data; seed and sandbox are the run's own."""
    return {k: dict(v) if isinstance(v, dict) else list(v) if isinstance(v, (list, tuple)) else v
            for k, v in dict(section).items() if k not in ("seed", "sandbox")}
