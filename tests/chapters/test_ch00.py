"""Chapter 00: what its prose and its pictures state, checked against the code they speak of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pefttools.grading.exercises import ch00_start
from pefttools.widgets import start

SOURCE = (Path(__file__).parents[2] / "solutions" / "00_start.py").read_text(encoding="utf-8")


def test_exercises_and_questions_have_what_the_standard_asks():
    assert [e.name for e in ch00_start.EXERCISES] == ["hello-check", "count-trainable", "freeze", "bytes-per-parameter"]
    for exercise in ch00_start.EXERCISES:
        mistakes, alternatives = (3, 1) if exercise.difficulty == 1 else (5, 2)
        assert len(exercise.mistakes) >= mistakes and len(exercise.alternatives) >= alternatives
    assert ch00_start.EXERCISES[0].minutes <= 5
    assert 4 <= len(ch00_start.QUESTIONS) <= 6
    assert len({q.right for q in ch00_start.QUESTIONS}) >= 3, "the right letter must not be guessable"


def test_the_librarys_count_is_a_right_answer():
    from pefttools.inject import count_parameters

    for case in ch00_start.COUNT.cases(5):
        probed = ch00_start.COUNT.probe(count_parameters, case)
        assert probed == ch00_start.COUNT.probe(ch00_start.COUNT.reference, case)


def test_bytes_of_the_worked_example():
    assert sum(ch00_start.training_bytes(28, 0, "mixed").values()) == 448
    assert sum(ch00_start.training_bytes(4, 24, "mixed").values()) == 112
    assert sum(ch00_start.training_bytes(70_000_000_000, 0, "half").values()) == 840e9
    assert sum(ch00_start.training_bytes(65_000_000_000, 0, "half").values()) == 780e9
    assert sum(ch00_start.training_bytes(70_000_000_000, 0, "mixed").values()) == 1120e9


@pytest.mark.parametrize("dtype, expected", [(torch.float32, 16), (torch.bfloat16, 8)])
def test_what_pytorchs_adamw_really_holds(dtype, expected):
    layer = nn.Linear(64, 64, bias=False, dtype=dtype)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 64, dtype=dtype)).sum().backward()
    optimizer.step()
    moments = sum(v.nbytes for v in optimizer.state[layer.weight].values() if v.ndim)
    assert (layer.weight.nbytes + layer.weight.grad.nbytes + moments) / layer.weight.numel() == expected


def test_recipe_table_of_the_prose_is_the_exercises():
    for recipe, (weight, gradient, moments, master) in ch00_start._RECIPES.items():
        row = next(line for line in SOURCE.splitlines() if line.startswith(f'# | `"{recipe}"` |'))
        numbers = [int(n) if n != "–" else 0 for n in re.findall(r"\|\s*\**(\d+|–)\**\s*(?=\|)", row)]
        w, g, m, v, c, trained, frozen = numbers
        assert (w, g, m + v, c) == (weight, gradient, moments, master)
        assert trained == w + g + m + v + c and frozen == w


def test_gigabytes_by_recipe():
    sizes = start.recipe_gigabytes(70, 0)
    assert sizes["full, with master weights"] == 1120 and sizes["full, without master weights"] == 840
    assert sizes["frozen in 16 bits + adapter"] == 140
    assert sizes["frozen in 4 bits + adapter"] == pytest.approx(36.1, abs=0.05)  # erratum 6
    assert start.recipe_gigabytes(1, 1)["frozen in 16 bits + adapter"] == pytest.approx(2.16)
    for bad in ({"billions": 0}, {"billions": 7, "adapter_percent": -1}, {"billions": 7, "adapter_percent": 101}):
        with pytest.raises(ValueError, match="got"):
            start.recipe_gigabytes(**bad)


def test_what_fits():
    assert "T4" in start.what_fits(16) and "3090" in start.what_fits(16.1) and "A100" in start.what_fits(80)
    assert start.what_fits(840) == "needs 11 × A100"


def test_figures_draw_and_say_what_they_show(tmp_path):
    figures = [start.three_ways(), start.method_map(), start.memory_by_recipe(70, 0.1),
               start.stacked_bytes({"full": {"weights": 4e6, "gradients": 4e6, "optimizer": 8e6},
                                    "frozen": {"weights": 4e6, "gradients": 0, "optimizer": 0}}),
               start.learned_and_forgot({"full": (0.2, 3.0)}, (2.0, 2.1)), start.two_losses({"full": [2.0, 1.0]})]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000
    written = {text.get_text() for text in start.memory_by_recipe(70, 0.1).findobj(lambda a: hasattr(a, "get_text"))}
    assert any("840.0 GB" in text for text in written)
    assert "840.0 GB" in start.memory_alt(70, 0.1)


def test_the_map_names_matrices_that_the_model_has():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8))
    have = {name.split(".")[-1] for name, _ in model.named_modules()}
    drawn = {word for text in start.method_map().findobj(lambda a: hasattr(a, "get_text"))
             for word in re.findall(r"\w+_proj", text.get_text())}
    assert drawn == {name for name in have if name.endswith("_proj")}


@pytest.mark.parametrize("guess, said", [
    (None, "No guess yet"), (..., "No guess yet"), ("many", "as a number"), ("3,5", "as a number"), (3.5, "Spot on"),
    (4.5, "Close"), (25, "surprise"), (-1, "surprise"), (0, "surprise")])
def test_a_guess_is_answered_kindly(guess, said):
    assert said in start.compare_guess(guess, 3.5, "times less")


def test_a_guess_about_something_small_or_negative():
    assert "Spot on" in start.compare_guess(0, 0) and "Not far off" in start.compare_guess(0, 0.05)
    assert "surprise" in start.compare_guess(2, -0.1)
    assert "surprise" in start.compare_guess(float("nan"), 1)


def test_the_types_that_the_chapter_speaks_of_exist():
    """Erratum 28: the list is the library's; the chapter marks some of its names."""
    peft = pytest.importorskip("peft")
    types = {getattr(kind, "value", str(kind)) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    marked = re.search(r"in_course = (\{.*?\})", SOURCE, re.DOTALL).group(1)
    assert set(eval(marked)) <= types  # noqa: S307  (a dictionary of strings in our own file)
    assert "QLORA" not in types and not any("ADAPTER" in name for name in types)
