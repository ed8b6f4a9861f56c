"""Small notebooks for the tests of judging: exercises that need little, and a notebook made of answers."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import torch
from nbformat.v4 import new_code_cell, new_notebook

from pefttools.grading.exercise import Exercise
from pefttools.grading.question import Question

CHAPTER = "01_small"


def numbers(rng):
    return [{"n": int(torch.randint(1, 10_000, (), generator=rng))} for _ in range(3)]


def twice_probe(work, case):
    return {"twice": work(case["n"])}


def tensors(rng):
    return [{"x": torch.randn(3, 4, generator=rng)} for _ in range(2)]


def negate_probe(work, case):
    return {"output": work(case["x"])}


def scale_inputs(rng):
    return [{"x": torch.randn(4, generator=rng)}]


def folder_probe(folder, case):
    """Loads what the work saved; never a pickle."""
    from safetensors.torch import load_file

    settings = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
    weight = load_file(Path(folder) / "weights.safetensors")["w"]
    return {"rank": settings["r"], "output": weight @ case["x"]}


def _right_folder():
    import tempfile

    from safetensors.torch import save_file

    folder = Path(tempfile.mkdtemp())
    save_file({"w": torch.eye(4) * 3}, folder / "weights.safetensors")
    (folder / "settings.json").write_text('{"r": 2}')
    return str(folder)


TWICE = Exercise(name="twice", chapter=CHAPTER, title="Twice", points=2, minutes=1, difficulty=1, inputs=numbers,
                 probe=twice_probe, reference=lambda n: 2 * n,
                 mistakes={"thrice": (lambda n: 3 * n, "That is three times.")})
NEGATE = Exercise(name="negate", chapter=CHAPTER, title="Negate", points=3, minutes=1, difficulty=1, inputs=tensors,
                  probe=negate_probe, reference=lambda x: -x)
SAVED = Exercise(name="saved", chapter=CHAPTER, title="Saved", points=4, minutes=1, difficulty=1, inputs=scale_inputs,
                 probe=folder_probe, reference=_right_folder(), accepts="artefact",
                 files=("weights.safetensors", "settings.json"))
LETTER = Question(name="letter", chapter=CHAPTER, points=1, text="Which?", right="b",
                  options={"a": ("this", "No."), "b": ("that", "Yes.")})
ENTRIES = {entry.name: entry for entry in (TWICE, NEGATE, SAVED, LETTER)}

RIGHT = {"twice": "def twice(n):\n    return 2 * n", "negate": "def negate(x):\n    return -x", "letter": "letter = 'b'"}
WORK = {"saved": "saved"}


def notebook(answers, before="import torch"):
    """A spliced notebook: one answer cell and one check cell for each entry of {exercise: source}."""
    cells = [new_code_cell(before, id="setup")] if before else []
    for name, source in answers.items():
        cells.append(new_code_cell(source, id=name, metadata={"nbgrader": {
            "grade_id": name, "solution": True, "grade": False, "locked": False, "schema_version": 3, "task": False}}))
        cells.append(new_code_cell(f'check("{name}", {WORK.get(name, name)})', id=f"check-{name}", metadata={"nbgrader": {
            "grade_id": f"check-{name}", "solution": False, "grade": True, "locked": True, "schema_version": 3,
            "task": False, "points": ENTRIES[name].points if name in ENTRIES else 1}}))
    return nbformat.from_dict(new_notebook(cells=cells))


def judged(answers, before="import torch", **traits):
    """The notebook after JudgedExecute."""
    from pefttools.grading.judged import JudgedExecute

    made = JudgedExecute(entries=traits.pop("entries", ENTRIES), **traits)
    return made.preprocess(notebook(answers, before), {})[0]


def points(nb):
    """{exercise: points}, as nbgrader reads them."""
    from nbgrader.utils import determine_grade

    return {cell.metadata.nbgrader.grade_id.removeprefix("check-"): determine_grade(cell)[0]
            for cell in nb.cells if cell.metadata.get("nbgrader", {}).get("grade")}


def shown(nb, name):
    """The HTML of a verdict."""
    (cell,) = [cell for cell in nb.cells if cell.id == f"check-{name}"]
    (output,) = cell.outputs
    assert output.output_type == "execute_result" and set(output.data) == {"text/plain", "text/html"}
    return output.data["text/html"]


def outputs(nb, name):
    (cell,) = [cell for cell in nb.cells if cell.id == name]
    return cell.outputs
