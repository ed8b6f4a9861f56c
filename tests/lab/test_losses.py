"""Losses of rows: each row's as if it were alone, tokens weigh alike, padding nothing; forgetting, over documents."""

import math

import pytest
import torch

from pefttools.checkpoint import save_adapter
from pefttools.inject import attach, detach
from pefttools.lab import (base_texts, document_losses, encode, evaluate, forgetting, held_out_loss, pass_at_k,
                           perplexity, row_losses)
from pefttools.lab.pretrain import bits_per_byte
from pefttools.lora import LoRAConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def unequal(rows):
    """Rows whose answers have from 5 to some 150 tokens, in no order of length."""
    return [{**row, "output": "```python\n" + "x = 1\n" * (7 * i % 24) + "```"} for i, row in enumerate(rows[:12])]


def alone(model, tokenizer, row) -> tuple[float, int]:
    """The loss of one row without a batch, a mask or a library's shift: −ln p of each target token, one by one."""
    coded = encode(row, tokenizer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([coded["input_ids"]])).logits[0].double()
    targets = [(t, label) for t, label in enumerate(coded["labels"]) if label != -100]
    return -sum(logits[t - 1].log_softmax(-1)[label].item() for t, label in targets), len(targets)


def test_each_rows_loss_is_that_of_the_row_alone(small, tiny, unequal):
    found = row_losses(small, tiny.tokenizer, unequal, batch_size=5)
    wanted = [alone(small, tiny.tokenizer, row) for row in unequal]
    assert [n for _, n in found] == [n for _, n in wanted] and len({n for _, n in wanted}) > 6
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], rel=1e-5)
    nats, tokens = map(sum, zip(*wanted))
    assert held_out_loss(small, tiny.tokenizer, unequal, batch_size=5) == pytest.approx(nats / tokens, rel=1e-5)
    assert perplexity(small, tiny.tokenizer, unequal) == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    mean_of_means = sum(x / n for x, n in wanted) / len(wanted)
    assert nats / tokens != pytest.approx(mean_of_means, rel=1e-5)


def test_padding_and_batches_change_nothing(small, tiny, unequal):
    one = row_losses(small, tiny.tokenizer, unequal, batch_size=1)
    for size in (2, 12):
        found = row_losses(small, tiny.tokenizer, unequal, batch_size=size)
        assert [x for x, _ in found] == pytest.approx([x for x, _ in one], rel=1e-5)
    tiny.tokenizer.pad_token, before = tiny.tokenizer.eos_token, tiny.tokenizer.pad_token
    try:  # where padding is the end token too, the end is still a target
        same = row_losses(small, tiny.tokenizer, unequal, batch_size=12)
    finally:
        tiny.tokenizer.pad_token = before
    assert [n for _, n in same] == [n for _, n in one]
    assert [x for x, _ in same] == pytest.approx([x for x, _ in one], rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabularys_size_as_perplexity(small, tiny, rows):
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert perplexity(small, tiny.tokenizer, rows) == pytest.approx(len(tiny.tokenizer), rel=1e-4)


def test_mode_is_left_as_it_was_and_rows_without_targets(small, tiny, rows):
    small.train()
    coded = {"input_ids": [0, 5, 6], "labels": [-100, -100, -100]}
    assert row_losses(small, tiny.tokenizer, [coded, encode(rows[0], tiny.tokenizer)])[0] == (0.0, 0)
    assert small.training
    with pytest.raises(ValueError, match="no row has a target"):
        held_out_loss(small, tiny.tokenizer, [coded])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        row_losses(small, tiny.tokenizer, rows, batch_size=0)


# ------------------------------------------------------------------------------------------------ pass@k

@pytest.mark.parametrize("n, c, k", [(n, c, k) for n in (1, 2, 5, 10) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_formula_and_the_count(n, c, k):
    from itertools import combinations

    wanted = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at_k(n, c, k) == pytest.approx(wanted, abs=1e-12)
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_stable_and_unbiased():
    assert pass_at_k(100_000, 1, 100) == pytest.approx(0.001, rel=1e-9)
    assert 0 < pass_at_k(10**6, 3, 1) < 1e-5 and pass_at_k(2000, 1000, 1000) == 1.0
    p, n, k = 0.15, 12, 5
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(chance)) == pytest.approx(truth, abs=1e-12)
    plugged_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chance))
    assert plugged_in < truth - 0.03  # the estimate that looks the same is too low


@pytest.mark.parametrize("n, c, k, words", [(5, 6, 1, "c must be between 0 and n=5"), (5, 1, 6, "at least 6 samples"),
                                            (5, 1, 0, "k must be between 1"), (5, 1.5, 1, "whole number")])
def test_pass_at_k_refuses(n, c, k, words):
    with pytest.raises(ValueError, match=words):
        pass_at_k(n, c, k)


