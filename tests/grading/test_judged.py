"""JudgedExecute with real kernels in real sandboxes: what is graded, what a student's code cannot change, what it costs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import sys
import threading
from pathlib import Path

import nbformat
import pytest
import zmq

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports test modules by path, so helpers beside them need this

import judging
from judging import ENTRIES, NEGATE, RIGHT, TWICE, judged, notebook, outputs, points, shown

from pefttools.grading import sandbox as sandboxes
from pefttools.grading.judged import JudgedExecute
from pefttools.grading.sandbox import Limits, SandboxMissing

needs_sandbox = pytest.mark.skipif(sandboxes.available() is not None, reason=f"no sandbox: {sandboxes.available()}")
pytestmark = needs_sandbox
KERNEL = "from IPython import get_ipython\nk = get_ipython().kernel\n"
SAY = "k.session.send(k.iopub_socket, {kind!r}, {content!r}, parent=k.get_parent())\n"
SAVES = """
import json, os
from safetensors.torch import save_file
os.makedirs("out", exist_ok=True)
save_file({"w": torch.eye(4) * SCALE}, "out/weights.safetensors")
open("out/settings.json", "w").write(json.dumps({"r": 2}))
open("out/notes.txt", "w").write("not asked for")
saved = "out"
"""


def text(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html)).replace("&#x27;", "'").replace("&quot;", '"')


@pytest.fixture(scope="module")
def right():
    noisy = RIGHT["twice"].replace("return", "import sys, warnings, logging\n    print('x', file=sys.stderr)\n"
                                   "    warnings.warn('w'); logging.warning('l')\n    return")
    noisy += "\nimport sys; print('a line', file=sys.stderr); print('shown')\n7"
    return judged({**RIGHT, "twice": noisy, "saved": SAVES.replace("SCALE", "3")}, seed=5)


def test_right_answers_get_all_points(right):
    assert points(right) == {"twice": 2, "negate": 3, "letter": 1, "saved": 4}
    assert "Passed" in shown(right, "twice")


def test_outputs_of_answers_are_kept_and_check_cells_have_only_the_verdict(right):
    kinds = [(o.output_type, o.get("text") or o.data["text/plain"]) for o in outputs(right, "twice")]
    assert sorted(kinds) == [("display_data", "7"), ("stream", "a line\n"), ("stream", "shown\n")]
    for name in RIGHT:
        shown(right, name)
    nbformat.validate(right)


def test_what_was_done_is_recorded(right):
    record = right.metadata.pefttools
    assert record["seed"] == 5 and record["sandbox"] is True and record["limits"] == [] and record["kernels"] == 1
    assert record["seconds"]["whole"] > 0 and record["usage"]["memory"] > 2**26
    json.dumps(record)
    assert "language_info" not in right.metadata


def test_wrong_and_blank_and_broken_answers():
    """One kernel: a mistake is named, a stub is blank, a broken cell says itself what was wrong with it."""
    nb = judged({"twice": "def twice(n):\n    return 3 * n", "negate": 'def negate(x):\n    raise NotImplementedError("negate: not written yet")',
                 "letter": "letter = ...", "saved": "saved = open('nothing/there.txt')"})
    assert set(points(nb).values()) == {0}
    assert "That is three times." in shown(nb, "twice")
    assert "Not written yet" in shown(nb, "negate") and "Not written yet" in shown(nb, "letter")
    assert "FileNotFoundError" in shown(nb, "saved") and "answer cell itself" in shown(nb, "saved")
    assert isinstance(nb.metadata.pefttools["seed"], int)


def test_wrong_files_and_no_files():
    nb = judged({"saved": SAVES.replace("SCALE", "2"), "twice": "def twice(n: int) -> 5 5"})
    assert points(nb) == {"saved": 0, "twice": 0}
    assert "output" in text(shown(nb, "saved")) and "SyntaxError" in text(shown(nb, "twice"))
    nb = judged({"saved": "saved = 'nowhere'", "letter": "letter = lambda: 'b'", "twice": "twice = 3"})
    assert points(nb) == {"saved": 0, "letter": 0, "twice": 0}
    assert "there is no folder 'nowhere'" in text(shown(nb, "saved"))
    assert "wants your function itself; it was given an int" in text(shown(nb, "twice"))


def test_files_that_are_a_pickle_or_a_link_are_not_loaded():
    pickled = SAVES.replace("SCALE", "3") + "torch.save({'w': torch.eye(4)}, 'out/weights.safetensors')"
    nb = judged({"saved": pickled})
    assert points(nb) == {"saved": 0} and "header" in text(shown(nb, "saved")).lower()
    linked = SAVES.replace("SCALE", "3") + "os.remove('out/settings.json'); os.mkfifo('out/settings.json')"
    nb = judged({"saved": linked})
    assert points(nb) == {"saved": 0} and "no ordinary file" in text(shown(nb, "saved"))


def test_the_same_seed_gives_the_same_notebook_and_another_seed_other_cases():
    wrong = {"twice": "def twice(n):\n    return n + 1", "negate": RIGHT["negate"]}
    first, again, other = (judged(wrong, seed=seed) for seed in (11, 11, 12))
    assert first.cells == again.cells
    assert shown(first, "twice") != shown(other, "twice")


def test_a_kernel_that_ends_costs_its_own_cell_only():
    nb = judged({"negate": RIGHT["negate"], "twice": "import os\nos._exit(0)", "letter": RIGHT["letter"]})
    assert points(nb) == {"negate": 3, "twice": 0, "letter": 1}
    assert "os._exit" in text(shown(nb, "twice")) and nb.metadata.pefttools["kernels"] == 2
    assert nb.metadata.pefttools["limits"][0]["cell"] == "twice"


def test_work_that_ends_the_kernel_while_it_is_checked():
    nb = judged({"twice": "def twice(n):\n    import os; os._exit(1)", "negate": RIGHT["negate"]})
    assert points(nb) == {"twice": 0, "negate": 3}
    assert "stopped while it was checked" in text(shown(nb, "twice"))


def test_an_endless_loop_and_one_that_does_not_let_itself_be_stopped():
    stubborn = ("import time\ndef negate(x):\n    while True:\n        try:\n            time.sleep(1)\n"
                "        except BaseException:\n            pass")
    nb = judged({"twice": "while True: pass", "negate": stubborn, "letter": RIGHT["letter"]},
                limits=Limits(cell_seconds=8))
    assert points(nb) == {"twice": 0, "negate": 0, "letter": 1}
    assert "longer than 8 seconds" in text(shown(nb, "twice")) and "longer than 8 seconds" in text(shown(nb, "negate"))
    assert nb.metadata.pefttools["kernels"] == 2


def test_the_time_of_a_notebook_is_bounded():
    sleepy = "import time\ntime.sleep(60)\n" + RIGHT["twice"]
    nb = judged({"letter": RIGHT["letter"], "twice": sleepy, "negate": RIGHT["negate"]}, limits=Limits(notebook_seconds=15))
    assert points(nb)["twice"] == points(nb)["negate"] == 0
    assert nb.metadata.pefttools["seconds"]["whole"] < 40
    assert "notebook" in json.dumps(nb.metadata.pefttools["limits"])


def test_lying_messages_change_no_verdict_and_no_other_cell():
    """Every kind of message, well formed and not, to this cell and to others; the right work beside it keeps its points."""
    bundle = {"data": {"text/plain": "2", "text/html": "<script>1</script>", "application/javascript": "x"}, "metadata": {},
              "execution_count": 1, "transient": {"display_id": "a"}}
    said = [("execute_result", bundle), ("display_data", bundle), ("update_display_data", bundle),
            ("clear_output", {"wait": False}), ("comm_open", {"comm_id": "x", "target_name": "jupyter.widget", "data": 5}),
            ("stream", {"name": [1], "text": {"a": 1}}), ("error", {"ename": [1], "evalue": 7, "traceback": "x"}),
            ("status", {"execution_state": "idle"}), ("status", {"execution_state": ["idle"]}), ("nonsense", {}),
            ("stream", {"name": "stdout", "text": "\ud800 and \x00"})]
    lies = KERNEL + "".join(SAY.format(kind=kind, content=content) for kind, content in said if "\ud800" not in str(content))
    lies += ('import json\nfor raw in ([b"x"], [b"<IDS|MSG>"], [b"<IDS|MSG>", b"", b"["*100000, b"{}", b"{}", b"{}"],\n'
             '            [b"<IDS|MSG>", b"", b"[]", b"[]", b"[]", b"[]"], [b"<IDS|MSG>", b"", b"9"*5000, b"1", b"1", b"1"]):\n'
             '    k.iopub_socket.send_multipart(raw)\n')
    nb = judged({"negate": RIGHT["negate"], "letter": "letter = 'a'\n" + lies, "twice": lies + "twice = 5\n"})
    assert points(nb) == {"negate": 3, "letter": 0, "twice": 0}
    nbformat.validate(nb)
    assert "script" not in json.dumps([cell.outputs for cell in nb.cells]).replace("no script", "")
    assert {key for cell in nb.cells for o in cell.outputs if o.output_type == "display_data" for key in o.data} == {"text/plain"}


def test_a_lie_inside_a_check_does_not_reach_its_outputs():
    lie = KERNEL + "def twice(n):\n" + "".join(
        "    " + SAY.format(kind=kind, content={"data": {"text/plain": "2"}, "metadata": {}, "execution_count": 9})
        for kind in ("execute_result", "display_data"))
    nb = judged({"twice": lie + "    return -1"})
    assert points(nb) == {"twice": 0}
    shown(nb, "twice")


@pytest.mark.slow
def test_floods_are_bounded_here_and_there():
    """Text without end, and a message of endless parts, which the receiving side holds in memory before it is counted."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts = KERNEL + "import zmq\ns = k.iopub_thread.socket\nx = b'x' * 4_000_000\nwhile True: s.send(x, zmq.SNDMORE)"
    nb = judged({"letter": RIGHT["letter"], "twice": "while True: print('x' * 1000)", "negate": parts},
                limits=Limits(cell_seconds=30))
    assert points(nb) == {"letter": 1, "twice": 0, "negate": 0}
    assert "output" in {hit["limit"] for hit in nb.metadata.pefttools["limits"]}
    assert len(json.dumps(nb)) < 400_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # KiB


