"""What a GPU measured: torch.cuda's own counters by phase, appended to a table with the device's name.

    with measure("qlora, batch 4", job, table="measured.csv") as m:          a row when the block ends
        with m.phase("build"):
            model = …
        with m.phase("step"):                                               its own peak: the counters start anew
            train_one_step()
    m.peak_allocated, m.peak_reserved                                       bytes, over all of it

    driver's view    total_memory ├── context ──┤├──────────── reserved ────────────┤├── free ──┤
    torch's view                                 ├── allocated ──┤ rounding, unused

max_memory_allocated is `Memory.total`, max_memory_reserved is `Memory.reserved`, and what the driver calls used
beyond the reserved (`outside`) is the context plus what other processes hold. Running out of memory is a result as
well: the row says "oom", and the exception goes on.

Without a GPU there is nothing to measure: `measure` raises NoGPU, which says so. With missing="skip" it prints that
sentence, lets the block run (on the CPU, uncounted) and writes no row. A grid of runs: `python -m
pefttools.vram.measurement --grid` (measured_grid.py). None of this could be run on a GPU where it was written; the
tests play torch.cuda.
"""
from __future__ import annotations

import csv
import datetime
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pefttools.vram.job import Job, among

COLUMNS = ("when", "name", "device", "capability", "total_memory", "torch", "cuda", "transformers", "outcome",
           "allocated_before", "peak_allocated", "peak_reserved", "outside", "seconds", "phases", "job")


class NoGPU(RuntimeError):
    """There is no GPU to measure on."""


def gpu_missing() -> str:
    """Why nothing can be measured here, as a sentence; empty where it can."""
    import torch

    if torch.cuda.is_available():
        return ""
    why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
    return f"There is no GPU to measure on ({why}): simulate(…) computes the same figures, and on Colab a T4 is free."


@dataclass
class Measurement:
    """Counters of one block. Bytes; `phases`: [{phase, start, end, peak_allocated, peak_reserved, seconds}]."""

    name: str
    job: Job | None = None
    device: str = ""
    capability: str = ""
    total_memory: int = 0
    outcome: str = "ok"                # "ok", "oom", "error: …", "no gpu"
    allocated_before: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    outside: int = 0                   # the driver's used memory that torch did not reserve: contexts, other processes
    seconds: float = 0.0
    phases: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the block with a peak of its own. Phases follow each other; one inside another is refused."""
        if getattr(self, "_open", None):
            raise ValueError(
                f"phase {name!r} inside of phase {self._open!r}: end one before the next, the peak counters are one."
            )
        self._open = name
        begin, start = time.perf_counter(), 0
        if self.outcome != "no gpu":
            import torch

            self._collect()
            start = torch.cuda.memory_allocated()
        try:
            yield
        finally:
            self._open = None
            row: dict[str, Any] = {"phase": name, "start": start, "end": 0, "peak_allocated": 0, "peak_reserved": 0}
            if self.outcome != "no gpu":
                import torch

                peak = self._collect()
                row |= {"end": torch.cuda.memory_allocated(), "peak_allocated": peak[0], "peak_reserved": peak[1]}
            self.phases.append(row | {"seconds": round(time.perf_counter() - begin, 3)})

    def _collect(self) -> tuple[int, int]:
        """Peaks since the last call; the counters start anew."""
        import torch

        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self.peak_allocated, self.peak_reserved = max(self.peak_allocated, peak[0]), max(self.peak_reserved, peak[1])
        torch.cuda.reset_peak_memory_stats()
        return peak

    def row(self) -> dict[str, Any]:
        """As the table has it."""
        import torch
        import transformers

        from pefttools.vram.plan_text import job_dict

        return {
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "name": self.name,
            "device": self.device,
            "capability": self.capability,
            "total_memory": self.total_memory,
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "",
            "transformers": transformers.__version__,
            "outcome": self.outcome,
            "allocated_before": self.allocated_before,
            "peak_allocated": self.peak_allocated,
            "peak_reserved": self.peak_reserved,
            "outside": self.outside,
            "seconds": round(self.seconds, 2),
            "phases": json.dumps(self.phases),
            "job": json.dumps(job_dict(self.job), sort_keys=True) if self.job else "",
        }


@contextmanager
def measure(
    name: str, job: Job | None = None, table: str | Path | None = None, *, missing: str = "raise"
) -> Iterator[Measurement]:
    """Count what the block takes on the current GPU; with `table`, append a row to that CSV file.

    What was allocated before the block is counted too (it is on the device); `allocated_before` says how much it was.
    Raises NoGPU without a GPU, unless missing="skip"; ValueError if `table` is another kind of file.
    """
    among("missing", missing, ("raise", "skip"))
    if sentence := gpu_missing():
        if missing == "raise":
            raise NoGPU(sentence)
        print(sentence)
        yield Measurement(name, job, outcome="no gpu")
        return
    import torch

    if table is not None:
        check_table(Path(table))
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = Measurement(name, job, torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability())),
                        properties.total_memory)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found.allocated_before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    try:
        yield found
    except torch.cuda.OutOfMemoryError:
        found.outcome = "oom"
        raise
    except BaseException as error:
        found.outcome = f"error: {type(error).__name__}"
        raise
    finally:
        found._collect()
        free, total = torch.cuda.mem_get_info()
        found.outside = max(0, total - free - torch.cuda.memory_reserved())
        found.seconds = time.perf_counter() - begin
        if table is not None:
            append(Path(table), found.row())


# ------------------------------------------------------------------------------------------------ the table

def check_table(path: Path) -> None:
    """Raise ValueError if a file is there that is no table of measurements."""
    if path.exists() and path.stat().st_size:
        with path.open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
        if tuple(header) != COLUMNS:
            raise ValueError(
                f"{path} is no table of measurements of this version: its columns are {', '.join(header[:6])} … "
                f"and should be {', '.join(COLUMNS[:6])} …. Name another file."
            )


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, the header first in a new file; one process at a time, each row written whole."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        check_table(path)
        new = not path.exists() or not path.stat().st_size
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The rows, numbers as numbers, `phases` and `job` as data. A last row that was cut off by a kill is left out."""
    path = Path(path)
    if not path.exists():
        return []
    check_table(path)
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                numbers = {
                    key: int(row[key])
                    for key in ("total_memory", "allocated_before", "peak_allocated", "peak_reserved", "outside")
                }
                rows.append({**row, **numbers, "seconds": float(row["seconds"]), "phases": json.loads(row["phases"]),
                             "job": json.loads(row["job"]) if row["job"] else None})
            except (TypeError, ValueError):
                continue
    return rows


if __name__ == "__main__":
    from pefttools.vram.measured_grid import main

    sys.exit(main())
