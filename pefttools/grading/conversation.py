"""Talks to a kernel that may lie: sends source, waits for its end, keeps what may be kept of what it says.

    execute ──►            ends when the kernel says so on both channels (reply, idle), or
    ◄── stream, data       · the time is over, or it says too much → interrupted, and killed if it goes on
    ◄── error              · it died, or a limit of the sandbox ended it
    ◄── reply, idle

The key that signs messages lies in the student's process, so a message proves nothing: whatever it says is text for a
feedback page, and a lie about the end of a cell only begins the next one early. Every wait has an end, every size is
bounded: by bytes counted here, and by the memory of this very process, for a message of endless parts is held in it
before anybody can count it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import zmq

from pefttools.grading.exchange import NoAnswer, take
from pefttools.grading.outputs import Outputs
from pefttools.grading.sandbox import Limits, Room, new_room

LAST_WORDS = 10.0       # seconds that a cell's outputs may lag behind its reply, where a machine is busy with others
AFTER_INTERRUPT = 4.0   # seconds to end in, once interrupted
STARTUP = 300.0
TICK = 0.05
# On a busy machine a request can lie unread in the kernel's queue, or its reply in ours: a zmq socket announces a message
# once, and a send at that moment takes the announcement (ipykernel's issue 1554). The next message wakes the reader.
NUDGE = 1.0             # seconds until the first; doubled each time
SMALLEST = 256          # bytes that a message counts for at least, however empty: reading it takes time
GROWTH = 2**29          # bytes by which this process may grow while it listens to one cell
LONGEST, WAITING = 4, 100  # a message's length, in times of what one cell may say; how many may wait on this side
DELIMITER = b"<IDS|MSG>"
QUIET = ["--HistoryManager.hist_file=:memory:", "--Application.log_level=40"]
BARE_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PEFTTOOLS_QUICK": "1"}


class KernelFailed(RuntimeError):
    """The kernel did not start: the machine is at fault, not a submission."""


@dataclass
class Ran:
    """How a piece of source ended: "done" or "error" as the kernel says, "time", "output", "died"."""

    end: str
    outputs: Outputs = field(default_factory=Outputs)
    words: str = ""                     # of "died", "time" and "output": what happened, for the student
    limit: str = ""                     # which limit, if one was hit
    usable: bool = True                 # whether the kernel takes more


class Conversation:
    """One kernel, in a room of its own (or, without a sandbox, in a plain process). `await start()`, `run`, `close`."""

    def __init__(self, stage: Path, hidden: tuple[str, ...], limits: Limits, sandbox: bool, secret: tuple[Path, ...] = ()):
        self.stage, self.hidden, self.limits, self.sandbox, self.secret = stage, hidden, limits, sandbox, secret
        self.room: Room | None = None
        self.km: Any = None
        self.kc: Any = None
        self._handlers: dict[str, Any] = {}
        self._pumps: list[asyncio.Task] = []
        self._flood = 0

    # ---------------------------------------------------------------------------------------- begin and end

    async def start(self) -> None:
        """Raises SandboxMissing, or KernelFailed where the kernel does not answer."""
        self.room = new_room(self.stage, self.hidden, self.limits, secret=self.secret)
        try:
            if self.sandbox:
                from pefttools.grading.provisioner import kernel_manager

                self.km = kernel_manager(self.room)
                await self.km.start_kernel()
            else:
                self.km = _plain_manager()
                await self.km.start_kernel(env=self._environment(), cwd=str(self._scratch()))
            self.kc = self.km.client()
            self.kc.context.setsockopt(zmq.MAXMSGSIZE, LONGEST * self.limits.output_bytes)
            self.kc.context.setsockopt(zmq.RCVHWM, WAITING)
            self.kc.start_channels(stdin=False, hb=False, control=False)
            channels = (self.kc.shell_channel.socket, "shell"), (self.kc.iopub_channel.socket, "iopub")
            self._pumps = [asyncio.create_task(pump(socket, name)) for socket, name in channels
                           for pump in (self._pump, self._listen)]
            await self._greet()
        except BaseException:
            await self.close()
            raise

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.stage), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, **BARE_ENVIRONMENT, "PYTHONPATH": path, "PEFTTOOLS_EXCHANGE": str(self.room.exchange)}

    def _scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="scratch-", dir=self.room.exchange.parent))

    async def _greet(self) -> None:
        """Ask until both channels have answered: what a kernel prints before it knows its listener is lost."""
        until, patience = time.monotonic() + STARTUP, NUDGE
        heard = {"shell": asyncio.Event(), "iopub": asyncio.Event()}
        while not all(event.is_set() for event in heard.values()):
            message = self.kc.session.msg("kernel_info_request", {})
            self._handlers[message["header"]["msg_id"]] = lambda kind, content, channel: heard[channel].set()
            await self._send(message)
            try:
                await asyncio.wait_for(heard["shell"].wait(), 5)
                await asyncio.wait_for(heard["iopub"].wait(), patience)
            except (asyncio.TimeoutError, TimeoutError):
                patience = min(2 * patience, 5)
            if not await self._alive() or time.monotonic() > until:
                await asyncio.sleep(0.2)
                confined = getattr(self.km.provisioner, "confined", None)
                said = confined.said if confined else getattr(self.km.provisioner, "said", "")
                why = self.hit.words if self.hit else said.strip()[-500:] or "it said nothing"
                raise KernelFailed(f"the kernel did not start: {why}")
        self._handlers.clear()

    async def close(self) -> None:
        """End the kernel with all that it started; the room's folders go. May be called again."""
        await self._deafen()  # first of all: until it is dead it may go on sending, and zmq would go on holding that
        if self.km is not None:
            try:
                if self.km.has_kernel:
                    await self.km.provisioner.kill()
                    await self.km.provisioner.wait()
            except (OSError, RuntimeError):
                pass
        if self.km is not None:
            try:
                await self.km.cleanup_resources()
            except (OSError, RuntimeError):
                pass
            self.km = None
        if self.room is not None:
            from pefttools.grading.confined import clear

            room, self.room = self.room, None
            await asyncio.get_running_loop().run_in_executor(None, clear, room)

    async def _deafen(self) -> None:
        """Receive nothing more, and let go of what was received."""
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        self._pumps = []
        if self.kc is not None:
            self.kc.stop_channels()
            if not self.kc.context.closed:
                self.kc.context.destroy(linger=0)
            self.kc = None

    @property
    def hit(self) -> Any:
        """The limit of the sandbox that ended the kernel, or None."""
        return getattr(self.km.provisioner, "hit", None) if self.km is not None and self.km.provisioner else None

    @property
    def usage(self) -> Any:
        """The most that the sandbox's watcher saw, or None."""
        return getattr(self.km.provisioner, "usage", None) if self.km is not None and self.km.provisioner else None

    async def _alive(self) -> bool:
        provisioner = self.km.provisioner
        return provisioner is not None and provisioner.has_process and await provisioner.poll() is None

    # ---------------------------------------------------------------------------------------- one cell

    async def run(self, source: str, seconds: float) -> Ran:
        """Run some source for at most so many seconds."""
        ran = Ran("done")
        state = {"reply": "", "idle": False}

        def handle(kind: str, content: dict[str, Any], channel: str) -> None:
            if kind == "execute_reply" and channel == "shell":
                state["reply"] = "error" if content.get("status") == "error" else "done"
            elif channel == "iopub" and kind == "status":
                state["idle"] = state["idle"] or content.get("execution_state") == "idle"
            elif channel == "iopub":
                ran.outputs.add(kind, content)

        message = self.kc.session.msg("execute_request", {
            "code": source, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False,
            "stop_on_error": False})
        self._handlers = {message["header"]["msg_id"]: handle}
        self._flood, before = 0, _resident()
        await self._send(message)
        until, replied = time.monotonic() + seconds, 0.0
        interrupted = False
        nudge, gap = time.monotonic() + NUDGE, NUDGE
        while not (state["reply"] and state["idle"]):
            await self._tick()
            now = time.monotonic()
            if _resident() - before > GROWTH:  # also after the reply: its last words may be what has no end
                await self._deafen()
                return self._lost(ran, "output", "it sent more than can be held", "output")
            if now > nudge:
                gap *= 2
                nudge = now + gap
                await self._send(self.kc.session.msg("kernel_info_request", {}))
            if state["reply"]:
                replied = replied or now
                if now - replied > LAST_WORDS:
                    break
                if self._flood <= self.limits.output_bytes:
                    continue
            if not await self._alive():
                await asyncio.sleep(0.1)
                return self._died(ran, state)
            flood = self._flood > self.limits.output_bytes
            if not interrupted and (now > until or flood):
                interrupted, until = True, now + AFTER_INTERRUPT
                ran.end, ran.limit = ("output", "output") if flood else ("time", "cell time")
                ran.words = (f"it printed or showed more than {self.limits.output_bytes / 2**20:.0f} MiB" if flood
                             else f"it ran for longer than {seconds:.0f} seconds" if seconds >= 1
                             else "the time for the whole notebook was over")
                self._flood = 0
                await self._interrupt()
            elif interrupted and (now > until or flood):
                return self._lost(ran, ran.end, ran.words, ran.limit)
        self._handlers = {}
        if not interrupted:
            ran.end = state["reply"]
        else:
            ran.outputs.fail("Stopped", ran.words)
        return ran

    def _lost(self, ran: Ran, end: str, words: str, limit: str) -> Ran:
        """It goes on: this kernel is given up."""
        self._handlers = {}
        ran.outputs.fail("Stopped", words)
        return replace(ran, end=end, words=words, limit=limit, usable=False)

    def _died(self, ran: Ran, state: dict) -> Ran:
        self._handlers = {}
        hit = self.hit
        words = hit.words if hit else "the process in which it ran ended (os._exit, a crash, or too little memory)"
        ran.outputs.fail("Stopped", words)
        return replace(ran, end="died", words=words, limit=hit.limit if hit else "", usable=False)

    def answer(self, token: str, most: int) -> bytes:
        """TOKEN.out, or NoAnswer."""
        if self.room is None:
            raise NoAnswer("no answers were written")
        return take(self.room.exchange, token, most)

    # ---------------------------------------------------------------------------------------- messages

    async def _send(self, message: dict[str, Any]) -> None:
        # not session.send: it writes past asyncio's socket, which then can miss a reply that comes at that moment
        await self.kc.shell_channel.socket.send_multipart(self.kc.session.serialize(message))

    async def _tick(self) -> None:
        await asyncio.sleep(TICK if self._flood > 2**20 else 0.005)

    async def _interrupt(self) -> None:
        try:
            await asyncio.wait_for(self.km.interrupt_kernel(), 5)
        except (OSError, RuntimeError, asyncio.TimeoutError, TimeoutError):
            pass

    async def _pump(self, socket: Any, channel: str) -> None:
        """Read one channel for as long as the kernel lives."""
        while True:
            parts = await socket.recv_multipart()
            self._flood += max(SMALLEST, sum(map(len, parts)))
            if self._flood <= 2 * self.limits.output_bytes:
                read = _read(parts)
                handler = self._handlers.get(read[1]) if read else None
                if handler is not None:
                    handler(read[0], read[2], channel)
            # more may be waiting, and then the line above never lets anybody else run
            await asyncio.sleep(0)


    async def _listen(self, socket: Any, channel: str) -> None:
        """A message that is too long is not received: zmq cuts the connection, and nobody would know why."""
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            while True:
                await monitor.recv_multipart()
                self._flood += self.limits.output_bytes + 1
        finally:
            socket.disable_monitor()


def _read(parts: list[bytes]) -> tuple[str, str, dict[str, Any]] | None:
    """(type, id of the request, content) of a message; None for what is none."""
    try:
        at = parts.index(DELIMITER)
        header, parent, content = (json.loads(parts[at + n]) for n in (2, 3, 5))
        kind, request = header["msg_type"], parent["msg_id"]
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        return None
    if type(kind) is not str or type(request) is not str or type(content) is not dict:
        return None
    return kind, request, content


def _resident() -> int:
    """Bytes of memory that this process takes; 0 where that cannot be read."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _plain_manager() -> Any:
    """A manager for this Python's kernel, without a sandbox. Needs no installed kernelspec."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class PlainKernelManager(AsyncKernelManager):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}",
                                                 *QUIET], display_name="Python 3", language="python", metadata={})

    return PlainKernelManager()
