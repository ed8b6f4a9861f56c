"""Every file that was handed in, whatever it lies in, without opening anything that could hang or lead elsewhere.

    folder ──lstat, never followed──┐
    one file ───────────────────────┼──► Found(parts=("alice", "02_lora", "lora.ipynb"), path, when, problem)
    archive ──unpack, safe names────┘

A pipe, a device, a link, a folder that may not be read: each is a `Found` with a `problem` that says so, for the one
person it belongs to. One person's folder has a budget of files and of depth; what is over it is said, too.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pefttools.grading.archives import CLASS, BadArchive, Bounds, is_archive, unpack
from pefttools.grading.people import person, shown
from pefttools.grading.splice import LIMIT

ARTEFACTS = ("adapter_model.safetensors", "adapter_config.json", "llama_1b_model.safetensors", "llama_1b_config.json")
ARTEFACT_LIMIT = 256 * 2**20
BOUNDS = Bounds()  # of one person's archive
SKIPPED = {"__MACOSX", "__pycache__", "node_modules", "site-packages", "autograded", "feedback"}
FILES = 20_000  # in one person's folder
DEPTH = 20
WRAPPERS = {"submissions", "submitted", "submission", "hand-ins", "handins"}
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@dataclass
class Found:
    """One file: `parts` is where it lay, `path` where it can be read (None where it cannot)."""

    parts: tuple[str, ...]
    path: Path
    when: float = 0.0
    size: int = 0
    problem: str = ""

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def kind(self) -> str:
        """ "notebook", "archive", "artefact", "renamed" (may be a notebook all the same) or "other"."""
        name = platform_name(self.name)
        if name.endswith(".ipynb"):
            return "notebook"
        if is_archive(name):
            return "archive"
        if name in ARTEFACTS:
            return "artefact"
        return "renamed" if ".ipynb" in name or name.endswith((".json", ".txt")) or "." not in name else "other"


def platform_name(name: str) -> str:
    """A file's own name in lower case, without what a learning platform put before it."""
    known = person(name)
    return (known[1] if known is not None and known[1] else name).lower()


def walk(folder: Path) -> Iterator[Found]:
    """The files under a folder of submissions, in order; each of its folders has a budget of its own."""
    for entry, problem in _list(folder, 50 * FILES):
        parts = (os.path.basename(entry),)
        if problem:
            raise PermissionError(problem)
        if _skipped(parts[0]):
            continue
        yield from _one(Path(entry), parts, [FILES])


def one(path: Path) -> Found:
    """The one file, or what is wrong with it."""
    return next(_one(path, (path.name,), [FILES]))


def _one(path: Path, parts: tuple[str, ...], budget: list[int]) -> Iterator[Found]:
    stack = [(path, parts)]
    while stack:
        path, parts = stack.pop()
        budget[0] -= 1
        if budget[0] == 0:
            yield Found(parts, path, problem=f"There are more than {FILES:,} files; the rest was not looked at.")
        if budget[0] <= 0:
            return
        name = shown(parts[-1])
        try:
            status = os.lstat(path)
        except (OSError, ValueError) as error:
            yield Found(parts, path, problem=f"{name} cannot be read: {_why(error)}.")
            continue
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            yield Found(parts, path, status.st_mtime, status.st_size)
        elif kind == stat.S_IFDIR and len(parts) >= DEPTH:
            yield Found(parts, path, problem=f"{name} lies more than {DEPTH} folders deep and was not looked into.")
        elif kind == stat.S_IFDIR:
            inside, empty = [], True
            for entry, problem in _list(path):
                child, empty = os.path.basename(entry) if entry else "", False
                if problem:
                    yield Found(parts, path, status.st_mtime, problem=problem)
                elif not _skipped(child):
                    inside.append((Path(entry), (*parts, child)))
            if empty:
                yield Found((*parts, ""), path, status.st_mtime, problem=f"{name} is an empty folder.")
            stack.extend(reversed(inside))
        elif kind == stat.S_IFLNK:
            yield Found(parts, path, status.st_mtime, problem=f"{name} is a link, and links are not followed.")
        else:
            what = KINDS.get(kind, "something else")
            yield Found(
                parts, path, status.st_mtime, problem=f"{name} is no ordinary file but {what}; it was not opened."
            )


def _list(folder: Path, limit: int = FILES) -> Iterator[tuple[str, str]]:
    """(path, "") for each name in a folder, in order, or once ("", why not)."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.path for entry in itertools.islice(entries, limit)]
    except (OSError, ValueError) as error:
        yield "", f"The folder {shown(folder.name)} cannot be read: {_why(error)}."
        return
    for name in sorted(names):
        yield name, ""


def _skipped(name: str) -> bool:
    return name.startswith(".") or name in SKIPPED


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def inside(archive: Found, into: Path, bounds: Bounds | None = None) -> Iterator[Found]:
    """What an archive holds of notebooks and artefacts (of a whole class's also archives), unpacked into a folder."""

    def wanted(parts: tuple[str, ...]) -> int | None:
        if any(_skipped(part) for part in parts if part not in ("..", "")):
            return None
        kind = Found(parts, into).kind
        if kind == "archive" and bounds is CLASS:
            return BOUNDS.total
        return {"notebook": LIMIT, "renamed": LIMIT, "artefact": ARTEFACT_LIMIT}.get(kind, 0)

    def whose(parts: tuple[str, ...]) -> str:
        known = person(parts[0]) if bounds is CLASS else None
        return known[0].key if known is not None else parts[0] if bounds is CLASS else ""

    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(archive.path, flags), "rb") as source:
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                raise BadArchive(f"{shown(archive.name)} is no ordinary file.")
            for entry in unpack(source, platform_name(archive.name), into, wanted, bounds or BOUNDS, whose):
                path = entry.path or archive.path
                size = entry.path.stat().st_size if entry.path else 0
                yield Found(entry.parts, path, entry.when or archive.when, size, entry.problem)
    except OSError as error:
        yield Found((), archive.path, archive.when, problem=f"{shown(archive.name)} cannot be read: {_why(error)}.")
    except BadArchive as error:
        yield Found((), archive.path, archive.when, problem=str(error))


def unwrapped(files: list[Found], stem: str) -> list[Found]:
    """Without the one folder that classes are often packed in, and that says nothing about a person."""
    tops = {found.parts[0] for found in files if found.parts}
    wrappers = {top for top in tops if top.lower() in WRAPPERS or (len(tops) == 1 and stem and top == stem)}
    return [
        Found(f.parts[1:], f.path, f.when, f.size, f.problem) if f.parts and f.parts[0] in wrappers else f
        for f in files
        if not (f.parts and f.parts[0] in wrappers and f.parts[1:] in ((), ("",)))
    ]
