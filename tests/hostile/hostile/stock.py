"""The same attacks against stock nbgrader: `nbgrader autograde` of a class of two, with the attacker first.

    bubblewrap (no network, nothing but Python, this repository and the class)
        nbgrader autograde 02_lora      a-eve (the attack), zoe (all right)
        then, from the gradebook: what each has; which processes are left; what was achieved

Stock has no sandbox; the one around it here is for this machine's sake, and the whole class lives in it together:
gradebook, submissions and the grader's own processes are as much in reach as on an instructor's computer.

    python -m hostile.stock NAME …        (in tests/hostile) some attacks by name, or all
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hostile.attack import ACHIEVED, CLASS, Attack
from hostile.course import CHAPTER, Course

REPOSITORY = Path(__file__).resolve().parents[3]
SECONDS = 240
CONFIG = """\
c = get_config()
c.CourseDirectory.course_id = "hostile"
c.CourseDirectory.root = "/class"
c.IgnorePattern.enabled = True          # the one cure that stock needs to grade anybody: see FACTS on stderr
c.IgnorePattern.pattern = r"[\\s\\S]*"
"""
# Runs inside. What it says is believed: an attacker who wanted could forge this table, too.
INSIDE = """\
import json, os, socket, subprocess, sqlite3, sys, threading, time
listener, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
abstract.bind("\\0hostile-listener"); abstract.listen()
path = "/class/submitted/a-eve/02_lora/lora.ipynb"
if os.path.isfile(path) and not os.path.islink(path):
    text = open(path, errors="surrogateescape").read().replace("@PORT@", str(listener.getsockname()[1]))
    open(path, "w", errors="surrogateescape").write(text)
begun = time.time()
try:
    done = subprocess.run([sys.executable, "-m", "nbgrader", "autograde", "02_lora"], cwd="/class", timeout=SECONDS - 40,
                          capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    code, log = done.returncode, done.stdout[-20_000:] + done.stderr[-20_000:]
except subprocess.TimeoutExpired:
    code, log = None, "timeout"
seconds = time.time() - begun
time.sleep(1)
left = []
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) not in (1, 2, os.getpid()):
        try:
            line = open(f"/proc/{name}/cmdline", errors="replace").read().replace("\\0", " ").strip()
        except OSError:
            continue
        if line and "bwrap" not in line:
            left.append(line[:80])
scores, error = {}, ""
for _ in range(30):
    try:
        db = sqlite3.connect("file:/class/gradebook.db?mode=ro", uri=True, timeout=5)
        rows = db.execute("select s.student_id, sum(coalesce(g.manual_score, g.auto_score, 0)) from grade g "
                          "join submitted_notebook n on g.notebook_id = n.id join submitted_assignment s on n.assignment_id = s.id "
                          "group by s.student_id").fetchall()
        scores = dict(rows)
        names = db.execute("select first_name, last_name from student").fetchall()
        break
    except sqlite3.Error as e:
        error = str(e)
        time.sleep(1)
json.dump({"code": code, "log": log, "left": left, "scores": scores, "error": error, "seconds": seconds,
           "spoilt": "HOSTILE" in str(locals().get("names"))}, open("/class/outcome.json", "w"))
"""


@dataclass
class Outcome:
    """What became of an attack: its points, its neighbour's, and what else happened, in words."""

    score: float | None
    neighbour: float | None
    words: list[str]
    seconds: float = 0.0


