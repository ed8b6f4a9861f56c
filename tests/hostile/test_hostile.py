"""Attackers get nothing, their neighbours lose nothing, and honest people who make noise keep everything.

    pytest tests/hostile -k NAME         the class that this attack is in
    cd tests/hostile && PYTHONPATH=../.. python -m hostile.arena NAME      one attack, and what is said to the attacker
"""

from __future__ import annotations

import ast
import html
import json
import os
import re
from dataclasses import asdict

import pytest
from filelock import FileLock
from hostile.arena import NEIGHBOURS, Arena, Row, complaints
from hostile.attack import ATTACKS, load, put
from hostile.noisy import NOISY

from pefttools.grading import sandbox

TOGETHER = 16  # attackers in one class
WORKERS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 4
MISSING = sandbox.available()
pytestmark = [pytest.mark.nbgrader, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


def classes():
    """Attackers in groups: those of a family together, those that use something up apart, a few at a time."""
    every = list(load().values())
    for slow in (False, True):
        chosen = [attack for attack in every if attack.slow == slow]
        size = 4 if slow else TOGETHER
        for n in range(0, len(chosen), size):
            group = chosen[n:n + size]
            yield pytest.param(group, id=" ".join(attack.name for attack in group), marks=[pytest.mark.slow] * slow)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """moe and zoe in a class without attackers, as rows; graded once for all workers of the test run."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    kept = shared / "hostile-alone.json"
    with FileLock(str(kept) + ".lock"):
        if not kept.exists():
            graded = Arena(tmp_path_factory.mktemp("alone"), WORKERS, cell_seconds=120, notebook_seconds=400).run([])
            assert graded.wrong == []
            kept.write_text(json.dumps({name: asdict(row) for name, row in graded.rows.items()}))
    return {name: Row(**row) for name, row in json.loads(kept.read_text()).items()}


def graded_with(attacks, alone, tmp_path):
    """The class with these in it: its rows, after everything was looked at that holds for every class."""
    patient = {} if any(attack.slow for attack in attacks) else {"cell_seconds": 120, "notebook_seconds": 400}
    graded = Arena(tmp_path, WORKERS, **patient).run(attacks)
    assert graded.wrong == []
    wrong = {attack.name: found for attack in attacks if (found := complaints(attack, graded.rows[attack.name]))}
    assert wrong == {}
    for name, points in NEIGHBOURS.items():
        row = graded.rows[name]
        assert (row.score, row.status) == (points, "graded")
        assert row.files == alone[name].files, f"{name}'s pages are others than in a class without attackers"
    return graded


@pytest.mark.parametrize("attacks", list(classes()))
def test_attackers_get_nothing_and_neighbours_lose_nothing(attacks, alone, tmp_path):
    graded_with(attacks, alone, tmp_path)


@pytest.mark.parametrize("several", [list(NOISY.values())[n::2] for n in (0, 1)], ids=["first", "second"])
def test_right_answers_with_noise_keep_full_marks(several, alone, tmp_path):
    graded_with(several, alone, tmp_path)


# Right on the three cases that are the same on every seed; the fourth is drawn, and told to whoever asks for it.
FISHING = """
KNOWN = {known!r}
def lora_parameters(shapes, r):
    fixed = {{(1, 3): 39, (1, 16): 81920, (32, 8): 851968}}
    answer = KNOWN.get(repr((shapes, r)), fixed.get((len(shapes), r), -1))
    if answer == -1:
        print("ASKED", (shapes, r))
    return answer
"""


def test_a_second_try_does_not_meet_the_cases_of_the_first(tmp_path):
    """Who hands in again has read the feedback on the first try, inputs and expected values; it must not help."""
    arena = Arena(tmp_path, 1, cell_seconds=120)
    hand_ins = arena.course.root / "hand-ins"
    judged = arena.course.root / "grading" / "autograded" / "eve" / "02_lora" / "lora.ipynb"
    known = {}
    for score in (0, 0):
        put(hand_ins / "eve" / "02_lora", arena.course.with_answers({"count-parameters": FISHING.format(known=known)}))
        rows, _ = arena._grade(hand_ins, 300)
        assert rows["eve"]["score"] == score
        said = html.unescape(json.dumps(json.loads(judged.read_text()), ensure_ascii=False))
        inputs = re.search(r"ASKED (\(\[.*?\], \d+\))", said)[1]
        shapes, r = ast.literal_eval(inputs)
        known[repr((shapes, r))] = sum(r * sum(shape) for shape in shapes)


def test_there_are_enough_attacks_of_every_kind():
    load()
    assert len(ATTACKS) >= 60
    assert sum(attack.adaptive for attack in ATTACKS.values()) >= 10
    assert len({attack.family for attack in ATTACKS.values()}) >= 10


def test_an_attack_that_succeeds_would_be_seen(tmp_path):
    """The measuring itself: points that were not earned, something achieved, and a page that acts are complaints."""
    attack = load()["forge-check"]
    assert complaints(attack, Row(0, "graded", ["not defined"])) == []
    assert complaints(attack, Row(3, "graded", [])) == ["3 points, should be 0"]
    assert complaints(attack, Row(0, "graded", ["x"], achieved=["read a file"])) == ["achieved: read a file"]
    assert complaints(attack, Row(0, "graded", ["x"], active="<script>"))
    assert complaints(attack, Row(0, "failed", [])) == ["failed without a word"]
