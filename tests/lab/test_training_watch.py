"""Early stopping: the best is kept, patience ends a run, a resumed run decides as if it had never stopped."""

from __future__ import annotations

import copy

import pytest
import torch

from pefttools.lab import held_out_loss, train
from pefttools.lab.training_watch import Watch

RUN = dict(steps=12, lr=3e-2, batch_size=4, progress=False, max_length=64)


@pytest.fixture
def other_rows():
    """Rows with answers of another kind, so that learning the first ones soon makes these worse."""
    return [{"instruction": f"Say {i}.", "input": "", "output": "!" * (4 + i)} for i in range(9)]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_best_look_is_kept_and_the_loss_is_that_of_held_out_loss(small, tiny, rows, other_rows):
    watch = Watch(other_rows, tiny.tokenizer, every=2, batch_size=4)
    plain = copy.deepcopy(small)
    history = train(small, rows, tiny.tokenizer, **RUN, watch=watch)
    assert [step for step, _ in history.held_out] == [2, 4, 6, 8, 10, 12]
    assert (watch.step, watch.loss) == min(history.held_out, key=lambda look: look[1]) and watch.step < 12
    assert held_out_loss(small, tiny.tokenizer, other_rows) == pytest.approx(watch.loss, rel=1e-5)
    assert train(plain, rows, tiny.tokenizer, **RUN).loss == history.loss, "a look changes nothing of the training"
    assert len(history.plot().axes[0].lines) == 3


def test_patience(small, tiny, rows, other_rows, tmp_path):
    runs = {}
    for patience in (0, 2):
        model = copy.deepcopy(small)
        runs[patience] = train(
            model,
            rows,
            tiny.tokenizer,
            **{**RUN, "steps": 40},
            folder=tmp_path / str(patience),
            watch=Watch(other_rows, tiny.tokenizer, every=2, patience=patience),
        )
    looks = [loss for _, loss in runs[2].held_out]
    best = looks.index(min(looks))
    assert len(looks) == best + 3 and len(runs[2].loss) == 2 * len(looks) < 40 == len(runs[0].loss)
    again = Watch(other_rows, tiny.tokenizer, every=2, patience=2)
    model = copy.deepcopy(small)
    history = train(model, rows, tiny.tokenizer, **{**RUN, "steps": 40}, folder=tmp_path / "2", watch=again)
    assert history.loss == runs[2].loss and again.stopped and again.step == 2 * (best + 1), "stopped is stopped"


@pytest.mark.parametrize("at", [3, 6, 9])
def test_a_resumed_run_keeps_the_same_best(small, tiny, rows, other_rows, tmp_path, at):
    def run(model, **more):
        watch = Watch(other_rows, tiny.tokenizer, every=2, patience=4)
        return train(model, rows, tiny.tokenizer, **RUN, watch=watch, **more), watch, weights(model)

    whole = run(copy.deepcopy(small))
    run(copy.deepcopy(small), folder=tmp_path, stop_after=at)
    again = run(copy.deepcopy(small), folder=tmp_path)
    assert again[0].held_out == whole[0].held_out and again[0].loss == whole[0].loss
    assert again[1].step == whole[1].step and torch.equal(again[2], whole[2])


def test_wrong_numbers(tiny, rows):
    with pytest.raises(ValueError, match="every must be at least 1"):
        Watch(rows, tiny.tokenizer, every=0)
    with pytest.raises(ValueError, match="no target token"):
        Watch([], tiny.tokenizer, every=1)
