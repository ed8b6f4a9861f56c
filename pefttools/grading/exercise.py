"""What an exercise is: seeded inputs, a probe, a reference, known mistakes and other right answers.

             inputs(rng) ──► cases
                               │
    work ──► probe(work, case) ──► plain data ──► compare with probe(reference, case) ──► verdict
                                                          │ different
                                                          └─► equal to probe(mistake, case)?  then say which mistake

Everything else (the check in a notebook, grading, the tests of the course itself) is derived from this one definition.
"""

from __future__ import annotations

import importlib
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pefttools.grading.room import settled

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
CHAPTER = re.compile(r"[0-9]{2}_[a-z0-9_]+")
LAZY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
ACCEPTS = ("function", "class", "value", "folder", "artefact")
STARS = {1: "●○○", 2: "●●○", 3: "●●●"}


class ExerciseError(Exception):
    """The exercise itself is at fault (its definition, its inputs or its reference), never the student's work."""


@dataclass(frozen=True, eq=False)
class Exercise:
    """One exercise; see the module's picture.

    `inputs(rng)` gets a seeded `torch.Generator` and gives a list of cases, each a dict of plain data.
    `probe(work, case)` gives plain data back: nested dicts, lists and tuples of tensors, numbers, strings, booleans and
    None. Leaves are named in the student's words ("output", "gradient of A"), because messages show these names; a leaf
    whose name starts with "gradient" is compared after all others.

    `reference`, and the works in `mistakes` and `alternatives`, have the calling form of the student's work. Each may
    be given as "package.module:name" and is then imported only when it is needed.

    `reading(data, case)` makes the leaves out of what the probe gave, where they are properties ("A is random", "B is
    zero") rather than values: in grading the probe runs in the student's process, which could state any property, and
    the reading in the grader's. So such a probe gives the values, and the reading looks at them.

    A work that is an "artefact" is the path of a folder of files that the student's code wrote. In grading only the
    files named in `files` leave the student's process, and the probe, which gets a folder with copies of them, runs in
    another one, where the student's code never was.

    `by_hand` points are given by a person who reads the answer, in formgrader, beside the `points` of the check.

    Random numbers: before every probe torch's and Python's generators are set to the same seed for every work, and put
    back afterwards. Still, a leaf should not be a random number of the work's own choosing: name what must hold of it
    ("B is zero at the start": True).
    """

    name: str
    chapter: str
    title: str
    points: int
    minutes: int
    difficulty: int
    inputs: Callable[[torch.Generator], list[dict]]
    probe: Callable[[Any, dict], Any]
    reference: Any
    mistakes: dict[str, tuple[Any, str]] = field(default_factory=dict)
    alternatives: dict[str, Any] = field(default_factory=dict)
    rtol: float = 1e-5
    atol: float = 1e-6
    accepts: str = "function"
    hides: tuple[str, ...] = ()
    reading: Callable[[Any, dict], Any] | None = None
    files: tuple[str, ...] = ()
    by_hand: int = 0

    # A question must not show the expected letter beside the given one; and it explains why the right one is right.
    reveals = True
    praise = ""

    def __post_init__(self) -> None:
        where = f"exercise {self.name!r}"
        _want(
            isinstance(self.name, str) and NAME.fullmatch(self.name) is not None,
            where,
            "name",
            self.name,
            'lower case words with hyphens, such as "lora-forward"',
        )
        _want(
            isinstance(self.chapter, str) and CHAPTER.fullmatch(self.chapter) is not None,
            where,
            "chapter",
            self.chapter,
            'two digits and a name, such as "02_lora"',
        )
        _want(isinstance(self.title, str) and self.title.strip() != "", where, "title", self.title, "some text")
        _want(type(self.by_hand) is int and self.by_hand >= 0, where, "by_hand", self.by_hand, "a whole number, 0 or more")
        for name in ("points", "minutes"):
            value = getattr(self, name)
            _want(type(value) is int and value > 0, where, name, value, "a whole number above 0")
        _want(
            type(self.difficulty) is int and self.difficulty in STARS, where, "difficulty", self.difficulty, "1, 2 or 3"
        )
        for name in ("inputs", "probe"):
            _want(callable(getattr(self, name)), where, name, getattr(self, name), "a function")
        _want(
            self.reference is not None and self.reference is not ...,
            where,
            "reference",
            self.reference,
            'a right work, or "package.module:name"',
        )
        _want(isinstance(self.mistakes, dict), where, "mistakes", self.mistakes, "{name: (wrong work, message)}")
        for key, entry in self.mistakes.items():
            good = (
                isinstance(entry, tuple)
                and len(entry) == 2
                and isinstance(entry[1], str)
                and entry[1].strip() != ""
                and isinstance(key, str)
                and key != ""
            )
            _want(good, where, f"mistakes[{key!r}]", entry, "(wrong work, what to tell whoever made it)")
        _want(
            isinstance(self.alternatives, dict) and all(isinstance(key, str) and key for key in self.alternatives),
            where,
            "alternatives",
            self.alternatives,
            "{name: other right work}",
        )
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            _want(
                type(value) in (int, float) and math.isfinite(value) and value >= 0, where, name, value, "a number ≥ 0"
            )
        _want(self.accepts in ACCEPTS, where, "accepts", self.accepts, "one of " + ", ".join(ACCEPTS))
        _want(
            isinstance(self.hides, tuple) and all(isinstance(name, str) and name for name in self.hides),
            where,
            "hides",
            self.hides,
            'a tuple of module names, such as ("pefttools.lora", "peft")',
        )

        _want(self.reading is None or callable(self.reading), where, "reading", self.reading, "a function, or None")
        plain_names = isinstance(self.files, tuple) and all(
            isinstance(name, str) and FILE.fullmatch(name) is not None for name in self.files)
        _want(plain_names and bool(self.files) == (self.accepts == "artefact"), where, "files", self.files,
              'a tuple of file names, such as ("adapter_model.safetensors",), for an artefact, and empty for all else')

    @property
    def stars(self) -> str:
        """The difficulty as ●○○, ●●○ or ●●●."""
        return STARS[self.difficulty]

    def cases(self, seed: int = 0) -> list[dict]:
        """The inputs for this seed, made anew at every call: a work may write into them without harm.

        Raises:
            ExerciseError: if `inputs` fails or gives anything but a non-empty list of dicts.
        """
        import torch

        # The name goes into the seed, so that two exercises do not see the same numbers.
        generator = torch.Generator(device="cpu").manual_seed(
            (int(seed) * 1_000_003 + zlib.crc32(self.name.encode())) % 2**63
        )
        try:
            with settled(0):
                cases = self.inputs(generator)
        except Exception as error:
            raise ExerciseError(
                f"exercise {self.name!r}: its inputs cannot be made: {type(error).__name__}: {error}"
            ) from error
        good = isinstance(cases, list) and cases and all(isinstance(case, dict) for case in cases)
        _want(good, f"exercise {self.name!r}", "inputs(rng)", cases, "a list of at least one dict")
        return cases

    def resolve(self, work: Any) -> Any:
        """`work` itself, or, for "package.module:name", that object, imported now.

        A string is taken as such a name only where `accepts` is a function or a class, or where it contains a dot
        before the colon, so that a value may be a string with a colon in it.

        Raises:
            ExerciseError: if the module or the name in it does not exist.
        """
        if type(work) is not str or not LAZY.fullmatch(work):
            return work
        module, _, path = work.partition(":")
        if self.accepts not in ("function", "class") and "." not in module:
            return work
        try:
            found = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ExerciseError(
                f"exercise {self.name!r}: cannot get {work!r}: {type(error).__name__}: {error}"
            ) from error
        return found


def _want(good: bool, where: str, name: str, given: Any, wanted: str) -> None:
    if not good:
        raise ExerciseError(f"{where}: {name} is {given!r:.200}; it must be {wanted}")
