"""Every chapter, run from top to bottom by nbgrader: solved it scores all points, blank it scores none.

One run serves both questions, since a run takes a minute: nbgrader's Execute is nbclient. The runs are quick ones
(PEFTTOOLS_QUICK=1 shortens training, same code path), offline, in a temporary folder.
"""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest

from pefttools.grading.build import sources
from pefttools.grading.chapter import dumps, read_chapter
from pefttools.grading.grade import grade
from pefttools.grading.nbgrader_config import write_config
from pefttools.grading.release import release
from pefttools.grading.source import registry
from pefttools.grading.splice import check_name

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds: "each under 4 minutes on two cores"
pytestmark = [pytest.mark.chapter, pytest.mark.nbgrader, pytest.mark.slow]
every_chapter = pytest.mark.parametrize("path", sources(ROOT), ids=lambda path: path.stem)


def graded(path, notebook, folder, config=""):
    """(row of the table, executed notebook, processor seconds) of one hand-in.

    On a machine that is busy with other things the wall clock says little, and processor time bounds what it would say
    on a quiet one: the lesser of the two is held against LIMIT.
    """
    out = folder / "grading"
    with write_config(ROOT, out).open("a") as file:
        file.write(config)
    hand_in = folder / "in" / "reader.ipynb"
    hand_in.parent.mkdir(parents=True)
    hand_in.write_text(dumps(notebook), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    (row,) = grade(hand_in.parent, path.stem, out, root=ROOT, log=lambda text: None)
    assert row.status == "graded", row.problem
    executed = json.loads(
        (out / "autograded" / "reader" / path.stem / f"{path.stem[3:]}.ipynb").read_text(encoding="utf-8")
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{path.stem}: {row.score:g} of {row.max_score:g} points in {row.seconds:.0f} s, {busy:.0f} s of processor time"
    )
    return row, executed, busy


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
def test_solved(path, tmp_path):
    """All points, no error, in time; figures have alt texts. With nbgrader's own setting for stderr: a single line on
    it in a check cell would cost that check's points here, as it does where somebody grades with stock nbgrader."""
    row, notebook, busy = graded(
        path, read_chapter(path).notebook, tmp_path, config="c.IgnorePattern.enabled = False\n"
    )
    assert errors(notebook) == []
    entries = registry(path.stem)
    assert scores(notebook) == {name: entry.points for name, entry in entries.items()}
    assert row.score == row.max_score == sum(entry.points for entry in entries.values())
    assert row.repairs == []
    assert min(row.seconds, busy) < LIMIT
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
def test_blank(path, tmp_path):
    """No points, and no demonstration breaks because an exercise has not been solved."""
    row, notebook, busy = graded(path, release(read_chapter(path)), tmp_path)
    assert errors(notebook) == []
    assert set(scores(notebook).values()) == {0}
    assert (row.score, row.repairs) == (0, [])
    assert row.max_score == sum(entry.points for entry in registry(path.stem).values())
    assert min(row.seconds, busy) < LIMIT


@every_chapter
def test_a_hand_in_without_metadata_scores_the_same(path, tmp_path):
    """What is left of a solved notebook after a tool that keeps only sources: the splice brings back every answer."""
    from pefttools.grading.splice import splice

    solved, pristine = read_chapter(path).notebook, release(read_chapter(path))
    bare = {"cells": [{"cell_type": cell["cell_type"], "source": cell["source"]} for cell in solved["cells"]]}
    merged, repairs = splice(pristine, bare)
    whole, none = splice(pristine, solved)
    assert dumps(merged) == dumps(whole) and repairs and not none
