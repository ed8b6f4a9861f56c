"""nbgrader's `Execute`, replaced: answers run in a sandbox, verdicts are made here.

    c.Autograde.autograde_preprocessors = ["pefttools.grading.judged.JudgedExecute", …]

    spliced notebook ─plan─► answer ── run in the sandbox ──► its outputs, cut down to text and pictures
                             check ── cases (drawn here) ──► probe in the sandbox ──► bytes ──► judge() ──► Verdict
                                                                       the check cell's only output ◄──────┘
                                      files handed in beside it: an artefact's check takes these
    all else: not run

A check cell's output is an `execute_result` whose text/plain is the points, which is what nbgrader's SaveAutoGrades
reads. No message from the kernel gets near it. A cell that kills the kernel, or cannot be stopped, is left out and the
others are run again in a new one: it costs its own points.

`notebook.metadata.pefttools` says how it was graded: the seed (give it again and the grade is the same), seconds,
limits that were hit, and whether there was a sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from nbgrader.preprocessors import Execute
from traitlets import Bool, Dict, Instance, Integer, List, Unicode

from pefttools.grading.conversation import Conversation, KernelFailed, Ran
from pefttools.grading.exchange import NoAnswer, drop, put
from pefttools.grading.marking import ANSWERS, Mishap, damaged, files_of, no_work, stopped, to_wire, unwritten, verdict_of
from pefttools.grading.needed import Step, plan
from pefttools.grading.sandbox import UNSAFE, Limits, SandboxMissing, available, refusal
from pefttools.grading.splice import check_name
from pefttools.grading.stage import hidden_packages, make_stage, modules_of

PROBE = '{before}\n__import__("pefttools.grading.inside", fromlist=["probe"]).probe({name!r}, {work}, {token!r})\n'
SEEDS = 2**31
STARTS = 3  # times that a kernel is tried to be started


class JudgedExecute(Execute):
    """See the module's picture."""

    sandbox = Bool(True, help="False (--unsafe-no-sandbox) runs submitted code as you; every report says so").tag(config=True)
    seed = Integer(None, allow_none=True, help="for the cases of the exercises; by default drawn anew").tag(config=True)
    limits = Instance(Limits, args=(), help="what one notebook may use")
    limit = Dict(help="some of the limits by name, such as {'cell_seconds': 60}").tag(config=True)
    stages = Unicode("", help="folder for what the sandbox sees of this package; by default a temporary one").tag(config=True)
    secret = List(Unicode(), help="folders not to be seen inside, wherever they lie").tag(config=True)
    entries = Dict(help="{name: Exercise} in place of the registry")
    handed_in = Dict(help="{file name: bytes} of what was handed in beside the notebook")

    def preprocess(self, nb: NotebookNode, resources: Any = None, km: Any = None) -> tuple[NotebookNode, Any]:
        """Run and judge; returns the notebook with its outputs.

        Raises SandboxMissing where there is no sandbox (nothing is run), ExerciseError where an exercise is broken.
        """
        if self.sandbox and available() is not None:
            raise SandboxMissing(refusal())
        limits = replace(self.limits, **{name: value for name, value in self.limit.items()
                                         if name in {each.name for each in fields(Limits)}})
        seed = secrets.randbelow(SEEDS) if self.seed is None else self.seed
        session = Session(nb, seed, limits, self.sandbox, self._find, Path(self.stages or _own_folder()),
                          self._secret(resources), self.handed_in)
        _run(session.grade)
        nb.metadata["pefttools"] = session.record
        return nb, resources

    def _find(self, name: str) -> Any:
        if self.entries:
            return self.entries[name]
        from pefttools.grading.exercises import exercise

        return exercise(name)

    def _secret(self, resources: Any) -> tuple[Path, ...]:
        folder = (resources or {}).get("metadata", {}).get("path")
        return (*map(Path, self.secret), *([Path(folder).resolve()] if folder else []))


