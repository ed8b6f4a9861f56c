"""A course of one chapter, cut out of the real chapter 02: four of its exercises, and no demonstrations.

    solutions/02_lora.py ──cells of NAMES──► a temporary course ──build──► course/02_lora/lora.ipynb

9 points: lora-forward 3, count-parameters 2, lora-init 3, one question 1. Short, so that a hundred hand-ins are graded
in minutes; and real: the chapter hides `pefttools.lora` and peft, the one exercise compares values and gradients, the
next whole numbers, the third looks at properties of drawn matrices.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from hostile.entries import NAMES, entries

SOURCE = Path(__file__).resolve().parents[3] / "solutions" / "02_lora.py"
CHAPTER, SHORT = "02_lora", "lora"
IMPORTS = """\
# %%
import math

import torch
import torch.nn.functional as F
from torch import nn

from pefttools.grading import check
"""


def chapter_text() -> str:
    """The chapter's source with these exercises only."""
    head, *cells = re.split(r"(?m)^(?=# %%)", SOURCE.read_text(encoding="utf-8"))
    ours = [cell for cell in cells if re.match(rf'# %%.* (exercise|check|question)="({"|".join(NAMES)})"', cell)]
    return head + IMPORTS + "\n" + "".join(ours)


class Course:
    """The course in `root`: `pristine()` and `solved()` notebooks as dicts, `points` by exercise."""

    port: int | str = "@PORT@"  # of a service of this machine, which nobody inside may reach

    def __init__(self, root: Path) -> None:
        from pefttools.grading.build import build

        self.root = root
        (root / "solutions").mkdir(parents=True)
        (root / "solutions" / f"{CHAPTER}.py").write_text(chapter_text(), encoding="utf-8")
        build(root, entries=entries, log=lambda line: None)
        self._pristine = (root / "course" / CHAPTER / f"{SHORT}.ipynb").read_text(encoding="utf-8")
        self._solved = (root / "solutions" / f"{CHAPTER}.ipynb").read_text(encoding="utf-8")
        self.points = {name: entry.points for name, entry in entries().items()}

    def pristine(self) -> dict[str, Any]:
        """What students get."""
        return _joined(self._pristine)

    def solved(self) -> dict[str, Any]:
        """A hand-in with every answer right."""
        return _joined(self._solved)

    def with_answers(self, answers: dict[str, str], honest: tuple[str, ...] = ()) -> dict[str, Any]:
        """A hand-in with these answers; those of `honest` are solved, the others are stubs."""
        notebook = self.pristine()
        solved = {cell["id"]: cell["source"] for cell in self.solved()["cells"]}
        for cell in notebook["cells"]:
            name = cell["id"]
            if name in answers:
                magic, text = re.match(r"(%%.*\n)?([\s\S]*)", answers[name]).groups()  # a cell's magic comes first
                cell["source"] = f"{magic or ''}# exercise: {name}\n{text}"
            elif name in honest:
                cell["source"] = copy.deepcopy(solved[name])
        return notebook


def _joined(text: str) -> dict[str, Any]:
    """A notebook whose sources are texts: in the file they are lists of lines."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook
