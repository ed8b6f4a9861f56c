"""Chapter 07: its exercises against the library, torch and PEFT, its figures of other people's papers, its pictures."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import ch07_prefix as chapter
from pefttools.lab import virtual_starts as starts
from pefttools.widgets import prefix as pictures

SOURCE = (Path(__file__).parents[2] / "solutions" / "07_prefix.py").read_text(encoding="utf-8")
BY_NAME = {exercise.name: exercise for exercise in chapter.EXERCISES}


def test_exercises_and_questions_have_what_the_standard_asks():
    assert {"soft-prompt", "prefix-attention", "prefix-for-gqa", "reparametrise", "zero-init-gate",
            "count-virtual-parameters"} <= set(BY_NAME)
    for exercise in chapter.EXERCISES:
        assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert chapter.EXERCISES[0].minutes <= 5 and chapter.EXERCISES[0].difficulty == 1
    assert 4 <= len(chapter.QUESTIONS) <= 6
    assert len({question.right for question in chapter.QUESTIONS}) >= 3, "the right letter must not be guessable"


KNOWN = {  # what is got wrong most often; a check that lets one of these through is no check
    "soft-prompt": {"mask as it was", "labels as they were", "labels 0", "prompt behind", "no gradient"},
    "prefix-attention": {"mask over both", "no scale", "two softmaxes", "heads mixed up", "queries too"},
    "prefix-for-gqa": {"heads in the wrong order", "not repeated", "all keys first", "reshaped", "query heads in the file"},
    "prefix-share": {"the words' share", "by counting", "its own softmax"},
    "count-virtual-parameters": {"query heads", "d_model wide", "MLP left out", "keys alone"},
    "reparametrise": {"no tanh", "MLP stays", "folded and frozen", "MLP thrown away unasked", "folding twice"},
    "zero-init-gate": {"one softmax", "sigmoid", "inside the softmax", "one minus", "shut for ever"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_common_mistakes_are_known(name):
    assert KNOWN[name] <= set(BY_NAME[name].mistakes)


@pytest.mark.parametrize("seed", range(5))
def test_no_case_hides_a_mistake(seed):
    """Numbers that are easily taken for one another differ in some case, on any seed."""
    attention = BY_NAME["prefix-attention"].cases(seed)
    assert any(len({c["q"].shape[1], c["q"].shape[2], len(c["prefix_k"])}) == 3 for c in attention)
    assert all(c["gate"].abs().min() > 0 for c in BY_NAME["zero-init-gate"].cases(seed))
    assert any(c["heads"] > c["kv_heads"] > 1 and c["layer"] not in (0, c["layers"] - 1)
               for c in BY_NAME["prefix-for-gqa"].cases(seed))
    counts = BY_NAME["count-virtual-parameters"].cases(seed)
    assert any(c["d_model"] != c["heads"] * c["head_dim"] != c["kv_heads"] * c["head_dim"] for c in counts)
    assert any((c["attention_mask"] == 0).any() for c in BY_NAME["soft-prompt"].cases(seed))


# ------------------------------------------------------------------------------------------------ the library as student

def test_the_librarys_prefix_passes_as_the_students_fold():
    verdict = verdict_on(BY_NAME["reparametrise"], chapter.fold_reference, 4)
    assert verdict.passed, verdict.text


def test_pefts_own_encoder_passes_until_it_has_to_fold():
    """peft's PrefixEncoder gives the same prefix; it has no fold(), because its file holds the result."""
    pytest.importorskip("peft")
    from peft import PrefixTuningConfig
    from peft.tuners.prefix_tuning.model import PrefixEncoder

    case = BY_NAME["reparametrise"].cases(3)[0]
    P, d = case["E"].shape
    encoder = PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=P, token_dim=d, num_layers=1, prefix_projection=True,
                                               encoder_hidden_size=len(case["W1"])))
    encoder.transform[2] = torch.nn.Linear(len(case["W1"]), len(case["W2"]))
    with torch.no_grad():
        for parameter, name in zip(encoder.parameters(), ("E", "W1", "b1", "W2", "b2"), strict=True):
            parameter.copy_(case[name])
    torch.testing.assert_close(encoder(torch.arange(P)), chapter.Fold(*case.values())(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ figures of the prose

def test_worked_example_by_hand():
    q = torch.tensor([2., 0, 0, 0]).view(1, 1, 1, 4)
    k, v = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1, 4), 8.)
    P_k, P_v = torch.tensor([math.log(3), 0, 0, 0]).view(1, 1, 4), torch.zeros(1, 1, 4)
    assert torch.allclose(chapter.make_attention()(q, k, v, P_k, P_v), torch.full((1, 1, 1, 4), 2.))
    assert torch.allclose(chapter.make_share()(q, k, P_k), torch.tensor(0.75))
    assert "\\frac34 \\cdot 0 + \\frac14 \\cdot 8 = 2" in SOURCE


