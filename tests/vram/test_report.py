"""The table: bars that are right to an eighth, text where there is no terminal, JSON that reads back."""
from __future__ import annotations

import io
import json
import re

import pytest

from pefttools.vram import report
from pefttools.vram.job import Job
from pefttools.vram.memory import TERMS, Memory, Moment
from pefttools.vram.verdict import Budget, Judge

GiB = 2**30


def memory(**terms: float) -> Memory:
    held = {name: int(terms.get(name, 0) * GiB) for name in TERMS}
    return Memory(
        Job("llama-3.2-1b", "qlora", 4, 2048),
        "formula",
        held,
        "loss: cross entropy",
        sum(held.values()) + GiB // 2,
        GiB // 4,
        1_000,
        2_000,
        (Moment("forward", "embed", held),),
        {"model.layers.0": 5},
        ("a note",),
    )


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_bars_are_in_proportion():
    assert report.bar(1, 1, 10) == "█" * 10 and report.bar(0, 1, 10) == "" and report.bar(5, 0, 10) == ""
    assert report.bar(1, 2, 9) == "████▌" and report.bar(1, 2, 10, blocks=False) == "#####"
    assert report.bar(1e-9, 1, 10) == "▏", "what is there is seen"
    for part in range(0, 81):
        drawn = report.bar(part, 80, 10)
        assert 8 * drawn.count("█") + (report.EIGHTHS.index(drawn[-1]) if drawn and drawn[-1] != "█" else 0) == part


def test_the_table_has_every_term_and_the_sum():
    found = memory(weights=5, constants=0.125, activations=3, logits=4)
    text = report.to_text(found, "t4")
    rows = dict(re.findall(r"^  (\w+) .*?([\d.]+) GiB +\d+ %$", text, re.M))
    assert list(rows) == [*TERMS, "rounding", "context"]
    assert sum(map(float, rows.values())) == pytest.approx(found.device / GiB, abs=0.03)
    assert rows["weights"] == "5.00" and rows["logits"] == "4.00" and "a note" in text
    assert "1,000 of 2,000 parameters" in text and "peak is at loss: cross entropy" in text
    assert "✓ fits on T4: 14.56 GiB usable, 1.68 GiB to spare (88 % used)" in text
    assert "✗ does not fit on T4: 14.56 GiB usable, 3.32 GiB too much" in report.to_text(memory(weights=17.125), "t4")
    assert "fit" not in report.to_text(found)
    longest = max(re.findall(r"█+", text), key=len)
    assert len(longest) == int(40 * 5 / 14.56), "one scale: the GPU's memory"


def test_colour_only_for_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    found = memory(weights=5, logits=4)
    assert "\x1b[" not in report.to_text(found, "t4") and "\x1b[" not in report.to_text(
        found, "t4", stream=io.StringIO()
    )
    coloured = report.to_text(found, "t4", stream=Terminal())
    assert "\x1b[38;5;" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == report.to_text(found, "t4")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in report.to_text(found, "t4", stream=Terminal())


def test_a_stream_that_lacks_blocks_gets_number_signs():
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    text = report.to_text(memory(weights=5, logits=4), "t4", stream=plain)
    assert "#####" in text and "█" not in text and "✓" not in text and "fits on T4" in text


def test_near_the_edge_is_said():
    found = memory(weights=13)
    verdict = Judge(Budget("x", found.device), estimate=lambda job: found).by_formula(found.job)
    assert verdict.fits is None and "near the edge" in report.to_text(found, Budget("x", found.device), verdict=verdict)


def test_json_reads_back():
    found = memory(weights=5, logits=4)
    data = json.loads(json.dumps(report.to_dict(found, "t4", timeline=True)))
    assert sum(data["terms"].values()) == data["allocated_bytes"] == found.total
    assert data["device_bytes"] == found.reserved + found.context and data["gpu"]["fits"] is True
    assert data["gpu"]["room_bytes"] == data["gpu"]["usable_bytes"] - data["device_bytes"]
    assert data["job"]["quantization"] == "nf4-dq" and data["timeline"][0]["where"] == "embed" and data["holders"]
    assert "gpu" not in report.to_dict(found) and "timeline" not in report.to_dict(found)


def test_show_prints(capsys):
    report.show(memory(weights=1), "t4")
    assert "fits on T4" in capsys.readouterr().out
