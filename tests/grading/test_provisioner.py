"""A Jupyter kernel in the sandbox: it starts, talks, is interrupted, ends, and nothing of it is left."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.provisioning import KernelProvisionerFactory
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError

from pefttools.grading import sandbox
from pefttools.grading.confined import KEPT, clear
from pefttools.grading.provisioner import SandboxKernelManager, SandboxProvisioner, kernel_manager
from pefttools.grading.sandbox import Limits, Room, new_room

pytestmark = pytest.mark.skipif(sandbox.available() is not None, reason=f"no sandbox here: {sandbox.available()}")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def room(tmp_path):
    made = new_room(tmp_path, ("yaml",))
    yield made
    clear(made)


class Client(NotebookClient):
    """Makes its kernel's manager as a grader would, and so shuts the kernel down itself."""

    def __init__(self, notebook, room_or_km, **options) -> None:
        super().__init__(notebook, **{"timeout": 60, **options})
        self.manager = kernel_manager(room_or_km) if isinstance(room_or_km, Room) else room_or_km

    def create_kernel_manager(self):
        self.km = self.manager
        return self.km


def code_cells(*cells: str):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])


def execute(room: Room, *cells: str, **options):
    """The cells' outputs and the manager, after the end."""
    notebook, km = code_cells(*cells), kernel_manager(room)
    Client(notebook, km, **options).execute()
    return ["".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)
            for cell in notebook.cells], km


def left(room: Room) -> list[int]:
    """Processes of this machine that hold this room's folder in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(room.sockets).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def test_a_notebook_runs_in_it(room):
    outputs, km = execute(
        room,
        "import os\nprint(os.getcwd(), os.environ['PEFTTOOLS_SANDBOX'], os.path.exists('/home'))",
        "x = 6 * 7\nx",
        "import subprocess; subprocess.run(['echo', 'a child']); os.write(1, b'raw\\n');",
        "import yaml",
        allow_errors=True,
    )
    assert outputs[:2] == ["/scratch 1 False\n", "42"] and "a child" in outputs[2] and "raw" in outputs[2]
    assert km.provisioner.hit is None and km.provisioner.usage.memory > 10**6
    assert left(room) == [] and list(room.sockets.iterdir()) == []


def test_everything_that_it_started_is_dead(room):
    _, km = execute(room, f"""
import os, subprocess, sys
code = 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)'
daemon = [sys.executable, '-c', code, {str(room.sockets)!r}]
subprocess.Popen(daemon, start_new_session=True)
if os.fork() == 0:
    os.setsid()
    os.execv(daemon[0], daemon)
""", "import time; time.sleep(0.3); print('on')")
    assert left(room) == []


def test_a_kernel_that_ends_itself_is_noticed(room):
    with pytest.raises(DeadKernelError):
        execute(room, "import os; os._exit(3)")
    assert left(room) == []


def test_a_cell_that_never_ends_is_interrupted_by_a_message(room):
    """Signals do not reach inside. After the interruption the kernel goes on."""
    notebook = code_cells("while True: pass", "print('alive')")
    Client(notebook, room, timeout=2, interrupt_on_timeout=True, allow_errors=True).execute()
    assert notebook.cells[0].outputs[0]["ename"] == "KeyboardInterrupt"
    assert notebook.cells[1].outputs[0]["text"] == "alive\n"
    with pytest.raises(CellTimeoutError):
        Client(notebook, room, timeout=1).execute()
    assert left(room) == []


@pytest.mark.parametrize(("limits", "code", "which"), [
    ({"notebook_seconds": 3}, "import time; time.sleep(60)", "wall time"),
    ({"memory": 400 * 2**20}, "import os, time\nfor _ in range(6):\n    if not os.fork():\n        x = b'x' * 10**8\n"
                              "        time.sleep(60)\ntime.sleep(60)", "memory"),
    ({"processes": 60}, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "processes"),
])
def test_a_limit_ends_the_kernel_and_is_named(room, limits, code, which):
    room = Room(room.stage, room.exchange, room.sockets, limits=Limits(**limits))
    km = kernel_manager(room)
    begun = time.monotonic()
    with pytest.raises((DeadKernelError, RuntimeError)):
        Client(code_cells(code), km).execute()
    assert km.provisioner.hit.limit == which and time.monotonic() - begun < 30
    assert left(room) == []


def test_a_message_larger_than_the_limit_does_not_come_through(room):
    """What one message may take of the grader's memory is bounded; the connection is closed on it, and made again."""
    room = Room(room.stage, room.exchange, room.sockets, limits=Limits(output_bytes=2**20))

    async def go():
        km = kernel_manager(room)
        await km.start_kernel()
        kc = km.client()
        kc.start_channels()
        await kc.wait_for_ready(timeout=60)
        kc.execute("print('x' * 50_000_000)")
        sizes = []
        try:
            while True:
                message = await kc.get_iopub_msg(timeout=4)
                sizes.append(len(json.dumps(message["content"])))
        except Exception:  # nothing comes any more
            pass
        kc.stop_channels()
        await km.shutdown_kernel(now=True)
        return sizes

    sizes = asyncio.run(go())
    assert max(sizes, default=0) < 2**20
    assert left(room) == []


