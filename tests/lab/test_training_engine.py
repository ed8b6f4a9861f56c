"""Precision (which is chosen, and that float16 trains where it used to end in NaN) and several processes as one."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pefttools.inject import attach
from pefttools.lab import encoded, train
from pefttools.lab.training_engine import Engine, Processes, compute_dtype
from pefttools.lora import LoRAConfig

ROOT = Path(__file__).resolve().parents[2]
RUN = dict(steps=6, lr=1e-2, batch_size=4, progress=False, max_length=64)
HALF, BRAIN, WHOLE = torch.float16, torch.bfloat16, torch.float32


def engine_of(model, precision="auto"):
    return Engine(model, {n: p for n, p in model.named_parameters() if p.requires_grad}, precision)


@pytest.mark.parametrize(
    "dtype, adapter, precision, computed, autocast, scaled",
    [
        (WHOLE, True, "auto", WHOLE, False, False),
        (WHOLE, False, "auto", WHOLE, False, False),
        (BRAIN, True, "auto", BRAIN, False, False),  # our layers join float32 to 16 bits by themselves
        (HALF, True, "auto", HALF, False, True),
        (BRAIN, False, "auto", BRAIN, True, False),  # the model's own weights are made float32
        (HALF, False, "auto", HALF, True, True),
        (WHOLE, False, "bfloat16", BRAIN, True, False),
        (WHOLE, True, "float16", HALF, True, True),
        (BRAIN, True, "float16", HALF, True, True),
    ],
)
def test_what_is_chosen(small, dtype, adapter, precision, computed, autocast, scaled):
    model = small.to(dtype)
    if adapter:
        attach(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    engine = engine_of(model, precision)
    assert (engine.dtype, engine.autocast, engine.scaler is not None) == (computed, autocast, scaled)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {WHOLE}
    engine.finish()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {WHOLE if adapter else dtype}


def test_four_bits_compute_in_what_stands_beside_them(tiny):
    from pefttools.qlora import quantize_model

    model = copy.deepcopy(tiny.model).to(HALF)
    assert compute_dtype(quantize_model(model)) == HALF
    with pytest.raises(ValueError, match="precision='float32'.*load it"):
        engine_of(model, "float32")
    with pytest.raises(ValueError, match="there are auto, float32"):
        compute_dtype(model, "half")


def trained(model, tokenizer, rows, **more):
    history = train(model, rows, tokenizer, **{**RUN, **more})
    return history, torch.cat([p.detach().flatten().float() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("what", ["full", "norms", "lora"])
def test_float16_trains_like_float32(small, tiny, rows, what):
    """Before, "full" and "norms" ended in NaN at their second step: AdamW's ε of 1e-8 is zero in float16."""
    for name, p in small.named_parameters():
        p.requires_grad_(what == "full" or what == "norms" and "norm" in name)
    if what == "lora":
        attach(small, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    half = copy.deepcopy(small)
    for p in half.parameters():
        p.data = p.data.half() if what != "lora" or not p.requires_grad else p.data
    start = torch.cat([p.detach().flatten().clone() for p in small.parameters() if p.requires_grad])
    expected, right = trained(small, tiny.tokenizer, rows)
    found, values = trained(half, tiny.tokenizer, rows)
    assert values.isfinite().all() and found.loss == pytest.approx(expected.loss, rel=5e-3)
    assert (right - start).abs().mean() > 1e-3 and (values - right).abs().mean() < 0.2 * (right - start).abs().mean()
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {HALF if what != "lora" else WHOLE}
    half(input_ids=torch.ones(1, 3, dtype=torch.long))  # usable afterwards, without autocast


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_resumed_run_of_16_bits_equals_the_uninterrupted_one(small, tiny, rows, tmp_path, precision):
    whole, first, again = (copy.deepcopy(small) for _ in range(3))
    expected, values = trained(whole, tiny.tokenizer, rows, precision=precision)
    trained(first, tiny.tokenizer, rows, precision=precision, folder=tmp_path, stop_after=3)
    found, resumed = trained(again, tiny.tokenizer, rows, precision=precision, folder=tmp_path)
    assert found.loss == expected.loss and torch.equal(values, resumed)
    with pytest.raises(ValueError, match="computed in was torch.* and is torch.float32"):
        train(copy.deepcopy(small), rows, tiny.tokenizer, **RUN, folder=tmp_path)


def test_a_gradient_too_large_for_float16_changes_nothing_and_halves_the_factor(small):
    engine = engine_of(small, "float16")
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.1)
    before, factor = copy.deepcopy(list(small.parameters())), engine.scaler.get_scale()
    engine.backward(sum(p.sum() for p in small.parameters()) * 1e36)
    engine.collect(optimizer)
    engine.step(optimizer)
    assert engine.skipped == 1 and engine.scaler.get_scale() == factor / 2
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters()))
    optimizer.zero_grad()
    engine.backward(sum(p.sum() for p in small.parameters()))
    engine.collect(optimizer)
    assert all(torch.allclose(p.grad, torch.ones_like(p)) for p in small.parameters()), "divided by the factor again"
    engine.step(optimizer)
    assert engine.skipped == 1 and not torch.equal(before[0], next(small.parameters()))


