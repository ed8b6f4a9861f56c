"""Run generated programs against their tests where they can do no harm, and judge them where they cannot reach.

    (code, tests) ─take_apart─► code, expressions ─► room with programs ─► values ─► room without ─► passed, error

Where bubblewrap is installed a room is the grader's sandbox (`pefttools.grading`): no network, none of your files,
limits on all processes together. Elsewhere it is a process with limits of its own, which can read what you can read:
the result says which it was. A program cannot forge a pass in either by what it does in its process, for the verdict is
not there (see `checks.py`); without a sandbox it could read the expected values from a file of yours.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pefttools.lab.checks import Check, Test, take_apart

RUNNER = Path(__file__).with_name("run_tests.py")
BESIDE = Path(__file__).with_name("plain_values.py")
CHUNK = 40  # programs of one room; where a room is brought down, each of them gets one of its own
_one_at_a_time = threading.Lock()
ROOM_SECONDS = 60.0  # beyond what the programs may take: starting, on a machine that is busy


class Results(list):
    """The results in order, and `where` they were made: "sandbox" or "subprocess"."""

    where = "subprocess"


def code_of(answer: str) -> str:
    """The program in an answer: what stands between the first ```python fence and the next ```, or all of it."""
    fenced = re.search(r"```(?:python)?[ \t]*\n(.*?)(?:\n?```|\Z)", answer, re.DOTALL)
    return fenced.group(1) if fenced else answer


def run_programs(programs: Sequence[tuple[str, Sequence[str]]], seconds: int = 3, mb: int = 512, *,
                 sandbox: bool | None = None, progress: bool = False) -> Results:
    """Run each (code, tests). Returns {"passed": bool, "error": str, "judged": str} for each, in order.

    seconds: wall and CPU time a program may take with its tests. mb: memory of a process in MiB. The environment is
    empty, the folder is scratch. sandbox: None takes bubblewrap's where there is one; False does without, True insists.
    judged: "apart" where an expected value was compared with what the program gave, out of its reach; "inside" where
    all its tests could only be evaluated in its own process (or could not be run). A program without tests fails.
    Raises ValueError for tests that are not Python, OSError on Windows, RuntimeError where True has no sandbox.
    """
    if sys.platform == "win32":
        raise OSError("programs are run with POSIX limits: on Windows use WSL")
    if seconds <= 0 or mb < 16:
        raise ValueError(f"seconds must be above 0 and mb at least 16, got {seconds} and {mb}")
    why = "" if sandbox is False else missing_sandbox()
    if sandbox and why:
        raise RuntimeError(f"sandbox=True: {why}")
    where = "subprocess" if sandbox is False or why else "sandbox"
    tests = [[_apart(test) for test in each] for _, each in programs]
    limits = {"seconds": seconds, "mb": mb}
    ran = _run_all([{"code": code, "steps": [_sent(step) for test in each for step in test.steps], **limits}
                    for (code, _), each in zip(programs, tests)], where, progress)
    # what came out before an error is judged too: the first test that fails gives the message
    asked = {i: _question(each, answer, limits) for i, (each, answer) in enumerate(zip(tests, ran))
             if not answer["error"] or answer.get("values")}
    judged = dict(zip(asked, _run_all(list(asked.values()), where, False)))
    results = Results()
    results.where = where
    for i, (each, answer) in enumerate(zip(tests, ran)):
        error = judged.get(i, answer)["error"] or answer["error"] or ("" if each else "there are no tests")
        apart = any(check.apart for test in each for check in test.checks)
        results.append({"passed": not error, "error": error, "judged": "apart" if apart else "inside"})
    return results


def missing_sandbox() -> str:
    """Why there is no sandbox on this machine; empty where there is one."""
    try:
        from pefttools.grading.sandbox import available
    except ImportError:  # a chapter that is being graded sees only a part of this package
        return "pefttools.grading is not here"
    return available() or ""


def _apart(test: str) -> Test:
    try:
        return take_apart(test)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"tests: {test[:80]!r} is not Python ({error}): give statements, such as 'assert f(1) == 2'") \
            from None


def _sent(step: str | Check) -> object:
    return step if isinstance(step, str) else [list(chain) for chain in step.holes]


def _question(tests: list[Test], answer: dict, limits: dict) -> dict:
    """The judge's job: each check's condition, with the values that came out. Odd answers become an error, no crash."""
    odd = {"setup": "raise RuntimeError('the program sent something else than its values')", "checks": [], **limits}
    checks = [check for test in tests for check in test.checks]
    values = answer.get("values")
    if not isinstance(values, list) or len(values) > len(checks) or len(values) < len(checks) and not answer["error"]:
        return odd
    asked = []
    for check, found in zip(checks, values):
        try:
            levels, data = [each[0] for each in found], [each[1] for each in found]
            if len(found) != len(check.holes) or any(type(level) is not int or level < 0 for level in levels):
                return odd
            level = levels[0] if len(check.conditions) > 1 else 0
            wanted = [chain[each] for chain, each in zip(check.holes, levels)]
            asked.append([check.conditions[level], check.source, wanted, data])
        except (TypeError, IndexError, KeyError):
            return odd
    return {"setup": "\n".join(dict.fromkeys(test.setup for test in tests if test.setup)), "checks": asked, **limits}


# ------------------------------------------------------------------------------------------------ rooms

def _run_all(jobs: list[dict], where: str, progress: bool) -> list[dict]:
    """The answers in order, from as many rooms at a time as there are cores."""
    from tqdm.auto import tqdm

    lines = [json.dumps(job) + "\n" for job in jobs]
    answers: list[dict] = [{}] * len(jobs)
    if not jobs:
        return answers
    workers = max(1, min(len(jobs), _cores()))
    size = max(1, min(CHUNK, -(-len(jobs) // workers)))
    chunks = [range(i, min(i + size, len(jobs))) for i in range(0, len(jobs), size)]
    # from first to last the jobs take turns among the chunks, so that slow neighbours do not sit in one
    chunks = [range(i, len(jobs), len(chunks)) for i in range(len(chunks))]
    room = _in_sandbox if where == "sandbox" else _in_process
    seconds, mb = jobs[0]["seconds"], jobs[0]["mb"]

    def chunk(numbers: range) -> list[dict]:
        try:
            return room([lines[i] for i in numbers], seconds, mb)
        except _Broken as broken:
            if len(numbers) == 1:
                return [{"error": str(broken)}]
        return [answer for i in numbers for answer in chunk(range(i, i + 1))]

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), unit="program", disable=not progress) as bar:
        for numbers, found in zip(chunks, pool.map(chunk, chunks)):
            for i, answer in zip(numbers, found):
                answers[i] = answer
            bar.update(len(numbers))
    return answers


class _Broken(Exception):
    """A room came down with what was in it."""


def _read(text: str, count: int) -> list[dict]:
    try:
        found = [json.loads(line) for line in text.splitlines()]
    except (ValueError, RecursionError):
        found = []
    if len(found) != count or not all(isinstance(each, dict) and isinstance(each.get("error"), str) for each in found):
        raise _Broken("the program brought down the process that ran it")
    return found


def _in_process(lines: list[str], seconds: int, mb: int) -> list[dict]:
    """One process of this user's, with limits on each program."""
    with tempfile.TemporaryFile("w+") as jobs, tempfile.TemporaryFile("w+") as answers, \
            tempfile.TemporaryDirectory(prefix="programs-", ignore_cleanup_errors=True) as folder:
        jobs.writelines(lines)
        jobs.flush()
        try:
            done = subprocess.run([sys.executable, "-I", "-S", str(RUNNER)], stdin=jobs, stdout=answers,
                                  stderr=subprocess.DEVNULL, env={"PATH": os.defpath, "TMPDIR": folder}, check=False,
                                  start_new_session=True, timeout=len(lines) * (seconds + 0.5) + ROOM_SECONDS)
        except subprocess.TimeoutExpired:
            raise _Broken("the program stopped the process that ran it") from None
        answers.seek(0)
        if done.returncode:
            raise _Broken("the program brought down the process that ran it")
        return _read(answers.read(), len(lines))


