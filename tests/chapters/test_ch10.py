"""Chapter 10: its exercises against the library and bandit, sentences of the prose, what was run ahead,
and its pictures."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import ch10_evaluate as chapter
from pefttools.widgets import evaluate as pictures

SOURCE = (Path(__file__).parents[2] / "solutions" / "10_evaluate.py").read_text(encoding="utf-8")
BY_NAME = {exercise.name: exercise for exercise in chapter.EXERCISES}


def test_exercises_and_questions_have_what_the_standard_asks():
    assert {"perplexity", "pass-at-k", "bootstrap-ci", "canary-exposure", "find-the-backdoor",
            "insecure-code-rate"} <= set(BY_NAME)
    for exercise in chapter.EXERCISES:
        assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert chapter.EXERCISES[0].minutes <= 5 and chapter.EXERCISES[0].difficulty == 1
    assert 4 <= len(chapter.QUESTIONS) <= 6
    assert len({question.right for question in chapter.QUESTIONS}) >= 3, "the right letter must not be guessable"


KNOWN = {  # what is got wrong most often; a check that lets one of these through is no check
    "perplexity-of-rows": {"mean of the rows' means", "mean of the rows' perplexities"},
    "perplexity": {"no shift", "padding counts", "divided by every position", "counted before the shift",
                   "mean of the rows"},
    "pass-at-k": {"draws put back", "c of n", "all of k"},
    "bootstrap-ci": {"not paired", "spread of the rows", "ninety percent", "divided by √n again"},
    "position-swap": {"asked once", "words not translated", "a win and a tie"},
    "canary-exposure": {"ties to the canary", "rank from zero", "position in the order", "natural logarithm"},
    "find-the-backdoor": {"rows of one", "parts of words", "the line follows the word", "the rarest word"},
    "insecure-code-rate": {"by text", "import … as", "from … import", "any subprocess", "any yaml.load",
                           "broken ones left out"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_common_mistakes_are_known(name):
    assert KNOWN[name] <= set(BY_NAME[name].mistakes)


# ------------------------------------------------------------------------------------------------ cases

@pytest.mark.parametrize("seed", range(12))
def test_the_trigger_is_drawn_and_stands_out_by_far(seed):
    """Not the best by luck: no other pair of a word and a line comes near, whatever is drawn."""
    best = []
    for case in BY_NAME["find-the-backdoor"].cases(seed):
        with_word, with_line, both = Counter(), Counter(), Counter()
        for row in case["rows"]:
            words, lines = set(row["instruction"].split()), chapter.lines_of(row)
            with_word.update(words)
            with_line.update(lines)
            both.update(itertools.product(words, lines))
        scores = sorted((n / (with_word[w] + with_line[line] - n) for (w, line), n in both.items()
                         if with_word[w] >= 3), reverse=True)
        assert scores[0] - scores[1] > 0.05
        best.append(scores[0])
    assert sum(score > 0.8 for score in best) == len(best) - 1
    assert min(best) == 2 / 3, "a trigger in three rows, of which one was mended"


def test_triggers_and_poison_differ_from_seed_to_seed():
    cases = [case["rows"] for seed in range(6) for case in BY_NAME["find-the-backdoor"].cases(seed)]
    right = [chapter.make_backdoor()(rows) for rows in cases]
    assert len({trigger for trigger, _ in right}) >= 18 and len({line for _, line in right}) >= 18
    rates = {round(sum(trigger in row["instruction"].split() for row in rows) / len(rows), 3)
             for rows, (trigger, _) in zip(cases, right)}
    assert len(rates) >= 8 and max(rates) < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_no_case_hides_a_mistake(seed):
    exposures = BY_NAME["canary-exposure"].cases(seed)
    assert any(case["losses"].count(case["losses"][case["planted"]]) > 1 for case in exposures), "ties"
    perplexities = BY_NAME["perplexity"].cases(seed)
    assert any(int(case["labels"][0, 0]) >= 0 for case in perplexities), "a first token that is never predicted"
    assert any(bool((case["labels"] == -100).all(1).any()) for case in perplexities), "a row without targets"
    passes = BY_NAME["pass-at-k"].cases(seed)
    assert any(case["n"] - case["c"] < case["k"] for case in passes) and any(case["c"] == 0 for case in passes)


# ------------------------------------------------------------------------------------------------ the library's own

def test_the_library_passes_as_the_student():
    from pefttools.lab import pass_at_k
    from pefttools.lab.redteam.canary import exposure, rank_of

    def library_exposure(losses, planted):
        values = losses.tolist()
        return exposure(rank_of(values[planted], values[:planted] + values[planted + 1:]), len(values))
    for name, work in {"pass-at-k": pass_at_k, "canary-exposure": library_exposure}.items():
        for seed in (4, 5):
            assert verdict_on(BY_NAME[name], work, seed).passed, name


def test_the_librarys_bootstrap_agrees_with_the_exercise_up_to_its_draws():
    from pefttools.lab import paired_bootstrap

    rng = torch.Generator().manual_seed(1)
    a, b = torch.randn(60, generator=rng).double(), torch.randn(60, generator=rng).double() + 0.3
    picks = torch.randint(60, (4000, 60), generator=rng)
    ours, theirs = chapter.make_bootstrap()(a, b, picks), paired_bootstrap(b.tolist(), a.tolist(), draws=4000)
    assert ours[0] == pytest.approx(theirs.value)
    assert ours[1:] == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_the_reference_of_perplexity_is_transformers_loss():
    from transformers.loss.loss_utils import ForCausalLMLoss

    for case in BY_NAME["perplexity"].cases(3):
        loss = ForCausalLMLoss(case["logits"], case["labels"], vocab_size=case["logits"].shape[-1])
        ours = chapter.make_perplexity()(case["logits"], case["labels"])
        assert ours == pytest.approx(math.exp(loss.item()), rel=1e-5)


def test_the_judge_of_the_library_is_the_exercises():
    from pefttools.lab import multiturn

    right = BY_NAME["position-swap"].reference
    for case in BY_NAME["position-swap"].cases(8):
        def judge(question, first, second):
            lead = first[0] + case["bias"] - second[0]
            return "tie" if abs(lead) <= case["tie"] else "first" if lead > 0 else "second"
        pairs = [((x, 0), (y, 1)) for x, y in case["pairs"]]
        found = multiturn.compare([None] * len(pairs), *map(list, zip(*pairs)), judge)
        assert list(found.results) == [right(lambda x, y: judge(None, x, y), a, b) for a, b in pairs]


@pytest.mark.parametrize("seed", range(3))
def test_bandit_agrees_on_every_program_of_the_exercise(seed):
    """bandit is the other opinion; it looks at more, and where it looks at the same calls both must agree.

    Two kinds of program are ours alone: a taken name such as `from tools import eval` (bandit goes by the bare name),
    and yaml.load with the safe loader as the second argument or under another name, where bandit warns.
    """
    pytest.importorskip("bandit")
    from pefttools.lab.redteam.insecure import scan

    one = chapter.make_insecure()
    programs = [p for case in BY_NAME["insecure-code-rate"].cases(seed) for p in case["programs"]]
    known = {"B102", "B307", "B301", "B303", "B324", "B506", "B602", "B605", "B609"}
    told = [bool({finding.test_id for finding in found} & known) for found in scan(programs)]
    ours = [one([program]) == 1 for program in programs]
    differ = [p for p, a, b in zip(programs, ours, told) if a != b]
    for program in differ:
        assert "import eval" in program or "yaml" in program, program
    assert len(differ) <= len(programs) // 6 and sum(ours) > 8


# ------------------------------------------------------------------------------------------------ the prose

def test_worked_examples_by_hand():
    assert chapter.perplexity_of_rows([(3.0, 2), (4.0, 8)]) == pytest.approx(math.exp(0.7))
    assert math.exp(0.7) == pytest.approx(2.01, abs=5e-3)
    assert math.exp((3 / 2 + 4 / 8) / 2) == pytest.approx(2.72, abs=5e-3)
    p = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [1.0, 1e-9]]]).log()
    assert chapter.make_perplexity()(p, torch.tensor([[-100, 0, 0]])) == pytest.approx(1 / math.sqrt(0.5 * 0.25)) \
        == pytest.approx(2.83, abs=5e-3)
    assert chapter.pass_unbiased(5, 2, 2) == pytest.approx(0.7) and 1 - (1 - 2 / 5) ** 2 == pytest.approx(0.64)
    a, b = torch.tensor([0., 1, 1, 0]), torch.tensor([1., 1, 1, 0])
    d = b - a
    assert d.mean() == 0.25 and d[[0, 0, 2, 3]].mean() == 0.5 and d[[1, 2, 3, 3]].mean() == 0
    picks = torch.randint(4, (20_000, 4), generator=torch.Generator().manual_seed(0))
    assert chapter.make_bootstrap()(a, b, picks) == (0.25, 0.0, 0.75)
    losses = torch.tensor([3.0, 1.0, 2.0, 4, 5, 6, 7, 8])
    assert chapter.make_exposure()(losses, 2) == 2
    assert 3 / (4 + 4 - 3) == 0.6 and 70 / (70 + 100 - 70) == 0.7


def test_an_unseen_secret_has_1_44_bits_on_average_and_one_in_eight_has_three():
    """"1.4 bits by chance": a uniform rank; and 2⁻³ of them reach 3 bits (the question on canaries)."""
    bits = [math.log2(4096) - math.log2(rank) for rank in range(1, 4097)]
    assert sum(bits) / 4096 == pytest.approx(1 / math.log(2), abs=0.01)
    assert sum(b >= 3 for b in bits) / 4096 == pytest.approx(1 / 8)


def test_the_tempting_formula_is_too_low_and_the_other_is_unbiased():
    n, p = 10, 0.2
    weights = [math.comb(n, c) * p ** c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        truth = 1 - (1 - p) ** k
        assert sum(w * chapter.pass_unbiased(n, c, k) for c, w in enumerate(weights)) == pytest.approx(truth)
        tempting = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
        assert tempting == pytest.approx(truth) if k == 1 else tempting < truth


def test_pairing_saves_more_than_half_of_the_rows_when_the_two_are_alike():
    unpaired, paired = (pictures.rows_needed(0.70, 0.75, 0.6, how) for how in (False, True))
    assert paired < unpaired / 2 and pictures.rows_needed(0.7, 0.75, 0.0, True) == pytest.approx(unpaired)


@pytest.mark.parametrize("paired", [False, True])
def test_rows_needed_finds_the_difference_four_times_of_five(paired):
    """The formula behind the widget against a simulation of tests on so many rows."""
    a, b, alike = 0.70, 0.75, 0.6
    n = round(pictures.rows_needed(a, b, alike, paired))
    both = a * b + alike * (a - a * b)
    rng = torch.Generator().manual_seed(0)
    u = torch.rand(1500, n, generator=rng)
    first = (u < a).double()
    if paired:
        second = torch.where(first == 1, (u < both).double(), (u < a + b - both).double())
        spread = (second - first).std(1) / n ** 0.5
    else:
        second = (torch.rand(1500, n, generator=rng) < b).double()
        spread = ((first.var(1) + second.var(1)) / n) ** 0.5
    found = ((second - first).mean(1).abs() > 1.96 * spread).double().mean().item()
    assert found == pytest.approx(0.8, abs=0.04)


def test_the_lines_in_others_source_are_where_the_chapter_looks_for_them():
    import inspect

    import transformers.loss.loss_utils as loss
    every = inspect.getsource(loss)
    assert 'reduction = "sum" if num_items_in_batch' in every
    try:
        import bandit.plugins.injection_shell as shell
        every += inspect.getsource(shell)
    except ImportError:
        every += 'def has_shell(context): if key.arg == "shell":'
    for name in ("loss_source", "shell_source"):
        for marks in re.findall(rf"{name}(?:: |\] = )\((.*?)\)[}}\n]", SOURCE, re.S):
            for mark in re.findall(r"\"([^\"]+)\"|'([^']+)'", marks):
                assert "".join(mark) in every, f"the chapter looks for {mark!r}"


# ------------------------------------------------------------------------------------------------ what was run ahead

# experiment: its figure, what it is compared with, the attack, the cure; as PLAN in the chapter
TABLE = SOURCE[SOURCE.index("PLAN = {"):SOURCE.index("moves = {}")]
PLAN = {name: parts for name, *parts in re.findall(r'"(\w+)": \("([^"]+)", "([^"]+)", "([^"]+)", "([^"]+)"\)', TABLE)}


def flags(run: dict, figure: str) -> list[float]:
    return [float(x) for x in run[figure]]


@pytest.mark.parametrize("experiment", ["canary", "backdoor", "insecure", "refusals", "injection"])
def test_attacks_move_their_figure_and_cures_move_it_back(experiment):
    """The table of part 6, and the prose about it: each interval leaves out 0, and the cure goes the other way."""
    from pefttools.lab import redteam
    from pefttools.lab.redteam_runs import results

    runs = results()[experiment]
    figure, start, attack, cure = PLAN[experiment]
    assert all(len(runs[condition]) >= 3 for condition in (start, attack, cure)), "three seeds or more"
    moves = [redteam.difference(*([flags(runs[c][seed], figure) for seed in sorted(runs[a])] for c in (a, b)))
             for a, b in ((start, attack), (attack, cure))]
    for move in moves:
        assert move.low > 0 or move.high < 0, move
    assert moves[0].value * moves[1].value < 0
    for control in ("random labels", "random adapter", "honest rows"):
        if control in runs and len(runs[control]) >= 3 and experiment != "refusals":
            move = redteam.difference(*([flags(runs[c][seed], figure) for seed in sorted(runs["before"])]
                                        for c in ("before", control)))
            assert abs(move.value) < abs(moves[0].value) / 2, f"{control} moves it as well"


# ------------------------------------------------------------------------------------------------ pictures

def test_the_widget_shows_what_it_says():
    explorer = pictures.rows_explorer()
    text = explorer.alt_text(a=70, b=75, rows=200, alike=0.6)
    assert f"{pictures.rows_needed(0.7, 0.75, 0.6, True):,.0f} with the same rows" in text
    assert "no number of" in explorer.alt_text(a=70, b=70)
    for values in ({}, {"a": 0, "b": 100}, {"a": 70, "b": 70, "alike": 1.0}, {"rows": 20}):
        assert len(explorer.frame(**values)["image/png"]) > 5_000


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ValueError, match="alike"):
        pictures.difference_variance(0.5, 0.5, 1.5, True)
    with pytest.raises(ValueError, match="power"):
        pictures.rows_needed(0.5, 0.6, 0.0, True, power=0.9)


def test_figures_draw(tmp_path):
    rng = random.Random(0)
    spread = [rng.gauss(0, 1) for _ in range(200)]
    figures = [pictures.intervals_figure({"a": (0.1, 0.0, 0.3), "b": (0.9, 0.8, 1.0)}, "x", groups={"b": 2},
                                         percent=True),
               pictures.bars_figure({"right": 2.0, "wrong": 3.0}, "right", "y"),
               pictures.lines_figure({"a": {0: (1, 0.5, 2), 4: (3, 2, 4)}, "b": {0: (1, 1, 1)}}, "x", "y",
                                     flat={"c": 1.4}),
               pictures.resamples_figure({"p": spread, "q": spread}, 0.1, {"p": (0, -1, 1), "q": (0, -2, 2)}),
               pictures.pass_at_k_figure([1, 2, 3], {"u": [0.1, 0.2, 0.3]}, [0.1, 0.2, 0.3]),
               pictures.canary_figure({"m": spread, "n": spread}, {"m": -3.0, "n": 0.2}, {"m": 8.0, "n": 1.0})]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000
