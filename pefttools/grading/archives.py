"""Take the notebooks out of a zip or tar of somebody's making, and nothing else.

    archive ──names read, never used as paths──► wanted? ──size, ratio, count bounded──► INTO/0001-lora.ipynb

The name inside the archive decides whose a file is and whether it is wanted; where it is written is decided here. So
`../`, absolute paths, device names and links cannot reach anything. Bytes are counted as they come out, because sizes
in an archive are claims. An entry that is refused says why, in a sentence for the person who handed it in.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pefttools.grading.people import safe, shown

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
CHUNK = 2**16


class BadArchive(ValueError):
    """An archive that cannot be used at all; the message is one sentence."""


@dataclass(frozen=True)
class Bounds:
    """What an archive may hold. `total` counts bytes that are written for one person, `stream` all that is unpacked."""

    entries: int = 20_000
    names: int = 8 * 2**20  # bytes of a zip's list of names
    total: int = 300 * 2**20
    stream: int = 2**30
    ratio: int = 200  # deflate cannot reach this with text a person wrote


CLASS = Bounds(entries=200_000, names=128 * 2**20, stream=2**38)


@dataclass
class Entry:
    """One entry: unpacked to `path`, or refused (`problem`), or only named."""

    parts: tuple[str, ...]
    path: Path | None
    when: float = 0.0
    problem: str = ""


def is_archive(name: str) -> bool:
    """Whether a file of this name is taken for an archive."""
    return name.lower().endswith(ENDINGS)


def unpack(
    source: BinaryIO,
    name: str,
    into: Path,
    wanted: Callable[[tuple[str, ...]], int | None],
    bounds: Bounds,
    whose: Callable[[tuple[str, ...]], str] = lambda parts: "",
) -> Iterator[Entry]:
    """The wanted entries of an open archive file, unpacked one after another into the folder `into`.

    `wanted(parts)` is how many bytes an entry may have, 0 where its name is enough, None where it is of no interest;
    `whose(parts)` is the person whose `bounds.total` it counts for.
    Raises `BadArchive` (perhaps after some entries) where the archive as a whole is broken, too large or encrypted.
    """
    try:
        if name.lower().endswith(".zip"):
            yield from _unzip(source, name, _Taker(into, bounds, whose), wanted, bounds)
        else:
            yield from _untar(source, name, _Taker(into, bounds, whose), wanted, bounds)
    except BadArchive:
        raise
    except zipfile.BadZipFile as error:
        raise BadArchive(f"{shown(name)} is a broken zip archive ({error}); pack it again.") from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BadArchive(f"{shown(name)} is a broken archive ({error}); pack it again.") from error
    except (OSError, ValueError, NotImplementedError, RuntimeError, OverflowError, MemoryError, LookupError) as error:
        # what the two modules raise for headers that no honest program writes
        raise BadArchive(f"{shown(name)} cannot be unpacked ({type(error).__name__}: {error}).") from error


def _unzip(source: BinaryIO, name: str, taker: _Taker, wanted: Any, bounds: Bounds) -> Iterator[Entry]:
    with zipfile.ZipFile(_Careful(source, bounds.names, name)) as archive:
        members = archive.infolist()
        _few(len(members), bounds, name)
        for number, member in enumerate(members):
            parts = _parts(_decoded(member))
            limit = None if member.is_dir() else wanted(parts)
            if limit is None:
                continue
            entry = Entry(parts, None, _when(member.date_time))
            if stat.S_ISLNK(member.external_attr >> 16):
                entry.problem = f"{shown(parts[-1])} is a link inside the archive, and links are not followed."
            elif member.flag_bits & 0x41:
                entry.problem = f"{shown(parts[-1])} is encrypted; pack it again without a password."
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                entry.problem = f"{shown(parts[-1])} is packed in an unusual way; use an ordinary zip."
            elif member.file_size > 2**20 and member.file_size > bounds.ratio * max(member.compress_size, 1):
                entry.problem = (
                    f"{shown(parts[-1])} unpacks to more than {bounds.ratio} times its size; it was left alone."
                )
            else:
                entry.problem = _outside(parts)
            if limit and not entry.problem:
                try:
                    with archive.open(member) as stream:
                        taker.take(stream, entry, number, limit)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    entry.problem = f"{shown(parts[-1])} is damaged inside the archive ({error}); pack it again."
            yield entry


def _untar(source: BinaryIO, name: str, taker: _Taker, wanted: Any, bounds: Bounds) -> Iterator[Entry]:
    # A stream: nothing is sought in it, so all that is unpacked passes `_Bounded`, headers and skipped files included.
    opened: Any = source
    lower = name.lower()
    if lower.endswith(("gz",)):
        opened = gzip.GzipFile(fileobj=source)
    elif lower.endswith(".xz"):
        opened = lzma.LZMAFile(source)  # type: ignore[arg-type]
    elif lower.endswith(".bz2"):
        import bz2

        opened = bz2.BZ2File(source)
    with tarfile.open(fileobj=_Bounded(opened, bounds.stream, name), mode="r|", errors="replace") as archive:
        for number, member in enumerate(archive):
            _few(number + 1, bounds, name)
            archive.members = []  # it would remember every header
            parts = _parts(member.name)
            limit = None if member.isdir() else wanted(parts)
            if limit is None:
                continue
            entry = Entry(parts, None, float(member.mtime) if 0 < member.mtime < 2**33 else 0.0)
            if not member.isreg():
                entry.problem = f"{shown(parts[-1])} is a link or device inside the archive, and those are left alone."
            else:
                entry.problem = _outside(parts)
            if limit and not entry.problem:
                taker.take(archive.extractfile(member), entry, number, limit)
            yield entry


class _Taker:
    """Writes entries to files of safe names, and counts for each person."""

    def __init__(self, into: Path, bounds: Bounds, whose: Callable[[tuple[str, ...]], str]) -> None:
        self._into, self._bounds, self._whose = into, bounds, whose
        self._taken: dict[str, int] = {}

    def take(self, stream: Any, entry: Entry, number: int, limit: int) -> None:
        whose = self._whose(entry.parts)
        left = self._bounds.total - self._taken.get(whose, 0)
        target = self._into / f"{number:05d}-{safe(entry.parts[-1])}"
        self._into.mkdir(parents=True, exist_ok=True)
        count = 0
        with target.open("xb") as file:
            while count <= min(limit, left) and (chunk := stream.read(CHUNK)):
                count += len(chunk)
                file.write(chunk)
        self._taken[whose] = self._taken.get(whose, 0) + count
        if count > min(limit, left):
            target.unlink()
            much = (
                f"{limit / 2**20:.0f} MiB" if limit <= left else f"{self._bounds.total / 2**20:.0f} MiB with the others"
            )
            entry.problem = f"{shown(entry.parts[-1])} unpacks to more than {much}."
            return
        if entry.when:
            os.utime(target, (entry.when, entry.when))
        entry.path = target


def _few(count: int, bounds: Bounds, name: str) -> None:
    if count > bounds.entries:
        raise BadArchive(f"{shown(name)} has more than {bounds.entries:,} entries; pack the notebook alone.")


def _parts(name: str) -> tuple[str, ...]:
    """The folders and the file of an entry, Windows' separators included; what leads outside keeps its mark."""
    name = name.replace("\\", "/")[:4096]
    mark = ("",) if name.startswith("/") else ()
    return mark + tuple(part for part in name.split("/") if part not in ("", ".")) or ("unnamed",)


