"""What a run says at its end: complete, and safe to open whatever was handed in."""

from __future__ import annotations

import csv
import io
import re

from pefttools.grading.classroom import Result
from pefttools.grading.report import COLUMNS, page, rows, summary, table, write_reports

GOOD = Result("alice", "01_tiny", "in/alice.ipynb", "graded", 6.5, 7, 1.25, ["Mended."], seed=5)
BAD = Result("bob", "", "in/bob.ipynb", "failed", problem="bob.ipynb is empty.")
LIMIT = Result("eve", "01_tiny", "in/eve.ipynb", "unchanged", 2, 7, 9.0, limits=["tiny-box: it ran for 300 seconds"])
UNSAFE = Result("zoe", "01_tiny", "in/zoe.ipynb", "graded", 7, 7, 1.0, sandbox=False)
NASTY = '<script>alert(1)</script>\x1b[2J\n=cmd|"/c calc"!A1'


def test_table_is_readable():
    text = table([GOOD, BAD])
    assert "alice    01_tiny    6.5   7      1.2  graded\n    Mended." in text
    assert "bob      ?            –   0      0.0  failed\n    bob.ipynb is empty." in text
    assert text.endswith("2 hand-ins, 1 graded, 1 could not be")


def test_limits_and_a_missing_sandbox_are_said():
    text = table([LIMIT, UNSAFE])
    assert "    Limit: tiny-box: it ran for 300 seconds" in text
    assert re.search(r"WARNING: 1 of these were graded WITHOUT a sandbox \(--unsafe-no-sandbox\)", text)
    assert "WITHOUT" not in table([GOOD, LIMIT])


def test_the_page_has_everything_and_links_feedback(tmp_path):
    with_page = Result("ana", "01_tiny", "x", "graded", 7, 7, feedback=str(tmp_path / "feedback" / "a b" / "tiny.html"))
    shown = page(tmp_path, [GOOD, BAD, LIMIT, UNSAFE, with_page], {"seed": 5})
    for text in ("alice", "Mended.", "bob.ipynb is empty.", "it ran for 300 seconds", "seed: 5", "6.5", summary([GOOD])[:1]):
        assert text in shown
    assert 'href="feedback/a%20b/tiny.html"' in shown
    assert "1 of these were graded WITHOUT a sandbox" in shown
    assert "WITHOUT" not in page(tmp_path, [GOOD], {})


def test_nothing_on_the_page_or_in_the_csv_acts(tmp_path):
    nasty = Result(NASTY, "01_tiny", NASTY, "failed", problem=NASTY, repairs=[NASTY], limits=[NASTY])
    shown = page(tmp_path, [nasty], {NASTY: NASTY})
    assert "<script" not in shown and "default-src 'none'" in shown
    assert "\x1b" not in table([nasty])
    for row in csv.reader(io.StringIO(rows([Result("=1+1", "01_tiny", "@x", "failed", problem="-2+3", repairs=["+x"])]))):
        assert not any(cell[:1] in "=+-@" for cell in row if cell)


def test_the_csv_reads_back(tmp_path):
    write_reports(tmp_path, [GOOD, BAD, UNSAFE], {})
    with (tmp_path / "report.csv").open(newline="") as file:
        alice, bob, zoe = csv.DictReader(file)
    assert tuple(alice) == COLUMNS
    assert (alice["score"], alice["max_score"], alice["repairs"], alice["sandbox"], alice["seed"]) == ("6.5", "7", "Mended.", "yes", "5")
    assert (bob["score"], bob["problem"], zoe["sandbox"]) == ("", "bob.ipynb is empty.", "NO")
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
