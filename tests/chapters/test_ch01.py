"""Chapter 01: its exercises against the library, numpy and PEFT, the figures of its prose, its pictures."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pefttools import rank
from pefttools.elimination import row_echelon
from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import ch01_rank as chapter
from pefttools.intrinsic import d90
from pefttools.lab import intrinsic_dimension
from pefttools.widgets import rank as pictures

SOURCE = (Path(__file__).parents[2] / "solutions" / "01_rank.py").read_text(encoding="utf-8")
BY_NAME = {exercise.name: exercise for exercise in chapter.EXERCISES}
SLIDE = [[1, 2, 3], [2, 4, 6], [1, 1, 1]]


def test_exercises_and_questions_have_what_the_standard_asks():
    assert set(BY_NAME) == {"row-operation", "row-echelon", "matrix-rank", "low-rank-approx", "rank-budget",
                            "effective-rank", "intrinsic-dimension", "d90"}
    for exercise in chapter.EXERCISES:
        assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert chapter.EXERCISES[0].minutes <= 5 and chapter.EXERCISES[0].difficulty == 1
    assert 4 <= len(chapter.QUESTIONS) <= 6
    assert len({question.right for question in chapter.QUESTIONS}) >= 3, "the right letter must not be guessable"


# ------------------------------------------------------------------------------------------------ exercises

@pytest.mark.parametrize("name", ["row-operation", "row-echelon", "matrix-rank", "effective-rank", "rank-budget", "d90"])
def test_cases_tell_the_mistakes_apart_on_many_seeds(name):
    exercise = BY_NAME[name]
    for seed in range(12):
        for mistake, (work, _) in exercise.mistakes.items():
            verdict = verdict_on(exercise, work, seed)
            assert not verdict.passed and verdict.mistake == mistake, f"seed {seed}: {mistake} taken for {verdict.mistake}"


def test_alternatives_pass_on_many_seeds():
    for name in ("row-echelon", "matrix-rank", "low-rank-approx", "effective-rank", "rank-budget", "d90"):
        for seed in range(12):
            for alternative, work in BY_NAME[name].alternatives.items():
                verdict = verdict_on(BY_NAME[name], work, seed)
                assert verdict.passed, f"{name}, {alternative}, seed {seed}: {verdict.text}"


@given(st.lists(st.lists(st.integers(-4, 4), min_size=3, max_size=3), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_ways_to_eliminate_agree(A):
    """The reduced form is unique: four implementations and the library find the same, and its rank is numpy's."""
    exact = chapter.fractions(A)
    wanted = [list(row) for row in row_echelon(exact, reduced=True).matrix]
    for work in (chapter.make_echelon(), chapter.echelon_back, chapter.echelon_basis, chapter.echelon_recursive):
        assert work(exact) == wanted
    assert sum(any(row) for row in wanted) == int(torch.linalg.matrix_rank(torch.tensor(A, dtype=torch.float64)))


def test_a_float_is_told_of_in_words():
    floats = verdict_on(BY_NAME["row-operation"], chapter.operation_floats, 4)
    assert "a float, not exact" in floats.text


def test_pefts_own_decomposition_passes_as_the_students():
    loftq = pytest.importorskip("peft.utils.loftq_utils")

    def low_rank(W, k):
        found = loftq._low_rank_decomposition(W, k)
        return found["L"], found["R"]

    verdict = verdict_on(BY_NAME["low-rank-approx"], low_rank, 4)
    assert verdict.passed, verdict.text


