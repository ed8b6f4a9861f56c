"""docs/hostile.md: every attack, what became of it in stock nbgrader and in ours. Computed, never typed.

    make hostile                     all of them: a quarter of an hour or more
    python tests/hostile/table.py --to docs/hostile.md [--workers 4] [--keep FOLDER] [NAME …]

With `--keep`, stock's outcomes are kept in a folder, and a run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
TOGETHER = 16
HEAD = """\
# Attacks on the grader

What hand-ins that attack the grader come to, in stock `nbgrader autograde` {nbgrader} and in `pefttools grade`. Written
by `make hostile` from one run of each; nothing in the tables is typed by hand. The attacks are in
`tests/hostile/hostile/`, one function each, and run as tests.

Each attacker hands in beside a student with every answer right (the neighbour, {most} points). **Stock** grades a class
of these two, its checks in the student's kernel, as the instructor; **ours** grades classes of {together} attackers, the
neighbour, and one with a blank notebook. An attack should get 0 points, or what its honest answers beside it earn
("of 2": a right answer to another exercise, which it must not lose).

{summary}

*Told* is the beginning of what the attacker reads. The neighbours' grades, pages and files in ours are compared with
those of a class without attackers; files of the course, processes, this machine's services and the gradebook are looked
at after each class.
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the attacks, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only-stock", action="store_true", help="fill the folder of --keep, and write nothing")
    given = parser.parse_args(arguments)
    from hostile.attack import load

    attacks = [attack for name, attack in load().items() if not given.names or name in given.names]
    with tempfile.TemporaryDirectory(prefix="hostile-") as base:
        stock = run_stock(attacks, Path(base), given.workers, given.keep)
        if given.only_stock:
            return
        ours, wrong = run_ours(attacks, Path(base), given.workers)
    text = page(attacks, stock, ours, wrong)
    if given.to:
        given.to.write_text(text, encoding="utf-8")
    print(text)


def run_stock(attacks, base, workers, keep):
    """{name: Outcome}, for those that are run under stock."""
    from hostile.stock import Outcome, Stock
    from tqdm import tqdm

    (base / "stock").mkdir()
    stock = Stock(base / "stock")

    def run(attack):
        kept = keep / f"{attack.name}.json" if keep else None
        if kept is not None and kept.is_file():
            return Outcome(**json.loads(kept.read_text()))
        outcome = stock.run(attack)
        if kept is not None:
            keep.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(asdict(outcome)))
        return outcome

    chosen = [attack for attack in attacks if not attack.stock]
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(run, chosen), total=len(chosen), desc="stock", disable=None)
        return {attack.name: outcome for attack, outcome in zip(chosen, found, strict=True)}


def run_ours(attacks, base, workers):
    """({name: Row}, what went wrong in words)."""
    from hostile.arena import NEIGHBOURS, Arena, complaints
    from tqdm import tqdm

    (base / "ours").mkdir()
    arena = Arena(base / "ours", workers)
    alone = arena.run([]).rows
    rows, wrong = {}, []
    groups = [attacks[n:n + TOGETHER] for n in range(0, len(attacks), TOGETHER)]
    for group in tqdm(groups, desc="ours", disable=None):
        graded = arena.run(group)
        wrong += graded.wrong
        for name in NEIGHBOURS:
            if (graded.rows[name].score, graded.rows[name].files) != (alone[name].score, alone[name].files):
                wrong.append(f"{name} fared otherwise than without attackers, in the class of {group[0].name}")
        for attack in group:
            rows[attack.name] = graded.rows[attack.name]
            wrong += [f"{attack.name}: {each}" for each in complaints(attack, graded.rows[attack.name])]
    return rows, wrong


def page(attacks, stock, ours, wrong):
    """The document."""
    import nbgrader
    from hostile.arena import NEIGHBOURS

    most = NEIGHBOURS["zoe"]
    ran = [attack for attack in attacks if attack.name in stock]
    beaten = [attack for attack in ran if succeeded(attack, stock[attack.name], most)]
    held = [attack for attack in attacks if not any(line.startswith(f"{attack.name}: ") for line in wrong)]
    summary = (f"Of {len(attacks)} attacks, {len(ran)} were run against stock, where **{len(beaten)} succeed** (points that "
               f"were not earned, a neighbour's loss, a class without grades, something reached that should not be). "
               f"Against ours, {len(attacks)} were run and **{len(attacks) - len(held)} succeed**.")
    if wrong:
        summary += "\n\n**Not as it should be:**\n\n" + "\n".join(f"- {line}" for line in wrong)
    lines = [HEAD.format(nbgrader=nbgrader.__version__, most=f"{most:g}", together=TOGETHER, summary=summary)]
    for family in dict.fromkeys(attack.family for attack in attacks):
        lines += ["", f"## {family[0].upper()}{family[1:]}", "", "| attack | what it does | stock | ours | told |",
                  "|---|---|---|---|---|"]
        for attack in attacks:
            if attack.family == family:
                row = ours[attack.name]
                told = next((word for word in row.words if word), "") or "Not written yet."
                lines.append("| " + " | ".join(map(cell, (
                    f"`{attack.name}`", attack.what, stock_words(attack, stock.get(attack.name), most),
                    points(row.score, attack.earns), told))) + " |")
    return "\n".join(lines) + f"\n\n{time.strftime('%Y-%m-%d')}.\n"


def succeeded(attack, outcome, most):
    """Whether stock lost something to this attack."""
    return bool(outcome.words) or (outcome.score or 0) > attack.earns or outcome.neighbour != most


def stock_words(attack, outcome, most):
    """The cell about stock."""
    if outcome is None:
        return f"not run: {attack.stock}"
    first = "no grade" if outcome.score is None else points(outcome.score, attack.earns)
    return "; ".join([f"**{first}**" if succeeded(attack, outcome, most) else first, *outcome.words])


def points(score, earns):
    """ "0", or "2 of 2 earned elsewhere"."""
    return f"{score:g}" + (f" (earned: {earns:g})" if earns else "")


def cell(text):
    """Text for a cell of a Markdown table: one line, nothing of it active."""
    text = " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 180 else text[:179] + "…"


if __name__ == "__main__":
    main()
