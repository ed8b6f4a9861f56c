"""From nbgrader's source notebook to what students get: solutions out, stubs in, nothing of a solution left behind.

    source ──LockCells──ClearAnswers──ClearOutput──CheckCellMetadata──ComputeChecksums──► release ──► no_leak(release)

These are nbgrader's own preprocessors, in the order of its `GenerateAssignment`, with one of them specialised:
`ClearAnswers` writes a stub that fits the cell. They are called directly rather than through `nbgrader
generate_assignment`, which in addition copies every file beside the source (solutions included), skips what exists and
writes a database. The configuration in `nbgrader_config.py` lists the same preprocessors, so nbgrader's command and the
Generate button of formgrader give the same bytes; a test compares them.
"""

from __future__ import annotations

import ast
import copy
import re
import textwrap
from typing import TYPE_CHECKING, Any

from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, ClearSolutions, ComputeChecksums, LockCells

if TYPE_CHECKING:
    from pefttools.grading.chapter import Chapter

_REGION = re.compile(
    r"^(?P<indent>[ \t]*)#+ *BEGIN SOLUTION *(?P<note>[^\n]*)\n(?P<body>.*?)^[ \t]*#+ *END SOLUTION[^\n]*$", re.M | re.S
)


def stub(indent: str, body: str, note: str, name: str) -> str:
    """What stands in place of one solution region.

    Inside a function or class: `raise NotImplementedError("name: not written yet")`. At the top level, where values are
    computed: `variable = ...` for each variable that the region assigns, with the note that follows BEGIN SOLUTION as
    its comment (`### BEGIN SOLUTION bytes, a number`). `check` takes both for "not written yet".
    """
    if not indent:
        assigned: list[str] = []
        for node in ast.parse(textwrap.dedent(body)).body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            names = [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            assigned += [n for n in names if n not in assigned]
        if assigned:
            comment = f"  # {note.strip()}" if note.strip() else ""
            return "\n".join(f"{variable} = ...{comment}" for variable in assigned)
    return f'{indent}raise NotImplementedError("{name}: not written yet")'


class ClearAnswers(ClearSolutions):
    """nbgrader's ClearSolutions with a stub per cell that names its exercise."""

    def _replace_solution_region(self, cell: Any, language: str) -> bool:
        if cell.cell_type != "code":
            return super()._replace_solution_region(cell, language)
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "this cell")
        cell.source, found = _REGION.subn(lambda m: stub(m["indent"], m["body"], m["note"], name), cell.source)
        return bool(found)


PREPROCESSORS = [LockCells, ClearAnswers, ClearOutput, CheckCellMetadata, ComputeChecksums]


def release(chapter: Chapter) -> Any:
    """The student's notebook of a chapter. `BuildError` for a stub that does not parse or a solution that leaks."""
    import nbformat

    from pefttools.grading.source import BuildError

    notebook = nbformat.from_dict(copy.deepcopy(chapter.notebook))
    resources: dict[str, Any] = {}
    for preprocessor in PREPROCESSORS:
        notebook, resources = preprocessor().preprocess(notebook, resources)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            try:
                ast.parse(cell.source)
            except SyntaxError as error:
                raise BuildError(
                    f"{chapter.path.name}:{chapter.lines[cell.id]}: with its solution taken out, the answer cell of "
                    f"{cell.id!r} is not Python ({error.msg}): put whole statements between the markers"
                ) from error
    for cell, text in leaks(notebook, chapter.solutions):
        raise BuildError(
            f"{chapter.path.name}:{chapter.lines.get(cell, 1)}: the solution leaks into the released cell {cell!r}: "
            f"{text!r}"
        )
    return notebook


def leaks(notebook: Any, solutions: list[str]) -> list[tuple[str, str]]:
    """Where text of a solution stands in a released notebook: (cell id, the text found).

    More than half of a solution's lines, one after the other, give it away; fewer may stand in a hint or a
    demonstration. Compared without spaces and comments, in sources, outputs and metadata.
    """
    phrases = set()
    for solution in solutions:
        lines = [line for line in map(_squeeze, solution.split("\n")) if line and not line.startswith("#")]
        run = len(lines) // 2 + 1
        runs = ["".join(lines[n : n + run]) for n in range(len(lines) - run + 1)]
        phrases |= {phrase for phrase in runs if len(phrase) >= 8}
    found = []
    for cell in notebook.cells:
        lines = cell.source.split("\n")
        code = _squeeze("".join(line for line in lines if not line.lstrip().startswith("#")))
        comments = _squeeze("".join(line.lstrip(" \t#") for line in lines))  # a solution that is commented out
        aside = _squeeze(repr(cell.get("outputs", "")) + repr(cell.metadata))
        found += [
            (cell.id, phrase) for phrase in sorted(phrases) if any(phrase in text for text in (code, comments, aside))
        ]
        if re.search(r"(BEGIN|END) (SOLUTION|HIDDEN TESTS)", cell.source):
            found.append((cell.id, "a BEGIN/END marker"))
    return found


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)
