"""Chapter 02: its exercises against the library and PEFT, its figures of other people's papers, its pictures."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import ch02_lora as chapter
from pefttools.widgets import lora as pictures

SOURCE = (Path(__file__).parents[2] / "solutions" / "02_lora.py").read_text(encoding="utf-8")
BY_NAME = {exercise.name: exercise for exercise in chapter.EXERCISES}


def test_exercises_and_questions_have_what_the_standard_asks():
    assert set(BY_NAME) == {"lora-forward", "count-parameters", "lora-init", "lora-layer", "lora-merge", "lora-inject"}
    for exercise in chapter.EXERCISES:
        assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert chapter.EXERCISES[0].minutes <= 5 and chapter.EXERCISES[0].difficulty == 1
    assert 4 <= len(chapter.QUESTIONS) <= 6
    assert len({question.right for question in chapter.QUESTIONS}) >= 3, "the right letter must not be guessable"


KNOWN = {  # mistakes that other courses' checks let through
    "lora-forward": {"zeros", "no scale", "alpha times r", "one over r", "scale twice", "bias dropped",
                     "shapes do not meet"},
    "lora-init": {"both zero", "B random", "A zero, B random", "shapes turned"},
    "lora-layer": {"zeros", "no scale", "alpha times r", "scale twice", "B random", "dead", "weight trains",
                   "bias dropped", "dropout on the base", "plain tensors"},
    "lora-merge": {"merges twice", "no scale", "wrong orientation", "counted twice", "weight trains"},
    "lora-inject": {"base not frozen", "adapters frozen too", "setattr with dots", "endswith without the dot"},
    "count-parameters": {"the frozen matrix", "product", "twice d_in", "A alone", "B alone"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_mistakes_that_other_courses_let_through_are_known(name):
    assert KNOWN[name] <= set(BY_NAME[name].mistakes)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_no_case_hides_a_mistake(name):
    """B ≠ 0, α ≠ r, d_in ≠ d_out, and a bias somewhere, on any seed."""
    for seed in range(5):
        cases = BY_NAME[name].cases(seed)
        for case in cases:
            if "B" in case:
                assert case["B"].abs().min() > 0 and case["alpha"] != len(case["A"])
                assert case["A"].shape[1] != case["B"].shape[0]
            if "d_in" in case:
                assert case["d_in"] != case["d_out"]
        if any("bias" in case for case in cases):
            assert any(case["bias"] is not None and case["bias"].abs().min() > 0 for case in cases)


def from_peft(base, r, alpha, dropout=0.0):
    """PEFT's own layer in the calling form of the exercise."""
    from peft import LoraConfig, get_peft_model

    holder = get_peft_model(nn.ModuleDict({"layer": base}), LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout,
                                                                       target_modules=["layer"]))
    return holder.base_model.model["layer"]


def test_pefts_own_layer_passes_as_the_students():
    pytest.importorskip("peft")
    verdict = verdict_on(BY_NAME["lora-layer"], from_peft, 4)
    assert verdict.passed, verdict.text


def test_pefts_own_merge_passes_as_the_students():
    pytest.importorskip("peft")

    def merging(base, A, B, alpha):
        layer = from_peft(base, len(A), alpha)
        chapter.fill(layer.lora_A["default"].weight, A)
        chapter.fill(layer.lora_B["default"].weight, B)
        merge = layer.merge
        # PEFT warns when asked to merge what is merged, and then does nothing.
        layer.merge = lambda: None if layer.merged else merge()
        return layer

    verdict = verdict_on(BY_NAME["lora-merge"], merging, 4)
    assert verdict.passed, verdict.text


def test_pefts_initialisation_passes_as_the_students():
    pytest.importorskip("peft")

    def initialise(d_in, d_out, r, generator):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            layer = from_peft(nn.Linear(d_in, d_out), r, 1)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    verdict = verdict_on(BY_NAME["lora-init"], initialise, 4)
    assert verdict.passed, verdict.text


