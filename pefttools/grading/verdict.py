"""The verdict on a work, and how it looks: a box in notebooks, lines in a terminal, a number to nbgrader."""

from __future__ import annotations

import html
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pefttools.grading.exercise import Exercise

# Colours are only an accent: a border and a tint that both light and dark themes bear; the words and the mark tell.
LOOKS = {"passed": ("✓", "Passed", "46, 125, 50"), "blank": ("○", "Not written yet", "117, 117, 117")}
FAILED = ("✗", "Not yet", "198, 40, 40")


@dataclass(frozen=True)
class Verdict:
    """What came of checking a work. `float(verdict)` and its text are the points, `bool(verdict)` whether it passed.

    `kind` is "passed", "blank" (not written yet), "raised", "missing", "extra", "type", "shape", "dtype", "value" or
    "work" (what was handed to the check cannot be the work). `expected` and `got` are texts. `case_number` is from 0.
    """

    exercise: str
    title: str
    chapter: str
    passed: bool
    points: int
    max_points: int
    kind: str
    message: str
    leaf: str | None = None
    expected: str | None = None
    got: str | None = None
    mistake: str | None = None
    case_number: int | None = None
    case: str | None = None
    place: str | None = None
    line: str | None = None
    printed: str = ""
    seed: int | None = None
    progress: str = ""

    @classmethod
    def of(cls, exercise: Exercise, kind: str, message: str, **more: Any) -> Verdict:
        """The verdict on a work for this exercise: all of its points when `kind` is "passed", else none."""
        passed = kind == "passed"
        return cls(
            exercise.name,
            exercise.title,
            exercise.chapter,
            passed,
            exercise.points if passed else 0,
            exercise.points,
            kind,
            message,
            **more,
        )

    def __bool__(self) -> bool:
        return self.passed

    def __float__(self) -> float:
        return float(self.points)

    def __repr__(self) -> str:
        return str(self.points)  # nbgrader reads the last expression of a graded cell as its score

    def to_dict(self) -> dict:
        """As plain JSON-able data."""
        return asdict(self)

    @property
    def headline(self) -> str:
        """ "✓ Passed · The forward pass of LoRA · 2 of 2 points" """
        mark, word, _ = LOOKS.get(self.kind, FAILED)
        points = "point" if self.max_points == 1 else "points"
        return f"{mark} {word} · {self.title} · {self.points} of {self.max_points} {points}"

    @property
    def text(self) -> str:
        """The whole verdict as lines of text."""
        lines = [f"{self.headline} ({self.exercise})", *self.message.splitlines()]
        if self.case:
            lines.append(f"This was {self.case}")
        if self._side_by_side:
            lines += ["expected:", *_indent(self.expected), "got:", *_indent(self.got)]
        if self.printed and not self.passed:
            lines += ["your code printed:", *_indent(self.printed)]
        if self.case:
            lines.append(f"These inputs to try it yourself: {self._call}")
        return "\n".join(lines + ([self.progress] if self.progress else []))

    @property
    def _side_by_side(self) -> bool:
        """Whether expected and got are worth showing beyond the sentence, which has short ones in it."""
        if not self.expected or not self.got or self.kind not in ("value", "shape"):
            return False
        return self.expected.startswith("[") or max(len(self.expected), len(self.got)) > 40

    @property
    def _call(self) -> str:
        return f'from pefttools.grading import case; case("{self.exercise}", {(self.case_number or 0) + 1})'

    @property
    def html(self) -> str:
        """The verdict as one HTML box: inline style only, no script, nothing loaded; the student's text escaped."""
        _, _, colour = LOOKS.get(self.kind, FAILED)
        parts = [f"<div><strong>{html.escape(self.headline)}</strong></div>"]
        parts += [
            f"<div style='margin-top:.35em'>{_marked(paragraph)}</div>" for paragraph in _paragraphs(self.message)
        ]
        if self._side_by_side:
            cells = "".join(
                f"<div><div style='opacity:.75'>{name}</div>{_pre(text)}</div>"
                for name, text in (("expected", self.expected), ("got", self.got))
            )
            parts.append(f"<div style='display:flex;flex-wrap:wrap;gap:1.5em;margin-top:.35em'>{cells}</div>")
        if self.printed and not self.passed:
            parts.append(
                f"<details style='margin-top:.35em'><summary>what your code printed</summary>"
                f"{_pre(self.printed)}</details>"
            )
        small = []
        if self.case:
            small.append(html.escape(self.case[:1].upper() + self.case[1:]))
            small.append(f"These inputs to try it yourself: <code>{html.escape(self._call)}</code>")
        small += [html.escape(self.progress)] if self.progress else []
        parts += [f"<div style='margin-top:.35em;font-size:90%;opacity:.8'>{line}</div>" for line in small]
        return (
            f"<div role='status' style='border-left:5px solid rgb({colour});background:rgba({colour},.09);"
            "color:inherit;"
            f"padding:.5em .9em;margin:.2em 0;line-height:1.4;max-width:60em'>{''.join(parts)}</div>"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self.html}


def _indent(text: str | None) -> list[str]:
    return ["    " + line for line in (text or "").splitlines()]


def _pre(text: str | None) -> str:
    return (
        "<pre style='background:rgba(128,128,128,.13);color:inherit;padding:.4em .6em;margin:.15em 0;overflow-x:auto'>"
        f"{html.escape(text or '')}</pre>"
    )


def _paragraphs(message: str) -> list[str]:
    """Lines of a message; lines that begin with four spaces are code."""
    return [line for line in message.splitlines() if line.strip()]


def _marked(line: str) -> str:
    """A line as HTML: escaped first, then `code`, **bold** and *stressed*; one that begins with four spaces is code."""
    if line.startswith("    "):
        return _pre(line.strip())
    parts = re.split(r"(`[^`]+`)", html.escape(line))  # what is code is left alone
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"<code>{part[1:-1]}</code>"
        else:
            part = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", part)
            parts[i] = re.sub(r"(?<![\w*)\[\]])\*([^\s*]|[^\s*][^*]*[^\s*])\*(?![\w*(])", r"<em>\1</em>", part)
    return "".join(parts)
