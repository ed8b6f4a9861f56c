"""Pretraining: from files to a model, on a corpus of a few files; resumes; held-out files stay out."""

import json

import numpy as np
import pytest
import torch

from pefttools.lab import corpus, pretrain


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    root = tmp_path_factory.mktemp("packages")
    (root / "toolz").mkdir()
    for i in range(40):
        body = "\n\n".join(f"def function_number_{i}_{j}(argument_{j}):\n    return argument_{j} * {i} + {j}" for j in range(12))
        (root / "toolz" / f"m{i}.py").write_text(f'"""Module {i}."""\n\n{body}\n')
    (root / "toolz" / "copy.py").write_text((root / "toolz" / "m0.py").read_text() + "\nx = 1\n")
    (root / "toolz" / "broken.py").write_text("def f(:\n" * 50)
    (root / "toolz" / "tests").mkdir()
    (root / "toolz" / "tests" / "test_x.py").write_text("def test():\n    pass\n" * 30)
    (root / "unlicensed").mkdir()
    (root / "unlicensed" / "m.py").write_text("secret_of_the_unlicensed = 1\n" * 20)
    return root


@pytest.fixture
def alone(monkeypatch, packages):
    """Only the fixture's packages, not the standard library."""
    monkeypatch.setattr(corpus, "sources", lambda p: {"toolz": p / "toolz"})


def test_collect_keeps_what_it_should(packages, alone):
    parts, about = corpus.collect(packages, held_out=5, seed=0)
    assert len(parts["held_out"]) == len(about["held_out_files"]) == 5
    assert not set(parts["held_out"]) & set(parts["train"])
    assert about["files_kept"] == 40 and about["files_read"] == 41  # the copy is read and dropped; the rest is not read
    again, _ = corpus.collect(packages, held_out=5, seed=0)
    assert again == parts
    assert corpus.collect(packages, held_out=5, seed=1)[0]["held_out"] != parts["held_out"]


def test_only_listed_licences_are_read(packages):
    assert set(corpus.sources(packages)) == {"python", "toolz"}


def test_learning_rate_is_a_trapezoid():
    rates = [pretrain.learning_rate(s, 1000) for s in range(1000)]
    assert max(rates) == pretrain.PEAK_LR == rates[500]
    assert rates[0] < rates[50] < rates[99] and rates[-1] < 0.01 * pretrain.PEAK_LR
    assert all(b <= a for a, b in zip(rates[800:], rates[801:]))


def test_batches_of_an_epoch_do_not_repeat():
    ids = np.arange(6000, dtype=np.uint16)
    rows = torch.cat([pretrain.batch_at(s, ids, 16, 4, seed=0) for s in range(90)])
    assert len(set(rows[:, 0].tolist())) == len(rows)
    assert torch.equal(pretrain.batch_at(7, ids, 16, 4, 0), pretrain.batch_at(7, ids, 16, 4, 0))


def test_bits_per_byte_of_a_uniform_model(tiny, small):
    """A model that gives every token the same probability pays log2(V) bits a token, each predicted token once."""
    with torch.no_grad():
        small.lm_head.weight.zero_()
    text = "x = 1\n" * 300
    n = len(tiny.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    bpb, nats = pretrain.bits_per_byte(small, tiny.tokenizer, [text], seq=64)
    assert not small.training                # as it was given
    assert nats == pytest.approx(np.log(len(tiny.tokenizer)), rel=1e-5)
    assert bpb == pytest.approx(n * np.log2(len(tiny.tokenizer)) / len(text), rel=1e-5)


@pytest.mark.slow
def test_pretrain_resumes_and_finishes(packages, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SEQ", 32)
    monkeypatch.setattr(pretrain, "BATCH", 4)
    monkeypatch.setattr(pretrain, "SHAPE", {**pretrain.SHAPE, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64})
    real = corpus.collect
    monkeypatch.setattr(corpus, "collect", lambda p, seed=0: real(p, held_out=5, seed=seed))
    for name in ("stopped", "whole"):
        corpus.build(packages, tmp_path / name, vocab_size=300)
    pretrain.train(tmp_path / "whole", steps=20, save_every=5, compile=False)
    calls = []

    def killed(step, *args):
        calls.append(step)
        if step == 13:
            raise KeyboardInterrupt
        return batch_at(step, *args)

    batch_at = pretrain.batch_at
    monkeypatch.setattr(pretrain, "batch_at", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(tmp_path / "stopped", steps=20, save_every=5, compile=False)
    monkeypatch.setattr(pretrain, "batch_at", batch_at)
    pretrain.train(tmp_path / "stopped", steps=20, save_every=5, compile=False)
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("stopped", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    from pefttools.lab.card import finish

    about = finish(tmp_path / "stopped", tmp_path / "model")
    assert about["steps"] == 20 and (tmp_path / "model" / "loss.png").exists()
    text = (tmp_path / "model" / "README.md").read_text()
    assert f"{about['held_out']['all held-out files']['bits_per_byte']:.3f}" in text and "toolz" in text
    json.loads((tmp_path / "model" / "sha256.json").read_text())
