"""Every chapter, without running it: builds, is what is released, leaks nothing, and has what every chapter has."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import nbformat
import pytest

from pefttools.grading.build import sources
from pefttools.grading.chapter import dumps, read_chapter
from pefttools.grading.release import leaks, release
from pefttools.grading.source import is_question, registry
from pefttools.grading.splice import answer_names, marked

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sources(ROOT)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


@functools.cache
def chapter(path):
    return read_chapter(path)


@functools.cache
def released(path):
    return release(chapter(path))


@functools.cache
def committed(path):
    return (ROOT / chapter(path).released).read_text(encoding="utf-8")


def of_kind(path, kind):
    return [(cell.id, cell.source) for cell in released(path).cells if cell.cell_type == kind]


def calls(path):
    """(cell id, call) for each function call in a chapter's code; magics and shell lines are left out."""
    for cell, source in of_kind(path, "code"):
        for node in ast.walk(ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source))):
            if isinstance(node, ast.Call):
                yield cell, node


def name_of(call):
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def test_there_are_chapters():
    assert {"00_start", "02_lora", "03_finetune"} <= {path.stem for path in CHAPTERS}


def test_every_chapter_with_exercises_has_a_source():
    from pefttools.grading.exercises import chapters

    assert set(chapters()) <= {path.stem for path in CHAPTERS}


def test_course_holds_the_chapters_and_nothing_else():
    wanted = {chapter(path).released for path in CHAPTERS}
    found = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "course").rglob("*")
        if file.is_file() and ".ipynb_checkpoints" not in file.parts
    }
    assert found == wanted, "run `make build`"


# ------------------------------------------------------------------------------------------ what is released


@every_chapter
def test_no_drift(path):
    if committed(path) != dumps(released(path)):
        pytest.fail(f"{chapter(path).released} is not what {path.name} gives: run `make build`, never edit course/")


