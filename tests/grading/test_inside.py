"""What runs in the sandbox, run here: it writes down what came, whatever that is."""

from __future__ import annotations

import os

import pytest
import torch

from pefttools.grading import inside
from pefttools.grading.plain import NotPlain
from pefttools.grading.wire import from_bytes, to_bytes


class Probes:
    @staticmethod
    def probe(work, case):
        return {"result": work(case["n"])}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """ask(work) → the answer that was written, for three cases."""
    monkeypatch.setattr(inside, "EXCHANGE", str(tmp_path))
    monkeypatch.setattr(inside.importlib, "import_module", lambda name: Probes)

    def ask(work, cases=({"n": 1}, {"n": 2}, {"n": 3})):
        (tmp_path / "t.in").write_bytes(to_bytes(cases if type(cases) is dict else list(cases)))
        inside.probe("twice", work, "t")
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["t.in", "t.out"]
        return from_bytes((tmp_path / "t.out").read_bytes())
    return ask


def test_a_work(ask):
    answer = ask(lambda n: torch.full((2,), n))
    assert answer["callable"] and not answer["path"] and not answer["blank"] and answer["type"] == "a function"
    assert [outcome.data["result"].tolist() for outcome in answer["outcomes"]] == [[1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize("work", [None, ...])
def test_a_blank(ask, work):
    assert ask(work)["blank"] is True


def test_a_work_that_raises_and_one_that_leaves(ask):
    def raising(n):
        raise (ValueError("n"), SystemExit(3), NotImplementedError("twice: not written yet"))[n - 1]

    raised = [outcome.raised for outcome in ask(raising)["outcomes"]]
    assert [r.type for r in raised] == ["ValueError", "SystemExit", "NotImplementedError"]
    assert raised[2].unwritten == "twice"


def test_what_cannot_be_sent(ask):
    class Odd:
        pass

    def work(n):
        return (Odd(), lambda: 0, torch.ones(3, dtype=torch.complex32))[n - 1]

    data = [outcome.data for outcome in ask(work)["outcomes"]]
    assert [type(each["result"] if type(each) is dict else each) for each in data] == [NotPlain] * 3


def test_a_work_that_lies_about_being_callable(ask):
    class Liar:
        def __getattribute__(self, name):
            raise RuntimeError(name)

    answer = ask(Liar())
    assert answer["callable"] is False and answer["type"] == "an object of class `Liar`"


def test_files(ask, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"abc")
    (folder / "empty").write_bytes(b"")
    (folder / "other").write_bytes(b"not asked for")
    answer = ask(folder, {"files": ["a.bin", "empty", "missing"], "most": 10})
    assert {name: bytes(content.tolist()) for name, content in answer["files"].items()} == {"a.bin": b"abc", "empty": b""}
    assert answer["trouble"] == "" and answer["path"]
    assert "more bytes" in ask(folder, {"files": ["a.bin"], "most": 2})["trouble"]
    assert "no folder" in ask(str(folder / "nowhere"), {"files": ["a.bin"], "most": 2})["trouble"]
    os.mkfifo(folder / "pipe")
    assert "no ordinary file" in ask(str(folder), {"files": ["pipe"], "most": 2})["trouble"]
    assert "files" not in ask(5, {"files": ["a.bin"], "most": 2})
