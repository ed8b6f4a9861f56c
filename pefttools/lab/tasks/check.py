"""Proof of the data set: every row passes its own tests, and wrong answers do not.

For each row these answers are run against its tests:
- its own output, which must pass;
- mutants: one slot of the code changed (another draw of it, or a number one more or one less), which must fail;
- a neighbour: the same kind with other constants under the right name, which must fail;
- for a held-out row, the answer of every training row of its kind, with the right name put in, which must fail.
And each wording must say every slot of the code, so that the instruction determines the answer.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import re
import shutil
import signal
import tempfile
from functools import cache
from string import Template

from pefttools.lab.tasks import KINDS
from pefttools.lab.tasks.build import ROWS_PER_KIND, SEED, draw_rows, kinds_of
from pefttools.lab.tasks.core import Draw, Kind, Slots, fill, tests_of

LIMIT_S = 1.0
"""A wrong answer may loop for ever (a division by 1 in place of 2)."""


def code_of(output: str) -> str:
    """The Python between the fences."""
    found = re.fullmatch(r"```python\n(.*)\n```", output, re.DOTALL)
    if not found:
        raise ValueError(f"output: expected one block fenced by ```python and ```, got {output!r}")
    return found.group(1)


def passes(code: str, tests: list[str]) -> bool:
    """Whether the code passes the tests, in this process and an empty current folder. For answers made here; what a
    model writes is run elsewhere, in a process with limits."""
    before, folder = os.getcwd(), scratch()
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    os.chdir(folder)
    try:
        space: dict = {"__name__": "answer"}
        for source in (code, *tests):
            exec(compile(source, "<answer>", "exec", dont_inherit=True), space)
    except Exception:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(before)
        if os.listdir(folder):
            shutil.rmtree(folder)
            scratch.cache_clear()
    return True


@cache
def scratch() -> str:
    """An empty folder, for as long as nobody writes to it."""
    folder = tempfile.mkdtemp(prefix="pefttools-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _stop(*_) -> None:
    raise TimeoutError(f"no answer after {LIMIT_S} s")


def slots_in(template: str, slots: dict) -> set[str]:
    """The slots of a template, and those that stand in their values."""
    found = set(Template(template).get_identifiers())
    inner = {name for slot in found if isinstance(slots[slot], str) for name in Template(slots[slot]).get_identifiers()}
    return found | inner


def unsaid(kind: Kind, slots: Slots) -> list[str]:
    """What is wrong with the wordings: a slot of the code that one does not say (as `$x` or as `$x_...`)."""
    needed = slots_in(kind.code, slots)
    given = kind.example(slots) if callable(kind.example) else kind.example
    faults = []
    for wording in (*kind.wordings, *kind.held_out):
        said = slots_in(wording, {**slots, "write": "$head", "make": "$name", "head": kind.head, "n_said": ""})
        said |= slots_in(given, slots) | ({"name"} | slots_in(kind.head, slots) if "head" in said or "write" in said
                                          else set()) | ({"name"} if "make" in said else set())
        faults += [f"{kind.name}: {slot!r} is not said by {wording!r}" for slot in sorted(needed)
                   if slot not in said and not any(other.startswith(f"{slot}_") for other in said)]
    return faults


def mutants(kind: Kind, slots: Slots, split: str, rng: random.Random) -> dict[str, tuple[str, Slots]]:
    """Wrong answers: what was changed → code, and the slots it would be right for."""
    right = fill(kind.code, slots)
    made = {}
    needed = slots_in(kind.code, slots) - {"name"}
    others = [Slots(kind.draw(Draw(rng, split, kind.name))) for _ in range(6)]
    for slot in sorted(needed):
        values = [other[slot] for other in others]
        if isinstance(slots[slot], int):
            values += [slots[slot] + 1, slots[slot] - 1]
        for value in values:
            changed = Slots({**slots, slot: value})
            made[f"{slot} = {value!r}"] = fill(kind.code, changed), changed
    for other in others:
        other["name"] = slots["name"]
        made["a neighbour under the right name"] = fill(kind.code, other), other
    return {what: (code, changed) for what, (code, changed) in made.items() if code != right}


def same_task(kind: Kind, code: str, slots: Slots) -> bool:
    """Whether `code` also passes the tests for these slots: "at most 12" and "less than 13" are the same task."""
    try:
        return passes(code, tests_of(kind, slots))
    except Exception:  # slots changed one by one need not fit together
        return False


def check_kind(task: tuple[str, int]) -> dict:
    """Check every row of one kind; what was counted, and the faults."""
    name, seed = task
    kind = next(kind for kind in KINDS if kind.name == name)
    found = dict(kind=name, rows=0, mutants=0, copies=0, faults=[])
    answers = []
    for split, count in ROWS_PER_KIND.items():
        if kind not in kinds_of(split):
            continue
        rng = random.Random(f"{seed}/mutants/{kind.name}")
        for slots, row in draw_rows(kind, split, count, seed):
            code = code_of(row["output"])
            found["rows"] += 1
            found["faults"] += unsaid(kind, slots)
            if not passes(code, row["tests"]):
                found["faults"].append(f"{name}: its own output fails: {row['instruction']!r}")
            for what, (wrong, changed) in mutants(kind, slots, split, rng).items():
                found["mutants"] += 1
                if passes(wrong, row["tests"]) and not same_task(kind, code, changed):
                    found["faults"].append(f"{name}: {what} passes for {row['instruction']!r}")
            if split == "train":
                answers.append((slots["name"], code))
            elif split == "held_out":
                for old, other in answers:
                    found["copies"] += 1
                    if passes(other.replace(old, slots["name"]), row["tests"]):
                        found["faults"].append(f"{name}: a renamed answer of train passes for {row['instruction']!r}")
    found["faults"] = sorted(set(found["faults"]))
    return found


def check(seed: int = SEED, processes: int | None = None) -> dict:
    """All kinds, in parallel processes: numbers of rows, mutants and copies tried, and the faults found."""
    with multiprocessing.Pool(processes) as pool:
        results = pool.map(check_kind, [(kind.name, seed) for kind in KINDS], chunksize=1)
    total = {key: sum(result[key] for result in results) for key in ("rows", "mutants", "copies")}
    return {**total, "faults": [fault for result in results for fault in result["faults"]]}
