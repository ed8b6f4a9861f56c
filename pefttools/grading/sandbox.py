"""The room that a submission runs in: bubblewrap's command line, as a pure function of what is to be seen inside.

    inside                                     on this machine
    /usr /lib /lib64 /bin /sbin                the system's, read-only
    sys.prefix, sys.base_prefix                the Python that grades, read-only; importing a package in `hidden` fails
    /stage                                     `Room.stage`, read-only, on PYTHONPATH: what of this package may be seen
    /exchange                                  `Room.exchange`: both sides write it (cases in, answers out)
    the kernel's socket folder                 `Room.sockets`, at its own path
    /scratch /tmp /dev/shm                     in memory, of limited size; /scratch is HOME and the current directory
    /etc                                       a made-up user, the loader's cache, certificates, the time zone
    /proc /dev                                 of its own; no other process, no device but null, zero, random, …
    everything else                            does not exist: no home, no course, no gradebook, no other submission

No network, no other user namespaces (so no second try at privileges), no capabilities, a cleared environment, and a
process-id namespace: when its first process ends, the kernel ends every process in it. What is on top of what is in
`mounts.py`; limits are put on and watched by `limits.py` and `watch.py`, system calls filtered by `syscalls.py`, and
`confined.py` starts it all. Start it from there: bubblewrap alone shows its own environment in /proc/1/environ.

bubblewrap (https://github.com/containers/bubblewrap) is what Flatpak runs applications in; it needs no privileges
where the system allows user namespaces.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pefttools.grading.mounts import extra_sites, file_arguments

try:
    import fcntl
except ImportError:  # Windows, where there is no sandbox either
    fcntl = None

WORK, STAGE, EXCHANGE = "/scratch", "/stage", "/exchange"
MEMORY_FOLDERS = (WORK, "/tmp", "/dev/shm")
OLDEST = "0.8.0"  # the first with --disable-userns: Debian 12, Ubuntu 24.04, Fedora 38
INSTALL = (f"install bubblewrap {OLDEST} or later (Debian, Ubuntu: `apt install bubblewrap`; Fedora: `dnf install "
           "bubblewrap`), or grade in the container of .ci/Dockerfile.grading (macOS, Windows)")
FORBIDDEN = ("this container or system forbids user namespaces; its administrator can allow them (Ubuntu 23.10 and "
             "later: an AppArmor profile for bwrap, or sysctl kernel.apparmor_restrict_unprivileged_userns=0; older "
             "Debian: sysctl kernel.unprivileged_userns_clone=1; Docker: run with --security-opt seccomp=unconfined "
             "--security-opt apparmor=unconfined --security-opt systempaths=unconfined)")
_held: dict[str, int] = {}  # a room's folder → its lock; Linux lets go of it when this process ends, however it ends
UNSAFE = ("graded WITHOUT a sandbox (--unsafe-no-sandbox): submitted code ran as you, with your files and your network")


class SandboxMissing(RuntimeError):
    """No sandbox can be made here; the message says why and what to do."""


@dataclass(frozen=True)
class Limits:
    """What one submission may use, all of its processes together unless said otherwise."""

    memory: int = 4 * 2**30            # bytes, with what lies in /scratch, /tmp and /dev/shm
    processes: int = 128               # threads count; torch starts a few in each process
    cpu_seconds: int = 900
    cell_seconds: int = 300            # of wall time
    notebook_seconds: int = 1200
    file_bytes: int = 2**28            # of one file
    scratch_bytes: int = 2**30         # /scratch, /tmp and /dev/shm, each
    exchange_bytes: int = 2**28        # all of /exchange
    files: int = 20_000                # in /scratch, /tmp and /dev/shm; on disk it is `watch.DISK_FILES`
    output_bytes: int = 2**23          # what the kernel prints and shows


@dataclass(frozen=True)
class Room:
    """What one submission sees of this machine.

    `exchange` and `sockets` must lie in a folder that only this user may enter: a program inside may leave a setuid
    file there. `new_room` makes such folders.
    """

    stage: Path
    exchange: Path
    sockets: Path
    hidden: tuple[str, ...] = ()       # top-level packages and modules that are not to be importable
    limits: Limits = field(default_factory=Limits)
    environment: tuple[tuple[str, str], ...] = ()
    secret: tuple[Path, ...] = ()      # folders not to be seen even where the system's or Python's folders hold them


def command(room: Room, argv: list[str], seccomp: int | None = None) -> list[str]:
    """bubblewrap's command line that runs `argv` in this room; `seccomp` is an open file descriptor with a filter.

    Raises SandboxMissing where bubblewrap is not installed, ValueError for a hidden name with a dot in it.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxMissing(f"bubblewrap is not installed: {INSTALL}.")
    return [program, *options(room), *(["--seccomp", str(seccomp)] if seccomp is not None else []), "--", *argv]


