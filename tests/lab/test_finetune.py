"""`pefttools finetune` on the bundled model: peft's files, resumption, the plan that refuses, wrong input."""
from __future__ import annotations

import json

import pytest

from pefttools import cli
from pefttools.lab import finetune_memory
from pefttools.vram.verdict import Budget

ROWS = [
    {
        "instruction": f"Write a function that adds {i}.",
        "input": "",
        "output": f"```python\ndef f(x):\n    return x + {i}\n```",
    }
    for i in range(12)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


def run(data, out, *more) -> int:
    return cli.main(["finetune", "tiny", "--data", str(data), "--out", str(out), "--steps", "3", "--batch", "2",
                     "--max-length", "64", "--r", "2", "--quiet", *more])


@pytest.mark.parametrize("method", ["lora", "qdora", "prompt", "bottleneck"])
def test_an_adapter_is_trained_and_loads_again(data, tmp_path, capsys, method):
    from pefttools.checkpoint import load_adapter
    from pefttools.lab import load_base

    assert run(data, tmp_path / "a", "--method", method, *(["--checkpointing"] if method == "lora" else [])) == 0
    out = capsys.readouterr().out
    assert "3 steps" in out and "no GPU" in out and "12 rows" in out
    assert {"adapter_config.json", "adapter_model.safetensors", "checkpoint.pt"} <= {
        p.name for p in (tmp_path / "a").iterdir()
    }
    if method == "lora":
        model = load_base("tiny").model
        load_adapter(model, tmp_path / "a")
        trained = [p for n, p in model.named_parameters() if "lora_B" in n]
        assert trained and all(p.abs().sum() > 0 for p in trained)


def test_it_goes_on_where_it_was(data, tmp_path, capsys):
    assert run(data, tmp_path / "a", "--lr", "0.01") == 0
    capsys.readouterr()
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    assert run(data, tmp_path / "a", "--lr", "0.01") == 0, "finished: nothing is left to do"
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    assert run(data, tmp_path / "a", "--lr", "0.02") == 1
    assert "belongs to another run" in capsys.readouterr().err


def test_full_is_saved_as_a_model(data, tmp_path):
    from transformers import AutoModelForCausalLM

    assert run(data, tmp_path / "a", "--method", "full", "--steps", "1") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a", local_files_only=True).config.hidden_size == 256


@pytest.mark.parametrize(
    "more, said",
    [
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--steps", "0"], "--steps 0"),
        (["--r", "0"], "r=0"),
        (["--data", "trian"], "the splits are train"),
        (["--max-length", "5"], "row 1 of the data"),
        (["--gpu", "t5"], "Did you mean t4"),
    ],
    ids=lambda x: "" if isinstance(x, str) else x[0],
)
def test_wrong_questions_end_with_2(data, tmp_path, capsys, more, said):
    assert run(data, tmp_path / "a", *more) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "line, said",
    [
        ("{no json", "line 2 is no JSON"),
        ('{"instruction": "x"}', "no text in 'output'"),
        ('["x"]', "no text in 'instruction'"),
        ('{"instruction": 5, "output": ""}', "'instruction'"),
    ],
)
def test_rows_that_are_none(tmp_path, capsys, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    assert run(path, tmp_path / "a") == 2 and said in capsys.readouterr().err
    path.write_text("\n")
    assert run(path, tmp_path / "a") == 2 and "holds no rows" in capsys.readouterr().err


def test_the_plan_refuses_before_anything_is_loaded(data, tmp_path, monkeypatch, capsys):
    import pefttools.lab.base

    monkeypatch.setattr(pefttools.lab.base, "load_base", lambda *a, **k: pytest.fail("loaded"))
    small, large = Budget("a small GPU", 330 * 2**20, "t4", False), Budget("a large GPU", 2**34, "t4", False)
    monkeypatch.setattr(finetune_memory, "budget_here", lambda gpu: small)
    assert run(data, tmp_path / "a", "--batch", "12") == 1
    out = capsys.readouterr().out
    assert "needs" in out and "a small GPU has" in out and "--anyway" in out and "Nothing was loaded" in out
    monkeypatch.setattr(finetune_memory, "budget_here", lambda gpu: large)
    assert run(data, tmp_path / "a", "--plan-only") == 0
    assert "Memory: the worst batch, 2 ×" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(finetune_memory, "budget_here", lambda gpu: small)
    assert run(data, tmp_path / "a", "--batch", "12", "--anyway", "--steps", "1") == 0
    assert "Going on" in capsys.readouterr().out


def test_the_plan_is_of_the_worst_batch(data, tmp_path, monkeypatch, capsys):
    seen = []
    import pefttools.vram.verdict

    real = pefttools.vram.verdict.Judge.__call__
    monkeypatch.setattr(pefttools.vram.verdict.Judge, "__call__", lambda self, job: seen.append(job) or real(self, job))
    assert run(data, tmp_path / "a", "--gpu", "t4", "--plan-only", "--accumulate", "3") == 0
    [job] = seen
    assert (job.batch, job.accumulate, job.padded, job.dtype, job.gpu) == (2, 3, True, "float16", "t4")
    from pefttools.lab import encode
    from pefttools.lab.base import TINY, tokenizer_of

    assert job.seq == max(len(encode(row, tokenizer_of(TINY), 64)["input_ids"]) for row in ROWS)
