"""Chapter 11: what its exercises judge, the memory that is planned and counted, the table, its pictures, the GPU script."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import capstone_folders
from pefttools.grading.exercises import ch11_capstone as chapter
from pefttools.lab import capstone, python_codes
from pefttools.lab.capstone_plan import plan_it
from pefttools.lab.colab import Place
from pefttools.widgets import capstone as pictures

ROOT = Path(__file__).resolve().parents[2]
SOURCE = (ROOT / "solutions" / "11_capstone.py").read_text(encoding="utf-8")
BY_NAME = {exercise.name: exercise for exercise in chapter.EXERCISES}
CPU, T4 = Place(False, "", (0, 0), 0), Place(True, "T4", (7, 5), 15_633_680_465)


def test_exercises_and_questions_have_what_the_standard_asks():
    assert {"plan-it", "run-it", "report-it"} <= set(BY_NAME)
    for exercise in chapter.EXERCISES:
        assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert chapter.EXERCISES[0].minutes <= 5 and chapter.EXERCISES[0].difficulty == 1
    assert 4 <= len(chapter.QUESTIONS) <= 6 and len({question.right for question in chapter.QUESTIONS}) >= 3


def test_the_report_waits_for_a_person_in_nbgraders_way():
    """nbgrader asks for a grade by hand where an answer cell is graded itself; the reader can still write in it."""
    from nbgrader.utils import determine_grade

    from pefttools.grading.chapter import read_chapter
    from pefttools.grading.release import release

    pristine = release(read_chapter(ROOT / "solutions" / "11_capstone.py"))
    cells = {cell.id: cell for cell in pristine.cells}
    about = cells["report-it"].metadata
    assert about.nbgrader.grade and about.nbgrader.solution and about.nbgrader.points == BY_NAME["report-it"].by_hand == 10
    assert about.get("editable", True) and not about.nbgrader.locked
    assert "4 points, and 10 by hand" in cells["about-report-it"].source and "35 points" in cells["title"].source
    assert determine_grade(cells["report-it"]) == (0, 10), "unchanged: nothing to read"
    cells["report-it"].source += "\nreport = {}"
    assert determine_grade(cells["report-it"]) == (None, 10), "somebody has to read it"


# ------------------------------------------------------------------------------------------------ the exercises

@pytest.mark.parametrize("seed", range(4))
def test_the_libraries_own_pass_as_a_students(seed):
    def pick(gpu, capability, claims):
        return Place(False, gpu, capability, 0).dtype

    def keep(rows, max_chars):
        kept = []
        for number, row in enumerate(rows):                 # `sensible` gives rows; here their numbers are wanted
            before = [rows[n] for n in kept]
            good, _ = python_codes.sensible([*before, row], max_chars=max_chars + 1)     # it counts the line end between
            kept += [number] if len(good) > len(before) else []
        return kept

    def front(points):
        rows = [{"method": str(i), "measured": memory * pictures.MiB, "loss": {"value": loss}} for i, (_, memory, loss) in enumerate(points)]
        return [points[int(i)][0] for i in pictures.on_front(rows, "memory", "loss")]

    for name, work in {"pick-precision": pick, "plan-it": plan_it, "pareto-front": front}.items():
        verdict = verdict_on(BY_NAME[name], work, seed)
        assert verdict.passed, f"{name}: {verdict.text}"
    case = BY_NAME["keep-rows"].cases(seed)[0]
    rows = [row for row in case["rows"] if len(python_codes.code_in(row["output"])) >= python_codes.MIN_CODE]
    assert keep(rows, case["max_chars"]) == chapter.keep_reference(rows, case["max_chars"])


@pytest.mark.parametrize("seed", range(4))
def test_every_plan_has_every_outcome(seed):
    for case in BY_NAME["plan-it"].cases(seed):
        known = {(row["method"], row["batch"], row["checkpointing"]): row["bytes"] for row in case["table"]}
        found = plan_it(case["methods"], case["examples"], case["room"], lambda *key: known[key])
        kinds = {"nothing" if choice is None else "checkpointing" if choice["checkpointing"] else "plain" for choice in found.values()}
        assert kinds == {"nothing", "checkpointing", "plain"}
        if case["examples"] > 1:
            assert any(choice and 1 < choice["accumulate"] for choice in found.values())


def test_the_bound_is_between_the_base_and_a_short_training():
    """On rows of three gradings: the bundled reference is below it by a half, nothing and a quarter of it are above."""
    for seed in (5, 6, 7):
        (case,) = chapter.run_inputs(torch.Generator().manual_seed(seed)),
        rows, loss = case[0]["rows"], {}
        for name in ("reference", "untrained", "stopped_early"):
            found = chapter.losses_with(Path(getattr(capstone_folders, name)), rows)
            loss[name] = sum(nats for nats, _ in found) / sum(n for _, n in found)
        assert loss["reference"] < chapter.BOUND / 2 and 2 < loss["untrained"] < 4 and chapter.BOUND < loss["stopped_early"] < 2, loss


def test_whatever_the_probe_imports_goes_into_the_sandbox():
    """What is imported inside of a function has to be named in the probe, or it is not there when an adapter is judged."""
    code = f"""
        import sys
        from pathlib import Path
        from pefttools.grading.exercises import ch11_capstone as chapter
        from pefttools.grading.stage import closure, own_imports, probe_source
        before = set(sys.modules)
        chapter.losses_with(Path({str(capstone_folders.reference)!r}), [{{"instruction": "a", "input": "", "output": "b"}}])
        used = {{name for name in set(sys.modules) - before if name.startswith("pefttools.")}}
        print(sorted(used - closure(own_imports(probe_source(chapter.RUN_IT)))))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-1000:]


