"""Grading a folder of hand-ins through nbgrader: whole, fair, and never stopped by one of them."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pefttools.grading.entrance import GradeError, Result, grade, table
from pefttools.grading.nbgrader_config import paths


def put(path, notebook):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(notebook if isinstance(notebook, str) else json.dumps(notebook))


def answer(notebook, name, source):
    notebook = copy.deepcopy(notebook)
    next(c for c in notebook["cells"] if c["id"] == name)["source"] = source
    return notebook


def forged(notebook):
    """Blank answers, and every check cell made to say the maximum."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook["cells"]:
        if cell["id"].startswith("check-"):
            cell["source"] = str(cell["metadata"]["nbgrader"]["points"])
            cell["metadata"]["tags"] = ["skip-execution"]
        if cell["id"].startswith("code-"):
            cell["source"] = "def check(name, work):\n    return 100"
    return notebook


def stripped(notebook):
    notebook = copy.deepcopy(notebook)
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        del cell["id"]
    return notebook | {"nbformat_minor": 4}


def test_nothing_to_grade_is_said(tiny):
    with pytest.raises(GradeError, match="no folder"):
        grade(tiny.root / "nowhere", root=tiny.root, entries=tiny.entries)


def test_table_is_readable():
    text = table(
        [
            Result("alice", "01_tiny", "a", "graded", 6.5, 7, 1.25, ["Mended."]),
            Result("bob", "", "b", "failed", problem="b.ipynb is empty."),
        ]
    )
    assert "alice    01_tiny    6.5   7      1.2  graded\n    Mended." in text
    assert "bob      ?            –   0      0.0  failed\n    b.ipynb is empty." in text
    assert text.endswith("2 hand-ins, 1 graded, 1 could not be")


# ------------------------------------------------------------------------------------------ a class


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class of ten, good, blank, damaged and hostile, graded once; the tests below look at what came of it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny_conftest", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny = module.Tiny(tmp_path_factory.mktemp("class") / "a course")
    blank, solved = tiny.pristine(), tiny.solved()
    folder = tiny.root / "hand-ins"
    put(folder / "alice" / "01_tiny" / "tiny.ipynb", solved)
    put(folder / "alice" / "01_tiny" / "timestamp.txt", "2026-01-31 10:15:00 UTC")
    put(folder / "alice" / "01_tiny" / "numpy.py", "raise SystemExit")
    put(folder / "blank.ipynb", blank)
    put(folder / "colab_tiny.ipynb", stripped(solved))
    put(folder / "half.ipynb", answer(blank, "tiny-total", "# exercise: tiny-total\ntotal_of_numbers = 21"))
    put(folder / "raises.ipynb", answer(solved, "tiny-box", "# exercise: tiny-box\nraise RuntimeError('no box')"))
    put(folder / "broken" / "tiny.ipynb", '{"cells": [')
    put(folder / "forged.ipynb", forged(blank))
    put(folder / "dead.ipynb", answer(solved, "tiny-double", "# exercise: tiny-double\nimport os\nos._exit(3)"))
    put(folder / "twice.ipynb", {**solved, "cells": solved["cells"] + solved["cells"]})
    put(folder / "zoe.ipynb", solved)
    tiny.folder, tiny.lines = folder, []
    tiny.grade = lambda **options: {
        r.student: r for r in grade(folder, root=tiny.root, entries=tiny.entries, log=tiny.lines.append, **options)
    }
    tiny.out = tiny.root / "grading"
    with pytest.MonkeyPatch.context() as patch:
        # somebody may be editing while this runs
        patch.setattr("pefttools.grading.run.definitions", lambda entries: "as they are")
        tiny.results = tiny.grade()
        yield tiny


SCORES = {"alice": 7, "blank": 0, "colab": 7, "half": 1, "raises": 4, "forged": 0, "twice": 7, "zoe": 7, "dead": 5}


@pytest.mark.nbgrader
def test_scores(graded):
    assert {s: r.score for s, r in graded.results.items() if r.status == "graded"} == SCORES
    assert all(r.max_score == 7 for r in graded.results.values() if r.status == "graded")


