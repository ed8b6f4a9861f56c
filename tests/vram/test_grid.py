"""The grid: what it spans, a fixed small part of it against the simulator, and its page."""
from __future__ import annotations

import json

import pytest

from pefttools.vram import grid as module
from pefttools.vram.formula import estimate
from pefttools.vram.grid_jobs import grid, key
from pefttools.vram.job import METHODS, OPTIMIZERS, Job
from pefttools.vram.simulator import simulate

SMALL = [
    Job("tiny", "full", 2, 256), Job("tiny", "lora", 2, 256, targets="all-linear", library="peft"),
    Job("tiny", "qlora", 2, 256, targets="all-linear", checkpointing=True),
    Job("tiny", "lora", 2, 512, attention="eager"), Job("tiny", "lora", 2, 256, padded=True),
    Job("tiny", "prefix", 2, 256), Job("tiny", "full", 1, 64, optimizer="sgd"),
    Job("tiny", "full", 1, 64, optimizer="adamw_8bit"), Job("tiny", "bottleneck", 2, 256), Job("tiny", "ia3", 2, 256),
    Job("tiny", "dora", 2, 256, library="peft", targets=("down_proj",)),
    Job("tiny", "lora", 2, 128, dtype="float16", gpu="t4"),
]


def test_it_spans_what_is_asked_for():
    jobs = [job for _, job in grid()]
    assert len(jobs) >= 300
    assert len({key(job) for job in jobs}) == len(jobs)
    assert {job.method for job in jobs} == set(METHODS) and {job.optimizer for job in jobs} == set(OPTIMIZERS)
    assert {job.attention for job in jobs} == {"sdpa", "flash", "eager"}
    assert {job.library for job in jobs} == {"pefttools", "peft"}
    assert {job.checkpointing for job in jobs} == {job.padded for job in jobs} == {True, False}
    assert len({job.model for job in jobs}) >= 15 and len({(job.batch, job.seq) for job in jobs}) >= 8


def test_the_formula_takes_all_of_it():
    assert all(estimate(job).total > 0 for _, job in grid())


@pytest.mark.parametrize("job", SMALL, ids=key)
def test_a_small_part_against_the_simulator(job):
    formula, simulator = estimate(job), simulate(job)
    assert formula.total == pytest.approx(simulator.total, rel=0.02)
    assert (formula.trainable, formula.parameters) == (simulator.trainable, simulator.parameters)
    for name in ("weights", "constants", "adapter"):
        assert formula.terms[name] == pytest.approx(simulator.terms[name], rel=0.01, abs=8192)


def test_resumes_and_writes_its_page(tmp_path, monkeypatch, capsys):
    jobs = [job for job in grid() if key(job[1]).startswith("tiny")][:3]
    monkeypatch.setattr(module, "grid", lambda: jobs)
    version = module.simulator_version()
    cache, out = tmp_path / "cache.jsonl", tmp_path / "page.md"
    for _, job in jobs:
        memory = estimate(job)
        row = {"key": key(job), "total": int(memory.total / 1.01), "reserved": memory.reserved, "terms": {},
               "peak_at": "x", "trainable": memory.trainable, "parameters": memory.parameters,
               "seconds": 1.0, "version": version}
        with open(cache, "a") as file:
            file.write(json.dumps(row) + "\n")
    monkeypatch.setattr(module, "ProcessPoolExecutor", _NoPool)
    assert module.main(["--cache", str(cache), "--out", str(out)]) == 0
    text = out.read_text()
    assert "| **all** | 3 | 1.00%" in text and "agree in 3 of 3" in text and key(jobs[0][1]) in text
    with pytest.raises(SystemExit):
        module.main(["--only", "no such group"])
    assert "leaves nothing" in capsys.readouterr().err


class _NoPool:
    """Everything is in the cache: nothing may be simulated."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *details):
        pass

    def submit(self, *args):
        raise AssertionError("it was in the cache")
