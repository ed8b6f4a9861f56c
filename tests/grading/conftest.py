"""A tiny chapter that needs neither torch nor the registry, for the tests of build, splice and grade."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pefttools.grading import Exercise, Question

TINY = Path(__file__).parent / "fixtures" / "01_tiny.py"


def exercise(name, title, points, difficulty=1):
    return Exercise(
        name=name,
        chapter="01_tiny",
        title=title,
        points=points,
        minutes=3,
        difficulty=difficulty,
        inputs=lambda rng: [{}],
        probe=lambda work, case: None,
        reference=1,
    )


def entries(chapter="01_tiny"):
    """The tiny chapter's registry. Its notebook brings a check of its own, so that no test waits for torch."""
    question = Question(
        name="tiny-q-even",
        chapter="01_tiny",
        points=1,
        text="Which is even?",
        right="b",
        options={"a": ("3", "Odd."), "b": ("4", "Yes.")},
    )
    every = [
        exercise("tiny-double", "Twice", 2),
        exercise("tiny-box", "A box", 3, 2),
        exercise("tiny-total", "A sum", 1),
        question,
    ]
    return {entry.name: entry for entry in every}


class Tiny:
    """A course with one chapter in a temporary folder."""

    def __init__(self, root: Path) -> None:
        from pefttools.grading.build import build
        from pefttools.grading.chapter import read_chapter
        from pefttools.grading.release import release

        self.root, self.entries = root, entries
        (root / "solutions").mkdir(parents=True)
        self.source = root / "solutions" / "01_tiny.py"
        shutil.copy(TINY, self.source)
        self.released = root / "course" / "01_tiny" / "tiny.ipynb"
        self.instructor = root / "solutions" / "01_tiny.ipynb"
        self._build, self._read, self._release = build, read_chapter, release
        self.log: list[str] = []
        build(root, entries=entries, log=self.log.append)

    def build(self, **options):
        self.log.clear()
        return self._build(self.root, entries=entries, log=self.log.append, **options)

    def edit(self, old: str, new: str, count: int = 1) -> None:
        text = self.source.read_text()
        assert old in text, f"the fixture has no {old!r}"
        self.source.write_text(text.replace(old, new, count))

    def read(self, registry=None):
        return self._read(self.source, registry if registry is not None else entries())

    def release(self):
        return self._release(self.read())

    def pristine(self) -> dict:
        return json.loads(self.released.read_text())

    def solved(self) -> dict:
        return json.loads(self.instructor.read_text())


@pytest.fixture
def tiny(tmp_path):
    return Tiny(tmp_path / "course root")  # a space in the path, as on many a laptop
