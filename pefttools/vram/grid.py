"""The formula beside the simulator over a grid: `python -m pefttools.vram.grid` writes docs/vram_grid.md.

    error = formula / simulator − 1, of Memory.total, the peak of max_memory_allocated()

The simulator takes seconds for each, two at a time; what was simulated is kept in a file, so that a run that was cut
off goes on, and one after a change of the formula alone is done at once. A change of the simulator's files starts
afresh.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from pefttools.vram.grid_jobs import grid, key
from pefttools.vram.job import Job
from pefttools.vram.units import gib

DOCS = Path(__file__).parents[2] / "docs" / "vram_grid.md"
# of pefttools/vram, what the simulator does not need
FORMULA = ("formula", "terms", "grid", "units", "counts", "shape", "planner", "published", "rivals", "report", "plan",
           "costs", "reasons", "largest", "serving", "space", "verdict", "command", "measure", "lengths")
WORST = 10


def simulator_version() -> str:
    """A digest of the files that the simulator's answer depends on, and of the libraries it runs."""
    import peft
    import torch
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__} {peft.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.stem.startswith(FORMULA):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def simulated(name: str, job: Job) -> dict[str, Any]:
    """What the simulator says of one configuration, as JSON has it."""
    import torch

    from pefttools.vram.simulator import simulate

    torch.set_num_threads(1)
    start = time.perf_counter()
    memory = simulate(job)
    return {"key": name, "total": memory.total, "reserved": memory.reserved, "terms": memory.terms,
            "peak_at": memory.peak_at, "trainable": memory.trainable, "parameters": memory.parameters,
            "seconds": round(time.perf_counter() - start, 1)}


def run(jobs: Iterable[tuple[str, Job]], cache: Path, workers: int = 2,
        keep: bool = False) -> dict[str, dict[str, Any]]:
    """{key: what the simulator says}, from the cache where it is there. `keep`: from older simulators, too."""
    from tqdm.auto import tqdm

    version, known = simulator_version(), {}
    if cache.is_file():
        for line in cache.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if keep or row["version"] == version:
                known[row["key"]] = row
    todo = [(key(job), job) for _, job in jobs if key(job) not in known]
    random.Random(0).shuffle(todo)                       # every group early, and a time left that can be believed
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool, \
            open(cache, "a", encoding="utf-8") as file:
        started = {pool.submit(simulated, name, job): name for name, job in todo}
        for future in tqdm(as_completed(started), total=len(todo), desc="simulating", disable=not todo):
            row = future.result() | {"version": version}
            known[row["key"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return known


def compare(jobs: list[tuple[str, Job]], known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each configuration: group, key, formula, simulator, error."""
    from pefttools.vram.formula import estimate

    rows = []
    for group, job in jobs:
        name = key(job)
        said, memory = known[name], estimate(job)
        rows.append({"group": group, "key": name, "formula": memory.total, "simulator": said["total"],
                     "error": memory.total / said["total"] - 1, "at": memory.peak_at, "simulator_at": said["peak_at"],
                     "reserved": memory.reserved / said["reserved"] - 1, "seconds": said["seconds"],
                     "counts": (memory.trainable, memory.parameters) == (said["trainable"], said["parameters"])})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The page: by group, the worst, all."""
    def line(name: str, some: list[dict[str, Any]]) -> str:
        errors = [abs(row["error"]) for row in some]
        reserved = [abs(row["reserved"]) for row in some]
        return (f"| {name} | {len(some)} | {statistics.median(errors):.2%} | {_quantile(errors, 0.95):.2%} | "
                f"{max(errors):.2%} | {statistics.median(reserved):.1%} | {max(reserved):.0%} |")

    groups = dict.fromkeys(row["group"] for row in rows)
    worst = sorted(rows, key=lambda row: -abs(row["error"]))[:WORST]
    text = ["# The formula beside the simulator", "",
            "Written by `python -m pefttools.vram.grid`. The error is formula / simulator − 1 of the peak of "
            "`max_memory_allocated()`; the last two columns are the same of `max_memory_reserved()`, for which the "
            "formula has only a stated margin (`pefttools/vram/terms/margin.py`) and the simulator replays the allocator.", "",
            "| group | configurations | median | 95 % within | worst | reserved, median | reserved, worst |",
            "|---|---|---|---|---|---|---|",
            *(line(group, [row for row in rows if row["group"] == group]) for group in groups),
            line("**all**", rows), "",
            f"Trainable and total parameters of formula and simulator agree in {sum(row['counts'] for row in rows)} of "
            f"{len(rows)} configurations.", "", f"## The {len(worst)} worst", "",
            "| configuration | formula | simulator | error | formula's moment | simulator's moment |",
            "|---|---|---|---|---|---|",
            *(f"| {row['key']} | {gib(row['formula'], 2)} | {gib(row['simulator'], 2)} | {row['error']:+.2%} | "
              f"{row['at']} | {row['simulator_at']} |" for row in worst), "", "## All", "",
            "| configuration | formula | simulator | error |", "|---|---|---|---|",
            *(f"| {row['key']} | {gib(row['formula'], 2)} | {gib(row['simulator'], 2)} | {row['error']:+.2%} |"
              for row in rows), ""]
    return "\n".join(text)


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pefttools.vram.grid", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS, help="the page to write (default: docs/vram_grid.md)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "pefttools_vram_grid.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of a group's name or of a configuration's words")
    parser.add_argument("--keep", action="store_true", help="use what older versions of the simulator said, too")
    given = parser.parse_args(arguments)
    jobs = [(group, job) for group, job in grid() if given.only in group or given.only in key(job)]
    if not jobs:
        parser.error(f"--only {given.only!r} leaves nothing of the grid.")
    rows = compare(jobs, run(jobs, given.cache, given.workers, given.keep))
    page = table(rows)
    if not given.only:
        given.out.write_text(page, encoding="utf-8")
    print(page.split("## All")[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