def test_the_librarys_attach_passes_as_the_students():
    """attach and detach of pefttools, with the probe's layer in place of LoRA."""
    from pefttools import inject
    from pefttools.lora import LoRAConfig

    class Config(LoRAConfig):
        def build(self, base, generator=None, name="default"):
            layer = chapter.Wrapped(base)
            layer.base_layer, layer.enabled, layer.merged = base, True, False
            layer.names, layer.active = [name], {name: 1.0}
            layer.adapter_parameters = lambda name=None: {"A": layer.A, "B": layer.B}
            layer.merge = layer.unmerge = layer.restore_base = lambda: None
            return layer

    def through_attach(model, targets, wrap):
        inject.attach(model, Config(r=1, target_modules=list(targets)))
        return lambda: inject.detach(model) and None

    verdict = verdict_on(BY_NAME["lora-inject"], through_attach, 4)
    assert verdict.passed, verdict.text


# ------------------------------------------------------------------------------------------------ figures of the prose

def test_worked_example_by_hand():
    """001, example 3, and erratum 10: the A given has one row."""
    W0, A, B = torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[0.1, 0.2]]), torch.tensor([[0.3], [0.4]])
    x = torch.ones(2)
    y = chapter.forward_with(lambda alpha, r: alpha / r)(x, W0, A, B, 1.0)
    assert torch.allclose(y, torch.tensor([3.09, 7.12]))
    printed = chapter.forward_with(lambda alpha, r: alpha / 2)(x, W0, A, B, 1.0)
    assert torch.allclose(printed, torch.tensor([3.045, 7.06]))
    assert "(3.09,\\ 7.12)" in SOURCE and "(3.045,\\ 7.06)" in SOURCE


@pytest.mark.parametrize("shapes, r, expected", [
    ([(4096, 4096)] * 4 * 32, 8, 8_388_608),                    # 001, example 1
    ([(1024, 4096)], 16, 81_920),                               # 001, problem 1
    ([(12288, 12288)] * 96, 8, 18_874_368),                     # 003: GPT-3, one matrix
    ([(12288, 12288)] * 2 * 96, 4, 18_874_368),                 # 003: GPT-3, two matrices
    ([(4096, 4096)] * 2 * 32, 16, 8_388_608),                   # 003: the printed output
    ([(2048, 2048), (512, 2048)] * 16, 8, 851_968),             # Llama-3.2-1B, q and v
])
def test_counts_of_the_sources(shapes, r, expected):
    assert chapter.count_reference(shapes, r) == expected
    assert chapter.count_loop(shapes, r) == expected


def test_compression_of_problem_1():
    assert 1024 * 4096 / 81_920 == 51.2
    assert "51.2" in SOURCE and "81{,}920" in SOURCE and "4{,}194{,}304" in SOURCE


def test_gradients_of_the_proof():
    """∂L/∂B = s·δ(Ax)ᵀ and ∂L/∂A = s·(Bᵀδ)xᵀ, as the chapter writes them."""
    rng = torch.Generator().manual_seed(0)
    W0, A, B, x, delta = (torch.randn(*s, generator=rng, dtype=torch.float64)
                          for s in ((4, 6), (2, 6), (4, 2), (6,), (4,)))
    A.requires_grad_()
    B.requires_grad_()
    (chapter.forward_with(lambda alpha, r: alpha / r)(x, W0, A, B, 5.0) @ delta).backward()
    s = 5.0 / 2
    assert torch.allclose(B.grad, s * torch.outer(delta, A.detach() @ x))
    assert torch.allclose(A.grad, s * torch.outer(B.detach().T @ delta, x))


def test_twice_alpha_moves_twice_as_far_with_adam_and_four_times_with_sgd():
    def move(alpha, optimizer, lr):
        rng = torch.Generator().manual_seed(0)
        W0, A, x, target = (torch.randn(*s, generator=rng) for s in ((6, 8), (2, 8), (16, 8), (16, 6)))
        A.requires_grad_()
        B = torch.zeros(6, 2, requires_grad=True)
        forward = chapter.forward_with(lambda a, r: a / r)
        F.mse_loss(forward(x, W0, A, B, alpha), target).backward()
        optimizer([A, B], lr=lr).step()
        return (forward(x, W0, A, B, alpha) - x @ W0.T).norm().item()

    assert move(8.0, torch.optim.Adam, 1e-3) / move(4.0, torch.optim.Adam, 1e-3) == pytest.approx(2, rel=1e-2)
    assert move(8.0, torch.optim.SGD, 1e-3) / move(4.0, torch.optim.SGD, 1e-3) == pytest.approx(4, rel=1e-2)


