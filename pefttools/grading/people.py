"""Whose a hand-in is: what learning platforms put into file names, and names that any file system bears.

    doejane_LATE_12345_67890_lora.ipynb              Canvas     doejane-12345, late, lora.ipynb
    Jane Doe_12345_assignsubmission_file_/…          Moodle     Jane Doe, participant 12345
    Jane Doe_12345_assignsubmission_file_lora.ipynb  Moodle     the same, all in one folder
    jdoe/02_lora/lora.ipynb                          nbgrader   jdoe
    jdoe_lora (1).ipynb                              anything   jdoe

A Canvas number is a person's for good, so it is part of the name: two people may be called doejane. A Moodle number
belongs to one assignment only, so there the name is the person and the number is kept beside it for the grade import.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

CANVAS = re.compile(
    r"(?P<who>[^_]+)(?P<late>_late)?_(?P<id>[0-9]{1,18})_(?P<submission>[0-9]{3,18})_(?P<file>.+)", re.I
)
MOODLE = re.compile(
    r"(?P<who>.+)_(?P<id>[0-9]{1,18})_assignsubmission_(?P<kind>file|onlinetext)(?:_(?P<file>.*))?", re.I | re.S
)
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])", re.I)
COPIES = re.compile(r"( ?\(\d+\)|-Copy\d*| - Copy| copy)+$", re.I)  # browsers', Jupyter's, Windows', macOS'
LENGTH = 100  # bytes in UTF-8: a file name may have 255, nbgrader's column holds 128 characters


@dataclass(frozen=True)
class Person:
    """`key` tells people apart, `student` is the name asked for in file systems and gradebook."""

    key: str
    student: str
    name: str = ""  # as the platform writes it
    lms: str = ""  # "canvas" or "moodle"
    lms_id: str = ""
    late: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """What nbgrader's `update_or_create_student` takes, as far as it is known."""
        if self.lms != "moodle" or not self.name:
            return {}
        first, _, last = self.name.rpartition(" ")
        return {"first_name": first or last, "last_name": last if first else ""}


def person(part: str) -> tuple[Person, str] | None:
    """Who a platform's file or folder name is about, and the rest of the name; None where it is no platform's."""
    part = unicodedata.normalize("NFC", part)
    if len(part) > 1000:
        return None
    if found := MOODLE.fullmatch(part):
        name, number = readable(found["who"]), found["id"]
        if re.fullmatch(r"participant", name, re.I):  # anonymous marking: the number is all there is
            name = f"Participant {number}"
        return Person(f"moodle {name.casefold()}", safe(name), name, "moodle", number), found["file"] or ""
    if found := CANVAS.fullmatch(part):
        name, number = readable(found["who"]), found["id"]
        return (
            Person(f"canvas {number}", safe(f"{name}-{number}"), name, "canvas", number, found["late"] is not None),
            found["file"],
        )
    return None


def somebody(name: str) -> Person:
    """The person that a plain file or folder name stands for."""
    name = unicodedata.normalize("NFC", name)
    return Person(f"name {name}", safe(name))


def owner_of(parts: tuple[str, ...], folder: str, chapters: Iterable[str]) -> Person:
    """A platform's name, else the first folder that is not a chapter's, else the file's name without the chapter's."""
    while parts and parts[0] in ("", "..", "~"):
        parts = parts[1:]
    shorts = {name for chapter in chapters for name in (chapter, chapter[3:])}
    while len(parts) > 1 and parts[0] in shorts:
        parts = parts[1:]
    if parts and (known := person(parts[0])) is not None:
        return known[0]
    if len(parts) > 1:
        return somebody(parts[0])
    if parts == ("",):  # a chapter's folder with nothing in it
        return Person("", "")
    name = parts[0] if parts else folder
    name = re.sub(r"\.ipynb.*$|\.(tar\.)?\w{1,4}$", "", name, flags=re.I | re.S)
    name = COPIES.sub("", name)
    for short in sorted(shorts, key=len, reverse=True):
        if name == short or (name.endswith(short) and name[-len(short) - 1] in " _-."):
            name = name[: -len(short)].rstrip(" _-.") or folder
            break
    return somebody(name)


def safe(name: str) -> str:
    """A name for folders on any system, for nbgrader's paths (glob patterns, regular expressions), CSV and database.

    Letters of any script, digits, `_ . @ - ` and blanks stay; everything else becomes "_".
    """
    name = re.sub(r"[^\w.@ -]", "_", unicodedata.normalize("NFC", name))
    name = _cut(name.strip(". \t").lstrip("-@. "), LENGTH).rstrip(". ") or "unnamed"
    return f"_{name}" if DEVICES.fullmatch(name.split(".")[0].strip()) else name


def apart(name: str, key: str) -> str:
    """A second person's name where two come to the same: with a mark that is the same in every run."""
    return f"{_cut(name, LENGTH - 7).rstrip('. ')}-{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:6]}"


def folded(name: str) -> str:
    """What a file system that does not tell upper from lower case takes a name for."""
    return unicodedata.normalize("NFKC", name).casefold()


def readable(name: str, length: int = 100) -> str:
    """A name of somebody's choosing for messages, CSV and pages: one line, printable, of bounded length."""
    text = unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode("utf-8"))
    text = "".join(letter if letter.isprintable() else "_" for letter in text)
    text = re.sub(r"[,;\"]", " ", text).lstrip("=+-@ ").strip()
    return text if len(text) <= length else text[: length - 1] + "…"


def shown(name: str, length: int = 80) -> str:
    """A file's name for messages."""
    text = name.encode("utf-8", "replace").decode("utf-8")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= length else f"{text[: length - 21]}…{text[-20:]}"


def _cut(name: str, length: int) -> str:
    return name.encode("utf-8", "replace")[:length].decode("utf-8", "ignore")
