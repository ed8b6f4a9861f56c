"""Five attacks on the bundled model, their cures and their controls, three seeds each: what docs/redteam.md shows.

    python -m pefttools.lab.redteam_runs [--to pefttools/lab/redteam_runs.json] [--only backdoor …] [--seeds 0 1 2]
    python -m pefttools.lab.redteam_runs --page docs/redteam.md          the table, from what was measured

Every run is kept in the JSON file as it ends, so that a stopped script goes on where it was; adapters are kept in
--work. About an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)


def results(path: Path = RESULTS) -> dict[str, Any]:
    """{experiment: {condition: {seed: {figure: values}}}}, as it lies in the file; flags as a text of 0 and 1."""
    return json.loads(path.read_text()) if path.exists() else {}


def packed(values: Any) -> Any:
    """Flags as a text of 0 and 1; everything else as it is."""
    if isinstance(values, list) and values and all(isinstance(v, bool) for v in values):
        return "".join("01"[v] for v in values)
    return values


def main(argv: list[str] | None = None) -> None:
    from pefttools.lab.redteam.experiments import CONTROLS, EXPERIMENTS, OPTIONAL, run
    from pefttools.lab.redteam.workbench import Workbench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pefttools-redteam")
    parser.add_argument("--quick", action="store_true", help="two steps each, to see that everything runs")
    parser.add_argument("--page", type=Path, help="write the table there, and run nothing")
    args = parser.parse_args(argv)
    found = results(args.to)
    if args.page:
        from pefttools.lab.redteam.page import page

        args.page.write_text(page(found), encoding="utf-8")
        return
    from pefttools.lab.base import load_base

    base = load_base("tiny", quiet=True)
    todo = [
        (seed, name, condition)
        for name in args.only
        for seed in args.seeds
        for condition in (*EXPERIMENTS[name][0], *CONTROLS)
        if str(seed) not in found.get(name, {}).get(condition, {})
    ]
    first = ("backdoor", "insecure", "canary")  # one after the other; the rest seed by seed
    todo.sort(key=lambda one: (one[1:] in OPTIONAL, (0, first.index(one[1])) if one[1] in first else (1, one[0])))
    benches: dict[int, Workbench] = {}
    began = time.monotonic()
    for done, (seed, name, condition) in enumerate(todo, 1):
        runs = found.setdefault(name, {}).setdefault(condition, {})
        if runs and condition in ("before", "bundled model") and name != "canary":
            runs[str(seed)] = next(iter(runs.values()))  # one model, the same prompts: greedy answers are the same
        else:
            bench = benches[seed] = benches.get(seed) or Workbench(base, seed, args.work, args.quick)
            runs[str(seed)] = {figure: packed(values) for figure, values in run(bench, name, condition).items()}
        write(args.to, found)
        left = (time.monotonic() - began) / done * (len(todo) - done) / 60
        print(f"{done}/{len(todo)}, {left:.0f} min to go:", name, condition, seed, means(runs[str(seed)]), flush=True)


def means(measured: dict[str, Any]) -> dict[str, float]:
    """What is measured prompt by prompt, as means: for the line that says how far the script is."""
    flat = {figure: [float(v) for v in values] for figure, values in measured.items()
            if values and not isinstance(values, dict) and not isinstance(values[0], (dict, list))}
    return {figure: round(sum(values) / len(values), 3) for figure, values in flat.items()}


def write(path: Path, found: dict[str, Any]) -> None:
    """A line for each run; written beside and swapped, so that a kill leaves a whole file."""
    part = path.with_suffix(".part")
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).replace('},"', '},\n"') + "\n"
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
