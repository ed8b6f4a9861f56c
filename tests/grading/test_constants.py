"""No exercise can be passed by constants: what is right depends on inputs that are drawn when it is graded.

In the sandbox a student's process can send anything. It can read this repository, and so send whatever is right for
every seed; what it cannot do is know the seed. `python tests/grading/test_constants.py` prints the table.
"""

from __future__ import annotations

import pytest
import torch

from pefttools.grading.exercises import exercises
from pefttools.grading.judge import judge
from pefttools.grading.probe import Outcome, probe_all

SEEDS = range(1, 7)


def leaves(data, path=()):
    if type(data) is dict:
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    elif type(data) in (list, tuple):
        yield (*path, "length"), len(data)
        for index, value in enumerate(data):
            yield from leaves(value, (*path, index))
    else:
        yield path, data


def same(a, b):
    if type(a) is torch.Tensor and type(b) is torch.Tensor:
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def right_answers(task, seed):
    return probe_all(task, task.resolve(task.reference), task.cases(seed))


def fixed_and_drawn(task):
    """({leaves with one right value for every seed}, {the others}), as "case 1: output"."""
    runs = [[dict(leaves(outcome.data)) for outcome in right_answers(task, seed)] for seed in SEEDS]
    fixed, drawn = set(), set()
    for number in range(max(map(len, runs))):
        cases = [run[number] if number < len(run) else {} for run in runs]
        for path in set().union(*cases):
            into = fixed if all(path in case and same(case[path], cases[0][path]) for case in cases) else drawn
            into.add(f"case {number + 1}: {' / '.join(map(str, path))}")
    return fixed, drawn


every_exercise = pytest.mark.parametrize("task", exercises(), ids=lambda task: task.name)


@every_exercise
def test_some_leaf_depends_on_the_seed(task):
    fixed, drawn = fixed_and_drawn(task)
    assert drawn, f"every leaf of {task.name} is right whatever is drawn: {sorted(fixed)[:5]} …"


@every_exercise
def test_right_answers_of_another_seed_do_not_pass(task):
    """Recorded in an honest run and sent again."""
    for ours, theirs in ((31, 32), (33, 34), (35, 36)):
        recorded = [Outcome(outcome.data) for outcome in right_answers(task, ours)]
        assert not judge(task, recorded, task.cases(theirs), theirs).passed


WITH_READING = [task for task in exercises() if task.reading is not None]


@pytest.mark.parametrize("task", WITH_READING, ids=lambda task: task.name)
def test_a_property_is_not_taken_from_the_students_process(task):
    """Where the leaves are properties, with one right value for every input, a `reading` makes them at the grader's."""
    cases = task.cases(41)
    stated = [Outcome(task.reading(outcome.data, case)) for outcome, case in zip(right_answers(task, 41), cases)]
    assert not judge(task, stated, cases, 41).passed


if __name__ == "__main__":
    for entry in exercises():
        one, many = fixed_and_drawn(entry)
        print(f"{entry.name}: {len(many)} leaves depend on the seed, {len(one)} do not:")
        print("    " + "\n    ".join(sorted({name.partition(": ")[2] for name in one})[:12]))
