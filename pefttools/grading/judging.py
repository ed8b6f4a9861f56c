"""One hand-in, from the spliced notebook to the judged one: what a worker does. Data in, data out.

    Job (spliced notebook as text, seed, limits)  ──JudgedExecute──►  JudgedResult (judged notebook as text)

Both are plain data that can be pickled, and nothing here touches the grading folder or the gradebook: it runs in a
process on this machine or on a Dask worker on another, alike.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_one_at_a_time = threading.Lock()  # torch's random generator is one a process; a Dask worker may have several threads


@dataclass(frozen=True)
class Job:
    """A spliced notebook to be judged."""

    student: str
    chapter: str
    text: str                      # the notebook
    digest: str                    # of what the grade depends on; comes back with the result
    seed: int
    sandbox: bool = True
    settings: dict[str, Any] = field(default_factory=dict)   # JudgedExecute's, of nbgrader_config.py
    entries: str = ""              # "file.py:function" in place of the registry of exercises
    files: dict[str, Any] = field(default_factory=dict)      # handed in beside the notebook: name → path, or bytes


@dataclass
class JudgedResult:
    """A judged notebook; what is kept on disk before it goes into the gradebook."""

    student: str
    chapter: str
    digest: str
    text: str
    seconds: float


def judge_one(job: Job) -> JudgedResult:
    """Judge one hand-in. Raises SandboxMissing, or ExerciseError where an exercise itself is broken."""
    import nbformat
    from traitlets.config import Config

    from pefttools.grading.chapter import dumps
    from pefttools.grading.judged import JudgedExecute

    started = time.perf_counter()
    with _one_at_a_time:
        notebook = nbformat.reads(job.text, as_version=4)
        more = {"entries": entries_of(job.entries)(job.chapter)} if job.entries else {}
        more["handed_in"] = {name: file if type(file) is bytes else Path(file).read_bytes() for name, file in job.files.items()}
        execute = JudgedExecute(config=Config({"JudgedExecute": {**job.settings, "sandbox": job.sandbox,
                                                                 "seed": job.seed}}), **more)
        notebook, _ = execute.preprocess(notebook, {})
        return JudgedResult(job.student, job.chapter, job.digest, dumps(notebook), time.perf_counter() - started)


def entries_spec(entries: Callable[[str], dict[str, Any]] | None) -> str:
    """How a worker finds the function: "file.py:name". Raises ValueError for one that is not at a module's top."""
    if entries is None:
        return ""
    name, code = getattr(entries, "__qualname__", ""), getattr(entries, "__code__", None)
    if code is None or not name.isidentifier():
        raise ValueError(f"entries is {entries!r}; it must be a function at the top of a module: workers import it")
    return f"{code.co_filename}:{name}"


@functools.lru_cache(maxsize=8)
def entries_of(spec: str) -> Callable[[str], dict[str, Any]]:
    """The function that `entries_spec` named; its module is imported from the file."""
    file, _, name = spec.rpartition(":")
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == file and hasattr(module, name):
            return getattr(module, name)
    made = importlib.util.spec_from_file_location(f"entries_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(made)
    sys.modules[made.name] = module
    made.loader.exec_module(module)
    return getattr(module, name)
