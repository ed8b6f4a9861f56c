"""Rank and low rank: equal to numpy's and torch's, the theorems hold, the fast ways agree with the slow one."""
from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pefttools.rank as rank
from pefttools.rank import (effective_rank, low_rank, matrix_rank, product_rank, product_svd, randomized_svd,
                            sketched_rank, stable_rank)

pytestmark = pytest.mark.usefixtures("one_thread")
FLOATS = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_rank(m, n, r, seed=0, dtype=torch.float64):
    return draw(m, r, seed=seed, dtype=dtype) @ draw(r, n, seed=seed + 1, dtype=dtype)


def spectrum(values, m, n, seed=0):
    """An m×n matrix with these singular values."""
    U, V = (torch.linalg.qr(draw(size, len(values), seed=seed + i)).Q for i, size in enumerate((m, n)))
    return U * torch.tensor(values, dtype=torch.float64) @ V.T


# ------------------------------------------------------------------------------------------------ matrix_rank

@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.sampled_from(FLOATS), st.integers(0, 99),
       st.sampled_from([None, 0.0, 0.5, 3.0]), st.sampled_from([1e-30, 1.0, 1e30]))
@settings(max_examples=200, deadline=None)
def test_rank_equals_torchs_and_numpys(m, n, r, dtype, seed, tol, scale):
    A, tol = of_rank(m, n, r, seed, dtype) * scale, tol and tol * scale
    got = matrix_rank(A, tol)
    assert isinstance(got, int)
    assert got == torch.linalg.matrix_rank(A, **({} if tol is None else {"atol": tol, "rtol": 0.0})).item()
    if m and n and tol != 0:                # at 0 the noise is counted, and each LAPACK has its own
        assert got == np.linalg.matrix_rank(A.numpy(), tol)
    if tol is None:
        assert got == min(m, n, r)


@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 0)])
def test_rank_of_batches(batch, shape):
    A = of_rank(*shape, 2).expand(*batch, *shape).clone()
    if A.numel():
        A[..., 0, 0, :] *= 0 if len(batch) > 1 else 1
    got = matrix_rank(A)
    assert got.shape == batch and got.dtype == torch.int64
    assert torch.equal(got, torch.linalg.matrix_rank(A))
    each = torch.arange(got.numel(), dtype=torch.float64).reshape(batch)        # a tolerance for every matrix
    assert torch.equal(matrix_rank(A, each), torch.linalg.matrix_rank(A, atol=each, rtol=torch.zeros_like(each)))


def test_rank_at_the_tolerance_itself():
    eps = torch.finfo(torch.float64).eps
    for factor, expected in ((0.9, 1), (1.1, 2)):
        A = torch.diag(torch.tensor([7.0, 7 * 3 * eps * factor], dtype=torch.float64))
        A = torch.cat((A, torch.zeros(1, 2, dtype=torch.float64)))              # 3×2: the longer side counts
        assert matrix_rank(A) == np.linalg.matrix_rank(A.numpy()) == expected
        assert matrix_rank(A.T) == expected


def test_rank_of_lists_integers_and_sixteen_bits():
    assert matrix_rank([[1, 2, 3], [2, 4, 6], [1, 1, 1]]) == matrix_rank(torch.tensor([[1, 2], [3, 4]])) == 2
    assert matrix_rank([[0.1, 0.2], [0.3, 0.6]]) == 1                           # as float64; float32 would say 2 …
    assert matrix_rank(torch.tensor([[1.0, 2, 3]]).T.half()) == matrix_rank(np.array([[1, 2], [2, 4]])[::-1, ::-1]) == 1
    assert rank.row_echelon(np.array([[1, 2], [2, 4]])[::-1, ::-1]).rank == 1
    W = of_rank(64, 48, 16, dtype=torch.float32)
    assert matrix_rank(W) == 16 and matrix_rank(W.bfloat16()) == 48             # rounding fills the spectrum
    assert matrix_rank(W.bfloat16(), tol=1.0) == 16


def test_a_hundred_outputs_of_rank_ten_vary_in_ten_directions():
    W = of_rank(100, 40, 10)
    assert matrix_rank(W) == 10 and matrix_rank(W @ draw(40, 500, seed=5)) == 10
    # yet the gradient of a loss by that W has full rank: training can raise the rank (ERRATA, row 26)
    W.requires_grad_(True)
    (draw(500, 40, seed=6) @ W.T - draw(500, 100, seed=7)).square().sum().backward()
    assert matrix_rank(W.grad) == 40 and matrix_rank(W - 0.01 * W.grad) == 40


# ------------------------------------------------------------------------------------------------ softer ranks

@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 99), st.sampled_from([1e-25, 1.0, 1e25]))
@settings(max_examples=80, deadline=None)
def test_effective_and_stable_rank_by_their_definitions(values, seed, scale):
    A, s = spectrum(values, 9, 7, seed) * scale, np.array(values)
    p = s / s.sum()
    assert effective_rank(A) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert stable_rank(A) == pytest.approx((s ** 2).sum() / s.max() ** 2, rel=1e-9)
    assert 1 - 1e-9 <= stable_rank(A) <= len(values) + 1e-9 and effective_rank(A) <= len(values) + 1e-9