def test_rows_of_a_grading_are_in_no_split():
    known = {row["instruction"] for split in ("train", "held_out", "new_kinds") for row in python_codes.load_rows(split)}
    (case,) = BY_NAME["run-it"].cases(123)
    assert len(case["rows"]) == chapter.ROWS and sum(row["instruction"] in known for row in case["rows"]) <= 2


@pytest.mark.parametrize("folder", ["reference", "in_float32", "twice_the_rank"])
def test_the_reference_is_an_adapter_that_peft_loads(folder):
    import peft

    from pefttools.lab import load_base

    found = peft.PeftModel.from_pretrained(load_base("tiny", quiet=True, device="cpu").model, getattr(capstone_folders, folder))
    assert any(p.abs().max() > 0 for name, p in found.named_parameters() if ".lora_B." in name)


def test_the_large_adapters_shapes_are_those_of_llama_3_2_1b():
    """Against the model itself, built without memory."""
    from pefttools.vram.presets import config_of, meta_model

    model = meta_model(config_of("llama-3.2-1b"))
    layers = {name: tuple(p.shape) for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}
    assert len(layers) == chapter.LARGE_LAYERS * len(chapter.LARGE_SHAPES)
    tensors = {}
    for name, (d_out, d_in) in layers.items():
        where = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{where}.lora_A.weight": [[8, d_in], 1.0, True], f"{where}.lora_B.weight": [[d_out, 8], 1.0, True]}
    found = {"missing": [], "type": "LORA", "rank": 8, "alpha": 16, "tensors": tensors}
    assert chapter.large_said(found) == "none, or in order"
    assert "shapes" in chapter.large_said({**found, "rank": 16})
    assert "NaN" in chapter.large_said({**found, "tensors": {**tensors, min(tensors): [tensors[min(tensors)][0], 1.0, False]}})


@pytest.mark.parametrize("cell, number", [("1,234", 1234.0), ("0.62 (0.55 to 0.69)", 0.62), ("+0.10", 0.10), ("−0.5", -0.5), ("qlora", "qlora"),
                                          ("1e-3", 0.001), ("", ""), ("4 × 2", 4.0)])
def test_numbers_of_a_table_are_read(cell, number):
    assert chapter.as_number(cell) == number


def test_the_notebooks_table_is_what_the_report_is_read_from():
    rows = [row_like(name, i) for i, name in enumerate(capstone.METHODS)]
    parsed = chapter.table_of(capstone.markdown(rows))
    assert list(parsed) == list(capstone.METHODS) and set(chapter.COLUMNS[1:]) <= set(parsed["qlora"])
    assert parsed["lora"]["trainable"] == rows[1]["trainable"] and parsed["lora"]["loss"] == pytest.approx(rows[1]["loss"]["value"], abs=1e-3)
    rows[-1] = {"method": "full", "missing": "does not fit, by the plan"}
    assert "full" not in chapter.table_of(capstone.markdown(rows))


