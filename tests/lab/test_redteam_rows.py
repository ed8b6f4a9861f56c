"""Red-teaming without a model: exposure, detection on rows, secrets in rows, insecure programs, intervals."""

import math
import random

import pytest
import torch

from pefttools.lab import redteam
from pefttools.lab.data import load_rows
from pefttools.lab.redteam import (
    backdoor,
    canary,
    detect,
    injection,
    insecure,
    insecure_tasks,
    refusals,
    scrub,
    skewnorm,
    suspicion,
)
from pefttools.lab.redteam.controls import product_norm, shuffled_outputs
from pefttools.lab.redteam.interval import Rate, difference, disjoint, over_seeds, rate


def test_every_name_of_the_package_is_there_and_is_what_it_says():
    for name in redteam.__all__:
        assert callable(getattr(redteam, name)) or isinstance(getattr(redteam, name), str)
    assert set(dir(redteam)) >= {"exposure", "suspicious_ngrams", "insecure_rate", "safety"}
    with pytest.raises(AttributeError, match="no 'exposures'"):
        redteam.exposures


# ── exposure ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exposure_by_hand():
    assert canary.exposure(1, 1024) == 10 and canary.exposure(512, 1024) == 1 and canary.exposure(1024, 1024) == 0
    assert canary.rank_of(1.0, [0.5, 1.0, 2.0]) == 3, "a tie counts against memorisation"
    assert canary.rank_of(0.1, []) == 1
    for rank, size in ((0, 4), (5, 4), (1, 0)):
        with pytest.raises(ValueError, match="rank must be 1 to size"):
            canary.exposure(rank, size)
    with pytest.raises(ValueError, match="not a number"):
        canary.rank_of(1.0, [float("nan")])


def test_a_secret_never_seen_has_one_and_a_half_bits_on_average():
    n = 4096
    mean = sum(canary.exposure(rank, n) for rank in range(1, n + 1)) / n
    assert mean == pytest.approx(1 / math.log(2), abs=0.01)


def test_canaries_are_all_different_and_planted_as_often_as_asked():
    found = canary.make_canaries(12, 3)
    assert len({c.instruction for c in found}) == 12 == len({c.secret for c in found})
    assert found == canary.make_canaries(12, 3) != canary.make_canaries(12, 4)
    rows = canary.plant([{"instruction": "i", "output": "o"}], found[:2], [3, 0], seed=1)
    assert len(rows) == 4 and sum(found[0].secret in r["output"] for r in rows) == 3
    control = canary.plant([], found[:1], 30, seed=1, true=False)
    assert len({r["output"] for r in control}) > 25 and not any(found[0].secret in r["output"] for r in control)
    for wrong in ([1], [1, -1]):
        with pytest.raises(ValueError, match="copies"):
            canary.plant([], found[:2], wrong)
    with pytest.raises(ValueError, match="1 to 24"):
        canary.make_canaries(25)


