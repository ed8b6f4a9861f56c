"""What an import costs, in a process of its own each time: pefttools over torch, and the header of each chapter.

Cold processes in rounds of random order, as in the harness; seconds rather than ratios, since the bounds are seconds.
"Cold" means a new Python; the files are in the operating system's cache from the round before.
"""
from __future__ import annotations

import ast
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pefttools.bench.harness import Ratio, attempt

ROOT = Path(__file__).resolve().parents[2]
OVER_TORCH, HEADER = 0.1, 2.5       # seconds, issue "The library"


def modules() -> list[str]:
    """The files of the library that a reader imports (pefttools.lora, pefttools.nf4, …), without the commands."""
    return sorted(f"pefttools.{path.stem}" for path in (ROOT / "pefttools").glob("*.py")
                  if path.stem not in ("__init__", "__main__", "cli", "workspace"))


def headers() -> dict[str, str]:
    """{chapter: the imports of its header}. The header is the first code cell that imports from pefttools."""
    found = {}
    for path in sorted((ROOT / "course").glob("*/*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        for source in ("".join(cell["source"]) for cell in cells):
            imports = imports_of(source)
            if "pefttools" in imports:
                found[path.parent.name] = imports
                break
    return found


def imports_of(source: str) -> str:
    """The import statements at the top level of a cell; lines of IPython's own (%, !) are left out."""
    plain = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    return "\n".join(ast.unparse(node) for node in ast.parse(plain).body
                     if isinstance(node, (ast.Import, ast.ImportFrom)))


def cold(code: str) -> float:
    """Seconds from the start of a new Python to its end; what `code` prints last instead, if that is a number.

    Raises RuntimeError with the last line that it complained of.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return float(done.stdout.split()[-1]) if done.stdout.strip() else seconds


def after_torch(imports: str) -> str:
    """A program that prints the seconds of these imports alone, with torch there already."""
    return f"import time, torch\nstart = time.perf_counter()\n{imports}\nprint(time.perf_counter() - start)"


def rounds(codes: dict[str, str], n: int, seed: int = 0) -> dict[str, list[float]]:
    """{name: seconds in each of n rounds}, after one round that only fills the caches."""
    for code in codes.values():
        cold(code)
    order, draw = list(codes), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(n):
        draw.shuffle(order)
        for name in order:
            seconds[name].append(cold(codes[name]))
    return seconds


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """The group "imports"."""
    library = {"import pefttools": "import pefttools",
               "every module of the library": "\n".join(f"import {name}" for name in modules())}
    codes = {**{name: after_torch(code) for name, code in library.items()},
             **{f"header of {name}": code for name, code in headers().items()}}
    working = {}
    for name, code in codes.items():
        over = name in library
        row = {"row": f"{name}, torch being there" if over else name, "unit": "s", "sense": "≤",
               "bound": OVER_TORCH if over else HEADER}
        row = attempt(row, lambda: {"once": cold(code)})
        if "missing" in row:
            yield row
        else:
            working[name] = row
    torch = {"torch": "import torch", "torch again": "import torch"}
    seconds = rounds({**torch, **{name: codes[name] for name in working}}, 3 if quick else 11)
    control = Ratio.of([a - b for a, b in zip(seconds["torch again"], seconds["torch"])])
    for name, row in working.items():
        spread = Ratio.of(seconds[name])
        yield {**row, "value": spread.median, "p10": spread.p10, "p90": spread.p90, "low": spread.low,
               "high": spread.high, "rounds": len(seconds[name]), "ms": {
                   "import torch": 1e3 * statistics.median(seconds["torch"]), name: 1e3 * spread.median},
               **({} if name in library else {"control": [control.p10, control.p90]})}
