"""What an attack is: a name, a sentence, and a hand-in.

    @code("forge-check", "forgery", "puts a function of its own in place of `check`")
    def _(): return '''…what stands in the answer cell of lora-forward…'''

    @notebook("skip-tag", "metadata", "…")           changes the blank notebook as a whole
    @folder("shadow-numpy", "files", "…")            writes what it likes into the student's folder

An attack that aims at something else than points prints ACHIEVED and what it got, only where it got it: the same line
serves in our sandbox and in stock nbgrader.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGET = "lora-forward"
ACHIEVED = "ACHIEVED"
CLASS = "/class"  # in an attack's source: the course's root
ATTACKS: dict[str, Attack] = {}


@dataclass(frozen=True)
class Attack:
    """`make(course, folder)` writes the hand-in into the student's folder; `earns`: what honest answers beside it earn."""

    name: str
    family: str
    what: str
    make: Callable[[Any, Path], None]
    earns: float = 0
    stock: str = ""                  # why it is not run under stock nbgrader; empty: it is
    slow: bool = False               # uses up a limit: seconds of waiting
    words: str = ""                  # pattern that what is said to the attacker must match
    adaptive: bool = False           # knows this repository
    limits: dict[str, Any] = field(default_factory=dict)


def _placed(text: str, course: Any) -> str:
    """The source for this class: where it lies, and on which port something listens."""
    return textwrap.dedent(text).strip().replace(CLASS, str(course.root)).replace("@PORT@", str(course.port))


def add(attack: Attack) -> None:
    if attack.name in ATTACKS:
        raise ValueError(f"there are two attacks of the name {attack.name!r}")
    ATTACKS[attack.name] = attack


def put(folder: Path, notebook: Any) -> None:
    """The notebook, as nbgrader and our intake expect it."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    text = notebook if isinstance(notebook, str) else json.dumps(notebook)
    (folder / "lora.ipynb").write_text(text, encoding="utf-8")


def code(name: str, family: str, what: str, honest: tuple[str, ...] = (), **more: Any) -> Callable:
    """An attack that is source in answer cells: the function gives a text (for lora-forward) or {exercise: text}."""
    def decorate(function: Callable[[], str | dict[str, str]]) -> Callable:
        def make(course: Any, folder: Path) -> None:
            given = function()
            answers = given if isinstance(given, dict) else {TARGET: given}
            # an attacker who knows where the class lies
            answers = {key: _placed(text, course) for key, text in answers.items()}
            put(folder, course.with_answers(answers, honest))
        earns = more.pop("earns", sum({"count-parameters": 2, "lora-init": 3, "lora-q-scale": 1}[n] for n in honest))
        add(Attack(name, family, what, make, earns=earns, **more))
        return function
    return decorate


def notebook(name: str, family: str, what: str, **more: Any) -> Callable:
    """An attack on the notebook: the function gets the course and a blank notebook, and gives what is handed in."""
    def decorate(function: Callable[[Any, dict], Any]) -> Callable:
        add(Attack(name, family, what, lambda course, folder: put(folder, function(course, course.pristine())), **more))
        return function
    return decorate


def folder(name: str, family: str, what: str, **more: Any) -> Callable:
    """An attack by files: the function gets the course and the student's folder."""
    def decorate(function: Callable[[Any, Path], None]) -> Callable:
        add(Attack(name, family, what, function, **more))
        return function
    return decorate


def load() -> dict[str, Attack]:
    """All attacks, in the order of the table."""
    from hostile import adaptive, daemons, escapes, exhaustion, files  # noqa: F401
    from hostile import forgery, lies, metadata, protocol, reach, shown  # noqa: F401

    order = list(dict.fromkeys(attack.family for attack in ATTACKS.values()))
    return {attack.name: attack for attack in sorted(ATTACKS.values(), key=lambda a: order.index(a.family))}