class Stock:
    """A class that is made once and copied for each attack."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.course = Course(base / "course")
        self.most = sum(self.course.points.values())
        folder = base / "class"
        source = folder / "source" / CHAPTER
        source.mkdir(parents=True)
        (folder / "home").mkdir()
        (folder / "home" / ".netrc").write_text("machine example.org password instructor\n")
        (source / "lora.ipynb").write_text(json.dumps(self.course.solved()))
        (folder / "nbgrader_config.py").write_text(CONFIG)
        (folder / "inside.py").write_text(INSIDE.replace("SECONDS", str(SECONDS)))
        for student in ("a-eve", "zoe"):
            (folder / "submitted" / student / CHAPTER).mkdir(parents=True)
        (folder / "submitted" / "zoe" / CHAPTER / "lora.ipynb").write_text(json.dumps(self.course.solved()))
        done = self._within(folder, [sys.executable, "-m", "nbgrader", "generate_assignment", CHAPTER, "--create"])
        if done.returncode:
            raise RuntimeError(f"nbgrader generate_assignment: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    def run(self, attack: Attack) -> Outcome:
        """Grade the class of two with this attack in it."""
        folder = Path(tempfile.mkdtemp(prefix="class-", dir=self.base))
        try:
            shutil.copytree(self.base / "class", folder, dirs_exist_ok=True, symlinks=True)
            target = folder / "submitted" / "a-eve" / CHAPTER
            shutil.rmtree(target)
            attack.make(_Seen(self.course), target)
            try:
                self._within(folder, [sys.executable, f"{CLASS}/inside.py"], SECONDS)
            except subprocess.TimeoutExpired:
                return Outcome(None, None, ["the class was never graded to its end"])
            return self._read(folder, attack)
        finally:
            subprocess.run(["chmod", "-R", "u+rwX", str(folder)], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(folder, ignore_errors=True)

    def _read(self, folder: Path, attack: Attack) -> Outcome:
        try:
            found = json.loads((folder / "outcome.json").read_text())
        except (OSError, ValueError):
            return Outcome(None, None, ["the grader itself was ended"])
        scores, words = found["scores"], []
        score, neighbour = scores.get("a-eve"), scores.get("zoe")
        if found["code"] is None:
            words.append("the class was never graded to its end")
        if found["spoilt"]:
            words.append("the gradebook was written")
        if neighbour is None:
            words.append("the neighbour got no grade")
        elif neighbour < self.most:
            words.append(f"the neighbour got {neighbour:g} of {self.most}")
        for student in ("a-eve", "zoe"):
            for path in folder.glob(f"autograded/{student}/{CHAPTER}/lora.ipynb"):
                words += achieved(path)
        if found["left"]:
            words.append(f"{len(found['left'])} processes left running")
        if (folder / "hostile-unpickled").exists():
            words.append("ran a pickle")
        return Outcome(score, neighbour, list(dict.fromkeys(words)), found["seconds"])

    def _within(self, folder: Path, argv: list[str], seconds: float = SECONDS) -> subprocess.CompletedProcess:
        line = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--hostname", "instructor", "--clearenv",
                "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
        for path in ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ssl", "/etc/alternatives", "/etc/ld.so.cache",
                     "/sys/devices/system/cpu"):
            line += ["--ro-bind-try", path, path]
        python = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])} - {"/usr", "/"}
        for path in sorted({str(REPOSITORY), *python}, key=len):
            line += ["--ro-bind", path, path]
        line += ["--bind", str(folder), CLASS, "--chdir", CLASS]
        for name, value in {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": f"{CLASS}/home",
                            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8",
                            "INSTRUCTORS_SECRET": "do not tell", "PEFTTOOLS_QUICK": "1", "PYTHONDONTWRITEBYTECODE": "1",
                            "USER": "instructor"}.items():
            line += ["--setenv", name, value]
        return subprocess.run([*line, *argv], capture_output=True, text=True, timeout=seconds, errors="replace",
                              stdin=subprocess.DEVNULL, check=False)


class _Seen:
    """The course as attacks see it: with the path that it has inside."""

    def __init__(self, course: Course) -> None:
        self._course, self.root, self.points = course, CLASS, course.points

    def __getattr__(self, name: str) -> object:
        return getattr(self._course, name)


def achieved(path: Path) -> list[str]:
    """What the outputs of a graded notebook say was achieved."""
    try:
        cells = json.loads(path.read_text(errors="replace"))["cells"]
    except (OSError, ValueError, KeyError):
        return []
    found = []
    for cell in cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "")
            for line in ("".join(text) if isinstance(text, list) else str(text)).split("\n"):
                if line.startswith(ACHIEVED):
                    found.append(line.removeprefix(ACHIEVED).strip(": ")[:60])
    return list(dict.fromkeys(found))[:3]


def main(names: list[str]) -> None:
    """Print the outcomes of these attacks."""
    from hostile.attack import load

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    attacks = load()
    with tempfile.TemporaryDirectory(prefix="stock-") as base:
        stock = Stock(Path(base))
        for name in names or attacks:
            attack = attacks[name]
            print(name, attack.stock or stock.run(attack), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
