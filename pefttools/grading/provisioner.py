"""A Jupyter kernel in a room: a kernel provisioner (jupyter_client's extension point) on top of `confined.py`.

    km = kernel_manager(room)            for whoever runs notebooks: NotebookClient(nb, km=km), or Execute's
    km.start_kernel() …                  create_kernel_manager; all of jupyter_client works as usual
    km.provisioner.hit                   which limit ended it, if one did
    km.provisioner.usage                 memory, processes, CPU time

The kernel talks through Unix sockets (transport "ipc") in the room's socket folder, where its connection file lies
too; interrupts go as messages, for signals do not reach into a namespace of process ids. When the kernel is killed,
terminated or cleaned up, every process that it started is dead before the call returns.

In a kernelspec, for stock Jupyter programs (installed as the entry point `pefttools-sandbox`):

    "interrupt_mode": "message",
    "metadata": {"kernel_provisioner": {"provisioner_name": "pefttools-sandbox", "config": {"hidden": ["peft"]}}}
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import zmq
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.provisioning import LocalProvisioner
from traitlets import Instance, List, Unicode

from pefttools.grading.confined import Confined, clear
from pefttools.grading.sandbox import Room, new_room
from pefttools.grading.watch import Hit, Usage

ARGV = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
QUIET = ["--HistoryManager.hist_file=:memory:", "--Application.log_level=40"]
LONGEST = 100  # characters of a Unix socket's path; Linux takes 107
WAITING = 200  # messages from the kernel that this side holds; more wait on the kernel's side, in its memory


class SandboxProvisioner(LocalProvisioner):
    """Starts the kernel's command in a room: the manager's (`kernel_manager`), or one of its own."""

    stage = Unicode("", config=True, help="folder that is /stage inside; empty: an empty one")
    hidden = List(Unicode(), config=True, help="packages that are not importable inside")
    room: Room | None = None
    confined: Confined | None = None
    said = ""  # the beginning of what the kernel's process wrote on its own outputs: why it died, for the log
    _own = False
    _hit: Hit | None = None
    _usage = Usage()

    @property
    def hit(self) -> Hit | None:
        """The limit that ended the kernel, if one did; also after the kernel was cleaned up."""
        return self.confined.hit if self.confined else self._hit

    @property
    def usage(self) -> Usage:
        """The most that the kernel and its children used so far."""
        return self.confined.usage if self.confined else self._usage

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Give the manager sockets in the room's folder before it writes the connection file."""
        room = kwargs.pop("room", None) or getattr(self.parent, "room", None) or self.room
        if room is None:
            room, self._own = self._new_room(), True
        self.room = room
        if len(f"{room.sockets}/k-00") > LONGEST:
            raise ValueError(f"room.sockets: {str(room.sockets)!r} is too long for the path of a socket (at most "
                             f"{LONGEST - 5} characters); new_room makes a short one.")
        km = self.parent
        km.transport, km.ip = "ipc", str(room.sockets / "k")
        km.connection_file = str(room.sockets / "kernel.json")
        km.cache_ports = False
        kwargs = await super().pre_launch(**kwargs)
        # nbclient and nbgrader's configuration add the same ones; a kernel ends at once if it gets one twice
        options = dict.fromkeys([*kwargs["cmd"][len(self.kernel_spec.argv):], *QUIET])
        return {**kwargs, "cmd": [*kwargs["cmd"][:len(self.kernel_spec.argv)], *options]}

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        """Start it; what jupyter_client would pass on (environment, folder, streams) stays outside."""
        loop = asyncio.get_running_loop()
        self.confined = await loop.run_in_executor(None, Confined.start, self.room, cmd)
        self.process = self.confined.process
        self.pid, self.pgid = self.process.pid, None
        return self.connection_info

    async def send_signal(self, signum: int) -> None:
        """SIGKILL and SIGTERM end all of it; other signals do not reach inside (interrupts are messages)."""
        if self.confined and signum in (9, 15):
            self.confined.kill()

    async def kill(self, restart: bool = False) -> None:
        """Kill every process in the room; none is left when this returns."""
        await self._end()

    async def terminate(self, restart: bool = False) -> None:
        """The same as `kill`: what would be saved lies in memory that nobody reads."""
        await self._end()

    async def wait(self) -> int | None:
        """The kernel's exit status, once every process that it started is gone."""
        if not self.process:
            return 0
        while (status := self.process.poll()) is None:
            await asyncio.sleep(0.02)
        await self._end()
        return status

    async def cleanup(self, restart: bool = False) -> None:
        """As `kill`; removes the room's folders if they are its own."""
        await self._end()
        if self._own and not restart and self.room is not None:
            clear(self.room)
            self.room = None

    def kill_all(self) -> None:
        """Everything that the kernel started is dead when this returns. For those without an event loop."""
        if self.confined:
            self.confined.close()
            self.said = self.confined.said
            self._hit, self._usage = self.confined.hit, self.confined.usage
            self.confined = self.process = None

    async def _end(self) -> None:
        if self.confined:
            await asyncio.get_running_loop().run_in_executor(None, self.kill_all)

    def _new_room(self) -> Room:
        room = new_room(Path(self.stage), tuple(self.hidden))
        if not self.stage:
            empty = room.exchange.parent / "stage"
            empty.mkdir()
            room = Room(empty, room.exchange, room.sockets, room.hidden, room.limits)
        return room


class SandboxKernelManager(AsyncKernelManager):
    """A manager whose kernel is Python's, in `room`. Needs no kernelspec and no installed entry point."""

    room = Instance(Room, allow_none=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._kernel_spec = KernelSpec(argv=list(ARGV), display_name="Python 3, sandboxed", language="python",
                                       interrupt_mode="message", metadata={})
        self.provisioner = SandboxProvisioner(kernel_id="", kernel_spec=self._kernel_spec, parent=self)

    def client(self, **kwargs: Any):
        """As jupyter_client's, but with a bound on what one message, and all that wait, may take of our memory."""
        kc = super().client(**kwargs)
        if self.room is not None:
            kc.context.setsockopt(zmq.MAXMSGSIZE, self.room.limits.output_bytes)
            kc.context.setsockopt(zmq.RCVHWM, WAITING)
        return kc


def kernel_manager(room: Room, **kwargs: Any) -> SandboxKernelManager:
    """A kernel manager, not started, whose kernel will run in this room."""
    return SandboxKernelManager(room=room, **kwargs)
