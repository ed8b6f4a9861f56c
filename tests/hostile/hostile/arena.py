"""A class with attackers in it, graded as an instructor grades: `pefttools.grading.entrance.grade`.

    hand-ins/a01-NAME …  the attackers, first  ─┐
    hand-ins/moe         blank                  ├─ grade() in a process of its own ─► rows, gradebook, feedback
    hand-ins/zoe         all right             ─┘
             then: points · moe and zoe as in a class without attackers · files outside untouched · no process left ·
                   no folder left · nobody reached this machine's services · everybody told something

    python -m hostile.arena NAME …        (in tests/hostile) some attacks by name, or all
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostile.attack import Attack
from hostile.course import CHAPTER, Course
from hostile.stock import REPOSITORY, achieved

NEIGHBOURS = {"moe": 0.0, "zoe": 9.0}
SEED = 17
# Small, so that what uses everything up is soon at its end. With 20 seconds a cell has time for `import torch` on a busy
# machine; where nothing waits for the limit, it has more.
LIMITS = {"memory": 1200 * 2**20, "processes": 64, "cpu_seconds": 60, "cell_seconds": 20, "notebook_seconds": 90,
          "output_bytes": 2**21, "exchange_bytes": 2**26, "scratch_bytes": 2**28}
ACTIVE = re.compile(r"<(script|iframe|object|embed|svg|base|form|link)\b|<[^>]+\son\w+\s*=|(href|src)\s*=\s*['\"]?\s*"
                    r"(javascript|http|//)", re.I)
PICTURE = re.compile(r"data:image/png;base64,\s*([A-Za-z0-9+/=]{44})")
SECRET = "do not tell"


@dataclass
class Row:
    """What became of one student."""

    score: float
    status: str
    words: list[str]
    seconds: float = 0.0
    files: dict[str, str] = field(default_factory=dict)  # what is kept for this student, without times
    achieved: list[str] = field(default_factory=list)
    active: str = ""                                     # active content on the page of feedback


@dataclass
class Graded:
    """What became of a class; `wrong` is what must not happen, in words."""

    rows: dict[str, Row]
    wrong: list[str]
    seconds: float


class Arena:
    """Builds the course once; `run(attacks)` grades a class with these in it."""

    def __init__(self, base: Path, workers: int = 4, **limits: float) -> None:
        self.base, self.workers = base, workers
        self.course = Course(base / "course")
        (self.course.root / "home").mkdir()
        (self.course.root / "home" / ".netrc").write_text("machine example.org password instructor\n")
        (self.course.root / "grading" / "nbgrader_config.py").open("a").write(f"\nc.JudgedExecute.limit = {LIMITS | limits}\n")

    def run(self, attacks: Iterable[Attack], seconds: float = 900) -> Graded:
        """Grade a class with these attacks; whatever they do, this returns."""
        attacks = list(attacks)
        root = self.course.root
        hand_ins, out = root / "hand-ins", root / "grading"
        shutil.rmtree(hand_ins, ignore_errors=True)
        stays = ("nbgrader_config.py", "source", "exchange")
        for left in [path for path in out.iterdir() if path.name not in stays]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for student, notebook in (("moe", self.course.pristine()), ("zoe", self.course.solved())):
            (hand_ins / student / CHAPTER).mkdir(parents=True)
            (hand_ins / student / CHAPTER / "lora.ipynb").write_text(json.dumps(notebook))
        students = {attack.name: f"a{number:02d}-{attack.name}" for number, attack in enumerate(attacks)}
        with _listening() as (port, reached):
            self.course.port = port
            for attack in attacks:
                attack.make(self.course, hand_ins / students[attack.name] / CHAPTER)
            before, started = _snapshot(root, out), time.monotonic()
            rows, wrong = self._grade(hand_ins, seconds)
            took = time.monotonic() - started
            wrong += [f"a service of this machine was reached by {who}" for who in reached]
        after = _snapshot(root, out)
        wrong += [f"{path} was changed" for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
        found = {name: self._row(student, rows.get(student)) for name, student in
                 {**students, **{name: name for name in NEIGHBOURS}}.items()}
        wrong += self._gradebook({**students, **{name: name for name in NEIGHBOURS}}, found)
        return Graded(found, wrong, took)

    def _grade(self, hand_ins: Path, seconds: float) -> tuple[dict[str, dict], list[str]]:
        wrong, scratch = [], Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
        answer = scratch / "rows.json"
        environment = {**os.environ, "TMPDIR": str(scratch),
                       "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{Path(__file__).parents[1]}", "OMP_NUM_THREADS": "1", "INSTRUCTORS_SECRET": SECRET}
        line = [sys.executable, "-c", "from hostile.arena import child; child()", str(self.course.root), str(hand_ins),
                str(answer), str(self.workers)]
        process = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            wrong.append(f"the class was not graded within {seconds:.0f} seconds")
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
        if process.returncode:
            wrong.append(f"grading ended with {process.returncode}: {said[-1500:]}")
        for _ in range(50):
            left = processes_in(scratch)
            if not left:
                break
            time.sleep(0.1)
        wrong += [f"a process was left: {line}" for line in left]
        rows = json.loads(answer.read_text()) if answer.exists() else []
        answer.unlink(missing_ok=True)
        wrong += [f"{path.name} was left in the temporary folder" for path in scratch.glob("pt-*")
                  if not path.name.startswith("pt-stage-")]
        shutil.rmtree(scratch, ignore_errors=True)
        return {row["student"]: row for row in rows}, wrong

    def _row(self, student: str, row: dict[str, Any] | None) -> Row:
        out = self.course.root / "grading"
        if row is None:
            return Row(-1, "missing", [])
        words = [*row["limits"], *([row["problem"]] if row["problem"] else []), *row["repairs"]]
        judged = out / "autograded" / student / CHAPTER / "lora.ipynb"
        page = out / "feedback" / student / CHAPTER / "lora.html"
        files = {}
        if judged.is_file():
            words = [*verdicts(judged), *words]
            content = json.loads(judged.read_text())
            content["metadata"].get("pefttools", {}).clear()
            files["autograded"] = json.dumps(content, sort_keys=True)
        text = page.read_text() if page.is_file() else ""
        files["feedback"] = re.sub(r"\d+(\.\d+)? seconds", "", text)
        shown = ACTIVE.search(text)
        active = shown[0] if shown else next((f"a picture of {size} pixels" for size in map(_pixels, PICTURE.findall(text))
                                              if size > 2**25), "")
        return Row(row["score"], row["status"], words, row["seconds"], files, achieved(judged), active)

    def _gradebook(self, students: dict[str, str], found: dict[str, Row]) -> list[str]:
        """The gradebook agrees with the rows, and holds nobody and nothing else."""
        path = self.course.root / "grading" / "gradebook.db"
        try:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
                scores = dict(db.execute(
                    "select s.student_id, sum(coalesce(g.manual_score, g.auto_score, 0)) from grade g "
                    "join submitted_notebook n on g.notebook_id = n.id "
                    "join submitted_assignment s on n.assignment_id = s.id group by s.student_id"))
                people = {name for name, in db.execute("select id from student")}
                most = db.execute("select sum(max_score) from grade_cells").fetchone()[0]
        except sqlite3.Error as error:
            return [f"the gradebook cannot be read: {error}"]
        wrong = [f"the gradebook has {scores.get(student, 0):g} for {name}, the report {found[name].score:g}"
                 for name, student in students.items() if abs(scores.get(student, 0) - found[name].score) > 1e-9]
        wrong += [f"the gradebook has a student {who!r}" for who in people - set(students.values())]
        if most is not None and not 8.9 < most < 9.1:
            wrong.append(f"the gradebook's maximum is {most:g}")
        return wrong


def child() -> None:
    """The process that grades: `root`, hand-ins, where to write the rows, workers."""
    from dataclasses import asdict

    from hostile.entries import entries
    from pefttools.grading import grade

    root, hand_ins, answer, workers = sys.argv[1:]
    results = grade(hand_ins, root=root, entries=entries, workers=int(workers), seed=SEED)
    Path(answer).write_text(json.dumps([asdict(result) for result in results]))


def verdicts(notebook: Path) -> list[str]:
    """What the student is told at each check that was not passed and not blank."""
    found = []
    for cell in json.loads(notebook.read_text())["cells"]:
        if not cell.get("metadata", {}).get("nbgrader", {}).get("grade"):
            continue
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = data.get("text/html", "")
            text = "".join(text) if isinstance(text, list) else text
            blocks = [html.unescape(re.sub(r"<[^>]+>", " ", block)) for block in re.split(r"</?div[^>]*>", text)]
            blocks = [" ".join(block.split()) for block in blocks if block.strip()]
            if blocks and not re.match("[✓○]", blocks[0]):
                found.append(" ".join(blocks[1:3])[:400])
    return found


def _pixels(beginning: str) -> int:
    """Of a PNG, from its first bytes in base64."""
    head = base64.b64decode(beginning)
    return int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big")


def processes_in(scratch: Path) -> list[str]:
    """Processes of this machine that see a folder of this class's sandboxes, or were started from it."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            seen = (entry / "mountinfo").read_bytes() + (entry / "environ").read_bytes()
            if str(scratch).encode() in seen:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:100]
                if line and "resource_tracker" not in line:
                    found.append(f"{entry.name} {line}")
        except OSError:
            continue
    return found


