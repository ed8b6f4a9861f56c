"""Every exercise of the course: one module a chapter, `chNN_name.py`, found by its name.

A module ends with `EXERCISES: list[Exercise]` and `QUESTIONS: list[Question]`, and may have `TITLE = "LoRA"`. It
imports only torch and the standard library at top level: the grading sandbox imports it where peft and pefttools.lora
do not exist.

    python -m pefttools.grading.exercises        prints the table of all exercises
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from dataclasses import dataclass, field

from pefttools.grading.exercise import Exercise, ExerciseError
from pefttools.grading.question import Question

MODULE = re.compile(r"ch([0-9]{2}_[a-z0-9_]+)")


class RegistryError(ImportError):
    """A module of exercises cannot be used; the message says which, and why."""


@dataclass
class _Chapter:
    title: str
    exercises: list[Exercise] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


_loaded: dict[str, _Chapter] = {}
_failed: dict[str, tuple[str, BaseException]] = {}  # chapter -> (module, why)
_done = False


def _load() -> None:
    """Import every chapter's module once. A broken one is remembered, and told to whoever asks for that chapter."""
    global _done
    if _done:
        return
    _loaded.clear()
    _failed.clear()
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        match = MODULE.fullmatch(module)
        if match is None:
            continue
        name = f"{__name__}.{module}"
        try:
            _loaded[match[1]] = _read(importlib.import_module(name), match[1])
        except Exception as error:
            _failed[match[1]] = (name, error)
    _done = True


def _read(module: object, chapter: str) -> _Chapter:
    number, _, word = chapter.partition("_")
    found = _Chapter(f"{number} {getattr(module, 'TITLE', word.replace('_', ' '))}")
    for attribute, kind, into in (("EXERCISES", Exercise, found.exercises), ("QUESTIONS", Question, found.questions)):
        for entry in getattr(module, attribute, []):
            if not isinstance(entry, kind) or (kind is Exercise and isinstance(entry, Question)):
                raise ExerciseError(f"{attribute} holds {entry!r:.100}, which is no {kind.__name__}")
            if entry.chapter != chapter:
                raise ExerciseError(
                    f"{entry.name!r} says chapter {entry.chapter!r}; this module is that of {chapter!r}"
                )
            names = {task.name for other in (*_loaded.values(), found) for task in (*other.exercises, *other.questions)}
            if entry.name in names:
                raise ExerciseError(f"there are two exercises of the name {entry.name!r}")
            into.append(entry)
    return found


def reload() -> None:
    """Forget what was found; the next question looks again (modules once imported are not imported anew)."""
    global _done
    _done = False


def chapters() -> list[str]:
    """The chapters that have exercises, in order: ["00_start", "02_lora", …].

    Raises:
        RegistryError: if a chapter's module cannot be used.
    """
    _load()
    for chapter in sorted(_failed):
        _fail(chapter)
    return sorted(_loaded)


def exercises(chapter: str | None = None) -> list[Exercise]:
    """The exercises of a chapter ("02_lora", or just "02"), or of all, in the order of the text; no questions."""
    return [entry for found in _chosen(chapter) for entry in found.exercises]


def questions(chapter: str | None = None) -> list[Question]:
    """The questions of a chapter, or of all."""
    return [entry for found in _chosen(chapter) for entry in found.questions]


def tasks(chapter: str | None = None) -> list[Exercise]:
    """Exercises and questions together: everything that has points."""
    return [entry for found in _chosen(chapter) for entry in (*found.exercises, *found.questions)]


def title(chapter: str) -> str:
    """The chapter's number and title for readers: "02 LoRA"."""
    return _chosen(chapter)[0].title if chapter in _loaded else chapter


def exercise(name: str) -> Exercise:
    """The exercise or question of this name.

    Raises:
        KeyError: if there is none; the nearest names are in the message.
        RegistryError: if there is none, but a module that might have it is broken.
    """
    _load()
    known = {entry.name: entry for found in _loaded.values() for entry in (*found.exercises, *found.questions)}
    if name in known:
        return known[name]
    for chapter in sorted(_failed):
        _fail(chapter)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = (
        "Did you mean " + " or ".join(map(repr, near)) + "?"
        if near
        else f"There are: {', '.join(sorted(known)) or 'none'}."
    )
    raise KeyError(f"no exercise {name!r}. {hint}")


def _chosen(chapter: str | None) -> list[_Chapter]:
    if chapter is None:
        return [_loaded[name] for name in chapters()]
    _load()
    for name in sorted(_failed):
        if chapter in (name, name[:2]):
            _fail(name)
    found = [_loaded[name] for name in sorted(_loaded) if chapter in (name, name[:2])]
    if not found and _failed and not MODULE.fullmatch(f"ch{chapter}"):
        _fail(sorted(_failed)[0])
    if not found and chapter not in (None, "") and not re.match(r"[0-9]{2}", str(chapter)):
        raise KeyError(f"no chapter {chapter!r}; there are {', '.join(sorted(_loaded)) or 'none'}")
    return found


def _fail(chapter: str) -> None:
    module, error = _failed[chapter]
    raise RegistryError(f"{module} cannot be used: {type(error).__name__}: {error}") from error