FORGED = """
import os, threading, time
def later():
    while True:
        for name in os.listdir("/exchange"):
            if name.endswith(".in"):
                path = "/exchange/" + name[:-3] + ".out"
                try:
                    {how}
                except OSError:
                    pass
        time.sleep(0.001)
threading.Thread(target=later, daemon=True).start()
import pefttools.grading.inside as inside
inside.probe = lambda *_: time.sleep(0.3)
twice = 1
"""


@pytest.mark.parametrize("how", ["os.symlink('/etc/passwd', path)", "os.mkfifo(path)", "os.mkdir(path)",
                                 "open(path, 'wb').write(b'PTW1' + b'\\\\xff' * 100)", "open(path, 'wb').truncate(2**40)",
                                 "open(path, 'wb').truncate(2**27)", "os.chmod('/exchange', 0); time.sleep(9)"])
def test_what_stands_where_answers_should_be(how):
    nb = judged({"twice": FORGED.format(how=how), "letter": RIGHT["letter"]}, limits=Limits(cell_seconds=20))
    assert points(nb)["twice"] == 0
    shown(nb, "twice")


def test_answers_of_another_form_are_no_work():
    forged = ("import pefttools.grading.inside as inside\nfrom pefttools.grading.wire import to_bytes\n"
              "def probe(name, work, token):\n    open(f'/exchange/{token}.out', 'wb').write(to_bytes(ANSWER))\n"
              "inside.probe = probe\ntwice = 1\n")
    for answer in ("[]", "{'type': 'x'}", "{'type': 'x', 'callable': True, 'path': True, 'blank': False, 'outcomes': [1]}",
                   "{'type': 'x', 'callable': True, 'path': True, 'blank': False, 'passed': True}"):
        nb = judged({"twice": forged.replace("ANSWER", answer)})
        assert points(nb) == {"twice": 0} and "not in order" in text(shown(nb, "twice"))


