"""Generated programs: judged by values that leave their process, so that nothing a program does there is a pass."""

import json
import socket
import threading

import pytest

from pefttools.lab.checks import take_apart
from pefttools.lab.data import FOLDER
from pefttools.lab.plain_values import pack, unpack
from pefttools.lab.programs import code_of, missing_sandbox, run_programs

NEEDLE = "needle-93751"
GOOD = "def f(x):\n    return x + 1\n"
ADDS = ["assert f(1) == 2", "assert abs(f(22) - 23) < 1e-6"]
needs_sandbox = pytest.mark.skipif(bool(missing_sandbox()), reason="no bubblewrap")
WHERES = ["subprocess", pytest.param("sandbox", marks=needs_sandbox)]

# What a program could say if a verdict, or a word for one, were within its reach.
VERDICTS = [json.dumps(v) for v in ({"passed": True, "error": ""}, {"error": ""}, {"values": [], "error": ""}, ["", ""],
                                    {"values": [[[0, True]], [[0, True]]], "error": ""})]
SEARCH = """
import gc, os, sys
WORD = "need" + "le-"
def strings(thing, depth=0, seen=set()):
    if isinstance(thing, (str, bytes)):
        yield thing if isinstance(thing, str) else thing.decode("latin1")
    elif depth < 6 and id(thing) not in seen:
        seen.add(id(thing))
        inside = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple, set)) else ()
        for each in list(inside):
            yield from strings(each, depth + 1)
def everything():
    frame = sys._getframe()
    while frame:
        yield from (*frame.f_locals.values(), *frame.f_globals.values(), frame.f_code.co_consts)
        frame = frame.f_back
    yield from gc.get_objects()
    for module in list(sys.modules.values()):
        yield from list(vars(module).values())
def memory(who):
    try:
        with open(f"/proc/{who}/maps") as maps, open(f"/proc/{who}/mem", "rb", 0) as mem:
            for line in maps:
                low, high = (int(n, 16) for n in line.split()[0].split("-"))
                if "rw" in line and high - low < 1 << 26:
                    try:
                        mem.seek(low)
                        yield mem.read(high - low)
                    except (OSError, ValueError):
                        pass
    except OSError:
        pass
def found():
    for thing in everything():
        for text in strings(thing):
            at = text.find(WORD)
            if at >= 0 and text[at + 7:at + 12].isdigit():
                return text[at:at + 12]
    for who in WHO:
        for piece in memory(who):
            at = -1
            while (at := piece.find(WORD.encode(), at + 1)) >= 0:
                if piece[at + 7:at + 12].isdigit():
                    return piece[at:at + 12].decode()
def f(x):
    return found()
"""

ATTACKS = {
    "sys.exit": "import sys\ndef f(x):\n    sys.exit(0)",
    "os._exit": "import os\ndef f(x):\n    os._exit(0)",
    "exit on import": "raise SystemExit(0)",
    "a word into every descriptor": "import os\ndef f(x):\n    for fd in range(64):\n"
                                    f"        for said in {VERDICTS!r}:\n"
                                    "            try: os.write(fd, said.encode() + b'\\n')\n"
                                    "            except OSError: pass\n    os._exit(0)",
    "an __eq__ that says yes": "class Yes:\n    __eq__ = __lt__ = __le__ = __bool__ = lambda *a: True\n"
                               "    __sub__ = __abs__ = lambda *a: Yes()\ndef f(x):\n    return Yes()",
    "an int that equals all": "class Yes(int):\n    __eq__ = __lt__ = __rsub__ = lambda *a: True\n    __hash__ = None\n"
                              "    __int__ = __index__ = lambda s: 2\ndef f(x):\n    return Yes(-9)",
    "no AssertionError": "import builtins\nclass Never(BaseException): pass\nbuiltins.AssertionError = Never\n"
                         "def f(x):\n    return 0",
    "another compile": "import builtins\nreal = builtins.compile\n"
                       "builtins.compile = lambda *a, **k: real('True', '', 'eval')\ndef f(x):\n    return 0",
    "another eval and exec": "import builtins\nbuiltins.eval = lambda *a, **k: True\n"
                             "builtins.exec = lambda *a, **k: None\ndef f(x):\n    return 0",
    "another abs": "import builtins\nbuiltins.abs = lambda x: 0.0\nbuiltins.bool = lambda *a: True\n"
                   "def f(x):\n    return 0",
    "another runner": "import sys\nm = sys.modules['__main__']\nm.value_of = lambda *a: [0, True]\n"
                      "m.words = lambda e: ''\nm.pack = lambda *a: True\ndef f(x):\n    return 0",
    "another json": f"import json\njson.dumps = lambda *a, **k: {VERDICTS[-1]!r}\ndef f(x):\n    return 0",
    "a frame above": "import sys\nframe = sys._getframe()\nwhile frame:\n"
                     "    for name in ('error', 'said', 'passed', 'true'):\n"
                     "        frame.f_locals[name] = ''\n    frame = frame.f_back\ndef f(x):\n    return 0",
    "a tracer": "import sys\ndef trace(frame, event, arg):\n    if frame.f_code.co_name == 'value_of':\n"
                "        return trace\n    return None\nsys.settrace(trace)\ndef f(x):\n    return 0",
    "endless output": "import sys\ndef f(x):\n    while True:\n        sys.stdout.write('x' * 65536)",
    "endless answer": "import os\ndef f(x):\n    while True:\n        os.write(3, b'x' * 65536)",
    "deep answer": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "itself as answer": "a = []\na.append(a)\ndef f(x):\n    return a",
    "wide answer": "def f(x):\n    return 'x' * (1 << 24)",
    "a number too long to print": "def f(x):\n    return 10 ** 100000",
}
DISASTERS = {
    "kills what started it": "import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    os.kill(os.getppid(), 15)",
    "forks": "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "stays behind": "import os, shutil, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
                    "        while True:\n            for name in os.listdir('..'):\n"
                    "                if name.startswith('program-'):\n"
                    "                    shutil.rmtree('../' + name, ignore_errors=True)\n"
                    "            time.sleep(0.01)\n    os._exit(0)\n"
                    "def f(x):\n    return 0",
}


