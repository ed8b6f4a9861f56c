"""Which code of a spliced notebook is run for a grade: answers, checks, and only those statements that these need.

    import datasets                        nobody needs it: not run
    from pathlib import Path               the answer below mentions Path: run
    base = load_base(); losses = train(…)  not run, unless an answer mentions `base`; then its first half
    # exercise: mask-labels …              an answer: run whole
    check("mask-labels", mask_labels)      becomes a probe of `mask_labels` in the sandbox

Demonstrations, training and widgets cost minutes and give no points. A statement of the chapter's own is run if it
binds a name that code run after it reads, or changes an object so bound (`model.eval()`, `rows[0] = …`). A cell with
the tag "needed" is run whole, one with the tag "gpu" never.

Answers are a stranger's text: it is parsed, never run, and what cannot be parsed needs nothing. Where somebody grades
with plain nbgrader, without the splice, the chapter's own cells may be a stranger's too.
"""

from __future__ import annotations

import ast
import re
import symtable
import warnings
from dataclasses import dataclass
from typing import Any

from pefttools.grading.splice import answer_names, cell_source, check_name
from pefttools.grading.stage import MAGIC, bound, own_scope

LONG = 50_000  # characters; in a longer answer, what it reads before it binds it is not looked for: it would take seconds
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
WORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Step:
    """A piece of a notebook to run: `source` in the kernel, or, for a check, the expression that gives the work."""

    cell: int                          # its index in the notebook
    kind: str                          # "answer", "check" or "demonstration"
    source: str
    name: str = ""                     # the exercise, of an answer or a check
    work: str = ""                     # of a check: "lora_forward"


def plan(notebook: Any) -> list[Step]:
    """The steps for this notebook (pristine, with answers in it), in order."""
    answers = set(answer_names(notebook))
    steps: list[Step] = []
    wanted: set[str] = set()           # names that code further down reads
    for index in range(len(notebook["cells"]) - 1, -1, -1):
        cell = notebook["cells"][index]
        if cell.get("cell_type") != "code":
            continue
        source = cell_source(cell) or ""
        tags = cell.get("metadata", {}).get("tags", [])
        name = cell.get("metadata", {}).get("nbgrader", {}).get("grade_id", "")
        if check_name(cell):
            before, work = work_of(source)
            wanted |= names_of(before) | names_of(work)
            steps.append(Step(index, "check", before, check_name(cell) or "", work))
        elif name in answers:
            wanted |= names_of(source)
            steps.append(Step(index, "answer", source, name))
        elif "gpu" not in tags and (kept := _kept(source, wanted, "needed" in tags)):
            wanted |= names_of(kept)
            steps.append(Step(index, "demonstration", kept))
    return steps[::-1]


def work_of(source: str) -> tuple[str, str]:
    """A check cell's statements before the check, and what it checks: `check("name", WORK)` → ("…", "WORK")."""
    try:
        body = ast.parse(source).body
        call = body[-1].value            # the builder refuses a check cell that does not end in check("name", …)
        work = call.args[1] if len(call.args) > 1 else next(word.value for word in call.keywords if word.arg == "work")
    except (*UNPARSABLE, AttributeError, IndexError, StopIteration):
        return "", "None"                # no chapter of ours
    return ast.unparse(ast.Module(body[:-1], [])), ast.unparse(work)


def names_of(source: str) -> set[str]:
    """The names that some source takes from outside: what it reads and does not bind itself; a function's own apart.

    Source that does not parse runs nothing and needs nothing, unless IPython's magics are why: then every word in it.
    """
    try:
        with warnings.catch_warnings():  # of what is in the source
            warnings.simplefilter("ignore")
            top = symtable.symtable(source, "<cell>", "exec")
            early = _read_first(ast.parse(source).body, set()) if len(source) < LONG else set()
    except UNPARSABLE:
        return set(WORD.findall(source)) if any(MAGIC.match(line) for line in source.split("\n")) else set()
    found = {symbol.get_name() for symbol in top.get_symbols()
             if symbol.is_referenced() and not (symbol.is_assigned() or symbol.is_imported())}
    here = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    todo = list(top.get_children())
    while todo:
        table = todo.pop()
        todo += table.get_children()
        found |= {symbol.get_name() for symbol in table.get_symbols()
                  if symbol.is_global() and symbol.is_referenced() and symbol.get_name() not in here}
    return found | early & here  # a comprehension's own names are in neither


def _read_first(body: list[ast.stmt], known: set[str]) -> set[str]:
    """Names that statements read before they bind them: `x = x + 1`. `known` is bound already, and grows."""
    found: set[str] = set()
    for node in body:
        inner = [part for name in ("body", "orelse", "finalbody") for part in getattr(node, name, [])
                 if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        inner += [part for handler in getattr(node, "handlers", []) for part in handler.body]
        whole = node if not inner else ast.Module([part for part in ast.iter_child_nodes(node) if part not in inner], [])
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bare = [part for part in own_scope(whole) if isinstance(part, ast.Name)]
            made = {part.id for part in bare if isinstance(part.ctx, ast.Store)} if inner else set()
            found |= {part.id for part in bare if isinstance(part.ctx, ast.Load)} - known - made
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                found |= {node.target.id} - known
        known |= bound(whole) if isinstance(whole, ast.stmt) else made
        found |= _read_first(inner, known)
    return found


def _kept(source: str, wanted: set[str], whole: bool) -> str:
    """Of one of the chapter's own cells, the statements that are needed, as source."""
    source = "\n".join(line for line in source.split("\n") if not MAGIC.match(line))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(source).body
        return source if whole else _statements(body, set(wanted))
    except UNPARSABLE:
        return ""


def _statements(body: list[ast.stmt], wanted: set[str]) -> str:
    kept: list[ast.stmt] = []
    made = {name for node in body if not isinstance(node, (ast.Import, ast.ImportFrom)) for name in bound(node)}
    for node in reversed(body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node = _import(node, wanted)
        elif not (bound(node) & wanted or _changes(node) & wanted & made):
            node = None
        if node is not None:
            wanted |= names_of(ast.unparse(node))
            kept.append(node)
    return ast.unparse(ast.Module(kept[::-1], []))


def _import(node: ast.Import | ast.ImportFrom, wanted: set[str]) -> ast.stmt | None:
    names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in wanted or alias.name == "*"]
    if not names:
        return None
    return ast.Import(names) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, names, node.level)


def _changes(node: ast.stmt) -> set[str]:
    """The names of objects that a statement changes: `name.method(…)`, `name.field = …`, `name[0] += …`."""
    parts = [node.value.func] if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else []
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        parts = list(node.targets) if isinstance(node, ast.Assign) else [node.target]
    found = set()
    for part in parts:
        if isinstance(part, (ast.Attribute, ast.Subscript)):
            while isinstance(part, (ast.Attribute, ast.Subscript)):
                part = part.value
            if isinstance(part, ast.Name):
                found.add(part.id)
    return found