def _in_sandbox(lines: list[str], seconds: int, mb: int) -> list[dict]:
    """One sandbox. Its answers are written when the last program is dead; without status 0 they count for nothing."""
    from pefttools.grading.confined import Confined, clear
    from pefttools.grading.exchange import NoAnswer, put, take
    from pefttools.grading.sandbox import EXCHANGE, STAGE, Limits, new_room

    wall = len(lines) * (seconds + 0.5) + ROOM_SECONDS
    limits = Limits(memory=max(2**30, 4 * mb << 20), processes=64, cpu_seconds=int(wall), notebook_seconds=int(wall),
                    file_bytes=2**26, scratch_bytes=2**26, exchange_bytes=2**26, output_bytes=2**20)
    with tempfile.TemporaryDirectory(prefix="pefttools-") as stage:
        shutil.copy(RUNNER, stage)
        shutil.copy(BESIDE, stage)
        os.chmod(stage, 0o755)
        with _one_at_a_time:  # making a room also looks for rooms that nobody holds any more
            room, token = new_room(Path(stage), limits=limits), secrets.token_hex(8)
        try:
            put(room.exchange, token, "".join(lines).encode())
            argv = [sys.executable, "-I", "-S", f"{STAGE}/{RUNNER.name}",
                    f"{EXCHANGE}/{token}.in", f"{EXCHANGE}/{token}.out"]
            with _started(Confined, room, argv) as confined:
                confined.gone(wall + ROOM_SECONDS)
                status, hit = confined.poll(), confined.hit
            if hit or status:
                raise _Broken(hit.words if hit else "the program brought down the process that ran it")
            return _read(take(room.exchange, token, 2**26).decode(errors="replace"), len(lines))
        except NoAnswer as error:
            raise _Broken(str(error)) from None
        finally:
            clear(room)


def _started(confined: Any, room: Any, argv: list[str], tries: int = 3) -> Any:
    """bubblewrap may take longer than it is given on a machine that is very busy: no fault of the programs."""
    for left in reversed(range(tries)):
        try:
            return confined.start(room, argv)
        except (TimeoutError, OSError) as error:
            if not left:
                raise RuntimeError(f"the sandbox did not start in {tries} tries ({error}): is the machine overloaded? "
                                   "sandbox=False does without") from error
            time.sleep(0.5)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