@pytest.fixture(scope="module", params=WHERES)
def attacked(request):
    """Every attack, an honest program after each: {name: result}, [results of the honest], where."""
    programs = [(code, ADDS) for code in ATTACKS.values() for code in (code, GOOD)]
    results = run_programs(programs, seconds=2, sandbox=request.param == "sandbox")
    assert results.where == request.param
    return dict(zip(ATTACKS, results[::2])), results[1::2]


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_passes(attacked, name):
    result = attacked[0][name]
    assert not result["passed"] and result["error"], result


def test_honest_programs_beside_attacks_pass(attacked):
    assert all(result == {"passed": True, "error": "", "judged": "apart"} for result in attacked[1])


@pytest.mark.parametrize("where", WHERES)
def test_disasters_cost_nobody_else(where, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    codes = [code for name, code in DISASTERS.items() if where == "sandbox" or name != "forks"]
    results = run_programs([(code, ADDS) for each in codes for code in (each, GOOD, GOOD)], seconds=2,
                           sandbox=where == "sandbox")
    for i in range(len(codes)):
        bad, *good = results[3 * i:3 * i + 3]
        assert not bad["passed"] and bad["error"], codes[i]
        assert all(each["passed"] for each in good), (codes[i], good)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("where", WHERES)
def test_a_program_that_stops_its_runner_is_given_up(where, monkeypatch):
    monkeypatch.setattr("pefttools.lab.programs.ROOM_SECONDS", 3.0)
    stop = "import os, signal\ndef f(x):\n    os.kill(os.getppid(), signal.SIGSTOP)\n    return 2"
    bad, good = run_programs([(stop, ADDS), (GOOD, ADDS)], seconds=1, sandbox=where == "sandbox")
    assert not bad["passed"] and bad["error"] and good["passed"], (bad, good)


def test_the_search_finds_what_is_in_its_process():
    """Or the next test would show nothing."""
    scope = {"__name__": "__program__", "WHO": []}
    kept = [{"tests": ["assert f(1) == 'needle-93751'"]}]
    exec(compile(SEARCH, "<program>", "exec"), scope)
    assert scope["f"](1) == NEEDLE and kept
    plain = "WHO = ['self']\nKEPT = bytearray(b'needle-') + b'93751'\n" + SEARCH.replace("everything():", "nothing():")
    plain = plain.replace("def found", "def everything():\n    return ()\ndef found")
    [result] = run_programs([(plain, [f"assert f(1) == {NEEDLE!r}"])], seconds=10)
    assert result["passed"], result  # in its memory


@pytest.mark.parametrize("where", WHERES)
def test_the_expected_value_is_not_where_the_program_runs(where):
    """Neither in frames, objects or modules, nor in the memory of its process or of the one that started it."""
    who = "[n for n in os.listdir('/proc') if n.isdigit()]" if where == "sandbox" else "['self', os.getppid()]"
    program = SEARCH.replace("import gc, os, sys", f"import gc, os, sys\nWHO = {who}")
    tests = [f"assert f(1) == {NEEDLE!r}", f"wanted = {NEEDLE!r}\nassert f(1) == wanted",
             f"assert [f(2)] == [{NEEDLE!r}]"]
    for test in tests:
        [result] = run_programs([(program, [test])], seconds=20, sandbox=where == "sandbox")
        assert not result["passed"] and "gave None" in result["error"], result


@needs_sandbox
def test_no_network_and_no_files_of_ours_in_the_sandbox():
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: [server.accept() for _ in range(1)], daemon=True).start()
    where = ("127.0.0.1", server.getsockname()[1])
    call = f"import socket\ndef f():\n    socket.create_connection({where!r}, 1)\n    return 1"
    look = f"import os\ndef f():\n    return [os.path.exists(p) for p in ({str(FOLDER)!r}, {__file__!r})]"
    inside = run_programs([(call, ["assert f() == 1"]), (look, ["assert f() == [False, False]"])], sandbox=True)
    outside = run_programs([(call, ["assert f() == 1"]), (look, ["assert f() == [True, True]"])], sandbox=False)
    server.close()
    assert [r["passed"] for r in inside] == [False, True] and "Error" in inside[0]["error"]
    assert [r["passed"] for r in outside] == [True, True]  # which is why the report says which one it was


