"""Rank: how many directions a matrix really uses, and the best matrix of fewer.

    A = U S Vᵀ = σ₁ u₁ v₁ᵀ + σ₂ u₂ v₂ᵀ + …,    σ₁ ≥ σ₂ ≥ … ≥ 0          the singular value decomposition (SVD)

    σ │█                       rank(A)            how many σ are not 0; with rounding: above S.max · max(m, n) · ε
      │█ █                     low_rank(A, k)     keep the first k terms: the nearest matrix of rank k, at the distance
      │█ █ ▄                                      √(σ²_{k+1} + σ²_{k+2} + …)   (Eckart & Young 1936)
      │█ █ █ ▂ ▁               effective_rank(A)  exp(−Σ p ln p), p = σ / Σσ   (Roy & Vetterli 2007, definition 1)
      └──────────► index       stable_rank(A)     ‖A‖_F² / ‖A‖₂² = Σσ² / σ₁²   (Rudelson & Vershynin 2007)

A worked number: the diagonal matrix with 4, 2, 1, 1 has rank 4, effective rank 3.36 and stable rank 1.375; the nearest
matrix of rank 2 is √2 away. A product B·A of [m, k] and [k, n] has rank ≤ k: 512×1024 has 524,288 entries, its two
factors at k = 50 have 76,800. So whoever has the factors (LoRA) never needs the SVD of the product: `product_svd`.

Elimination step by step is in `pefttools.elimination`, comparing subspaces in `pefttools.subspace`; their functions
can be imported from here too.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttools.elimination import row_echelon
from pefttools.subspace import as_matrix, check_k, principal_angles, subspace_similarity, subspace_table

__all__ = ["effective_rank", "low_rank", "matrix_rank", "principal_angles", "product_rank", "product_svd",
           "randomized_svd", "row_echelon", "sketched_rank", "stable_rank", "subspace_similarity", "subspace_table"]


# ------------------------------------------------------------------------------------------------ how many directions

def matrix_rank(A: Any, tol: float | Tensor | None = None) -> int | Tensor:
    """How many singular values of A [..., m, n] are larger than `tol`: an int, or for batches an int64 tensor [...].

    By default tol = S.max · max(m, n) · ε with ε of A's dtype: the rule of numpy.linalg.matrix_rank and
    torch.linalg.matrix_rank, and the same answers. Whole numbers count as float64. Entries of 16 bits are computed in
    float32, which is the rank of the numbers as stored: rounding a product of rank 16 to bfloat16 makes it full rank,
    so give such a matrix a `tol` of its own. Raises ValueError for NaN, infinity, fewer than two dimensions or a
    negative tol.
    """
    A = as_matrix(A, batches=True)
    return _count(torch.linalg.svdvals(A), *A.shape[-2:], tol)


def effective_rank(A: Any) -> float | Tensor:
    """exp of the entropy of the normalised singular values: between 1 and rank(A); 0 for a zero matrix.

    k equal singular values give k; the more unequal, the fewer. A [..., m, n] → a float, or a tensor [...].
    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality". Raises as `matrix_rank`.
    """
    p = _relative(torch.linalg.svdvals(as_matrix(A, batches=True)))
    total = p.sum(-1, keepdim=True)
    entropy = torch.special.entr(p / total.clamp(min=1)).sum(-1)     # total ≥ 1 unless the matrix is zero
    return _plain(entropy.exp() * (total[..., 0] > 0))


def stable_rank(A: Any) -> float | Tensor:
    """‖A‖_F² / ‖A‖₂²: between 1 and rank(A), hardly moved by small singular values; 0 for a zero matrix.

    A [..., m, n] → a float, or a tensor [...]. Raises as `matrix_rank`.
    """
    return _plain(_relative(torch.linalg.svdvals(as_matrix(A, batches=True))).square().sum(-1))


# ------------------------------------------------------------------------------------------------ the best of rank k

def low_rank(A: Any, k: int, sketch: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B [m, k], A [k, n]) whose product B @ A is the matrix of rank ≤ k that is nearest to the given one.

    B = U_k √S_k and A = √S_k V_kᵀ, so both are equally large (the split of PiSSA, arXiv:2404.02948).
    Nearest in Frobenius norm, at a distance of √(σ²_{k+1} + …), and in spectral norm, at σ_{k+1} (Eckart & Young
    1936, Mirsky 1960). In A's dtype, float32 for 16-bit ones. `sketch=True` takes `randomized_svd`, for matrices of
    thousands of rows: no longer the nearest, but close to it where the singular values fall off. Raises ValueError
    unless 1 ≤ k ≤ min(m, n), and for NaN, infinity or anything but two dimensions.
    """
    A = as_matrix(A)
    check_k("k", k, min(A.shape), "min(m, n)")
    U, S, Vh = randomized_svd(A, k, seed=seed) if sketch else torch.linalg.svd(A, full_matrices=False)
    root = S[:k].sqrt()
    return U[:, :k] * root, root[:, None] * Vh[:k]


