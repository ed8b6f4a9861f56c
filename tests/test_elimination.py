"""Row elimination: each step does what its words say, the forms are right, and wrong input is refused."""
from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pefttools.elimination import row_echelon

pytestmark = pytest.mark.usefixtures("one_thread")

entries = st.integers(-4, 4)
matrices = st.tuples(st.integers(1, 5), st.integers(1, 6)).flatmap(
    lambda shape: st.lists(st.lists(entries, min_size=shape[1], max_size=shape[1]),
                           min_size=shape[0], max_size=shape[0]))
deficient = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 6), st.integers(0, 999)).map(
    lambda p: (np.random.default_rng(p[3]).integers(-3, 4, (p[0], p[1]))
               @ np.random.default_rng(p[3] + 1).integers(-3, 4, (p[1], p[2]))).tolist())


def value(text):
    return Fraction(text.replace("−", "-").strip("()·") or "1")


def perform(operation, rows):
    """Do what the words of an operation say, as a reader with a pencil would."""
    rows = [list(row) for row in rows]
    if found := re.fullmatch(r"R(\d+) ↔ R(\d+)", operation):
        i, j = (int(x) - 1 for x in found.groups())
        rows[i], rows[j] = rows[j], rows[i]
    elif found := re.fullmatch(r"R(\d+) ← R\1 ([−+]) (.*?)R(\d+)", operation):
        target, sign, factor, source = found.groups()
        factor = value(factor) if sign == "+" else -value(factor)
        rows[int(target) - 1] = [a + factor * b for a, b in zip(rows[int(target) - 1], rows[int(source) - 1])]
    elif found := re.fullmatch(r"R(\d+) ← R\1 / (.*)", operation):
        rows[int(found[1]) - 1] = [x / value(found[2]) for x in rows[int(found[1]) - 1]]
    else:
        raise AssertionError(f"no operation: {operation}")
    return tuple(map(tuple, rows))


def test_the_docstrings_example_step_by_step():
    way = row_echelon([[1, 2, 3], [2, 4, 6], [1, 1, 1]])
    assert [step.operation for step in way.steps] == ["A", "R2 ← R2 − 2·R1", "R3 ← R3 − R1", "R2 ↔ R3"]
    assert way.matrix == ((1, 2, 3), (0, -1, -2), (0, 0, 0))
    assert (way.rank, way.pivots, way.tolerance) == (2, (0, 1), 0)
    assert row_echelon([[1, 2, 3], [2, 4, 6], [1, 1, 1]], reduced=True).matrix == ((1, 0, -1), (0, 1, 2), (0, 0, 0))
    assert str(way).endswith("R2 ↔ R3\n  [ 1   2   3 ]\n  [ 0  −1  −2 ]\n  [ 0   0   0 ]\nrank 2")


