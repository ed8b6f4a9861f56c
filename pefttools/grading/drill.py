"""A drill for the class: some hand-ins broken or hostile, the grader killed again and again, and nothing may be lost.

    python -m pefttools.grading.drill --students 100 --kills 10 --to docs/class_drill.md

    class ──graded undisturbed──────────────────────────────────────────► gradebook A ─┐
      └────graded, SIGKILL at a random moment, the same command again …──► gradebook B ─┴─ equal?

Between two kills it is noted what is judged and what is in the gradebook: no file of that may be written again, and
every process that the killed grader had started must end by itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CELL_SECONDS = 20  # in the drill an endless loop need not take five minutes

# What a hostile answer does before the right one is defined, or instead of it.
ATTACKS = {
    "an endless loop": "while True: pass",
    "ends its process": "import os\nos._exit(0)",
    "takes all memory": "hoard = []\nwhile True: hoard.append(bytearray(2**26))",
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "floods its output": "while True: print('x' * 10_000)",
    "kills what it can": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "fills the disk": "f = open('/tmp/full', 'wb')\nwhile True: f.write(bytes(2**24))",
    "leaves a daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(1)",
    "recursion": "def f(): return f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
}
FILES: dict[str, Callable[[str], bytes]] = {
    "cut off": lambda text: text[: len(text) // 2].encode(),
    "empty": lambda text: b"",
    "a zip": lambda text: b"PK\x03\x04" + bytes(100),
    "nested deeply": lambda text: b"[" * 100_000,
    "no cells": lambda text: b'{"cells": 3}',
    "UTF-16": lambda text: text.encode("utf-16"),
}


@dataclass
class Outcome:
    """What the drill found; `faults` should be empty."""

    students: int
    kinds: dict[str, int]
    undisturbed: float
    kills: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    faults: list[str] = field(default_factory=list)


def make_class(folder: Path, solved: dict, blank: dict, students: int, seed: int) -> dict[str, int]:
    """Write the hand-ins: 15 % broken or hostile, the others solved, in part, blank or damaged. Returns the kinds."""
    from pefttools.grading.splice import answer_names

    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = answer_names(blank)
    answers = {cell["id"]: cell["source"] for cell in solved["cells"] if cell["id"] in names}
    bad = max(1, round(0.15 * students))
    trouble = [*ATTACKS, *FILES]
    draw.shuffle(trouble)
    kinds: dict[str, int] = {}
    for number in range(students):
        notebook, content = copy.deepcopy(blank), None
        if number < bad:
            kind = trouble[number % len(trouble)]
            if kind in FILES:
                content = FILES[kind](json.dumps(solved))
            else:
                notebook = copy.deepcopy(solved)
                chosen = draw.choice(names)
                cell = next(c for c in notebook["cells"] if c["id"] == chosen)
                cell["source"] = f"# exercise: {cell['id']}\n{ATTACKS[kind]}"
        else:
            kind = draw.choice(["solved", "solved", "in part", "in part", "blank", "without metadata"])
            chosen = names if kind in ("solved", "without metadata") else [n for n in names if draw.random() < 0.6]
            for cell in notebook["cells"] if kind != "blank" else []:
                if cell["id"] in chosen:
                    cell["source"] = answers[cell["id"]]
            if kind == "without metadata":
                notebook["cells"] = [{"cell_type": c["cell_type"], "source": c["source"]} for c in notebook["cells"]]
        kinds[kind] = kinds.get(kind, 0) + 1
        path = folder / f"student{draw.randrange(16**4):04x}{number:03d}.ipynb"
        path.write_bytes(content if content is not None else json.dumps(notebook).encode())
    return kinds


def rows(db_url: str) -> list[tuple]:
    """Everything in a gradebook that a grade or its feedback depends on, without nbgrader's random ids."""
    from nbgrader.api import Gradebook

    found: list[tuple] = []
    with Gradebook(db_url) as book:
        found += [("student", student.id) for student in book.students]
        for assignment in book.assignments:
            found.append(("assignment", assignment.name, assignment.max_score))
            for submission in assignment.submissions:
                who = submission.student_id
                found.append(("submission", who, assignment.name, str(submission.timestamp), submission.score))
                for notebook in submission.notebooks:
                    found.append(("notebook", who, notebook.name, notebook.late_submission_penalty))
                    found += [("grade", who, grade.name, grade.auto_score, grade.manual_score,
                               grade.needs_manual_grade) for grade in notebook.grades]
                    found += [("comment", who, comment.name, comment.auto_comment, comment.manual_comment)
                              for comment in notebook.comments]
    return sorted(found, key=repr)


