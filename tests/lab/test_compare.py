"""The comparison of methods on the bundled data: every way runs, a stopped run goes on, the page says what was measured."""

import json

import pytest

from pefttools.lab import compare


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRA r=1, q and v", "prefix, 16 positions (peft)", "prompt, 16 tokens (peft)"])
def test_a_way_trains_and_is_evaluated(name):
    row = compare.run(name, steps=2, n=4)
    assert row["rows"] == row["new_rows"] == 4 and 0 < row["share"] < 0.02 and row["seconds"] > 0
    assert 0 <= row["after"] <= 1 and row["loss"] > 0
    page = compare.page([row], threads=2)
    assert f"{row['trainable']:,}" in page and f"{row['loss']:.3f}" in page


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch):
    asked = []

    def fake(command, **kwargs):
        name = command[command.index("--one") + 1]
        asked.append(name)
        row = {"name": name, "lr": compare.WAYS[name][2], "steps": 7, "trainable": 1, "share": 0.1, "seconds": 1.0, "loss": 1.0,
               "kinds": 1, "rows": 1, "before": 0.0, "after": 1.0, "interval": (0.0, 1.0), "new": 0.0, "new_rows": 1, "failing": {}}
        return type("Done", (), {"stdout": json.dumps(row) + "\n"})

    monkeypatch.setattr(compare.subprocess, "run", fake)
    to = tmp_path / "docs" / "page.md"
    compare.main(["--to", str(to), "--steps", "7", "--only", "full fine-tuning"])
    compare.main(["--to", str(to), "--steps", "7"])
    assert sorted(asked) == sorted(compare.WAYS)  # the first one was not run again
    assert all(name in to.read_text() for name in compare.WAYS)
