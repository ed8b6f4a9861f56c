"""Rows to tensors: what is a target and what is not."""

import pytest
import torch

from pefttools.lab import collate, encode
from pefttools.lab.text import IGNORE, batches


@pytest.fixture(scope="module")
def row():
    return {"instruction": "Write a function `double`.", "input": "", "output": "```python\ndef double(x):\n    return 2 * x\n```"}


def test_prompt_is_masked_answer_and_end_are_targets(tiny, row):
    out = encode(row, tiny.tokenizer)
    n = out["labels"].count(IGNORE)
    assert out["input_ids"][0] == tiny.tokenizer.bos_token_id
    assert tiny.tokenizer.decode(out["input_ids"][1:n]) == row["instruction"] + "\n"
    assert out["labels"][n:] == out["input_ids"][n:]
    assert out["labels"][-1] == tiny.tokenizer.eos_token_id
    assert tiny.tokenizer.decode(out["labels"][n:-1]) == row["output"]


def test_truncation_keeps_the_answer_whole(tiny, row):
    whole = encode(row, tiny.tokenizer)
    cut = encode(row, tiny.tokenizer, max_length=len(whole["input_ids"]) - 3)
    assert len(cut["input_ids"]) == len(whole["input_ids"]) - 3
    assert [x for x in cut["labels"] if x != IGNORE] == [x for x in whole["labels"] if x != IGNORE]
    assert cut["input_ids"][0] == tiny.tokenizer.bos_token_id
    with pytest.raises(ValueError, match="raise max_length to at least"):
        encode(row, tiny.tokenizer, max_length=8)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_padding_is_never_a_target_and_the_end_stays_one(tiny, row, pad_is_eos):
    eos = tiny.tokenizer.eos_token_id
    pad = eos if pad_is_eos else tiny.tokenizer.pad_token_id
    short = encode(row, tiny.tokenizer)
    long = encode({**row, "instruction": row["instruction"] * 3}, tiny.tokenizer)
    batch = collate([short, long], pad)
    n = len(short["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, len(long["input_ids"]))
    assert (batch["labels"][0, n:] == IGNORE).all() and (batch["attention_mask"][0, n:] == 0).all()
    assert batch["labels"][0, n - 1] == eos and batch["attention_mask"][0, :n].all()


def test_left_padding_ends_every_row_at_its_last_token(tiny):
    batch = collate([{"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}], 2, side="left")
    assert batch["input_ids"].tolist() == [[2, 5, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_loss_of_a_row_does_not_depend_on_its_padding(tiny, row):
    from pefttools.lab import loss_sum

    short = encode(row, tiny.tokenizer)
    long = encode({**row, "instruction": row["instruction"] * 4}, tiny.tokenizer)
    with torch.no_grad():
        alone = loss_sum(tiny.model, collate([short], 2)) + loss_sum(tiny.model, collate([long], 2))
        together = loss_sum(tiny.model, collate([short, long], 2))
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-4)


def test_loss_is_transformers_loss(tiny, row):
    from pefttools.lab import loss_sum

    batch = collate([encode(row, tiny.tokenizer), encode({**row, "input": "4"}, tiny.tokenizer)], 2)
    with torch.no_grad():
        theirs = tiny.model(**batch).loss
        ours = loss_sum(tiny.model, batch) / (batch["labels"][:, 1:] != IGNORE).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_batches_cover_an_epoch_once_and_resume():
    rows = [{"input_ids": [0] * (1 + i % 7)} for i in range(64)]
    plan = batches(rows, 4, 16, seed=3)
    assert sorted(i for b in plan for i in b) == list(range(64))
    assert batches(rows, 4, 40, seed=3)[:16] == plan
    assert batches(rows, 4, 16, seed=4) != plan
    lengths = [len({len(rows[i]["input_ids"]) for i in b}) for b in plan]
    assert max(lengths) <= 2  # rows of a batch are of about one length


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="no rows"):
        batches([], 4, 1)
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)
    with pytest.raises(ValueError, match="no pad token"):
        collate([{"input_ids": [1]}], None)
    with pytest.raises(ValueError, match="'left' or 'right', got 'middle'"):
        collate([{"input_ids": [1]}], 0, side="middle")
