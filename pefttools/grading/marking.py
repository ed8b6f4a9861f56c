"""From what came out of the sandbox to a verdict. Runs in the grader's process; the bytes are a stranger's.

    bytes ──from_bytes──► {"type", "callable", "path", "blank", "outcomes"} ──► blank? unfit? ──► judge() ──► Verdict
       └─ none, damaged, too many: a Verdict with words for the student, and no points
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pefttools.grading.exercise import Exercise, ExerciseError

ANSWERS = 2**26    # bytes of one exercise's answers
ITEMS = 4_000      # characters of a text that is shown
TYPE = 200


@dataclass(frozen=True)
class Mishap:
    """What went wrong with a cell: "raised", "time", "output", "died" or "unwritten"; and what to say about it."""

    kind: str
    words: str


def verdict_of(exercise: Exercise, blob: bytes, cases: list[dict], seed: int) -> Any:
    """The verdict on these bytes. Raises ExerciseError if the exercise itself is broken, nothing else."""
    from pefttools.grading.judge import judge, not_written
    from pefttools.grading.verdict import Verdict
    from pefttools.grading.wire import WireError, from_bytes

    try:
        answer = _checked(from_bytes(blob, _bounds()), len(cases))
    except WireError as error:
        return damaged(exercise, f"the answers are not in order: {error}", seed)
    if answer["blank"]:
        return not_written(exercise, seed)
    complaint = unfit(exercise, answer)
    if complaint is not None:
        return Verdict.of(exercise, "work", complaint, seed=seed)
    try:
        return judge(exercise, answer["outcomes"], cases, seed)
    except ExerciseError:
        raise
    except Exception as error:  # data that no work of this exercise gives, and that the comparison was not made for
        return damaged(exercise, f"the answers cannot be compared ({type(error).__name__})", seed)


def to_wire(data: Any) -> bytes:
    """`wire.to_bytes`, imported when it is needed: it imports torch."""
    from pefttools.grading.wire import to_bytes

    return to_bytes(data)


def _bounds() -> Any:
    from pefttools.grading.wire import Bounds

    return Bounds(total=ANSWERS)


def _checked(answer: Any, cases: int) -> dict[str, Any]:
    """The answer if it has the form that `inside.probe` gives it."""
    from pefttools.grading.probe import Outcome
    from pefttools.grading.wire import WireError

    kinds = {"type": str, "callable": bool, "path": bool, "blank": bool, "outcomes": list, "files": dict, "trouble": str}
    if type(answer) is not dict or not set(answer) <= set(kinds):
        raise WireError("an answer with other entries")
    found = {"outcomes": [], "files": {}, "trouble": "", **answer}
    for name, kind in kinds.items():
        if type(found.get(name)) is not kind:
            raise WireError(f"an answer without {name}")
    if len(found["outcomes"]) > cases or any(type(outcome) is not Outcome for outcome in found["outcomes"]):
        raise WireError("outcomes that are none")
    found["type"], found["trouble"] = found["type"][:TYPE], found["trouble"][:TYPE]
    return found


def files_of(exercise: Exercise, blob: bytes, seed: int) -> tuple[dict[str, bytes] | None, Any]:
    """(the files of an artefact, None) or (None, the verdict where there are none to look at)."""
    import torch

    from pefttools.grading.judge import not_written
    from pefttools.grading.verdict import Verdict
    from pefttools.grading.wire import WireError, from_bytes

    try:
        answer = _checked(from_bytes(blob, _bounds()), 0)
        for name, content in answer["files"].items():
            if name not in exercise.files or type(content) is not torch.Tensor or content.dtype != torch.uint8:
                raise WireError("files that are none")
    except WireError as error:
        return None, damaged(exercise, f"the answers are not in order: {error}", seed)
    if answer["blank"]:
        return None, not_written(exercise, seed)
    complaint = unfit(exercise, answer)
    if complaint is None and answer["trouble"]:
        complaint = (f"Your files cannot be taken: {answer['trouble']}. Hand them in beside the notebook, as they are or in one "
                     f"zip: {', '.join(exercise.files)}.")
    if complaint is not None:
        return None, Verdict.of(exercise, "work", complaint, seed=seed)
    return {name: content.numpy().tobytes() for name, content in answer["files"].items()}, None


def unfit(exercise: Exercise, answer: dict[str, Any]) -> str | None:
    """As `check._unfit`, for a work that is known by what was said about it."""
    if exercise.accepts in ("function", "class") and not answer["callable"]:
        thing = exercise.accepts
        return (f"The check wants your {thing} itself; it was given {answer['type']}. "
                f"Write the name of the {thing} without brackets after it.")
    if exercise.accepts in ("folder", "artefact") and not answer["path"]:
        return f"The check wants the path of your folder; it was given {answer['type']}."
    return None


def unwritten(name: str, message: str) -> bool:
    """Whether an answer cell that raised this stopped at its stub."""
    from pefttools.grading.probe import UNWRITTEN

    return name == "NotImplementedError" and UNWRITTEN.match(message.strip()) is not None


def damaged(exercise: Exercise, what: str, seed: int | None) -> Any:
    """No answers, or such as the probe does not write."""
    from pefttools.grading.verdict import Verdict

    return Verdict.of(exercise, "work", f"Your work ran, but {what}. Nothing could be graded.", seed=seed)


def stopped(exercise: Exercise, mishap: Mishap, seed: int | None) -> Any:
    """The check itself came to no end."""
    from pefttools.grading.verdict import Verdict

    return Verdict.of(exercise, "raised", f"Your work was stopped while it was checked: {mishap.words}.", seed=seed)


def no_work(exercise: Exercise, error: tuple[str, str] | None, answers: dict[str, Mishap], missing: str,
            seed: int | None) -> Any:
    """There was nothing to probe: the check cell raised `error`; `answers` says what went wrong in which answer cell."""
    from pefttools.grading.judge import not_written
    from pefttools.grading.verdict import Verdict

    own = answers.get(exercise.name)
    if own is not None and own.kind == "unwritten":
        return not_written(exercise, seed)
    if own is not None:
        return Verdict.of(exercise, "raised", f"The answer cell itself did not run to its end: {own.words}. "
                          "Nothing after that line was defined, so there was nothing to check.", seed=seed)
    name, message = error or ("", "")
    said = f"{name}: {message}".strip(": ")[:600]
    text = f"The check could not get at your work: `{_quoted(said)}`." if said else f"{missing[:1].upper()}{missing[1:]}."
    if name == "NameError" and (found := re.search(r"name '(\w+)' is not defined", message)):
        text = f"`{found[1]}` is not defined when the check runs."
    others = [f"`{other}`: {mishap.words}" for other, mishap in answers.items() if mishap.kind != "unwritten"]
    if others:
        text += " Answer cells that did not run to their end: " + "; ".join(others)[:ITEMS] + "."
    return Verdict.of(exercise, "raised", text, seed=seed)


def _quoted(text: str) -> str:
    return text.replace("`", "'")
