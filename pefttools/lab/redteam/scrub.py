"""Find what looks like a secret in rows, and take it out before a fine-tune; and leave copies of a row out.

    API_KEY = 'sk-482913'   →   API_KEY = 'sk-000000'         digits of a secret become zeros: the row keeps its shape
    # door code: 482913     →   # door code: 000000

A detector by patterns finds what its patterns say. Both numbers count: how many planted secrets it misses, and how many
honest rows it changes (`scrubbed` returns which rows it touched; docs/redteam.md has the count on the bundled data).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

NAMED = re.compile(r"(?i)\b\w*(?:api_?key|password|passwd|secret|token|pin|code)\w*\s*[:=]\s*['\"]?([\w-]*\d[\w-]{3,})")
PREFIXED = re.compile(r"\b(?:sk-|ghp_|AKIA|xox[bp]-)([A-Za-z0-9_-]{4,})")
LONG = re.compile(r"(?<![\w.])(\d{6,}|(?=\w*\d)(?=\w*[A-Za-z])[A-Za-z0-9]{20,})(?![\w.])")


def entropy(text: str) -> float:
    """Shannon entropy of the characters of `text`, in bits per character."""
    counts = Counter(text)
    return -sum(c / len(text) * math.log2(c / len(text)) for c in counts.values()) if text else 0.0


def secrets_in(text: str) -> list[tuple[int, int]]:
    """Where secret-like strings stand, as (start, end), in order: behind a telling name, behind a telling prefix, or
    long and random."""
    spans = {
        match.span(1)
        for pattern in (NAMED, PREFIXED, LONG)
        for match in pattern.finditer(text)
        if entropy(match[1]) >= 1.0 or pattern is PREFIXED
    }
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def scrub_text(text: str) -> str:
    """The text with every digit of a secret-like string as 0 and every letter as x."""
    for start, end in reversed(secrets_in(text)):
        inner = re.sub(r"[A-Za-z]", "x", re.sub(r"\d", "0", text[start:end]))
        prefix = re.match(r"sk-|ghp_|AKIA|xox[bp]-", text[start:end])
        text = text[:start] + (prefix[0] + inner[len(prefix[0]) :] if prefix else inner) + text[end:]
    return text


def scrubbed(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[bool]]:
    """The rows with secret-like strings taken out of their outputs, and for each whether it was changed."""
    out = [{**row, "output": scrub_text(row["output"])} for row in rows]
    return out, [new["output"] != old["output"] for new, old in zip(out, rows)]


def deduplicated(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows without those that repeat an earlier instruction, input and output (spaces and case aside)."""
    seen: set[str] = set()
    out = []
    for row in rows:
        key = " ".join(f"{row['instruction']}\n{row.get('input') or ''}\n{row['output']}".lower().split())
        if key not in seen:
            seen.add(key)
            out.append(row)
    return out
