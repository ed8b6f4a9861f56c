"""docs/vram_validation.md: the answers of `published.py` as text, with the summary lines and what differs by source."""
from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pefttools.vram.other_runs import WORLDS, recipe
from pefttools.vram.peft_runs import STATED, facts
from pefttools.vram.units import GB, GiB

if TYPE_CHECKING:
    from pefttools.vram.published import Answer

MEDIAN, WITHIN, BEYOND = 1.5, 4.0, 8.0                  # the aims for PEFT's rows, in per cent
INTRODUCTION = (
    "Written by `python -m pefttools.vram.published`; nothing here is typed in. Measurements, by others, stand in",
    "`pefttools/vram/published/vram_measured.csv` with their sources. Figures are in the source's own unit",
    "(1 GiB = 2³⁰, 1 GB = 10⁹ bytes); per cent: ours against the measurement. No constant is fitted to any row.")
WIDTH = (
    "### What the width of PEFT's widest batch does to its rows, and whether the aims are met", "",
    "All rows of that table have one unknown in common: how long the longest text of 20,000 is, and whether rows",
    "of several lengths meet in that batch. It is not published. The rows above take four texts cut at the script's",
    "limit of 768 tokens, none of them padded. **That reading was chosen after the figures of several had been seen**,",
    "so the verdict on it is no blind test. The likelier batch has texts of several lengths and is padded: then a mask",
    "is passed, for which transformers repeats keys and values for every head (8 → 24). At the stated limit, padded,",
    "the aims are not met, as the table says; the width at which padded rows fit best was found from these same",
    "measurements and proves nothing by itself. What does not hang on the width is the standard deviation.")
DEVIATION = (
    "The standard deviation does not depend on a common offset: the smaller it is, the better one width explains all",
    "methods at once, those whose memory grows with the tokens and those that hold dense matrices.")
HEAD = ("| id | model | run | measured | formula | simulator | peak at | {} |\n"
        "|---|---|---|---|---|---|---|{}|")


def summary(name: str, errors: Iterable[float]) -> str:
    """One line: how many rows, median, 95th percentile (nearest rank) and worst of the absolute errors."""
    sizes = sorted(abs(error) for error in errors)
    if not sizes:
        return f"| {name} | 0 | – | – | – | – |"
    high = sizes[math.ceil(0.95 * len(sizes)) - 1]
    return (f"| {name} | {len(sizes)} | {statistics.median(sizes):.2f} % | {high:.2f} % | "
            f"{sum(size <= WITHIN for size in sizes)} of {len(sizes)} | {sizes[-1]:.2f} % |")


def table(answers: list[Answer]) -> str:
    """The rows, one line each: figures in the unit that the source uses, errors in per cent."""
    calculators = [name for name, _, _ in next((a.rivals for a in answers if a.rivals), [])]
    lines = [HEAD.format(" | ".join(calculators) or "–", "|".join(["---"] * max(1, len(calculators))))]
    for a in answers:
        others = {name: size for name, size, _ in a.rivals}
        run = _name(a)
        mark = f" ({a.why})" if a.why else ""
        lines.append(f"| {a.row['id']} | {a.row['model']} | {run}{mark} | {_size(a, a.measured)} | "
                     f"{_figure(a, a.formula)} | {_figure(a, a.simulator)} | {a.peak_at.replace('|', '/') or '–'} | "
                     + " | ".join(_percent(a.error(others.get(name))) for name in calculators or ["–"]) + " |")
    return "\n".join(lines)


def _name(a: Answer) -> str:
    if a.peft:
        return a.row["url_or_path"].rpartition("results/")[2].removesuffix(".json").replace("--", "/", 1)
    batch, seq = a.row.get("batch", ""), a.row.get("seq", "")
    return f"{a.row['method']}" + (f", {batch} × {seq}" if batch or seq else "")


def _size(a: Answer, size: int) -> str:
    unit = GB if a.row["unit"] in ("GB", "MB") else GiB
    return f"{size / unit:.2f} {'GB' if unit == GB else 'GiB'}"


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{error:+.1f} %" if abs(error) < 1000 else f"{error:+.0f} %"


def _figure(a: Answer, size: int | None) -> str:
    return "–" if size is None else f"{_size(a, size)} ({_percent(a.error(size))})"


def sources(answers: list[Answer]) -> dict[str, list[Answer]]:
    """By the source's name, in the order of the rows."""
    groups: dict[str, list[Answer]] = {}
    for a in answers:
        groups.setdefault(a.row["source"], []).append(a)
    return groups


def errors_of(answers: Iterable[Answer], what: str = "simulator") -> list[float]:
    return [error for a in answers if (error := a.error(getattr(a, what))) is not None]


