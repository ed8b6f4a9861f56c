"""Adds up what a submission uses, all of its processes together, ten times a second; ends it when it is too much.

    memory       resident pages of every process (shared ones once, where it matters) and their page tables, what lies
                 in /scratch, /tmp, /dev/shm, and what may lie in its sockets' buffers
    processes    threads count
    CPU time     of every process ever seen, the ended ones too
    files        bytes and number, in /exchange and the socket folder on disk, and in the folders in memory
    written      bytes written to disk in all: a file that was unlinked is in no folder and still takes its place
    wall time    since the start

The sandbox's own /proc, opened from outside through its first process, lists exactly the processes of its namespace.
Their names and numbers are theirs to choose; nothing else read here is.
"""

from __future__ import annotations

import os
import re
import select
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pefttools.grading.sandbox import MEMORY_FOLDERS, Limits

EVERY = 0.1  # seconds
PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
WRITTEN = 4  # times exchange_bytes: answers are overwritten, and children's bytes are counted with their parent's again
SOCKET = 2**18  # bytes that wait in a socket at most, sent and received; they belong to no process
DISK_FILES = 1000  # in the two folders on disk: all of them are looked at each time
DEPTH = 16   # of folders in folders: a path of thousands is one that nobody can delete


@dataclass
class Usage:
    """The most that was seen so far."""

    memory: int = 0
    processes: int = 0
    cpu_seconds: float = 0.0
    file_bytes: int = 0
    files: int = 0
    written: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Hit:
    """A limit that was reached: which, and in words for a report."""

    limit: str
    words: str


