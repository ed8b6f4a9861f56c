"""The grading folder: what a run leaves on disk, so that it can be killed at any moment and go on.

    grading/received/   as it came            grading/judged/    judged, waiting for or already in the gradebook
            submitted/  spliced               grading/reports/   what is in the gradebook, by digest: not graded again
            seed        of this class         .grading.lock      held while a run lives; the system frees it with it

Every file is written beside its place and then renamed: it is whole or not there. A hand-in's digest covers all that
its grade depends on; same digest, same grade.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pefttools.grading.chapter import Chapter
from pefttools.grading.intake import HandIn, original
from pefttools.grading.judging import JudgedResult


class GradeError(ValueError):
    """Grading cannot start at all: the folder, the chapter or the gradebook is at fault, not a submission."""


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
    digest: str = ""  # of all that the grade depends on
    limits: list[str] = field(default_factory=list)  # that the submitted code hit
    sandbox: bool = True
    seed: int | None = None


class Classroom:
    """The folder `out` of the course in `root`."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.out = root, out

    # ---------------------------------------------------------------------------------------- one run at a time

    @contextmanager
    def lock(self, db_url: str = "") -> Iterator[None]:
        """Held while grading, for the folder and an SQLite gradebook elsewhere. GradeError where another run has it.

        The lock is the operating system's: it ends with the process that holds it, however that ends.
        """
        from contextlib import ExitStack

        from filelock import FileLock, Timeout

        places = {self.out / ".grading.lock"}
        if db_url.startswith("sqlite:///"):
            database = Path(db_url.removeprefix("sqlite:///")).absolute()
            if database.parent != self.out:
                places.add(database.with_name(f".{database.name}.lock"))
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for place in sorted(places):
                who = place.with_suffix(".who")
                try:
                    stack.enter_context(FileLock(place, timeout=0))
                except Timeout:
                    try:
                        told = who.read_text(encoding="utf-8").strip()
                    except OSError:
                        told = "another process"
                    raise GradeError(
                        f"{told} is grading into {place.parent} at this moment: wait until it has ended, or grade "
                        "into another folder with --out") from None
                write(who, f"process {os.getpid()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})\n")
            yield

    def seed(self, given: int | None = None, new: bool = False) -> int:
        """The class's seed: drawn once and kept, so that a run that goes on, and a regrade, give the same grades."""
        place = self.out / "seed"
        try:
            kept = int(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = None
        seed = given if given is not None else kept if kept is not None and not new else secrets.randbelow(2**31)
        if seed != kept:
            write(place, f"{seed}\n")
        return seed

    # ---------------------------------------------------------------------------------------- what is judged, written

    def keep(self, judged: JudgedResult) -> None:
        """Put a judged hand-in on disk before anybody writes it into the gradebook."""
        write(self._judged(judged.chapter, judged.student), json.dumps(asdict(judged), ensure_ascii=False))

    def kept(self, chapter: str, student: str, digest: str) -> JudgedResult | None:
        """A judged hand-in of this digest, from a run before."""
        try:
            found = JudgedResult(**json.loads(self._judged(chapter, student).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.digest == digest else None

    def note(self, result: Result) -> None:
        """Note that this is in the gradebook."""
        text = json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n"
        write(self._report(result.chapter, result.student), text)

    def noted(self, chapter: str, student: str) -> Result | None:
        """What was noted of this student's chapter."""
        try:
            return Result(**json.loads(self._report(chapter, student).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _judged(self, chapter: str, student: str) -> Path:
        return self.out / "judged" / chapter / f"{student}.json"

    def _report(self, chapter: str, student: str) -> Path:
        return self.out / "reports" / chapter / f"{student}.json"

    def page(self, student: str, chapter: Chapter) -> Path:
        return self.out / "feedback" / student / chapter.name / f"{chapter.short}.html"

    # ---------------------------------------------------------------------------------------- nbgrader's folders

    def put(self, hand_in: HandIn, chapter: Chapter, text: str) -> list[str]:
        """The spliced notebook into submitted/, alone but for a time stamp; the original into received/. Repairs."""
        target = self.out / "submitted" / hand_in.student / chapter.name / f"{chapter.short}.ipynb"
        kept = self.out / "received" / hand_in.student / chapter.name / f"{chapter.short}.ipynb"
        source = original(hand_in.path, self.out)
        if source != kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, kept.with_name(f".{kept.name}.part"))
            os.replace(kept.with_name(f".{kept.name}.part"), kept)
        write(kept.with_suffix(".spliced"), hashlib.sha256(text.encode()).hexdigest())
        when, repairs = _timestamp(hand_in.path.parent / "timestamp.txt")
        if target.parent.is_symlink() or target.parent.is_file():
            target.parent.unlink()
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        write(target, text)
        stamp = target.with_name("timestamp.txt")
        if when:
            write(stamp, when + "\n")
        for other in target.parent.iterdir():  # nothing else that lies there may stand beside the kernel
            if other not in ([target, stamp] if when else [target]):
                shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()
        return repairs

    def timestamp(self, student: str, chapter: Chapter) -> str:
        """When it was handed in, as nbgrader reads it; "" where nobody knows."""
        return _timestamp(self.out / "submitted" / student / chapter.name / "timestamp.txt")[0]

    def put_graded(self, student: str, chapter: Chapter, text: str) -> None:
        """The graded notebook into autograded/, read-only as nbgrader leaves it, with the time stamp."""
        target = self.out / "autograded" / student / chapter.name / f"{chapter.short}.ipynb"
        write(target, text, mode=0o444)
        stamp = target.with_name("timestamp.txt")
        if when := self.timestamp(student, chapter):
            write(stamp, when + "\n", mode=0o444)
        else:
            stamp.unlink(missing_ok=True)


def _timestamp(path: Path) -> tuple[str, list[str]]:
    """A timestamp.txt's content if it is a time, and what to say if it is not."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size >= 1000:
            return "", []
        when = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "", []
    from nbgrader.utils import parse_utc

    try:
        parse_utc(when)
    except (ValueError, OverflowError):
        return "", ["The time stamp beside the notebook is not a time and was left out."]
    return when, []


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file so that it is whole or not there, also over one that is read-only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.chmod(mode)
    os.replace(part, path)
