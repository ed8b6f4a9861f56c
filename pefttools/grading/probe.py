"""Running a probe on a work, where the student's code lives: quietly, and so that nothing it raises gets out.

What comes back is data only (`Outcome`), so that the judge can be another process.
"""

from __future__ import annotations

import copy
import linecache
import os
import re
import sysconfig
import types
from dataclasses import asdict, dataclass
from typing import Any

from pefttools.grading.exercise import Exercise
from pefttools.grading.plain import plain
from pefttools.grading.room import notebook_shell, quiet, settled

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
LIBRARIES = tuple(
    {
        os.path.abspath(path) + os.sep
        for name, path in sysconfig.get_paths().items()
        if name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
)
UNWRITTEN = re.compile(
    r"^(?:(?P<name>[a-z][a-z0-9-]*): )?(?:not written yet|not implemented(?: yet)?|todo)?\W*$", re.IGNORECASE
)


@dataclass(frozen=True)
class Raised:
    """An exception of the work: its type's name and message, and the last place in the student's own code, if any."""

    type: str
    message: str
    place: str | None = None  # "line 3 of the cell In[7], in lora_forward"
    line: str | None = None  # the text of that line
    unwritten: str | None = None  # a stub was reached: the exercise it names, or "" where it names none

    def to_dict(self) -> dict:
        """As plain JSON-able data."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What one case gave: plain data, or what was raised; and the beginning of what was printed meanwhile."""

    data: Any = None
    raised: Raised | None = None
    printed: str = ""


def probe_all(exercise: Exercise, work: Any, cases: list[dict]) -> list[Outcome]:
    """Probe `work` on every case, in order. KeyboardInterrupt alone passes through.

    Each probe gets its own copy of the case and the same random state, and neither the state of the random generators,
    nor the default dtype, nor gradient mode of the caller changes. Prints, warnings, logging and display are held back.
    """
    return [_probe_one(exercise, work, case, number) for number, case in enumerate(cases)]


def _probe_one(exercise: Exercise, work: Any, case: dict, number: int) -> Outcome:
    case = copy.deepcopy(case)
    with settled(number), quiet() as printed:
        try:
            return Outcome(plain(exercise.probe(work, case)), None, printed.getvalue())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a work that leaves must not take the notebook with it
            return Outcome(None, _raised(error, exercise.probe), printed.getvalue())


def _raised(error: BaseException, probe: Any) -> Raised:
    name = type.__dict__["__name__"].__get__(type(error))[:80]
    try:
        message = str(error)[:600].strip()
    except Exception:
        message = "(an exception whose text cannot be read)"
    match = UNWRITTEN.match(message) if isinstance(error, NotImplementedError) else None
    place, line = _last_line(error.__traceback__, getattr(probe, "__code__", None))
    return Raised(name, message, place, line, (match["name"] or "") if match else None)


def _last_line(trace: types.TracebackType | None, probe: types.CodeType | None) -> tuple[str | None, str | None]:
    """The last frame that is neither a library's nor ours nor the probe's: where it is, in words, and its line."""
    place = line = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code is not probe and not is_library(code.co_filename):
            inside = "" if code.co_name.startswith("<") else f", in {code.co_name}"
            place = f"line {trace.tb_lineno} of {_file_name(code.co_filename)}{inside}"
            line = linecache.getline(code.co_filename, trace.tb_lineno, trace.tb_frame.f_globals).strip() or None
        trace = trace.tb_next
    return place, line


def is_library(filename: str) -> bool:
    """Whether code of this file is Python's, an installed package's or this course's, and so not the student's."""
    if filename.startswith(("<frozen", "<__array_function__", "<eval_with_key>")):
        return True
    if filename.startswith("<"):
        return False
    path = os.path.abspath(filename)
    return path.startswith(PACKAGE) or path.startswith(LIBRARIES) or "site-packages" in path or "dist-packages" in path


def _file_name(filename: str) -> str:
    compiler = getattr(notebook_shell(), "compile", None)
    if compiler is not None and hasattr(compiler, "format_code_name"):
        found = compiler.format_code_name(filename)
        if found:
            return f"the cell {found[1]}" if found[0] == "Cell" else str(found[1])
    return "the cell" if "ipykernel_" in filename else os.path.basename(filename)
