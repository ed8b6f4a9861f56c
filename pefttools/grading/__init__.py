"""Exercises, their checks and their grades.

    from pefttools.grading import check, ask
    check("lora-forward", lora_forward)          # green or red, with what to look at next
    ask("lora-q-scale")                          # a question with its explanations; never graded
    grade("hand-ins", "02_lora")                 # a class: what `pefttools grade` does

An exercise is inputs, a probe, a reference and its known mistakes (`exercise.py`); its answers are compared leaf by
leaf (`compare.py`), and judged (`judge.py`). Importing this package imports neither torch nor any chapter.
"""

from __future__ import annotations

from typing import Any

# `check` is the function from here on; the module of that name stays reachable as `pefttools.grading.check` in imports
# of the form `from pefttools.grading.check import ...`.
from pefttools.grading.check import case, check
from pefttools.grading.exercise import Exercise, ExerciseError
from pefttools.grading.question import Question, ask

__all__ = ["Exercise", "ExerciseError", "Question", "ask", "case", "check", "grade"]


def __getattr__(name: str) -> Any:
    if name == "grade":  # brings nbgrader, which students' notebooks do without
        from pefttools.grading.entrance import grade

        return grade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
