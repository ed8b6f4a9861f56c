"""Chapter 08: its exercises against the library, torch and PEFT, what was run ahead, its pictures."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import ch08_flavours as chapter
from pefttools.lab import flavours as sweep
from pefttools.subspace import subspace_table
from pefttools.widgets import flavours as pictures

SOURCE = (Path(__file__).parents[2] / "solutions" / "08_flavours.py").read_text(encoding="utf-8")
BY_NAME = {exercise.name: exercise for exercise in chapter.EXERCISES}


def test_exercises_and_questions_have_what_the_standard_asks():
    assert {"dora-column-norm", "rslora-scale", "loraplus-groups", "subspace-similarity", "pick-layers",
            "rank-budget-by-svd"} <= set(BY_NAME)
    for exercise in chapter.EXERCISES:
        assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert chapter.EXERCISES[0].minutes <= 5 and chapter.EXERCISES[0].difficulty == 1
    assert 4 <= len(chapter.QUESTIONS) <= 6
    assert len({question.right for question in chapter.QUESTIONS}) >= 3, "the right letter must not be guessable"


KNOWN = {  # what is got wrong most often; a check that lets one of these through is no check
    "rslora-scale": {"always α/r", "√(α/r)", "α·√r"},
    "dora-column-norm": {"the wrong axis", "the norm of W0", "only the update", "m along the columns", "gradient through the norm"},
    "loraplus-groups": {"A learns faster", "frozen ones too", "any B", "only A and B", "B twice"},
    "pick-layers": {"the bottom layers", "numbers as texts", "part of a name", "the expert's number"},
    "paired-difference": {"not paired", "spread of one run", "n for n − 1"},
    "subspace-similarity": {"left vectors", "columns of Vh", "no order", "divided by max", "not squared"},
    "rank-budget-by-svd": {"the same for all", "by norm", "relative to its layer"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_common_mistakes_are_known(name):
    assert KNOWN[name] <= set(BY_NAME[name].mistakes)


@pytest.mark.parametrize("seed", range(5))
def test_no_case_hides_a_mistake(seed):
    """Numbers that are easily taken for one another differ in some case, on any seed."""
    shapes = [c["W0"].shape for c in BY_NAME["dora-column-norm"].cases(seed)]
    assert any(a == b for a, b in shapes) and any(a != b for a, b in shapes), "square ones hide the axis, the others raise"
    assert all(c["B"].abs().max() > 0 and c["alpha"] != len(c["A"]) for c in BY_NAME["dora-column-norm"].cases(seed))
    picks = BY_NAME["pick-layers"].cases(seed)
    assert any(max(chapter.layer_of(n) or 0 for n in c["names"]) >= 10 for c in picks) and any(c["top"] is None for c in picks)
    phi = BY_NAME["subspace-similarity"].cases(seed)
    assert any(c["i"] < c["j"] for c in phi) and any(c["i"] > c["j"] for c in phi)
    assert any(0 in chapter.make_budget()(**c) for c in BY_NAME["rank-budget-by-svd"].cases(seed))


# ------------------------------------------------------------------------------------------------ the library as student

def test_the_teaching_codes_wrong_axis_fails_with_its_message():
    def wrong(W0, A, B, m, alpha):
        V = W0 + alpha / len(A) * B @ A
        return m[:, None] * V / V.detach().norm(p=2, dim=0, keepdim=True)
    verdict = verdict_on(BY_NAME["dora-column-norm"], wrong, 3)
    assert not verdict.passed and verdict.mistake == "the wrong axis"


def test_pefts_dora_passes_as_the_students():
    peft = pytest.importorskip("peft")

    def with_peft(W0, A, B, m, alpha):
        holder = nn.Sequential(nn.Linear(W0.shape[1], W0.shape[0], bias=False))
        holder[0].weight.data = W0.detach().clone()
        # r is capped by no one in peft, so every case fits
        made = peft.get_peft_model(holder, peft.LoraConfig(r=len(A), lora_alpha=alpha, target_modules=["0"], use_dora=True))
        layer = made.base_model.model[0]
        for module, value in ((layer.lora_A["default"], A), (layer.lora_B["default"], B), (layer.lora_magnitude_vector["default"], m)):
            del module.weight
            module.weight = value                            # the graph leads back to what was given
        return layer(torch.eye(W0.shape[1])).T
    for case in BY_NAME["dora-column-norm"].cases(7):
        given = {name: case[name].clone().requires_grad_(name != "W0") for name in ("W0", "A", "B", "m")}
        ours = chapter.make_dora()(*given.values(), case["alpha"])
        theirs = with_peft(*given.values(), case["alpha"])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        seeds = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
        wanted = [given[name] for name in ("A", "B", "m")]
        for a, b in zip(torch.autograd.grad((ours * seeds).sum(), wanted), torch.autograd.grad((theirs * seeds).sum(), wanted)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ figures of the prose

def test_worked_examples_by_hand():
    W0, A, B = torch.tensor([[3., 4.]]), torch.tensor([[1., 4.]]), torch.tensor([[2.]])
    weight = chapter.make_dora()(W0, A, B, torch.tensor([5.]), 1)
    torch.testing.assert_close(weight.sum(), torch.tensor(85 / 13)) and "85/13 \\approx 6.54" in SOURCE
    mean, error = chapter.make_pairs()([2.0, 2.4, 2.2], [1.9, 2.2, 2.1])
    assert mean == pytest.approx(-0.1333, abs=1e-4) and error == pytest.approx(0.0333, abs=1e-4)
    a, b = torch.tensor([[1., 0, 0]]), torch.tensor([[math.cos(math.pi / 6), 0.5, 0]])
    assert chapter.make_phi()(a, b, 1, 1) == pytest.approx(0.75)
    assert chapter.make_budget()([torch.diag(torch.tensor([5., 1.])), torch.diag(torch.tensor([3., 2.]))], 3) == [1, 2]
    assert [chapter.make_scale()(r, 16, rs) for r in (4, 64) for rs in (False, True)] == [4, 8, 0.25, 2]


def test_students_t_of_two_and_four_degrees_of_freedom():
    """The 95 % points 4.30 and 2.78, from the two distributions' own formulas."""
    def within(t: float, df: int) -> float:
        if df == 2:
            return t / math.sqrt(2 + t * t)
        x = t / math.sqrt(4 + t * t)                           # df = 4: P(|T| < t) = (3x − x³)/2 with x = t/√(4 + t²)
        return (3 * x - x ** 3) / 2

    assert "T95 = {3: 4.30, 5: 2.78}" in SOURCE
    for seeds, t in ((3, 4.30), (5, 2.78)):
        assert within(t, seeds - 1) == pytest.approx(0.95, abs=1e-3)