@pytest.mark.parametrize("method, P, model, hidden, expected", [
    ("prefix", 20, {"layers": 40, "kv_heads": 1, "head_dim": 4096}, None, 6_553_600),         # 001, problem 5
    ("prefix", 10, {"layers": 24, "kv_heads": 16, "head_dim": 64}, None, 491_520),            # 001: GPT-2 Medium
    ("prefix", 20, {"layers": 16, "kv_heads": 8, "head_dim": 64}, None, 327_680),             # Llama-3.2-1B
    ("prefix", 20, {"layers": 16, "kv_heads": 8, "head_dim": 64}, 512, 8_677_888),
    ("prompt", 20, {"layers": 16, "d_model": 2048, "kv_heads": 8, "head_dim": 64}, None, 40_960),
    ("prefix", 20, {"layers": 32, "kv_heads": 32, "head_dim": 128}, None, 5_242_880),         # the question's two models
    ("prefix", 20, {"layers": 32, "kv_heads": 8, "head_dim": 128}, None, 1_310_720),
])
def test_counts_of_the_sources(method, P, model, hidden, expected):
    model = {"d_model": 1, "heads": 1} | model
    assert chapter.make_counts()(method, P, model, hidden) == expected
    assert chapter.counts_built(method, P, model, hidden) == expected


def test_llama_adapter_of_003_has_30_layers():
    assert 30 * 10 * 4096 == 1_228_800


def test_extra_queries_change_nothing():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=rng) for _ in range(3))
    P_k, P_v = (torch.randn(6, 3, 4, generator=rng) for _ in range(2))
    whole = chapter.attention_with_queries(q, k, v, P_k, P_v)
    torch.testing.assert_close(whole[:, :, 6:], chapter.make_attention()(q, k, v, P_k, P_v))


def test_the_prefix_leaves_the_ratio_of_the_words_weights():
    rng = torch.Generator().manual_seed(1)
    q, k, prefix_k = (torch.randn(*s, generator=rng) for s in ((1, 2, 4, 6), (1, 2, 4, 6), (3, 2, 6)))
    with_, without = chapter.all_weights(q, k, prefix_k)[..., 3:], chapter.all_weights(q, k, prefix_k[:0])
    ratio = (with_ / without)[..., -1, :]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    zeros = chapter.all_weights(q, k, 0 * prefix_k)[..., :3]
    assert zeros.min() > 0, "a prefix of zeros is not nothing"


def test_a_prefix_of_zeros_stays_one_token():
    """Equal rows get equal gradients; see part 5."""
    rng = torch.Generator().manual_seed(2)
    q, k, v, target = (torch.randn(2, 3, 5, 4, generator=rng) for _ in range(4))
    for scale, ranks in ((0.0, 1), (1.0, 7)):
        P_k, P_v = ((scale * torch.randn(7, 3, 4, generator=rng)).requires_grad_() for _ in range(2))
        optimizer = torch.optim.SGD([P_k, P_v], lr=1.0)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(chapter.make_attention()(q, k, v, P_k, P_v), target).backward()
            optimizer.step()
        assert int(torch.linalg.matrix_rank(torch.cat([P_k, P_v], 2).flatten(1).detach(), rtol=1e-4)) == ranks


