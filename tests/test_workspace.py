"""The reader's copies: made, brought up to date with the answers in them, and never lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pefttools import workspace
from pefttools.workspace import WorkspaceError, sync

FILE = "02_lora/lora.ipynb"


def chapter(*names, prose="Read this.", stub='    raise NotImplementedError("not written yet")') -> str:
    """A released chapter with one answer cell and one check for each exercise, as the builder makes them."""
    cells = [nbformat.v4.new_markdown_cell(prose, id="title")]
    for name in names:
        variable = name.replace("-", "_")
        mark = {"schema_version": 3, "task": False, "locked": False, "solution": True, "grade": False, "grade_id": name}
        cells.append(
            nbformat.v4.new_code_cell(
                f"# exercise: {name}\ndef {variable}(x):\n{stub}", id=name, metadata={"nbgrader": mark}
            )
        )
        mark = {**mark, "locked": True, "solution": False, "grade": True, "points": 1, "grade_id": f"check-{name}"}
        cells.append(
            nbformat.v4.new_code_cell(f'check("{name}", {variable})', id=f"check-{name}", metadata={"nbgrader": mark})
        )
    nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    return nbformat.writes(nb) + "\n"


@pytest.fixture
def course(tmp_path) -> Path:
    put(tmp_path / "course" / FILE, chapter("lora-forward", "lora-init"))
    put(tmp_path / "course" / "00_start" / "start.ipynb", chapter("hello-check"))
    return tmp_path / "course"


@pytest.fixture
def mine(tmp_path) -> Path:
    return tmp_path / "my_course"


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def solve(path: Path, name: str, body: str = "    return x + 1") -> None:
    """What a student does: write in an answer cell, run, add a cell of their own, save."""
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.id == name:
            cell.source = f"# exercise: {name}\ndef {name.replace('-', '_')}(x):\n{body}"
            cell.execution_count = 7
            cell.outputs = [nbformat.v4.new_output("stream", text="noise")]
    nbformat.write(nb, path)


def source(path: Path, name: str) -> str:
    return next(c.source for c in nbformat.read(path, as_version=4).cells if c.id == name)


def everything(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"
    }


def test_first_start_copies_everything_and_a_second_changes_nothing(course, mine):
    put(course / "02_lora" / "picture.txt", "a file beside a notebook")
    put(course / "02_lora" / ".ipynb_checkpoints" / "lora-checkpoint.ipynb", "{}")
    changes = sync(course, mine)
    assert [(c.file, c.what) for c in changes] == [
        ("00_start/start.ipynb", "new"),
        (FILE, "new"),
        ("02_lora/picture.txt", "new"),
    ]
    for c in changes:
        assert (mine / c.file).read_bytes() == (course / c.file).read_bytes()
    before = everything(mine)
    assert sync(course, mine) == []
    assert everything(mine) == before


def test_reader_work_is_left_alone_while_the_chapter_stays(course, mine):
    sync(course, mine)
    solve(mine / FILE, "lora-forward")
    before = everything(mine)
    assert sync(course, mine) == []
    assert everything(mine) == before


def test_untouched_copy_is_replaced(course, mine):
    sync(course, mine)
    put(course / FILE, chapter("lora-forward", "lora-init", prose="Read this instead."))
    [change] = sync(course, mine)
    assert (change.file, change.what, change.kept) == (FILE, "replaced", None)
    assert (mine / FILE).read_bytes() == (course / FILE).read_bytes()
    assert not (mine / "old").exists()


def test_answers_are_carried_into_a_new_version(course, mine):
    sync(course, mine)
    solve(mine / FILE, "lora-forward")
    written = (mine / FILE).read_bytes()
    put(course / FILE, chapter("lora-init", "lora-merge", "lora-forward", prose="New prose.", stub="    ..."))
    [change] = sync(course, mine)
    assert change.what == "carried" and "your 1 answer in it" in change.note and "old/02_lora/lora_" in change.note
    assert change.kept.read_bytes() == written
    assert change.kept.parent == mine / "old" / "02_lora" and change.kept.suffix == ".ipynb"
    assert source(mine / FILE, "lora-forward").endswith("return x + 1")
    assert source(mine / FILE, "lora-merge").endswith("    ...")
    # a blank answer cell of the former version is no answer: the better stub wins
    assert source(mine / FILE, "lora-init").endswith("    ...")
    assert source(mine / FILE, "title") == "New prose."
    assert sync(course, mine) == []
    # and once more on top of it
    put(course / FILE, chapter("lora-forward", prose="Third version."))
    [change] = sync(course, mine)
    assert change.what == "carried" and source(mine / FILE, "lora-forward").endswith("return x + 1")
    assert len(list((mine / "old" / "02_lora").iterdir())) == 2


def test_an_answer_without_a_place_is_named_and_kept(course, mine):
    sync(course, mine)
    solve(mine / FILE, "lora-init", "    return {'braces': x}")
    put(course / FILE, chapter("lora-forward"))
    [change] = sync(course, mine)
    assert "no place any more for: lora-init" in change.note
    assert "'braces'" in change.kept.read_text()


def test_two_updates_in_one_second_keep_both_files(course, mine, monkeypatch):
    class Clock:
        @staticmethod
        def now():
            return workspace_time

    from datetime import datetime

    workspace_time = datetime(2026, 1, 31, 10, 15)
    monkeypatch.setattr(workspace, "datetime", Clock)
    sync(course, mine)
    for n in range(3):
        solve(mine / FILE, "lora-forward", f"    return {n}")
        put(course / FILE, chapter("lora-forward", prose=f"Version {n}."))
        sync(course, mine)
    kept = sorted(p.name for p in (mine / "old" / "02_lora").iterdir())
    assert kept == [
        "lora_2026-01-31_10-15-00.ipynb",
        "lora_2026-01-31_10-15-00_2.ipynb",
        "lora_2026-01-31_10-15-00_3.ipynb",
    ]


@pytest.mark.parametrize(
    "damage",
    [b"", b"not JSON", b'{"cells": ', b"[1, 2]", b'{"nbformat": 4}', b'{"cells": 3}', b"\xff\xfe\x00", b"[" * 200_000],
    ids=["empty", "text", "cut off", "list", "no cells", "number", "bytes", "deep"],
)
@pytest.mark.parametrize("changed", [False, True], ids=["same chapter", "new chapter"])
def test_unreadable_file_is_set_aside(course, mine, damage, changed):
    sync(course, mine)
    (mine / FILE).write_bytes(damage)
    if changed:
        put(course / FILE, chapter("lora-forward", prose="New."))
    [change] = sync(course, mine)
    assert change.what == "set aside" and change.kept.read_bytes() == damage
    assert "Your file is now old/02_lora/" in change.note
    assert (mine / FILE).read_bytes() == (course / FILE).read_bytes()
    assert sync(course, mine) == []


@pytest.mark.parametrize(
    "cells", [[None], ["text"], [{"cell_type": "code"}], [{"source": 3, "cell_type": "code", "metadata": 1}]]
)
def test_odd_but_readable_notebooks_lose_nothing(course, mine, cells):
    sync(course, mine)
    put(mine / FILE, json.dumps({"cells": cells, "nbformat": 4, "metadata": {}}))
    odd = (mine / FILE).read_bytes()
    assert sync(course, mine) == []  # the chapter is the same: the reader may do as they like
    put(course / FILE, chapter("lora-forward", prose="New."))
    [change] = sync(course, mine)
    assert change.kept.read_bytes() == odd
    assert nbformat.read(mine / FILE, as_version=4).cells[0].source == "New."


def test_a_splice_that_fails_costs_nothing(course, mine, monkeypatch):
    sync(course, mine)
    solve(mine / FILE, "lora-forward")
    written = (mine / FILE).read_bytes()

    def fail(*_):
        raise RuntimeError("with {braces}")

    monkeypatch.setattr("pefttools.grading.splice.splice", fail)
    put(course / FILE, chapter("lora-forward", prose="New."))
    [change] = sync(course, mine)
    assert (
        change.what == "set aside"
        and "RuntimeError: with {braces}" in change.note
        and change.kept.read_bytes() == written
    )
    assert (mine / FILE).read_bytes() == (course / FILE).read_bytes()


def test_lost_memory_costs_no_answer(course, mine):
    sync(course, mine)
    solve(mine / FILE, "lora-forward")
    before = (mine / FILE).read_bytes()
    for p in (mine / ".pefttools").rglob("*.ipynb"):
        p.unlink()
    assert sync(course, mine) == []  # it is the present version: taken as it is
    assert (mine / FILE).read_bytes() == before
    for p in (mine / ".pefttools").rglob("*.ipynb"):
        p.unlink()
    put(course / FILE, chapter("lora-init", "lora-forward", prose="New."))
    [change] = sync(course, mine)
    assert change.what == "carried" and change.kept.read_bytes() == before
    assert source(mine / FILE, "lora-forward").endswith("return x + 1")


def test_removed_copy_comes_back_and_other_files_stay(course, mine):
    sync(course, mine)
    put(mine / "notes.md", "my own")
    put(mine / "02_lora" / "scratch.ipynb", "my own")
    (mine / FILE).unlink()
    [change] = sync(course, mine)
    assert change.what == "new" and "removed" in change.note
    (course / FILE).unlink()  # a chapter that the course no longer has
    solve(mine / FILE, "lora-forward")
    assert sync(course, mine) == []
    assert (mine / FILE).exists() and (mine / "notes.md").read_text() == "my own"


def test_edited_file_beside_a_notebook_is_kept(course, mine):
    put(course / "02_lora" / "table.csv", "a\n")
    sync(course, mine)
    put(mine / "02_lora" / "table.csv", "mine\n")
    assert sync(course, mine) == []
    put(course / "02_lora" / "table.csv", "b\n")
    [change] = sync(course, mine)
    assert change.kept.read_text() == "mine\n" and (mine / "02_lora" / "table.csv").read_text() == "b\n"


def test_cut_off_anywhere_the_next_call_finishes(course, mine, monkeypatch):
    """Every write in turn fails; afterwards a plain call ends in the same state, with the reader's file kept."""
    real = workspace.write
    for failing in range(1, 5):
        root = mine / str(failing)
        put(course / FILE, chapter("lora-forward", "lora-init"))
        sync(course, root)
        solve(root / FILE, "lora-forward")
        written = (root / FILE).read_bytes()
        put(course / FILE, chapter("lora-forward", prose="New."))
        calls = 0

        def cut(path, data, failing=failing):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise KeyboardInterrupt
            real(path, data)

        monkeypatch.setattr(workspace, "write", cut)
        try:
            sync(course, root)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(workspace, "write", real)
        sync(course, root)
        assert source(root / FILE, "lora-forward").endswith("return x + 1")
        assert source(root / FILE, "title") == "New."
        assert written in [p.read_bytes() for p in (root / "old").rglob("*.ipynb")]
        assert not list(root.rglob("*.part")) and sync(course, root) == []
    assert calls < failing, "the loop should reach past the last write"