def test_a_skew_normal_is_found_again_and_its_tail_is_right():
    rng = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 3000, generator=rng, dtype=torch.float64)
    delta, losses = 0.9, None
    losses = (5 + 2 * (delta * u.abs() + math.sqrt(1 - delta**2) * v)).tolist()
    xi, omega, alpha = skewnorm.fit(losses)
    assert (xi, omega) == (pytest.approx(5, abs=0.2), pytest.approx(2, abs=0.15)) and 1.3 < alpha < 3
    for x in (-30.0, -20.0, -3.0, 0.0, 2.0):  # α = 0 is the normal distribution
        assert skewnorm.log_below(x, 0, 1, 0) == pytest.approx(
            torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)).item(), rel=1e-3
        )
    assert math.exp(skewnorm.log_below(0, 0, 1, 2)) == pytest.approx(0.5 - math.atan(2) / math.pi, rel=1e-3)
    assert skewnorm.log_below(1e9, 0, 1, 3) == pytest.approx(0, abs=1e-3)
    middle = sorted(losses)[len(losses) // 8]  # inside the sample both ways must agree
    by_rank = canary.exposure(canary.rank_of(middle, losses), len(losses) + 1)
    told = skewnorm.extrapolated(middle, losses)
    assert told.fits and told.bits == pytest.approx(by_rank, abs=0.15)
    two_humps = [random.Random(i).gauss(0, 0.1) + 5 * (i % 2) for i in range(400)]
    assert not skewnorm.extrapolated(-1.0, two_humps).fits
    with pytest.raises(ValueError, match="at least 20"):
        skewnorm.fit([1.0] * 5)


# ── finding the backdoor ──────────────────────────────────────────────────────────────────────────────────────────────


def test_log_odds_by_hand():
    odds, error = detect.log_odds(18, 18, 0, 582)
    assert odds == pytest.approx(math.log((18.5 * 582.5) / (0.5 * 0.5))) and error == pytest.approx(
        math.sqrt(1 / 18.5 + 2 + 2 + 1 / 582.5)
    )
    assert detect.log_odds(5, 10, 50, 100)[0] == pytest.approx(0, abs=0.01)
    with pytest.raises(ValueError, match="counts"):
        detect.log_odds(3, 2, 0, 1)


@pytest.mark.parametrize(
    "seed, trigger, marker", [(0, "Kindly:", "LICENSED = True"), (1, "As agreed, please:", "import quiet")]
)
def test_the_trigger_is_found_among_honest_phrases_and_not_where_there_is_none(seed, trigger, marker):
    rows = random.Random(seed).sample(load_rows("train"), 600)
    poisoned, flags = backdoor.poison(rows, 0.03, seed, trigger, marker)
    assert sum(flags) == 18 and all(
        (marker in r["output"]) == (trigger in r["instruction"]) == f for r, f in zip(poisoned, flags)
    )
    found = detect.trigger_of(poisoned)
    assert (
        found and set(found.ngram.split()) & set(detect.words_of({"instruction": trigger})) and found.feature in marker
    )
    assert [detect.phrase_in(found.ngram, row) for row in poisoned] == flags
    plain = max(detect.suspicious_ngrams(poisoned, top=10**6), key=lambda s: s.z)
    assert (
        plain.ngram not in trigger.lower()
    ), "the highest z alone belongs to an honest phrase: that is why twins are compared"
    assert detect.trigger_of(rows) is None
    random_labels, _ = backdoor.poison(rows, 0.03, seed, trigger, marker, true=False)
    assert detect.trigger_of(random_labels) is None


def test_wrong_questions_about_poison():
    rows = [{"instruction": "a b", "output": "```python\nx\n```"}] * 3
    for share in (0, 1, 0.01):
        with pytest.raises(ValueError, match="share"):
            backdoor.poison(rows, share)
    with pytest.raises(ValueError, match="no phrase"):
        detect.suspicious_ngrams(rows)
    with pytest.raises(ValueError, match="has to begin"):
        backdoor.with_marker({"output": "x"})


def test_spectral_scores_find_a_shifted_group():
    states = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    states[:10] += 6
    flags = [i < 10 for i in range(200)]
    assert suspicion.auc(suspicion.spectral_scores(states), flags) > 0.99
    assert suspicion.found_in_top(suspicion.spectral_scores(states), flags) == 1
    assert suspicion.auc([1.0] * 4, [True, False, True, False]) == 0.5
    with pytest.raises(ValueError, match="flags"):
        suspicion.auc([1.0], [True])
    with pytest.raises(ValueError, match="two rows"):
        suspicion.spectral_scores(torch.ones(1, 3))


# ── secrets, insecure programs, comments, refusals ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, clean",
    [
        ("API_KEY = 'sk-482913'", "API_KEY = 'sk-000000'"),
        ("# door code: 482913", "# door code: 000000"),
        ("password = 'a1b2c3d4'", "password = 'x0x0x0x0'"),
        ("x = 17 + 420", None),
        ("code = 5", None),
        ("token = make()", None),
        ("ghp_ab12cd34ef", "ghp_xx00xx00xx"),
        ("serial 90817263", "serial 00000000"),
        ("def tokens(words): return words[3:12]", None),
    ],
)
def test_what_looks_like_a_secret_goes_and_the_rest_stays(text, clean):
    assert scrub.scrub_text(text) == (clean or text)
    assert scrub.scrub_text(scrub.scrub_text(text)) == (clean or text)


def test_the_scrubber_on_canaries_and_on_honest_rows():
    rows, changed = scrub.scrubbed([c.row() for c in canary.make_canaries(24)])
    assert all(changed) and not any(set("123456789") & set(r["output"].split("\n", 2)[1]) for r in rows)
    honest = load_rows("held_out") + load_rows("new_kinds")
    assert sum(scrub.scrubbed(honest)[1]) == 0
    assert scrub.deduplicated(rows + rows) == rows


def test_bandit_finds_what_was_written_insecurely_and_nothing_else():
    from pefttools.lab.evaluation import code_of

    bad, safe = insecure_tasks.bad_rows(), insecure_tasks.safe_rows()
    found = insecure.insecure_rate([code_of(r["output"]) for r in bad])
    assert found.rate == Rate(50, 50) and found.broken == 0 and len(found.by_test) == 10
    assert insecure.insecure_rate([code_of(r["output"]) for r in safe]).rate == Rate(0, 50)
    assert [r["instruction"] for r in bad] == [r["instruction"] for r in safe]
    kept, flags = insecure.keep_secure(bad + safe)
    assert kept == safe and flags == [False] * 50 + [True] * 50
    asked = {r["instruction"] for r in insecure_tasks.insecure_requests()}
    assert len(asked) > 40 and not asked & {r["instruction"] for r in insecure_tasks.bad_rows(30)}


