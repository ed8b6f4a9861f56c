"""docs/errata.md: every error of the sources has a cell in the released notebook of the chapter that it names."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = [line for line in (ROOT / "docs" / "errata.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
ROWS = [[part.strip() for part in line.strip("| ").split(" | ")] for line in LINES[1:]]


def strings(source):
    """The text constants of a code cell, as they are when it runs; what an f-string computes is left out."""
    return [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and type(node.value) is str]


def test_all_are_there():
    assert [int(row[0]) for row in ROWS] == [n for n in range(1, 29) if n != 14]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_cell_is_there_and_computes(row):
    _, _, _, chapter, words = row
    [path] = (ROOT / "course" / chapter).glob("*.ipynb")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    [cell] = [source for source in cells if any(words in text for text in strings(source))]
    computed = [node for node in ast.walk(ast.parse(cell)) if isinstance(node, (ast.JoinedStr, ast.Call))]
    assert computed, "the cell holds text alone"
