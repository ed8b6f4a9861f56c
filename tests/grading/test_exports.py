"""Grades out: nbgrader's CSV, Canvas' and Moodle's forms; nothing in them is a formula."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import pytest

from pefttools.grading.exports import canvas, harmless, moodle, number, score, write_exports
from pefttools.grading.nbgrader_config import paths

pytestmark = pytest.mark.nbgrader

PEOPLE = {
    "canvas 12345": {
        "student": "doejane-12345",
        "name": "doejane",
        "lms": "canvas",
        "ids": {"00_start": "12345", "02_lora": "12345"},
    },
    "moodle jörg müller": {
        "student": "Jörg Müller",
        "name": "Jörg Müller",
        "lms": "moodle",
        "ids": {"00_start": "95", "02_lora": "11"},
    },
    "name alice": {"student": "alice", "name": "", "lms": "", "ids": {}},
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A grading folder with a gradebook: two chapters, five students."""
    from nbgrader.api import Gradebook

    out = tmp_path_factory.mktemp("grading")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in paths().items():
            patch.setenv(name, value)
        with Gradebook(f"sqlite:///{out / 'gradebook.db'}") as book:
            for chapter, notebook in (("00_start", "start"), ("02_lora", "lora")):
                book.add_assignment(chapter)
                book.add_notebook(notebook, chapter)
                book.add_solution_cell("lora-a", notebook, chapter)
                for name, points in (("check-lora-a", 3), ("check-lora-b", 2.5)):
                    book.add_grade_cell(name, notebook, chapter, max_score=points, cell_type="code")
            book.add_student("alice", first_name="Alice", last_name="=HYPERLINK(1)", email="+alice@example.org")
            book.add_student("doejane-12345")
            book.add_student("Jörg Müller", first_name="Jörg", last_name="Müller", email="jm@example.org")
            book.add_student("late")
            book.add_student("nobody")
            for student, points in (("alice", 3), ("doejane-12345", 2.25), ("Jörg Müller", 0), ("late", 2)):
                book.add_submission("02_lora", student)
                book.find_grade("check-lora-a", "lora", "02_lora", student).manual_score = points
            book.find_comment(
                "lora-a", "lora", "02_lora", "Jörg Müller"
            ).manual_comment = "=1+1 <script>alert(1)</script>"
            book.find_submission_notebook("lora", "02_lora", "late").late_submission_penalty = 5
            book.db.commit()
        (out / "received").mkdir()
        (out / "received" / "people.json").write_text(json.dumps(PEOPLE))
        yield out


@pytest.fixture
def book(filled):
    from nbgrader.api import Gradebook

    with pytest.MonkeyPatch.context() as patch:
        for name, value in paths().items():
            patch.setenv(name, value)
        with Gradebook(f"sqlite:///{filled / 'gradebook.db'}") as book:
            yield book


def rows(text):
    return list(csv.reader(io.StringIO(text)))


def test_canvas(book):
    head, points, *students = rows(canvas(book, PEOPLE, assignments={"02_lora": "LoRA (4711)"}))
    assert head == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "00_start", "LoRA (4711)"]
    assert points == ["    Points Possible", "", "", "", "", "5.5", "5.5"]
    assert {row[0]: row[1:] for row in students} == {
        "'=HYPERLINK(1), Alice": ["", "", "alice", "", "", "3"],
        "doejane": ["12345", "", "", "", "", "2.25"],
        "Müller, Jörg": ["", "", "Jörg Müller", "", "", "0"],
        "late": ["", "", "late", "", "", "0"],
        "nobody": ["", "", "nobody", "", "", ""],
    }


def test_canvas_of_one_chapter_and_some_students(book):
    head, _, *students = rows(canvas(book, PEOPLE, ["02_lora"], students=["alice"]))
    assert head[5:] == ["02_lora"] and [row[3] for row in students] == ["alice"]


def test_moodle(book):
    head, *students = rows(moodle(book, "02_lora", PEOPLE))
    assert head == ["Identifier", "Full name", "Email address", "Grade", "Feedback comments"]
    found = {row[1]: row for row in students}
    assert found["Jörg Müller"] == [
        "Participant 11",
        "Jörg Müller",
        "jm@example.org",
        "0",
        "lora-a: 0 of 3<br>lora-b: 0 of 2.5<br>=1+1 &lt;script&gt;alert(1)&lt;/script&gt;",
    ]
    assert found["Alice =HYPERLINK(1)"][0] == "" and found["Alice =HYPERLINK(1)"][2] == "'+alice@example.org"
    assert found["nobody"] == ["", "nobody", "", "", ""]
    assert {row[1]: row[0] for row in rows(moodle(book, "00_start", PEOPLE))[1:]}["Jörg Müller"] == "Participant 95"


def test_a_penalty_takes_no_more_than_there_is(book):
    assert score(book, "02_lora", "late") == 0.0 and score(book, "00_start", "late") is None


@pytest.mark.parametrize(
    "text",
    [
        "=cmd|' /C calc'!A0",
        "+1",
        "-1+1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        " =1",
        "\u00a0=1",
        "＝1+1",
        "|x",
        "'=1",
        '"=1',
        "%0A=1",
        "\x00=1",
        "\u200b=1",
    ],
)
def test_no_cell_is_a_formula(text):
    assert harmless(text).startswith("'")


@pytest.mark.parametrize("text", ["Jane Doe", "O'Neill", "jane@example.org", "", None, "5", "a=b", "Anna-Lena"])
def test_ordinary_cells_stay(text):
    assert harmless(text) == (text or "")


def test_numbers():
    assert [number(v) for v in (0, 3.0, 2.25, 1 / 3, 1234567.5, None, 10)] == [
        "0",
        "3",
        "2.25",
        "0.3333",
        "1234567.5",
        "",
        "10",
    ]


def test_both_are_written_beside_the_gradebook(book, filled):
    made = write_exports(book, filled)
    assert [path.name for path in made] == [
        "grades-canvas.csv",
        "grades-moodle-00_start.csv",
        "grades-moodle-02_lora.csv",
    ]
    assert b"Participant 11" in made[2].read_bytes() and made[0].read_bytes().count(b"\r\n") == 7
    assert not list(filled.glob("*.new"))


def test_as_plugins_of_nbgraders_command(filled, tmp_path):
    def export(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "nbgrader", "export", f"--db=sqlite:///{filled / 'gradebook.db'}", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, **paths()},
        )
        assert done.returncode == 0, done.stderr[-2000:]

    export()
    assert "student_id" in (tmp_path / "grades.csv").read_text()
    export("--exporter=pefttools.grading.exports.CanvasExport", "--to=c.csv")
    assert "doejane,12345" in (tmp_path / "c.csv").read_text()
    export("--exporter=pefttools.grading.exports.MoodleExport", "--assignment=['02_lora']")
    assert "Participant 11" in (tmp_path / "grades-moodle-02_lora.csv").read_text() and not list(
        tmp_path.glob("*00_start*")
    )
