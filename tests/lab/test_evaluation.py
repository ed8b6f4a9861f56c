"""pass@1: programs run in processes with limits, and cannot pass by ending early."""

import time

import pytest

from pefttools.lab import code_of, evaluate, generate, held_out_loss, run_programs
from pefttools.lab.evaluation import wilson

GOOD = "def f(x):\n    return x + 1\n"


def test_code_of_an_answer():
    assert code_of("```python\nx = 1\n```") == "x = 1"
    assert code_of("Sure!\n```\nx = 1\n```\nand\n```python\ny\n```") == "x = 1"
    assert code_of("```python\nx = 1\n") == "x = 1\n"  # cut off before its closing fence
    assert code_of("x = 1") == "x = 1"


@pytest.mark.parametrize("code, passed, error", [
    (GOOD, True, ""),
    ("def f(x):\n    return x\n", False, "AssertionError"),
    ("def f(x)\n    return x\n", False, "SyntaxError"),
    ("import sys\nsys.exit(0)", False, "SystemExit"),
    ("import os\nos._exit(0)", False, "ended before its tests"),
    ("raise KeyboardInterrupt", False, "KeyboardInterrupt"),
    ("x = [0] * (1 << 40)", False, "MemoryError"),
    ("while True: pass", False, "not finished"),
    ("import time\ntime.sleep(60)", False, "not finished"),
    ("open('big', 'w').write('x' * (3 << 20))", False, ""),
    ("print('[]' * 100000)\nimport sys\nsys.stderr.write('x')\n" + GOOD, True, ""),
    ("import os\nos.kill(os.getpid(), 9)", False, "ended before its tests"),
    ("input()", False, "EOFError"),
])
def test_programs_meet_their_limits(code, passed, error):
    (result,) = run_programs([(code, ["assert f(1) == 2"])], seconds=1)
    assert result["passed"] is passed
    assert error in result["error"]


def test_many_programs_in_order_and_in_time():
    began = time.perf_counter()
    results = run_programs([(GOOD if i % 3 else "f = None", ["assert f(1) == 2"]) for i in range(60)])
    assert [r["passed"] for r in results] == [bool(i % 3) for i in range(60)]
    assert time.perf_counter() - began < 30


def test_programs_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (result,) = run_programs([("open('left.txt', 'w').write('x')", ["import os; assert os.listdir() == ['left.txt']"])])
    assert result["passed"], result
    assert list(tmp_path.iterdir()) == []


def test_environment_is_empty(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    (result,) = run_programs([("import os", ["assert 'HF_TOKEN' not in os.environ"])])
    assert result["passed"], result


def test_evaluate_reads_the_model(small, tiny, rows, monkeypatch):
    answers = [r["output"] if i % 2 else "```python\npass\n```" for i, r in enumerate(rows)]
    monkeypatch.setattr("pefttools.lab.evaluation.generate", lambda model, tok, prompts, n: answers)
    report = evaluate(small, tiny.tokenizer, rows)
    assert report.pass_at_1 == 0.5 and report.by_kind == {"add": (12, 24)}
    low, high = report.interval
    assert low < 0.5 < high and "50.0 %" in repr(report)


def test_evaluate_picks_the_same_rows_each_time(small, tiny, rows):
    first, second = (evaluate(small, tiny.tokenizer, rows, n=5, max_new_tokens=4) for _ in range(2))
    assert [r["instruction"] for r in first.rows] == [r["instruction"] for r in second.rows]
    assert len(first.rows) == 5
    with pytest.raises(ValueError, match="no rows"):
        evaluate(small, tiny.tokenizer, [])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        evaluate(small, tiny.tokenizer, rows, n=0)
    assert run_programs([]) == []


def test_wilson_interval():
    assert wilson(0, 10)[0] == 0.0 and 0.2 < wilson(0, 10)[1] < 0.35  # "none of ten" does not mean never
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)


def test_generation_of_a_batch_is_that_of_each_alone(tiny):
    prompts = ["def add(a, b):\n", "import os\n\n\ndef read_all(path):\n    \"\"\"Read a file.\"\"\"\n"]
    together = generate(tiny.model, tiny.tokenizer, prompts, max_new_tokens=12)
    assert together == [generate(tiny.model, tiny.tokenizer, p, max_new_tokens=12) for p in prompts]


def test_sampling_has_a_seed(tiny):
    one, two, other = (generate(tiny.model, tiny.tokenizer, "def ", 12, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert one == two != other
    with pytest.raises(ValueError, match="temperature"):
        generate(tiny.model, tiny.tokenizer, "def ", temperature=-1)


def test_held_out_loss_weighs_tokens_not_rows(tiny, rows):
    from pefttools.lab import encode, loss_sum, collate

    mixed = [rows[0], {**rows[1], "output": "```python\n" + "x = 1\n" * 30 + "```"}]
    total = count = 0
    for r in mixed:
        e = encode(r, tiny.tokenizer)
        total += loss_sum(tiny.model, collate([e], 2)).item()
        count += sum(x != -100 for x in e["labels"][1:])
    assert held_out_loss(tiny.model, tiny.tokenizer, mixed) == pytest.approx(total / count, rel=1e-5)
