"""`python -m pefttools.lab.tasks --write | --check | --show N`."""

from __future__ import annotations

import argparse
import sys

from pefttools.lab.tasks import KINDS
from pefttools.lab.tasks.build import FOLDER, SEED, draw_rows, write
from pefttools.lab.tasks.check import check


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pefttools.lab.tasks", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the data files to {FOLDER.name}/")
    parser.add_argument("--check", action="store_true", help="run every answer, and wrong ones, against the tests")
    parser.add_argument("--show", type=int, metavar="N", default=0, help="print N rows of every kind")
    parser.add_argument("--kind", help="with --show: this kind only")
    parser.add_argument("--processes", type=int, default=None, help="for --check; default: one a core")
    chosen = parser.parse_args(arguments)
    if not (chosen.write or chosen.check or chosen.show):
        parser.print_help()
        return 2
    for kind in KINDS if chosen.show else ():
        if chosen.kind in (None, kind.name):
            for split in ("new_kinds",) if kind.new else ("train", "held_out"):
                for _, row in draw_rows(kind, split, chosen.show):
                    print(f"--- {kind.family}/{kind.name} · {split}\n{row['text']}")
                    print("\n".join("    " + line for test in row["tests"] for line in test.splitlines()))
    if chosen.check:
        found = check(processes=chosen.processes)
        print(f"{found['rows']:,} rows against their tests, {found['mutants']:,} mutants and neighbours, "
              f"{found['copies']:,} copies of train: {len(found['faults'])} faults")
        for fault in found["faults"][:40]:
            print("  " + fault)
        if found["faults"]:
            return 1
    if chosen.write:
        for split, facts in write(seed=SEED)["splits"].items():
            print(f"{split}: {facts['rows']:,} rows of {facts['kinds']} kinds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
