"""Every hand-in of a class, from wherever it comes: whose it is, which chapter, and the notebook, or why there is none.

    folder │ zip of Canvas or Moodle │ one file
        └─ found ──► files ──by person──► the newest readable notebook of each chapter ──► HandIn
                                              └ a zip of one person's: opened, one level deep

Whose a file is, is read from the outermost name only: what is inside one person's folder or zip is theirs, whatever it
is called. Which chapter it is, is read from its cells. Nothing that somebody handed in stops this or hangs it: it
becomes a `HandIn` with a `problem`. Files are unpacked into the grading folder's `received/` and nowhere else.
"""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pefttools.grading.archives import CLASS, is_archive
from pefttools.grading.found import ARTEFACT_LIMIT, ARTEFACTS, Found, inside, one, platform_name, unwrapped, walk
from pefttools.grading.people import Person, owner_of, safe, shown
from pefttools.grading.roster import read_people, tell_apart
from pefttools.grading.splice import (
    CELL_LIMIT,
    LIMIT,
    BadSubmission,
    answer_names,
    cell_source,
    identity,
    read_notebook,
)

__all__ = ["UNKNOWN", "HandIn", "collect", "original", "read_people", "recognise"]

UNKNOWN = "No exercise of"
NOTEBOOKS = 12  # of one person: the newest are read
ARCHIVES = 4
BYTES = 3 * LIMIT  # of one person's notebooks in all


@dataclass
class HandIn:
    """One file that somebody handed in."""

    student: str
    path: Path
    chapter: str = ""  # "02_lora", once recognised
    notebook: Any = None
    problem: str = ""  # why no answers can be taken from it
    notes: list[str] = field(default_factory=list)
    artefacts: dict[str, Path] = field(default_factory=dict)  # by name; see found.ARTEFACTS
    person: Person | None = None  # names and numbers that a learning platform gave


def collect(path: str | Path, pristine: dict[str, Any], out: Path | None = None) -> list[HandIn]:
    """The hand-ins under `path` (a folder, a notebook, or an archive), for the chapters {name: notebook}.

    `out` is the grading folder; `out/received/` takes what is unpacked and `people.json`, in which names and platforms'
    numbers are kept for the export and for the next run. Raises OSError only where `path` itself cannot be read.
    """
    path = Path(path)
    received = (out / "received") if out is not None else _scratch()
    archive = path.is_file() and is_archive(path.name)
    if archive:
        room = _fresh(received / ".unpacked" / f"{safe(path.stem)}-{_short(str(path.resolve()))}")
        files: Iterable[Found] = inside(one(path), room / "class", CLASS)
        base = path.name.split(".")[0]
    elif path.is_dir():
        room = _fresh(received / ".unpacked" / "folder")
        files, base = walk(path), path.resolve().name
    else:
        room, files, base = _fresh(received / ".unpacked" / "file"), [one(path)], path.resolve().parent.name
    groups: dict[tuple[str, str], tuple[Person, list[Found]]] = {}
    for found in unwrapped(list(files), path.name.split(".")[0] if archive else ""):
        owner = owner_of(found.parts, base, pristine)
        if not owner.key:
            continue
        loose = len(found.parts) == 1 and owner.lms == ""
        if loose and not found.problem and found.kind not in ("notebook", "archive") and ".ipynb" not in found.name:
            continue  # a list of the class, a read-me: not a hand-in
        groups.setdefault((owner.key, owner.lms_id), (owner, []))[1].append(found)
    hand_ins: list[HandIn] = []
    for number, (owner, theirs) in enumerate(groups.values()):
        try:
            hand_ins += _of_one(owner, theirs, pristine, out, room / f"{number:05d}")
        except Exception as error:  # whatever it was: this one person's, and said
            problem = f"The files could not be taken in ({type(error).__name__}: {shown(str(error), 200)})."
            hand_ins.append(HandIn(owner.student, theirs[0].path, problem=problem, person=owner))
    tell_apart(hand_ins, received / "people.json" if out is not None else None)
    return hand_ins


