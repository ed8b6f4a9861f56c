"""A finding, and all findings: as text, as a table in notebooks, as JSON."""

from __future__ import annotations

import html
import json
import textwrap
from dataclasses import asdict, dataclass, field

MARKS = {"ok": "✓", "note": "·", "problem": "✗"}
INDENT = " " * 27


@dataclass(frozen=True)
class Row:
    """One finding. `status` is "ok", "note" (good to know) or "problem"; `stops`: the course cannot go on with it."""

    check: str
    status: str
    found: str
    todo: str = ""
    stops: bool = False


@dataclass
class Diagnosis:
    """All findings: prints as text, shows as a table in notebooks, `to_json()` for programs."""

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def stops(self) -> bool:
        """Whether anything stands in the way of the course as a whole."""
        return any(row.stops for row in self.rows)

    @property
    def verdict(self) -> str:
        problems = sum(row.status == "problem" for row in self.rows)
        if self.stops:
            return "The course cannot run here yet; see the rows marked as stopping it."
        if problems:
            return f"The course runs here; {problems} thing{'s' if problems > 1 else ''} in it will not."
        return "The course runs here."

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            lines += wrapped(f"{MARKS.get(row.status, '?')} {row.status:8}{row.check:16} {row.found}", INDENT)
            if row.todo:
                lines += wrapped(f"{INDENT}→ {'stops the course: ' if row.stops else ''}{row.todo}", f"{INDENT}  ")
        return "\n".join([*lines, "", f"{self.verdict} ({self.seconds:.1f} s)"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        # Weight and word carry the status; no background, for dark and light themes alike.
        head = "".join(f'<th scope="col" style="text-align:left">{h}</th>' for h in ("", "what", "found", "what to do"))
        body = ""
        for row in self.rows:
            status = f"{MARKS.get(row.status, '?')} {html.escape(row.status)}"
            stops = "<b>Stops the course.</b> " if row.stops else ""
            cells = [status if row.status == "ok" else f"<b>{status}</b>", html.escape(row.check),
                     html.escape(row.found), stops + html.escape(row.todo)]
            style = "text-align:left; vertical-align:top"
            body += "<tr>" + "".join(f'<td style="{style}">{cell}</td>' for cell in cells) + "</tr>"
        return (f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
                f"<p><b>{html.escape(self.verdict)}</b></p>")

    def to_json(self) -> str:
        """`{"stops": bool, "verdict": str, "seconds": float, "rows": [{check, status, found, todo, stops}]}`"""
        return json.dumps({"stops": self.stops, "verdict": self.verdict, "seconds": round(self.seconds, 2),
                           "rows": [asdict(row) for row in self.rows]}, indent=1, ensure_ascii=False)


def wrapped(line: str, indent: str) -> list[str]:
    """Lines of at most 120 characters; commands and paths stay whole, for copying."""
    return textwrap.wrap(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
