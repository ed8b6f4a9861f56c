"""The hub's data set: its schema is checked, what is left out is counted, and a hub that fails costs nothing but a sentence."""

from __future__ import annotations

import json

import pytest

from pefttools.lab import python_codes as codes

GOOD = {"instruction": "Add two numbers.", "input": "Here is some text.", "output": "```python\ndef add(a, b):\n    return a + b\n```",
        "text": "Add two numbers. Here is some text. ```python\n…```"}
COMMIT = "0ed98ff2a76c5d133d8c157b814189a5a17ebd20"


def row(**changes):
    return {**GOOD, **changes}


def many(n):
    return [row(instruction=f"Add {i}.", output=f"```python\nresult_of_adding = 1 + {i}\n```") for i in range(n)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that serves `hub.content`, or raises it; `hub.asked` is what was asked for."""
    class Hub:
        content: object = None
        asked: dict = {}

    def download(name, file, *, repo_type, revision, local_files_only):
        Hub.asked = {"name": name, "file": file, "repo_type": repo_type, "revision": revision, "local": local_files_only}
        if isinstance(Hub.content, Exception):
            raise Hub.content
        path = tmp_path / "snapshots" / (revision or "c" * 40) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Hub.content if isinstance(Hub.content, str) else json.dumps(Hub.content), encoding="utf-8")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("pefttools.lab.base.hub_fault", lambda timeout=5.0: "")
    return Hub


def test_it_asks_for_one_file_at_a_commit_and_says_what_it_got(hub, capsys):
    hub.content = many(40)
    found = codes.load(10)
    assert hub.asked == {"name": codes.NAME, "file": codes.FILE, "repo_type": "dataset", "revision": COMMIT, "local": False}
    assert found.revision == COMMIT and len(found.rows) == 10 and found.read == 40
    assert codes.NAME in capsys.readouterr().out
    record = found.record()
    json.dumps(record)
    assert record["revision"] == COMMIT and record["sha256"] == codes.digest(found.rows)


def test_the_newest_revision_is_resolved_and_recorded(hub):
    hub.content = many(5)
    assert codes.load(5, revision=None, quiet=True).revision == "c" * 40 and hub.asked["revision"] is None


def test_a_seed_decides_which_rows_and_the_same_seed_the_same(hub):
    hub.content = many(60)
    one, again, other = (codes.load(20, seed=seed, quiet=True).rows for seed in (0, 0, 1))
    assert one == again != other


def test_json_lines_are_read_too(hub):
    hub.content = "\n".join(json.dumps(each) for each in many(6)) + "\n"
    assert len(codes.load(6, quiet=True).rows) == 6


def test_text_is_what_our_prompt_and_answer_make(hub):
    from pefttools.lab import answer_of, prompt_of

    hub.content = [row()]
    (found,) = codes.load(1, quiet=True).rows
    assert found["text"] == prompt_of(found) + answer_of(found) == "Add two numbers.\nHere is some text.\n" + GOOD["output"]


def test_what_is_left_out_is_counted_by_its_reason(hub):
    hub.content = [row(), row(), row(output="```python\nprint('press 'q' to stop the loop')\n```"),
                   row(output="```python\n" + "x = 1\n" * 400 + "```"), row(instruction="  "), row(output="```python\nx=1\n```"),
                   row(instruction="Add two  numbers. ")]
    found = codes.load(10, quiet=True)
    assert found.left_out == {"seen before": 2, "not Python": 1, "longer than 1,200 characters": 1, "empty": 2}
    assert len(found.rows) == 1 and found.read == 7


def test_the_longest_row_that_fits_fits():
    size = len(GOOD["instruction"]) + 1 + len(GOOD["input"]) + len(GOOD["output"])
    assert len(codes.sensible([row()], max_chars=size)[0]) == 1 and codes.sensible([row()], max_chars=size - 1)[0] == []


@pytest.mark.parametrize("code, good", [("x = 1", True), ("x = '\\d'", True), ("def f(:", False), ("x = 1\x00", False),
                                        ("(" * 500 + ")" * 500, False), ("print 'old'", False)])
def test_python_is_what_parses(code, good, recwarn):
    assert codes.is_python(code) == good and not recwarn.list


@pytest.mark.parametrize("content, said", [
    ([{"instruction": "a", "input": "", "output": "b"}], "row 1 has no column 'text'"),
    ([row(), {**row(), "output": None}], "row 2: output is NoneType"),
    ([row(), "a line"], "row 2 is str"),
    ([{"question": "a", "answer": "b"}], "no column 'instruction'; it has question, answer"),
    ([], "holds no rows"),
    ('[{"instruction": "a", "inp', "is damaged, it is no JSON"),
    ('{"instruction": "a"}\n{"instr', "is damaged, it is no JSON"),
])
def test_what_is_not_the_data_set_is_refused_and_never_replaced(hub, content, said):
    hub.content = content
    with pytest.raises(ValueError, match=said.replace("[", "\\[")):
        codes.load(5, quiet=True)


@pytest.mark.parametrize("fault, said", [
    ("silent", "the hub does not answer"), (401, "refuses it"), (403, "refuses it"), (404, "knows no such data set"), (503, "has a fault"),
    ("revision", "no such revision"), ("timeout", "does not answer")])
def test_a_hub_that_fails_means_the_bundled_rows_and_a_sentence(hub, monkeypatch, capsys, fault, said):
    import httpx
    from huggingface_hub.errors import RevisionNotFoundError

    class Http(Exception):
        def __init__(self, status):
            self.response = httpx.Response(status)

    made = Http(fault) if isinstance(fault, int) else TimeoutError() if fault == "timeout" else None
    if fault == "revision":
        made = RevisionNotFoundError("no", response=httpx.Response(404, request=httpx.Request("GET", "http://hub")))
    if fault == "silent":
        monkeypatch.setattr("pefttools.lab.base.hub_fault", lambda timeout=5.0: "the hub does not answer (Timeout): check the network")
        made = OSError("not in the cache")
    hub.content = made
    found = codes.load(30)
    assert found.name == "the bundled rows" and found.revision == "" and len(found.rows) == 30
    assert said in capsys.readouterr().out and said in found.record()["why"]
    with pytest.raises(codes.HubFault, match=said):
        codes.load(30, fallback=False)


def test_bundled_rows_all_pass_the_filters():
    rows, out = codes.sensible(codes.load_rows("held_out"))
    assert out == {} and len(rows) == len(codes.load_rows("held_out"))


def test_a_number_of_rows_below_one_is_refused():
    with pytest.raises(ValueError, match="n=0"):
        codes.load(0)
