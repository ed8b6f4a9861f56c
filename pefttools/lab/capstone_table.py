"""Chapter 11's table: how a row is kept in a file, and how it is written for people.

    {"method", "trainable", "planned", "measured", "tokens_per_second", "loss": {"value", "low", "high"}, …}
    {"method", "missing": "does not fit, by the plan"}

`report-it` reads the Markdown again, by the names in COLUMNS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("method", "trainable", "rows", "planned MiB", "measured MiB", "tokens/s", "loss", "forgetting")
MiB = 2**20


def read_table(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_table(file: Path, kept: dict[str, Any]) -> None:
    """Whole or not at all: a session may end at any moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    os.replace(part, file)


def line_of(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"{row['method']}: {row['missing']}"
    return (f"{row['method']}: {row['trainable']:,} trained, planned {row['planned'] / MiB:,.0f} MiB, measured "
            f"{row['measured'] / MiB:,.0f} MiB ({row['planned'] / row['measured'] - 1:+.1%}), "
            f"{row['tokens_per_second']:,.0f} tokens/s, loss {row['loss']['value']:.3f}")


def cells(row: dict[str, Any]) -> list[str]:
    loss, lost = row["loss"], row["forgetting"]
    at_once = f"{row['batch']} × {row['accumulate']}" + (", checkpointing" if row["checkpointing"] else "")
    return [row["method"], f"{row['trainable']:,}", at_once,
            f"{row['planned'] / MiB:,.1f}", f"{row['measured'] / MiB:,.1f}", f"{row['tokens_per_second']:,.0f}", f"{loss['value']:.3f} ({loss['low']:.3f} to {loss['high']:.3f})",
            f"{lost['value']:+.3f} ({lost['low']:+.3f} to {lost['high']:+.3f})"]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown; its columns are those that `report-it` reads. Losses in nats a token, with 95 %
    intervals."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows if "missing" not in row]
    lines += [f"\n{row['method']}: {row['missing']}." for row in rows if "missing" in row]
    return "\n".join(lines)


def points(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """(method, measured MiB, held-out loss) of every row that was run."""
    for row in rows:
        if "missing" not in row:
            yield row["method"], row["measured"] / MiB, row["loss"]["value"]