def row_like(name, i):
    return {"method": name, "trainable": 1000 * (i + 1) if name != "lora" else 1000, "parameters": 10**6, "planned": (150 + i) * 2**20,
            "measured": (151 + 2 * i) * 2**20, "batch": 8 >> (i % 2), "accumulate": 1 + i % 2, "checkpointing": i == 5, "tokens_per_second": 900 - i,
            "loss": {"value": 1.5 - 0.1 * i, "low": 1.4 - 0.1 * i, "high": 1.6 - 0.1 * i}, "steps": 3, "curve": [2.0, 1.8, 1.5],
            "forgetting": {"value": 0.01 * i, "low": 0.0, "high": 0.02 * i + 0.01}}


# ------------------------------------------------------------------------------------------------ memory

@pytest.mark.parametrize("method, most", [("lora", 0.01), ("qlora", 0.01), ("full", 0.01), ("prompt", 0.06)])
def test_what_is_planned_is_what_is_counted(method, most):
    """The formula against every tensor of a real step of the bundled model; with accumulation as well."""
    from pefttools.lab import load_base
    from pefttools.lab.capstone_memory import counted
    from pefttools.lab.finetune import run_method

    base = load_base("tiny", quiet=True, device="cpu")
    scale = replace(capstone.SMALL, examples=4)
    rows = [dict(row) for row in python_codes.load_rows("held_out")[:12]]
    worst = capstone.longest(rows, base.tokenizer, scale)
    predict = capstone.predictor(base.model, len(worst[0]["input_ids"]), scale, CPU)
    targets = "all-linear" if "lora" in method else None
    planned = {batch: predict(method, batch, False) for batch in (4, 2)}
    result = run_method(method, base=base, data=rows, steps=1, batch=2, r=scale.r, targets=targets, length=scale.length, width=scale.width, quiet=True)
    for batch, bytes_planned in planned.items():
        real = counted(result.model, worst[:batch], base.tokenizer.pad_token_id, accumulate=4 // batch)
        assert abs(bytes_planned / real - 1) < most, (method, batch, bytes_planned / real - 1)


def test_counting_changes_no_weight():
    from pefttools.lab import load_base
    from pefttools.lab.capstone_memory import counted

    base = load_base("tiny", quiet=True, device="cpu")
    base.model.model.layers.requires_grad_(False)
    base.model.model.embed_tokens.requires_grad_(False)
    base.model.model.layers[0].self_attn.v_proj.requires_grad_(True)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    ids = [{"input_ids": list(range(5, 155)), "labels": list(range(5, 155))}] * 2
    plain, again = (counted(base.model, ids, 0, checkpointing=on) for on in (False, True))
    assert again < plain and not base.model.training and not base.model.is_gradient_checkpointing
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in base.model.named_parameters())


def test_on_a_t4_full_fine_tuning_does_not_fit_and_qlora_does():
    plan = plan_it(capstone.METHODS, capstone.LARGE.examples, capstone.room_of(T4, 0),
                   capstone.predictor("llama-3.2-1b", capstone.LARGE.max_length, capstone.LARGE, T4))
    assert plan["full"] is None and plan["qlora"]["batch"] >= 2 and not plan["qlora"]["checkpointing"]
    assert 13 * 2**30 < capstone.room_of(T4, 0) < T4.memory and capstone.room_of(CPU, 7) == 7
    job = capstone.job_for("llama-3.2-1b", "qlora", 4, False, 512, capstone.LARGE, T4)
    assert (job.gpu, job.dtype, job.accumulate, job.keep_outputs) == ("t4", "float16", 4, False)


def test_the_pencil_of_the_chapter():
    """The table by hand, against the formula's terms."""
    from pefttools.vram import estimate

    memory = estimate("llama-3.2-1b", "qlora", 4, 512, r=8, targets="all-linear", dtype="float16", gpu="t4", keep_outputs=False)
    assert memory.trainable == 5_636_096 and "5,636,096" in SOURCE
    weights = memory.terms["weights"] + memory.terms["constants"]
    assert 0.50e9 + 0.53e9 == pytest.approx(weights, rel=0.01) and memory.terms["logits"] == pytest.approx(3.15e9, rel=0.01)
    assert 6e9 < memory.terms["activations"] + memory.terms["temporary"] or 6e9 < memory.terms["activations"] < 7e9, memory.terms


# ------------------------------------------------------------------------------------------------ the table

