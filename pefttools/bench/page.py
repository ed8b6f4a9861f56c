"""The page: tables from the kept results. Every figure and every verdict is computed here, none is typed."""
from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from pefttools.bench.groups import GROUPS

MADE = "Made by `make bench` (`python -m pefttools.bench`): each figure and each verdict is computed from the run."
HOW = """How it was measured: in rounds. In each round every way runs once, in an order drawn anew; the ratio is taken
within the round, so that a slower minute of the machine slows both sides. The control is a way against itself in the
same rounds (10 % to 90 %): a difference smaller than its spread means nothing. Inputs and order come from fixed
seeds. Each group, for each number of threads, is a process of its own that reads the number before torch is imported.
Absolute figures stand in the last column to say what the ratios are ratios of; elsewhere they will differ."""
HEAD = ("| threads | row | what | median | 10 % to 90 % of the rounds | 95 % interval of the median | must be | met | "
        "control | beside it | absolute |")
BUSY = 0.3      # processors that others kept busy on average; above, the page says so


def verdict(row: dict[str, Any]) -> str:
    """"yes" or "no" for `value` against `bound`; "within noise" where the median's 95 % interval holds the bound."""
    if row.get("bound") is None or "missing" in row:
        return "" if "missing" not in row else "missing"
    at_most = row["sense"] == "≤"
    met = row["value"] <= row["bound"] if at_most else row["value"] >= row["bound"]
    low, high = row.get("low", row["value"]), row.get("high", row["value"])
    clear = low == high or not low <= row["bound"] <= high
    return ("yes" if met else "no") + ("" if clear else ", within noise")


def figure(value: float, unit: str) -> str:
    """Three digits: 0.973 ×, 24.1 ×, 106 KiB."""
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f}" + (f" {unit}" if unit else "")


def line(row: dict[str, Any], threads: int) -> str:
    """One row of a table."""
    if "missing" in row:
        reason = row["missing"].replace("|", "/")
        return f"| {threads} | {row['row']} | {row.get('what', '')} | | | | {_bound(row)} | missing: {reason} | | | |"
    unit = row["unit"]
    spread = f"{figure(row['p10'], '')} to {figure(row['p90'], '')}" if "p10" in row else "exact"
    interval = f"{figure(row['low'], '')} to {figure(row['high'], '')}" if "low" in row else ""
    control = " to ".join(figure(value, "") for value in row["control"]) if "control" in row else ""
    besides = [f"{name} {figure(value, '')}" for name, value in row.get("beside", {}).items()]
    if "between" in row:
        besides.insert(0, f"medians of the processes {' to '.join(figure(value, '') for value in row['between'])}")
    beside = "; ".join(besides)
    absolute = ", ".join(f"{name} {value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
                         for name, value in row.get("ms", {}).items()) + (" ms" if "ms" in row else "")
    return (f"| {threads} | {row['row']} | {row.get('what', '')} | **{figure(row['value'], unit)}** | {spread} | "
            f"{interval} | {_bound(row)} | {verdict(row)} | {control} | {beside} | {absolute} |")


def _bound(row: dict[str, Any]) -> str:
    return "" if row.get("bound") is None else f"{row['sense']} {row['bound']:g}"


def page(results: dict[str, dict[str, Any]], stale: Collection[str] = ()) -> str:
    """The page as Markdown, from {"lora/2": {"rows", "machine", "others", "quick", …}, …}; `stale`: of other code."""
    lines = ["# Benchmarks", "", MADE, ""]
    lines += _how(results)
    bounded = [(key, row) for key, result in results.items() for row in result["rows"]
               if row.get("bound") is not None]
    verdicts = [verdict(row) for _, row in bounded]
    lines += [f"**Bounds met: {sum(v.startswith('yes') for v in verdicts)} of {len(verdicts)}**"
              + (f" ({sum(v.endswith('noise') for v in verdicts)} verdicts are within noise)." if any(
                  v.endswith("noise") for v in verdicts) else "."), ""]
    unmet = [(key, row, v) for (key, row), v in zip(bounded, verdicts) if not v.startswith("yes")]
    if unmet:
        lines += ["Not met, or no figure:", ""]
        lines += [f"- {GROUPS[key.partition('/')[0]].title}, threads {key.partition('/')[2]}: {row['row']}"
                  f"{', ' + row['what'] if row.get('what') else ''}: "
                  f"{v if v == 'missing' else figure(row['value'], row['unit']) + ', bound ' + _bound(row) + ': ' + v}"
                  for key, row, v in unmet] + [""]
    for group in GROUPS.values():
        parts = {int(key.partition("/")[2]): result for key, result in results.items()
                 if key.partition("/")[0] == group.name}
        if not parts:
            continue
        lines += [f"## {group.title}", "", group.prose, ""]
        lines += _warnings(parts, any(key.partition("/")[0] == group.name for key in stale))
        lines += [HEAD, re.sub(r"[^|]+", "---", HEAD)]
        lines += [line(row, threads) for threads, result in sorted(parts.items()) for row in result["rows"]] + [""]
    return "\n".join(lines)


def _how(results: dict[str, dict[str, Any]]) -> list[str]:
    machines = list({tuple(result["machine"].items()) for result in results.values()})
    lines = [HOW, ""]
    for fields in machines:
        lines += ["Machine: " + "; ".join(f"{name} {value}" for name, value in fields) + ".", ""]
    others = [result["others"] for result in results.values() if result["others"] == result["others"]]
    if others:
        lines += [f"Other programs kept {max(others):.2f} processors busy on average during the most disturbed group, "
                  f"{sorted(others)[len(others) // 2]:.2f} during the middle one.", ""]
    return lines


def _warnings(parts: dict[int, dict[str, Any]], stale: bool) -> list[str]:
    lines = []
    if busy := [f"{result['others']:.1f} with threads {threads}" for threads, result in parts.items()
                if result["others"] > BUSY]:
        lines += [f"**The machine was busy with other programs** (processors: {', '.join(busy)}): read the spread "
                  f"first.", ""]
    if any(result["quick"] for result in parts.values()):
        lines += ["**A quick run**: few rounds, small shapes; it shows that the benchmark works, and no more.", ""]
    if stale:
        lines += ["**Measured with an earlier state of the code.** `make bench` measures it again.", ""]
    return lines
