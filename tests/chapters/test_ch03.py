"""Chapter 03: its exercises tell right from wrong, each mistake by its own message; its pictures draw."""

from __future__ import annotations

import pytest

from pefttools.grading import check
from pefttools.grading.exercises import ch03_finetune as ch
from pefttools.widgets import finetune as pictures

ALL = {e.name: e for e in ch.EXERCISES}
MISTAKES = [(e.name, name) for e in ch.EXERCISES for name in e.mistakes]
ALTERNATIVES = [(e.name, name) for e in ch.EXERCISES for name in e.alternatives]


@pytest.mark.parametrize("name", ALL)
def test_the_reference_gets_all_points(name):
    verdict = check(name, ALL[name].resolve(ALL[name].reference))
    assert verdict.passed and verdict.points == ALL[name].points, verdict.message


@pytest.mark.parametrize(("name", "other"), ALTERNATIVES)
def test_other_right_answers_pass(name, other):
    verdict = check(name, ALL[name].alternatives[other])
    assert verdict.passed, verdict.message


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_each_mistake_hears_its_own_message(name, mistake):
    work, message = ALL[name].mistakes[mistake]
    verdict = check(name, work)
    assert not verdict.passed and verdict.points < ALL[name].points
    assert verdict.mistake == mistake
    assert message in verdict.message


@pytest.mark.parametrize("name", ALL)
def test_exercises_of_weight_have_mistakes_and_alternatives(name):
    assert len(ALL[name].mistakes) >= 5 and len(ALL[name].alternatives) >= 2


def stub(*args, **kwargs):
    raise NotImplementedError("not written yet")


@pytest.mark.parametrize("name", ALL)
def test_a_blank_answer_is_not_written_yet(name):
    verdict = check(name, (stub, stub) if name == "save-and-reload" else stub)
    assert verdict.points == 0 and "not written" in verdict.message.lower()


@pytest.mark.parametrize(("name", "work", "said"), [
    ("format-example", lambda row: None, "(prompt, answer)"),
    ("mask-labels", lambda p, a, b, e, m: {"input_ids": p}, "this returned one dict"),
    ("collate", lambda rows, pad: [rows], "return a dict"),
    ("training-step", lambda *a: None, "function without `return`"),
    ("save-and-reload", (lambda *a: None, lambda *a: None), "files in the folder"),
])
def test_an_answer_of_the_wrong_form_is_told_what_is_wanted(name, work, said):
    verdict = check(name, work)
    assert verdict.points == 0 and said in verdict.message, verdict.message


@pytest.mark.parametrize("question", ch.QUESTIONS, ids=lambda q: q.name)
def test_questions_explain_every_option(question):
    assert check(question.name, question.right).passed
    for letter, (_, why) in question.options.items():
        assert len(why) > 20
        if letter != question.right:
            verdict = check(question.name, letter)
            assert verdict.points == 0 and why in verdict.message


def test_the_toy_model_counts_targets_as_transformers_does():
    """`ToyLM` stands in for a transformers model: same shift, same mean, same num_items_in_batch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    llama = LlamaForCausalLM(config)
    batch = {k: v for k, v in ALL["training-step"].cases()[0]["steps"][0][0].items()}
    logits = llama(input_ids=batch["input_ids"]).logits
    targets = int((batch["labels"][:, 1:] != -100).sum())
    labels = batch["labels"][:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
    assert torch.allclose(llama(**batch).loss, total / targets)
    assert torch.allclose(llama(**batch, num_items_in_batch=100).loss, total / 100)


# --- pictures ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    from pefttools.lab.base import TINY, tokenizer_of

    return tokenizer_of(TINY, local_files_only=True)


ROWS = [{"instruction": "Write a function that doubles x.", "input": "",
         "output": "```python\ndef f(x):\n    return 2 * x\n```"},
        {"instruction": "Count the words.", "input": "a b", "output": "```python\nprint(2)\n```"}]


def test_kinds_are_told_by_position(tokenizer):
    eos = tokenizer.eos_token_id
    kinds = pictures.kinds_of([0, 5, 6, eos, eos], [-100, -100, 6, eos, -100], [1, 1, 1, 1, 0], eos)
    assert kinds == ["prompt", "prompt", "target", "end", "padding"]
    assert pictures.kinds_of([eos], [eos], [0], eos) == ["pad target"]


def test_mask_viewer_draws_a_first_frame_and_every_choice(tokenizer):
    viewer = pictures.mask_viewer(ROWS, tokenizer)
    first = viewer.frame()
    assert "alt=" in first["text/html"] and "0 of these padding" in first["text/html"]
    slide = viewer.frame(pad_to=64, labels=pictures.SLIDE)
    assert "64 of them targets" in slide["text/html"]      # padding, prompt and answer, all of them


def test_generation_viewer_draws_and_refuses_other_rows():
    rows = [dict(r, kind="k", answer="```python\nx = '$1$'\n```", passed=i == 0, error="" if i == 0 else "NameError: x")
            for i, r in enumerate(ROWS)]
    viewer = pictures.generation_viewer(rows, rows)
    frames = [viewer.frame(prompt=p)["text/html"] for p in viewer.sliders["prompt"]]
    assert "passes all its tests" in frames[0] and "NameError" in frames[1]
    with pytest.raises(ValueError, match="same prompts"):
        pictures.generation_viewer(rows, rows[::-1])


@pytest.mark.parametrize("figure", [
    lambda: pictures.seven_steps([("1 data", "rows"), ("2 tokens", "ids")]),
    lambda: pictures.padding_bars([(10, 20), (5, 9), (30, 40), (3, 3)], 128, 2),
    lambda: pictures.token_weights([4, 40]),
    lambda: pictures.memory_bars({"off": {"layers": 10, "head": 3}, "on": {"layers": 1, "head": 3}}),
    lambda: pictures.loss_pair([3.0, 2.0], [3.0, 2.0]),
    lambda: pictures.before_after_bars({"lists": ((0, 4), (3, 4)), "none": ((0, 0), (0, 0))}),
    lambda: pictures.error_bars({"a": {"passed": 3, "SyntaxError": 1}, "b": {"SyntaxError": 2}}),
])
def test_figures_draw(figure):
    from pefttools.widgets import base

    assert base.render(figure(), "something")["image/png"]