def drill(base: Path, students: int, kills: int, seed: int, *, chapter: str = "02_lora", workers: int | None = None,
          root: Path | None = None, log: Callable[[str], Any] = print) -> Outcome:
    """The whole drill in the folder `base`."""
    from pefttools.grading.build import find_root, sources
    from pefttools.grading.chapter import read_chapter
    from pefttools.grading.nbgrader_config import write_config
    from pefttools.grading.release import release

    root = find_root(root)
    (path,) = sources(root, [chapter])
    made = read_chapter(path)
    kinds = make_class(base / "class", made.notebook, release(made), students, seed)
    log(f"class of {students}: " + ", ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items())))

    def start(out: Path) -> subprocess.Popen:
        if not (out / "nbgrader_config.py").exists():
            with write_config(root, out).open("a") as file:
                file.write(f"c.JudgedExecute.limit = {{'cell_seconds': {CELL_SECONDS}, 'memory': 2**31}}\n")
        line = [sys.executable, "-m", "pefttools", "grade", str(base / "class"), "--chapter", chapter, "--out",
                str(out), "--seed", str(seed), *(["--workers", str(workers)] if workers else [])]
        return subprocess.Popen(line, cwd=root, stdout=subprocess.DEVNULL, stderr=(base / "errors.log").open("a"))

    begun = time.monotonic()
    code = start(base / "undisturbed").wait()
    outcome = Outcome(students, kinds, time.monotonic() - begun)
    log(f"undisturbed: {outcome.undisturbed:.0f} s")
    if code:
        outcome.faults.append(f"the undisturbed run ended with {code}: {(base / 'errors.log').read_text()[-500:]}")
        return outcome
    _kill_and_resume(base, start, kills, random.Random(seed + 1), outcome, log)
    a, b = (rows(f"sqlite:///{base / name / 'gradebook.db'}") for name in ("undisturbed", "killed"))
    outcome.rows = len(a)
    outcome.faults += [f"only undisturbed: {row}" for row in a if row not in b]
    outcome.faults += [f"only killed: {row}" for row in b if row not in a]
    missing = students - sum(row[0] == "student" for row in a)
    if missing:
        outcome.faults.append(f"{missing} students are not in the gradebook")
    return outcome


def _kill_and_resume(base: Path, start: Any, kills: int, draw: random.Random, outcome: Outcome, log: Any) -> None:
    import psutil

    out = base / "killed"
    done: dict[Path, int] = {}
    for number in range(kills + 1):
        process = start(out)
        begun, code = time.monotonic(), None
        if number < kills:
            have = _count(out, "judged")
            share = 2 * (outcome.students - have) // (kills - number + 1)
            _wait(process, out, have + draw.randint(0, max(0, share)), draw.uniform(0.2, 6.0))
            code = process.poll()
            if code is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGKILL)
                process.wait()
                _, alive = psutil.wait_procs(family, timeout=60)
                if alive:
                    outcome.faults.append(f"kill {number + 1}: {len(alive)} processes outlived the grader by a minute")
                code = -9
        else:
            code = process.wait()
        wait = time.monotonic() - begun
        if code not in (0, -9):
            outcome.faults.append(f"run {number + 1} ended with {code}: {(base / 'errors.log').read_text()[-500:]}")
        files = [path for kind in ("judged", "reports") for path in (out / kind).glob("*/*.json")]
        now = {path: path.stat().st_mtime_ns for path in files}
        again = [path.name for path, when in done.items() if now.get(path) != when]
        if again:
            outcome.faults.append(f"after kill {number}: written again or gone: {', '.join(sorted(again)[:5])}")
        done = now
        if number < kills:
            judged, noted = _count(out, "judged"), _count(out, "reports")
            outcome.kills.append({"after": wait, "judged": judged, "noted": noted, "code": code})
            log(f"kill {number + 1} after {wait:.1f} s: {judged} judged, {noted} in the gradebook"
                + ("" if code == -9 else " (it had ended before)"))


def _wait(process: subprocess.Popen, out: Path, judged: int, seconds: float) -> None:
    """Until so many are judged, or the grader has ended; and then a moment more."""
    while process.poll() is None and _count(out, "judged") < judged:
        time.sleep(0.05)
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)


def _count(out: Path, kind: str) -> int:
    return sum(1 for _ in (out / kind).glob("*/*.json"))


def report(outcome: Outcome, command: str) -> str:
    """The page about a drill."""
    from pefttools.bench.machine import machine

    fields = ("processor", "cores", "memory", "system", "Python")
    about = {name: value for name, value in machine().items() if name in fields}
    killed = sum(kill["code"] == -9 for kill in outcome.kills)
    verdict = "equal" if not outcome.faults else "NOT equal, or other faults: see below"
    lines = ["# Class drill", "", f"Made by `make class-drill` (`{command}`); nothing here is typed by hand.", "",
             "; ".join(f"{name} {value}" for name, value in about.items()) + ".", "",
             f"A class of {outcome.students} was graded in {outcome.undisturbed:.0f} s without a stop. Then it was "
             f"graded again into another folder; {killed} times the grader was killed with SIGKILL, after a random number of "
             "hand-ins and some random seconds more, and the same command given again. The two gradebooks have "
             f"{outcome.rows} rows each (students, submissions, grades, comments, penalties): **{verdict}**.", "",
             "| hand-ins | of this kind |", "|---|---|",
             *(f"| {count} | {kind} |" for kind, count in sorted(outcome.kinds.items())), "",
             "| kill | after | judged by then | in the gradebook by then |", "|---|---|---|---|",
             *(f"| {n} | {kill['after']:.1f} s | {kill['judged']} | {kill['noted']} |"
               + ("" if kill["code"] == -9 else " it had ended before") for n, kill in enumerate(outcome.kills, 1)), "",
             "What had been judged or was in the gradebook at a kill was not judged or written again by any later run, "
             "and no process of the killed run was left." if not outcome.faults else "Faults:", ""]
    return "\n".join([*lines, *(f"- {fault}" for fault in outcome.faults)]).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the drill; 1 where it found a fault."""
    parser = argparse.ArgumentParser(prog="python -m pefttools.grading.drill", description=__doc__.split("\n")[0])
    parser.add_argument("--students", type=int, default=100)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--to", type=Path, help="write the page here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        outcome = drill(Path(folder), args.students, args.kills, args.seed, workers=args.workers)
    command = f"python -m pefttools.grading.drill --students {args.students} --kills {args.kills} --seed {args.seed}"
    text = report(outcome, command)
    if args.to:
        args.to.write_text(text, encoding="utf-8")
    print(text)
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
