"""Run programs and their tests, each in a process of its own with limits. Standard library only.

Started as `python -I -S run_tests.py` by `evaluation.run_programs`: reads JSON lines {"code", "tests", "seconds", "mb"} from
standard input, writes one JSON line {"passed", "error"} for each, in order. Every program runs in a forked child, in
an empty folder that is removed after it, under limits of CPU time, memory, file size and number of processes, and is
killed at its deadline. What the child reports goes through a pipe, with a word it cannot have printed by ending early
(`sys.exit(0)` is not a pass).
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import sys
import tempfile


def limits(seconds: int, mb: int) -> None:
    import resource

    for what, value in ((resource.RLIMIT_CPU, seconds + 1), (resource.RLIMIT_AS, mb << 20),
                        (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some of them
            resource.setrlimit(what, (value, value))


def child(job: dict, pipe: int, word: str) -> None:
    """In the forked process: run the program, then each test; report and leave without clean-up."""
    os.setsid()
    with open(os.devnull, "r+b", buffering=0) as null:
        for fd in (0, 1, 2):
            os.dup2(null.fileno(), fd)
    limits(job["seconds"], job["mb"])
    scope = {"__name__": "__program__"}
    try:
        exec(compile(job["code"], "<program>", "exec"), scope)
        for test in job["tests"]:
            exec(compile(test, "<test>", "exec"), scope)
        said = ""
    except BaseException as e:  # SystemExit, KeyboardInterrupt and MemoryError are failures like any other
        text = str(e).splitlines()[0][:200] if str(e) else ""
        said = f"{type(e).__name__}: {text}".rstrip(": ")
    os.write(pipe, json.dumps([word, said]).encode()[:4000])
    os._exit(0)


def run(job: dict) -> dict:
    folder = tempfile.mkdtemp(prefix="program-")
    word = secrets.token_hex(8)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.chdir(folder)
        child(job, write, word)
    os.close(write)
    try:
        ready, _, _ = select.select([read], [], [], job["seconds"])
        raw = os.read(read, 4096) if ready else None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # and whatever it started
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        shutil.rmtree(folder, ignore_errors=True)
    if raw is None:
        return {"passed": False, "error": f"not finished after {job['seconds']} s"}
    try:
        said, error = json.loads(raw)
    except ValueError:
        return {"passed": False, "error": "the program ended before its tests"}
    return {"passed": said == word and not error, "error": error}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