def test_the_librarys_subspace_passes_as_the_students():
    """pefttools.intrinsic puts the same P v into a module's parameter: its gradient of v is Pᵀ∇θ."""
    from torch import nn

    from pefttools.inject import attach
    from pefttools.intrinsic import IntrinsicConfig

    model = nn.Linear(1, 30, bias=False)
    theta0 = model.weight.detach().clone().flatten()
    attach(model, IntrinsicConfig(d=7, projection="dense", seed=2))
    basis = torch.eye(7)
    columns = []
    for direction in basis:
        with torch.no_grad():
            model.intrinsic.vector.copy_(direction)
        columns.append(model.weight.detach().flatten() - theta0)
    P, goal = torch.stack(columns, 1), torch.linspace(-1, 1, 30)
    with torch.no_grad():
        model.intrinsic.vector.zero_()
    optimizer = torch.optim.SGD([model.intrinsic.vector], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (model.weight.flatten() - goal).square().sum().backward()
        optimizer.step()
    v = chapter.subspace_sgd(lambda theta: (theta - goal).square().sum(), theta0, P, 5, 0.1)
    assert torch.allclose(v, model.intrinsic.vector.detach(), atol=1e-5)


# ------------------------------------------------------------------------------------------------ figures of the prose

def test_elimination_by_hand():
    found = row_echelon(SLIDE, reduced=True)
    assert found.rank == 2 and [step.operation for step in found.steps[1:4]] == ["R2 ← R2 − 2·R1", "R3 ← R3 − R1", "R2 ↔ R3"]
    assert sorted(map(list, found.matrix)) == sorted([[1, 0, -1], [0, 0, 0], [0, 1, 2]])          # 000's last matrix
    assert found.steps[2].matrix[2] == (0, -1, -2) and "(0,-1,-2)" in SOURCE


def test_numbers_of_the_512_by_1024_matrix():
    assert (512 * 1024, 512 * 50, 50 * 1024, 512 * 50 + 50 * 1024) == (524_288, 25_600, 51_200, 76_800)
    for printed in ("524{,}288", "25{,}600", "51{,}200", "76{,}800", "14.6 %", "(50, 447_488)"):
        assert printed in SOURCE
    assert 76_800 / 524_288 == pytest.approx(0.146, abs=5e-4)
    assert chapter.budget_with()(512, 1024, 76_800) == (50, 447_488)


def test_worked_spectrum():
    """The diagonal 4, 2, 1, 1: rank 4, √2 from rank 2, effective rank 2^(7/4) = 3.36."""
    A = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))
    B, C = rank.low_rank(A, 2)
    assert (A - B @ C).norm().item() == pytest.approx(math.sqrt(2))
    assert rank.effective_rank(A) == pytest.approx(2 ** 1.75) and round(2 ** 1.75, 2) == 3.36
    assert "2^{7/4} = 3.36" in SOURCE


def test_answers_of_the_questions():
    assert math.hypot(4, 3) == 5                                                     # rank-q-eckart
    rng = torch.Generator().manual_seed(0)                                           # rank-q-tolerance
    product = torch.randn(512, 16, generator=rng) @ torch.randn(16, 512, generator=rng)
    S = torch.linalg.svdvals(product)
    assert (S > 0).all() and rank.matrix_rank(product) == 16
    assert 512 * torch.finfo(torch.float32).eps == pytest.approx(6e-5, rel=0.05)     # "6e-5 of it"
    assert S[16] / S[0] < 1e-6                                                       # "some 1e-7 of the largest or less"


@pytest.mark.parametrize("seed", range(5))
def test_erratum_26_a_deficient_weight_gets_full_rank_gradients(seed):
    """000 says that updates to redundant outputs do not help to learn. One example: rank 1. A batch: as the sizes allow."""
    rng = torch.Generator().manual_seed(seed)
    W = (torch.randn(100, 10, generator=rng) @ torch.randn(10, 64, generator=rng)).requires_grad_()
    target, x = torch.randn(100, 64, generator=rng), torch.randn(256, 64, generator=rng)
    for size, expected in ((1, 1), (30, 30), (256, 64)):
        gradient, = torch.autograd.grad((x[:size] @ (W - target).T).square().sum(), W)
        assert rank.matrix_rank(gradient) == expected
    assert rank.matrix_rank((W - 1e-3 * gradient).detach()) == 64
    delta = 2 * x @ (W - target).T
    assert rank.matrix_rank(delta.detach()) == 64 and rank.matrix_rank((delta @ W).detach()) == 10     # what is sent down


def test_one_random_direction_changes_a_matrix_at_full_rank():
    from pefttools.intrinsic import hashed_rows, hashed_update

    row, = hashed_rows([256 * 256], 1, 0)
    assert rank.matrix_rank(hashed_update(torch.ones(1), row, 256 * 256).reshape(256, 256)) == 256