class Session:
    """One notebook: its steps, the kernel of the moment, and the verdicts so far."""

    def __init__(self, nb: NotebookNode, seed: int, limits: Limits, sandbox: bool, find: Any, stages: Path,
                 secret: tuple[Path, ...], handed_in: dict[str, bytes]) -> None:
        self.nb, self.seed, self.limits, self.sandbox, self.secret = nb, seed, limits, sandbox, secret
        self.handed_in = handed_in
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        self.steps = plan(nb)
        self.exercises = {step.name: find(step.name) for step in self.steps if step.kind == "check"}
        self.stages = stages
        self.stage = make_stage(stages, self.exercises.values(), modules_of(nb))
        self.hidden = hidden_packages(self.exercises.values())
        self.talk: Conversation | None = None
        self.mishaps: dict[str, Mishap] = {}       # of answer cells, by exercise
        self.hits: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.record: dict[str, Any] = {}
        self.cases: dict[str, tuple[list[dict], bytes]] = {}
        self.drawn: Any = None
        self.starts = 0
        self.begun = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds that the notebook still has."""
        return self.limits.notebook_seconds - (time.monotonic() - self.begun)

    async def grade(self) -> None:
        """Run all steps, judge all checks; fills the notebook and `record`."""
        loop = asyncio.get_running_loop()
        if not self.steps:
            return self._finish()
        drawing = loop.run_in_executor(None, self._draw)
        try:
            await self._start()
            self.seconds["start"] = time.monotonic() - self.begun
            self.drawn = drawing
            guilty: set[int] = set()
            done = 0                           # steps that need not be judged again
            while done < len(self.steps):
                done = await self._from_the_top(done, guilty)
        finally:
            with contextlib.suppress(Exception):
                await asyncio.shield(drawing)
            if self.talk is not None:
                self._note_usage()
                await self.talk.close()
        self._finish()

    async def _from_the_top(self, done: int, guilty: set[int]) -> int:
        """Run the steps in a fresh kernel; those before `done` for their effects only. Returns how far it came."""
        if self.talk is None and self.left > 0:
            await self._start()
        for number, step in enumerate(self.steps):
            if number in guilty or step.kind == "check" and number < done:
                continue
            again = number < done
            if self.left <= 0:
                self._out_of_time(number if not again else done)
                return len(self.steps)
            ran = await (self._check(step) if step.kind == "check" else self._cell(step, again))
            if not ran.usable:
                guilty.add(number)
                await self._stop()
                return max(done, number + 1)
            done = max(done, number + 1)
        return done

    async def _cell(self, step: Step, again: bool) -> Ran:
        ran = await self._run(step.source, step)
        cell = self.nb.cells[step.cell]
        if step.kind == "answer":
            if not again or not ran.usable:
                cell.outputs = [NotebookNode(output) for output in ran.outputs.list]
            mishap = _mishap(ran)
            if mishap is not None:
                self.mishaps[step.name] = mishap
        return ran

    async def _check(self, step: Step) -> Ran:
        exercise, token = self.exercises[step.name], secrets.token_hex(12)
        await self.drawn
        cases, content = self.cases[step.name]
        if files := {name: self.handed_in[name] for name in exercise.files if name in self.handed_in}:
            started = time.monotonic()         # what was handed in counts, not what the code would write once more
            self._show(step, await self._probed(exercise, files))
            self._add("judge", time.monotonic() - started)
            return Ran("done")
        if exercise.accepts == "artefact":
            content = to_wire({"files": list(exercise.files), "most": ANSWERS // 2})
        try:
            put(self.talk.room.exchange, token, content)
        except OSError as error:
            ran = Ran("died", words=f"the folder for its answers was made unusable ({error.strerror})", usable=False)
            self._show(step, stopped(exercise, Mishap("died", ran.words), self.seed))
            return ran
        source = PROBE.format(before=step.source, name=step.name, work=step.work, token=token)
        ran = await self._run(source, step)
        started = time.monotonic()
        try:
            blob = self.talk.answer(token, ANSWERS)
        except NoAnswer as missing:
            verdict = self._without_answer(exercise, ran, str(missing))
        else:
            verdict = await (self._artefact(exercise, blob) if exercise.accepts == "artefact" else
                             self._aside(verdict_of, exercise, blob, cases, self.seed))
        drop(self.talk.room.exchange, token)
        self._show(step, verdict)
        self._add("judge", time.monotonic() - started)
        return ran

    async def _artefact(self, exercise: Any, blob: bytes) -> Any:
        """Probe the student's files where the student's code never was."""
        files, verdict = await self._aside(files_of, exercise, blob, self.seed)
        return verdict if files is None else await self._probed(exercise, files)

    async def _probed(self, exercise: Any, files: dict[str, bytes]) -> Any:
        """The verdict on these files, which may be a stranger's: they are opened in a sandbox of their own."""
        from pefttools.grading.artefact import probe_files

        cases, content = self.cases[exercise.name]
        limits = replace(self.limits, notebook_seconds=self.limits.cell_seconds + 60)
        made = await probe_files(exercise, files, content, self.stages, limits, self.sandbox, self.secret)
        if type(made) is Mishap:
            return stopped(exercise, made, self.seed)
        return await self._aside(verdict_of, exercise, made, cases, self.seed)

    async def _aside(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)

    def _without_answer(self, exercise: Any, ran: Ran, missing: str) -> Any:
        if ran.end in ("time", "output", "died"):
            return stopped(exercise, Mishap(ran.end, ran.words), self.seed)
        if ran.outputs.error is None and ran.end == "done":
            return damaged(exercise, missing, self.seed)
        return no_work(exercise, ran.outputs.error, self.mishaps, missing, self.seed)

    async def _run(self, source: str, step: Step) -> Ran:
        started = time.monotonic()
        ran = await self.talk.run(source, max(0.5, min(self.limits.cell_seconds, self.left)))
        self._add(step.kind, time.monotonic() - started)
        if ran.limit or ran.end == "died":
            self.hits.append({"cell": step.name or f"cell {step.cell + 1}", "limit": ran.limit or "kernel died",
                              "words": ran.words})
        return ran

    # ---------------------------------------------------------------------------------------- around it

    async def _start(self) -> None:
        limits = replace(self.limits, notebook_seconds=max(5.0, self.left + 10))  # this side's clock speaks first
        for attempt in range(STARTS):
            self.talk = Conversation(self.stage, self.hidden, limits, self.sandbox, self.secret)
            try:
                await self.talk.start()
            except (KernelFailed, OSError, TimeoutError):  # a machine that is busy with others; nothing has run yet
                self.talk = None
                if attempt == STARTS - 1:
                    raise
            else:
                break
        self.starts += 1

    async def _stop(self) -> None:
        self._note_usage()
        talk, self.talk = self.talk, None
        await talk.close()

    def _draw(self) -> None:
        """The cases of all exercises, and right answers to them, while the kernel starts."""
        from pefttools.grading.judge import prepare
        from pefttools.grading.wire import to_bytes

        started = time.monotonic()
        for name, exercise in self.exercises.items():
            cases = exercise.cases(self.seed)
            self.cases[name] = cases, to_bytes(cases)
            prepare(exercise, self.seed)
        self._add("draw", time.monotonic() - started)

    def _show(self, step: Step, verdict: Any) -> None:
        output = {"output_type": "execute_result", "execution_count": None, "metadata": {},
                  "data": {"text/plain": repr(verdict), "text/html": _writable(verdict.html)}}
        self.nb.cells[step.cell].outputs = [NotebookNode(output, data=NotebookNode(output["data"]),
                                                         metadata=NotebookNode())]

    def _out_of_time(self, number: int) -> None:
        words = f"the notebook as a whole ran for longer than {self.limits.notebook_seconds:g} seconds"
        self.hits.append({"cell": "notebook", "limit": "notebook time", "words": words})
        for step in self.steps[number:]:
            if step.kind == "check":
                self._show(step, stopped(self.exercises[step.name], Mishap("time", words), self.seed))

    def _finish(self) -> None:
        """No graded cell without a verdict: nbgrader takes an empty one for full marks."""
        for cell in self.nb.cells:
            marks = cell.metadata.get("nbgrader", {})
            if cell.cell_type == "code" and marks.get("grade") and not marks.get("solution") and not cell.outputs:
                cell.outputs = [NotebookNode({"output_type": "error", "ename": "NotJudged", "traceback": [],
                                              "evalue": f"no exercise for {check_name(cell) or 'this cell'}"})]
        self.seconds["whole"] = time.monotonic() - self.begun
        from pefttools.grading import syscalls

        notes = [UNSAFE] if not self.sandbox else list(filter(None, [syscalls.status()]))
        self.record = {"seed": self.seed, "sandbox": self.sandbox, "notes": notes, "limits": self.hits,
                       "kernels": self.starts, "usage": self.record.get("usage", {}),
                       "seconds": {name: round(value, 3) for name, value in self.seconds.items()}}

    def _note_usage(self) -> None:
        usage = self.talk.usage
        if usage is not None:
            before = self.record.get("usage", {})
            self.record["usage"] = {name: max(value, before.get(name, 0)) for name, value in asdict(usage).items()}

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def _writable(text: str) -> str:
    """Half a surrogate pair, which an exception's message may hold, cannot be written to a file."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "")


def _mishap(ran: Ran) -> Mishap | None:
    """What went wrong in an answer cell, in words that end without a full stop."""
    if ran.end in ("time", "output", "died"):
        return Mishap(ran.end, ran.words)
    if ran.outputs.error is None:
        return Mishap("raised", "it stopped with an error") if ran.end == "error" else None
    name, message = ran.outputs.error
    if unwritten(name, message):
        return Mishap("unwritten", "it is not written yet")
    said = f"{name}: {message}".replace("`", "'").strip(": \n").split("\n")[0][:300]
    return Mishap("raised", f"it stopped with `{said}`")


def _run(work: Any) -> None:
    """Run a coroutine function to its end, also where an event loop already runs (formgrader)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work())
        return
    failed: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=in_a_thread, name="grading")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


_folder: tempfile.TemporaryDirectory | None = None


def _own_folder() -> str:
    """A temporary folder that lives as long as this process."""
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix="pt-stage-")
    return _folder.name