@given(st.one_of(matrices, deficient), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_step_does_what_its_words_say(A, reduced):
    way = row_echelon(A, reduced)
    assert way.steps[0].matrix == tuple(map(tuple, A))
    for before, step in zip(way.steps, way.steps[1:]):
        assert perform(step.operation, before.matrix) == step.matrix, step.operation
        assert step.matrix != before.matrix, f"{step.operation} changes nothing"


@given(st.one_of(matrices, deficient))
@settings(max_examples=100, deadline=None)
def test_reduced_form_equals_sympys(A):
    from sympy import Matrix

    expected, pivots = Matrix(A).rref()
    way = row_echelon(A, reduced=True)
    assert way.matrix == tuple(tuple(Fraction(x.p, x.q) for x in expected.row(i)) for i in range(expected.rows))
    assert way.pivots == pivots == row_echelon(A).pivots


@given(st.one_of(matrices, deficient))
@settings(max_examples=150, deadline=None)
def test_echelon_form_and_rank_exact_and_in_floats(A):
    for given_as in (A, np.array(A, dtype=float), torch.tensor(A, dtype=torch.float32)):
        way = row_echelon(given_as)
        assert way.rank == np.linalg.matrix_rank(A)
        leading = [next((j for j, x in enumerate(row) if x), None) for row in way.matrix]
        assert leading[:way.rank] == list(way.pivots) == sorted(set(way.pivots))
        assert leading[way.rank:] == [None] * (len(A) - way.rank)
        assert np.linalg.matrix_rank(np.vstack([A, np.array(way.matrix, dtype=float)])) == way.rank     # same row span


def test_exact_where_floats_are_not():
    tenth = Fraction(1, 10)
    singular = [[tenth, 2 * tenth, 3 * tenth], [3 * tenth, 6 * tenth, 9 * tenth]]
    assert row_echelon(singular).rank == 1
    big = [[10**17, 10**17 + 1], [10**17 - 1, 10**17]]                  # determinant 1, lost in float64
    assert row_echelon(big).rank == 2 and row_echelon([[float(x) for x in row] for row in big]).rank == 1
    huge = row_echelon(np.array([[2**62, 2**62 - 1], [2**62 - 1, 2**62 - 2]]))      # int64 would overflow
    of_numpy = [[np.int64(2**62), np.int64(3)], [np.int64(7), np.int64(2**62)]]
    assert row_echelon(of_numpy).matrix[1][1] == 2**62 - Fraction(21, 2**62)
    assert huge.rank == 2 and all(isinstance(x, Fraction) for row in huge.matrix for x in row)


def test_partial_pivoting_keeps_small_pivots_from_ruining_the_result():
    way = row_echelon([[1e-20, 1.0], [1.0, 1.0]], tol=0)
    assert way.steps[1].operation == "R1 ↔ R2" and way.matrix == ((1.0, 1.0), (0.0, 1.0))
    assert row_echelon([[1, 1], [2, 5]]).steps[1].operation != "R1 ↔ R2"   # exact: the order of the page is kept


def test_no_factor_above_one_and_no_negative_zero():
    generator = torch.Generator().manual_seed(0)
    way = row_echelon(torch.randn(9, 7, generator=generator))
    factors = [value(m[1]) for s in way.steps if (m := re.search(r"[−+] (\S+·|)R\d+$", s.operation))]
    assert len(factors) == sum(8 - i for i in range(7)) and max(factors) <= 1
    assert all(way.matrix[i][j] == 0 for j in range(7) for i in range(j + 1, 9))      # exactly, not 1e-17
    assert "−0 " not in str(row_echelon([[0.0, -1.0], [-2.0, 0.0]], reduced=True))


def test_float_rank_within_the_stated_tolerance():
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(12, 3, generator=generator) @ torch.randn(3, 9, generator=generator)      # noise of float32 in it
    way = row_echelon(A)
    assert way.rank == 3 and way.tolerance == A.abs().max().item() * (12 * torch.finfo(torch.float32).eps)
    assert row_echelon(A, tol=0).rank == 9                       # without a tolerance the noise counts
    assert sum("within the tolerance" in step.operation for step in way.steps) == 6
    assert row_echelon(A.double()).rank == 9                     # in float64 that noise is data
    assert row_echelon(A.bfloat16()).tolerance == A.bfloat16().float().abs().max().item() * (12 * 2**-23)
    assert row_echelon([[1e308, -1e308], [0.0, 0.0]]).rank == 1  # the tolerance does not overflow


def test_steps_share_the_rows_they_do_not_change():
    steps = row_echelon([[1, 2], [3, 4], [5, 6]]).steps
    assert steps[1].matrix[0] is steps[0].matrix[0] and steps[1].matrix[2] is steps[0].matrix[2]


@pytest.mark.parametrize("bad, error, words", [
    ([1, 2], ValueError, "matrix with at least one row"), ([], ValueError, "matrix"), ([[]], ValueError, "one column"),
    ("12", ValueError, "matrix"), (torch.ones(2, 2, 2), ValueError, "two dimensions"),
    (torch.ones(()), ValueError, "matrix"),
    ([[1, 2], [3]], ValueError, r"equally long; got lengths \[1, 2\]"),
    ([[1, float("nan")]], ValueError, r"A\[0\]\[1\] is nan"),
    (np.array([[np.inf]]), ValueError, "finite"), ([[1j]], TypeError, "1j"), ([["a"]], TypeError, "'a'"),
    (None, ValueError, "None"),
])
def test_refuses(bad, error, words):
    with pytest.raises(error, match=words):
        row_echelon(bad)


@pytest.mark.parametrize("A, tol", [([[1, 2]], 0.1), ([[1.0, 2]], -1), ([[1.0]], float("nan")), ([[1.0]], "x")])
def test_refuses_a_tolerance_that_makes_no_sense(A, tol):
    with pytest.raises(ValueError, match="tol"):
        row_echelon(A, tol=tol)
