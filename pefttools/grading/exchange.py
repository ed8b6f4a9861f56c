"""The folder that grader and sandbox both write: cases go in, answers come out, as files of bytes.

    grader                          /exchange                        sandbox
    put(folder, token, cases) ──►   TOKEN.in  ──────────────────────► inside.probe
    take(folder, token, most) ◄──   TOKEN.out ◄──────────────────────

A student's code can do anything to this folder: put links, pipes, devices or a terabyte of nothing where an answer
should be, take away permissions, swap files while they are read. So a file is opened without following links and
without waiting, its kind and size are asked of the open file, and no more is read than allowed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class NoAnswer(Exception):
    """There is no file that could be read as an answer; the message says what is there, for the student."""


def put(folder: Path, token: str, content: bytes) -> None:
    """Write TOKEN.in. Raises OSError where the folder was made unusable."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(folder / f"{token}.in", flags, 0o644)
    except PermissionError:
        os.chmod(folder, 0o700)  # it belongs to the student's user inside, who is ours outside
        handle = os.open(folder / f"{token}.in", flags, 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def take(folder: Path, token: str, most: int) -> bytes:
    """The bytes of TOKEN.out. Raises NoAnswer for what is no ordinary file of at most `most` bytes."""
    try:
        handle = os.open(folder / f"{token}.out", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NoAnswer("no answers were written") from None
    except OSError as error:
        raise NoAnswer(f"the answers cannot be opened ({error.strerror})") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise NoAnswer("where the answers should be is no ordinary file")
        if found.st_size > most:
            raise NoAnswer(f"the answers have {found.st_size:,} bytes; the limit is {most:,}")
        parts, left = [], most + 1
        while left > 0 and (part := os.read(handle, min(left, 2**20))):
            parts.append(part)
            left -= len(part)
        if left <= 0:
            raise NoAnswer(f"the answers grew beyond {most:,} bytes while they were read")
        return b"".join(parts)
    except OSError as error:
        raise NoAnswer(f"the answers cannot be read ({error.strerror})") from None
    finally:
        os.close(handle)


def drop(folder: Path, token: str) -> None:
    """Remove the files of this token, whatever they have become."""
    for name in (f"{token}.in", f"{token}.out"):
        try:
            os.unlink(folder / name)
        except OSError:
            pass
