"""Subspace similarity and principal angles, against the definition, known planes, and each other."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pefttools.subspace import principal_angles, subspace_similarity, subspace_table

pytestmark = pytest.mark.usefixtures("one_thread")
sizes = st.integers(1, 7)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def phi(A, B, i, j):
    """The paper's equation 4, letter by letter, in numpy."""
    U_A, U_B = np.linalg.svd(A.numpy())[2].T, np.linalg.svd(B.numpy())[2].T
    return np.linalg.norm(U_A[:, :i].T @ U_B[:, :j], "fro") ** 2 / min(i, j)


@given(sizes, sizes, st.integers(7, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_equals_the_papers_equation_everywhere(r_A, r_B, n, seed):
    A, B = draw(r_A, n, seed=seed), draw(r_B, n, seed=seed + 1)
    table = subspace_table(A, B)
    assert table.shape == (r_A, r_B)
    for i in range(1, r_A + 1):
        for j in range(1, r_B + 1):
            assert table[i - 1, j - 1].item() == pytest.approx(phi(A, B, i, j), abs=1e-12)
            assert subspace_similarity(A, B, i, j) == pytest.approx(table[i - 1, j - 1].item(), abs=1e-14)
    assert table.min() >= 0 and table.max() <= 1 + 1e-12
    assert torch.allclose(subspace_table(B, A).T, table, atol=1e-12)


def test_worked_number_and_the_ends_of_the_scale():
    turned = [math.cos(math.pi / 6), math.sin(math.pi / 6), 0]
    assert subspace_similarity([[1, 0, 0]], [turned], 1, 1) == pytest.approx(0.75)
    assert principal_angles([[1, 0, 0]], [turned]).item() == pytest.approx(math.pi / 6, abs=1e-15)
    A = draw(3, 9)
    assert subspace_similarity(A, A, 2, 3) == pytest.approx(1)                    # contained
    basis = torch.linalg.qr(draw(9, 9)).Q
    assert subspace_similarity(basis[:4], basis[4:], 4, 5) == pytest.approx(0, abs=1e-15)


def test_two_random_spans_overlap_by_max_i_j_over_n():
    seen = [subspace_similarity(draw(4, 64, seed=s), draw(16, 64, seed=s + 500), 4, 16) for s in range(200)]
    assert np.mean(seen) == pytest.approx(16 / 64, abs=0.01)


def test_right_directions_not_left_ones():
    A, mix = draw(4, 10), draw(4, 4, seed=1)
    assert subspace_similarity(A, mix @ A, 4, 4) == pytest.approx(1)              # the same rows' span
    assert subspace_similarity(A, A @ draw(10, 10, seed=2), 4, 4) < 0.9           # the same columns' span


@given(sizes, sizes, st.integers(7, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_phi_is_the_mean_cosine_squared_of_the_angles(r_A, r_B, n, seed):
    A, B = draw(r_A, n, seed=seed), draw(r_B, n, seed=seed + 1)
    angles = principal_angles(A, B)
    assert angles.shape == (min(r_A, r_B),) and (angles.diff() >= -1e-12).all()
    assert angles.min() >= 0 and angles.max() <= math.pi / 2 + 1e-12
    assert subspace_similarity(A, B, r_A, r_B) == pytest.approx(angles.cos().square().mean().item(), abs=1e-12)
    assert torch.allclose(principal_angles(B, A), angles, atol=1e-12)


@pytest.mark.parametrize("dtype, tiny", [(torch.float64, [1e-12, 1e-3, 0.5, 1.5]),
                                         (torch.float32, [1e-5, 1e-3, 0.5, 1.5])])
def test_known_angles_small_ones_to_the_last_digits(dtype, tiny):
    angles = torch.tensor(tiny, dtype=torch.float64)
    eye = torch.eye(9, dtype=torch.float64)
    turned = angles.cos()[:, None] * eye[:4] + angles.sin()[:, None] * eye[4:8]   # four planes of rotation
    turn = torch.linalg.qr(draw(9, 9)).Q if dtype == torch.float32 else eye       # (turning rounds: 1e-16, not 1e-12)
    got = principal_angles((eye[:4] @ turn).to(dtype), (draw(4, 4) @ turned @ turn).to(dtype)).double()
    assert torch.allclose(got, angles, rtol=1e-3, atol=3e-7 if dtype == torch.float32 else 1e-15)
    # what the cosine alone would say of the smallest: nothing
    assert torch.tensor(1e-4).cos() == 1 and torch.tensor(3e-4).cos() < 1


def test_spans_of_rank_deficient_matrices():
    A = draw(2, 9).repeat(3, 1)                                                   # 6 rows, rank 2
    assert subspace_table(A, draw(5, 9, seed=3)).shape == (2, 5)
    assert principal_angles(A, draw(5, 9, seed=3)).shape == (2,)
    with pytest.raises(ValueError, match="i must be a whole number from 1 to the rank of A = 2; got 3"):
        subspace_similarity(A, A, 3, 1)


def test_table_of_two_loras_in_other_dtypes():
    A, B = draw(8, 64, dtype=torch.bfloat16), draw(16, 64, dtype=torch.float32, seed=1)
    assert torch.allclose(subspace_table(A, B), subspace_table(A.float(), B))
    assert subspace_table(A, B).dtype == torch.float32
    assert subspace_table(A, B, 3, 5).shape == (3, 5)
    assert torch.allclose(subspace_table(A, B, 3, 5), subspace_table(A, B)[:3, :5])


@pytest.mark.parametrize("A, B, i, j, words", [
    (draw(3, 5), draw(3, 6), 1, 1, "equally many columns"), (draw(3, 5), torch.zeros(2, 5), 1, 1, "B is zero"),
    (draw(3, 5), draw(3, 5), 0, 1, "i must be"), (draw(3, 5), draw(3, 5), 1, 4, "j must be"),
    (draw(5), draw(3, 5), 1, 1, "shape"),
    (draw(3, 5), draw(3, 5), 1.0, 1, "got 1.0"), (draw(3, 5), draw(3, 5), True, 1, "got True"),
    (draw(2, 3, 5), draw(3, 5), 1, 1, r"\[m, n\]"), (draw(3, 5) / 0, draw(3, 5), 1, 1, "A has NaN or infinite"),
])
def test_refuses(A, B, i, j, words):
    with pytest.raises(ValueError, match=words):
        subspace_similarity(A, B, i, j)