@pytest.mark.nbgrader
def test_one_bad_submission_does_not_stop_the_others(graded):
    assert {s for s, r in graded.results.items() if r.status == "failed"} == {"broken"}
    assert "JSON is broken" in graded.results["broken"].problem
    assert any("tiny-double" in limit for limit in graded.results["dead"].limits)  # its own points, and no others


@pytest.mark.nbgrader
def test_repairs_are_reported(graded):
    assert graded.results["alice"].repairs == [] == graded.results["blank"].repairs
    assert any("lost its metadata" in r for r in graded.results["colab"].repairs)
    assert any("had been edited" in r for r in graded.results["forged"].repairs)
    assert any("occurs 2 times" in r for r in graded.results["twice"].repairs)
    assert "lost its metadata" in graded.lines[0] and "had been edited" in graded.lines[0]
    assert "Repaired before grading" in Path(graded.results["colab"].feedback).read_text()


@pytest.mark.nbgrader
def test_the_csv_is_nbgraders_and_has_everybody(graded):
    with (graded.out / "grades.csv").open() as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    assert {s: float(row["score"]) for s, row in rows.items()} == {**SCORES, "broken": 0}
    assert rows["alice"]["timestamp"].startswith("2026-01-31 10:15")
    assert {row["max_score"] for row in rows.values()} == {"7.0"}


@pytest.mark.nbgrader
def test_everybody_graded_has_a_page_of_feedback(graded):
    for student, result in graded.results.items():
        if result.status == "graded":
            assert f"{result.score:g} of 7 points" in Path(result.feedback).read_text(), student


@pytest.mark.nbgrader
def test_only_the_notebook_and_its_time_reach_the_kernels_folder(graded):
    assert sorted(p.name for p in (graded.out / "autograded" / "alice" / "01_tiny").iterdir()) == [
        "timestamp.txt",
        "tiny.ipynb",
    ]
    assert json.loads((graded.out / "received" / "colab" / "01_tiny" / "tiny.ipynb").read_text()) == stripped(
        graded.solved()
    )


@pytest.mark.nbgrader
def test_the_environment_is_left_as_it_was(graded):
    before = dict(os.environ)
    graded.grade()
    assert dict(os.environ) == before


@pytest.mark.nbgrader
def test_what_has_not_changed_is_not_graded_again(graded):
    again = graded.grade()
    assert {s: r.score for s, r in again.items() if r.status == "unchanged"} == SCORES
    assert again["alice"].seconds == graded.results["alice"].seconds


@pytest.mark.nbgrader
def test_a_new_hand_in_is_graded_and_force_grades_all(graded):
    before = json.loads((graded.folder / "half.ipynb").read_text())
    try:
        put(graded.folder / "half.ipynb", answer(before, "tiny-q-even", '# exercise: tiny-q-even\ntiny_q_even = "b"'))
        again = graded.grade()
        assert (again["half"].status, again["half"].score) == ("graded", 2)
        assert again["alice"].status == "unchanged"
        (only,) = grade(
            graded.folder / "half.ipynb", root=graded.root, entries=graded.entries, force=True, log=graded.lines.append
        )
        assert (only.status, only.score, only.student) == ("graded", 2, "half")
    finally:
        put(graded.folder / "half.ipynb", before)
        graded.grade()


@pytest.mark.nbgrader
def test_a_grade_given_by_hand_stays(graded):
    from nbgrader.api import Gradebook

    def by_hand(points):
        with Gradebook(f"sqlite:///{graded.out / 'gradebook.db'}") as gradebook:
            gradebook.find_grade("check-tiny-box", "tiny", "01_tiny", "raises").manual_score = points
            gradebook.db.commit()

    by_hand(2)
    try:
        assert graded.grade()["raises"].score == 6
        (only,) = grade(
            graded.folder / "raises.ipynb",
            root=graded.root,
            entries=graded.entries,
            force=True,
            log=graded.lines.append,
        )
        assert only.score == 6
    finally:
        by_hand(None)