def test_the_line_in_pefts_source_is_where_the_chapter_looks_for_it():
    layer = pytest.importorskip("peft.tuners.lora.layer")
    import inspect

    forward = inspect.getsource(layer.Linear.forward)
    assert forward.count("lora_B(lora_A(") == 1
    table = SOURCE.split("Around it:")[1].split("**Go and look**")[0]
    for quoted in re.findall(r"^# \| `(.+?)` \|", table, re.MULTILINE):
        for part in quoted.removesuffix(" continue").split("(...)"):
            assert part in forward, f"the chapter explains {quoted!r}, which PEFT's forward does not have"
    assert "zeros_(self.lora_B[adapter_name].weight)" in inspect.getsource(layer.LoraLayer.reset_lora_parameters)
    assert "weight_B @ weight_A" in inspect.getsource(layer.Linear.get_delta_weight)


# ------------------------------------------------------------------------------------------------ pictures

def test_explorer_shows_what_it_says():
    for r in (1, 4, 19, 20, 32):
        A, B = pictures.explorer_factors(r)
        assert int(torch.linalg.matrix_rank(B @ A)) == r
        figure = pictures.rank_alpha_figure(r, 16)
        written = {text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))}
        cost = r * (pictures.WIDTH + pictures.HEIGHT)
        assert f"{cost:,}" in written and f"{cost:,}" in pictures.explorer_alt(r, 16)
        # "Find the r from which on A and B have more numbers than the full matrix"
        assert (cost > pictures.WIDTH * pictures.HEIGHT) == (r >= 20)
    with pytest.raises(ValueError, match="between 1 and 32"):
        pictures.rank_alpha_figure(33)


def test_explorer_has_a_first_frame_without_a_front_end(capsys):
    figure = pictures.rank_alpha_explorer()
    frame = figure.frame(r=2, alpha=4)
    assert "r = 2 and alpha = 4" in frame["text/html"] and len(frame["image/png"]) > 5_000


def test_moving_alpha_changes_the_strength_alone():
    def image(r, alpha):
        return torch.as_tensor(pictures.rank_alpha_figure(r, alpha).axes[0].images[0].get_array().data)

    assert torch.allclose(image(3, 32), 2 * image(3, 16))
    assert torch.allclose(torch.linalg.svdvals(image(1, 8).float())[1:], torch.zeros(31), atol=1e-4)


def test_figures_draw(tmp_path):
    runs = {"q, v": (43_008, [3.0, 2.0, 1.5], 3.0, 1.4), "feed-forward": (138_240, [3.0, 1.8, 1.2], 3.0, 1.2)}
    timings = {"1 token": {"merged": (1.0, 0.9, 1.1), "not merged": (1.3, 1.2, 1.4)},
               "64 tokens": {"merged": (1.0, 1.0, 1.0), "not merged": (1.1, 1.0, 1.2)}}
    figures = [pictures.lora_picture(), pictures.rank_alpha_figure(), pictures.placement_figure(runs),
               pictures.spectra_figure({"ΔW": [[3.0, 1.0, 1e-9]], "W": [[2.0, 1.5, 1.2]]}, 2),
               pictures.latency_figure(timings)]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000
    drawn = {text.get_text() for text in pictures.lora_picture(8, 6, 2).findobj(lambda a: hasattr(a, "get_text"))}
    assert "trained: 2 × (8 + 6) = 28 numbers" in drawn and "frozen: 48 numbers" in drawn


def test_slowdown_sees_a_difference_through_a_busy_machine():
    rng = random.Random(0)

    def rounds(seconds):  # some rounds are two to five times as slow, as when other programs run
        return [seconds * rng.uniform(0.99, 1.01) * (rng.uniform(2, 5) if rng.random() < 0.4 else 1) for _ in range(100)]

    base = rounds(0.01)
    same, low, high = pictures.slowdown(rounds(0.01), base)
    assert same == pytest.approx(1, abs=0.03) and low <= 1.01 and high >= 0.99
    more, low, high = pictures.slowdown(rounds(0.012), base)
    assert more == pytest.approx(1.2, abs=0.04) and low > high_of_noise(base)
    with pytest.raises(ValueError, match="each round"):
        pictures.slowdown([1.0], [])


def high_of_noise(base):
    return pictures.slowdown(base[::-1], base)[2]


def test_the_spread_asked_for_is_pefts():
    A = torch.empty(64, 256)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    assert A.abs().max() <= 1 / math.sqrt(256)
    assert A.std().item() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.02)