def test_softer_ranks_worked_number_zero_equal_and_batches():
    A = torch.diag(torch.tensor([4.0, 2, 1, 1]))
    assert round(effective_rank(A), 2) == 3.36 and stable_rank(A) == 1.375 and matrix_rank(A) == 4
    assert effective_rank(torch.eye(5) * 3) == pytest.approx(5) and stable_rank(torch.eye(5)) == 5
    assert effective_rank(torch.zeros(3, 4)) == stable_rank(torch.zeros(3, 4)) == effective_rank(torch.zeros(3, 0)) == 0
    batch = torch.stack([A, torch.zeros(4, 4), 1e30 * torch.eye(4)])
    assert torch.allclose(effective_rank(batch), torch.tensor([3.3636, 0, 4]), atol=1e-4)
    assert torch.allclose(stable_rank(batch), torch.tensor([1.375, 0, 4]))


# ------------------------------------------------------------------------------------------------ low rank

@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from(FLOATS), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_eckart_young(m, n, k, dtype, seed):
    k = min(k, m, n)
    W = draw(m, n, seed=seed, dtype=dtype)
    B, A = low_rank(W, k)
    assert (B.shape, A.shape, B.dtype) == ((m, k), (k, n), dtype)
    tail = torch.linalg.svdvals(W)[k:]
    exact = 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-5
    assert torch.linalg.matrix_norm(W - B @ A).item() == pytest.approx(tail.square().sum().sqrt().item(), abs=exact)
    assert torch.linalg.matrix_norm(W - B @ A, 2).item() == pytest.approx(tail[0].item() if len(tail) else 0, abs=exact)
    assert torch.allclose(torch.linalg.matrix_norm(B), torch.linalg.matrix_norm(A))      # equally large


def test_no_other_matrix_of_rank_k_is_nearer():
    W = draw(12, 10)
    B, A = low_rank(W, 3)
    best = torch.linalg.matrix_norm(W - B @ A)
    B, A = B.requires_grad_(), A.requires_grad_()
    torch.linalg.matrix_norm(W - B @ A).backward()
    assert B.grad.abs().max() < 1e-12 and A.grad.abs().max() < 1e-12            # nothing to improve
    for seed in range(20):                                                     # the best fit in random spans is worse
        Q = torch.linalg.qr(draw(12, 3, seed=seed)).Q
        assert torch.linalg.matrix_norm(W - Q @ (Q.T @ W)) > best


def test_low_rank_of_sixteen_bits_and_worked_numbers():
    assert low_rank(torch.tensor([[1, 2], [3, 4]]), 1)[0].dtype == torch.float64      # whole numbers, as in numpy
    B, A = low_rank(draw(8, 6).bfloat16(), 2)
    assert B.dtype == A.dtype == torch.float32
    D = torch.diag(torch.tensor([4.0, 2, 1, 1]))
    assert torch.linalg.matrix_norm(D - torch.mm(*low_rank(D, 2))).item() == pytest.approx(2 ** 0.5)
    B, A = low_rank(draw(512, 1024, dtype=torch.float32), 50, sketch=True)
    assert 512 * 1024 == 524_288 and B.numel() + A.numel() == 76_800


@pytest.mark.parametrize("shape", [(80, 60), (60, 80), (64, 64)])
def test_randomized_svd_finds_the_main_directions(shape):
    W = spectrum([2.0 ** -i for i in range(40)], *shape)
    U, S, Vh = randomized_svd(W, 8, seed=3)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], 8), (8,), (8, shape[1]))
    assert torch.allclose(S, torch.linalg.svdvals(W)[:8], rtol=1e-9)
    eye = torch.eye(8, dtype=torch.float64)
    assert torch.allclose(U.T @ U, eye) and torch.allclose(Vh @ Vh.T, eye)
    exact, sketched = low_rank(W, 8), low_rank(W, 8, sketch=True, seed=3)
    assert torch.allclose(exact[0] @ exact[1], sketched[0] @ sketched[1], atol=1e-7)
    assert torch.equal(randomized_svd(W, 8, seed=3)[0], U) and not torch.equal(randomized_svd(W, 8, seed=4)[0], U)
    full = randomized_svd(W, min(shape))
    assert torch.allclose(full[0] * full[1] @ full[2], W)


def test_power_rounds_help_a_slow_spectrum():
    W = spectrum([1 / (i + 1) for i in range(100)], 150, 120)
    best = torch.linalg.matrix_norm(W - torch.mm(*low_rank(W, 10)))
    sketches = [randomized_svd(W, 10, 5, power) for power in (0, 2)]
    errors = [torch.linalg.matrix_norm(W - (U * S) @ Vh) / best for U, S, Vh in sketches]
    assert errors[0] > 1.1 and errors[1] < 1.01


def test_random_choices_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    randomized_svd(draw(9, 9), 2), sketched_rank(draw(90, 90)), low_rank(draw(9, 9), 2, sketch=True)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ fast ranks