def options(room: Room) -> list[str]:
    """What stands between `bwrap` and `--` for this room."""
    line = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            "--unshare-cgroup-try", "--disable-userns", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox",
            "--cap-drop", "ALL", "--die-with-parent", "--new-session"]
    line += ["--proc", "/proc", "--dev", "/dev"]
    for folder in MEMORY_FOLDERS:      # before the files: the Python that grades may itself lie below /tmp
        line += ["--size", str(room.limits.scratch_bytes), "--tmpfs", folder]
    line += file_arguments(room.hidden, room.secret)
    line += ["--ro-bind", str(room.stage), STAGE, "--bind", str(room.exchange), EXCHANGE,
             "--bind", str(room.sockets), str(room.sockets)]
    # bubblewrap's root and its /dev are folders in memory without a limit, and the one who runs in them owns them. In
    # /proc lies the memory of process 1, and, if root grades, /proc/sys/kernel/core_pattern: a program on the host.
    line += ["--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORK, "--clearenv"]
    for name, value in {**environment(), **dict(room.environment)}.items():
        line += ["--setenv", name, value]
    return line


def environment() -> dict[str, str]:
    """The whole environment inside."""
    return {"PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": WORK, "USER": "student",
            "LOGNAME": "student", "LANG": "C.UTF-8", "PYTHONPATH": ":".join([STAGE, *extra_sites()]),
            "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "IPYTHONDIR": f"{WORK}/.ipython",
            "JUPYTER_CONFIG_DIR": f"{WORK}/.jupyter", "MPLCONFIGDIR": f"{WORK}/.matplotlib", "MPLBACKEND": "Agg",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PEFTTOOLS_QUICK": "1", "PEFTTOOLS_SANDBOX": "1"}


def new_room(stage: Path, hidden: tuple[str, ...] = (), limits: Limits | None = None, **more: object) -> Room:
    """A room with fresh folders, which only this user may enter. `clear(room)` removes them.

    Those that graders left behind which were killed are removed first: nobody holds their lock any more.
    """
    parent = _on_disk()
    if fcntl:
        _sweep(parent)
    base = Path(tempfile.mkdtemp(prefix="pt-", dir=parent))  # mode 0700
    for name in ("exchange", "s"):
        (base / name).mkdir()
    if fcntl:
        _held[str(base)] = os.open(base / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(_held[str(base)], fcntl.LOCK_EX)
    return Room(Path(stage), base / "exchange", base / "s", tuple(hidden), limits or Limits(), **more)


def clear(room: Room) -> None:
    """Remove the folders that `new_room` made, whatever a program has made of them."""
    _remove(room.exchange.parent)
    if (lock := _held.pop(str(room.exchange.parent), None)) is not None:
        os.close(lock)


def _remove(base: Path) -> None:
    try:
        shutil.rmtree(base)
    except FileNotFoundError:
        pass
    except (OSError, RecursionError):  # permissions taken away; folders in folders, thousands deep
        for words in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*words, "--", str(base)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


@functools.lru_cache(maxsize=4)
def _sweep(parent: str) -> None:
    for lock in Path(parent).glob("pt-*/lock"):
        try:
            if lock.parent.lstat().st_uid != os.geteuid() or str(lock.parent) in _held:
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.parent)
        except OSError:  # somebody holds it: a grader at work
            pass
        finally:
            os.close(descriptor)


@functools.lru_cache(maxsize=1)
def _on_disk() -> str:
    """A temporary folder on disk with a short path.

    A socket's path has at most 107 characters; and in a folder in memory, files that were unlinked and kept open would
    be memory that nobody counts (on disk, Linux counts who writes).
    """
    candidates = [folder for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp")
                  if len(folder) < 60 and os.access(folder, os.W_OK | os.X_OK)]
    return next((folder for folder in candidates if not _in_memory(folder)), (candidates or [tempfile.gettempdir()])[0])


def _in_memory(folder: str, mounts: str = "/proc/self/mounts") -> bool:
    best, kind = "", ""
    try:
        for line in Path(mounts).read_text(errors="replace").splitlines():
            _, point, type_, *_ = line.split()
            if (folder == point or folder.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
                best, kind = point, type_
    except (OSError, ValueError):
        return False
    return kind in ("tmpfs", "ramfs")


@functools.lru_cache(maxsize=1)
def available() -> str | None:
    """None if a sandbox can be started on this machine, else why not and what to do. Tried once, for real."""
    if sys.platform != "linux":
        return f"bubblewrap runs on Linux only: {INSTALL}."
    with tempfile.TemporaryDirectory(prefix="pt-") as scratch:
        folders = [Path(scratch) / name for name in ("stage", "exchange", "sockets")]
        for folder in folders:
            folder.mkdir()
        try:
            line = command(Room(*folders), [sys.executable, "-I", "-S", "-c", "print('inside')"])
            done = subprocess.run(line, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
                                  env={}, errors="replace")
        except SandboxMissing as missing:
            return str(missing)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"bubblewrap does not start: {error}."
    if done.returncode == 0 and done.stdout == "inside\n":
        return None
    return explain((done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and said nothing"])[-1])


def explain(said: str) -> str:
    """What bubblewrap's last words mean, and what to do about it."""
    said = said.removeprefix("bwrap: ")
    if "nknown option" in said:
        return f"bubblewrap is too old ({said}): {INSTALL}."
    if re.search(r"namespace|uid map|ermission|not permitted|Read-only file system|/proc", said):
        return f"bubblewrap cannot make a sandbox here ({said}): {FORBIDDEN}."
    return f"bubblewrap cannot make a sandbox here ({said})."


def refusal() -> str:
    """What a command says that will not grade without a sandbox; empty where there is one."""
    why = available()
    return "" if why is None else (
        f"No sandbox: {why} Submitted code is not run without one. If you know every line of what was handed in, "
        "--unsafe-no-sandbox runs it as you, and every report says so.")
