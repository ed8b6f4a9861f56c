"""The builder: what a chapter's source becomes, and what it refuses."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re

import nbformat
import pytest

from pefttools.grading.build import sources
from pefttools.grading.chapter import dumps
from pefttools.grading.release import leaks, stub
from pefttools.grading.source import BuildError, ends_in_check


def cells(notebook):
    return {cell["id"]: cell for cell in notebook["cells"]}


def text(cell):
    return "".join(cell["source"])


# ------------------------------------------------------------------------------------------ what comes out


def test_the_released_notebook_is_valid_and_clean(tiny):
    notebook = nbformat.read(tiny.released, as_version=4)
    nbformat.validate(notebook)
    assert [c.id for c in notebook.cells][:2] == ["title", "setup"]
    assert all(c.outputs == [] and c.execution_count is None for c in notebook.cells if c.cell_type == "code")
    assert notebook.metadata.kernelspec.name == "python3"
    assert tiny.released.read_bytes().endswith(b"}\n") and b"\r" not in tiny.released.read_bytes()


def test_title_block_says_what_the_reader_needs_to_know(tiny):
    title = text(cells(tiny.pristine())["title"])
    assert title.startswith("[![")
    assert "colab.research.google.com/github/" in title and "/course/01_tiny/tiny.ipynb" in title
    assert "# 01 · A tiny chapter" in title
    assert (
        "About 2 minutes · 7 points in 3 exercises and 1 question · needs [00_start](../00_start/start.ipynb)" in title
    )


def test_setup_cell_does_nothing_outside_colab(tiny, monkeypatch):
    import subprocess

    code = text(cells(tiny.pristine())["setup"])
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    exec(compile(code, "setup", "exec"), {})
    assert calls == []
    import sys

    def nothing_is_here(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr("importlib.metadata.version", nothing_is_here)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(compile(code, "setup", "exec"), {})
    (command,) = calls
    assert "--no-deps" in command and any(part.startswith("transformers>=") for part in command)
    assert any(part.startswith("pefttools @ git+https://github.com/") for part in command)
    assert not any(re.match(r"(torch|numpy)\b", part) for part in command)


def test_answer_and_check_cells_carry_nbgraders_metadata(tiny):
    found = cells(tiny.pristine())
    for name, points in {"tiny-double": 2, "tiny-box": 3, "tiny-total": 1, "tiny-q-even": 1}.items():
        answer, check = found[name]["metadata"], found[f"check-{name}"]["metadata"]
        assert (
            answer["nbgrader"]["grade_id"] == name
            and answer["nbgrader"]["solution"]
            and not answer["nbgrader"]["grade"]
        )
        assert check["nbgrader"]["grade_id"] == f"check-{name}" and check["nbgrader"]["points"] == points
        assert check["nbgrader"]["grade"] and check["nbgrader"]["locked"] and not check["nbgrader"]["solution"]
        assert check["editable"] is False and check["deletable"] is False and "editable" not in answer
        assert text(found[name]).split("\n")[0] == f"# exercise: {name}"


def test_stubs_say_not_written_yet(tiny):
    found = cells(tiny.pristine())
    assert text(found["tiny-double"]).endswith('    raise NotImplementedError("tiny-double: not written yet")')
    assert text(found["tiny-box"]).count("raise NotImplementedError") == 2
    assert text(found["tiny-total"]).endswith("numbers = [6, 7, 8]\ntotal_of_numbers = ...  # a number")
    assert text(found["tiny-q-even"]) == '# exercise: tiny-q-even\ntiny_q_even = ...  # "a" or "b"'
    assert text(found["check-tiny-q-even"]) == 'check("tiny-q-even", tiny_q_even)'


def test_headings_hints_and_questions(tiny):
    found = cells(tiny.pristine())
    assert text(found["about-tiny-box"]).startswith("### Exercise · A box · ●●○ · 3 min · 3 points\n\nA class")
    hints = text(found["hints-tiny-double"])
    assert hints.count("<details>") == 2 == hints.count("</details>")
    assert "Hint 1: a nudge" in hints and "Hint 2: almost the code" in hints
    question = text(found["about-tiny-q-even"])
    assert "Which is even?" in question and "- **a)** 3\n- **b)** 4" in question and "Yes." not in question


def test_instructor_and_source_notebooks_hold_the_solutions(tiny):
    source = json.loads((tiny.root / "grading" / "source" / "01_tiny" / "tiny.ipynb").read_text())
    assert source == tiny.solved()
    assert "doubled_by_hand" in text(cells(source)["tiny-double"])
    assert "doubled_by_hand" not in tiny.released.read_text()


def test_stub_of_a_region_at_the_top_level_names_what_it_assigns():
    assert stub("", "a, b = 1, 2\nc: int = 3\n", "", "x") == "a = ...\nb = ...\nc = ..."
    assert stub("", "def f():\n    return 1\n", "", "x") == "f = ..."
    assert stub("", "print(1)\n", "", "x") == 'raise NotImplementedError("x: not written yet")'
    assert stub("    ", "    a = 1\n", "", "x") == '    raise NotImplementedError("x: not written yet")'


# ------------------------------------------------------------------------------------------ the same every time


def test_building_again_changes_nothing(tiny):
    before = tiny.released.read_bytes()
    assert tiny.build() == []
    tiny.released.unlink()
    assert tiny.build() == ["course/01_tiny/tiny.ipynb"]
    assert tiny.released.read_bytes() == before


def test_check_reports_drift_and_writes_nothing(tiny):
    assert tiny.build(check=True) == []
    edited = tiny.released.read_text().replace("twice its input", "thrice its input")
    tiny.released.write_text(edited)
    assert tiny.build(check=True) == ["course/01_tiny/tiny.ipynb"]
    assert "thrice its input" in tiny.log[0] and "make build" in tiny.log[0]
    assert tiny.released.read_text() == edited
    tiny.released.unlink()
    assert tiny.build(check=True) == ["course/01_tiny/tiny.ipynb"]
    assert "not been built" in tiny.log[0] and not tiny.released.exists()


def test_a_released_chapter_without_a_source_is_drift(tiny):
    (tiny.root / "course" / "07_gone").mkdir()
    assert tiny.build(check=True) == ["course/07_gone"]


def test_a_change_in_one_cell_leaves_the_other_ids_alone(tiny):
    before = [c["id"] for c in tiny.pristine()["cells"]]
    tiny.edit("# A class with two holes.", "# A class with two gaps.")
    tiny.edit("Double a number", "Double any number")
    tiny.build()
    after = [c["id"] for c in tiny.pristine()["cells"]]
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert len(set(after)) == len(after)


def test_execute_puts_outputs_into_the_instructors_notebook_only(tiny):
    tiny.build(execute=True)
    check = cells(tiny.solved())["check-tiny-double"]
    assert any("2.0" in "".join(o.get("data", {}).get("text/plain", "")) for o in check["outputs"])
    assert all(not c.get("outputs") for c in tiny.pristine()["cells"])


def test_chapters_are_found_by_any_of_their_names(tiny):
    for name in ("01_tiny", "tiny", "01", "solutions/01_tiny.py"):
        assert sources(tiny.root, [name]) == [tiny.source]
    with pytest.raises(BuildError, match="no chapter 'lora'.*01_tiny"):
        sources(tiny.root, ["lora"])


def test_the_text_is_what_nbconvert_writes(tiny):
    from nbconvert.exporters import NotebookExporter

    written, _ = NotebookExporter().from_notebook_node(nbformat.from_dict(tiny.pristine()))
    assert written == tiny.released.read_text() == dumps(tiny.pristine())


# ------------------------------------------------------------------------------------------ what is refused


REFUSED = {
    "unknown exercise": (
        'exercise="tiny-box"',
        'exercise="tiny-bix"',
        r"'tiny-bix' is not an exercise.*known are: .*tiny-box",
    ),
    "unknown hint": (
        'hint="tiny-double" level="nudge"',
        'hint="tiny-dubble" level="nudge"',
        "'tiny-dubble' is not an exercise",
    ),
    "hint without level": (' level="nudge"', "", "needs a level: nudge, shape, code"),
    "unknown marker": ('level="nudge"', 'levle="nudge"', "unknown marker 'levle'"),
    "no check": (
        '# %% check="tiny-total"\ncheck("tiny-total", total_of_numbers)\n',
        "",
        "'tiny-total' has no check cell",
    ),
    "check first": ('# %% check="tiny-box"\ncheck("tiny-box", Box)', "# %%\nprint()", "'tiny-box' has no check cell"),
    "twice": (
        '# %% exercise="tiny-total"',
        '# %% exercise="tiny-box"',
        r"exercise='tiny-box' occurs twice; first in line \d+",
    ),
    "no description": ('# %% [markdown] exercise="tiny-total"', "# %% [markdown]", "'tiny-total' has no description"),
    "no end": ("    ### END SOLUTION\n\n\n# %% check", "\n# %% check", "BEGIN SOLUTION without END SOLUTION"),
    "no begin": ("    ### BEGIN SOLUTION\n    doubled", "    doubled", "END SOLUTION without BEGIN"),
    "no region": (
        "### BEGIN SOLUTION a number\ntotal_of_numbers = sum(numbers)\n### END SOLUTION",
        "total_of_numbers = 3",
        "answer cell of 'tiny-total' has no ### BEGIN SOLUTION",
    ),
    "nested": (
        "    doubled_by_hand = x",
        "    ### BEGIN SOLUTION\n    doubled_by_hand = x",
        "inside a solution that has not ended",
    ),
    "unmarked solution": ('# %% exercise="tiny-total"\n', "# %%\n", "no exercise marker"),
    "check of nothing": ('check("tiny-box", Box)', 'check("tiny-box", Box);', 'must end in check\\("tiny-box"'),
    "check of another": ('check("tiny-box", Box)', 'check("tiny-double", Box)', 'must end in check\\("tiny-box"'),
    "question as exercise": (
        'question="tiny-q-even"',
        'exercise="tiny-q-even"',
        "'tiny-q-even' is a question; write question=",
    ),
    "question with text": ('# %% question="tiny-q-even"\n', '# %% question="tiny-q-even"\nx = 1\n', "stays empty"),
    "no title": ("# title: A tiny chapter\n", "", "needs a title"),
    "broken head": ("# minutes: 2", "# minutes: [2", "not YAML"),
    "half a statement": (
        "total_of_numbers = sum(numbers)",
        "total = 1\nfor x in numbers:\n    pass\n### END SOLUTION\n    print(x)\n### BEGIN SOLUTION\ny = 1",
        "is not Python",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_faulty_chapter_is_refused_with_file_and_line(tiny, case):
    old, new, message = REFUSED[case]
    tiny.edit(old, new)
    before = tiny.released.read_bytes()
    with pytest.raises(BuildError, match=message) as raised:
        tiny.build()
    assert re.match(r"01_tiny\.py:\d+: ", str(raised.value))
    assert tiny.released.read_bytes() == before


def test_the_line_in_a_message_is_the_cells_own(tiny):
    tiny.edit('check("tiny-box", Box)', 'print("tiny-box", Box)')
    line = tiny.source.read_text().split("\n").index('# %% check="tiny-box"') + 1
    with pytest.raises(BuildError, match=rf"01_tiny\.py:{line}: "):
        tiny.read()


def test_check_above_its_answer_is_refused(tiny):
    tiny.edit('# %% check="tiny-box"\ncheck("tiny-box", Box)\n', "")
    tiny.edit(
        '# %% [markdown] exercise="tiny-box"',
        '# %% check="tiny-box"\ncheck("tiny-box", Box)\n\n# %% [markdown] exercise="tiny-box"',
    )
    with pytest.raises(BuildError, match="'tiny-box' stands before its exercise cell"):
        tiny.read()


def test_an_exercise_that_the_chapter_never_uses_is_refused(tiny):
    registry = tiny.entries()
    registry["tiny-more"] = registry["tiny-double"]
    with pytest.raises(BuildError, match="exercise 'tiny-more' is registered for this chapter but never used"):
        tiny.read(registry)


@pytest.mark.parametrize(
    "where",
    [
        "# %%\ndef twin(x):\n    doubled_by_hand = x + x\n    return doubled_by_hand\n",
        "# %% [markdown]\n# The solution is\n# ```python\n# doubled_by_hand   = x+x\n# return doubled_by_hand\n# ```\n",
        "# %%\nprint('the sum')\ntotal_of_numbers = sum(numbers)\n",
        '# %%\n# tiny_q_even = "b"\nprint()\n',
    ],
)
def test_a_solution_that_leaks_is_refused(tiny, where):
    tiny.edit('# %% question="tiny-q-even"', f'{where}\n# %% question="tiny-q-even"')
    with pytest.raises(BuildError, match=r"01_tiny\.py:\d+: the solution leaks"):
        tiny.release()


def test_more_than_half_of_a_solution_leaks_and_less_may_be_a_hint(tiny):
    released = tiny.release()
    solution = ["    a = f(x)\n    # why\n    b = g(a)\n    c = h(b)\n    return a + b + c"]
    for text, leak in {
        "a = f(x)\nb = g(a)\nc=h(b)": True,
        "b = g(a)\n# then\nc=h(b)\n    return a+b + c": True,
        "a = f(x)\nb = g(a)": False,
        "a = f(x)\nc = h(b)\nb = g(a)": False,
    }.items():
        released.cells[4].source = text
        assert bool(leaks(released, solution)) is leak, text
    assert leaks(released, ["    return q\n"]) == []


def test_leaks_finds_markers_outputs_and_metadata(tiny):
    released = tiny.release()
    assert leaks(released, tiny.read().solutions) == []
    released.cells[3].metadata["note"] = "return self.side_length ** 3"
    released.cells[4].source = "### BEGIN SOLUTION"
    assert {cell for cell, _ in leaks(released, tiny.read().solutions)} == {released.cells[3].id, released.cells[4].id}


@pytest.mark.parametrize(
    ("code", "good"),
    [
        ('check("a", f)', True),
        ("x = 1\ngrading.check('a', f)  # yes", True),
        ('check("a", f)\n', True),
        ('check("a", f);', False),
        ('check("b", f)', False),
        ('x = check("a", f)', False),
        ('check("a", f)\nx', False),
        ("", False),
        ("check(", False),
        ("check(name, f)", False),
    ],
)
def test_ends_in_check(code, good):
    assert ends_in_check(code, "a") is good


def test_every_released_code_cell_is_python(tiny):
    for cell in tiny.pristine()["cells"]:
        if cell["cell_type"] == "code":
            ast.parse(text(cell))
