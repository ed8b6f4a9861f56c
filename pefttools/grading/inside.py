"""In the sandbox: run a probe on a student's work, and write down what came, as data.

    /exchange/TOKEN.in    the cases, from the grader          /exchange/TOKEN.out    what the work gave on each

Nothing here is trusted by the grader: a student's code lives in the same process and can change all of it. It can make
the answers say anything; what it cannot do is know the right ones, for they were never here.
"""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace
from typing import Any

from pefttools.grading.plain import NotPlain, type_name
from pefttools.grading.probe import Outcome, probe_all
from pefttools.grading.wire import WireError, from_bytes, to_bytes

EXCHANGE = os.environ.get("PEFTTOOLS_EXCHANGE", "/exchange")


def probe(name: str, work: Any, token: str) -> None:
    """Probe `work` for the exercise `name` on the cases in TOKEN.in; write {"kind", "callable", "outcomes"}."""
    answer: dict[str, Any] = {"type": type_name(work), "callable": _callable(work),
                              "path": isinstance(work, (str, os.PathLike)), "blank": work is None or work is ...}
    if not answer["blank"]:
        with open(os.path.join(EXCHANGE, f"{token}.in"), "rb") as file:
            cases = from_bytes(file.read())
        module = importlib.import_module(f"pefttools.grading.probes.{name.replace('-', '_')}")
        answer["outcomes"] = probe_all(SimpleNamespace(name=name, probe=module.probe), work, cases)
    try:
        content = to_bytes(answer)
    except WireError:
        answer["outcomes"] = [_sendable(outcome) for outcome in answer["outcomes"]]
        content = to_bytes(answer)
    scratch = os.path.join(EXCHANGE, f"{token}.part")
    with open(scratch, "wb") as file:
        file.write(content)
    os.replace(scratch, os.path.join(EXCHANGE, f"{token}.out"))


def _sendable(outcome: Outcome) -> Outcome:
    try:
        to_bytes(outcome)
        return outcome
    except WireError as error:
        return Outcome(NotPlain(f"something that {error}"), outcome.raised, outcome.printed)


def _callable(work: Any) -> bool:
    try:
        return callable(work)
    except Exception:
        return False