def test_dropout_goes_on_where_it_was(small, tiny, rows, tmp_path):
    attach(small, LoRAConfig(r=2, target_modules=["q_proj"], dropout=0.5))
    whole, first, again = (copy.deepcopy(small) for _ in range(3))
    expected, values = trained(whole, tiny.tokenizer, rows)
    trained(first, tiny.tokenizer, rows, folder=tmp_path, stop_after=3)
    torch.rand(7)
    found, resumed = trained(again, tiny.tokenizer, rows, folder=tmp_path)
    assert found.loss == expected.loss and torch.equal(values, resumed)


def test_a_checkpoint_knows_its_rows_and_its_method(small, tiny, rows, tmp_path):
    train(copy.deepcopy(small), rows, tiny.tokenizer, **RUN, folder=tmp_path, identity={"method": "lora"})
    other = [{**rows[0], "output": "something else"}, *rows[1:]]
    with pytest.raises(ValueError, match="the rows have changed"):
        train(copy.deepcopy(small), other, tiny.tokenizer, **RUN, folder=tmp_path, identity={"method": "lora"})
    with pytest.raises(ValueError, match="method was lora and is qlora"):
        train(copy.deepcopy(small), rows, tiny.tokenizer, **RUN, folder=tmp_path, identity={"method": "qlora"})


# ------------------------------------------------------------------------------------------------ processes


def test_the_passes_of_a_step_are_shared(monkeypatch):
    shares = []
    for rank, count in ((0, 1), (0, 2), (1, 2)):
        engine = Engine.__new__(Engine)
        engine.rank, engine.count = rank, count
        shares.append([engine.passes(step, 4 // count) for step in range(3)])
    assert shares[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [sorted(a + b) for a, b in zip(*shares[1:])] == shares[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP, which lab.train does not do"):
        Processes()


def launched(*program: str) -> subprocess.CompletedProcess:
    """`accelerate launch` of a program with two processes on this machine's CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(port),
    ]
    return subprocess.run(
        [*start, *program],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, one_thread):
    """`accelerate launch` with two CPU processes (gloo): the loss curve of one process that adds up twice the passes,
    to 1e-5, with long and short rows mixed so that the processes' token counts differ."""
    from pefttools import cli

    rows = [{"instruction": f"Write f{i}.", "output": f"x = {i}\n" * (1 + 3 * (i % 3))} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = [
        "finetune",
        "tiny",
        "--data",
        str(data),
        "--steps",
        "8",
        "--batch",
        "2",
        "--save-every",
        "3",
        "--quiet",
        "--lr",
        "1e-3",
        "--held-out",
        "0.2",
        "--eval-every",
        "4",
    ]
    assert cli.main([*common, "--accumulate", "2", "--out", str(tmp_path / "one")]) == 0
    done = launched("-m", "pefttools", *common, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 steps") == 1 and "2 processes" in done.stdout, "only the first process speaks"
    one, two = (json.loads((tmp_path / each / "result.json").read_text()) for each in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5) and two["targets"] == one["targets"]
    assert [loss for _, loss in two["held_out"]] == pytest.approx([loss for _, loss in one["held_out"]], abs=1e-5)
    # either may go on with the other's run: the passes of a step are as many
    runs = [torch.load(tmp_path / each / "checkpoint.pt", weights_only=True)["run"] for each in ("one", "two")]
    assert runs[0] == runs[1] and runs[0]["grad_accum"] == 2


PROGRAM = """
import sys
import torch
from pefttools.inject import attach
from pefttools.lab import load_base, train
from pefttools.lab.training_engine import Processes, leave
from pefttools.lora import LoRAConfig

processes = Processes()
rows = [{"instruction": f"f{i}", "input": "", "output": f"x = {i}" * (1 + i % 4)} for i in range(16)]

def run(folder, stop=None):
    base = load_base("tiny", quiet=True)
    attach(base.model, LoRAConfig(r=2, target_modules=["q_proj"], dropout=0.2), seed=processes.rank)
    history = train(base.model, rows, base.tokenizer, steps=6, lr=1e-2, batch_size=2, progress=False,
                    folder=f"{sys.argv[1]}/{folder}", stop_after=stop)
    values = torch.cat([p.detach().flatten() for p in base.model.parameters() if p.requires_grad])
    assert len(set(processes.gathered(values.double().sum().item()))) == 1, "the processes hold different adapters"
    return history.loss, values

whole = run("a")
run("b", 3)
torch.rand(5 + processes.rank)
again = run("b")
assert again[0] == whole[0] and torch.equal(again[1], whole[1])
drawn = processes.gathered(torch.rand(1).item())
assert drawn[0] != drawn[1], "the processes drop the same numbers"
open(f"{sys.argv[1]}/fine-{processes.rank}", "w").close()  # not printed: two processes' lines may mix
leave()
"""


@pytest.mark.slow
def test_two_processes_resume_with_their_own_dropout(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = launched(str(program), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("fine-*")) == ["fine-0", "fine-1"]


def test_rows_may_be_encoded_already(small, tiny, rows):
    other = copy.deepcopy(small)
    assert (
        train(small, rows, tiny.tokenizer, **RUN).loss
        == train(other, encoded(rows, tiny.tokenizer), tiny.tokenizer, **RUN).loss
    )
