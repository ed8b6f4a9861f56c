"""Start a program in a room, watch it, and be sure that it has ended with everything that it started.

    grader ── bwrap (waits) ── bwrap, process 1 inside ── launcher ── the program ── its children
      │  reads: who is process 1        ▲ pidfd                 ▲
      ├─ Watch ──────── sums up ────────┘                       │
      └─ "go" on stdin, once the watcher sees the sandbox ──────┘

Process 1 ends last: the operating system first kills and collects every other process of the namespace. So killing
means killing process 1, and "it is gone" means that its pidfd says so. If the grader dies, bwrap dies with it
(--die-with-parent), and process 1 with bwrap; a grader that dies before it could say "go" leaves a launcher that ends.

bubblewrap gets an empty environment and its options through a pipe: /proc/1 is bubblewrap, and shows both inside.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pefttools.grading import syscalls
from pefttools.grading.limits import GO, READY, Group, first_victim, launcher
from pefttools.grading.sandbox import Room, clear, command
from pefttools.grading.watch import Hit, Usage, Watch

KEPT = 2**16  # bytes of what the program writes on its first outputs; the rest is counted and dropped
START = 30.0  # seconds that bubblewrap may take, on a machine that is busy with other submissions
__all__ = ["Confined", "clear"]
_starters: dict[int, ThreadPoolExecutor] = {}


class Confined:
    """A program that runs in a room: `start(room, argv)`; `kill()`, `gone()`, `close()`; `hit`, `usage`, `said`.

    The program's first output and error output come together in `said`, its beginning only. Use as a context manager:
    at the end everything is dead. The room's folders stay; `clear(room)` removes them.
    """

    def __init__(self, room: Room, argv: list[str]) -> None:
        self.room, self.group = room, Group.make(room.limits)
        self.watch: Watch | None = None
        self.process: subprocess.Popen | None = None
        self.pidfd = -1
        self._reader: threading.Thread | None = None
        self._group_hit: tuple[str, str] | None = None
        self._said, self._count = bytearray(), 0
        try:
            self._start(argv)
        except BaseException:
            self.close()
            raise

    @classmethod
    def start(cls, room: Room, argv: list[str]) -> Confined:
        """Raises SandboxMissing where there is no bubblewrap, TimeoutError or OSError where it does not start."""
        return cls(room, argv)

    def _start(self, argv: list[str]) -> None:
        told, tell = os.pipe()
        with tempfile.TemporaryFile() as arguments, tempfile.TemporaryFile() as filters:
            handed = [tell, arguments.fileno()]
            seccomp = None
            if code := syscalls.program():
                filters.write(code)
                filters.seek(0)
                seccomp = filters.fileno()
                handed.append(seccomp)
            line = command(self.room, launcher(self.room.limits, argv), seccomp)
            end = line.index("--")
            arguments.write("\0".join([*line[1:end], "--info-fd", str(tell), ""]).encode())
            arguments.seek(0)
            line = [line[0], "--args", str(arguments.fileno()), *line[end:]]
            try:
                # Linux ends a --die-with-parent child with the *thread* that started it: one that lives on does it
                self.process = _starter().submit(
                    subprocess.Popen, first_victim(line, self.group), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, env={}, pass_fds=handed, start_new_session=True).result()
            finally:
                os.close(tell)
        try:
            pid = _first_process(told)
        finally:
            os.close(told)
        if pid is not None:
            self.pidfd = os.pidfd_open(pid)
        if pid is None or self._read(1) != READY:
            self.kill()
            raise OSError(f"bubblewrap did not start: {self._read(2000).decode(errors='replace').strip() or 'silent'}")
        # The launcher runs, so process 1 has come to its last lines: it binds its life to its parent's, then sleeps
        # until a child ends. A grader that is killed before would leave it behind.
        until = time.monotonic() + START
        while _state(pid) not in "SZX":
            if time.monotonic() > until:
                raise TimeoutError("bubblewrap did not start: its process 1 does not come to rest")
            time.sleep(0.001)
        self.watch = Watch(pid, self.pidfd, self.room.limits, (self.room.exchange, self.room.sockets), self.kill)
        self.watch.start()
        self._reader = threading.Thread(target=self._drain, daemon=True, name="sandbox output")
        self._reader.start()
        try:
            self.process.stdin.write(GO)
            self.process.stdin.close()
        except BrokenPipeError:
            pass

    def _read(self, most: int) -> bytes:
        """What comes first on the program's output, before the thread that reads the rest."""
        ready, _, _ = select.select([self.process.stdout], [], [], START)
        return os.read(self.process.stdout.fileno(), most) if ready else b""

    def _drain(self) -> None:
        stream, most = self.process.stdout, self.room.limits.output_bytes
        while piece := os.read(stream.fileno(), 2**16):
            self._said += piece[:max(0, KEPT - len(self._said))]
            self._count += len(piece)
            if self._count > most and self.watch and self.watch.hit is None:
                self.watch.over("output", f"it printed more than {most / 2**20:.0f} MiB")

    @property
    def said(self) -> str:
        """The beginning of what it wrote on its first outputs."""
        return self._said.decode(errors="replace")

    @property
    def hit(self) -> Hit | None:
        """The limit that ended it, if one did."""
        if self.watch and self.watch.hit:
            return self.watch.hit
        found = self.group.hit() if self.group else self._group_hit
        return Hit(*found) if found else None

    @property
    def usage(self) -> Usage:
        """The most that it used so far."""
        return self.watch.usage if self.watch else Usage()

    def poll(self) -> int | None:
        """The program's exit status, None while it runs. What it left behind may still run: see `gone`."""
        return self.process.poll() if self.process else 0

    def kill(self) -> None:
        """Kill every process in it. Returns at once."""
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
        elif self.process:
            self.process.kill()

    def gone(self, seconds: float = 10.0) -> bool:
        """Wait until no process of it is left; whether that is so."""
        until = time.monotonic() + seconds
        if not self._is_gone(seconds):
            return False
        try:
            self.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
        return True

    def _is_gone(self, seconds: float) -> bool:
        if self.pidfd < 0:
            return self.process is None or self.process.poll() is not None
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        """Kill everything, wait until it is gone, let go of what belongs to it. May be called again."""
        self.kill()
        if self.process:
            self.gone()
            if self.watch and self.watch.ident:
                self.watch.finish()
            if self._reader:
                self._reader.join(5)
            for stream in (self.process.stdin, self.process.stdout):
                stream.close()
        if self.group:
            self._group_hit = self.group.hit()
            self.group.remove()
            self.group = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self.process = None

    def __enter__(self) -> Confined:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _starter() -> ThreadPoolExecutor:
    """The thread that starts bubblewrap in this process; it lives as long as the process does."""
    return _starters.setdefault(os.getpid(), ThreadPoolExecutor(1, "sandbox starter"))


def _state(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return "X"
    return text.rpartition(b")")[2].split()[0].decode()


def _first_process(told: int) -> int | None:
    """Process 1's number as this side sees it; None if bubblewrap ended before it made one."""
    text = b""
    while piece := os.read(told, 4096):
        text += piece
        if b"}" in text:
            return int(json.loads(text)["child-pid"])
    return None
