"""docs/sources.md: every figure that a chapter quotes from a source is in it, with the cell that recomputes it."""

from __future__ import annotations

import ast
import csv
import functools
import json
import operator
import re
from pathlib import Path

import nbformat
import pytest

from pefttools.grading.source import is_question, registry

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"recomputed", "at our scale", "held to data"}
CHAPTERS = sorted(path.name for path in (ROOT / "course").iterdir() if path.is_dir())


def table(columns: int) -> list[list[str]]:
    """The rows of that table of docs/sources.md which has so many columns."""
    page = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    rows = [[part.strip() for part in line.strip()[1:-1].split("|")] for line in lines]
    assert {len(row) for row in rows} == {6, 3}, "a row has too many columns or too few"
    return [row for row in rows if len(row) == columns][1:]


ROWS, OTHERS = table(6), table(3)


# ── what students open ────────────────────────────────────────────────────────────────────────────────────────────────
@functools.cache
def cells(chapter: str) -> list:
    [path] = (ROOT / "course" / chapter).glob("*.ipynb")
    return nbformat.read(path, as_version=4).cells


@functools.cache
def trees(chapter: str) -> list[ast.Module]:
    """The code cells as syntax trees."""
    return [ast.parse(cell.source) for cell in cells(chapter) if cell.cell_type == "code"]


def strings(tree: ast.AST) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str]


def plain(text: str) -> str:
    """A figure may stand in a formula, in bold, in code: the same without that."""
    for old, new in (("{,}", ","), ("\\,", " "), ("\\cdot", "·"), ("\\times", "×"), ("−", "-"), ("–", "-"), ("$", ""),
                     ("*", ""), ("`", "")):
        text = text.replace(old, new)
    return re.sub(r"\s+", " ", text)


@functools.cache
def text_of(chapter: str) -> str:
    code = (text for tree in trees(chapter) for text in strings(tree))
    return plain("\n".join([*(cell.source for cell in cells(chapter)), *code]))


def marked(figure: str) -> list[str]:
    return re.findall(r"`([^`]+)`", figure)


# ── the rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_list_is_whole():
    assert {row[2] for row in ROWS} == set(CHAPTERS) and {row[4] for row in ROWS} == KINDS
    assert len({tuple(row[:3]) for row in ROWS}) == len(ROWS), "a figure is listed twice"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[2]}-{row[0]}")
def test_the_cell_is_there_and_computes(row):
    source, figure, chapter, words, kind, _ = row
    assert marked(figure), "no figure is marked"
    for said in marked(figure):
        assert plain(said) in text_of(chapter), f"{chapter} does not quote {said}"
    [cell] = [tree for tree in trees(chapter) if any(words in text for text in strings(tree))]
    assert any(isinstance(node, (ast.JoinedStr, ast.Call)) for node in ast.walk(cell)), "the cell holds text alone"
    if kind == "held to data":
        assert "published" in ast.unparse(cell), "the cell reads no data file"


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}


def value_of(text: str) -> float:
    """The value of an expression of numbers."""
    def of(node):
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -of(node.operand)
        assert isinstance(node, ast.Constant) and isinstance(node.value, (int, float)), ast.dump(node)
        return node.value

    return of(ast.parse(text.replace(",", ""), mode="eval").body)


def holds(line: str) -> bool:
    left, sign, right = re.fullmatch(r"(.+) ([=≈≠<>]) (.+)", line).groups()
    a, b = value_of(left), value_of(right)
    digits = len(right.partition(".")[2]) if sign in "=≠" else 0
    return {"=": round(a, digits) == b, "≠": round(a, digits) != b, "≈": abs(a / b - 1) <= 0.02, "<": a < b,
            ">": a > b}[sign]