def _outside(parts: tuple[str, ...]) -> str:
    if parts[0] in ("", "~") or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return f"{shown(parts[-1])} is to be unpacked outside of its folder; such entries are left alone."
    return ""


def _decoded(member: zipfile.ZipInfo) -> str:
    """A zip's name: UTF-8 where it says so and, as most programs write it, also where it does not."""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


def _when(date: tuple[int, int, int, int, int, int]) -> float:
    try:
        return max(0.0, time.mktime((*date, 0, 0, -1)))
    except (ValueError, OverflowError):
        return 0.0


class _Careful(io.RawIOBase):
    """A file that gives no more at once than a zip's list of names may have: zipfile reads that list in one go."""

    def __init__(self, file: BinaryIO, limit: int, name: str) -> None:
        self._file, self._limit, self._name = file, limit, name

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._limit + 1 if size is None or size < 0 else min(size, self._limit + 1))
        if len(data) > self._limit:
            raise BadArchive(f"{shown(self._name)} has too long a list of names; pack the notebook alone.")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


class _Bounded:
    """What is unpacked, up to a limit."""

    def __init__(self, file: Any, limit: int, name: str) -> None:
        self._file, self._left, self._limit, self._name = file, limit, limit, name

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise BadArchive(f"{shown(self._name)} unpacks to more than {self._limit / 2**20:.0f} MiB.")
        return data
