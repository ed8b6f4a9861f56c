"""`pefttools evaluate ADAPTER`: the report card of an adapter, and whether it may be released.

    pefttools evaluate my_adapter                                            report_card.html and report_card.json here
    pefttools evaluate my_adapter --quick                                    on a sample, about a minute
    pefttools evaluate my_adapter --gate "pass@1>=0.5,forgetting<=0.3"       exit status 1 where a condition fails

Exit codes: 0 the gate is passed, 1 it is not, 2 the question was wrong (no adapter, another base, no such figure).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from pefttools.lab.gate import FIGURES, Verdict, check_gate, default_gate, parse_gate, released


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, nargs="?", help="the folder that save_adapter or peft wrote")
    parser.add_argument("--base", help="tiny, llama-3.2-1b, a hub id or a folder (default: the one the adapter names)")
    parser.add_argument("--out", type=Path, default=Path("report_card.html"), metavar="FILE",
                        help="the page (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as data (default: beside the page)")
    parser.add_argument("--gate", metavar="CONDITIONS", help='such as "pass@1>=0.5,forgetting.high<=0.3" (default: see '
                                                             '--list-gate)')
    parser.add_argument("--list-gate", action="store_true", help="print all figures and the default gate's reasons")
    parser.add_argument("--quick", action="store_true", help="a sample of everything; the card says so")
    parser.add_argument("--no-safety", action="store_true", help="leave the red-team's figures out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    try:
        return answer(args)
    except (ValueError, OSError) as error:
        if os.environ.get("PEFTTOOLS_TRACEBACK"):
            raise
        print(f"pefttools evaluate: {error}", file=sys.stderr)
        return 2


def answer(args: argparse.Namespace) -> int:
    if args.list_gate:
        print(listing())
        return 0
    if args.adapter is None:
        raise ValueError("which adapter? Such as: pefttools evaluate my_adapter")
    gate = None if args.gate is None else parse_gate(args.gate)
    page, data = args.out, args.json or args.out.with_suffix(".json")
    if page.resolve() == data.resolve():
        raise ValueError(f"--out and --json are the same file, {page}: name two.")
    for name, path in (("--out", page), ("--json", data)):
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"{name} {path}: " + ("that is a folder; name a file in it." if path.is_dir() else
                                                   f"there is no folder {path.parent}."))
    from pefttools.lab.card_page import to_html
    from pefttools.lab.report_card import report_card

    card = report_card(args.adapter, args.base, quick=args.quick, seed=args.seed, safety=not args.no_safety,
                       progress=not args.quiet)
    verdicts = check_gate(card, gate)
    card["gate"] = [vars(verdict) for verdict in verdicts]
    card["released"] = released(verdicts)
    write(data, json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write(page, to_html(card))
    print(summary(verdicts, card))
    print(f"Written: {page}, {data}")
    return 0 if card["released"] else 1


def summary(verdicts: list[Verdict], card: dict) -> str:
    """The gate as text, and the verdict."""
    words = {True: "passed", False: "FAILED", None: "left out"}
    found = ["not measured" if v.value is None else f"{v.value:.3f} ({v.low:.3f} to {v.high:.3f})" for v in verdicts]
    lines = [f"  {words[v.passed]:8}  {v.condition:32}{number}" for v, number in zip(verdicts, found)]
    head = f"{card['adapter']} on {card['base']}" + (", on a sample (--quick)" if card["quick"] else "")
    return "\n".join([head, *lines, "May be released." if card["released"] else "Not to be released."])


def listing() -> str:
    width = max(map(len, FIGURES)) + 2
    return "\n".join(["Figures (each also with .low and .high, the ends of its 95 % interval):",
                      *(f"  {name:{width}}{words}" for name, (_, words) in FIGURES.items()), "", "The default gate:",
                      *(f"  {each}\n      {each.why}" for each in default_gate())])


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
