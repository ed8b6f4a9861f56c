"""GiB and GB: written and read without mixing them."""
from __future__ import annotations

import pytest

from pefttools.vram.units import GB, GiB, both, gb, gib, human, mib, parse_bytes, percent


def test_written():
    assert gib(13_207_024_640) == "12.3 GiB"
    assert gb(13_207_024_640) == "13.2 GB"
    assert both(24 * GiB) == "24.0 GiB (25.8 GB)"
    assert mib(8_519_680, 3) == "8.125 MiB"
    assert human(512) == "512 B" and human(1536) == "1.5 KiB" and human(3 * 2**40) == "3.0 TiB"
    assert human(13_200_000_000, decimal=True) == "13.2 GB"
    assert human(-3 * GiB) == "-3.0 GiB"
    assert percent(103, 100) == "+3.0 %" and percent(1, 0) == "–"


@pytest.mark.parametrize("text, wanted", [
    ("24GB", 24 * GB), ("24 GiB", 24 * GiB), ("24gib", 24 * GiB), ("0.5 MiB", 2**19), ("1,000 kB", 10**6),
    ("80e9 B", 80 * GB), (17, 17), ("1_024 KiB", 2**20), (" 2TiB ", 2**41)], ids=str)
def test_read(text, wanted):
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize("n", [1, 512, 10**9, 2**30, 3 * 2**34])
def test_read_back_what_was_written(n):
    assert parse_bytes(gib(n, 9)) == pytest.approx(n, abs=1)
    assert parse_bytes(gb(n, 9)) == pytest.approx(n, abs=1)


@pytest.mark.parametrize("text, words", [
    ("24G", "24 GB or 24 GiB"), ("24 M", "24 MB or 24 MiB"), ("24", "no unit"), ("24 Gbit", "no unit of memory"),
    ("much", "no amount"), ("-3GB", "positive"), ("0 GB", "positive"), (0, "positive"), (True, "no amount"),
    ("", "no amount")], ids=str)
def test_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_bytes(text)


def test_the_two_differ_by_what_the_text_says():
    assert percent(GiB, GB) == "+7.4 %"
