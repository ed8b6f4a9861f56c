"""Submissions graded in a minute: this course's grader, sandbox and judge on, beside stock `nbgrader autograde`.

    one class, the same spliced notebooks
      ├── nbgrader autograde, its defaults: whole notebooks, one after the other          ─► per minute
      ├── nbgrader autograde, the same without what no grade needs (`needed.py`)          ─► per minute
      └── pefttools grade: a sandbox for each, judged outside, N at a time                ─► per minute

All on 2 and on 4 cores (the process is bound to them), in the same run. The second says what comes from running in
parallel, and what from leaving out demonstrations and training. Stock gets a time limit that does not fail honest
work, and takes a sample of the class: it is serial, so its rate does not depend on how many there are. What is counted
is the whole command, start and report included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHAPTER = "02_lora"
STOCK = """\
c = get_config()
c.CourseDirectory.root = {root!r}
c.CourseDirectory.course_id = "peft"
c.Execute.timeout = 600
"""
ENVIRONMENT = {"PEFTTOOLS_QUICK": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false"}


def make_class(folder: Path, students: int, seed: int) -> Any:
    """Solved and partly solved hand-ins of the chapter; every one runs through. Returns the chapter."""
    from pefttools.grading.build import find_root, sources
    from pefttools.grading.chapter import dumps, read_chapter
    from pefttools.grading.release import release
    from pefttools.grading.splice import answer_names

    (path,) = sources(find_root(), [CHAPTER])
    chapter = read_chapter(path)
    blank, draw = release(chapter), random.Random(seed)
    names = answer_names(blank)
    answers = {cell["id"]: cell["source"] for cell in chapter.notebook["cells"] if cell["id"] in names}
    for number in range(students):
        chosen = names if number % 2 == 0 else [name for name in names if draw.random() < 0.7]
        made = json.loads(dumps(blank))
        for cell in made["cells"]:
            if cell["id"] in chosen:
                cell["source"] = f"{answers[cell['id']]}\n# student {number}"
        target = folder / f"s{number:03d}" / chapter.name / f"{chapter.short}.ipynb"
        target.parent.mkdir(parents=True)
        target.write_text(dumps(made), encoding="utf-8")
    return chapter


def lean(notebook: Any) -> Any:
    """The notebook without the chapter's own code that no answer needs."""
    from pefttools.grading.needed import plan

    kept = {step.cell: step.source for step in plan(notebook) if step.kind == "demonstration"}
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code" and "nbgrader" not in cell["metadata"]:
            cell = {**cell, "source": kept.get(number, "")}
        cells.append(cell)
    first = next(cell for cell in cells if cell["cell_type"] == "code" and "nbgrader" not in cell["metadata"])
    first["source"] = f"from pefttools.grading import check\n{first['source']}"
    return {**notebook, "cells": cells}


def timed(command: list[str], folder: Path, cores: int, one_thread: bool) -> float:
    """Seconds that a command takes, bound to the first so many of this process's processors."""
    from pefttools.grading.nbgrader_config import paths

    mine = sorted(os.sched_getaffinity(0))[:cores]
    env = {**os.environ, **paths(), **ENVIRONMENT}
    env.pop("OMP_NUM_THREADS", None)
    if one_thread:
        env["OMP_NUM_THREADS"] = "1"
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True,
                          preexec_fn=lambda: os.sched_setaffinity(0, mine))
    took = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … ended with {done.returncode}: {done.stderr[-800:]}")
    return took


def stock(base: Path, class_: Path, chapter: Any, sample: int, cores: int, whole: bool) -> dict[str, Any]:
    """`nbgrader autograde` on the first `sample` hand-ins, in a course folder of nbgrader's own layout."""
    from pefttools.grading.chapter import dumps

    root = base / f"stock-{cores}-{whole}"
    source = root / "source" / chapter.name / f"{chapter.short}.ipynb"
    source.parent.mkdir(parents=True)
    source.write_text(dumps(chapter.notebook), encoding="utf-8")
    (root / "nbgrader_config.py").write_text(STOCK.format(root=str(root)))
    nbgrader = [sys.executable, "-m", "nbgrader"]
    timed([*nbgrader, "generate_assignment", chapter.name], root, cores, one_thread=False)
    for path in sorted(class_.glob("*/*/*.ipynb"))[:sample]:
        target = root / "submitted" / path.relative_to(class_)
        target.parent.mkdir(parents=True)
        notebook = json.loads(path.read_text(encoding="utf-8"))
        target.write_text(dumps(notebook if whole else lean(notebook)), encoding="utf-8")
    took = timed([*nbgrader, "autograde", chapter.name], root, cores, one_thread=False)
    graded = len(list((root / "autograded").glob("*/*/*.ipynb")))
    if graded != sample:
        raise RuntimeError(f"stock graded {graded} of {sample}")
    return {"students": sample, "seconds": took, "per minute": 60 * sample / took}


