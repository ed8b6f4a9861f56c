"""Run programs and compare values, each in a process of its own with limits. Standard library only.

Started as `python -I -S run_tests.py JOBS ANSWERS` inside a sandbox, or without arguments (standard input and output,
both files) where there is none; `programs.py` starts it. A job is a line of JSON, and so is its answer:

    {"code", "steps", …}      run the program, then the steps: statements, and expressions whose values are wanted
                              → {"values": [[level, data], …], "error": ""}
    {"setup", "checks", …}    no program: is each condition true of the values?   → {"error": ""}

No expected value is in a job of the first kind, and no program meets one of the second: there is nothing to forge.
A program may write what it likes into its pipe, values are all that can come out of it. Every job runs in a forked
child in an empty folder, under limits, and is killed at its deadline with whatever it started. The parent reads one
job at a time and writes its answers at the end, so a child finds in memory no other job, and on disk nothing.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time

if __package__:
    from pefttools.lab.plain_values import pack, short, unpack
else:  # run alone, the other file beside it; -I keeps its folder off the path, and programs have no business there
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from plain_values import pack, short, unpack

    del sys.path[0]

MOST = 1 << 18  # bytes of one answer
DEATH, DUMPABLE, SUBREAPER = 1, 4, 36  # PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER


# ------------------------------------------------------------------------------------------------ in the child

def run_program(job):
    """The values that the steps give, as far as they got."""
    scope = {"__name__": "__program__"}
    values = []
    try:
        exec(compile(job["code"], "<program>", "exec"), scope)
        for step in job["steps"]:
            if isinstance(step, str):
                exec(compile(step, "<test>", "exec"), scope)
            else:
                values.append([value_of(chain, scope) for chain in step])
    except BaseException as e:  # SystemExit, KeyboardInterrupt and MemoryError are failures like any other
        return {"values": values, "error": words(e)}
    return {"values": values, "error": ""}


def value_of(chain, scope):
    """[level, data] of the first expression of the chain whose value is data."""
    value = None
    for level, source in enumerate(chain):
        value = eval(compile(source, "<test>", "eval"), scope, {"_below": value} if level else None)
        try:
            return [level, pack(value)]
        except (TypeError, ValueError, RecursionError):
            continue
    raise AssertionError(f"{chain[0]} gave a {type(value).__name__}, which is no plain data")


def judge(job):
    """The first condition that is not true of its values, in words."""
    scope = {}
    exec(compile(job["setup"], "<test>", "exec"), scope)
    for condition, source, wanted, values in job["checks"]:
        try:
            found = {f"_hole{i}": unpack(value) for i, value in enumerate(values)}
            true = bool(eval(compile(condition, "<test>", "eval"), scope, found))
        except Exception as e:
            return {"error": f"{words(e)} (in {source})"[:300]}
        if not true:
            gave = ", ".join(f"{name} gave {short(value)}" for name, value in zip(wanted, found.values()))
            return {"error": f"AssertionError: {source}"[:200] + f"; {gave}" * bool(gave)}
    return {"error": ""}


def words(e):
    try:
        text = str(e)
    except BaseException:  # the program's own exception, and its own __str__
        text = ""
    return f"{type(e).__name__}: {text.splitlines()[0][:200] if text.strip() else ''}".rstrip(": ")


def child(job, pipe, alone):
    """In the forked process: do the job, report, leave without clean-up."""
    os.setsid()
    prctl(DEATH, signal.SIGKILL)  # who kills its parent ends with it
    prctl(DUMPABLE, 1)  # the sandbox's watcher reads what it uses
    if pipe != 3:
        os.dup2(pipe, 3)
    os.closerange(4, 1024)
    with open(os.devnull, "r+b", buffering=0) as null:
        for fd in (0, 1, 2):
            os.dup2(null.fileno(), fd)
    limits(job["seconds"], job["mb"], alone)
    write = os.write
    said = json.dumps(run_program(job) if "code" in job else judge(job)).encode()
    while said:
        said = said[write(3, said):]
    os._exit(0)


def limits(seconds, mb, alone):
    import resource

    wanted = [(resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_AS, mb << 20),
              (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_CORE, 0)]
    if alone:  # elsewhere it would count everything that this user runs
        wanted.append((resource.RLIMIT_NPROC, 24))
    for what, value in wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some of them
            resource.setrlimit(what, (value, value))


# ------------------------------------------------------------------------------------------------ in the parent

def prctl(option, value):
    """Linux only; quietly nothing elsewhere. DUMPABLE 0: no other process of this user opens our memory or files."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_all(pid, alone):
    """Kill the child and whatever it started. `alone`: this process has a namespace of its own, so: everything."""
    for kill, target in ((os.killpg, pid), (os.kill, pid)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(target, signal.SIGKILL)
    if alone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        others = [] if alone else orphans(pid)
        for other in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        try:
            if os.waitpid(-1, 0 if alone or others else os.WNOHANG)[0] == 0:
                time.sleep(0.001)
        except ChildProcessError:
            return


def orphans(known):
    """Processes that became our children (SUBREAPER) when the program that started them left them."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split() if int(word) != known]
    except (OSError, ValueError):
        return []


def run(job, alone):
    folder = tempfile.mkdtemp(prefix="program-")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.chdir(folder)
        try:
            child(job, write, alone)
        finally:
            os._exit(1)
    os.close(write)
    said, late = b"", False
    try:
        until = time.monotonic() + job["seconds"]
        while len(said) <= MOST:
            ready, _, _ = select.select([read], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                late = True
                break
            piece = os.read(read, 1 << 16)
            if not piece:
                break
            said += piece
            if said.endswith(b"}") and complete(said):  # a program's own children may hold the pipe open
                break
    finally:
        end_all(pid, alone)
        os.close(read)
        shutil.rmtree(folder, ignore_errors=True)
    if late:
        return {"error": f"not finished after {job['seconds']} s"}
    if len(said) > MOST:
        return {"error": f"its values have more than {MOST >> 10} KiB"}
    return complete(said) or {"error": "the program ended before its tests"}


def complete(said):
    """The answer, where these bytes are one; else None."""
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("error"), str) else None


def sweep(folders, mounts):
    """Nothing of one program's files is there for the next. Raises OSError where something cannot be removed."""
    for folder in folders:
        if os.statvfs(folder).f_flag & os.ST_RDONLY:  # the Python that runs may lie below /tmp
            continue
        for entry in os.scandir(folder):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            elif any(mount == entry.path or mount.startswith(entry.path + "/") for mount in mounts):
                sweep([entry.path], mounts)
            else:
                os.chmod(entry.path, 0o700)
                shutil.rmtree(entry.path)


def main(arguments):
    prctl(DUMPABLE, 0)
    prctl(SUBREAPER, 1)
    alone = bool(arguments)
    jobs = os.open(arguments[0], os.O_RDONLY) if alone else os.dup(0)
    answers, at, rest = [], 0, b""
    folders = (os.getcwd(), "/tmp", "/dev/shm", os.path.dirname(arguments[1])) if alone else ()
    mounts = [line.split()[4] for line in open("/proc/self/mountinfo")] if alone else []
    sweep(folders, mounts)
    while True:
        while b"\n" not in rest and (piece := os.pread(jobs, 1 << 16, at)):
            rest, at = rest + piece, at + len(piece)
        line, _, rest = rest.partition(b"\n")
        if not line:
            break
        at, rest = at - len(rest), b""  # the next job is not in memory while this one runs
        answers.append(run(json.loads(line), alone))
        sweep(folders, mounts)
    out = "".join(json.dumps(answer) + "\n" for answer in answers).encode()
    target = os.open(arguments[1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600) if alone else os.dup(1)
    while out:
        out = out[os.write(target, out):]


if __name__ == "__main__":
    main(sys.argv[1:])