def test_the_lines_in_pefts_source_are_where_the_chapter_looks_for_them():
    peft_model = pytest.importorskip("peft.peft_model")
    import inspect

    source = inspect.getsource(peft_model.PeftModel.get_prompt)
    marks = re.search(r"marks = \((.*?)\)\nprint", SOURCE, re.S)[1]
    for mark in re.findall(r'"([^"]+)"', marks):
        assert mark in source, f"the chapter looks for {mark!r}, which get_prompt does not have"
    table = SOURCE.split('print(f"  {first_line + number:5}  {line.rstrip()}")')[1].split("**Go and look**")[0]
    for quoted in re.findall(r"^# \| `(.+?)` \|", table, re.MULTILINE):
        assert quoted.removeprefix("if ").removesuffix(":") in source, f"the chapter explains {quoted!r}"


# ------------------------------------------------------------------------------------------------ what was run ahead

def test_results_are_there_for_every_way_and_small():
    rows = {row["name"]: row for row in starts.table()}
    assert set(rows) == set(starts.WAYS)
    assert all(row["seeds"] == len(starts.SEEDS) for row in rows.values())
    assert starts.RESULTS.stat().st_size < 100_000
    found = starts.results()
    for name, runs in found.items():
        rates = {f"{lr:g}" for lr in starts.RATES[starts.WAYS[name][0]]}
        assert rates <= set(runs), f"{name}: learning rates that were not tried"
        assert all(str(starts.CHOOSE) in runs[lr] for lr in rates)
    for name in ("gate from 0", "gate from 1", "no gate"):
        curves = starts.curves(name)
        assert len(curves) == len(starts.SEEDS) and all(len(curve) == starts.STEPS for curve in curves)


def test_what_the_prose_says_of_the_results():
    """Sentences of part 5 and 6 that no cell prints, held to the file."""
    rows = {row["name"]: row for row in starts.table()}
    found = starts.results()
    low = f"{starts.RATES['prefix'][0]:g}"
    end = {name: found[name][low][str(starts.CHOOSE)]["end"] for name in ("prefix, random", "prefix, text")}
    best = f"{rows['prefix, random']['lr']:g}"
    late = {name: found[name][best][str(starts.CHOOSE)]["end"] for name in end}
    # "A good start is worth most to whoever has not tuned the learning rate"
    assert end["prefix, random"] - end["prefix, text"] > 5 * abs(late["prefix, random"] - late["prefix, text"])
    # "a prefix from a text and one from random numbers end at about the same place; one from zero does not"
    assert abs(rows["prefix, random"]["end"] - rows["prefix, text"]["end"]) < 0.03
    # "zero is … poor here"
    assert rows["prefix, zero"]["end"] - rows["prefix, zero"]["sd"] > max(
        rows[name]["end"] + rows[name]["sd"] for name in ("prefix, random", "prefix, text"))
    # "not ahead, once each has its own learning rate", "one thirty times as high", and the summary's "did it, here?"
    assert rows["prefix through an MLP"]["end"] > rows["prefix, random"]["end"]
    assert rows["prefix, random"]["lr"] == pytest.approx(30 * rows["prefix through an MLP"]["lr"])
    assert found["prefix through an MLP"]["0.01"][str(starts.CHOOSE)]["end"] + 0.5 < end["prefix, random"]
    assert rows["P-tuning (MLP)"]["end"] > rows["prompt, random"]["end"] > rows["prompt, text"]["end"] + 0.05
    # "zero is behind random numbers up to a rate of 1, and at 3, which is too high for both, it is ahead"
    assert found["prefix, zero"]["3"][str(starts.CHOOSE)]["end"] < found["prefix, random"]["3"][str(starts.CHOOSE)]["end"]
    for lr in map("{:g}".format, starts.RATES["prefix"][:-1]):
        assert found["prefix, zero"][lr][str(starts.CHOOSE)]["end"] > found["prefix, random"][lr][str(starts.CHOOSE)]["end"]
    # "With the gate at 0 … the base model", "Without it the model starts out badly damaged"
    assert rows["no gate"]["start"] > rows["gate from 0"]["start"] + 2
    assert rows["no gate"]["end"] > rows["gate from 1"]["end"] > rows["gate from 0"]["end"]