@pytest.mark.parametrize("r", [0, 1, 5, 31, 32, 33, 64, 65, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sketched_rank_equals_the_full_one(r, dtype):
    W = of_rank(120, 140, r, dtype=dtype)
    assert sketched_rank(W, k=32) == sketched_rank(W) == matrix_rank(W) == r


def test_sketched_rank_never_exceeds_the_full_one():
    for seed in range(5):
        W = spectrum([10.0 ** (-i / 4) for i in range(80)], 90, 80, seed)        # fades through the tolerance
        assert matrix_rank(W) - 4 <= sketched_rank(W, k=20) <= matrix_rank(W)
        assert sketched_rank(W, k=20, tol=9e-4) <= matrix_rank(W, tol=9e-4) == 13


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(1, 15), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_product_svd_is_the_products(m, n, k, r, seed):
    B, A = draw(m, k, seed=seed), of_rank(k, n, min(r, k), seed + 1)
    U, S, Vh = product_svd(B, A)
    p = min(m, k, n)
    assert (U.shape, S.shape, Vh.shape) == ((m, p), (p,), (p, n))
    assert torch.allclose((U * S) @ Vh, B @ A, atol=1e-10)
    assert torch.allclose(S, torch.linalg.svdvals(B @ A)[:p], atol=1e-10)
    eye = torch.eye(p, dtype=torch.float64)
    assert torch.allclose(U.T @ U, eye) and torch.allclose(Vh @ Vh.T, eye)
    assert product_rank(B, A) == matrix_rank(B @ A) == min(m, n, k, r)
    assert product_rank(B, A, tol=1.0) == matrix_rank(B @ A, tol=1.0)


def test_product_rank_has_the_tolerance_of_the_whole_product():
    eps = torch.finfo(torch.float64).eps
    for m, n, factor, expected in ((100, 2, 0.9, 1), (100, 2, 1.1, 2), (2, 100, 0.9, 1), (2, 100, 1.1, 2)):
        B, A = torch.zeros(m, 2, dtype=torch.float64), torch.zeros(2, n, dtype=torch.float64)
        B[0, 0], B[1, 1], A[0, 0], A[1, 1] = 1, 100 * eps * factor, 1, 1
        assert product_rank(B, A) == matrix_rank(B @ A) == expected


def test_fast_ranks_are_fast():
    """On a quiet machine, 2048²: sketch 40 ×, factors 1700 ×. Here a smaller matrix, and a bound that noise keeps."""
    B, A = draw(768, 16, dtype=torch.float32), draw(16, 768, dtype=torch.float32)
    W = B @ A

    def seconds(function):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            assert function() == 16
            times.append(time.perf_counter() - start)
        return min(times)

    full = seconds(lambda: matrix_rank(W))
    assert seconds(lambda: sketched_rank(W)) < full / 3 and seconds(lambda: product_rank(B, A)) < full / 20


# ------------------------------------------------------------------------------------------------ refused

@pytest.mark.parametrize("call, error, words", [
    (lambda: matrix_rank([1.0, 2.0]), ValueError, r"A must be \[..., m, n\]; got shape \[2\]"),
    (lambda: matrix_rank([[1.0, float("nan")]]), ValueError, "NaN or infinite entries .1 of 2."),
    (lambda: effective_rank([[float("inf")]]), ValueError, "NaN or infinite"),
    (lambda: stable_rank(torch.ones(3)), ValueError, "shape"),
    (lambda: matrix_rank("A"), TypeError, "A must be a matrix"),
    (lambda: matrix_rank([[1, 2], [3]]), TypeError, "A must be a matrix"),
    (lambda: matrix_rank(None), TypeError, "A must be"),
    (lambda: matrix_rank([[1.0]], tol=-1), ValueError, "tol must be"),
    (lambda: matrix_rank([[1.0]], tol=float("nan")), ValueError, "tol"),
    (lambda: low_rank(draw(3, 4), 0), ValueError, "k must be a whole number from 1 to min.m, n. = 3; got 0"),
    (lambda: low_rank(draw(3, 4), 4), ValueError, "got 4"), (lambda: low_rank(draw(3, 4), 2.0), ValueError, "got 2.0"),
    (lambda: low_rank(draw(2, 3, 4), 1), ValueError, r"\[m, n\]"),
    (lambda: randomized_svd(draw(3, 4), 4), ValueError, "k must"),
    (lambda: sketched_rank(draw(3, 4), 0), ValueError, "k must"),
    (lambda: sketched_rank(draw(3, 4) / 0), ValueError, "NaN"),
    (lambda: product_svd(draw(3, 2), draw(3, 2)), ValueError, "must share k"),
    (lambda: product_rank(draw(3), draw(3, 2)), ValueError, "B must"),
])
def test_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_public_names():
    assert all(callable(getattr(rank, name)) for name in rank.__all__)
    assert {"row_echelon", "matrix_rank", "low_rank", "effective_rank", "subspace_similarity"} <= set(rank.__all__)
