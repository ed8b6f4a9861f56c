"""Files of rows: JSON Lines, JSON, CSV, Parquet → a list of (where it stands, the row as it is), every damage named.

Nothing is decided here about what a row must have; that is `rows.py`. What is refused is a file that does not say what
its rows are: no JSON, a column that is there twice, a Parquet file that was cut off.
"""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
Found = Iterator[tuple[str, Any]]


def read_file(path: Path) -> list[tuple[str, Any]]:
    """[("line 3", {"instruction": …}), …]: rows of a file by its ending; a damaged row is a string that says how.

    Raises ValueError for another ending, a damaged file, a column twice; OSError where it cannot be read.
    """
    kinds = {".jsonl": json_lines, ".json": json_list, ".csv": comma_separated}
    ending = path.suffix.lower()
    if ending == ".parquet":
        return list(parquet(path))
    if ending not in kinds:
        raise ValueError(f"{path} ends in {ending or 'nothing'}; rows are read from {', '.join(ENDINGS)}.")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 (byte {error.start}): save the file as UTF-8.") from None
    return list(kinds[ending](path, text))


class Twice(ValueError):
    pass


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are all different: json itself lets the last one win."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise Twice(next(name for name in names if names.count(name) > 1))
    return found


def json_lines(path: Path, text: str) -> Found:
    lines = text.split("\n")  # not splitlines: a text may hold a line separator of Unicode
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"line {n}", json.loads(line, object_pairs_hook=once)
        except Twice as error:
            yield f"line {n}", f"has the column {str(error)!r} twice"
        except ValueError as error:
            if n == len(lines) > 1:                            # the last one, and no line end behind it
                raise ValueError(f"{path} ends in the middle of line {n}: it was cut off. Copy or download it again."
                                 ) from None
            yield f"line {n}", f"is no JSON ({error}); one object a line is needed: " \
                               '{"instruction": "…", "output": "…"}'


def json_list(path: Path, text: str) -> Found:
    try:
        found = json.loads(text, object_pairs_hook=once)
    except Twice as error:
        raise ValueError(f"{path} has an object with {str(error)!r} twice.") from None
    except json.JSONDecodeError as error:
        lines = ": one object a line is JSON Lines, whose files end in .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path} is no JSON ({error}){lines}.") from None
    if not isinstance(found, list):
        raise ValueError(f"{path} holds one {type(found).__name__}; a list of objects is needed: [{{…}}, {{…}}].")
    yield from ((f"row {n}", row) for n, row in enumerate(found, 1))


def comma_separated(path: Path, text: str) -> Found:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        check_columns(path, header)
        for row in reader:
            where = f"line {reader.line_num}"
            if [cell.strip() for cell in row] == header:
                yield where, "is the header a second time"
            elif len(row) > len(header):
                yield where, f"has {len(row)} cells for {len(header)} columns: a text with a comma must stand in quotes"
            elif row:
                yield where, dict(zip(header, row))  # a short row lacks its last columns
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is no CSV ({error}).") from None


def parquet(path: Path) -> Found:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        check_columns(path, file.schema_arrow.names)
        n = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                n += 1
                yield f"row {n}", row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no whole Parquet file ({str(error).splitlines()[0]}): copy or download it again."
                         ) from None


def check_columns(path: Path, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has the column {twice[0]!r} twice: which one is meant? Rename one of them.")