def test_what_the_prose_says_of_pefts_comparison():
    """From their published accuracies, which a cell of the chapter reads from the same two files."""
    published = Path(starts.__file__).parents[1] / "vram" / "published"
    runs = json.loads((published / "peft_accuracy.json").read_text(encoding="utf-8"))["runs"]
    found, setting = {}, {}
    for run in runs:
        name = run["run"].removeprefix("prefixtuning/").removeprefix("prompt_tuning/").replace("llama-3.2-3B-", "")
        name = {"lr_0.001": run["run"].partition("tuning")[0] + " lr_0.001"}.get(name, name)
        found.setdefault(name, []).append(run["accuracy"])
        setting[name] = run
    for line in (published / "vram_measured.csv").read_text(encoding="utf-8").splitlines():
        for file, name in (("tokens50-init_prefix", "tokens50-init_prefix-lr_0.005"),
                           ("prompt_tuning--llama-3.2-3B-lr_0.001.json", "prompt_ lr_0.001")):
            if file in line:
                found[name].append(float(line.split("test acc=")[1]))
    mean = {name: statistics.mean(values) for name, values in found.items()}
    text, default = mean["tokens50-init_prefix-lr_0.005"], mean["prefix lr_0.001"]
    words, prompt, rate = mean["sample_vocab-lr_0.001"], mean["default"], mean["prompt_ lr_0.001"]
    full, lora = mean["full-finetuning/lr_0.00001"], mean["lora/rank32"]
    # "From the default to the best is further … than from there to LoRA or to full fine-tuning"
    assert min(text - default, words - prompt) > max(full, lora) - min(text, words)
    # "more than half of that gain is the rate's", "three things have changed", "five times the learning rate"
    assert (rate - prompt) / (words - prompt) > 0.5
    assert {setting["prefix lr_0.001"][k] for k in ("lr", "virtual_tokens")} == {0.001, 200}
    assert {setting["tokens50-init_prefix-lr_0.005"][k] for k in ("lr", "virtual_tokens")} == {0.005, 50}
    zero = setting["lr_0.005_zero_init"]
    assert zero["lr"] == 5 * setting["prefix lr_0.001"]["lr"] and mean["lr_0.005_zero_init"] > default
    assert setting["default"]["lr"] == 0.0001 and setting["sample_vocab-lr_0.001"]["start"].startswith("words")
    # "how far a run is from its own repetition"
    assert max(max(values) - min(values) for values in found.values()) > 0.01
    said = dict(re.findall(r'([A-Z]+_P[A-Z]+): "(0\.\d+)"', SOURCE))
    near = {"DEFAULT_PREFIX": default, "TEXT_PREFIX": text, "ZERO_PREFIX": mean["lr_0.005_zero_init"],
            "DEFAULT_PROMPT": prompt, "WORDS_PROMPT": words}
    assert said.keys() == near.keys() and all(abs(float(said[name]) - near[name]) < 0.05 for name in near)


def test_the_best_rate_of_each_way_is_not_at_the_edge_of_what_was_tried():
    """Else a method would be compared at a rate that is only the nearest to its best one."""
    for row in starts.table():
        rates = starts.RATES[starts.WAYS[row["name"]][0]]
        assert min(rates) < row["lr"] < max(rates), row


