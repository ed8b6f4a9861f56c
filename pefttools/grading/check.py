"""`check`: the call under every exercise.

    check("lora-forward", lora_forward)

In a notebook the result shows as a box; its text/plain is the points as a number, which nbgrader reads as the score of
the cell. Elsewhere the message is printed. This module imports torch only when something is checked.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pefttools.grading.exercise import Exercise
from pefttools.grading.room import in_notebook, settled

if TYPE_CHECKING:
    from pefttools.grading.verdict import Verdict

# Notebooks always check on the same inputs, so that a message stays the same while one looks for its cause. Grading
# passes a seed of its own: work that fits only these inputs fails there.
NOTEBOOK_SEED = 20

_points: dict[str, tuple[str, int]] = {}  # exercise -> (chapter, points) of this process, for the line on progress


def check(exercise: str | Exercise, work: Any, seed: int = NOTEBOOK_SEED) -> Verdict:
    """Check `work` (your function, class or value) against an exercise; the verdict shows itself.

    Args:
        exercise: the exercise's name, as in the text above its cell (or an `Exercise`).
        work: your work itself: `lora_forward`, not `lora_forward(x)`.
        seed: which inputs are drawn. In notebooks the default stays; grading draws its own.

    Raises:
        KeyError: if there is no exercise of this name; the nearest names are in the message.
        ExerciseError: if the exercise itself is broken.
    """
    if not isinstance(exercise, Exercise):
        from pefttools.grading.exercises import exercise as find

        exercise = find(exercise)
    verdict = with_progress(verdict_on(exercise, work, seed))
    if not in_notebook():
        print(verdict.text)
    return verdict


def verdict_on(exercise: Exercise, work: Any, seed: int = NOTEBOOK_SEED) -> Verdict:
    """The verdict, without printing anything and without counting it as progress."""
    from pefttools.grading.judge import judge, not_written
    from pefttools.grading.probe import probe_all
    from pefttools.grading.verdict import Verdict

    if work is None or work is ...:
        return not_written(exercise, seed)
    complaint = _unfit(exercise, work)
    if complaint is not None:
        return Verdict.of(exercise, "work", complaint, seed=seed)
    with settled(0):
        cases = exercise.cases(seed)
        return judge(exercise, probe_all(exercise, work, cases), cases, seed)


def case(exercise: str | Exercise, number: int = 1, seed: int = NOTEBOOK_SEED) -> dict:
    """The inputs of one case as `check` makes them, counted from 1 as its message does; to try one's work by hand."""
    if not isinstance(exercise, Exercise):
        from pefttools.grading.exercises import exercise as find

        exercise = find(exercise)
    cases = exercise.cases(seed)
    if type(number) is not int or not 1 <= number <= len(cases):
        raise ValueError(f"number is {number!r}; {exercise.name!r} has the cases 1 to {len(cases)}")
    return cases[number - 1]


def _unfit(exercise: Exercise, work: Any) -> str | None:
    """What to say where `work` cannot be a work of this exercise at all; None where it may be."""
    from pefttools.grading.plain import type_name

    if exercise.accepts in ("function", "class") and not _callable(work):
        thing = exercise.accepts
        return (
            f"The check wants your {thing} itself; it was given {type_name(work)}. "
            f"Write the name of the {thing} without brackets after it."
        )
    if exercise.accepts in ("folder", "artefact") and not isinstance(work, (str, os.PathLike)):
        return f"The check wants the path of your folder; it was given {type_name(work)}."
    return None


def _callable(work: Any) -> bool:
    try:
        return callable(work)
    except Exception:
        return False


def with_progress(verdict: Verdict) -> Verdict:
    """The verdict with the line on the chapter's progress: "02 LoRA: 3 of 11 done, 7 of 24 points"."""
    from dataclasses import replace

    from pefttools.grading.exercises import RegistryError, tasks, title

    _points[verdict.exercise] = (verdict.chapter, verdict.points if verdict.passed else 0)
    try:
        all_of_it = tasks(verdict.chapter)
    except RegistryError:  # a broken module elsewhere must not take the verdict away
        return verdict
    if verdict.exercise not in {task.name for task in all_of_it}:
        return verdict
    points = {task.name: _points[task.name][1] for task in all_of_it if task.name in _points}
    done = sum(1 for value in points.values() if value > 0)
    progress = (
        f"{title(verdict.chapter)}: {done} of {len(all_of_it)} done, {sum(points.values())} of "
        f"{sum(task.points for task in all_of_it)} points"
    )
    return replace(verdict, progress=progress)


def reset_progress() -> None:
    """Forget which exercises were passed in this process."""
    _points.clear()