def numbers(text: str) -> set[str]:
    """The numbers in a text, without signs, units and separators."""
    return {found.replace(",", "") for found in re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?", plain(text))}


@pytest.mark.parametrize("row", [row for row in ROWS if row[5]], ids=lambda row: f"{row[2]}-{row[0]}")
def test_the_arithmetic(row):
    for line in row[5].split(";"):
        assert holds(line.strip()), line
        named = {float(n) for said in marked(row[1]) for n in numbers(said)}
        used = {float(n) for n in numbers(line.replace("*", " * "))}
        assert named & used, f"{line}: none of its numbers is in the figure"


def test_the_arithmetic_can_fail():
    assert holds("2 * 3 = 6") and not holds("2 * 3 = 7") and not holds("2 / 3 = 0.66") and holds("2 / 3 = 0.67")
    assert holds("2 * 3 ≠ 5") and not holds("2 * 3 ≠ 6") and holds("101 ≈ 100") and not holds("103 ≈ 100")


# ── and nothing else is quoted ────────────────────────────────────────────────────────────────────────────────────────
SOURCE = re.compile(r"(?<![\d,.])00[0-4](?![\d,]|\.\d)|(?<!on )[Pp]apers?\b|[Aa]bstract\b|docstring|[Bb]enchmark\b|"
                    r"\b[Ss]lides?\b|\b[Ss]ources?\b|MT-Bench|et al\.|Aghajanyan|Houlsby et|Lester|Li & Liang|"
                    r"Kalajdzievski|Hayou|\breports\b|\bauthors\b")
FIRST = re.compile(r"00[0-4]|.*[Pp]aper|QLoRA|peft|bitsandbytes|MT-Bench")
PLACES = (r"\]\([^)]*\)|https?://\S+|\w+_\w+|\b[A-Za-z]+[A-Za-z-]*-\d[\w.-]*|"       # links and names, such as OPT-6.7B
          r"\b(?:[Ss]ections?|[Cc]hapters?|[Tt]ables?|[Ff]igures?|[Ee]quations?|[Pp]roblems?|[Ee]xamples?|[Ss]teps?|"
          r"[Ii]ssue|[Pp]arts?|[Aa]ppendix|[Qq]uestions?|[Ss]lide|[Ss]ources?) "
          r"\d+(?:\.\d+)*(?:(?:,| and| to| or) \d+(?:\.\d+)*)*|"
          r"(?<![\d,])00[0-4](?:[’']s)?(?=\W|$)|\b(?:19|20)\d\d\b|"
          r"(?<=, )\d\.\d(?= \()|(?<= and )\d\.\d(?= \()")                          # "section 4.1 (…), 4.2 (…)"


def beside_a_source(text: str) -> set[str]:
    """Numbers in those sentences of a text that name a source; not 0, 1 and years, nor where in it something stands."""
    found = set()
    for sentence in re.split(r"(?<=[.!?])(?<!et al\.)\s+|\n\n|\n(?=[|#-])", text):
        if SOURCE.search(plain(sentence)):
            found |= numbers(re.sub(PLACES, " ", " " + plain(sentence)))
    return found - {"0", "1"}


def in_tables(tree: ast.AST) -> set[str]:
    """Numbers in the rows of a table "source, it says, we measured", and in a column "it says" or "001 says" of others."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple) and len(node.elts) >= 3 and FIRST.match("".join(strings(node.elts[0]))):
            said = [e.value for e in node.elts[1:-1] if isinstance(e, ast.Constant) and isinstance(e.value, str)]
            found |= set().union(*(numbers(re.sub(PLACES, " ", plain(text))) for text in said))
        if isinstance(node, ast.Call) and node.args and all(isinstance(a, ast.List) for a in node.args):
            heading = [(strings(e) or [""])[0] for e in node.args[0].elts]
            for column in (i for i, text in enumerate(heading) if re.fullmatch(r"(00\d|it) says", text)):
                for row in node.args[1:]:
                    found |= set().union(*map(numbers, strings(row.elts[column])))
    return found - {"0", "1"}


def quoted(chapter: str) -> set[str]:
    found = set().union(*(in_tables(tree) for tree in trees(chapter)))
    found |= set().union(*(beside_a_source(cell.source) for cell in cells(chapter) if cell.cell_type == "markdown"))
    for task in registry(chapter).values():
        if is_question(task):
            texts = [task.text, *(text for option in task.options.values() for text in option)]
            found |= set().union(*map(beside_a_source, texts))
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_quoted_figure_is_listed(chapter):
    listed = set().union(*(numbers(said) for row in ROWS if row[2] == chapter for said in marked(row[1])))
    other = {number for row in OTHERS if row[0] == chapter for number in numbers(row[1])}
    assert quoted(chapter) - listed - other == set(), "quoted from a source, and not in docs/sources.md"
    assert other <= quoted(chapter) - listed, "docs/sources.md excuses a number that needs no excuse"


def test_the_scan_sees_what_it_should():
    said = "Nothing has 17 parts. Source 004 (section 3.6) says that $37{,}000$ of 41.5 % do, in 2023."
    assert beside_a_source(said) == {"37000", "41.5"}
    assert beside_a_source("You have 2,000 tickets. See chapter 07, 8 and 12.") == set()
    made = "rows = [('003', 'less than 19 %', f'{x:.3f} of 23', '✗')]\ntable(['a', '001 says'], ['b 5', '29 GB'])"
    assert in_tables(ast.parse(made)) == {"19", "29"}


# ── figures that lie in a file ────────────────────────────────────────────────────────────────────────────────────────
def test_pefts_accuracies_are_whole_numbers_of_questions():
    """Each is a count of right answers to as many questions as the file says: no digit of it is a slip."""
    published = ROOT / "pefttools" / "vram" / "published"
    data = json.loads((published / "peft_accuracy.json").read_text(encoding="utf-8"))
    with (published / "vram_measured.csv").open(encoding="utf-8") as lines:
        notes = [row["notes"].rpartition("test acc=") for row in csv.DictReader(lines)]
    noted = [float(accuracy) for _, sign, accuracy in notes if sign]
    assert len(noted) > 20
    for accuracy in [run["accuracy"] for run in data["runs"]] + noted:
        right = accuracy * data["questions"]
        assert abs(right - round(right)) < 1e-9, accuracy
    assert all(re.fullmatch(r"[0-9a-f]{12}", run["commit"]) for run in data["runs"])
    assert len({(run["run"], run["commit"]) for run in data["runs"]}) == len(data["runs"])