def test_a_known_intrinsic_dimension():
    """Li et al. 2018, section 2: ten demands on 1000 parameters are met in 10 random dimensions and not in 9."""
    demands = torch.block_diag(*[torch.ones(1, 100, dtype=torch.float64)] * 10)
    wanted = torch.arange(1.0, 11.0, dtype=torch.float64)
    P = torch.linalg.qr(torch.randn(1000, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q

    def loss(d):
        v = torch.linalg.lstsq(demands @ P[:, :d], wanted).solution
        return (demands @ P[:, :d] @ v - wanted).square().mean().item()

    assert loss(9) > 1e-3 and loss(10) < 1e-18


def test_pefts_source_is_as_the_chapter_explains_it():
    layer = pytest.importorskip("peft.tuners.lora.layer")
    import inspect

    import numpy

    found = inspect.getsource(layer.LoraLayer.pissa_init)
    table = SOURCE.split("| the code asks | because |")[1].split("**Go and look**")[0]
    for quoted in re.findall(r"^# \| `(.+?)` \|", table, re.MULTILINE):
        assert quoted in found, f"the chapter explains {quoted!r}, which PEFT's pissa_init does not have"
    for marked in ("torch.linalg.svd(", "Sr /=", "lora_A = torch.diag", "lora_B = Vr"):
        assert marked in found
    assert "max(A.shape[-2:]) * finfo(S.dtype).eps" in inspect.getsource(numpy.linalg.matrix_rank)


# ------------------------------------------------------------------------------------------------ the run ahead

def test_the_results_that_were_run_ahead_are_whole():
    results = intrinsic_dimension.read()
    assert results["steps"] == intrinsic_dimension.STEPS and results["D"] == 5_475_584
    runs = {(run.get("name", run["d"]), run["seed"]) for run in results["runs"]}
    assert runs == {(d, seed) for d in (*intrinsic_dimension.DIMENSIONS, *intrinsic_dimension.LORA)
                    for seed in intrinsic_dimension.SEEDS}
    for run in results["runs"]:
        assert 0 < run["loss"] < results["before"]
        if run["d"] and "name" not in run:
            assert run["lr"] == pytest.approx(intrinsic_dimension.learning_rate(run["d"], results["D"]), rel=1e-3)


def test_more_dimensions_reach_further_and_d90_is_read_off_rightly():
    results = intrinsic_dimension.read()
    shares = pictures.learned(results)
    means = [sum(s) / len(s) for d, s in shares.items() if d]
    assert means == sorted(means)
    pairs = [(run["d"], run["loss"]) for run in results["runs"] if run["d"] and "name" not in run]
    full = sum(run["loss"] for run in results["runs"] if run["d"] == 0) / len(intrinsic_dimension.SEEDS)
    found = d90(pairs, full, results["before"])
    by_share = min((d for d, s in shares.items() if d and sum(s) / len(s) >= 0.9), default=None)
    assert found == by_share == chapter.d90_sorted(pairs, results["before"], full)


def test_loras_points_are_not_above_the_curve():
    """The chapter says so: per number its directions are no better here than random ones."""
    results = intrinsic_dimension.read()
    means = {d: sum(s) / len(s) for d, s in pictures.learned(results).items() if d}
    full = sum(run["loss"] for run in results["runs"] if run["d"] == 0) / len(intrinsic_dimension.SEEDS)
    for name in intrinsic_dimension.LORA:
        found = [run for run in results["runs"] if run.get("name") == name]
        share = sum((results["before"] - run["loss"]) / (results["before"] - full) for run in found) / len(found)
        below, above = max(d for d in means if d <= found[0]["d"]), min(d for d in means if d >= found[0]["d"])
        way = math.log(found[0]["d"] / below) / math.log(above / below)
        assert share < means[below] + way * (means[above] - means[below]) + 0.01


def test_the_factor_taken_is_the_best_that_was_tried():
    results = intrinsic_dimension.read()
    for d in {run["d"] for run in results["tuned"]}:
        tried = {run["factor"]: run["loss"] for run in results["tuned"] if run["d"] == d}
        assert min(tried, key=tried.get) == (results["factor"] if d else 1) and len(tried) > 1


def test_learning_rate_moves_each_parameter_alike():
    D = 1_000_000
    steps = {d: intrinsic_dimension.learning_rate(d, D) * (d / D) ** 0.5 for d in (100, 10_000, D)}
    assert len({round(v, 12) for v in steps.values()}) == 1
    assert intrinsic_dimension.learning_rate(0, D) == intrinsic_dimension.FULL_LR


def test_a_stopped_run_ahead_keeps_what_it_has(tmp_path):
    file = tmp_path / "kept.json"
    run = {"d": 300, "seed": 1, "lr": 0.123456, "before": 2.5, "loss": 1.234567, "D": 1000}
    intrinsic_dimension.keep(file, [run, run | {"d": 5, "name": "LoRA r=1 on q, v"}, run | {"seed": 0}],
                             [{"d": 300, "factor": 3.0, "loss": 1.5}])
    kept = intrinsic_dimension.read(file)
    assert [r["seed"] for r in kept["runs"]] == [0, 1, 1] and kept["runs"][-1]["name"] == "LoRA r=1 on q, v"
    assert kept["before"] == 2.5 and kept["tuned"] == [{"d": 300, "factor": 3.0, "loss": 1.5}] and not list(tmp_path.glob("*.part"))


# ------------------------------------------------------------------------------------------------ pictures

def test_stepper_shows_every_operation_exactly(capsys):
    for name, A in pictures.MATRICES.items():
        found = row_echelon(A, reduced=True)
        for number, step in enumerate(found.steps):
            figure = pictures.elimination_figure(A, number)
            written = [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]
            if number:
                assert step.operation in written
            cells = [str(x).replace("-", "−") for row in step.matrix for x in row]
            assert all(cell in written for cell in cells), f"{name}, step {number}"
        assert f"the rank is {found.rank}" in pictures.elimination_alt(A, 99)
    assert any(isinstance(x, Fraction) and x.denominator > 1 for A in pictures.MATRICES.values()
               for step in row_echelon(A, reduced=True).steps for row in step.matrix for x in row), "one with fractions"
    stepper = pictures.elimination_stepper()
    frame = stepper.frame(matrix="fractions", step=2)
    assert "Step 2 of" in frame["text/html"] and len(frame["image/png"]) > 5_000
    assert "Step 1 of" in stepper.frame()["text/html"], "the static first frame shows an operation"


def test_rows_of_an_operation():
    assert pictures._touched("R2 ← R2 − 3·R1") == ({1}, {0})
    assert pictures._touched("R1 ↔ R12") == ({0, 11}, set())
    assert pictures._touched("R3 ← R3 / 5") == ({2}, set())
    for A in pictures.MATRICES.values():
        steps = row_echelon(A, reduced=True).steps
        for before, after in zip(steps, steps[1:]):
            changed = {i for i, (x, y) in enumerate(zip(before.matrix, after.matrix)) if x != y}
            assert changed <= pictures._touched(after.operation)[0]


def test_svd_explorer_draws_and_says_what_is_true():
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    explorer = pictures.svd_explorer({"a picture": pictures.sample_image(), "W": W}, images=("a picture",))
    frame = explorer.frame(matrix="W", k=4)
    S = torch.linalg.svdvals(W)
    assert f"{(S[4:].norm() / S.norm()).item():.0%} away" in frame["text/html"] and "200 numbers" in frame["text/html"]
    assert explorer.frame(matrix="W", k=96)["image/png"], "a k beyond the smaller side is cut to it"
    B, A = rank.low_rank(W, 4)
    shown = pictures.svd_figure(W, 4).axes[1].images[0].get_array().data
    assert torch.allclose(torch.as_tensor(shown), B @ A, atol=1e-4)


def test_the_picture_is_a_picture():
    image = pictures.sample_image()
    assert image.shape == (96, 128) and image.min() >= 0 and image.max() <= 1
    B, A = rank.low_rank(image, 8)
    assert (image - B @ A).norm() / image.norm() < 0.06 and rank.matrix_rank(image) > 30


def test_figures_draw(tmp_path):
    shares = {0: [1.0, 1.01], 100: [0.4, 0.45], 1000: [0.9, 0.95]}
    figures = [draw() for draw in pictures.draw_all().values()]
    figures += [pictures.spectra_figure({"a": [3.0, 1.0, 0.0], "b": [2.0, 1.5, 1.2]}, {"a": 1e-5}),
                pictures.truncation_figure({"ΔW": [(1, 2.0), (8, 1.0)], "W": [(1, 8.0), (8, 7.0)]}, 2.5, 0.9),
                pictures.gradient_figure([10, 64, 64], {"free": [2.0, 1.0, 0.1], "factors": [2.0, 1.2, 1.0]}, 0.5),
                pictures.intrinsic_figure(shares, 1000, 5_000_000, {100: 0.3}, [(500, 0.6, "LoRA")]),
                pictures.intrinsic_figure(shares, None, 5_000_000)]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000


def test_share_of_the_way_and_its_error():
    results = {"before": 3.0, "runs": [{"d": 0, "loss": 1.0}, {"d": 0, "loss": 1.0}, {"d": 10, "loss": 2.0}, {"d": 10, "loss": 1.5},
                                       {"d": 7, "loss": 0.0, "name": "LoRA"}]}
    assert pictures.learned(results) == {0: [1.0, 1.0], 10: [0.5, 0.75]}
    assert pictures.standard_error([0.5, 0.75]) == pytest.approx(0.125) and pictures.standard_error([1.0]) == 0
