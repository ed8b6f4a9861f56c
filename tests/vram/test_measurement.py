"""`measure` against a torch.cuda that is played: phases, peaks, out of memory, the table, the grid that goes on."""
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from pefttools.vram import measured_grid as g
from pefttools.vram.job import Job
from pefttools.vram.measurement import COLUMNS, NoGPU, append, gpu_missing, measure, read_table
from pefttools.vram.plan_text import job_dict, job_from

MiB = 2**20
NAMES = (
    "is_available",
    "synchronize",
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "reset_peak_memory_stats",
    "empty_cache",
    "mem_get_info",
    "get_device_properties",
    "get_device_name",
    "get_device_capability",
    "current_device",
    "is_bf16_supported",
)
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}


class PlayedGPU:
    """torch.cuda's counters: 1000 MiB of memory, 100 of them the context's, blocks of 2 MiB."""

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = self.peak_reserved = 0

    def take(self, n: int) -> None:
        if self.allocated + n > 900 * MiB:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (played)")
        self.allocated += n
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, -(-self.allocated // (2 * MiB)) * 2 * MiB)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def give(self, n: int) -> None:
        self.allocated -= n

    is_available = is_bf16_supported = staticmethod(lambda **_: True)
    current_device, synchronize = staticmethod(lambda: 0), staticmethod(lambda: None)
    get_device_name, get_device_capability = staticmethod(lambda *_: "Played T4"), staticmethod(lambda *_: (7, 5))
    get_device_properties = staticmethod(lambda *_: SimpleNamespace(total_memory=1000 * MiB))
    memory_allocated, memory_reserved = (lambda self: self.allocated), (lambda self: self.reserved)
    max_memory_allocated, max_memory_reserved = (lambda self: self.peak), (lambda self: self.peak_reserved)

    def mem_get_info(self):
        return 900 * MiB - self.reserved, 1000 * MiB

    def empty_cache(self):
        self.reserved = -(-self.allocated // (2 * MiB)) * 2 * MiB

    def reset_peak_memory_stats(self):
        self.peak, self.peak_reserved = self.allocated, self.reserved


@pytest.fixture
def gpu(monkeypatch):
    played = PlayedGPU()
    for name in NAMES:
        monkeypatch.setattr(torch.cuda, name, getattr(played, name))
    return played


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "no GPU to measure on" in gpu_missing()
    with pytest.raises(NoGPU, match="no GPU to measure on"), measure("x", table=tmp_path / "t.csv"):
        pytest.fail("the block must not run")
    with measure("x", table=tmp_path / "t.csv", missing="skip") as m, m.phase("build"):
        pass
    assert "no GPU to measure on" in capsys.readouterr().out and m.outcome == "no gpu"
    assert not (tmp_path / "t.csv").exists() and [p["phase"] for p in m.phases] == ["build"]
    with pytest.raises(ValueError, match="missing='ignore'"), measure("x", missing="ignore"):
        pass
    for argument in (["--grid"], ["--row", json.dumps(job_dict(Job("llama-3.2-1b")))]):
        assert g.main([*argument, "--to", str(tmp_path / "t.csv")]) == 1
    assert "no GPU to measure on" in capsys.readouterr().err
    assert g.main([]) == 2 and g.main(["--validate", str(tmp_path / "none.csv")]) == 2


def test_phases_have_their_own_peaks(gpu, tmp_path):
    gpu.take(10 * MiB)
    job = Job("llama-3.2-1b", "qlora", targets=("q_proj", "v_proj"))
    with measure("first", job, tmp_path / "new" / "t.csv") as m:
        with m.phase("build"):
            gpu.take(101 * MiB)
        gpu.take(300 * MiB)                 # between two phases: of the whole, not of a phase
        gpu.give(300 * MiB)
        with m.phase("step"):
            gpu.take(200 * MiB)
            gpu.give(150 * MiB)
    assert (m.allocated_before, m.peak_allocated, m.peak_reserved, m.outside) == (
        10 * MiB,
        411 * MiB,
        412 * MiB,
        100 * MiB,
    )
    build, step = m.phases
    assert (build["start"], build["end"], build["peak_allocated"]) == (10 * MiB, 111 * MiB, 111 * MiB)
    assert (step["start"], step["end"], step["peak_allocated"]) == (111 * MiB, 161 * MiB, 311 * MiB)
    assert step["peak_reserved"] == 412 * MiB and build["peak_reserved"] == 112 * MiB
    [row] = read_table(tmp_path / "new" / "t.csv")
    assert row["device"] == "Played T4" and row["total_memory"] == 1000 * MiB and row["torch"] == torch.__version__
    assert row["phases"] == m.phases and row["outcome"] == "ok" and row["job"]["quantization"] == "nf4-dq"
    assert job_from(row["job"]) == job
    with (
        measure("nested") as m,
        m.phase("a"),
        pytest.raises(ValueError, match="phase 'b' inside of phase 'a'"),
        m.phase("b"),
    ):
        pass


def test_out_of_memory_and_errors_are_rows(gpu, tmp_path):
    table = tmp_path / "t.csv"
    with pytest.raises(torch.cuda.OutOfMemoryError), measure("big", table=table) as m, m.phase("step"):
        gpu.take(500 * MiB)
        gpu.take(500 * MiB)
    with pytest.raises(ZeroDivisionError), measure("wrong", table=table):
        1 / 0
    first, second = read_table(table)
    assert (first["outcome"], first["peak_allocated"], first["phases"][0]["phase"]) == ("oom", 500 * MiB, "step")
    assert second["outcome"] == "error: ZeroDivisionError" and second["job"] is None


def test_the_table(tmp_path, gpu):
    path = tmp_path / "t.csv"
    path.write_text("id,model\n1,x\n")
    with pytest.raises(ValueError, match="no table of measurements"), measure("x", table=path):
        pytest.fail("found too late")
    path.unlink()
    for name in ("a", "b, with \"quotes\""):
        with measure(name, table=path):
            pass
    with path.open("a") as file:
        file.write("2026-01-01,cut off by a k")
    assert [row["name"] for row in read_table(path)] == ["a", "b, with \"quotes\""]
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS) and read_table(tmp_path / "none") == []


def test_the_grid_is_the_issues():
    jobs = list(g.grid())
    assert len(jobs) == len(set(map(repr, jobs))) == 144
    assert {j.method for j in jobs} == {"full", "lora", "qlora", "dora", "bottleneck", "prefix"}
    assert {(j.batch, j.seq, j.checkpointing, j.attention) for j in jobs} >= {
        (4, 2048, True, "sdpa"),
        (1, 512, False, "eager"),
    }
    assert {j.model for j in jobs} == {"llama-3.2-1b", "llama-3.2-3b"}


@pytest.mark.parametrize(
    "method, fields",
    [
        ("full", {}),
        ("lora", {"accumulate": 2}),
        ("qlora", {"checkpointing": True}),
        ("dora", {"padded": True}),
        ("bottleneck", {"attention": "eager"}),
        ("prefix", {}),
        ("prompt", {"clip": False, "optimizer": "sgd"}),
        ("ia3", {"optimizer": "adafactor"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_row_really_trains(method, fields):
    """On the CPU with a tiny model."""
    job = Job(TINY, method, 2, 8, r=4, length=3, width=4, dtype="float32", **fields)
    model = g.build(job, "cpu")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = g.optimizer_of(job, model)
    for _ in range(2):
        g.step(model, optimizer, job, "cpu")
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p.detach(), before[n])]
    assert before and len(moved) > len(before) // 3


def test_a_row_is_written(gpu, tmp_path):
    """The counters are played, the steps are not."""
    assert g.run_row(Job(TINY, "lora", 2, 8, dtype="float32"), tmp_path / "t.csv", "cpu") == 0
    [row] = read_table(tmp_path / "t.csv")
    assert [p["phase"] for p in row["phases"]] == ["build", "step 1", "step 2", "step 3"]


def test_the_grid_goes_on_where_it_was(gpu, tmp_path, monkeypatch, capsys):
    table = tmp_path / "t.csv"
    jobs = list(g.grid(("llama-3.2-1b",)))[:6]
    monkeypatch.setattr(g, "grid", lambda *_: jobs)
    started = []

    def played(command, check):
        fields = json.loads(command[command.index("--row") + 1])
        started.append(fields)
        outcome = {3: "oom", 4: "error: RuntimeError"}.get(len(started), "ok")
        with measure("grid", Job(**fields)) as m:
            pass
        m.outcome = outcome
        append(table, m.row())
        return SimpleNamespace(returncode={"ok": 0, "oom": 3}.get(outcome, 1))

    monkeypatch.setattr(g.subprocess, "run", played)
    assert g.main(["--grid", "--to", str(table)]) == 1 and len(started) == 6
    assert "6 rows in the grid, 1 failed" in capsys.readouterr().out
    assert g.main(["--grid", "--to", str(table)]) == 0 and len(started) == 7, "only what failed is tried again"
    assert started[6] == started[3] and g.main(["--grid", "--to", str(table)]) == 0 and len(started) == 7


def test_validation_compares_with_the_simulator(gpu, tmp_path, monkeypatch, capsys):
    job = Job("llama-3.2-1b", "lora", 1, 512, gpu=None)
    memory = SimpleNamespace(job=job, total=90 * MiB, reserved=110 * MiB, device=210 * MiB)
    import pefttools.vram.simulator

    monkeypatch.setattr(pefttools.vram.simulator, "simulate", lambda job: memory)
    table = tmp_path / "t.csv"
    with measure("grid", job, table) as m:
        for n in (1, 2):
            with m.phase(f"step {n}"):
                gpu.take(50 * n * MiB)
    with pytest.raises(torch.cuda.OutOfMemoryError), measure("grid", job, table):
        gpu.take(1000 * MiB)
    good, oom = g.validate(table)
    assert good["measured"][0] == 150 * MiB and good["errors"][0] == pytest.approx(90 / 150 - 1)
    assert oom["agrees"] is False
    assert g.main(["--validate", str(table)]) == 0
    said = capsys.readouterr().out
    assert "-40.0 %" in said and "should have fitted" in said and "1 rows, median error 40.0 %" in said
