"""What a kind of task is, and how its constants are drawn.

A `Kind` is one sort of small programming task ("keep the numbers above a threshold"). It holds several wordings of the
instruction, a template of the code, and a way to draw the constants ("slots") that go into both:

    wording   "$write that keeps the numbers $op_said $n."        op_said = "over", n = 17
    code      "def $name(values): return [x for x in values if x $op $n]"      op = ">"

Slots are written `$slot` (`string.Template`, so that braces stay Python's). A slot called `x_said` is the phrase that
says slot `x` in words; every slot of the code must be said by every wording (`--check` sees to it).

Two things are held out, for the split called "held_out": whole wordings (`Kind.held_out`, `OPENINGS["held_out"]`), and
constants. `Draw` gives a part of its own to "train" and to "held_out": names of functions and classes are divided over
the whole data set, other constants (numbers, words, letters, fields, separators) within each kind.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from pefttools.lab.tasks import words as vocabulary

HELD_OUT_SHARE = 5
"""One constant in five is kept for the held-out splits."""

OPENINGS = {
    "train": {
        "write": ("Write a function `$head`", "Write `$head`, a function", "Define a function `$head`",
                  "Create a function `$head`", "Implement a function `$head`", "Write a Python function `$head`",
                  "I need a function `$head`", "Can you write a function `$head`", "Code a function `$head`",
                  "Show me a function `$head`", "Complete `$head`, a function", "Build a function `$head`"),
        "make": ("Write a class `$name`", "Define a class `$name`", "Create a class `$name`",
                 "Write a Python class `$name`", "I need a class `$name`", "Code a class `$name`",
                 "Show me a class `$name`", "Build a class `$name`"),
    },
    "held_out": {
        "write": ("Please write a function `$head`", "Make a function `$head`", "Give me a function `$head`"),
        "make": ("Please write a class `$name`", "Make a class `$name`", "Give me a class `$name`"),
    },
}
OPENINGS["new_kinds"] = {opening: phrases + OPENINGS["held_out"][opening]
                         for opening, phrases in OPENINGS["train"].items()}

CLOSING = re.compile(r"(?P<task>.*)\. (?:The function is|Call it) (?P<name>`\$\w+`)\.")
CLOSINGS = ("{task}. The function is {name}.", "{task}. Call it {name}.", "{task}. Name it {name}.", "{task}, in a function {name}.",
            "{name}: {task}.", "Task for {name}: {task}.")
"""Other ways to put the name into a training wording that ends with it; a few words of variety that cost no kind a line."""

COMPARE = {">": ("more than", "greater than", "over", "above"), ">=": ("at least", "not less than"),
           "<": ("less than", "below", "under"), "<=": ("at most", "not more than")}
COMPARE_LENGTH = {">": ("longer than", "of more than"), "<": ("shorter than", "of less than")}
"""Of lengths only these two: among whole numbers "at least 5" would be the same as "more than 4"."""


def holds(op: str, a: Any, b: Any) -> bool:
    """Whether the comparison holds: `holds(">=", 3, 2)`."""
    return {">": a > b, ">=": a >= b, "<": a < b, "<=": a <= b}[op]


class Slots(dict):
    """The constants of one row: a dict whose keys can also be read as attributes (`s.n`)."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"no slot {key!r}; the slots are {', '.join(self)}") from None


@dataclass(frozen=True)
class Kind:
    """One kind of task.

    name, family: unique name, and the family (one file of this package each).
    wordings, held_out: templates of the instruction, for training and for the held-out split. `$write` and `$make`
        stand for an opening such as "Write a function `$head`" and "Write a class `$name`".
    draw: `Draw` → dict of slots.
    code: template of the answer.
    calls, answer: the tests: `calls(slots)` lists tuples of arguments, `answer(slots, *arguments)` what is right for
        each; written independently of `code`, so that a slip in one of the two shows.
    tests: for classes and files, in place of `calls` and `answer`: `tests(slots)` lists the tests themselves.
    setup: what has to run before each test (imports for the test alone, under names that no answer uses).
    head: how an opening shows the function: `$name`, or the signature, `$name($arg)`.
    keywords: slots with the arguments' names; the first call is then made with keywords.
    example: template of the column `input`, or a function of the slots that returns one (empty: no input).
    new: never in training: this kind belongs to the split "new_kinds".
    """

    name: str
    family: str
    wordings: Sequence[str]
    held_out: Sequence[str]
    draw: Callable[[Draw], dict]
    code: str
    calls: Callable[[Slots], list[tuple]] | None = None
    answer: Callable[..., Any] | None = None
    tests: Callable[[Slots], list[str]] | None = None
    setup: str = ""
    head: str = "$name"
    keywords: tuple[str, ...] = ()
    example: str | Callable[[Slots], str] = ""
    new: bool = False


