"""Measure speed and memory side by side with peft and bitsandbytes, and write the page.

    python -m pefttools.bench --to docs/benchmarks.md [--only quantize lora …] [--threads 1,2,4] [--quick]

Each group is a process of its own for each number of threads. Its result is kept in a JSON file beside the page as soon
as it is there: a stopped run goes on where it was, and what is measured already, with this code on this machine, is not
measured again (--again does). Have nothing else running.
"""
from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pefttools.bench.groups import GROUPS
from pefttools.bench.harness import pooled, watched
from pefttools.bench.machine import machine, sources, unchanged
from pefttools.bench.page import BUSY, figure, page, verdict

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where a group failed altogether."""
    parser = argparse.ArgumentParser(prog="python -m pefttools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "benchmarks.md",
                        help="the page; its JSON lies beside it")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--threads", default=[1, 2, 4], type=lambda text: [int(n) for n in text.split(",")],
                        help="numbers of threads, such as 1,2,4")
    parser.add_argument("--quick", action="store_true",
                        help="small shapes and few rounds, to see that it works; goes to build/benchmarks_quick.md")
    parser.add_argument("--again", action="store_true", help="measure again what is measured already")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from what was kept")
    parser.add_argument("--one", choices=list(GROUPS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        run_here(args.one, args.threads[0], args.quick, args.result)
        return 0
    if args.quick and args.to.resolve() == parser.get_default("to").resolve():
        args.to = ROOT / "build" / "benchmarks_quick.md"
    return run_all(args)


def run_all(args: argparse.Namespace) -> int:
    """Run what is missing, keep each result, write the page after each."""
    kept = args.to.with_suffix(".json")
    args.to.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    here = machine()
    todo = [] if args.page else [
        (f"{name}/{threads}", name, threads) for name, group in GROUPS.items() if not args.only or name in args.only
        for threads in (group.threads or args.threads)
        if args.again or not current(results.get(f"{name}/{threads}"), here, args.quick)]
    failed = []
    for i, (key, name, threads) in enumerate(todo):
        print(f"[{i + 1} of {len(todo)}] {GROUPS[name].title}, {threads} thread{'s'[:threads != 1]} …", flush=True)
        started = time.monotonic()
        result = run_apart(name, threads, args.quick)
        if result is None:
            failed.append(key)
            continue
        results[key] = {**result, "machine": here, "quick": args.quick}
        print(f"    {time.monotonic() - started:.0f} s" + (f"; others kept {result['others']:.1f} processors busy: the "
              f"machine is not quiet" if result["others"] > BUSY else ""), flush=True)
        save(kept, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    order = {name: i for i, name in enumerate(GROUPS)}
    results = {key: results[key] for key in sorted(results, key=lambda k: (order.get(k.partition("/")[0], 99), k))
               if key.partition("/")[0] in order}
    if results:
        save(args.to, page(results, [key for key, result in results.items() if not unchanged(result["files"])]))
        print(f"{args.to} has {len(results)} results.")
    if failed:
        print(f"No result: {', '.join(failed)}. What was said above is why; the same command tries them again.")
    return 1 if failed else 0


def current(result: dict[str, Any] | None, here: dict[str, str], quick: bool) -> bool:
    """Whether a kept result stands: same machine, same code, and not a quick one where a full one is wanted."""
    return (bool(result) and result["machine"] == here and unchanged(result["files"])
            and (quick or not result["quick"]))


def run_apart(name: str, threads: int, quick: bool) -> dict[str, Any] | None:
    """The group in processes of its own, their threads set before torch is imported. None where one failed."""
    results = []
    for _ in range(1 if quick else GROUPS[name].processes):
        result = run_process(name, threads, quick)
        if result is None:
            return None
        results.append(result)
    seconds = sum(result["seconds"] for result in results)
    return {**results[0], "rows": pooled([result["rows"] for result in results]), "seconds": seconds,
            "others": sum(result["others"] * result["seconds"] for result in results) / seconds}


def run_process(name: str, threads: int, quick: bool) -> dict[str, Any] | None:
    """What `run_here` leaves, from a new process; None where it failed."""
    counts = {variable: str(threads) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment = {**os.environ, **counts, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "pefttools.bench", "--one", name, "--threads", str(threads),
                   "--result", str(result)]
        done = subprocess.run(command + (["--quick"] if quick else []), env=environment, cwd=ROOT)
        if done.returncode or not result.exists():
            print(f"    the process ended with code {done.returncode}", flush=True)
            return None
        return json.loads(result.read_text(encoding="utf-8"))


def run_here(name: str, threads: int, quick: bool, result: Path) -> None:
    """In the group's own process: measure, tell each row, leave {"rows", "others", "seconds"} in `result`."""
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    # it tells, on import, of an optional package that it looked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _compiled()
    rows = []
    with watched() as seen:
        for row in GROUPS[name].rows(quick):
            rows.append(row)
            told = f"missing: {row['missing']}" if "missing" in row else f"{figure(row['value'], row['unit'])}"
            met = verdict(row)
            print(f"    {row['row']}{', ' + row['what'] if row.get('what') else ''}: {told}"
                  + (f"  [{row['sense']} {row['bound']:g}: {met}]" if met and met != "missing" else ""), flush=True)
    loaded = [module for module in sys.modules if module.startswith("pefttools.")]
    files = sources(None if GROUPS[name].children else loaded)
    save(result, json.dumps({"rows": rows, "files": files, **seen}, ensure_ascii=False))


def _compiled() -> None:
    """Build the NF4 kernels now, where the machine can, instead of when they have become worth it: amid a round."""
    from pefttools import nf4_compiled

    try:
        nf4_compiled.use()
    except RuntimeError as error:
        print(f"    eager NF4 kernels: {error}", flush=True)


def save(path: Path, text: str) -> None:
    """Whole or not at all, also where the run is killed while it writes."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
