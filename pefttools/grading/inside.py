"""In the sandbox: run a probe on a student's work, and write down what came, as data.

    /exchange/TOKEN.in    the cases, from the grader          /exchange/TOKEN.out    what the work gave on each
                          or {"files": names, "most": bytes}                         or the files, of an artefact

Nothing here is trusted by the grader: a student's code lives in the same process and can change all of it. It can make
the answers say anything; what it cannot do is know the right ones, for they were never here.
"""

from __future__ import annotations

import importlib
import os
import stat
from types import SimpleNamespace
from typing import Any

import torch

from pefttools.grading.plain import NotPlain, type_name
from pefttools.grading.probe import Outcome, probe_all
from pefttools.grading.wire import WireError, from_bytes, to_bytes

EXCHANGE = os.environ.get("PEFTTOOLS_EXCHANGE", "/exchange")


def probe(name: str, work: Any, token: str) -> None:
    """Probe `work` for the exercise `name` on what TOKEN.in says; write {"type", "callable", "outcomes", …}."""
    answer: dict[str, Any] = {"type": type_name(work), "callable": _callable(work),
                              "path": _is_path(work), "blank": work is None or work is ...}
    if not answer["blank"]:
        with open(os.path.join(EXCHANGE, f"{token}.in"), "rb") as file:
            cases = from_bytes(file.read())
        if type(cases) is dict:
            answer |= collect(work, cases["files"], cases["most"]) if answer["path"] else {}
        else:
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


def collect(folder: str | os.PathLike, names: list[str], most: int) -> dict[str, Any]:
    """{"files": {name: its bytes as a tensor}, "trouble": what is wrong, or ""} of the files of these names."""
    if not os.path.isdir(folder):
        return {"files": {}, "trouble": f"there is no folder {os.fspath(folder)!r:.200}"}
    files: dict[str, torch.Tensor] = {}
    for name in names:
        path = os.path.join(folder, name)
        try:
            found = os.stat(path)
        except OSError:
            continue                                   # which ones must be there, the probe says
        if not stat.S_ISREG(found.st_mode):
            return {"files": {}, "trouble": f"{name} is no ordinary file"}
        most -= found.st_size
        if most < 0:
            return {"files": {}, "trouble": f"with {name}, its files have more bytes than are taken"}
        with open(path, "rb") as file:
            content = bytearray(file.read(found.st_size))
        files[name] = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return {"files": files, "trouble": ""}


def _sendable(outcome: Outcome) -> Outcome:
    try:
        to_bytes(outcome)
        return outcome
    except WireError as error:
        return Outcome(NotPlain(f"something that {error}"), outcome.raised, outcome.printed)


def _is_path(work: Any) -> bool:
    try:
        return isinstance(work, (str, os.PathLike))
    except Exception:
        return False


def _callable(work: Any) -> bool:
    try:
        return callable(work)
    except Exception:
        return False