def test_references_and_hidden_packages_are_not_there():
    look = ("import glob, sys\nfound = []\n"
            "for name in ('pefttools.grading.judge', 'pefttools.grading.exercises', 'pefttools.lora', 'peft', 'judging'):\n"
            "    try:\n        __import__(name)\n        found.append(name)\n    except ImportError:\n        pass\n"
            "print(found, [m for m in sys.modules if 'exercises' in m])")
    hiding = {**ENTRIES, "twice": judging.Exercise(**{**vars(TWICE), "hides": ("peft", "pefttools.lora")})}
    nb = judged({"twice": look + "\n" + RIGHT["twice"]}, before="from pefttools.lora import LoRALinear", entries=hiding)
    assert "[] []" in str(outputs(nb, "twice")) and points(nb) == {"twice": 2}


def test_what_the_first_cell_prints_is_kept_however_late_the_kernel_learns_of_its_listener(monkeypatch):
    """A publishing socket drops what comes before a subscription does; on a busy machine that takes its time."""
    from jupyter_client.asynchronous import AsyncKernelClient

    real = AsyncKernelClient.connect_iopub

    def late(self, *arguments, **named):
        socket = real(self, *arguments, **named)
        socket.setsockopt(zmq.UNSUBSCRIBE, b"")
        asyncio.get_running_loop().call_later(8, socket.setsockopt, zmq.SUBSCRIBE, b"")
        return socket

    monkeypatch.setattr(AsyncKernelClient, "connect_iopub", late)
    nb = judged({"twice": "print('early')\n" + RIGHT["twice"]}, before="")
    assert [o.get("text") for o in outputs(nb, "twice")] == ["early\n"] and points(nb) == {"twice": 2}


