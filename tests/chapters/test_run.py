"""Every chapter, run from top to bottom as a reader runs it, and graded as an instructor grades it: solved it scores all
points, blank it scores none.

The runs are quick ones (PEFTTOOLS_QUICK=1 shortens training, same code path), offline, in a temporary folder. Grading
runs only what a grade needs, in a sandbox where there is one; the run from top to bottom sees the demonstrations too.
"""

from __future__ import annotations

import json
import os
import re
import resource
import time
import zipfile
from pathlib import Path

import pytest

from pefttools.grading.build import run, sources
from pefttools.grading.chapter import dumps, read_chapter
from pefttools.grading import grade
from pefttools.grading.release import release
from pefttools.grading.sandbox import available
from pefttools.grading.source import registry
from pefttools.grading.splice import check_name

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds: "each under 4 minutes on two cores"
QUICK = {"PEFTTOOLS_QUICK": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
         "OMP_NUM_THREADS": "1"}
pytestmark = [pytest.mark.chapter, pytest.mark.nbgrader, pytest.mark.slow]
every_chapter = pytest.mark.parametrize("path", sources(ROOT), ids=lambda path: path.stem)


def executed(notebook, folder, monkeypatch):
    """(the notebook after a run from top to bottom, seconds)

    On a machine that is busy with other things the wall clock says little, and processor time bounds what it would say
    on a quiet one: the lesser of the two counts.
    """
    for name, value in QUICK.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    made = json.loads(dumps(run(notebook, folder, allow_errors=True)))
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{wall:.0f} s, {busy:.0f} s of processor time")
    return made, min(wall, busy)


def graded(path, notebook, folder, artefacts=()):
    """(row of the table, judged notebook) of one hand-in; with the files of its artefacts beside it, in a zip."""
    hand_in = folder / "in" / "reader.ipynb"
    hand_in.parent.mkdir(parents=True)
    hand_in.write_text(dumps(notebook), encoding="utf-8")
    for entry in artefacts:
        with zipfile.ZipFile(hand_in.with_name("reader.zip"), "w") as packed:
            for file in Path(entry.resolve(entry.reference)).iterdir():
                packed.write(file, file.name)
    out = folder / "grading"
    (row,) = grade(hand_in.parent, path.stem, out, root=ROOT, sandbox=available() is None, log=lambda text: None)
    assert row.status == "graded", row.problem
    judged = out / "autograded" / "reader" / path.stem / f"{path.stem[3:]}.ipynb"
    return row, json.loads(judged.read_text(encoding="utf-8"))


def outputs(notebook):
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            yield cell["id"], "".join(cell["source"]), output


def text_of(value):
    return value if isinstance(value, str) else "".join(value)


def errors(notebook):
    return [
        f"{cell}: {output['ename']}: {output['evalue']}\n{source[:400]}"
        for cell, source, output in outputs(notebook)
        if output["output_type"] == "error"
    ]


def scores(notebook):
    """{exercise: the number that its check cell showed}"""
    found = {}
    for cell in notebook["cells"]:
        if check_name(cell):
            shown = [
                float(text_of(o["data"]["text/plain"])) for o in cell["outputs"] if o["output_type"] == "execute_result"
            ]
            found[check_name(cell)] = shown[0] if len(shown) == 1 else shown
    return found


@every_chapter
def test_solved(path, tmp_path, monkeypatch):
    """All points, no error, in time; figures have alt texts. A single line on stderr in a check cell would cost that
    check's points where somebody grades with stock nbgrader."""
    notebook, seconds = executed(read_chapter(path).notebook, tmp_path, monkeypatch)
    assert errors(notebook) == []
    entries = registry(path.stem)
    assert scores(notebook) == {name: entry.points for name, entry in entries.items()}
    assert [cell["id"] for cell in notebook["cells"] if check_name(cell)
            and any(output.get("name") == "stderr" for output in cell["outputs"])] == []
    assert seconds < LIMIT
    pictures = 0
    for cell, _, output in outputs(notebook):
        data = output.get("data", {})
        shown = text_of(data.get("text/html", ""))
        for image in re.findall(r"<img[^>]*>", shown):
            assert re.search(r'alt="[^"]{10,}"', image), f"{cell}: a figure without a text for those who do not see it"
            pictures += 1
        if "image/png" in data:
            assert "<img" in shown, f"{cell}: a bare picture; use show(fig, alt=…)"
        assert "<Figure size" not in text_of(data.get("text/plain", "")), f"{cell}: a bare Matplotlib figure"
    assert pictures


@every_chapter
def test_blank(path, tmp_path, monkeypatch):
    """No points, and no demonstration breaks because an exercise has not been solved."""
    notebook, seconds = executed(release(read_chapter(path)), tmp_path, monkeypatch)
    assert errors(notebook) == []
    assert set(scores(notebook).values()) == {0}
    assert seconds < LIMIT


@every_chapter
@pytest.mark.parametrize("solved", [True, False], ids=["solved", "blank"])
def test_graded(path, solved, tmp_path):
    """In the sandbox, where the chapter's own modules are hidden and the judge draws other inputs than a notebook's."""
    chapter = read_chapter(path)
    artefacts = [entry for entry in registry(path.stem).values() if entry.accepts == "artefact"] if solved else []
    row, notebook = graded(path, chapter.notebook if solved else release(chapter), tmp_path, artefacts)
    points = {name: entry.points for name, entry in registry(path.stem).items()}
    assert scores(notebook) == (points if solved else dict.fromkeys(points, 0))
    by_hand = sum(entry.by_hand for entry in registry(path.stem).values())
    assert (row.score, row.max_score) == (sum(points.values()) if solved else 0, sum(points.values()) + by_hand)
    assert (row.repairs, row.limits) == ([], [])


@every_chapter
def test_a_hand_in_without_metadata_scores_the_same(path, tmp_path):
    """What is left of a solved notebook after a tool that keeps only sources: the splice brings back every answer."""
    from pefttools.grading.splice import splice

    solved, pristine = read_chapter(path).notebook, release(read_chapter(path))
    bare = {"cells": [{"cell_type": cell["cell_type"], "source": cell["source"]} for cell in solved["cells"]]}
    merged, repairs = splice(pristine, bare)
    whole, none = splice(pristine, solved)
    assert dumps(merged) == dumps(whole) and repairs and not none
