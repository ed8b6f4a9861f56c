"""Using everything up: memory, processes, time, disk, stack, descriptors. Each ends within its limit, and says so."""

from __future__ import annotations

from hostile.attack import code

FAMILY = "exhaustion"
HARM = "would take this machine's {}"
HONEST = ("count-parameters",)  # what stands elsewhere in the notebook keeps its points


@code("memory-one", FAMILY, "takes memory in one process until there is none", HONEST, stock=HARM.format("memory"))
def _():
    return "kept = []\nwhile True:\n    kept.append(bytearray(50_000_000))"


@code("memory-many", FAMILY, "takes memory in many processes, each below any limit of its own", HONEST,
      stock=HARM.format("memory"), slow=True)
def _():
    return """
import os, time
for _ in range(40):
    if os.fork() == 0:
        kept = bytearray(os.urandom(1)) * 100_000_000
        time.sleep(1000)
time.sleep(1000)
"""


@code("memory-files", FAMILY, "takes memory through files in memory that are unlinked and kept open", HONEST,
      stock=HARM.format("memory"), slow=True)
def _():
    return """
import os, mmap
kept = []
for folder in ("/dev/shm", "/tmp", "."):
    for n in range(200):
        try:
            file = open(f"{folder}/hostile-{n}", "wb")
            os.unlink(file.name)
            file.write(b"x" * 50_000_000)
            file.flush()
            kept.append(file)
        except OSError as error:
            print(error)
            break
maps = [mmap.mmap(-1, 50_000_000) for _ in range(200)]
for each in maps:
    each[:] = b"x" * 50_000_000
"""


@code("fork-bomb", FAMILY, "a fork bomb", HONEST, stock=HARM.format("process table"), slow=True)
def _():
    return """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


@code("thread-bomb", FAMILY, "threads without end, each asleep", HONEST, stock=HARM.format("process table"))
def _():
    return """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(1000,), daemon=False).start()
"""


@code("cpu-in-children", FAMILY, "computes in children that replace one another, each short", HONEST,
      stock=HARM.format("processors until its time limit"), slow=True)
def _():
    return """
import os, time
while True:
    for _ in range(8):
        if os.fork() == 0:
            end = time.process_time() + 0.5
            while time.process_time() < end:
                pass
            os._exit(0)
    for _ in range(8):
        os.wait()
"""


@code("endless-loop", FAMILY, "an endless loop", HONEST, slow=True)
def _():
    return "while True:\n    pass"


@code("ignores-interrupt", FAMILY,
      "an endless loop that swallows KeyboardInterrupt and blocks signals", HONEST, slow=True)
def _():
    return """
import signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU):
    signal.signal(number, signal.SIG_IGN)
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""


@code("sleeps", FAMILY, "sleeps for a day, in C, without the GIL's help", HONEST, slow=True)
def _():
    return """
import ctypes
ctypes.PyDLL(None).sleep(86_400)
"""


@code("hangs-in-the-work", FAMILY,
      "the work itself never returns, so that it is the check that hangs", HONEST, slow=True)
def _():
    return "def lora_forward(*_, **__):\n    while True:\n        pass"


@code("regular-expression", FAMILY, "a regular expression that backtracks for years, in C", HONEST, slow=True)
def _():
    return 'import re\nre.match(r"(a+)+$", "a" * 60 + "b")'


@code("big-power", FAMILY, "9**9**9**9 and a string of two billion characters", HONEST, slow=True)
def _():
    return "x = 9**9**9\ny = 'x' * 2**31\nz = list(range(10**10))"


@code("disk-full", FAMILY, "fills every folder that can be written", HONEST, stock=HARM.format("disk"), slow=True)
def _():
    return """
import os
for folder in (".", "/tmp", "/dev/shm", "/exchange", "/var/tmp", os.path.expanduser("~")):
    try:
        for n in range(1000):
            with open(f"{folder}/hostile-{n}", "wb") as file:
                file.write(b"x" * 20_000_000)
    except OSError as error:
        print(folder, error)
"""


@code("many-files", FAMILY, "a million empty files, folders and links", HONEST, stock=HARM.format("inodes"), slow=True)
def _():
    return """
import os
for folder in ("/exchange", "/tmp", "."):
    try:
        for n in range(1_000_000):
            os.symlink("/etc/passwd", f"{folder}/l{n}")
            os.mkdir(f"{folder}/d{n}")
    except OSError as error:
        print(folder, error)
"""