def test_random_subspaces_share_what_chance_says():
    rng = torch.Generator().manual_seed(0)
    tables = torch.stack([subspace_table(torch.randn(8, 96, generator=rng), torch.randn(24, 96, generator=rng)) for _ in range(40)]).mean(0)
    for i, j in ((1, 24), (8, 24), (8, 8), (4, 2)):
        assert tables[i - 1, j - 1].item() == pytest.approx(pictures.chance(i, j, 96), abs=0.03)


@pytest.mark.parametrize("optimizer, scale, grows", [("sgd", "1/√r", False), ("sgd", "1/r", True), ("adam", "1/r", False), ("adam", "1/√r", True)])
def test_the_first_step_of_sgd_and_adam(optimizer, scale, grows):
    """The algebra of part 1 on one layer: which scale keeps the first step equally large."""
    sizes = []
    for r in (4, 256):
        rng = torch.Generator().manual_seed(1)
        x, delta, A = torch.randn(512, generator=rng), torch.randn(32, generator=rng), torch.randn(r, 512, generator=rng) / 512 ** 0.5
        s = r ** (-0.5 if "√" in scale else -1.0)
        gradient = s * torch.outer(delta, A @ x)
        step = gradient if optimizer == "sgd" else gradient.sign()
        sizes.append((s * step @ A @ x).norm().item())
    ratio = sizes[1] / sizes[0]
    assert not 0.3 < ratio < 3 if grows else 0.3 < ratio < 3


def test_the_lines_in_pefts_source_are_where_the_chapter_looks_for_them():
    dora = pytest.importorskip("peft.tuners.lora.dora")
    import inspect

    import peft.tuners.adalora.layer as adalora
    import peft.tuners.lora.layer as lora
    every = "".join(inspect.getsource(module) for module in (dora, adalora, lora))
    marks = re.search(r"MARKS = \{(.*?)\}\nfor", SOURCE, re.S)[1]
    for mark in re.findall(r'"([^"]+)"', marks):
        assert mark in every, f"the chapter looks for {mark!r}"
    for quoted in ("# calculate L2 norm of weight matrix, column-wise", "transpose(weight, self.fan_in_fan_out)", "mag_norm_scale - 1"):
        assert quoted in inspect.getsource(dora) and f"`{quoted}`" in SOURCE


# ------------------------------------------------------------------------------------------------ what was run ahead

def test_results_are_there_for_every_cell_and_small():
    found = sweep.results()
    for experiment, row, column, _ in sweep.plan():
        runs = found[experiment][row][column]
        more = experiment == "rate" and column == sweep.best(found["rate"][row])[0]
        assert set(runs) == {str(seed) for seed in sweep.SEEDS + (sweep.MORE_SEEDS if more else ())}, (experiment, row, column)
        length = next(options.get("steps", sweep.STEPS) for *key, options in sweep.plan() if key == [experiment, row, column])
        assert all(run["steps"] == length for run in runs.values()), "trained for other numbers of steps than the text says"
    assert sum(len(columns) for rows in found.values() for columns in rows.values()) == len(sweep.plan())
    assert len(sweep.SEEDS) >= 3 and sweep.RESULTS.stat().st_size < 60_000


