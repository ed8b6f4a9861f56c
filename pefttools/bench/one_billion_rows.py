"""The group "one_billion": pefttools.bench.one_billion run by itself, our way (as it comes, and eager) and bitsandbytes'.

Each run is a process of its own, so that its peak memory is its own; the ways take turns in rounds of random order.
Seconds are those of quantizing and of the first step together; peak memory is the whole process's, imports and all.
"""
from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from pefttools.bench.harness import Ratio, attempt

WAYS = {"ours": [], "ours, eager": ["--eager"], "bitsandbytes + peft": ["--with", "bitsandbytes"]}
SECONDS, GIGABYTES = 8.0, 3.0       # on two cores, issue "The library"
SMALL = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 8, "vocab_size": 512}


def once(way: str, threads: int, quick: bool) -> dict[str, Any]:
    """One run's figures. Raises RuntimeError with the last line that the process complained of."""
    command = [sys.executable, "-m", "pefttools.bench.one_billion", "--threads", str(threads), *WAYS[way]]
    command += ["--shape", json.dumps(SMALL)] if quick else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def rows(quick: bool = False, rounds: int = 5) -> Iterator[dict[str, Any]]:
    """Two rows a way: seconds, and peak memory. The bounds are for two threads and the full size."""
    threads = int(os.environ.get("OMP_NUM_THREADS", 2))
    bounded = threads == 2 and not quick
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    broken: dict[str, dict[str, Any]] = {}
    order, draw = list(WAYS), random.Random(0)
    for _ in range(1 if quick else rounds):
        draw.shuffle(order)
        for way in order:
            if way not in broken:
                found = attempt({}, lambda: once(way, threads, quick))
                broken.update({way: found} if "missing" in found else {})
                runs[way].append(found)
    theirs = runs["bitsandbytes + peft"] if "bitsandbytes + peft" not in broken else []
    for way, done in runs.items():
        ours = way.startswith("ours")
        for name, key, unit, bound in (("quantize and one step", "total_s", "s", SECONDS),
                                       ("peak memory of the process", "peak_rss_gb", "GB", GIGABYTES)):
            row = {"row": f"{way}: {name}", "unit": unit, "sense": "≤", "bound": bound if ours and bounded else None}
            if way in broken:
                yield {**row, "missing": broken[way]["missing"]}
                continue
            spread = Ratio.of([run[key] for run in done])
            beside = {} if not ours or not theirs else {
                "× bitsandbytes + peft": statistics.median(a[key] / b[key] for a, b in zip(done, theirs))}
            parts = {part[:-2]: 1e3 * statistics.median(run[part] for run in done)
                     for part in ("build_s", "quantize_s", "attach_s", "step_s")} if key == "total_s" else {}
            yield {**row, "value": spread.median, "p10": spread.p10, "p90": spread.p90, "low": spread.low,
                   "high": spread.high, "rounds": len(done), "beside": beside, **({"ms": parts} if parts else {})}