# ------------------------------------------------------------------------------------------------ taking tests apart

@pytest.mark.parametrize("test, sent, apart", [
    ("assert f(1) == 2", [["f(1)"]], True),
    ("assert f(7) is True", [["f(7)"]], True),
    ("assert abs(f(22) - 0.07) < 1e-6", [["f(22)"]], True),
    ("assert sorted(f(3), key=lambda v: -v) == [3]", [["f(3)", "sorted(_below, key=lambda v: -v)"]], True),
    ("assert next(iter(f(2))) == 99", [["f(2)", "iter(_below)", "next(_below)"]], True),
    ("assert E('x').args[0].lower() == 'x'", [["E('x').args[0].lower()"]], True),
    ("assert E.__mro__[1] is IndexError", [["E.__mro__[1]"]], True),
    ("import math\nassert math.isclose(f(1), 0.5)", ["import math", ["f(1)"]], True),
    ("wanted = [1]\nassert f() == wanted", [["f()"]], True),
    ("x = [3, 1]\nf(x)\nassert x == [1, 3]", ["x = [3, 1]", "f(x)", ["x"]], True),
    ("assert f(1) == 2 and f(2) == 3", [["f(1)"], ["f(2)"]], True),
    ("from pathlib import Path as P\nassert P('a').read_text() == 'x'",
     ["from pathlib import Path as P", ["P('a').read_text()"]], True),
    ("import datetime as d\nassert f(d.date(1, 1, 1)) == d.date(2, 2, 2)",
     ["import datetime as d", ["f(d.date(1, 1, 1))"]], True),
    ("assert 2 in f(1)", [["f(1)", "2 in _below"]], False),
    ("assert M(1) == M(x=1)", [["M(1) == M(x=1)"]], False),
    ("assert f(1)", [["f(1)"]], False),
    ("assert isinstance(f(1), int)", [["isinstance(f(1), int)"]], False),
    ("assert all(f(x) == x for x in range(3))", [["all((f(x) == x for x in range(3)))"]], False),
    ("for x in range(3):\n    assert f(x) == x", ["for x in range(3):\n    assert f(x) == x"], False),
])
def test_what_is_sent_to_the_program(test, sent, apart):
    taken = take_apart(test)
    assert [step if isinstance(step, str) else list(step.holes[0]) for step in taken.steps] == sent
    assert any(check.apart for check in taken.checks) is apart


def test_every_bundled_row_is_judged_apart():
    from pefttools.lab.data import SPLITS, load_rows

    for split in SPLITS:
        for row in load_rows(split)[:1000]:  # the kinds take turns, or are shuffled
            assert any(check.apart for test in row["tests"] for check in take_apart(test).checks), row


def test_verdicts_are_those_of_running_all_of_it_in_one_process():
    """Each kind's answer, wrong ones that differ from it in one constant, and another kind's: 474 programs."""
    import random

    from pefttools.lab.tasks.build import draw_rows, kinds_of
    from pefttools.lab.tasks.check import mutants, passes

    programs = []
    for split in ("held_out", "new_kinds"):
        for kind in kinds_of(split):
            [(slots, row)] = draw_rows(kind, split, 1, seed=7)
            wrong = [code for code, _ in mutants(kind, slots, split, random.Random(kind.name)).values()]
            programs += [(code, row["tests"]) for code in (code_of(row["output"]), *wrong[:3])]
    programs += [(code, tests) for (code, _), (_, tests) in zip(programs[::4], programs[4::4])]
    wanted = [passes(code, tests) for code, tests in programs]
    assert [r["passed"] for r in run_programs(programs, seconds=10)] == wanted
    assert 97 <= sum(wanted) < 120 and len(programs) > 450