def test_full_disk_leaves_the_file_and_says_so(course, mine, monkeypatch):
    sync(course, mine)
    solve(mine / FILE, "lora-forward")
    written = (mine / FILE).read_bytes()
    put(course / FILE, chapter("lora-forward", prose="New."))
    put(course / "00_start" / "start.ipynb", chapter("hello-check", prose="New."))

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    changes = sync(course, mine)
    assert [c.what for c in changes] == ["left alone"] * 2 and "No space left" in changes[0].note
    assert (mine / FILE).read_bytes() == written and not list(mine.rglob("*.part"))


def test_directory_and_link_in_place_of_a_file(course, mine, tmp_path):
    (mine / "00_start" / "start.ipynb").mkdir(parents=True)
    put(tmp_path / "elsewhere.ipynb", chapter("lora-forward", "lora-init"))
    (mine / "02_lora").mkdir()
    (mine / FILE).symlink_to(tmp_path / "elsewhere.ipynb")
    assert [c.what for c in sync(course, mine)] == ["left alone"]
    put(course / FILE, chapter("lora-forward", prose="New."))
    sync(course, mine)
    assert (mine / FILE).is_symlink() and "New." in (tmp_path / "elsewhere.ipynb").read_text()


def test_eight_processes_at_once(course, mine):
    sync(course, mine)
    solve(mine / FILE, "lora-forward")
    put(course / FILE, chapter("lora-forward", prose="New."))
    code = "import sys; from pefttools.workspace import sync; print(len(sync(sys.argv[1], sys.argv[2])))"
    root = Path(workspace.__file__).parents[1]
    runs = [
        subprocess.Popen([sys.executable, "-c", code, course, mine], stdout=subprocess.PIPE, text=True, cwd=root)
        for _ in range(8)
    ]
    said = [int(run.communicate(timeout=60)[0]) for run in runs]
    assert sorted(said) == [0] * 7 + [1]
    assert len(list((mine / "old").rglob("*.ipynb"))) == 1
    assert source(mine / FILE, "lora-forward").endswith("return x + 1")


def test_waits_for_another_process_only_so_long(course, mine):
    from filelock import FileLock

    (mine / ".pefttools").mkdir(parents=True)
    with FileLock(str(mine / ".pefttools" / "lock")):
        with pytest.raises(WorkspaceError, match="another process"):
            sync(course, mine, wait=0.1)


def test_wrong_folders(course, mine, tmp_path):
    with pytest.raises(WorkspaceError, match="no chapters"):
        sync(tmp_path / "nowhere", mine)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkspaceError, match="make build"):
        sync(tmp_path / "empty", mine)
    with pytest.raises(WorkspaceError, match="outside of"):
        sync(course, course / "mine")
    put(tmp_path / "file", "")
    with pytest.raises(WorkspaceError, match="--mine"):
        sync(course, tmp_path / "file")
