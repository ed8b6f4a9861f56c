"""What the course brings along: the bundled model and the bundled data, readable and whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

from pefttools.doctor.report import Row

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(__file__).resolve().parents[1] / "lab"


def damaged(check: str, folder: Path, found: str) -> list[Row]:
    where = folder.relative_to(ROOT).as_posix() if ROOT in folder.parents else str(folder)
    todo = f"restore it: git checkout -- {where} (or clone the repository again)"
    return [Row(check, "problem", found, todo, stops=True)]


def model_rows(folder: Path = LAB / "tiny") -> list[Row]:
    """The bundled model's files against their checksums, and its weights' header."""
    from safetensors import SafetensorError, safe_open

    check = "bundled model"
    try:
        sums = json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
        for file, digest in sums.items():
            if hashlib.sha256((folder / file).read_bytes()).hexdigest() != digest:
                return damaged(check, folder, f"{file} is damaged: its checksum is another")
        with safe_open(folder / "model.safetensors", framework="numpy") as weights:
            tensors = len(list(weights.keys()))
    except FileNotFoundError as e:
        return damaged(check, folder, f"{Path(e.filename or 'model.safetensors').name} is missing")
    except (OSError, ValueError, AttributeError, SafetensorError) as e:
        return damaged(check, folder, f"cannot be read ({type(e).__name__}: {e})")
    size = sum((folder / file).stat().st_size for file in sums)
    return [Row(check, "ok", f"{tensors} tensors, {size / 1e6:.1f} MB, checksums hold")]


def data_rows(folder: Path = LAB / "data") -> list[Row]:
    """The bundled data set's files: there, not empty, and of JSON Lines the first and the last row can be read."""
    check, rows = "bundled data", 0
    tables = [p for p in sorted(folder.iterdir()) if re.search(r"\.jsonl(\.gz)?$", p.name)] if folder.is_dir() else []
    if not tables:
        return damaged(check, folder, "is missing")
    for file in tables:
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as f:
                lines = f.readlines()
            for line in (lines[0], lines[-1]):
                json.loads(line)["instruction"]
        except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError) as e:
            return damaged(check, folder, f"{file.name} cannot be read ({type(e).__name__})")
        rows += len(lines)
    return [Row(check, "ok", f"{rows:,} rows in {len(tables)} file{'' if len(tables) == 1 else 's'}")]
