"""Bytes in words and back: GiB and GB, never one for the other.

    1 GiB = 2**30 = 1,073,741,824 bytes       what torch, nvidia-smi (as MiB) and PEFT's tables count in
    1 GB  = 10**9 = 1,000,000,000 bytes       what disks, papers and litgpt's tables count in

The two differ by 7.4 %: a "24 GB" card that holds 24 GiB has 25.77 GB. Everything in this package is bytes; only here
do they become text, and text always says which of the two it means.
"""
from __future__ import annotations

import math
import numbers
import re

BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DECIMAL = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS = BINARY | DECIMAL
_BY_LOWER = {unit.lower(): size for unit, size in UNITS.items()}
_VAGUE = {"k": ("kB", "KiB"), "m": ("MB", "MiB"), "g": ("GB", "GiB"), "t": ("TB", "TiB")}

KiB, MiB, GiB, GB = BINARY["KiB"], BINARY["MiB"], BINARY["GiB"], DECIMAL["GB"]


def gib(n: float, digits: int = 1) -> str:
    """n bytes as "12.3 GiB"."""
    return f"{n / GiB:,.{digits}f} GiB"


def gb(n: float, digits: int = 1) -> str:
    """n bytes as "13.2 GB"."""
    return f"{n / GB:,.{digits}f} GB"


def mib(n: float, digits: int = 1) -> str:
    """n bytes as "512.0 MiB"."""
    return f"{n / MiB:,.{digits}f} MiB"


def both(n: float, digits: int = 1) -> str:
    """n bytes as "12.3 GiB (13.2 GB)", for those who compare with a table in the other unit."""
    return f"{gib(n, digits)} ({gb(n, digits)})"


def human(n: float, decimal: bool = False) -> str:
    """n bytes in the unit that leaves 1 to 999 before the point: 3 figures or so. decimal: kB, MB, GB instead."""
    units = DECIMAL if decimal else BINARY
    unit = next((u for u, size in reversed(units.items()) if abs(n) >= size), "B")
    return f"{n:.0f} B" if unit == "B" else f"{n / units[unit]:,.{1 if abs(n) < 100 * units[unit] else 0}f} {unit}"


def percent(part: float, whole: float, digits: int = 1) -> str:
    """"+1.4 %": how much more (or less) `part` is than `whole`; "–" where whole is 0."""
    return "–" if not whole else f"{100 * (part / whole - 1):+.{digits}f} %"


def parse_bytes(text: str | int) -> int:
    """"24GB", "24 GiB", "512 MiB", "80e9 B" → bytes; a whole number is bytes already.

    Raises ValueError for what could be read in two ways ("24G": 24 GB or 24 GiB?) or in none; bytes must be positive.
    """
    if isinstance(text, numbers.Integral) and not isinstance(text, bool):
        return _positive(int(text), text)
    found = re.fullmatch(r"\s*([+-]?(?:\d[\d,_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*", str(text))
    example = "Write \"24GB\" (24·10⁹ bytes) or \"24GiB\" (24·2³⁰)."
    if found is None or isinstance(text, bool):
        raise ValueError(f"{text!r} is no amount of memory. {example}")
    number, unit = float(found[1].replace(",", "").replace("_", "")), found[2].lower()
    if unit in _VAGUE:
        decimal, binary = _VAGUE[unit]
        less = percent(UNITS[decimal], UNITS[binary]).lstrip("-+")
        raise ValueError(f"{text!r} could mean {number:g} {decimal} or {number:g} {binary}, which differ by {less}: "
                         f"write which one.")
    if not unit:
        raise ValueError(f"{text!r} has no unit. {example}")
    if unit not in _BY_LOWER:
        raise ValueError(f"{found[2]!r} in {text!r} is no unit of memory; there are {', '.join(UNITS)}. {example}")
    return _positive(number * _BY_LOWER[unit], text)


def _positive(n: float, text: object) -> int:
    if not math.isfinite(n) or n <= 0:
        raise ValueError(f"{text!r} is no amount of memory: a positive number is needed.")
    return round(n)