class Watch(threading.Thread):
    """Looks at the namespace whose first process is `pid`; calls `kill()` once when a limit is reached."""

    def __init__(self, pid: int, pidfd: int, limits: Limits, folders: tuple[Path, ...], kill: Callable[[], None]):
        super().__init__(daemon=True, name="sandbox watch")
        self.pidfd, self.limits, self.folders, self.kill = pidfd, limits, folders, kill
        self.usage, self.hit, self.begun = Usage(), None, time.monotonic()
        self._lock, self._done = threading.Lock(), threading.Event()
        self._last: dict[tuple[int, int], tuple[int, int]] = {}  # (number, start) → (ticks, bytes written)
        self._ticks = self._bytes = 0  # of every process ever seen
        self._proc = _own_proc(pid, pidfd)
        self._memory = [os.open(f"/proc/{pid}/root{folder}", os.O_RDONLY | os.O_DIRECTORY) for folder in MEMORY_FOLDERS]

    def run(self) -> None:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        try:
            while not poll.poll(EVERY * 1000) and self.hit is None:
                self.look()
        except Exception as error:  # unwatched, nothing runs on
            if not poll.poll(1000):
                self.over("the watcher", f"it could not be watched any more ({type(error).__name__}: {error})")
        finally:
            for descriptor in (self._proc, *self._memory):
                os.close(descriptor)
            self._done.set()

    def over(self, limit: str, words: str) -> None:
        """This limit is reached: remember the first, end everything."""
        with self._lock:
            if self.hit is None:
                self.hit = Hit(limit, words)
        self.kill()

    def look(self) -> None:
        """One look at everything."""
        limits, usage = self.limits, self.usage
        usage.seconds = time.monotonic() - self.begun
        if usage.seconds > limits.notebook_seconds:
            return self.over("wall time", f"it ran for longer than {limits.notebook_seconds:g} seconds")
        numbers = [name for name in os.listdir(self._proc) if name.isdigit()]
        if len(numbers) - 2 > limits.processes:  # so many that adding them up would take too long
            usage.processes = max(usage.processes, len(numbers) - 1)
            return self.over("processes", self._many(len(numbers) - 1))
        resident = tables = threads = children = 0
        now: dict[tuple[int, int], tuple[int, int]] = {}
        for name in numbers:
            found = self._read_stat(name)
            if found is None:
                continue
            user, system, user_children, system_children, count, start, pages = found
            key = (int(name), start)
            now[key] = user + system, self._number(name, "io", rb"^write_bytes: (\d+)")
            before = self._last.get(key, (0, 0))
            self._ticks += max(0, now[key][0] - before[0])
            self._bytes += max(0, now[key][1] - before[1])
            children += user + system + user_children + system_children
            threads += count
            resident += pages * PAGE
            tables += self._number(name, "status", rb"^VmPTE:\s+(\d+) kB") * 1024
        if resident > limits.memory / 2:  # forks share pages: look closer, which takes longer
            resident = sum(map(self._proportional, numbers))
        self._last = now
        kept, entries = self._in_memory()
        sockets = self._number("1", "net/sockstat", rb"^sockets: used (\d+)")
        memory = resident + tables + kept + sockets * SOCKET
        usage.memory = max(usage.memory, memory)
        usage.processes = max(usage.processes, threads - 1)  # without bubblewrap's own
        usage.cpu_seconds = max(usage.cpu_seconds, max(self._ticks, children) / TICKS)
        usage.written = self._bytes
        self._judge(memory, threads - 1, entries)

    def _judge(self, memory: int, threads: int, entries: int) -> None:
        limits, usage = self.limits, self.usage
        if memory > limits.memory:
            return self.over("memory", f"its processes and files in memory took {memory / 2**30:.1f} GiB, "
                                       f"{limits.memory / 2**30:.1f} GiB is allowed")
        if threads > limits.processes:
            return self.over("processes", self._many(threads))
        if usage.cpu_seconds > limits.cpu_seconds:
            return self.over("CPU time", f"it computed for longer than {limits.cpu_seconds:g} seconds, all of its "
                                         "processes together")
        if usage.written > WRITTEN * limits.exchange_bytes:
            return self.over("files", f"it wrote {usage.written / 2**20:.0f} MiB to disk")
        size, count, trouble = measure(self.folders, DISK_FILES)
        usage.file_bytes, usage.files = max(usage.file_bytes, size), max(usage.files, count + entries)
        if trouble:
            return self.over("files", trouble)
        if size > limits.exchange_bytes:
            return self.over("files", f"its files took {size / 2**20:.0f} MiB, "
                                      f"{limits.exchange_bytes / 2**20:.0f} MiB is allowed")
        for number, most in ((count, DISK_FILES), (entries, limits.files)):
            if number > most:
                return self.over("files", f"it made more than {most:,} files")
        return None

    def _many(self, count: int) -> str:
        return f"it had {count} processes and threads, {self.limits.processes} is allowed"

    def _read(self, path: str, most: int = 4096) -> bytes:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._proc)
        except OSError:  # it has ended, or may not be read
            return b""
        try:
            return os.read(descriptor, most)
        except OSError:
            return b""
        finally:
            os.close(descriptor)

    def _read_stat(self, name: str) -> tuple[int, ...] | None:
        # the second field is the program's name in brackets, of the program's own choice
        fields = self._read(f"{name}/stat").rpartition(b")")[2].split()
        if len(fields) < 22:
            return None
        return tuple(int(fields[n]) for n in (11, 12, 13, 14, 17, 19, 21))

    def _number(self, name: str, file: str, pattern: bytes) -> int:
        found = re.search(pattern, self._read(f"{name}/{file}"), re.M)
        return int(found[1]) if found else 0

    def _proportional(self, name: str) -> int:
        """Bytes of this process, shared pages in parts, file pages (which the machine can drop) left out."""
        text = self._read(f"{name}/smaps_rollup")
        parts = [int(kib) for kib in re.findall(rb"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.M)]
        if parts:
            return sum(parts) * 1024
        found = self._read_stat(name)  # an old kernel, or unreadable: count all of it
        return found[-1] * PAGE if found else 0

    def _in_memory(self) -> tuple[int, int]:
        """(bytes, files) of the folders in memory; open files that have no name any more are in it."""
        size = count = 0
        for descriptor in self._memory:
            now = os.fstatvfs(descriptor)
            size += (now.f_blocks - now.f_bfree) * now.f_frsize
            count += now.f_files - now.f_ffree
        return size, count

    def finish(self, seconds: float = 5.0) -> None:
        """Wait until the thread has let go of the namespace."""
        self._done.wait(seconds)


def measure(folders: tuple[Path, ...], most: int) -> tuple[int, int, str]:
    """(bytes, entries, trouble) below `folders`, no link followed; stops at `most` entries."""
    size = count = 0
    todo = [(str(folder), 0) for folder in folders]
    while todo:
        folder, depth = todo.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    count += 1
                    if count > most:
                        return size, count, ""
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    size += max(status.st_blocks * 512, status.st_size if stat.S_ISREG(status.st_mode) else 0)
                    if entry.is_dir(follow_symlinks=False):
                        if depth >= DEPTH:
                            return size, count, f"it made folders in folders, {depth + 1} deep"
                        todo.append((entry.path, depth + 1))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # permissions taken away, or a path that is too long
            return size, count, f"it made a folder that cannot be read ({error.strerror})"
    return size, count, ""


def _own_proc(pid: int, pidfd: int, seconds: float = 30.0) -> int:
    """The sandbox's /proc as an open folder. Until bubblewrap has changed its root, that path is this machine's."""
    outside, poll = os.stat("/proc").st_dev, select.poll()
    poll.register(pidfd, select.POLLIN)
    until, error = time.monotonic() + seconds, None
    while time.monotonic() < until and not poll.poll(2):
        try:
            descriptor = os.open(f"/proc/{pid}/root/proc", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as e:
            error = e
            continue
        inside = os.fstat(descriptor).st_dev != outside
        if inside and os.access("1/stat", os.R_OK, dir_fd=descriptor):
            return descriptor
        os.close(descriptor)
    raise TimeoutError(f"the sandbox did not start ({error or 'it ended at once'})")
