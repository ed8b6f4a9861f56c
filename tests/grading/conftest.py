"""A tiny chapter with exercises of its own, for the tests of build, splice and grade."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parent / "fixtures" / "01_tiny.py"


def _registry():
    """fixtures/tiny_registry.py, imported under a name under which workers find its functions as well."""
    if "tiny_registry" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tiny_registry", TINY.with_name("tiny_registry.py"))
        sys.modules["tiny_registry"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tiny_registry"])
    return sys.modules["tiny_registry"]


entries = _registry().entries


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
