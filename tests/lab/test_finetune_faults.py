"""A full disk, memory that runs out, a kill: a sentence, nothing half-written taken for whole, and the run goes on."""

from __future__ import annotations

import builtins
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from pefttools import cli
from pefttools.lab.finetune import OutOfMemory, WrongQuestion, run_method

ROWS = [
    {"instruction": f"Write a function that adds {i}.", "output": f"def f(x):\n    return x + {i}"} for i in range(12)
]
SMALL = dict(data=ROWS, steps=4, batch=2, max_length=64, r=2, save_every=2, quiet=True)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk("checkpoint", after=1): from the second on, files whose path has that word hold 100 bytes."""
    real, opened = builtins.open, []

    def fill(word: str, after: int = 0):
        class Full:
            def __init__(self, file):
                self.file, self.left = file, 100

            def write(self, content):
                self.left -= len(memoryview(content).cast("B"))
                if self.left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self.file.write(content)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

        def replaced(path, mode="r", *rest, **more):
            file = real(path, mode, *rest, **more)
            if "w" in mode and word in "/".join(Path(str(path)).parts[-2:]):
                opened.append(path)
                if len(opened) > after:
                    return Full(file)
            return file

        monkeypatch.setattr(builtins, "open", replaced)

    yield fill
    monkeypatch.undo()


def test_the_checkpoint_of_before_stays_and_the_run_goes_on(tmp_path, full_disk, monkeypatch, capsys):
    whole = run_method("lora", **SMALL, out=tmp_path / "whole")
    full_disk("checkpoint", after=1)
    with pytest.raises(
        OSError,
        match="(?s)the checkpoint of step 4 could not be written to .*No space left on device.*MiB are "
        "free.*checkpoint.pt, is whole.*run the same again",
    ) as caught:
        run_method("lora", **SMALL, out=tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "a").glob("*.part")) and not (tmp_path / "a" / "adapter_config.json").exists()
    assert torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["step"] == 2
    monkeypatch.undo()  # there is room again
    again = run_method("lora", **SMALL, out=tmp_path / "a")
    assert again.history.loss == whole.history.loss
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "method, word, said",
    [
        ("lora", "checkpoint", "the checkpoint of step 2 could not be written.*Nothing half-written is left"),
        (
            "lora",
            ".saving-",
            "the adapter could not be written.*No space left.*The training is not lost: it is in checkpoint.pt",
        ),
        ("lora", "result.part", "result.json could not be written"),
        ("lora", "run.part", "run.yaml could not be written"),
        ("lora", "data.part", "data.jsonl could not be written"),
    ],
)
def test_no_file_is_left_half_written(tmp_path, full_disk, monkeypatch, method, word, said):
    full_disk(word)
    with pytest.raises(OSError, match=f"(?s){said}"):
        run_method(method, **SMALL, out=tmp_path / "a")
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert not [name for name in left if name.endswith(".part") or name.startswith(".saving")]
    assert "adapter_config.json" not in left or word == "result.part"
    monkeypatch.undo()
    result = run_method(method, **SMALL, out=tmp_path / "a")
    assert len(result.history.loss) == 4 and (tmp_path / "a" / "adapter_config.json").exists()


def test_a_disk_that_is_really_full(tmp_path):
    """RLIMIT_FSIZE: the system itself refuses to let a file grow; of `full` too, whose files others write."""
    resource = pytest.importorskip("resource")
    program = textwrap.dedent(f"""
        import resource, sys
        from pefttools.lab.finetune import run_method
        rows = [{{"instruction": f"f{{i}}", "output": f"x = {{i}}"}} for i in range(8)]
        for method, limit in (("lora", 200_000), ("full", 70_000_000), ("full", 15_000_000)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            try:
                run_method(method, data=rows, steps=1, batch=2, max_length=64, quiet=True,
                           out={str(tmp_path)!r} + f"/{{method}}{{limit}}")
                print(method, "fine")
            except OSError as error:
                print(method, error.errno, error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    """)
    assert resource
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line]
    assert len(said) == 3 and said[1] == "full fine", said
    for line, step in ((said[0], "lora"), (said[2], "full")):
        assert (
            line.startswith(f"{step} {errno.EFBIG} the checkpoint of step 1 could not be written")
            and "File too large" in line
        )
    for folder in tmp_path.iterdir():
        assert not [path for path in folder.iterdir() if path.suffix == ".part" or path.name.startswith(".saving")]


def test_a_model_that_cannot_be_saved_whole(tmp_path, monkeypatch):
    """safetensors says it in words of its own; the model's files are moved into the folder only when all are whole."""
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def fails(self, folder, **more):
        (Path(folder) / "config.json").write_text("{}")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fails)
    with pytest.raises(OSError, match="the model could not be written.*No space left on device") as caught:
        run_method("full", **SMALL | {"steps": 1}, out=tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "a" / "config.json").exists()


# ------------------------------------------------------------------------------------------------ memory


def errors():
    try:
        torch.empty(1 << 55)
    except RuntimeError as error:
        cpu = error
    return [cpu, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()]


@pytest.mark.parametrize("n", range(3), ids=["cpu", "gpu", "python"])
def test_memory_that_runs_out_is_advice(tmp_path, monkeypatch, n, capsys):
    import pefttools.lab.training

    real = pefttools.lab.training.loss_sum
    calls = []

    def hungry(model, batch):
        calls.append(1)
        if len(calls) > 5:
            raise errors()[n]
        return real(model, batch)

    monkeypatch.setattr(pefttools.lab.training, "loss_sum", hungry)
    long = [{**row, "output": row["output"] * 8} for row in ROWS]
    with pytest.raises(OutOfMemory) as caught:
        run_method(
            "lora",
            **SMALL | {"data": long, "steps": 9, "batch": 8, "max_length": 200, "save_every": 1},
            out=tmp_path / "a",
            gpu="t4" if n == 1 else None,
        )
    said = str(caught.value)
    assert (
        "memory ran out with 8 ×" in said
        and "Halve the batch (4 rows, 2 passes a step)" in said
        and "by the planner" in said
    )
    assert ("figures are of a GPU" in said) == (n != 1) and "has the checkpoint of before" in said
    monkeypatch.undo()
    assert torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["step"] == 5
    assert caught.value.__cause__ is not None


def test_another_error_is_not_taken_for_it(monkeypatch):
    import pefttools.lab.training

    monkeypatch.setattr(
        pefttools.lab.training, "loss_sum", lambda *a: (_ for _ in ()).throw(RuntimeError("mat1 and mat2"))
    )
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_method("lora", **SMALL)


# ------------------------------------------------------------------------------------------------ folders and kills


def test_one_process_a_folder(tmp_path):
    from filelock import FileLock

    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a" / ".lock"):
        with pytest.raises(ValueError, match="being trained into by another process"):
            run_method("lora", **SMALL, out=tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(WrongQuestion, match="is a file; give the path of a folder"):
        run_method("lora", **SMALL, out=tmp_path / "file")


def test_stopped_by_hand(tmp_path, monkeypatch, capsys):
    import pefttools.lab.training

    real, calls = pefttools.lab.training.loss_sum, []
    monkeypatch.setattr(
        pefttools.lab.training,
        "loss_sum",
        lambda *a: real(*a) if calls.append(1) or len(calls) < 4 else (_ for _ in ()).throw(KeyboardInterrupt()),
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    words = [
        "finetune",
        "tiny",
        "--data",
        str(path),
        "--steps",
        "4",
        "--batch",
        "2",
        "--save-every",
        "2",
        "--quiet",
        "--out",
        str(tmp_path / "a"),
    ]
    assert cli.main(words) == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert cli.main(words) == 130 and len(calls) == 5, "it went on with the third step"


@pytest.mark.slow
def test_killed_and_resumed_is_the_same(tmp_path):
    """Two kills of the drill (`make finetune-drill` has all of them), one with half of a checkpoint on the disk."""
    from pefttools.lab import finetune_drill

    plan = [("half of a checkpoint written", 3, 0.0), (finetune_drill.LAST, 8, 0.0)]
    finetune_drill_drawn, finetune_drill.drawn = finetune_drill.drawn, lambda *a, **k: plan
    try:
        found = finetune_drill.drill("qlora", tmp_path, steps=8)
    finally:
        finetune_drill.drawn = finetune_drill_drawn
    assert len(found["kills"]) == 2 and found["same bytes"] and found["loss"] == found["difference"] == 0
    assert found["left over"] == []


def test_the_drill_draws_steps_that_rise_and_every_place():
    import random

    from pefttools.lab.finetune_drill import LAST, PLACES, STEPS, WAYS, drawn, page

    plan = drawn(random.Random(0), 10, STEPS, last=True)
    assert len(plan) == 10 and [at for _, at, _ in plan] == sorted({at for _, at, _ in plan}) and plan[-1][0] == LAST
    assert {place for place, _, _ in plan} == {*PLACES, LAST} and plan != drawn(random.Random(1), 10, STEPS, last=True)
    assert sum(kills for _, kills in WAYS.values()) >= 30
    row = {
        "way": "lora",
        "steps": 60,
        "kills": [(PLACES[0], 3)],
        "missed": 1,
        "numbers": 5,
        "difference": 0.0,
        "same bytes": True,
        "loss": 0.0,
        "held out": True,
        "left over": [],
    }
    text = page([row], "command", {"cores": 4})
    assert (
        "equal byte for byte" in text and "| lora | 5 | 1 | 0 | equal | 0 |" in text and "1 kills from outside" in text
    )
    assert "**Not every" in page([{**row, "same bytes": False}], "command", {})