@pytest.mark.nbgrader
def test_grading_what_nbgrader_collected_keeps_the_original(graded, tmp_path):
    out = tmp_path / "grading"
    mine = stripped(graded.solved())
    put(out / "submitted" / "carla" / "01_tiny" / "tiny.ipynb", mine)
    (first,) = grade(chapter="tiny", out=out, root=graded.root, entries=graded.entries, log=graded.lines.append)
    (second,) = grade(chapter="tiny", out=out, root=graded.root, entries=graded.entries, log=graded.lines.append)
    assert (first.status, first.score, second.status, second.score) == ("graded", 7, "unchanged", 7)
    assert first.repairs and second.repairs == first.repairs
    assert json.loads((out / "received" / "carla" / "01_tiny" / "tiny.ipynb").read_text()) == mine


def renamed(chapter):
    """The tiny chapter's registry after an exercise got another name."""
    registry = sys.modules["tiny_registry"].entries(chapter)
    registry["tiny-sum"] = registry.pop("tiny-total")
    return registry


@pytest.mark.nbgrader
def test_other_exercises_than_in_the_gradebook_are_refused_clearly(graded, tmp_path):
    fresh = tmp_path / "course"
    shutil.copytree(graded.root, fresh)
    (fresh / "grading" / "nbgrader_config.py").unlink()
    source = fresh / "solutions" / "01_tiny.py"
    source.write_text(source.read_text().replace("tiny-total", "tiny-sum"))
    with pytest.raises(GradeError, match=r"01_tiny\.py has other exercises .* move .*gradebook\.db away"):
        grade(fresh / "hand-ins", root=fresh, entries=renamed, log=graded.lines.append)


# ------------------------------------------------------------------------------------------ nbgrader's own commands


def nbgrader(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **paths()},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.mark.nbgrader
def test_nbgraders_release_gives_the_same_bytes_as_the_builder(graded):
    built = graded.released.read_bytes()
    graded.released.unlink()
    nbgrader(graded.out, "generate_assignment", "01_tiny", "--force")
    assert graded.released.read_bytes() == built


TINY_CONFIG = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tiny_registry", {path!r})
sys.modules["tiny_registry"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from pefttools.grading.judged import JudgedExecute
JudgedExecute._find = lambda self, name: module.entries()[name]
"""


@pytest.mark.nbgrader
def test_nbgraders_commands_work_in_the_grading_folder(graded):
    config = graded.out / "nbgrader_config.py"
    ours = config.read_text()
    config.write_text(ours + TINY_CONFIG.format(path=sys.modules["tiny_registry"].__file__))
    try:
        _nbgraders_commands(graded)
    finally:
        config.write_text(ours)


def _nbgraders_commands(graded):
    nbgrader(graded.out, "autograde", "01_tiny", "--student", "alice", "--force")
    nbgrader(graded.out, "generate_feedback", "01_tiny", "--student", "alice", "--force")
    nbgrader(graded.out, "export", "--to", "exported.csv")
    with (graded.out / "exported.csv").open() as file:
        assert {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}["alice"] == 7
    notebook = json.loads((graded.out / "autograded" / "alice" / "01_tiny" / "tiny.ipynb").read_text())
    judged = notebook["metadata"]["pefttools"]
    assert judged["sandbox"] is True and type(judged["seed"]) is int


@pytest.mark.nbgrader
def test_formgrader_shows_the_class(graded):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyter_server",
        "--no-browser",
        "--allow-root",
        f"--ServerApp.root_dir={graded.root}",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=t",
    ]
    log = graded.root / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=graded.out, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **paths()}
        )
    try:
        found = None
        for _ in range(120):
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/formgrader/api/assignments?token=t", timeout=10
                ) as reply:
                    found = json.load(reply)
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, log.read_text()[-2000:]
                time.sleep(0.5)
        assert [(a["name"], a["max_score"], a["num_submissions"]) for a in found] == [("01_tiny", 7, 9)]
    finally:
        server.terminate()
        server.wait(20)
