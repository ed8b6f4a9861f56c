"""The verdict on what a work gave, and the name of the mistake it made. No student code runs here.

The complaint shown is the first of: not written yet, raised, then what `compare` puts first over all cases. If the
work's answers are those of a known mistake, its message comes before the complaint.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from pefttools.grading.compare import Difference, compare, differences
from pefttools.grading.exercise import Exercise, ExerciseError
from pefttools.grading.plain import NotPlain, plain
from pefttools.grading.probe import Outcome, Raised, probe_all
from pefttools.grading.room import settled
from pefttools.grading.verdict import Verdict
from pefttools.grading.words import describe_case

__all__ = ["Difference", "compare", "judge", "not_written"]

Answers = Callable[[str, str], list[Outcome]]


def judge(exercise: Exercise, outcomes: list[Outcome], cases: list[dict], seed: int | None = None) -> Verdict:
    """The verdict on what a work gave (`probe_all`) on `cases`, which are those of `exercise.cases(seed)`.

    With a seed, the answers of the reference and of the mistakes are kept for the next work judged on the same seed;
    without one they are computed from `cases` at every call.

    Raises:
        ExerciseError: if the reference fails, that is, the exercise is broken.
    """
    def answers(kind: str, name: str = "") -> list[Outcome]:
        if seed is not None:
            return list(_answers(exercise, kind, name, seed))
        return _read(exercise, probe_all(exercise, _work(exercise, kind, name), cases), cases)

    outcomes = _read(exercise, outcomes, cases)
    total = len(cases)
    expected = answers("reference")
    for number, outcome in enumerate(expected):
        if outcome.raised is not None:
            raise ExerciseError(f"exercise {exercise.name!r} is broken: its reference raises {outcome.raised.type}: "
                                f"{outcome.raised.message} in {describe_case(cases[number], number, total)}")

    for outcome in outcomes:
        if outcome.raised is not None and outcome.raised.unwritten is not None:
            return not_written(exercise, seed, outcome.raised.unwritten)
        if outcome.raised is None and _blank(outcome.data):
            return not_written(exercise, seed)

    number, found = _first_complaint(exercise, outcomes, expected)
    if found is None:
        return Verdict.of(exercise, "passed", exercise.praise or _agreement(exercise, total), seed=seed)
    outcomes = [Outcome(plain(outcome.data), outcome.raised, outcome.printed) for outcome in outcomes]
    mistake = _find_mistake(exercise, outcomes, expected, found, answers)
    message = exercise.mistakes[mistake][1].strip() if mistake is not None else ""
    more: dict[str, Any] = {"case_number": number, "mistake": mistake, "seed": seed}
    if total > 1 or cases[number]:
        more["case"] = describe_case(cases[number], number, total)
    if number < len(outcomes):
        more["printed"] = outcomes[number].printed
    if isinstance(found, Raised):
        more |= {"got": f"{found.type}: {found.message}", "place": found.place, "line": found.line}
        return Verdict.of(exercise, "raised", f"{message}\n{_raised_text(found)}".strip(), **more)
    if not exercise.reveals:
        complaint = message or exercise.complaint(found.got)
        return Verdict.of(exercise, found.stage, complaint, leaf=found.leaf, got=found.got, mistake=mistake, seed=seed)
    more |= {"leaf": found.leaf, "expected": found.expected, "got": found.got}
    return Verdict.of(exercise, found.stage, f"{message}\n{found.message}".strip(), **more)


def _first_complaint(
    exercise: Exercise, outcomes: list[Outcome], expected: list[Outcome]
) -> tuple[int, Raised | Difference | None]:
    """What to say first, over all cases, and of which case: an exception, else the difference of the lowest rank."""
    for number in range(len(expected)):
        if number >= len(outcomes):
            return number, Raised("no answer", "the run ended before this case")
        if outcomes[number].raised is not None:
            return number, outcomes[number].raised
    first: tuple[int, Difference | None] = (0, None)
    for number, (ours, theirs) in enumerate(zip(outcomes, expected)):
        difference = compare(ours.data, theirs.data, exercise.rtol, exercise.atol)
        if difference is not None and (first[1] is None or difference.rank < first[1].rank):
            first = number, difference
    return first


def not_written(exercise: Exercise, seed: int | None = None, other: str | None = None) -> Verdict:
    """The verdict on a stub; `other` is a further exercise's name, where the stub reached is that one's."""
    message = "Not written yet: replace the stub in the cell above, run it, then run this cell again."
    if other not in (None, "", exercise.name):
        message = f"Not written yet: this calls your `{other}`, which is still a stub. Write that one first."
    return Verdict.of(exercise, "blank", message, seed=seed)


def _blank(data: Any) -> bool:
    """Whether nothing but `...` was given: as the result, or in every leaf of it."""
    if type(data) is dict:
        data = list(data.values())
    if type(data) in (list, tuple):
        return len(data) > 0 and all(_blank(item) for item in data)
    return data is ...


def _agreement(exercise: Exercise, total: int) -> str:
    cases = "one case" if total == 1 else f"{total} cases"
    return f"Equal to the reference on {cases} (to a relative {exercise.rtol:g} where numbers are rounded)."


def _raised_text(raised: Raised) -> str:
    error = f"{raised.type}: {raised.message}" if raised.message else raised.type
    if raised.place is not None:
        return f"Your code raised {error}\nat {raised.place}" + (f":\n    {raised.line}" if raised.line else ".")
    hint = "Compare the names and the order of the arguments with the text of the exercise, and what is to be returned."
    if "NoneType" in raised.message:
        hint = "Something that should have a value is None: a function without `return` gives None."
    return f"The check could not work with it: {error}\n{hint}"


def _work(exercise: Exercise, kind: str, name: str) -> Any:
    return exercise.resolve(exercise.reference if kind == "reference" else exercise.mistakes[name][0])


@functools.lru_cache(maxsize=512)
def _answers(exercise: Exercise, kind: str, name: str, seed: int) -> tuple[Outcome, ...]:
    cases = exercise.cases(seed)
    return tuple(_read(exercise, probe_all(exercise, _work(exercise, kind, name), cases), cases))


def _read(exercise: Exercise, outcomes: list[Outcome], cases: list[dict]) -> list[Outcome]:
    """The outcomes with `exercise.reading` of their data. It may be given anything: what it raises is the outcome."""
    if exercise.reading is None:
        return outcomes
    found = []
    for outcome, case in zip(outcomes, cases):
        if outcome.raised is None and not _blank(outcome.data):
            try:
                with settled(0):
                    outcome = Outcome(plain(exercise.reading(outcome.data, case)), None, outcome.printed)
            except Exception as error:
                outcome = Outcome(None, Raised(type(error).__name__, str(error)[:600]), outcome.printed)
        found.append(outcome)
    return found


def prepare(exercise: Exercise, seed: int) -> None:
    """Compute what `judge` will compare with on this seed, so that it is there when the work's answers come."""
    _answers(exercise, "reference", "", seed)


