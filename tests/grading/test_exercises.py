"""Every exercise and question of the course, held to what an exercise promises.

The reference and every alternative get all points, every known mistake fails with its own message, a blank stub is "not
written yet"; for several seeds, because grading draws its own.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pefttools.grading import exercises as registry
from pefttools.grading.check import verdict_on
from pefttools.grading.exercise import Exercise
from pefttools.grading.judge import compare, judge
from pefttools.grading.plain import plain
from pefttools.grading.probe import Outcome, Raised, probe_all
from pefttools.grading.question import Question

SEEDS = (20, 1, 987_654_321)  # the notebooks' own first
JARGON = ("AssertionError", "assert ", "Traceback", "TODO", "FIXME", "XXX", "lorem")

# Looked at while tests are collected: a broken module must fail a test of its own and not hide the others' tests.
registry._load()
TASKS: list[Exercise] = [task for name in sorted(registry._loaded) for task in registry.tasks(name)]
WRITTEN = [task for task in TASKS if not isinstance(task, Question)]
QUESTIONS = [task for task in TASKS if isinstance(task, Question)]
MISTAKES = [(task, name) for task in TASKS for name in task.mistakes]
ALTERNATIVES = [(task, name) for task in TASKS for name in task.alternatives]


def ids(value) -> str | None:
    return value.name if isinstance(value, Exercise) else value if isinstance(value, str) else None


def verdict_for(task: Exercise, work, seed: int):
    return verdict_on(task, task.resolve(work), seed)


def test_every_module_of_exercises_can_be_used():
    assert registry._failed == {}


@pytest.mark.parametrize("task", TASKS, ids=ids)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_gets_all_points(task, seed):
    verdict = verdict_for(task, task.reference, seed)
    assert verdict.passed and verdict.points == task.points, verdict.text


@pytest.mark.parametrize(("task", "name"), ALTERNATIVES, ids=ids)
def test_every_alternative_gets_all_points(task, name):
    for seed in SEEDS:
        verdict = verdict_for(task, task.alternatives[name], seed)
        assert verdict.passed and verdict.points == task.points, f"seed {seed}: {verdict.text}"


@pytest.mark.parametrize(("task", "name"), MISTAKES, ids=ids)
def test_every_mistake_fails_with_its_own_message(task, name):
    work, message = task.mistakes[name]
    for seed in SEEDS:
        verdict = verdict_for(task, work, seed)
        assert not verdict.passed and verdict.points == 0, f"seed {seed}: the cases do not tell it from right work"
        assert verdict.kind != "blank", f"seed {seed}: taken for a stub"
        assert verdict.mistake == name, f"seed {seed}: taken for {verdict.mistake!r}; {verdict.text}"
        assert verdict.message.startswith(message.strip())


@pytest.mark.parametrize(("task", "name"), MISTAKES, ids=ids)
def test_messages_are_for_students(task, name):
    message = task.mistakes[name][1]
    assert len(message.strip()) >= 20
    assert not [word for word in JARGON if word in message]
    # A line break ends a paragraph in the box: half a sentence must not stand alone.
    assert all(
        line.strip().endswith((".", "?", "!", ":", ")", "`", "»", "”")) or line.startswith("    ")
        for line in message.strip().splitlines()
    ), message


@pytest.mark.parametrize("task", TASKS, ids=ids)
def test_messages_of_one_exercise_differ(task):
    messages = [message for _, message in task.mistakes.values()]
    assert len(set(messages)) == len(messages)


@pytest.mark.parametrize("task", TASKS, ids=ids)
def test_a_blank_is_not_written_yet(task):
    def stub(*args, **kwargs):
        raise NotImplementedError(f"{task.name}: not written yet")

    class Stub(torch.nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            raise NotImplementedError(f"{task.name}: not written yet")

    blanks = [None, ...]
    blanks += [stub] if task.accepts in ("function", "class") else []
    blanks += [Stub] if task.accepts == "class" else []
    for blank in blanks:
        verdict = verdict_for(task, blank, SEEDS[0])
        assert (verdict.kind, verdict.points, verdict.passed) == ("blank", 0, False), f"{blank}: {verdict.text}"
        assert "Not written yet" in verdict.message and verdict.mistake is None


@pytest.mark.parametrize("task", TASKS, ids=ids)
@pytest.mark.parametrize(
    "work",
    [
        lambda *args, **kwargs: None,
        lambda *args, **kwargs: 0,
        lambda *args, **kwargs: "yes",
        lambda *args, **kwargs: [],
        lambda: None,
        int,
        torch.nn.Identity,
        17,
        "nothing",
        object(),
        0.0,
        {},
        torch.zeros(3),
        float("nan"),
    ],
    ids=[
        "None",
        "0",
        "text",
        "list",
        "no arguments",
        "int",
        "Identity",
        "17",
        "a text",
        "object",
        "0.0",
        "dict",
        "tensor",
        "nan",
    ],
)
def test_nonsense_gets_no_points_and_a_message(task, work):
    verdict = verdict_for(task, work, SEEDS[0])
    assert not verdict.passed and verdict.points == 0
    assert len(verdict.message) > 20 and verdict.kind != "blank"


@pytest.mark.parametrize("task", WRITTEN, ids=ids)
def test_there_are_enough_mistakes_and_alternatives(task):
    mistakes, alternatives = (5, 2) if task.difficulty >= 2 else (3, 1)
    assert len(task.mistakes) >= mistakes
    assert len(task.alternatives) >= alternatives


@pytest.mark.parametrize("task", TASKS, ids=ids)
def test_inputs_depend_on_the_seed_alone(task):
    for seed in SEEDS:
        assert compare(task.cases(seed), task.cases(seed), 0, 0) is None
    torch.manual_seed(1)
    before = task.cases(3)
    torch.manual_seed(2)
    assert compare(task.cases(3), before, 0, 0) is None, "inputs must draw from the generator they are given"


@pytest.mark.parametrize("task", WRITTEN, ids=ids)
def test_cases_are_small_plain_data(task):
    from pefttools.grading.plain import NotPlain

    def walk(value):
        if isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item)
        else:
            yield value

    for case in task.cases(SEEDS[0]):
        for leaf in walk(plain(case)):
            assert not isinstance(
                leaf, NotPlain
            ), f"a case must be plain data, for it travels to another process: {leaf}"
            assert not isinstance(leaf, torch.Tensor) or leaf.numel() <= 2**20


@pytest.mark.parametrize("task", TASKS, ids=ids)
def test_probing_twice_gives_the_same(task):
    cases = task.cases(SEEDS[0])
    work = task.resolve(task.reference)
    torch.manual_seed(5)
    first = probe_all(task, work, cases)
    torch.manual_seed(6)
    second = probe_all(task, work, cases)
    for x, y in zip(first, second):
        assert x.raised is None and compare(x.data, y.data, 0, 0) is None
    assert compare(cases, task.cases(SEEDS[0]), 0, 0) is None, "a probe must leave its caller's cases alone"


@pytest.mark.parametrize("task", WRITTEN, ids=ids)
def test_every_leaf_counts(task):
    """A result that lacks any one leaf, or in which one leaf is None, does not pass: nothing in it is decoration."""
    cases = task.cases(SEEDS[0])
    right = probe_all(task, task.resolve(task.reference), cases)
    task = replace(task, mistakes={})  # to be quick: which mistake it looks like is not asked here
    for index, outcome in enumerate(right):
        if type(outcome.data) is not dict:
            continue
        for leaf in outcome.data:
            for damaged in (
                {key: value for key, value in outcome.data.items() if key != leaf},
                {**outcome.data, leaf: object()},
            ):
                outcomes = [*right[:index], Outcome(damaged), *right[index + 1 :]]
                assert not judge(task, outcomes, cases, SEEDS[0]).passed


@pytest.mark.parametrize("task", WRITTEN, ids=ids)
def test_raising_is_not_an_answer(task):
    cases = task.cases(SEEDS[0])
    outcomes = [Outcome(None, Raised("ValueError", "a reason"))] * len(cases)
    verdict = judge(task, outcomes, cases, SEEDS[0])
    assert verdict.kind == "raised" and not verdict.passed


@pytest.mark.parametrize("task", TASKS, ids=ids)
def test_verdicts_are_text_that_fits_json(task):
    import json

    for work in (task.reference, *(work for work, _ in list(task.mistakes.values())[:3])):
        verdict = verdict_for(task, work, SEEDS[0])
        json.dumps(verdict.to_dict())
        assert verdict.headline in verdict.text
        assert "<script" not in verdict.html and "http" not in verdict.html


@pytest.mark.parametrize("question", QUESTIONS, ids=ids)
def test_questions(question):
    assert len(question.text.strip()) >= 20
    lengths = [len(option) for option, _ in question.options.values()]
    assert min(lengths) >= 1
    for key, (option, why) in question.options.items():
        assert len(why.strip()) >= 20, f"{key} does not explain itself"
        verdict = verdict_for(question, key, SEEDS[0])
        assert verdict.passed == (key == question.right)
        if key != question.right:
            assert verdict.expected is None and f"{question.right!r}" not in verdict.text, "it gives the answer away"


def test_right_answers_are_spread_over_the_letters():
    for chapter in sorted(registry._loaded):
        letters = [question.right for question in registry.questions(chapter)]
        if len(letters) >= 4:
            assert max(letters.count(letter) for letter in letters) <= (len(letters) + 1) // 2, f"{chapter}: {letters}"


def test_names_are_unique_and_found():
    names = [task.name for task in TASKS]
    assert len(set(names)) == len(names)
    for task in TASKS:
        assert registry.exercise(task.name) is task
    assert sorted(registry._loaded) == registry.chapters()


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(KeyError, match="no exercise 'zz-no-such-thing'"):
        registry.exercise("zz-no-such-thing")
    if "lora-forward" in {task.name for task in TASKS}:
        with pytest.raises(KeyError, match="Did you mean 'lora-forward'"):
            registry.exercise("lora-foward")


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in ("peft", "transformers", "bitsandbytes", "datasets", "safetensors", "ipywidgets", "matplotlib") \\
                or name.startswith(("pefttools.lora", "pefttools.inject", "pefttools.checkpoint", "pefttools.lab.")) \\
                and not name.startswith("pefttools.lab.tasks"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Blocker())
from pefttools.grading import exercises
print(len(exercises.chapters()), sum(len(task.cases(1)) > 0 for task in exercises.tasks()))
"""


def test_modules_import_with_torch_alone():
    """A check in a notebook needs no more, and nothing here leans on what a chapter hides.

    What draws rows of the data is there (`lab.tasks`, which needs Python alone): an artefact is judged on fresh ones.
    """
    run = subprocess.run([sys.executable, "-c", BLOCKER], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(len(registry._loaded)), str(len(TASKS))]


def test_the_table_of_exercises():
    from pefttools.grading.exercises.__main__ import table

    text = table()
    assert all(task.name in text for task in TASKS)


def test_the_page_of_exercises_is_what_the_registry_says():
    from pefttools.grading.exercises.__main__ import page

    kept = Path(__file__).parents[2] / "docs" / "exercises.md"
    assert kept.read_text(encoding="utf-8") == page(), \
        "make it anew: python -m pefttools.grading.exercises --to docs/exercises.md"