def randomized_svd(A: Any, k: int, oversample: int = 10, power: int = 2,
                   seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, k], S [k], Vᵀ [k, n]): about the k largest singular values, without the SVD of a large matrix.

    Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1: multiply A by k + oversample random vectors; an orthonormal
    basis Q of the results contains A's main directions, and QᵀA is small. `power` rounds of multiplying by A Aᵀ make
    the main directions stand out. `seed` draws the vectors; torch's global generator is left alone.
    """
    A = as_matrix(A)
    check_k("k", k, min(A.shape), "min(m, n)")
    generator = torch.Generator().manual_seed(seed)
    width = min(k + oversample, *A.shape)
    omega = torch.randn(A.shape[1], width, generator=generator, dtype=A.dtype).to(A.device)
    Q = torch.linalg.qr(A @ omega).Q                                  # [m, width]
    for _ in range(power):                                            # orthonormal in between, against rounding
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.mH @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mH @ A, full_matrices=False)
    return (Q @ U)[:, :k], S[:k], Vh[:k]


def sketched_rank(A: Any, k: int = 64, tol: float | None = None, seed: int = 0) -> int:
    """The rank of a large matrix [m, n] of small rank, from a sketch of k columns: 2048², rank 16: about 40 × as fast.

    A sketch that turns out full is doubled, up to the whole matrix. The answer is that of `matrix_rank` where the
    singular values have a gap at the tolerance, and can be smaller (not larger) where they fade through it.
    """
    A = as_matrix(A)
    check_k("k", k)
    while k < min(A.shape):
        S = randomized_svd(A, k, oversample=0, power=0, seed=seed)[1]
        if (rank := _count(S, *A.shape, tol)) < k:
            return rank
        k *= 2
    return matrix_rank(A, tol)


# ------------------------------------------------------------------------------------------------ given as a product

def product_svd(B: Any, A: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD (U [m, p], S [p], Vᵀ [p, n]) of B @ A, p = min(m, k, n), without forming the [m, n] product.

    B [m, k] = Q_B R_B and Aᵀ [n, k] = Q_A R_A, so B A = Q_B (R_B R_Aᵀ) Q_Aᵀ: only the middle, at most k×k, is
    decomposed. The scale α/r of LoRA multiplies S. Raises ValueError where the shapes do not fit.
    """
    B, A = as_matrix(B, "B"), as_matrix(A)
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"B [m, k] and A [k, n] must share k; got {list(B.shape)} and {list(A.shape)}.")
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.mH)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mH, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mH


def product_rank(B: Any, A: Any, tol: float | None = None) -> int:
    """`matrix_rank(B @ A)` from the factors B [m, k] and A [k, n], with the same tolerance. Raises as `product_svd`."""
    U, S, Vh = product_svd(B, A)
    return _count(S, U.shape[0], Vh.shape[1], tol)


def _count(S: Tensor, m: int, n: int, tol: float | Tensor | None) -> int | Tensor:
    """How many of the singular values S [..., p] of an m×n matrix exceed the tolerance."""
    if S.shape[-1] == 0:
        return _plain(S.new_zeros(S.shape[:-1], dtype=torch.int64))
    if tol is None:
        tol = S.amax(-1) * (max(m, n) * torch.finfo(S.dtype).eps)
    tol = torch.as_tensor(tol, dtype=S.dtype, device=S.device)
    if not (tol >= 0).all():
        raise ValueError(f"tol must be ≥ 0; got {tol.tolist()}.")
    return _plain((S > tol[..., None]).sum(-1))


def _relative(S: Tensor) -> Tensor:
    """σ / σ₁, so that no square overflows; zeros where all are 0."""
    first = S.amax(-1, keepdim=True) if S.shape[-1] else S.sum(-1, keepdim=True)
    return torch.where(first > 0, S / first, torch.zeros_like(S))


def _plain(x: Tensor) -> Any:
    return x if x.dim() else x.item()
