"""The bundled data set of small programming tasks, generated: kinds of task, one family a file.

    python -m pefttools.lab.tasks --write      makes the files in pefttools/lab/data
    python -m pefttools.lab.tasks --check      proves every row by running it, and shows that copying does not pass
    python -m pefttools.lab.tasks --show 3     prints rows of every kind, to be read

To add a kind, put a `Kind` into the list of a family's file (`core.Kind` says what each part is), then --show, --check
and --write.
"""

from __future__ import annotations

from pefttools.lab.tasks import classes, dates, dicts, files, iteration, lists, numbers, sorting, strings, text
from pefttools.lab.tasks.core import Kind

KINDS: tuple[Kind, ...] = tuple(
    kind for family in (strings, text, numbers, lists, dicts, files, dates, classes, iteration, sorting)
    for kind in family.KINDS)

__all__ = ["KINDS", "Kind"]