@pytest.fixture
def task(tmp_path):
    from pefttools.lab import base_texts, load_base

    scale = replace(capstone.SMALL, steps=1, examples=2, look=2, texts=1)
    rows = [dict(row) for row in python_codes.load_rows("held_out")[:10]]
    return capstone.Task(lambda: load_base("tiny", quiet=True, device="cpu"), rows, rows[:2], base_texts(1), scale, tmp_path)


def plan_for(*methods):
    return {method: {"batch": 1, "accumulate": 2, "checkpointing": False, "bytes": 10**8} for method in methods}


def test_a_stopped_table_goes_on_and_other_settings_run_anew(task, monkeypatch):
    ran = []

    def once(task, method, choice, before=None):
        ran.append(method)
        if method == "prefix" and ran.count("prefix") == 1:
            raise KeyboardInterrupt
        return row_like(method, 1)

    monkeypatch.setattr(capstone, "run_one", once)
    silent = lambda text: None  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        capstone.run_all(task, plan_for("qlora", "prefix"), silent)
    assert [row["method"] for row in capstone.run_all(task, plan_for("qlora", "prefix"), silent)] == ["qlora", "prefix"]
    assert ran == ["qlora", "prefix", "prefix"], "what was done is not done again"
    other = {**plan_for("qlora", "prefix"), "qlora": {"batch": 2, "accumulate": 1, "checkpointing": False, "bytes": 10**8}}
    capstone.run_all(task, other, silent)
    assert ran[3:] == ["qlora"]


def test_what_does_not_fit_and_what_ran_out_are_rows(task, monkeypatch):
    from pefttools.lab.finetune import OutOfMemory

    def none(task, method, choice, before=None):
        raise OutOfMemory("memory ran out\nadvice")

    monkeypatch.setattr(capstone, "run_one", none)
    rows = capstone.run_all(task, {**plan_for("lora"), "full": None}, lambda text: None)
    assert [row["missing"] for row in rows] == ["out of memory: memory ran out", "does not fit, by the plan"]
    assert "full: does not fit" in capstone.markdown(rows) and list(capstone.points(rows)) == [] and pictures.ran(rows) == []


def test_a_damaged_table_is_begun_anew(task, tmp_path):
    (tmp_path / "table.json").write_text('{"qlora": {')
    assert capstone.read_table(tmp_path / "table.json") == {}


def test_one_real_row(task):
    row = capstone.run_one(task, "ia3", plan_for("ia3")["ia3"])
    json.dumps(row)
    assert row["trainable"] == 5760 and row["measured"] > 2e7 and row["tokens_per_second"] > 0 and len(row["curve"]) == 1
    assert row["loss"]["low"] <= row["loss"]["value"] <= row["loss"]["high"] and math.isfinite(row["forgetting"]["value"])
    assert (task.folder / "ia3" / "adapter_model.safetensors").is_file()


def test_steps_want_a_power_of_two(task):
    with pytest.raises(ValueError, match="power of two"):
        replace(task, scale=replace(task.scale, examples=6))


def test_a_stub_is_replaced_and_an_error_is_not(capsys):
    def stub(x):
        raise NotImplementedError("plan-it: not written yet")

    assert capstone.attempt(stub, 3, otherwise=lambda x: 2 * x) == 6 and "plan-it: not written yet" in capsys.readouterr().out
    assert capstone.attempt(stub, 3) is None and capstone.attempt(lambda x: x, 3) == 3
    with pytest.raises(ZeroDivisionError):
        capstone.attempt(lambda x: x / 0, 3, otherwise=1)


# ------------------------------------------------------------------------------------------------ pictures

def test_the_explorer_shows_what_it_says():
    rows = [row_like(name, i) for i, name in enumerate(capstone.METHODS)] + [{"method": "dora", "missing": "does not fit"}]
    explorer = pictures.pareto_explorer(rows, "tiny")
    frame = explorer.frame(across="trainable parameters", upwards="forgetting")
    assert "trainable parameters" in frame["text/html"] and "Beaten by nobody" in frame["text/html"] and len(frame["image/png"]) > 5_000
    assert explorer.start == {"across": "memory", "upwards": "loss"}
    figure = pictures.pareto_figure(rows, "tokens per second", "loss")
    assert "more is better" in figure.axes[0].get_xlabel() and {text.get_text() for text in figure.axes[0].texts} == set(capstone.METHODS)
    with pytest.raises(ValueError, match="axis 'price' is not known"):
        pictures.pareto_figure(rows, "price")