def test_what_the_prose_says_of_the_results():
    """Sentences of part 4 that no cell prints as such, held to the file."""
    assert (sweep.STEPS, len(sweep.SEEDS), len(sweep.MORE_SEEDS)) == (100, 3, 2)
    said = " ".join(SOURCE.replace("\n# ", " ").split())
    assert "five learning rates, three seeds each, for a hundred steps" in said and "two more seeds at its best" in said
    assert {len(rates) for rates in sweep.RATES.values()} == {5} and "best of three learning rates for each (three seeds)" in said
    assert {len(rates) for rates in sweep.BATCH_RATES.values()} == {3}
    found = sweep.results()["rate"]
    mean = {(name, lr): sweep.summary(found[name][lr])["mean"] for name in ("full", "LoRA") for lr in ("0.001", "0.01")}
    assert mean["full", "0.001"] < mean["LoRA", "0.001"] - 0.2, "at 0.001 full fine-tuning beats LoRA by far"
    assert mean["full", "0.01"] > mean["LoRA", "0.01"] + 0.2, "at 0.01 it loses by far"
    rates = {name: float(sweep.best(columns)[0]) for name, columns in found.items()}
    assert rates["full"] < rates["LoRA"] and rates["LoRA+"] < rates["LoRA"]
    for columns in found.values():                            # every curve falls and rises again
        means = [sweep.summary(runs)["mean"] for runs in columns.values()]
        assert min(means) < means[0] and min(means) < means[-1]
    for name, columns in found.items():                       # "each has its best inside what was tried"
        assert min(sweep.RATES[name]) < float(sweep.best(columns)[0]) < max(sweep.RATES[name])


def test_the_learning_rate_is_chosen_on_other_rows_than_those_reported():
    made = {"0.1": {"0": {"choose": 1.0, "end": 9.0}, "1": {"choose": 1.2, "end": 7.0}}, "0.2": {"0": {"choose": 2.0, "end": 0.1}},
            "0.3": {"0": {"choose": None, "end": None}}}
    name, cell = sweep.best(made)
    assert name == "0.1" and cell["mean"] == 8.0 and cell["ends"] == [9.0, 7.0]
    assert cell["sd"] == pytest.approx(statistics.stdev([9.0, 7.0])) and sweep.summary(made["0.3"]) is None


def test_one_small_run_and_the_model_is_as_it_was():
    from pefttools.lab import encoded, load_base, load_data

    base = load_base("tiny")
    rows = encoded(load_data("train").select(range(16)), base.tokenizer)
    before = {name: (p.clone(), p.requires_grad) for name, p in base.model.named_parameters()}
    ends = {}
    for name in sweep.METHODS:
        run = sweep.run(base, rows, None, rows[:4], name, 1e-3, 0, steps=2, batch=4)
        assert math.isfinite(run["end"]) and run["choose"] is None
        ends[name] = run["end"]
    assert len(set(ends.values())) == 4, "four methods, four results"
    for name, p in base.model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1]


# ------------------------------------------------------------------------------------------------ pictures

def test_the_explorer_shows_what_it_says(capsys):
    rng = torch.Generator().manual_seed(3)
    A, B = torch.randn(8, 40, generator=rng), torch.randn(20, 40, generator=rng)
    tables = {"one": {"q": subspace_table(A, B), "v": subspace_table(A, A)}, "two": {"q": subspace_table(B, B), "v": subspace_table(B, A)}}
    explorer = pictures.phi_explorer(tables, 40)
    frame = explorer.frame(compare="one", matrix="v")
    assert "φ(8, 8) is 1.00" in frame["text/html"] and "chance gives 0.025, 0.20 and 0.20" in frame["text/html"]
    assert len(frame["image/png"]) > 5_000
    figure = pictures.phi_figure(tables["one"]["q"], 40)
    shown = torch.as_tensor(figure.axes[0].images[0].get_array())
    torch.testing.assert_close(shown.float(), tables["one"]["q"].float())


def test_figures_draw(tmp_path):
    curves = {"a": {0.1: [1.0, 1.1], 0.2: [5.0]}, "b": {0.1: [0.9, 1.0], 0.2: [0.8, 0.9]}}
    figures = [pictures.dora_picture(), pictures.curves_figure(curves, top=2.0, base=1.5, chosen={"a": 0.1}), pictures.dots_figure({"a": [1.0, 1.2], "b": [0.9]}),
               pictures.budget_figure({"q": [0, 3], "v": [2, 1]})]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000
