"""The loop: accumulation weighs tokens, a killed run resumes, transformers' Trainer agrees."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from pefttools.lab import collate, encoded, train, train_with_trainer
from pefttools.lab.text import IGNORE
from pefttools.lab.training import loss_sum, schedule

RUN = dict(steps=6, lr=1e-2, batch_size=4, progress=False, max_length=64)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_loss_falls(small, tiny, rows):
    history = train(small, rows, tiny.tokenizer, **{**RUN, "steps": 30})
    assert history.loss[-1] < history.loss[0] - 1
    assert len(history.loss) == len(history.lr) == 30 and history.tokens > 0
    assert not small.training


def test_same_seed_same_weights(small, tiny, rows):
    other = copy.deepcopy(small)
    train(small, rows, tiny.tokenizer, **RUN)
    train(other, rows, tiny.tokenizer, **RUN)
    assert torch.equal(weights(small), weights(other))
    third = copy.deepcopy(other)
    train(third, rows, tiny.tokenizer, **RUN, seed=1)
    assert not torch.equal(weights(third), weights(other))


def test_accumulation_is_one_large_batch(small, tiny, rows):
    """Two micro-batches of different token counts give the gradient of the mean over all their tokens."""
    other = copy.deepcopy(small)
    rows = encoded(rows[:4] + [{**rows[4], "instruction": "x", "output": "y" * 40}] * 4, tiny.tokenizer)
    train(small, rows, tiny.tokenizer, **{**RUN, "steps": 1, "batch_size": 4, "grad_accum": 2, "warmup": 0.0, "clip": 1e9})
    batch = collate(rows, tiny.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(other.parameters(), lr=RUN["lr"], weight_decay=0.0)
    (loss_sum(other, batch) / (batch["labels"][:, 1:] != IGNORE).sum()).backward()
    optimizer.step()
    # Adam's first step is lr·sign(g): elements whose gradient is rounding noise may differ in sign, so compare nearly all
    same = torch.isclose(weights(small), weights(other), atol=1e-4)
    assert same.float().mean() > 0.999


def test_schedule_is_transformers(small):
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 3, 10)
    for step in range(10):
        assert schedule(step, 10, 3) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_trainer_agrees(small, tiny, rows, tmp_path, grad_accum):
    other = copy.deepcopy(small)
    ours = train(small, rows, tiny.tokenizer, **RUN, grad_accum=grad_accum)
    theirs = train_with_trainer(other, rows, tiny.tokenizer, **RUN, grad_accum=grad_accum)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    assert ours.lr == pytest.approx(theirs.lr, rel=1e-6, abs=1e-12)
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(weights(small), weights(other), rtol=1e-3, atol=2e-4)


def test_resume_equals_the_uninterrupted_run(small, tiny, rows, tmp_path):
    stopped, whole = copy.deepcopy(small), copy.deepcopy(small)
    expected = train(whole, rows, tiny.tokenizer, **RUN)
    first = train(stopped, rows, tiny.tokenizer, **RUN, folder=tmp_path, stop_after=3)
    assert len(first.loss) == 3
    again = copy.deepcopy(small)  # a new process would start from the base weights
    history = train(again, rows, tiny.tokenizer, **RUN, folder=tmp_path)
    assert history.loss == expected.loss
    assert torch.equal(weights(again), weights(whole))


def test_killed_run_resumes(tiny, tmp_path):
    """SIGKILL in the middle, run again, same weights as a run that was left alone."""
    program = textwrap.dedent("""
        import os, sys, torch
        from pefttools.lab import load_base, train
        import pefttools.lab.training as t
        base = load_base("tiny")
        for n, p in base.model.named_parameters():
            p.requires_grad_("layers.5" in n)
        rows = [{"instruction": f"f{i}", "input": "", "output": f"x = {i}"} for i in range(16)]
        kill_at, folder = int(sys.argv[1]), sys.argv[2]
        if kill_at:
            real = t.keep
            def keep(path, run, params, optimizer, history, step, more):
                if step == kill_at:
                    path.with_suffix(".part").write_bytes(b"half a file")
                    os.kill(os.getpid(), 9)
                real(path, run, params, optimizer, history, step, more)
            t.keep = keep
        train(base.model, rows, base.tokenizer, steps=6, lr=1e-3, batch_size=4, progress=False, folder=folder, save_every=2)
        print(sum(p.double().sum().item() for p in base.model.parameters()))
    """)

    def run(kill_at, folder):
        return subprocess.run([sys.executable, "-c", program, str(kill_at), str(folder)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert run(4, tmp_path / "a").returncode == -9
    resumed, whole = run(0, tmp_path / "a"), run(0, tmp_path / "b")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr
    assert float(resumed.stdout) == float(whole.stdout)


def test_bad_input(small, tiny, rows, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        train(small, rows, tiny.tokenizer, **{**RUN, "steps": 0})
    train(small, rows, tiny.tokenizer, **{**RUN, "steps": 2}, folder=tmp_path)
    with pytest.raises(ValueError, match="another run.*lr was 0.01 and is 0.5"):
        train(small, rows, tiny.tokenizer, **{**RUN, "steps": 2, "lr": 0.5}, folder=tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        train(small, rows, tiny.tokenizer, **{**RUN, "steps": 2}, folder=tmp_path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="something else"):
        train(small, rows, tiny.tokenizer, **{**RUN, "steps": 2}, folder=tmp_path)
    small.requires_grad_(False)
    with pytest.raises(ValueError, match="attach an adapter"):
        train(small, rows, tiny.tokenizer, **RUN)


def test_diverged_loss_is_said(small, tiny, rows):
    with torch.no_grad():
        small.model.norm.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="lower lr"):
        train(small, rows, tiny.tokenizer, **RUN)


def test_history_plots(small, tiny, rows):
    figure = train(small, rows, tiny.tokenizer, **RUN).plot()
    assert figure.axes[0].get_xlabel() == "optimizer step"
