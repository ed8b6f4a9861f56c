"""Which cells of a notebook are run for a grade, and that no answer makes finding out crash or stall."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports test modules by path, so helpers beside them need this

from judging import RIGHT, notebook

from pefttools.grading.build import sources
from pefttools.grading.chapter import read_chapter
from pefttools.grading.needed import names_of, plan
from pefttools.grading.release import release
from pefttools.grading.splice import splice

ROOT = Path(__file__).resolve().parents[2]


def steps(*own, answer=RIGHT["twice"], tags=()):
    """The chapter's own statements that are run before this answer."""
    nb = notebook({"twice": answer}, before="")
    nb.cells[:0] = [new_code_cell(source, metadata={"tags": list(tags)}) for source in own]
    return [step.source for step in plan(nb) if step.kind == "demonstration"]


def test_answers_and_checks_are_run_and_the_rest_is_not():
    nb = notebook(RIGHT, before="import datasets\nmodel = train()\nmodel")
    nb.cells.insert(1, new_markdown_cell("text"))
    made = plan(nb)
    assert [(step.kind, step.name) for step in made] == [
        (kind, name) for name in RIGHT for kind in ("answer", "check")]
    assert [step.work for step in made if step.kind == "check"] == list(RIGHT)
    assert made[0].source == RIGHT["twice"] and made[0].cell == 2


@pytest.mark.parametrize("own, answer, kept", [
    ("import math\nimport torch", "def twice(n): return math.floor(2 * n)", ["import math"]),
    ("import math, json", "x = json", ["import json"]),
    ("from torch import nn, optim as o", "class twice(nn.Module): pass", ["from torch import nn"]),
    ("base = load()\nlosses = train(base)", "def twice(n): return base(n)", ["base = load()"]),
    ("rows = []\nrows.append(1)\nrows[0] = 2\nother = 3", "rows", ["rows = []\nrows.append(1)\nrows[0] = 2"]),
    ("def helper(a):\n    return deep(a)\ndef deep(a):\n    return a", "helper", None),
    ("x = 5", "x = x + 1", ["x = 5"]),
    ("x = 5", "x = 1\ny = x", []),
    ("loss = train()", "[loss for loss in [1]]", []),
    ("%matplotlib inline\nx = 5", "x", ["x = 5"]),
    ("x = (", "x", []),
])
def test_statements_that_an_answer_needs(own, answer, kept):
    found = steps(own, answer=answer)
    assert found == kept if kept is not None else found and "deep" in found[0]


def test_needs_go_back_over_cells():
    assert steps("import math", "a = math.pi", "b = a", "c = b", answer="twice = b") == ["import math", "a = math.pi", "b = a"]


def test_tags():
    assert steps("print('set up')", tags=("needed",)) == ["print('set up')"]
    assert steps("x = 1", answer="x", tags=("gpu",)) == []


def test_names():
    assert names_of("def f():\n    return g(z)\ndef g(q):\n    return q") == {"z"}
    assert names_of("total = 0\nfor a in rows:\n    total = total + a") == {"rows"}
    assert names_of("y += 1") == {"y"}
    assert names_of("%time model(x)") >= {"model", "x"}
    assert names_of("await task") == {"task"}
    assert names_of("a = = b") == set()


HOSTILE = {
    "brackets": "(" * 100_000, "signs": "-" * 100_000 + "1", "attributes": "a" + ".b" * 80_000, "sum": "+".join("1" * 100_000),
    "null": "a\0b", "surrogate": 'x = "\ud800"', "long": "x = 1\n" * 40_000, "lambdas": "lambda:" * 5_000 + "1",
    "ifs": "".join(" " * n + "if x:\n" for n in range(150)) + " " * 150 + "pass", "lists": "[" * 150 + "]" * 150,
    "broken": "{" * 90 + "1:" * 90, "calls": "a(" * 90 + ")" * 89, "number": "1" * 250_000, "stars": "*a," * 50_000,
    "comparison": "a<" * 80_000 + "a", "subscripts": "a" + "[0]" * 80_000, "decorators": "@a\n" * 60_000 + "def f(): pass",
    "tries": "try:\n pass\nexcept a: pass\n" * 9_000, "lines": "\\\n" * 100_000 + "x", "return": "return 5",
    "await": "await x\nasync with y: pass", "magic": "%run /etc/passwd\n!rm -rf /", "escape": '"\\d"; 1 is 1', "empty": ""}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_answers_neither_crash_nor_stall(kind):
    nb = notebook({"twice": HOSTILE[kind], "letter": RIGHT["letter"]}, before="import torch\nx = torch.ones(1)")
    begun = time.process_time()
    made = plan(nb)
    assert time.process_time() - begun < 5
    assert [step.name for step in made if step.kind == "check"] == ["twice", "letter"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_nor_do_hostile_cells_where_nothing_was_spliced(kind):
    plan(notebook(RIGHT, before=HOSTILE[kind] + "\n"))


@pytest.mark.parametrize("path", sources(ROOT), ids=lambda path: path.stem)
def test_of_the_chapters_only_imports_are_left(path):
    """Nothing that trains is run for a grade, whether solved or blank."""
    chapter = read_chapter(path)
    pristine = release(chapter)
    for submitted in (chapter.notebook, pristine):
        nb, _ = splice(pristine, json.loads(json.dumps(submitted)))
        own = "\n".join(step.source for step in plan(nb) if step.kind == "demonstration")
        assert "train(" not in own and len(own.splitlines()) < 30