def _snapshot(root: Path, out: Path) -> dict[str, str]:
    """Every file of the course but what grading writes."""
    found = {}
    for folder, _, names in os.walk(root):
        if Path(folder).is_relative_to(out) and Path(folder) != out:
            continue
        for name in names:
            path = Path(folder, name)
            if Path(folder) == out and name != "nbgrader_config.py":
                continue
            if path.is_symlink() or not path.is_file():
                found[str(path)] = "special"
            else:
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def _listening() -> Iterator[tuple[int, list[str]]]:
    """A service on localhost and one on an abstract socket; who connects is noted."""
    reached: list[str] = []
    sockets = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    with contextlib.suppress(OSError):  # another class on this machine listens on it
        sockets[1].bind("\0hostile-listener")
        sockets[1].listen()

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            reached.append(str(address))
            connection.close()

    for listener in sockets:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
    try:
        yield sockets[0].getsockname()[1], reached
    finally:
        for listener in sockets:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def complaints(attack: Attack, row: Row) -> list[str]:
    """What is wrong with the outcome of one attack."""
    wrong = []
    if row.status == "missing":
        return ["no row in the report"]
    if row.score != attack.earns:
        wrong.append(f"{row.score:g} points, should be {attack.earns:g}")
    if row.achieved:
        wrong.append(f"achieved: {', '.join(row.achieved)}")
    if row.active:
        wrong.append(f"active content on the page of feedback: {row.active}")
    if row.status == "failed" and not row.words:
        wrong.append("failed without a word")
    if attack.words and not re.search(attack.words, "\n".join(row.words)):
        wrong.append(f"what was said is not about it: {row.words}")
    return wrong


def main(names: list[str]) -> None:
    """Print the outcomes of these attacks."""
    from hostile.attack import load
    from hostile.noisy import NOISY

    attacks = {**load(), **NOISY} if names else load()
    chosen = [attack for name, attack in attacks.items()
              if not names or any(re.fullmatch(each, name) for each in names)]
    with tempfile.TemporaryDirectory(prefix="arena-") as base:
        graded = Arena(Path(base)).run(chosen, 3000)
        for name, row in graded.rows.items():
            bad = complaints(attacks[name], row) if name in attacks else []
            print("BAD" if bad else "ok ", f"{name:24}", f"{row.score:g}", row.status, f"{row.seconds:.1f}s", bad,
                  [each[:160] for each in row.words][:2], flush=True)
        print(f"{graded.seconds:.0f} s", *graded.wrong, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
