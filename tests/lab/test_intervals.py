"""Bootstrap intervals hold the truth about as often as they say; and where they do not, by how much."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from pefttools.lab import Interval, bootstrap, paired_bootstrap, wilson

TRIALS = 400  # the share of 400 intervals that hold the truth has a standard error of 1.1 %


def share(make, truth: float) -> float:
    """How many of TRIALS intervals of `make(rng)` hold `truth`."""
    return sum(truth in make(np.random.default_rng(i)) for i in range(TRIALS)) / TRIALS


def test_coverage_of_a_mean():
    assert 0.92 <= share(lambda rng: bootstrap(rng.exponential(1.0, 200), draws=400), 1.0) <= 0.98
    assert 0.92 <= share(lambda rng: bootstrap(rng.random(100) < 0.3, draws=400), 0.3) <= 0.98


def test_coverage_of_a_loss_per_token():
    def one(rng):
        tokens = rng.integers(5, 60, 120)
        return bootstrap(rng.gamma(tokens, 2.0), tokens, draws=400)  # 2 nats a token, rows of all lengths

    assert 0.92 <= share(one, 2.0) <= 0.98


def test_coverage_of_a_paired_difference_and_it_is_the_narrower_one():
    widths = []

    def one(rng):
        hard = rng.normal(0, 1.0, 100)  # what makes a row hard does so for both
        a, b = (hard + rng.normal(mean, 0.3, 100) for mean in (0.2, 0.0))
        found = paired_bootstrap(a, b, draws=400)
        apart = bootstrap(a, draws=400), bootstrap(b, draws=400)
        widths.append((found.high - found.low, math.hypot(*(i.high - i.low for i in apart))))
        return found

    assert 0.92 <= share(one, 0.2) <= 0.98
    assert np.mean([p for p, _ in widths]) < 0.5 * np.mean([u for _, u in widths])


def seeds_and_rows(rng, seeds, rows=60):
    return 0.5 + rng.normal(0, 0.3, (seeds, 1)) + rng.normal(0, 0.5, (1, rows)) + rng.normal(0, 0.3, (seeds, rows))


def test_coverage_over_seeds_and_rows_and_what_rows_alone_would_claim():
    assert 0.90 <= share(lambda rng: bootstrap(seeds_and_rows(rng, 12), draws=400), 0.5) <= 0.98
    rows_only = share(lambda rng: bootstrap(seeds_and_rows(rng, 1)[0], draws=400), 0.5)
    assert rows_only < 0.5  # one run's interval over rows is mostly wrong about the next run


def test_three_seeds_are_too_few():
    """As the docstring says: the spread that is seen is √(2/3) of the true one."""
    three = share(lambda rng: bootstrap(seeds_and_rows(rng, 3), draws=400), 0.5)
    assert 0.65 < three < 0.92


def test_an_interval_of_a_large_sample_is_that_of_the_central_limit_theorem():
    values = np.random.default_rng(0).normal(3, 2, 2000)
    found = bootstrap(values, draws=4000)
    half = NormalDist().inv_cdf(0.975) * values.std() / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    wide = bootstrap(values, draws=4000, level=0.99)
    assert wide.high - wide.low == pytest.approx((found.high - found.low) * 2.576 / 1.960, rel=0.08)


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).exponential(1, 80)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(2))
    mine = bootstrap(values, draws=8000)
    assert (mine.low, mine.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.015)


def test_exact_cases():
    assert bootstrap([0.5] * 7) == Interval(0.5, 0.5, 0.5)
    assert bootstrap([3.0, 30.0], [1, 10]).value == 3.0 and bootstrap([1.0, 2.0]).value == 1.5
    # what both share cancels, row by row
    assert tuple(paired_bootstrap([2, 3, 4], [1, 2, 3])) == pytest.approx((1, 1, 1), abs=1e-12)
    assert bootstrap([[1, 1], [3, 3]]).low == 1.0
    assert bootstrap([1, 2, 3], seed=1) == bootstrap([1, 2, 3], seed=1) != bootstrap([1, 2, 3, 9], seed=1)
    # of two rows a draw has one three times in four at most: 1, 1.5 or 2, never outside
    found = bootstrap([1.0, 2.0])
    assert (found.low, found.high) == (1.0, 2.0)
    many = np.zeros(5000)
    many[:50] = 1
    assert bootstrap(many, draws=3000).low == pytest.approx(0.0074, abs=0.002)  # drawn in several portions


def test_an_interval_reads_well():
    found = Interval(0.5, 0.4, 0.6)
    assert 0.45 in found and 0.7 not in found and found.apart() and not found.apart(0.5)
    assert str(found) == "0.500 (0.400 to 0.600)" and tuple(found) == (0.5, 0.4, 0.6)


@pytest.mark.parametrize("call, words", [
    (lambda: bootstrap([]), "at least one row"),
    (lambda: bootstrap([[1, 2], [3]]), "same rows for every seed"),
    (lambda: bootstrap([[[1]]]), "shape"),
    (lambda: bootstrap([1, float("nan")]), "1 are not"),
    (lambda: bootstrap([1, 2], [1]), "counts must have the shape"),
    (lambda: bootstrap([1, 2], [0, 0]), "not all of them 0"),
    (lambda: bootstrap([1, 2], [-1, 2]), "must not be negative"),
    (lambda: bootstrap([1, 2], draws=5), "at least 100"),
    (lambda: bootstrap([1, 2], level=95), "between 0 and 1, got 95"),
    (lambda: paired_bootstrap([1, 2], [1, 2, 3]), "the same rows"),
])
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_wilson_interval():
    assert wilson(0, 10)[0] == 0.0 and 0.2 < wilson(0, 10)[1] < 0.35  # "none of ten" does not mean never
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