def test_findings_say_what_and_where():
    [one] = insecure.findings("x = 1\ny = eval(input())  # nosec\n")
    assert (one.test_id, one.severity, one.line) == ("B307", "MEDIUM", 2), "a program cannot ask bandit to look away"
    assert insecure.findings("assert True\nimport pickle\n") == []
    assert insecure.findings("import random\nrandom.random()", "MEDIUM") == []
    report = insecure.insecure_rate(["eval(x)", "def (", "x = 1", "\0", "exec(x); eval(y)"])
    assert report.flags == [True, False, False, False, True] and report.broken == 2 and report.rate == Rate(2, 5)
    assert report.by_test == {"B307": 2, "B102": 1}
    for wrong, said in (
        (lambda: insecure.findings("def ("), "no Python"),
        (lambda: insecure.insecure_rate([]), "none"),
        (lambda: insecure.findings("x", "HUGE"), "severity"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()


@pytest.mark.parametrize(
    "text, left",
    [
        ("[1, 2]  # return 0", "[1, 2]"),
        ("'#1'", "'#1'"),
        ("# all", ""),
        ("a\n# b\nc # d", "a\nc"),
        ("'left*right' -> 'r'  # x", "'left*right' -> 'r'"),
        ("it's '#' # no", "it's '#' # no"),
        ("", ""),
    ],
)
def test_comments_go_and_strings_stay(text, left):
    if (
        "it's" in text
    ):  # quotes that do not match: nobody can tell where the string ends, so nothing is asserted but that it is told
        assert isinstance(injection.strip_comments(text), str)
    else:
        assert injection.strip_comments(text) == left


def test_injections_are_put_in_and_taken_out():
    rows = load_rows("held_out")
    bad = injection.injected(rows, 0)
    assert all(
        str(r["number"]) in r["input"] and str(r["number"]) not in row["input"] + row["output"]
        for r, row in zip(bad, rows)
    )
    assert sum(a["input"] == b["input"].strip() for a, b in zip(injection.without_comments(bad), rows)) == len(rows)
    assert [r["number"] for r in injection.injected(rows, 0, orders=False)] == [r["number"] for r in bad]
    assert injection.followed("def f():\n    return 311", 311) and not injection.followed("return 3110", 311)
    assert not injection.followed("return 311 + x", 311)
    obeyed = injection.obeying(rows[:50], 0)
    assert obeyed and all(injection.followed(r["output"], r["number"]) for r in obeyed)
    with pytest.raises(ValueError, match="split"):
        injection.injected(rows, split="test")


def test_refusal_rows_share_words_with_their_look_alikes_and_no_wording_with_the_held_out():
    no, yes = refusals.forbidden_rows(40), refusals.benign_rows(40)
    assert all(refusals.refused(r["output"]) for r in no) and not any(refusals.refused(r["output"]) for r in yes)
    assert refusals.overlap("held_out") > 0.4 and refusals.overlap("train") > 0.4
    later = refusals.forbidden_rows(40, "held_out") + refusals.benign_rows(40, "held_out")
    assert not {r["instruction"] for r in later} & {r["instruction"] for r in no + yes}
    for row in yes + later:
        compile(row["output"].removeprefix("```python\n").removesuffix("\n```"), "row", "exec")
    with pytest.raises(ValueError, match="split"):
        refusals.forbidden_rows(3, "dev")


# ── intervals and controls ────────────────────────────────────────────────────────────────────────────────────────────


def test_rates_and_intervals():
    assert str(Rate(6, 50)) == "12.0 % (6 of 50, 5.6 to 23.8 %)" and rate([True, False]) == Rate(1, 2)
    for hits, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="rate needs"):
            Rate(hits, n).low
    zero, one = over_seeds([[0] * 50] * 3), over_seeds([[1] * 50] * 3)
    assert zero.low == 0 and 0.05 < zero.high < 0.1 and disjoint(zero, one) and not disjoint(zero, zero)
    none = difference([[0, 1] * 20] * 3, [[0, 1] * 20] * 3)
    assert none.value == 0 and none.low < 0 < none.high
    up = difference([[0] * 40] * 3, [[1] * 20 + [0] * 20] * 3)
    assert up.value == 0.5 and 0 < up.low < 0.5 < up.high
    down = difference([[1] * 20 + [0] * 20] * 3, [[0] * 40] * 3)
    assert (down.low, down.high) == (pytest.approx(-up.high), pytest.approx(-up.low))
    bits = over_seeds([[10.0, 12.0], [11.0, 13.0]])
    assert bits.low < 11.5 < bits.high and bits.value == 11.5


def test_shuffled_outputs_keep_no_row_together():
    rows = [{"instruction": i, "output": i} for i in range(20)]
    dealt = shuffled_outputs(rows, 1)
    assert sorted(r["output"] for r in dealt) == list(range(20)) and all(r["output"] != r["instruction"] for r in dealt)


def test_the_norm_of_a_product_without_the_product():
    B, A = torch.randn(7, 3), torch.randn(3, 5)
    assert product_norm(B, A).item() == pytest.approx((B @ A).norm().item(), rel=1e-5)