def recognise(notebook: dict[str, Any], pristine: dict[str, Any]) -> str | None:
    """The chapter that most of a notebook's recognisable answer cells belong to, or None."""
    chapters = {name: set(answer_names(nb)) for name, nb in pristine.items()}
    count = {
        name: len({identity(cell, names) for cell in notebook["cells"]} - {None}) for name, names in chapters.items()
    }
    best = max(count, key=lambda name: count[name], default=None)
    return best if best is not None and count[best] else None


def original(path: Path, out: Path | None) -> Path:
    """What was handed in, where `path` is what an earlier run put in its place."""
    if out is None or not path.is_relative_to(out / "submitted"):
        return path
    kept = out / "received" / path.relative_to(out / "submitted")
    mark = kept.with_suffix(".spliced")
    same = kept.is_file() and mark.is_file() and mark.read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    return kept if same else path


# ---------------------------------------------------------------------------------------------------- one person


def _of_one(who: Person, files: list[Found], pristine: dict[str, Any], out: Path | None, room: Path) -> list[HandIn]:
    """One person's hand-ins: at most one for each chapter, and one for what cannot be read or placed."""
    notes = ["It was handed in late."] if who.late else []
    every: list[Found] = []
    archives = 0
    for number, found in enumerate(sorted(files, key=lambda f: f.when, reverse=True)):
        if found.kind != "archive" or found.problem:
            every.append(found)
            continue
        archives += 1
        if archives > ARCHIVES:
            found.problem = f"There are more than {ARCHIVES} archives; {shown(found.name)} was not opened."
            every.append(found)
            continue
        for member in inside(found, room / f"{number:03d}"):
            if member.parts and member.kind == "archive":
                member.problem = f"{shown(member.name)} is an archive in an archive: hand in the notebook itself."
            every.append(Found((*found.parts, *member.parts), member.path, member.when, member.size, member.problem))
    every.sort(key=lambda f: (f.when, f.parts), reverse=True)
    notebooks = [f for f in every if f.kind == "notebook"]
    if len(notebooks) > NOTEBOOKS:
        notes.append(f"There are {len(notebooks)} notebooks; only the newest {NOTEBOOKS} were read.")
    read, left = [], BYTES
    for found in notebooks[:NOTEBOOKS]:
        left -= found.size if found.size <= LIMIT else 0
        if left < 0 and not found.problem:
            found.problem = (
                f"The notebooks have more than {BYTES / 2**20:.0f} MiB in all; {shown(found.name)} was not read."
            )
        read.append(_read(who, found, pristine, out, room))
    if all(h.problem for h in read):  # a notebook may go by another name; else say what came instead
        again = [_read(who, f, pristine, out, room) for f in every if f.kind == "renamed" and not f.problem][:NOTEBOOKS]
        for hand_in in again:
            if not hand_in.problem:
                hand_in.notes.append(f"{shown(hand_in.path.name)} is not called .ipynb, but is a notebook.")
        read += [h for h in again if not h.problem]
    if not read:
        problems = [f.problem for f in every if f.problem]
        came = ", ".join(sorted({shown(platform_name(f.name)) for f in every if not f.problem})[:5])
        text = (
            problems[0] if problems else f"There is no notebook: {came or 'nothing'} was handed in, not an .ipynb file."
        )
        hand_in = HandIn(who.student, every[0].path if every else files[0].path, problem=text, person=who)
        hand_in.chapter = _named((files[0] if not every else every[0]).parts, pristine)
        read, notes = [hand_in], [*notes, *problems[1:5]]
    kept: dict[str, HandIn] = {}
    for hand_in in read:  # from the newest to the oldest
        first = kept.setdefault(hand_in.chapter, hand_in)
        if first is not hand_in:
            best, other = (hand_in, first) if first.problem and not hand_in.problem else (first, hand_in)
            told = (
                f"Another file for this chapter, {shown(other.path.name)}, is older or unreadable and was not graded."
            )
            if not hand_in.chapter:
                told = other.problem
            best.notes = [*best.notes, *other.notes, told][:20]
            kept[hand_in.chapter] = best
    for hand_in in kept.values():
        hand_in.notes = [*notes, *hand_in.notes]
        hand_in.artefacts = _artefacts(every, hand_in, out)
    return list(kept.values())