def ours(base: Path, class_: Path, students: int, cores: int) -> dict[str, Any]:
    """`pefttools grade` on the class, a worker a core."""
    out = base / f"ours-{cores}"
    took = timed([sys.executable, "-m", "pefttools", "grade", str(class_), "--chapter", CHAPTER, "--out", str(out),
                  "--seed", "20", "--workers", str(cores)], Path(__file__).resolve().parents[2], cores, one_thread=True)
    parts: dict[str, float] = {}
    judged = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "judged").glob("*/*.json"))]
    if len(judged) != students:
        raise RuntimeError(f"{len(judged)} of {students} were judged: {(out / 'report.csv').read_text()[-800:]}")
    for result in judged:
        about = json.loads(result["text"])["metadata"]["pefttools"]
        if not about["sandbox"]:
            raise RuntimeError("graded without a sandbox")
        for name, seconds in about["seconds"].items():
            parts[name] = parts.get(name, 0.0) + seconds / students
        parts["worker"] = parts.get("worker", 0.0) + result["seconds"] / students
    page = (out / "report.html").read_text(encoding="utf-8")
    parts["writer"] = float(page.split("seconds of the writer: ")[1].split("<")[0].split(";")[0]) / students
    return {"students": students, "seconds": took, "per minute": 60 * students / took, "parts": parts}


NAMES = {"start": "start of the sandbox and its kernel", "draw": "inputs and references (beside the start)",
         "demonstration": "the chapter's own cells that answers need (import torch)", "answer": "answer cells",
         "check": "probes, in the sandbox", "judge": "judge, outside", "worker": "in a worker, all in all",
         "writer": "the one writer: gradebook (while others are judged)"}
AIMS = {2: "3 ×", 4: "5 ×"}


def page(results: dict[int, dict[str, dict[str, Any]]], command: str, others: float) -> str:
    """The page as Markdown."""
    from pefttools.bench.machine import machine

    busy = " **The machine was busy: read the ratio, not the seconds.**" if others > 0.3 else ""
    lines = ["# Grading: submissions in a minute", "",
             f"Made by `make bench-grading` (`{command}`): no figure is typed.", "",
             "; ".join(f"{name} {value}" for name, value in machine().items()) + ".",
             f"Other programs kept {others:.1f} processors busy meanwhile, on average.{busy}", "",
             f"One class of `{CHAPTER}`, solved and in part. Stock: `nbgrader autograde`, in the grader's own session, one "
             "after the other, a sample of the class; whole notebooks, and without what no grade needs (so that the "
             "ratio is of running alone). Ours: `pefttools grade`, sandbox and judge on.", "",
             "| cores | stock, per minute | stock, only what is needed | ours | ours / stock | ours / only needed | aim |",
             "|---|---|---|---|---|---|---|"]
    for cores, row in results.items():
        cells = [f"{row[name]['per minute']:.1f} ({row[name]['students']} in {row[name]['seconds']:.0f} s)"
                 for name in ("stock", "lean", "ours")]
        ratios = [f"**{row['ours']['per minute'] / row[name]['per minute']:.1f} ×**" for name in ("stock", "lean")]
        lines.append(f"| {cores} | {' | '.join([*cells, *ratios])} | {AIMS.get(cores, '')} |")
    lines += ["", "What a hand-in takes here, seconds on average:", "",
              "| | " + " | ".join(f"{cores} cores" for cores in results) + " |", "|---|" + "---|" * len(results)]
    for name, words in NAMES.items():
        seconds = (row["ours"]["parts"].get(name, 0.0) for row in results.values())
        lines.append(f"| {words} | " + " | ".join(f"{value:.2f}" for value in seconds) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    from pefttools.bench.harness import watched

    parser = argparse.ArgumentParser(prog="python -m pefttools.bench.grading", description=__doc__.split("\n")[0])
    parser.add_argument("--students", type=int, default=24)
    parser.add_argument("--stock", type=int, default=6, help="how many of them stock grades (default: %(default)s)")
    parser.add_argument("--cores", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--to", type=Path, help="write the page here")
    args = parser.parse_args(argv)
    have = len(os.sched_getaffinity(0))
    if too_many := [cores for cores in args.cores if cores > have]:
        parser.error(f"--cores {too_many[0]}: this process may use {have}")
    results: dict[int, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-grading-") as folder, watched() as found:
        base = Path(folder)
        chapter = make_class(base / "class", args.students, args.seed)
        for cores in args.cores:
            sample = min(args.stock, args.students)
            results[cores] = {"ours": ours(base, base / "class", args.students, cores),
                              "lean": stock(base, base / "class", chapter, sample, cores, whole=False),
                              "stock": stock(base, base / "class", chapter, sample, cores, whole=True)}
            rates = (f"{name} {row['per minute']:.1f} a minute" for name, row in results[cores].items())
            print(f"{cores} cores: {', '.join(rates)}", flush=True)
    command = (f"python -m pefttools.bench.grading --students {args.students} --stock {args.stock} "
               f"--cores {' '.join(map(str, args.cores))} --seed {args.seed}")
    text = page(results, command, found["others"])
    if args.to:
        args.to.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