def rival_errors(answers: list[Answer]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for a in answers:
        for name, size, _ in a.rivals:
            if size is not None:
                found.setdefault(name, []).append(a.error(size) or 0.0)
    return found


def page(answers: list[Answer], further: list[Answer], widths: dict[tuple[int, bool], list[float]]) -> str:
    peft = [a for a in answers if a.peft]
    done = errors_of(peft)
    lines = ["# Memory: formula and simulator against published measurements", "", *INTRODUCTION, "", "## Summary", "",
             "| rows | how many | median | 95th percentile | within 4 % | worst |", "|---|---|---|---|---|---|",
             summary("**simulator, PEFT's comparison**", done),
             summary("formula, PEFT's comparison (where it has the method)", errors_of(peft, "formula"))]
    for name, group in sources(answers).items():
        if not any(a.peft for a in group):
            lines += [summary(f"simulator, {name}", errors_of(group)),
                      summary(f"formula, {name}", errors_of(group, "formula"))]
    for name, errors in rival_errors(answers).items():
        lines.append(summary(f"{name}, every row with a job", errors))
    if further:
        lines.append(summary("**simulator, further rows (--csv)**", errors_of(further)))
    lines += ["", _aims(done, len(peft)), "", *_sensitivity(widths and {(STATED, False): done, **widths})]
    for name, group in sources(answers).items():
        lines += ["", f"## {name}", "", *_differs(group), *_table_or_none(group), *_reasons(group), *_looked_up(group)]
    if further:
        lines += ["", "## Further rows (--csv)", "", table(further), *_reasons(further)]
    lines += ["", *_calculators(), ""]
    return "\n".join(lines)


def _aims(errors: list[float], rows: int) -> str:
    if not errors:
        return "No row of PEFT's comparison could be simulated."
    text = ", ".join(f"{name} {aim}: {'yes' if met else 'NO'}" for name, met, aim in _verdicts(errors))
    return (f"Aims for PEFT's rows, if their widest batch was 4 × 768 and not padded: {text}. Whether it was is not "
            f"known: see below. {len(errors)} of {rows} rows were simulated.")


def _verdicts(errors: list[float]) -> tuple[tuple[str, bool, str], ...]:
    """Each aim: its name, whether these errors meet it, and the aim in words."""
    sizes = sorted(abs(error) for error in errors)
    return (("median", statistics.median(sizes) <= MEDIAN, f"≤ {MEDIAN} %"),
            ("95 % of the rows", sum(s <= WITHIN for s in sizes) >= 0.95 * len(sizes), f"within {WITHIN:.0f} %"),
            ("worst", sizes[-1] <= BEYOND, f"≤ {BEYOND:.0f} %"))


def _sensitivity(widths: dict[tuple[int, bool], list[float]]) -> list[str]:
    lines = [*WIDTH, "",
             "| widest batch | rows | mean error | standard deviation | median of absolute errors | within 4 % |"
             " worst | aims met |",
             "|---|---|---|---|---|---|---|---|"]
    for (width, padded), errors in sorted(widths.items()):
        if errors:
            close = sum(abs(error) <= WITHIN for error in errors)
            met = sum(met for _, met, _ in _verdicts(errors))
            lines.append(f"| 4 × {width}, {'padded' if padded else 'not padded'} | {len(errors)} | "
                         f"{statistics.mean(errors):+.2f} % | {statistics.pstdev(errors):.2f} % | "
                         f"{statistics.median(map(abs, errors)):.2f} % | {close} of {len(errors)} | "
                         f"{max(errors, key=abs):+.2f} % | {met} of 3 |")
    return lines + ["", *DEVIATION] if widths else [*WIDTH, "", "Not computed in this run (--no-widths)."]


def _differs(group: list[Answer]) -> list[str]:
    if any(a.peft for a in group):
        script = facts()["script"]
        return [f"Llama-3.2-3B, bfloat16, batch 4, an L40S; `{facts()['path']}`, script at {script['commit']}.",
                f"Measured: {script['measured']}.", "The training step of the widest batch holds it; generation and "
                "the wiki loss stay below (bounds: `peft_runs.Run.phases`).",
                "The installed peft's code runs, which may "
                "differ from the one measured.", ""]
    worlds = dict.fromkeys(found.world for a in group if (found := recipe(a.row["id"])).job is not None)
    kinds = {"total": "max_memory_allocated", "reserved": "max_memory_reserved", "device": "reserved and CUDA context"}
    return [line for world in worlds for line in
            (f"`{world}`: compared with our {kinds[WORLDS[world][0]]}. Differs: {WORLDS[world][1]}.", "")]


def _table_or_none(group: list[Answer]) -> list[str]:
    rows = [a for a in group if a.simulator is not None or a.formula is not None]
    return [table(rows), ""] if rows else []


def _reasons(group: list[Answer]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for a in group:
        if a.why:
            reasons.setdefault(a.why, []).append(a.row["id"] + (f" ({_name(a)})" if a.peft else ""))
    lines = [f"- {', '.join(ids)}: {why}" for why, ids in reasons.items()]
    return ["Without a simulation:", "", *lines, ""] if lines else []


def _looked_up(group: list[Answer]) -> list[str]:
    lines = []
    for a in group:
        found = recipe(a.row["id"]) if not a.peft else None
        if found is not None and found.job is not None:
            at = f" at {found.commit}" if found.commit else ""
            lines.append(f"- {a.row['id']}: {found.path}{at}{'; ' + found.note if found.note else ''}")
        elif a.note:
            lines.append(f"- {a.row['id']}: {a.note}")
    return ["Where the fields come from:", "", *lines, ""] if lines else []


def _calculators() -> list[str]:
    from pefttools.vram.rivals import CALCULATORS

    lines = ["## The other calculators", "",
             "`accelerate estimate-memory` is run, with the installed accelerate's functions; the others are their",
             "published formulas in our words. Several never claimed LoRA or a length: the columns are what somebody",
             "would be told.", ""]
    for name, function in CALCULATORS.items():
        text = " ".join((function.__doc__ or "").split())
        lines.append(f"- **{name}**: {text}")
    return lines
