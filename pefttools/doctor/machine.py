"""Python, the system, cores, memory, disk, and the sandbox that grading uses."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from pefttools.doctor.report import Row

GB = 1e9
ROOM = "a chapter that trains takes 1 to 2 GB: close other programs and kernels"


def python_rows() -> list[Row]:
    version = platform.python_version()
    if sys.version_info < (3, 11):
        todo = "the course needs 3.11 or later: make lab PYTHON=python3.12"
        return [Row("Python", "problem", version, todo, stops=True)]
    return [Row("Python", "ok", f"{version} in {sys.prefix}")]


def machine_rows() -> list[Row]:
    return [system_row(), memory_row(), compiler_row()]


def system_row() -> Row:
    system, release = platform.system(), platform.release()
    where = f"macOS {platform.mac_ver()[0]}" if system == "Darwin" else f"{system} {release}"
    if "microsoft" in release.lower():
        where += " (WSL)"
    if "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ:
        where += " (Colab)"
    if system == "Windows":
        return Row("system", "note", where, "make and grading need WSL (`wsl --install`); see the README")
    if system == "Darwin" and platform.machine() == "x86_64":
        todo = ("torch is no longer built for Macs with Intel processors: use Colab (the badge on top of each chapter) "
                "or a Linux machine")
        return Row("system", "problem", f"{where}, Intel", todo, stops=True)
    return Row("system", "ok", f"{where}, {platform.machine()}")


def memory_row() -> Row:
    cores, (total, free) = cores_here(), memory_here()
    found = f"{cores} core{'s' if cores != 1 else ''}, {total / GB:.1f} GB memory, {free / GB:.1f} GB free"
    if total < 3.5 * GB:
        return Row("cores, memory", "problem", found, f"{ROOM}, or use Colab")
    if free < 2 * GB:
        return Row("cores, memory", "note", found, ROOM)
    if cores < 2:
        return Row("cores, memory", "note", found, "training takes about twice the minutes that the chapters state")
    return Row("cores, memory", "ok", found)


def compiler_row() -> Row:
    """Only looked for, not run: `pefttools.nf4_compiled` tries it when there is enough to do."""
    found = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        return Row("C compiler", "note", "none", "4-bit weights are encoded and decoded by slower kernels, with the same "
                                                 "result; an installed gcc or clang is used by itself")
    return Row("C compiler", "ok", f"{found}: 4-bit weights are encoded and decoded in C")


def cores_here() -> int:
    """Cores that this process may use; a container's share where it is limited."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max"
        pass
    return cores


def memory_here() -> tuple[float, float]:
    """(total, free) bytes; a container's limit where there is one."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(limit - used, 0))
    except (OSError, ValueError):
        pass
    return total, free


def disk_rows() -> list[Row]:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / GB:.1f} GB free in {Path.cwd()}"
    if free < 0.2 * GB:
        return [Row("disk", "problem", found, "notebooks and adapters cannot be saved: make room", stops=True)]
    if free < 5 * GB:
        return [Row("disk", "note", found, "enough for the bundled model; Llama-3.2-1B takes 2.5 GB more")]
    return [Row("disk", "ok", found)]


def sandbox_rows() -> list[Row]:
    """Whether a sandbox can really be made: in many containers the program is there and the kernel forbids it."""
    check, who = "sandbox", "only instructors need it, to grade"
    if platform.system() != "Linux":
        return [Row(check, "note", f"not on {platform.system()}",
                    f"{who}: use Linux or WSL for that, or the container of .ci/Dockerfile.grading")]
    from pefttools.grading import sandbox, syscalls

    sandbox.available.cache_clear()
    if why := sandbox.available():
        found, bracket, todo = why.rstrip(".").partition("): ")
        if bracket:
            found += ")"
        else:
            found, _, todo = found.partition(": ")
        return [Row(check, "note", found, f"{who}: {todo}" if todo else who)]
    if why := syscalls.status():
        found, _, todo = why.rstrip(".").partition("): ")
        found += ")" if todo else ""
        return [Row(check, "note", f"bubblewrap makes sandboxes. {found}", f"{who}: {todo}" if todo else who)]
    return [Row(check, "ok", "bubblewrap makes sandboxes, with filtered system calls")]