def test_evaluate_with_samples(small, tiny, rows, monkeypatch):
    seen = []

    def answers(model, tok, prompts, n, temperature=0.0, seed=0):
        seen.append((temperature, seed))
        return [r["output"] if (seed + i) % 4 == 0 else "```python\npass\n```" for i, r in enumerate(rows[:8])]

    monkeypatch.setattr("pefttools.lab.evaluation.generate", answers)
    report = evaluate(small, tiny.tokenizer, rows[:8], samples=4, temperature=0.8, k=(1, 2, 4), seed=5)
    assert seen == [(0.8, 5), (0.8, 6), (0.8, 7), (0.8, 8)]
    assert report.values(1) == [0.25] * 8 and report.values(2) == [0.5] * 8 and report.values(4) == [1.0] * 8
    assert report.pass_at(2).value == 0.5 and report.pass_at_1 == 0.25 and report.samples == 4
    assert "pass@4 100.0 %" in repr(report) and "4 samples a row" in repr(report)
    assert report.where in ("sandbox", "subprocess") and report.where in repr(report)
    for wrong, words in (({"samples": 3}, "same answer 3 times"), ({"k": (2,)}, "needs at least that many"),
                         ({"samples": 0}, "at least 1, got 0")):
        with pytest.raises(ValueError, match=words):
            evaluate(small, tiny.tokenizer, rows, **wrong)
    with pytest.raises(ValueError, match="have no tests"):
        evaluate(small, tiny.tokenizer, [{**rows[0], "tests": []}])


def test_samples_are_functions_of_their_seed(tiny, rows):
    first, again = (evaluate(tiny.model, tiny.tokenizer, rows[:2], samples=2, temperature=1.0, max_new_tokens=6, seed=3)
                    for _ in range(2))
    later = evaluate(tiny.model, tiny.tokenizer, rows[:2], samples=1, temperature=1.0, max_new_tokens=6, seed=4)
    drawn = [[s["answer"] for s in row["samples"]] for row in first.rows]
    assert drawn == [[s["answer"] for s in row["samples"]] for row in again.rows]
    assert [d[1] for d in drawn] == [row["answer"] for row in later.rows] and drawn[0][0] != drawn[0][1]


# ------------------------------------------------------------------------------------------------ forgetting

def test_the_bundled_documents_were_kept_out_of_pretraining():
    import json

    from pefttools.lab.base import TINY

    kept_out = json.loads((TINY / "training.json").read_text())["corpus"]["held_out_files"]
    texts = base_texts()
    assert len(texts) == 12 and set(texts) <= set(kept_out)
    assert all(len(text.encode()) <= 3000 for text in texts.values()) and len(base_texts(3)) == 3
    with pytest.raises(ValueError, match="files must be at least 1"):
        base_texts(0)


def test_document_losses_are_those_of_pretraining(small, tiny):
    texts = {"short": "x = 1\n", "long": "def f(x):\n    return x\n" * 40, "middle": "import os\n" * 12}
    found = document_losses(small, tiny.tokenizer, texts, seq=64)
    _, mean = bits_per_byte(small, tiny.tokenizer, list(texts.values()), seq=64)
    assert sum(x for x, _ in found) / sum(n for _, n in found) == pytest.approx(mean, rel=1e-5)
    each = [document_losses(small, tiny.tokenizer, [text], seq=64)[0] for text in texts.values()]
    assert [n for _, n in found] == [n for _, n in each] == [
        len(tiny.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts.values()]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in each], rel=1e-5)


def test_forgetting_before_is_the_adapter_off(small, tiny):
    texts = base_texts(4)
    base = document_losses(small, tiny.tokenizer, texts)
    with pytest.raises(ValueError, match="no adapter that could be switched off"):
        forgetting(small, tiny.tokenizer, texts)
    attach(small, LoRAConfig(r=2, target_modules="all-linear"))
    unchanged = forgetting(small, tiny.tokenizer, texts)
    assert tuple(unchanged.change) == pytest.approx((0, 0, 0), abs=1e-6)
    with torch.no_grad():
        for name, p in small.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    found = forgetting(small, tiny.tokenizer, texts)
    given = forgetting(small, tiny.tokenizer, texts, before=base)
    assert found.change.value == pytest.approx(given.change.value, abs=1e-6)
    assert found.before.value == pytest.approx(sum(x for x, _ in base) / sum(n for _, n in base), rel=1e-5)
    assert found.change.value == pytest.approx(found.after.value - found.before.value, abs=1e-9)
    assert abs(found.change.value) > 1e-4
    assert [row["name"] for row in found.rows] == list(texts) and "over 4 documents" in str(found)
    with pytest.raises(ValueError, match="the tokens differ"):
        forgetting(small, tiny.tokenizer, texts, before=base[:2])
    assert detach(small) is small


def test_forgetting_of_a_model_of_pefts(small, tiny, tmp_path):
    from peft import PeftModel

    attach(small, LoRAConfig(r=2, target_modules="all-linear"), seed=1)
    with torch.no_grad():
        for name, p in small.named_parameters():
            if "lora_B" in name:
                p.fill_(1.0)
    texts = base_texts(3)
    ours = forgetting(small, tiny.tokenizer, texts)
    save_adapter(small, tmp_path)
    theirs = forgetting(PeftModel.from_pretrained(detach(small), tmp_path), tiny.tokenizer, texts)
    assert theirs.change.value == pytest.approx(ours.change.value, abs=1e-5) and abs(ours.change.value) > 1e-3