def test_the_students_text_is_escaped_in_a_verdict():
    nb = judged({"twice": "def twice(n):\n    raise ValueError('<script>alert(1)</script>')", "letter": "letter = '<img src=x>'"})
    assert "<script" not in shown(nb, "twice") and "<img" not in shown(nb, "letter")


def test_texts_that_cannot_be_written_to_a_file():
    nb = judged({"twice": "print('\\ud800 \\x00')\ndef twice(n):\n    raise ValueError('\\ud800 \\x00')", "letter": "letter = '\\udfff'",
                 "negate": "raise ValueError('\\ud800')"})
    assert set(points(nb).values()) == {0}
    nbformat.writes(nb).encode("utf-8")


def test_nothing_is_left_open_or_lying_about(tmp_path, monkeypatch):
    """A worker grades hundreds of notebooks."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    judged({"letter": RIGHT["letter"]}, stages=str(tmp_path / "stages"))
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        judged({"twice": "import os; os._exit(0)", "letter": RIGHT["letter"]}, stages=str(tmp_path / "stages"))
    assert len(os.listdir("/proc/self/fd")) <= before[0] + 2 and threading.active_count() <= before[1] + 1
    assert [path.name for path in tmp_path.iterdir()] == ["stages"]


def test_without_a_sandbox_it_works_and_says_so():
    nb = judged({**RIGHT, "saved": SAVES.replace("SCALE", "3")}, sandbox=False)
    assert points(nb) == {"twice": 2, "negate": 3, "letter": 1, "saved": 4}
    assert nb.metadata.pefttools["sandbox"] is False and "WITHOUT a sandbox" in nb.metadata.pefttools["notes"][0]


def test_nothing_runs_where_there_is_no_sandbox(monkeypatch):
    monkeypatch.setattr("pefttools.grading.judged.available", lambda: "bubblewrap is not installed")
    with pytest.raises(SandboxMissing):
        judged(RIGHT)


def test_in_a_running_event_loop():
    """formgrader grades from inside of one."""
    async def inside():
        return judged({"letter": RIGHT["letter"]})

    assert points(asyncio.run(inside())) == {"letter": 1}


def test_a_graded_cell_that_is_no_check_gets_nothing():
    """nbgrader takes a graded cell without outputs for full marks."""
    nb = notebook({"letter": RIGHT["letter"]})
    nb.cells[-1].metadata.nbgrader.grade_id = "something-else"
    done, _ = JudgedExecute(entries=ENTRIES).preprocess(nb, {})
    assert points(done) == {"something-else": 0}


def test_exercises_of_these_tests_are_sound():
    from pefttools.grading.check import verdict_on

    assert verdict_on(NEGATE, lambda x: -x).passed and not verdict_on(NEGATE, lambda x: x).passed
