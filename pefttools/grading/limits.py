"""Limits that the kernel of the operating system holds each process to, and a control group for them all where we may.

    setrlimit, inside         DATA  one process's memory: the bomb that is faster than the watcher ends here
                              AS    its addresses, far more: page tables for reading where nothing is
                              NPROC processes and threads of this user namespace (Linux 5.14 and later, not for root)
                              FSIZE, CPU, CORE, NOFILE
    cgroup v2, outside        memory.max, memory.swap.max, pids.max of the whole submission, where a folder of
                              /sys/fs/cgroup was delegated to this user (a systemd user session does)
    `watch.py`                the sum over all processes, everywhere: most machines delegate nothing

The launcher runs inside before anything of the student's does. It says READY and waits for GO: the grader sends it when
its watcher sees the sandbox and process 1 is bound to the grader's life; a grader that died before never does.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from pefttools.grading.sandbox import Limits

OPEN_FILES = 512
ADDRESSES = 4  # times the memory: torch reserves some 0.5 GiB more than it uses, each thread's heap and stack 72 MiB
READY, GO = b"r", b"g"
LAUNCHER = """\
import json, os, resource, sys
os.write(1, b"r")
if os.read(0, 1) != b"g":
    sys.exit(0)
os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
for name, most in json.loads(sys.argv[1]).items():
    kind = getattr(resource, "RLIMIT_" + name)
    now = resource.getrlimit(kind)[1]
    most = most if now == resource.RLIM_INFINITY else min(most, now)
    resource.setrlimit(kind, (most, most))
os.nice(5)
os.execv(sys.argv[2], sys.argv[2:])
"""
ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


def launcher(limits: Limits, argv: list[str]) -> list[str]:
    """The command that runs inside: waits for GO on stdin, puts on the limits, becomes `argv` (with a full path)."""
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, json.dumps(rlimits(limits)), *argv]


def rlimits(limits: Limits) -> dict[str, int]:
    """setrlimit's names and values."""
    table = {"DATA": limits.memory, "AS": ADDRESSES * limits.memory, "FSIZE": limits.file_bytes,
             "CPU": limits.cpu_seconds + 5, "CORE": 0, "NOFILE": OPEN_FILES}
    if _kernel() >= (5, 14):  # before, it counted every process that this user has on the machine
        table["NPROC"] = limits.processes + 3  # bubblewrap's own, and the one that is over the limit
    return table


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", platform.release())[:2]))


def first_victim(argv: list[str], group: Group | None = None) -> list[str]:
    """`argv` as a command that goes into the group, and that Linux ends first if the machine runs out of memory."""
    enter = 'echo $$ > "$0" && ' if group else ""
    where = str(group.folder / "cgroup.procs") if group else "sh"
    before: list[str] = []
    if os.geteuid() == 0 and _may_unshare():
        # /dev/null and the like are this machine's, and root inside owns them: read-only, their permissions stay
        before = ["unshare", "--mount"]
        enter += "{ mount --bind /dev /dev && mount -o remount,bind,ro /dev; } 2>/dev/null; "
    quiet = "{ echo 1000 > /proc/self/oom_score_adj; } 2>/dev/null; "
    return [*before, "/bin/sh", "-c", f'{quiet}{enter}exec "$@"', where, *argv]


@functools.lru_cache(maxsize=1)
def _may_unshare() -> bool:
    try:
        return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class Group:
    """A control group of its own for one submission. `Group.make` gives None where this user may not have one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, limits: Limits, roots: tuple[Path, ...] = ROOTS, own: str | None = None) -> Group | None:
        """`own`: this process's place in the tree, as in /proc/self/cgroup."""
        parent = delegated(roots, own)
        old = parent is None and own is None
        if old:  # root's, on a machine with version 1: the only hard limit on root's processes, for NPROC is not
            parent = _old_pids()
        if parent is None:
            return None
        folder = parent / f"pefttools-{os.getpid()}-{time.monotonic_ns()}"
        try:
            folder.mkdir()
        except OSError:
            return None
        group = cls(folder)
        try:
            if not old:
                (folder / "memory.max").write_text(str(limits.memory))
            (folder / "pids.max").write_text(str(limits.processes + 3))
        except OSError:
            group.remove()
            return None
        for name, value in (() if old else (("memory.swap.max", "0"), ("memory.oom.group", "1"))):  # newer kernels
            try:
                (folder / name).write_text(value)
            except OSError:
                pass
        return group

    def hit(self) -> tuple[str, str] | None:
        """(limit, words) if the kernel stopped something in here."""
        if self._events("memory.events", "oom_kill"):
            return "memory", "all of its processes together took more memory than allowed"
        if self._events("pids.events", "max"):
            return "processes", "it started more processes and threads than allowed"
        return None

    def remove(self) -> None:
        """Kill what is left in it and take it away."""
        try:
            (self.folder / "cgroup.kill").write_text("1")  # Linux 5.14
        except OSError:
            pass
        for _ in range(100):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.02)

    def _events(self, file: str, key: str) -> int:
        try:
            found = re.search(rf"^{key} (\d+)$", (self.folder / file).read_text(), re.M)
        except OSError:
            return 0
        return int(found[1]) if found else 0


def _old_pids() -> Path | None:
    try:
        place = re.search(r"^\d+:pids:/(.*)$", Path("/proc/self/cgroup").read_text(), re.M)
    except OSError:
        return None
    folder = Path("/sys/fs/cgroup/pids", place[1]) if place else None
    return folder if folder and ".." not in folder.parts and os.access(folder, os.W_OK) else None


def delegated(roots: tuple[Path, ...] = ROOTS, own: str | None = None) -> Path | None:
    """The nearest folder above this process's group where this user may make groups with memory and pids limits."""
    try:
        text = own if own is not None else Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    place = re.search(r"^0::/(.*)$", text, re.M)
    root = next((root for root in roots if (root / "cgroup.controllers").is_file()), None)
    if place is None or root is None or ".." in place[1].split("/"):
        return None
    folder = root / place[1]
    for parent in (folder, *folder.parents):
        if not parent.is_relative_to(root):
            return None
        try:
            on = (parent / "cgroup.subtree_control").read_text().split()
        except OSError:
            return None
        # to move a process, the group that holds both its old and its new one must be writable
        if {"memory", "pids"} <= set(on) and os.access(parent, os.W_OK) and os.access(parent / "cgroup.procs", os.W_OK):
            return parent
    return None