def test_a_flood_past_the_kernel_s_own_streams(room):
    room = Room(room.stage, room.exchange, room.sockets, limits=Limits(output_bytes=2**20))
    km = kernel_manager(room)
    # IPython's own capture sits on descriptors 1 and 2; the originals are the pipe to the grader
    code = "import os\nfor fd in range(3, 60):\n    try:\n        if 'pipe' in os.readlink(f'/proc/self/fd/{fd}'):\n" \
           "            for _ in range(100): os.write(fd, b'x' * 65536)\n    except OSError: pass"
    try:
        Client(code_cells(code), km, timeout=10).execute()
    except Exception:  # killed, or stuck in one of its own pipes until the time is up
        pass
    assert left(room) == [] and len(km.provisioner.said) <= KEPT


def test_it_needs_a_short_path(tmp_path):
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    with pytest.raises(ValueError, match="too long for the path of a socket"):
        asyncio.run(kernel_manager(Room(tmp_path, long, long)).start_kernel())


def test_as_an_entry_point_with_a_room_of_its_own(monkeypatch, tmp_path):
    """A kernelspec that names the provisioner, as stock Jupyter programs use it."""
    from importlib.metadata import EntryPoint

    name = "pefttools-sandbox"
    point = EntryPoint(name, f"{SandboxProvisioner.__module__}:{SandboxProvisioner.__qualname__}",
                       KernelProvisionerFactory.GROUP_NAME)
    monkeypatch.setitem(KernelProvisionerFactory.provisioners, name, point)
    from jupyter_client import AsyncKernelManager

    km = AsyncKernelManager()
    km._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python",
        display_name="x", interrupt_mode="message",
        metadata={"kernel_provisioner": {"provisioner_name": name, "config": {"hidden": ["yaml"]}}})
    notebook = code_cells("import yaml", "1")
    Client(notebook, km, allow_errors=True).execute()
    assert "not available while grading" in notebook.cells[0].outputs[0]["evalue"]
    assert isinstance(km.provisioner, SandboxProvisioner) and km.provisioner.room is None  # its folders are removed


def test_a_synchronous_caller(room):
    """nbgrader's Execute calls a manager from code that has no event loop of its own."""
    from jupyter_core.utils import run_sync

    km = SandboxKernelManager(room=room)
    run_sync(km.start_kernel)()
    assert run_sync(km.is_alive)() and left(room)
    run_sync(km.shutdown_kernel)(now=True)
    assert not left(room) and not run_sync(km.is_alive)()


STARTING = """
import asyncio, sys, time
from pathlib import Path
from jupyter_client import AsyncKernelManager
from pefttools.grading.provisioner import kernel_manager
from pefttools.grading.sandbox import new_room
from pefttools.grading.confined import clear

async def ready(km):
    begun = time.perf_counter()
    await km.start_kernel()
    kc = km.client(); kc.start_channels()
    await kc.wait_for_ready(timeout=60)
    seconds = time.perf_counter() - begun
    kc.stop_channels(); await km.shutdown_kernel(now=True)
    return seconds

plain, boxed = [], []
for _ in range(3):
    plain.append(asyncio.run(ready(AsyncKernelManager())))
    room = new_room(Path(sys.argv[1]))
    boxed.append(asyncio.run(ready(kernel_manager(room))))
    clear(room)
print(min(plain), min(boxed))
"""


def test_it_starts_within_a_second_of_a_plain_kernel(tmp_path):
    done = subprocess.run([sys.executable, "-c", STARTING, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    plain, boxed = map(float, done.stdout.split())
    assert boxed < plain + 1.0
