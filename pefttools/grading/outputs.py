"""A kernel's messages as outputs of an answer cell: text and pictures of bounded size, nothing that acts.

    stream                        kept: the beginning and the end of a long text
    execute_result, display_data  text/plain, and image/png where it is a PNG of reasonable size
    error                         name, message, the end of the traceback
    everything else               dropped: HTML, JavaScript, widgets, updates of other outputs, clear_output

The messages come from a process that a student's code lives in, and may be anything at all.
"""

from __future__ import annotations

import base64
import re
from typing import Any

TEXT = 50_000       # characters of what one cell prints; as many again for its results
OUTPUTS = 40        # of one cell
PICTURE = 2**20     # characters of one picture in base64
PICTURES = 4 * 2**20
PIXELS = 2**24
MARK = "\n… ({} characters left out) …\n"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Outputs:
    """Collects one cell's outputs. `add` takes any message; `list` is what goes into the notebook; `error` the last one."""

    def __init__(self) -> None:
        self._items: list[dict[str, Any]] = []
        self._text, self._pictures = TEXT, PICTURES
        self.error: tuple[str, str] | None = None

    def add(self, kind: str, content: dict[str, Any]) -> None:
        """Take what may be kept of a message; never raises on what is in it."""
        if kind == "stream":
            self._stream(content)
        elif kind == "error":
            self._error(content)
        elif kind in ("execute_result", "display_data"):
            self._data(content)

    def fail(self, name: str, message: str) -> None:
        """An error of our own making: the time limit, a kernel that died."""
        self.error = name, message
        self._put({"output_type": "error", "ename": name, "evalue": message, "traceback": [f"{name}: {message}"]})

    @property
    def list(self) -> list[dict[str, Any]]:
        """The outputs, as a notebook holds them."""
        return [{**item, "text": _shorten(item["text"], TEXT)} if item["output_type"] == "stream" else item
                for item in self._items]

    def _put(self, item: dict[str, Any]) -> None:
        if len(self._items) < OUTPUTS:
            self._items.append(item)
        elif item["output_type"] == "error":
            self._items[-1] = item

    def _stream(self, content: dict[str, Any]) -> None:
        name = "stderr" if content.get("name") == "stderr" else "stdout"
        text = _text(content.get("text"), 4 * TEXT)
        if not text:
            return
        for item in self._items[::-1]:
            if item["output_type"] != "stream":
                break
            if item["name"] == name:  # the end matters most, and only so much is held
                item["text"] = _overwritten(item["text"] + text)
                if len(item["text"]) > 4 * TEXT:
                    item["text"] = _shorten(item["text"], TEXT)
                return
        self._put({"output_type": "stream", "name": name, "text": _overwritten(text)})

    def _data(self, content: dict[str, Any]) -> None:
        data = content.get("data")
        if type(data) is not dict:
            return
        kept = {}
        plain = _text(data.get("text/plain"), TEXT)
        if plain and self._text > 0:
            kept["text/plain"] = _shorten(plain, self._text)
            self._text -= len(kept["text/plain"])
        picture = data.get("image/png")
        if type(picture) is str and len(picture) <= min(PICTURE, self._pictures) and _is_png(picture):
            kept["image/png"] = picture
            self._pictures -= len(picture)
        if kept:
            self._put({"output_type": "display_data", "data": kept, "metadata": {}})

    def _error(self, content: dict[str, Any]) -> None:
        name = _line(content.get("ename"), 100) or "Error"
        message = _text(content.get("evalue"), 2_000)
        lines = content.get("traceback")
        lines = [_text(line, 4_000) for line in lines[-20:]] if type(lines) is list else []
        while sum(map(len, lines)) > 20_000:
            lines.pop(0)
        self.error = name, message
        self._put({"output_type": "error", "ename": name, "evalue": message,
                   "traceback": lines or [f"{name}: {message}"]})


def _text(value: Any, most: int) -> str:
    """A text that can be written to a file, or "" for what is none."""
    if type(value) is not str:
        return ""
    text = _shorten(value, most).encode("utf-8", "replace").decode()
    return text.replace("\x00", "")


def _line(value: Any, most: int) -> str:
    return " ".join(ESCAPES.sub("", _text(value, most)).split())


def _shorten(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = max(0, most - 60) // 2
    return text[:half] + MARK.format(f"{len(text) - 2 * half:,}") + text[len(text) - half:]


def _overwritten(text: str) -> str:
    """A progress bar writes its line again and again: the last one stays."""
    if "\r" not in text:
        return text
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def _is_png(text: str) -> bool:
    """A PNG with a bounded number of pixels: a small file can hold more than a browser's memory."""
    if re.fullmatch(r"[A-Za-z0-9+/=\n]*", text) is None:
        return False
    try:
        head = base64.b64decode(text.replace("\n", "")[:64])
    except ValueError:
        return False
    width, height = (int.from_bytes(head[at:at + 4], "big") for at in (16, 20))
    return head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR" and 0 < width * height <= PIXELS
