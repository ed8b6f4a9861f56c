"""`pefttools finetune` on the bundled model: peft's files, resumption, the plan that refuses, wrong input."""
from __future__ import annotations

import json

import pytest

from pefttools import cli
from pefttools.lab import finetune_memory
from pefttools.lab.finetune import Peak, WrongQuestion, run_method
from pefttools.lab.finetune_memory import compared
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


@pytest.fixture
def tiny_again():
    """The bundled model, for this test alone: it is changed."""
    from pefttools.lab import load_base

    return load_base("tiny")


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
        (["--max-length", "5"], "row 1 does not fit into --max-length 5"),
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
        ('["x"]', "is a list, not an object"),
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

# ------------------------------------------------------------------------------------------------ from Python

def test_run_yaml_repeats_a_run_and_result_json_tells_it(data, tmp_path):
    more = ["--eval-every", "2", "--held-out", "0.25", "--options", "dropout=0.1"]
    assert run(data, tmp_path / "a", *more) == 0
    assert cli.main(["finetune", "--config", str(tmp_path / "a" / "run.yaml"), "--out", str(tmp_path / "b")]) == 0
    a, b = ((tmp_path / each / "adapter_model.safetensors").read_bytes() for each in "ab")
    assert a == b
    told = json.loads((tmp_path / "a" / "result.json").read_text())
    assert len(told["loss"]) == told["steps"] == 3 and [step for step, _ in told["held_out"]] == [2, 3]
    assert told["best"][1] == min(loss for _, loss in told["held_out"]) and told["tokens_per_second"] > 0
    assert told["base"] == "tiny" and told["peak_kind"] == "process" and told["peak_resident"] > 2**26
    assert told["planned"] is None
    settings = (tmp_path / "a" / "run.yaml").read_text()
    assert "lr: 0.01" in settings and "alpha: 2.0" in settings and "held_out: '0.25'" in settings, "resolved"


def test_out_is_needed_and_a_plan_needs_none(data, capsys):
    assert cli.main(["finetune", "tiny", "--data", str(data)]) == 2
    assert "--out FOLDER is missing" in capsys.readouterr().err
    assert cli.main(["finetune", "tiny", "--data", str(data), "--plan-only", "--gpu", "t4"]) == 0
    assert "T4 has" in capsys.readouterr().out


def test_from_python_with_rows(tmp_path, capsys):
    asked = dict(data=ROWS, steps=3, batch=2, max_length=64, r=2, lr=0.02)
    result = run_method("qlora", **asked, out=tmp_path / "a", progress=False)
    said = capsys.readouterr().out
    assert "qlora on tiny" in said and "3 steps" in said and result.folder == tmp_path / "a"
    assert (result.method, result.base, len(result.history.loss), result.best) == ("qlora", "tiny", 3, None)
    assert result.trainable == sum(p.numel() for p in result.model.parameters() if p.requires_grad) < result.parameters
    assert result.tokens_per_second == result.history.read / result.seconds
    assert result.history.read > result.history.tokens > 0
    assert "no GPU was planned for" in result.memory() and result.row()["trainable"] == result.trainable
    assert not result.model.training and result.planned is None
    assert cli.main(["finetune", "--config", str(tmp_path / "a" / "run.yaml"), "--out", str(tmp_path / "b")]) == 0
    same = [(tmp_path / each / "adapter_model.safetensors").read_bytes() for each in "ab"]
    assert same[0] == same[1], "the rows of a notebook are beside the result"
    again = run_method("qlora", **asked, quiet=True)           # nothing is written without a folder
    assert again.folder is None and again.history.loss == result.history.loss
    with pytest.raises(ValueError, match="method was qlora and is lora"):
        run_method("lora", **asked, out=tmp_path / "a", quiet=True)
    with pytest.raises(WrongQuestion, match="did you mean 'steps'"):
        run_method("lora", data=ROWS, step=3)


def test_a_base_that_is_loaded_already(tiny_again):
    from pefttools.inject import detach

    asked = dict(data=ROWS, held_out=ROWS[:4], eval_every=2, steps=2, batch=2, max_length=64, r=2, quiet=True)
    result = run_method("lora", **asked, base=tiny_again)
    assert result.model is tiny_again.model and result.base == "tiny" and result.best
    detach(tiny_again.model)
    second = run_method("qlora", **asked, base=tiny_again)
    third_base = detach(second.model)
    again = run_method("qlora", **asked, base=tiny_again)
    assert again.history.loss == second.history.loss, "quantized already, and so left"
    assert third_base is tiny_again.model


def test_full_and_norms_in_16_bits(tmp_path):
    for method in ("full", "ln_tuning", "lora", "llama_adapter"):
        result = run_method(method, data=ROWS, steps=3, batch=2, max_length=64, r=2, precision="float16", quiet=True)
        assert all(loss < 4 for loss in result.history.loss), method
        result.model(input_ids=result.tokenizer("x = ", return_tensors="pt")["input_ids"])


def test_planned_and_peak_are_compared():
    from pefttools.vram import estimate

    memory = estimate("tiny", "lora", 4, 64)
    peak = Peak("gpu", int(memory.total * 1.05), int(memory.reserved * 1.1), 0, 0)
    said = compared(memory, peak, 64)
    assert "(+5.0 %)" in said and "planned" in said and "longest" not in said
    assert "the longest row that was trained on had 50 tokens, planned were 64" in compared(memory, peak, 50)
    assert "loading took" in compared(memory, Peak("gpu", 1, 1, 2**30, 0))
    assert "nothing was planned" in compared(None, peak)


def test_rows_that_are_cut_are_counted(tmp_path, capsys):
    long = [{**row, "instruction": row["instruction"] * (1 + 9 * (n < 3))} for n, row in enumerate(ROWS)]
    run_method("lora", data=long, steps=1, batch=2, max_length=48, r=2, progress=False)
    assert "Cut: 3 of 12 rows of the data are longer than 48 tokens" in capsys.readouterr().out
    long[0]["output"] = "x" * 500
    with pytest.raises(WrongQuestion, match="row 1 does not fit into --max-length 48.*1 of 12 rows cannot be used"):
        run_method("lora", data=long, steps=1, max_length=48, quiet=True)
    run_method("lora", data=long, steps=1, batch=2, max_length=48, r=2, progress=False, skip_bad=True)
    assert "Left out: 1 of 12 rows" in capsys.readouterr().out