def test_speed_is_better_when_it_is_more():
    rows = [{**row_like("a", 1), "tokens_per_second": 100}, {**row_like("b", 1), "tokens_per_second": 200}]
    assert pictures.on_front(rows, "tokens per second", "loss") == ["b"] and pictures.on_front(rows, "memory", "loss") == ["a", "b"]


def test_figures_draw(tmp_path):
    rows = [row_like(name, i) for i, name in enumerate(capstone.METHODS)]
    for number, figure in enumerate([pictures.planned_figure(rows, 190 * 2**20, "tiny"), pictures.curves_figure(rows), pictures.pareto_figure(rows[:1])]):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000
    assert "qlora 150 and 151" in pictures.planned_alt(rows)


# ------------------------------------------------------------------------------------------------ the script for a GPU

def test_the_gpu_script_says_that_there_is_no_gpu(capsys, tmp_path):
    from pefttools.bench import capstone as script

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert script.main(["--to", str(tmp_path / "page.md")]) == 0
    assert "There is no GPU" in capsys.readouterr().out and not (tmp_path / "page.md").exists()


def test_the_gpu_script_runs_its_step_on_a_cpu_and_writes_its_page():
    from pefttools.bench import capstone as script
    from pefttools.vram.presets import config_of

    scale = replace(capstone.LARGE, examples=2, max_length=24)
    config = config_of("tiny")
    rows = [script.run_one(method, {"batch": 1, "accumulate": 2, "checkpointing": method == "lora", "bytes": 2**28}, 1, "cpu", config, scale)
            for method in ("qlora", "lora")]
    assert all(row["tokens_per_second"] > 0 and row["trainable"] for row in rows)
    page = script.page([{**row, "measured": 2**28, "reserved": 2**28} for row in rows] + [{"method": "full", "missing": "out of memory"}], "Some GPU")
    assert "Device: **Some GPU**" in page and "| full | | | | | out of memory |" in page and "+0.0%" in page
    assert script.fraction(80 * 2**30) == pytest.approx(capstone.room_of(T4, 0) / (80 * 2**30), rel=1e-6) and script.fraction(2**30) == 1.0
    drawn = script.rows_like(5, 4096, 100)
    assert len(drawn[0]["input_ids"]) == 100 and all(60 <= len(row["input_ids"]) <= 100 for row in drawn)
    assert drawn == script.rows_like(5, 4096, 100) and all(row["labels"][0] == -100 for row in drawn)


# ------------------------------------------------------------------------------------------------ figures of the prose

def test_what_the_prose_says():
    assert "about 2.5" in SOURCE and f"at most {chapter.BOUND} nats" in SOURCE
    assert python_codes.REVISION[:8] in chapter.QUESTIONS[2].text and re.fullmatch(r"[0-9a-f]{40}", python_codes.REVISION)
    from pefttools.lab.base import LLAMA_1B, REVISIONS

    assert set(REVISIONS) == set(LLAMA_1B) and all(re.fullmatch(r"[0-9a-f]{40}", each) for each in REVISIONS.values())


def solved_report():
    """The solution's `report`, run."""
    cell = SOURCE[SOURCE.index("\nreport = {"):SOURCE.index("### END SOLUTION", SOURCE.index("\nreport = {"))]
    room: dict = {}
    exec(cell, room)
    return room["report"]


def test_the_report_of_the_solution_is_about_a_run_of_this_chapter():
    """The sizes in its table are those of the methods on the bundled model, and every number of its text is in the table."""
    report = solved_report()
    table = chapter.table_of(report["table"])
    assert table["full"]["trainable"] == 5_475_584 and table["lora"]["trainable"] == table["qlora"]["trainable"] == 448_512
    assert table["prompt"]["trainable"] == capstone.SMALL.length * 256 and len(table) == 8
    assert verdict_on(BY_NAME["report-it"], report, 11).passed
    known = [*re.findall(r"\d+(?:\.\d+)?", report["table"].replace(",", "")), str(table["full"]["trainable"] / 1e6)]
    for number in re.findall(r"\d+\.\d+", report["text"]):
        digits = len(number.partition(".")[2])
        assert any(f"{float(each):.{digits}f}" == number for each in known), number
