"""The 1B benchmark: it runs as a process of its own, both libraries start from the same loss, and it fits in 3 GB."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pefttools.bench import one_billion

SMALL = {"num_hidden_layers": 2, "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def run(*arguments: str) -> dict:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-m", "pefttools.bench.one_billion", *arguments], capture_output=True,
                          text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_both_libraries_start_from_the_same_loss_and_learn():
    common = ("--tokens", "16", "--steps", "2", "--threads", "1", "--shape", json.dumps(SMALL))
    ours = run(*common)
    assert ours["parameters"] == 1000 * 128 + 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256 + 2 * 128) + 128
    per_layer = 16 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    assert ours["trained"] == 2 * per_layer
    assert ours["total_s"] == pytest.approx(ours["quantize_s"] + ours["step_s"], abs=0.002)
    assert 0 < ours["peak_rss_gb"] < 3 and ours["losses"][1] < ours["losses"][0] and ours["threads"] == 1
    pytest.importorskip("bitsandbytes")
    theirs = run("--with", "bitsandbytes", *common)
    assert theirs["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-3)
    assert theirs["trained"] == ours["trained"] and theirs["library"] == "bitsandbytes"
    assert set(theirs) == set(ours)


def test_another_library_is_refused():
    with pytest.raises(ValueError, match="library must be one of"):
        one_billion.run("torchao")


@pytest.mark.slow
def test_one_billion_parameters_fit_in_three_gigabytes():
    found = run()
    assert found["parameters"] == 1_235_814_400 and found["trained"] == 11_272_192
    assert found["peak_rss_gb"] <= 3.0
    assert found["losses"][0] == pytest.approx(11.76, abs=1.5)         # about ln(128,256): nothing is known yet
