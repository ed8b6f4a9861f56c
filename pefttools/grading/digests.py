"""What a grade depends on, as one number: when it is the same, nobody is graded again; when it is not, everybody is.

    the spliced notebook ┐
    the exercises, the modules they compare with, the judge ┤──► digest
    seed, sandbox or not, limits ┘
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from pefttools.grading.exercise import LAZY, Exercise, ExerciseError
from pefttools.grading.stage import PACKAGE, closure, imported

# What decides a verdict; a change in how hand-ins are taken in, run in parallel or reported is no reason to grade anew.
JUDGES = ("artefact", "compare", "exercise", "inside", "judge", "judged", "leaves", "marking", "needed", "plain", "probe",
          "question", "reading", "room", "stage", "wire")


def definitions(entries: dict[str, Exercise]) -> str:
    """A digest of what decides these exercises' verdicts: their module, what it compares with, and the judge."""
    files = {Path(__file__).with_name(f"{name}.py") for name in JUDGES}
    modules: set[str] = set()
    for entry in entries.values():
        works = [entry.reference, *(work for work, _ in entry.mistakes.values()), *entry.alternatives.values()]
        modules |= {work.partition(":")[0] for work in works if type(work) is str and LAZY.fullmatch(work)}
        for part in (entry.probe, entry.inputs):
            try:
                files.add(Path(inspect.getsourcefile(part) or ""))
            except TypeError:
                pass
    for file in list(files):
        if file.is_file() and file.parent.name != "grading":
            tree = ast.parse(file.read_text(encoding="utf-8"))
            modules |= {name for node in ast.walk(tree) for name in imported(node)}
    for name in sorted(modules):
        if name.split(".")[0] != "pefttools" or name.split(".")[:2] == ["pefttools", "grading"]:
            continue
        try:
            for each in closure([name]):
                path = PACKAGE.parent.joinpath(*each.split("."))
                module = path.with_suffix(".py")
                files.add(path / "__init__.py" if path.is_dir() and not module.is_file() else module)
        except (ExerciseError, OSError, SyntaxError):
            continue
    content = hashlib.sha256()
    for file in sorted(files):
        if file.is_file():
            content.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return content.hexdigest()


def digest_of(*parts: Any) -> str:
    """Of the spliced notebook and all else that its grade depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