@code("deep-folders", FAMILY, "folders in folders, thousands deep, without permissions", HONEST,
      stock="leaves folders behind that are hard to delete")
def _():
    return """
import os
for start in ("/exchange", "."):
    try:
        os.chdir(start)
        for _ in range(3000):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    except OSError as error:
        print(error)
    try:
        os.chmod(".", 0)
        os.chmod(start, 0)
    except OSError as error:
        print(error)
"""


@code("deep-recursion", FAMILY, "recursion with no limit", HONEST)
def _():
    return "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)"


@code("segfault", FAMILY, "reads address 0", HONEST)
def _():
    return "import ctypes\nctypes.string_at(0)"


@code("os-exit", FAMILY, "os._exit(0): the kernel ends as if all were well", HONEST)
def _():
    return "import os\nos._exit(0)"


@code("exit-in-the-work", FAMILY, "os._exit(0) from the work, in the middle of the check", HONEST)
def _():
    return "import os\ndef lora_forward(*_, **__): os._exit(0)"


@code("kill-parent", FAMILY,
      "kill -9 to its parent, to process 1 and to everybody", HONEST, stock=HARM.format("other processes"))
def _():
    return """
import os, signal
for number in (os.getppid(), 1, -1):
    try:
        os.kill(number, signal.SIGKILL)
    except OSError as error:
        print(number, error)
"""


@code("close-descriptors", FAMILY, "closes every file descriptor of the kernel", HONEST, slow=True)
def _():
    return "import os\nos.closerange(0, 4096)"


@code("stop-itself", FAMILY, "SIGSTOP to itself: a kernel that neither lives nor dies", HONEST, slow=True)
def _():
    return "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"


@code("asks-for-input", FAMILY, "waits for input() and getpass()", HONEST)
def _():
    return "import getpass\nname = input('password of the instructor: ')\ngetpass.getpass()"


@code("huge-exception", FAMILY, "an exception with a text of 300 MB, caused by an endless chain of others", HONEST)
def _():
    return """
error = ValueError("x" * 300_000_000)
for n in range(2000):
    error.__context__ = ValueError(str(n))
    error.__context__.__cause__ = error
raise error
"""


@code("memory-sockets", FAMILY, "memory in the buffers of sockets and pipes, which belongs to no process", HONEST,
      stock=HARM.format("memory"), slow=True)
def _():
    return """
import fcntl, os, socket, time
def fill():
    kept = []
    while True:
        try:
            a, b = socket.socketpair()
            a.setblocking(False)
            a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**24)
            r, w = os.pipe()
            os.set_blocking(w, False)
            kept += [a, b]
            try:
                fcntl.fcntl(w, 1031, 2**20)
            except OSError:
                pass
            for send in (lambda: a.send(b"x" * 2**16), lambda: os.write(w, b"x" * 2**16)):
                try:
                    while True:
                        send()
                except BlockingIOError:
                    pass
        except OSError:
            return kept
for _ in range(40):
    if os.fork() == 0:
        kept = fill()
        time.sleep(1000)
time.sleep(1000)
"""


BOMBS = ("'-' * 200_000 + '1'", "'not ' * 60_000 + 'x'", "'1' + '+1' * 120_000", "'a' + '.b' * 120_000", "'(' * 5_000",
         "'lambda: ' * 30_000 + '1'", "'[' * 150 + ']' * 150 + '[0]' * 80_000", "'x = ' * 60_000 + '1'",
         "'f' + '(1)' * 80_000", "'if x: pass\\n' + 'elif x: pass\\n' * 15_000", "'@f\\n' * 60_000 + 'def g(): pass'",
         "'1' * 200_000", "'a, ' * 80_000", "'f\"{' * 100 + 'x' + '}\"' * 100", "'9' + '**9' * 60_000")


def _parser_bomb(number: int, three: tuple[str, ...]) -> None:
    @code(f"parser-bomb-{number}", FAMILY, "source that overflows parsers: " + "; ".join(f"`{text}`" for text in three), slow=number <= 3)
    def _():
        return {name: eval(text) for name, text in zip(("lora-forward", "count-parameters", "lora-init"), three, strict=True)}


for at in range(0, len(BOMBS), 3):
    _parser_bomb(at // 3 + 1, BOMBS[at:at + 3])