class Draw:
    """Draws constants for one row of `kind` from the part of each vocabulary that a split ("train", "held_out" or
    "new_kinds") may use. Kinds that are not in train may use all of it; no name of train, though."""

    def __init__(self, rng: random.Random, part: str, kind: str):
        if part not in OPENINGS:
            raise ValueError(f"part: got {part!r}, expected one of {', '.join(OPENINGS)}")
        self.rng, self.part, self.kind = rng, part, kind

    def mine(self, values: Sequence) -> list:
        """The values of this part: of every five, four are for training and one is held out (at least one)."""
        if self.part == "new_kinds":
            return list(values)
        order = sorted(values, key=lambda value: zlib.crc32(f"{self.kind}/{value}".encode()))
        held = max(1, len(order) // HELD_OUT_SHARE)
        return order[:held] if self.part == "held_out" else order[held:]

    def several(self, count: int, values: Sequence) -> list:
        """`count` different values of this part."""
        return self.rng.sample(self.mine(values), count)

    def distinct(self, slots: Sequence[str], values: Sequence) -> dict[str, Any]:
        """A value for each slot, no two the same."""
        return dict(zip(slots, self.several(len(slots), values), strict=True))

    def one(self, *values: Any) -> Any:
        """Any of the values; nothing is held out."""
        return self.rng.choice(values)

    def number(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return self.rng.choice(self.mine(range(low, high + 1)))

    def numbers(self, slots: Sequence[str], low: int, high: int) -> dict[str, int]:
        """A number for each slot, in ascending order."""
        return dict(zip(slots, sorted(self.several(len(slots), range(low, high + 1))), strict=True))

    def word(self) -> str:
        return self.rng.choice(self.mine(vocabulary.WORDS))

    def words(self, *slots: str) -> dict[str, str]:
        return self.distinct(slots, vocabulary.WORDS)

    def field(self) -> str:
        return self.rng.choice(self.mine(vocabulary.FIELDS))

    def fields(self, *slots: str) -> dict[str, str]:
        return self.distinct(slots, vocabulary.FIELDS)

    def letters(self, count: int) -> str:
        """Different letters, as one text."""
        return "".join(self.several(count, vocabulary.LETTERS))

    def separator(self) -> str:
        return self.rng.choice(self.mine(vocabulary.SEPARATORS))

    def separators(self, *slots: str) -> dict[str, str]:
        return self.distinct(slots, vocabulary.SEPARATORS)

    def name(self, *verbs: str) -> str:
        """A function's name, `verb_noun` or `verb_noun_noun`: "count_box", "find_user_page"."""
        def draw() -> str:
            nouns = self.rng.sample(vocabulary.NOUNS, self.one(1, 1, 2))
            return "_".join([self.rng.choice(verbs), *nouns])
        return self._named(draw)

    def class_name(self) -> str:
        """A class's name, two nouns: "UserPage"."""
        return self._named(lambda: "".join(noun.title() for noun in self.rng.sample(vocabulary.NOUNS, 2)))

    def _named(self, draw: Callable[[], str]) -> str:
        while True:
            name = draw()
            held_out = zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0
            if held_out == (self.part != "train"):
                return name

    def pick(self, slot: str, table: dict[Any, str | Sequence[str]]) -> dict[str, Any]:
        """A variant and its phrase: `{slot: key, slot_said: phrase}`; the table maps what is coded to what is said."""
        key = self.rng.choice(list(table))
        phrases = (table[key],) if isinstance(table[key], str) else table[key]
        return {slot: key, f"{slot}_said": self.rng.choice(phrases)}


def fill(template: str, slots: dict) -> str:
    """The template with its slots filled in; a slot's value may hold further slots (one level)."""
    text = Template(template).substitute(slots)
    return Template(text).substitute(slots) if "$" in text else text


def call(slots: Slots, arguments: Sequence, keywords: Sequence[str] = ()) -> str:
    """The call as source: `name(1, 'a')`, or `name(x=1, y='a')` with the arguments' names in the slots `keywords`."""
    if keywords:
        shown = [f"{slots[slot]}={value!r}" for slot, value in zip(keywords, arguments, strict=True)]
    else:
        shown = [repr(value) for value in arguments]
    return f"{slots['name']}({', '.join(shown)})"


def tests_of(kind: Kind, slots: Slots) -> list[str]:
    """The tests of one row, each a piece of Python that ends in an assertion."""
    if kind.tests is not None:
        lines = kind.tests(slots)
    else:
        lines = []
        for place, arguments in enumerate(kind.calls(slots)):
            source = call(slots, arguments, kind.keywords if place == 0 else ())
            right = kind.answer(slots, *arguments)
            if isinstance(right, bool):
                lines.append(f"assert {source} is {right}")
            elif isinstance(right, float):
                lines.append(f"assert abs({source} - {right!r}) < 1e-6")
            else:
                lines.append(f"assert {source} == {right!r}")
    return [f"{kind.setup}\n{line}" if kind.setup else line for line in lines]


def draw_slots(kind: Kind, rng: random.Random, split: str) -> tuple[Slots, str]:
    """Slots and the wording for one row of a split."""
    slots = Slots(kind.draw(Draw(rng, split, kind.name)))
    slots["head"] = fill(kind.head, slots)
    for opening, phrases in OPENINGS[split].items():
        slots[opening] = fill(rng.choice(phrases), slots)
    wordings = {"train": kind.wordings, "held_out": kind.held_out, "new_kinds": (*kind.wordings, *kind.held_out)}[split]
    wording = rng.choice(wordings)
    if split == "train" and (parts := CLOSING.fullmatch(wording)):
        wording = rng.choice(CLOSINGS).format(**parts.groupdict())
    return slots, wording


def row_of(kind: Kind, slots: Slots, wording: str) -> dict[str, Any]:
    """The row: instruction, input, output, text, kind, family, tests."""
    instruction = fill(wording, slots)
    given = fill(kind.example(slots) if callable(kind.example) else kind.example, slots)
    output = f"```python\n{fill(kind.code, slots)}\n```"
    text = instruction + "\n" + (given + "\n" if given else "") + output
    return {"instruction": instruction, "input": given, "output": output, "text": text, "kind": kind.name,
            "family": kind.family, "tests": tests_of(kind, slots)}