@pytest.mark.parametrize("where", WHERES)
def test_bundled_answers_pass(where):
    from pefttools.lab.data import load_rows

    rows = load_rows("held_out")[:54] + load_rows("new_kinds")[:43]  # each kind once
    programs = [(code_of(row["output"]), row["tests"]) for row in rows]
    results = run_programs(programs, sandbox=where == "sandbox", seconds=10)
    assert [r["error"] for r in results] == [""] * 97


def test_values_survive_the_way():
    import collections
    import datetime
    import decimal
    import fractions
    import pathlib

    zone = datetime.timezone.utc
    for value in (None, True, 3, -2**70, 1.5, "é\n", b"\0", 1 + 2j, [1, [2]], (1, ()), {1, "a"}, frozenset({2}),
                  {(1, 2): {"a": []}}, range(1, 9, 2), datetime.datetime(2024, 2, 27, 1, 2, 3, 4, zone),
                  datetime.date(1, 2, 3),
                  datetime.time(1, 2), datetime.timedelta(3, 4), decimal.Decimal("1.10"), fractions.Fraction(1, 3),
                  pathlib.Path("a/b"), collections.deque([1]), RuntimeError, int, ..., NotImplemented):
        back = unpack(json.loads(json.dumps(pack(value))))
        assert back == value and type(back) is type(value)
    pair = collections.namedtuple("pair", "a b")
    assert unpack(pack(pair(1, 2))) == (1, 2) and unpack(pack(collections.Counter("aab"))) == {"a": 2, "b": 1}
    for value in (object(), lambda: 0, (i for i in ()), test_values_survive_the_way, [object()]):
        with pytest.raises(TypeError, match="no plain data"):
            pack(value)


@pytest.mark.parametrize("code, error", [
    ("def f(x):\n    return 0", "AssertionError: f(1) == 2; f(1) gave 0"),
    ("def f(x):\n    return [][x]", "IndexError: list index out of range"),
    ("def f(x):\n    return 0 if x == 1 else [][x]", "AssertionError: f(1) == 2; f(1) gave 0"),  # the first that fails
    ("def f(x):\n    return 2 if x == 1 else [][x]", "IndexError: list index out of range"),
    ("def f(x):\n    return 2 if x == 1 else '23'", "TypeError: unsupported operand type(s) for -: 'str' and 'int'"),
    ("def f(x):\n    return f", "AssertionError: f(1) gave a function, which is no plain data"),
    ("class E(Exception):\n    def __str__(self):\n        raise E\nraise E", "E"),
])
def test_the_first_failure_gives_the_message(code, error):
    [result] = run_programs([(code, ADDS)])
    assert result["error"].startswith(error) and not result["passed"]


def test_odd_requests_are_named():
    with pytest.raises(ValueError, match="'assert f\\(' is not Python"):
        run_programs([(GOOD, ["assert f("])])
    with pytest.raises(ValueError, match="seconds must be above 0"):
        run_programs([(GOOD, [])], seconds=0)
    [result] = run_programs([(GOOD, [])])
    assert result == {"passed": False, "error": "there are no tests", "judged": "inside"}


@needs_sandbox
def test_a_sandbox_that_does_not_start_at_once_is_tried_again(monkeypatch):
    from pefttools.grading.confined import Confined

    real, calls = Confined.start.__func__, []

    def start(cls, room, argv):
        calls.append(argv)
        if len(calls) == 1 or "never" in fails:
            raise TimeoutError("bubblewrap did not start")
        return real(cls, room, argv)

    fails = set()
    monkeypatch.setattr(Confined, "start", classmethod(start))
    assert run_programs([(GOOD, ADDS)], sandbox=True)[0]["passed"] and len(calls) == 3
    fails.add("never")
    with pytest.raises(RuntimeError, match="did not start in 3 tries"):
        run_programs([(GOOD, ADDS)], sandbox=True)


def test_without_bubblewrap_it_says_so(monkeypatch):
    monkeypatch.setattr("pefttools.lab.programs.missing_sandbox", lambda: "bubblewrap is not installed")
    assert run_programs([(GOOD, ADDS)]).where == "subprocess"
    with pytest.raises(RuntimeError, match="bubblewrap is not installed"):
        run_programs([(GOOD, ADDS)], sandbox=True)