def _read(who: Person, found: Found, pristine: dict[str, Any], out: Path | None, room: Path) -> HandIn:
    hand_in = HandIn(who.student, found.path, person=who)
    try:
        if found.problem:
            raise BadSubmission(found.problem)
        source = found.path if found.size > LIMIT else original(found.path, out)
        notebook = read_notebook(source, name=shown(found.name))
        hand_in.chapter = recognise(notebook, pristine) or ""
        if not hand_in.chapter:
            raise BadSubmission(f"{UNKNOWN} {', '.join(pristine)} was found in {shown(found.name)}.")
        hand_in.notebook = {"cells": [_light(cell) for cell in notebook["cells"]]}
        if str(found.path) != str(found.path).encode("utf-8", "replace").decode("utf-8"):
            room.mkdir(parents=True, exist_ok=True)  # a name that no report can be written with
            hand_in.path = Path(shutil.copy2(found.path, room / f"renamed-{safe(found.name)}", follow_symlinks=False))
    except (BadSubmission, OSError) as error:
        hand_in.problem = str(error)
        hand_in.chapter = "" if hand_in.problem.startswith(UNKNOWN) else _named(found.parts, pristine)
    return hand_in


def _light(cell: Any) -> Any:
    """A cell without what only weighs: outputs of a whole class need not be in memory."""
    if not isinstance(cell, dict):
        return None
    source = cell_source(cell)  # one character over the limit is enough for the splice to refuse it
    small = {k: v for k, v in cell.items() if k not in ("outputs", "attachments", "source", "input")}
    return {**small, "source": source[: CELL_LIMIT + 1]} if source is not None else small


def _named(parts: tuple[str, ...], pristine: Iterable[str]) -> str:
    """The one chapter whose name is in a path, or ""."""
    words = {*parts, *re.split(r"[ _\-.]", Path(parts[-1] or "x").stem if parts else "")}
    named = [name for name in pristine if {name, name[3:]} & words or any(name in part for part in parts)]
    return named[0] if len(named) == 1 else ""


def _artefacts(files: list[Found], hand_in: HandIn, out: Path | None) -> dict[str, Path]:
    """The person's artefact files, copied under safe names; of several, those of the folder that has most of them."""
    folders: dict[tuple[str, ...], dict[str, Found]] = {}
    for found in files:
        name = platform_name(found.name)
        if (
            found.kind != "artefact"
            or (named := _named(found.parts[:-1], [hand_in.chapter])) != hand_in.chapter
            and named
        ):
            continue
        if found.problem or found.size > ARTEFACT_LIMIT:
            hand_in.notes.append(
                found.problem or f"{name} has more than {ARTEFACT_LIMIT / 2**20:.0f} MiB and was left out."
            )
        else:
            folders.setdefault(found.parts[:-1], {}).setdefault(name, found)
    if not folders or hand_in.problem:
        return {}
    best = max(folders.values(), key=len)
    if out is None:
        return {name: found.path for name, found in best.items()}
    target = _fresh(out / "received" / ".artefacts" / f"{safe(hand_in.chapter)}-{_short(hand_in.person.key)}")
    target.mkdir(parents=True)
    return {
        name: Path(shutil.copyfile(best[name].path, target / name, follow_symlinks=False))
        for name in ARTEFACTS
        if name in best
    }


def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pefttools-received-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _fresh(folder: Path) -> Path:
    """An empty place of our own: what an earlier run unpacked there is old."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:10]