@every_chapter
def test_released_notebook_is_valid_and_clean(path):
    notebook = nbformat.reads(committed(path), as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert not any("attachments" in cell for cell in notebook.cells)
    assert set(notebook.metadata) <= {"accelerator", "colab", "kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"


@every_chapter
def test_nothing_of_a_solution_is_released(path):
    notebook = nbformat.reads(committed(path), as_version=4)
    assert chapter(path).solutions
    assert leaks(notebook, chapter(path).solutions) == []
    for words in ("BEGIN SOLUTION", "END SOLUTION", "HIDDEN TESTS"):
        assert words not in committed(path)


@every_chapter
def test_right_letters_and_explanations_are_not_released(path):
    text = committed(path)
    for entry in registry(path.stem).values():
        if is_question(entry):
            variable = entry.name.replace("-", "_")
            assert not re.search(rf"{variable}\s*=\s*\\?[\"']", text), entry.name
            for _, explanation in entry.options.values():
                assert json.dumps(explanation, ensure_ascii=False)[1:-1] not in text, entry.name


@every_chapter
def test_ids_are_unique_and_fit_to_be_read(path):
    ids = [cell.id for cell in released(path).cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9-]{1,64}", found) for found in ids)


@every_chapter
def test_every_exercise_has_its_answer_and_its_check(path):
    entries = registry(path.stem)
    cells = {cell.id: cell for cell in released(path).cells}
    assert sorted(answer_names(released(path))) == sorted(entries)
    for name, entry in entries.items():
        answer, check = cells[name], cells[f"check-{name}"]
        assert marked(answer.source.split("\n")[0], {name}) == name
        by_hand = getattr(entry, "by_hand", 0)  # an answer that is graded itself is one that a person reads
        assert answer.metadata.nbgrader.solution and answer.metadata.nbgrader.grade == bool(by_hand)
        assert answer.metadata.nbgrader.get("points", 0) == by_hand
        assert (check.metadata.nbgrader.points, check.metadata.nbgrader.grade) == (entry.points, True)
        assert check.metadata.nbgrader.locked and check.metadata.editable is False
        assert 'not written yet")' in answer.source or "= ..." in answer.source


# ------------------------------------------------------------------------------------------ what every chapter has


@every_chapter
def test_three_exercises_or_more_and_four_to_six_questions(path):
    kinds = [is_question(entry) for entry in registry(path.stem).values()]
    assert kinds.count(False) >= 3
    assert 4 <= kinds.count(True) <= 6


@every_chapter
def test_the_first_exercise_succeeds_within_five_minutes(path):
    first = registry(path.stem)[answer_names(released(path))[0]]
    assert first.difficulty == 1 and first.minutes <= 5


@every_chapter
def test_hints_are_a_ladder(path):
    """Every exercise that takes thought has its hints from a nudge to almost the code."""
    levels: dict[str, list[str]] = {}
    for name, level in re.findall(
        r'(?m)^# %% \[markdown\] hint="([^"]+)" level="([^"]+)"', path.read_text(encoding="utf-8")
    ):
        levels.setdefault(name, []).append(level)
    for entry in registry(path.stem).values():
        if not is_question(entry):
            found = levels.get(entry.name, [])
            order = [level for level in ("nudge", "shape", "code") if level in found]
            assert found == order and "nudge" in found, f"{entry.name}: {found}"


@every_chapter
def test_title_block_names_minutes_and_what_is_needed(path):
    title = released(path).cells[0].source
    assert f"# {path.stem[:2]} · {chapter(path).head['title']}" in title and "minutes" in title
    for needed in re.findall(r"\]\(\.\./(\w+)/\w+\.ipynb\)", title):
        assert (ROOT / "solutions" / f"{needed}.py").exists(), needed


@every_chapter
def test_every_figure_has_an_alt_text(path):
    shown = 0
    for cell, call in calls(path):
        if name_of(call) in ("show", "slider_figure"):
            alt = next((word.value for word in call.keywords if word.arg == "alt"), None)
            assert alt is not None, f"{cell}: {name_of(call)}(…) without alt="
            assert not (isinstance(alt, ast.Constant) and not str(alt.value).strip()), f"{cell}: an empty alt text"
            shown += 1
        owner = getattr(getattr(call.func, "value", None), "id", "")
        assert not (name_of(call) == "show" and owner in ("plt", "fig", "figure")), (
            f"{cell}: use show(fig, alt=…), not {owner}.show()"
        )
    assert shown, "a chapter without a single figure"


@every_chapter
def test_plain_markdown_only(path):
    """What renders in JupyterLab, VS Code, Colab and on GitHub: no MyST, no HTML but drop-downs, no image files."""
    for cell, text in of_kind(path, "markdown"):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        assert prose.count("$$") % 2 == 0, f"{cell}: an odd number of $$"
        assert not re.search(r"(?m)^\s*(:::|\$\$.*\$\$ *\(|\([\w-]+\)=$)", prose), f"{cell}: MyST"
        assert not re.search(r"(?m)^ {0,3}```\{|\{(ref|eq|cite|numref|doc|term)\}`", text), f"{cell}: MyST"
        tags = re.findall(r"<(/?[a-zA-Z]+)", re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$", "", prose, flags=re.S))
        assert set(tags) <= {"details", "/details", "summary", "/summary", "br", "sub", "/sub", "sup", "/sup"}, cell
        images = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", prose)
        assert not images or cell == "title", f"{cell}: images come from code, with show(fig, alt=…)"


@every_chapter
def test_fences_and_drop_downs_are_closed(path):
    for cell, text in of_kind(path, "markdown"):
        assert len(re.findall(r"(?m)^\s*```", text)) % 2 == 0, f"{cell}: a code fence that is not closed"
        assert text.count("<details>") == text.count("</details>") == text.count("<summary>"), cell


@every_chapter
def test_no_front_end_is_needed_and_nothing_of_one_machine_is_named(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?m)^\s*(%matplotlib|!|%pip|%cd)", text)
    assert not re.search(r"(/(home|root|Users|tmp)/|C:\\)", text)
    for cell, call in calls(path):
        assert name_of(call) != "input", f"{cell}: nobody can answer input() when a notebook is graded"


@every_chapter
def test_the_length_switch_is_used_for_training(path):
    """Training takes its length from steps(full=…), so that the test suite runs the same code in less time."""
    for cell, call in calls(path):
        if name_of(call) == "train" and any(word.arg == "steps" for word in call.keywords):
            value = next(word.value for word in call.keywords if word.arg == "steps")
            assert not isinstance(value, ast.Constant), (
                f"{cell}: train(steps={ast.unparse(value)}) ignores PEFTTOOLS_QUICK; use steps(full=…)"
            )
