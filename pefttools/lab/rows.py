"""Rows to fine-tune on, from wherever they are, and what is wrong with them, all of it at once.

    "train"                              a split of the course's data
    "mine.jsonl" .json .csv .parquet     a file                                        (rows_files.py)
    "hub:owner/name@revision:file"       a data set of the hub; revision and file may be missing  (rows_hub.py)
    [{"instruction": …}, …]              rows, or a datasets.Dataset

A row is {"instruction": text, "input": text or missing, "output": text}; other columns are left alone. What cannot be
used is counted by its fault, with the first place of each; that stops everything, or (skip_bad) the rest is used.
"""
from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FIELDS = ("instruction", "input", "output")
NEEDED = ("instruction", "output")


class Faults:
    """What is wrong with rows: {fault: [how many, where the first one is]}."""

    def __init__(self, where: str) -> None:
        self.where, self.found = where, {}

    def add(self, place: str, fault: str, kind: str | None = None) -> None:
        entry = self.found.setdefault(kind or fault, [0, place, fault])
        entry[0] += 1

    @property
    def count(self) -> int:
        return sum(entry[0] for entry in self.found.values())

    def __str__(self) -> str:
        return "; ".join(f"{place} {fault}" + (f" (and {n - 1:,} more like it)" if n > 1 else "")
                         for n, place, fault in self.found.values())

    def settle(self, total: int, skip: bool, say: Any = None) -> None:
        """Nothing where there are none; ValueError, or with `skip` a sentence to `say`, where there are."""
        if not self.found:
            return
        if self.count >= total:
            raise ValueError(f"{self.where}: none of the {total:,} rows can be used: {self}.")
        if not skip:
            raise ValueError(f"{self.where}, {self}. {self.count:,} of {total:,} rows cannot be used; skip_bad "
                             "(--skip-bad) leaves them out.")
        if say:
            say(f"Left out: {self.count:,} of {total:,} rows of {self.where}: {self}.")


def read_rows(data: Any, columns: Mapping[str, str] | None = None, skip_bad: bool = False, say: Any = None
              ) -> list[dict[str, str]]:
    """The rows of `data` (see above) as {"instruction", "input", "output"}, all texts, none of the needed ones empty.

    columns: {"output": "answer"} where the columns have other names. skip_bad: leave out what cannot be used, and `say`
    (a function of a sentence) how many. Raises ValueError for a source that does not exist, a missing column (with the
    nearest name that is there), and rows that cannot be used.
    """
    where, found = source(data)
    if not found:
        raise ValueError(f"{where} holds no rows.")
    names = {name: name for name in FIELDS} | check_mapping(columns or {})
    check_header(where, found, names)
    faults, rows = Faults(where), []
    for place, row in found:
        if fault := fault_of(row, names):
            faults.add(place, fault, fault if isinstance(row, Mapping) else fault.split("(")[0])
        else:
            rows.append({name: row.get(names[name]) or "" for name in FIELDS})
    faults.settle(len(found), skip_bad, say)
    return rows


def source(data: Any) -> tuple[str, list[tuple[str, Any]]]:
    """(what to call it, [(place, row)]) of anything that `read_rows` takes."""
    if not isinstance(data, (str, Path)):
        if isinstance(data, Mapping) or not isinstance(data, Iterable):
            raise ValueError(f"data: a list of rows is needed, or a name; got a {type(data).__name__}.")
        return "the rows given", [(f"row {n}", row) for n, row in enumerate(data, 1)]
    if str(data).startswith("hub:"):
        from pefttools.lab.rows_hub import fetch
        from pefttools.lab.rows_files import read_file

        files = fetch(str(data))
        return str(data), [(f"{path.name}, {place}" if len(files) > 1 else place, row)
                           for path in files for place, row in read_file(path)]
    from pefttools.lab.data import SPLITS, load_rows

    path = Path(data)
    if str(data) in SPLITS and not path.is_file():
        return f"the split {data}", [(f"row {n}", row) for n, row in enumerate(load_rows(str(data)), 1)]
    if not path.is_file():
        near = difflib.get_close_matches(str(data), SPLITS, n=1)
        raise ValueError(f"--data {data}: no such file, and no split; " + (f"did you mean {near[0]}? " if near else "")
                         + f"the splits are {', '.join(SPLITS)}, and a data set of the hub is hub:owner/name.")
    from pefttools.lab.rows_files import read_file

    try:
        return str(path), read_file(path)
    except OSError as error:
        raise ValueError(f"--data {data} cannot be read ({error.strerror or error}).") from None


def check_mapping(columns: Mapping[str, str]) -> dict[str, str]:
    for name in columns:
        if name not in FIELDS:
            raise ValueError(f"columns: {name!r} is none of {', '.join(FIELDS)}; it is instruction=YOUR_COLUMN, not "
                             "the other way round.")
    return dict(columns)


def check_header(where: str, found: list[tuple[str, Any]], names: Mapping[str, str]) -> None:
    """ValueError if a needed column is in none of the first rows: that is a question about the whole, not of a row."""
    some = [row for _, row in found[:1000] if isinstance(row, Mapping)]
    there = list(dict.fromkeys(key for row in some for key in row))
    for name in names:
        if some and names[name] not in there and (name in NEEDED or names[name] != name):
            near = difflib.get_close_matches(names[name], map(str, there), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(map(str, there)) or "none"
            raise ValueError(f"{where} has no column {names[name]!r}; {hint}It has {known}. A row needs "
                             f"instruction and output (and may have input); other names are given "
                             f"with --columns {name}=YOUR_COLUMN.")


def fault_of(row: Any, names: Mapping[str, str]) -> str:
    """What is wrong with a row, as the end of a sentence that begins with its place; empty if nothing is."""
    if isinstance(row, str):
        return row                                             # the reader's own words
    if not isinstance(row, Mapping):
        return f"is a {type(row).__name__}, not an object with columns"
    for name in FIELDS:
        value = row.get(names[name])
        if value is None and name not in NEEDED:
            continue
        if not isinstance(value, str):
            what = "missing" if value is None else f"of type {type(value).__name__}"
            return f"has no text in {names[name]!r}: it is {what}"
        if name in NEEDED and not value.strip():
            return f"has an empty {names[name]!r}"
    return ""
