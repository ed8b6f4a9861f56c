"""A submitted file as a list of cells, whatever wrote it; or one sentence on why it is no notebook.

    bytes ──a regular file? small enough? text? JSON? cells?──► {"cells": [{"cell_type", "source", …}, …], …}

Nothing here raises anything but `BadSubmission` on what a file contains, and time and memory are linear in its size.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

LIMIT = 50 * 2**20  # bytes; a chapter is some 60 kB, one with every figure in it a few MB
CELLS_LIMIT = 5_000
PARTS_LIMIT = 5_000_000  # commas and brackets: a million empty lists take more memory than any figure


class BadSubmission(ValueError):
    """A file from which no answers can be taken; the message is one sentence for the student and the instructor."""


def read_notebook(path: str | Path, limit: int = LIMIT, name: str | None = None) -> dict[str, Any]:
    """The notebook in a file as a dict with a list of cells, whatever its format version.

    Tolerates a byte-order mark, UTF-16, and notebooks of format 3 and older. Raises `BadSubmission` for what is no
    notebook; `name` is what messages call the file. A pipe or a device is refused without being opened for long.
    """
    path = Path(path)
    name = name or path.name.encode("utf-8", "replace").decode("utf-8")
    data = _read(path, limit, name)
    if not data.strip():
        raise BadSubmission(f"{name} is empty.")
    if data[:4] == b"PK\x03\x04":
        raise BadSubmission(f"{name} is a zip archive, not a notebook; unpack it first.")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    parts = data.count(b",") + data.count(b"[") + data.count(b"{")
    if parts > PARTS_LIMIT:
        raise BadSubmission(f"{name} consists of more than {PARTS_LIMIT:,} parts. Clear the outputs, hand it in again.")
    try:
        found = json.loads(data.decode(encoding, errors="replace"))
        if isinstance(found, str) and found.lstrip()[:1] == "{":  # saved as a text in JSON
            found = json.loads(found)
    except (RecursionError, MemoryError) as error:
        raise BadSubmission(f"{name} is nested too deeply to be a notebook.") from error
    except ValueError as error:
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise BadSubmission(f"{name} is not a notebook: its JSON is broken{where}. Download it again.") from error
    if not isinstance(found, dict):
        raise BadSubmission(f"{name} is JSON, but not a notebook.")
    cells = found.get("cells")
    sheets = found.get("worksheets")
    if not isinstance(cells, list) and isinstance(sheets, list):  # format 3 and older
        cells = [
            cell
            for sheet in sheets
            if isinstance(sheet, dict) and isinstance(sheet.get("cells"), list)
            for cell in sheet["cells"]
        ]
    if not isinstance(cells, list):
        raise BadSubmission(f"{name} is JSON, but not a notebook: it has no list of cells.")
    if len(cells) > CELLS_LIMIT:
        raise BadSubmission(f"{name} has {len(cells)} cells; the limit is {CELLS_LIMIT}.")
    return {**found, "cells": cells}


def _read(path: Path, limit: int, name: str) -> bytes:
    try:
        # A pipe that nobody writes to must not hold up a class.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadSubmission(f"{name} is not a file.")
            if status.st_size <= limit:
                return file.read(limit + 1)[: limit + 1]
            raise BadSubmission(
                f"{name} has {status.st_size / 2**20:.0f} MiB; the limit is {limit / 2**20:.0f} MiB. "
                "Clear the outputs and hand it in again."
            )
    except FileNotFoundError as error:
        raise BadSubmission(f"{name} does not exist.") from error
    except IsADirectoryError as error:
        raise BadSubmission(f"{name} is not a file.") from error
    except (OSError, ValueError, MemoryError) as error:
        if isinstance(error, BadSubmission):
            raise
        raise BadSubmission(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def cell_source(cell: Any) -> str | None:
    """A cell's text whatever form it has (string, list of lines, format 3's `input`); None if there is none."""
    if not isinstance(cell, dict):
        return None
    source = cell.get("source", cell.get("input"))
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str):
        return None
    source = source.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    return source.encode("utf-8", errors="replace").decode("utf-8")  # half a surrogate pair cannot be written to a file