def _find_mistake(
    exercise: Exercise, ours: list[Outcome], expected: list[Outcome], found: Raised | Difference, answers: Answers
) -> str | None:
    """The mistake whose answers the work's equal on all cases; else the only one that explains the complaint."""
    if len(ours) != len(expected):
        return None
    explaining = []
    rtol, atol = exercise.rtol, exercise.atol
    for name in exercise.mistakes:
        theirs = answers("mistakes", name)
        if all(_same(x, y, rtol, atol) for x, y in zip(theirs, expected)):
            continue  # the cases do not tell this mistake from right work: nobody can be told that it is theirs
        if all(_same(x, y, rtol, atol) for x, y in zip(ours, theirs)):
            return name
        if isinstance(found, Difference) and _explains(ours, theirs, expected, found.leaf, rtol, atol):
            explaining.append(name)
    return explaining[0] if len(explaining) == 1 else None


def _same(ours: Outcome, theirs: Outcome, rtol: float, atol: float) -> bool:
    if ours.raised is not None or theirs.raised is not None:
        return ours.raised is not None and theirs.raised is not None and _same_error(ours.raised, theirs.raised)
    return not _differ(ours.data, theirs.data, rtol, atol)


def _differ(got: Any, expected: Any, rtol: float, atol: float) -> bool:
    if type(got) is NotPlain and type(expected) is NotPlain:
        return got != expected
    try:
        return next(differences(got, expected, rtol, atol), None) is not None
    except ExerciseError:  # a mistake may give what is not plain; then only the very same matches
        return True


def _same_error(ours: Raised, theirs: Raised) -> bool:
    if ours.type != theirs.type:
        return False
    x, y = (re.sub(r"[0-9]+", "#", raised.message) for raised in (ours, theirs))
    return x == y or difflib.SequenceMatcher(None, x, y).ratio() >= 0.8


def _leaves(data: Any) -> dict[str, Any]:
    """The top-level entries of a result: the leaves by which mistakes are told apart."""
    return {str(key): value for key, value in data.items()} if type(data) is dict else {"": data}


def _explains(
    ours: list[Outcome], theirs: list[Outcome], expected: list[Outcome], leaf: str, rtol: float, atol: float
) -> bool:
    """Whether the work is wrong in the mistake's way, on all cases, in every leaf it touches, `leaf` among them.

    The work may be wrong elsewhere too. Only leaves with tensors or numbers tell: two works that both lack a True need
    not lack it for one reason.
    """
    if any(outcome.raised is not None for outcome in (*ours, *theirs)):
        return False
    cases = [tuple(_leaves(outcome.data) for outcome in case) for case in zip(ours, theirs, expected)]
    if any(x.keys() != right.keys() or y.keys() != right.keys() for x, y, right in cases):
        return False
    touched = {name for _, y, right in cases for name in right if _differ(y[name], right[name], rtol, atol)}
    pairs = [(x[name], y[name]) for x, y, _ in cases for name in touched & y.keys()]
    about = any(name in ("", leaf) or leaf.startswith((f"{name} / ", f"{name}[")) for name in touched)
    telling = any(type(theirs) in (torch.Tensor, float, list, tuple) for _, theirs in pairs)
    return about and telling and not any(_differ(x, y, rtol, atol) for x, y in pairs)