def test_the_learning_rate_is_not_chosen_with_the_seeds_that_are_reported():
    assert starts.CHOOSE not in starts.SEEDS
    made = {"a": {"0.1": {"100": {"start": 3, "end": 1.0, "curve": []}, "0": {"start": 3, "end": 9.0, "curve": [1]},
                          "1": {"start": 3, "end": 7.0, "curve": [2]}},
                  "0.2": {"100": {"start": 3, "end": 2.0, "curve": []}, "0": {"start": 3, "end": 0.1, "curve": [3]}},
                  "0.3": {"100": {"start": 3, "end": None, "curve": []}}}}
    [row] = starts.table(made)
    assert (row["lr"], row["end"], row["seeds"]) == (0.1, 8.0, 2) and starts.curves("a", made) == [[1], [2]]


def test_one_small_run_and_the_model_is_as_it_was():
    from pefttools.lab import encoded, load_base, load_data

    base = load_base("tiny")
    rows = encoded(load_data("train").select(range(16)), base.tokenizer)
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    for name in ("prompt, text", "no gate"):
        run = starts.run(base, rows, load_data("held_out").select(range(4)), name, 1e-2, 0, steps=2, batch=4)
        assert math.isfinite(run["end"]) and len(run["curve"]) == 2
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.model.named_parameters())


# ------------------------------------------------------------------------------------------------ pictures

@pytest.fixture(scope="module")
def maps():
    from pefttools.inject import attach
    from pefttools.lab import load_base
    from pefttools.prefix import PrefixTuningConfig

    model, tokenizer = load_base("tiny")
    attach(model, PrefixTuningConfig(5), seed=0)
    implementation = model.config._attn_implementation
    weights, words = pictures.attention_of(model, tokenizer, "Add 2 to x.\nx + 2")
    assert model.config._attn_implementation == implementation
    return weights, words


def test_attention_maps_are_attention(maps):
    weights, words = maps
    assert weights.shape == (6, 4, len(words), 5 + len(words)) and words[0] == "begin"
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert not weights[..., 5:].triu(1).any(), "a word sees no later word"
    assert weights[..., :5].min() > 0, "every word sees the whole prefix"


def test_the_explorer_shows_what_it_says(maps, capsys):
    weights, words = maps
    explorer = pictures.attention_explorer({"trained": weights, "random": weights.flip(0)}, words)
    frame = explorer.frame(prefix="random", layer=2, head=3)
    share = weights.flip(0)[1, 2, :, :5].sum(1).mean()
    assert f"the prefix gets {share:.0%} of the attention" in frame["text/html"] and len(frame["image/png"]) > 5_000
    figure = pictures.attention_map(weights, words, 6, 4)
    bars = [patch.get_width() for patch in figure.axes[1].patches]
    torch.testing.assert_close(torch.tensor(bars, dtype=torch.float32), weights[5, 3, :, :5].sum(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="layer must be from 1 to 6"):
        pictures.attention_map(weights, words, 7, 1)
    by_head = pictures.shares(weights)
    assert len(by_head) == 6 and len(by_head[0]) == 4
    assert statistics.mean(by_head[2]) == pytest.approx(weights[2, :, :, :5].sum(-1).mean().item(), rel=1e-5)


def test_figures_draw(tmp_path, maps):
    rows = [{"name": "prefix, random", "lr": 0.1, "ends": [1.0, 1.1]}, {"name": "prefix, text", "lr": 0.1, "ends": [0.9]}]
    figures = [pictures.where_picture(), pictures.mask_picture(), pictures.attention_map(*maps),
               pictures.share_figure({"a": pictures.shares(maps[0])}), pictures.starts_figure({"a": rows, "b": rows[:1]}, 2.5),
               pictures.curves_figure({"a": [[3.0, 2.0], [2.9, 1.9]], "b": [[3.0, 2.5]]})]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000
