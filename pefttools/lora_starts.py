"""Where LoRA starts: the values of A and B before the first step, and what some starts do to the base weight.

    init_lora_weights    A [r, d_in]              B [d_out, r]       base weight becomes      source
    True                 uniform ±1/√d_in         0                  W                        peft; the default
    "gaussian"           normal, std 1/r          0                  W                        Hu et al. 2021, §4.1
    False                uniform ±1/√d_in         uniform ±1/√r      W  (ΔW ≠ 0 at once)      peft, for tests
    "orthogonal"         (X Q₀)ᵀ/10               (Y Q₁)/10          W  (Q₁Q₀ᵀ = 0 → BA = 0)  peft; r even
    "pissa"              √(Σᵣ/s) Vᵣᵀ              Uᵣ √(Σᵣ/s)         W − s·B·A                Meng et al. 2024, eq. 2–4
    "pissa_niter_4"      the same from a randomised SVD with 4 power iterations
    "olora"              Rᵣ                       Qᵣ                 W − s·B·A                Büyükakyüz 2024, alg. 1
    "loftq"              √(Σᵣ/s) Vᵣᵀ              Uᵣ √(Σᵣ/s)         Q = quantized(W − s·BA)  Li et al. 2023, alg. 1

s is LoRA's scale (α/r), W = UΣVᵀ and W = QR the decompositions of the weight, the index r their first r columns. In
LoftQ, U, Σ, V decompose W − Q: quantize, decompose the error, quantize what is left, T times. PiSSA is
arXiv:2404.02948, OLoRA arXiv:2406.01775, LoftQ arXiv:2310.08659.

    LoRA    y = W x          + s·B·A x        B·A starts at zero and learns the change
    PiSSA   y = (W − s·BA) x + s·B·A x        B·A starts as the principal part of W itself, which then is trained

A worked number: singular values 3, 2, 1, r = 1, s = 1: A = √3·v₁ᵀ, B = √3·u₁, the residual keeps 2 and 1.

Here are the matrices only; `pefttools.lora_init` puts them into a layer, and keeps the original weight for `detach`.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pefttools.lora_config import check_rank_fits


def lora_init(d_in: int, d_out: int, r: int, generator: torch.Generator | None = None,
              dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(A [r, d_in], B [d_out, r]) at the start of training, as in peft: A Kaiming-uniform with a = √5, B zero.

    That A is uniform in ±1/√d_in. (The paper's A is Gaussian; what matters is that exactly one of the two is zero:
    then ΔW = 0 at the start, and the other factor still receives a gradient.)
    """
    check_rank_fits(r, d_in, d_out)
    A = torch.empty(r, d_in, dtype=dtype)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return A, torch.zeros(d_out, r, dtype=dtype)


def random_B(d_out: int, r: int, generator: torch.Generator | None = None) -> Tensor:
    """B [d_out, r] as nn.Linear starts (Kaiming-uniform with a = √5, which is ±1/√r): for tests, so that ΔW ≠ 0."""
    return nn.init.kaiming_uniform_(torch.empty(d_out, r), a=math.sqrt(5), generator=generator)


def gaussian_start(d_in: int, d_out: int, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(A, B): A normal with standard deviation 1/r, B zero."""
    return torch.empty(r, d_in).normal_(std=1 / r, generator=generator), torch.zeros(d_out, r)


def orthogonal_start(d_in: int, d_out: int, r: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(A, B), neither zero, with B·A = 0: A from the even rows of one orthogonal r×r matrix, B from the odd ones.

    Raises ValueError for an odd r.
    """
    if r % 2:
        raise ValueError(f'init_lora_weights="orthogonal" halves the rank, so r must be even; got r={r}.')
    Q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    A = torch.randn(d_in, r // 2, generator=generator) @ Q[0::2] / 10                                   # [d_in, r]
    B = torch.randn(r // 2, d_out, generator=generator).T @ Q[1::2] / 10                                # [d_out, r]
    return A.T.contiguous(), B


def principal_parts(weight: Tensor, r: int, scaling: float, niter: int | None = None,
                    generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(A, B) with s·B·A = the best approximation of weight [d_out, d_in] by a matrix of rank r: PiSSA's start.

    `niter`: a randomised SVD with so many power iterations instead of the exact one; far faster for large weights
    (Halko et al. 2009, as `torch.svd_lowrank`, with q = r). Raises ValueError for s ≤ 0 (no root of Σ/s).
    """
    if not scaling > 0:
        raise ValueError(f"a start from singular values divides them by the scale, so alpha must be > 0; the scale is "
                         f"{scaling:g}.")
    if niter is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, Vh = _svd_lowrank(weight, r, niter, generator)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def _svd_lowrank(weight: Tensor, r: int, niter: int,
                 generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """As torch.svd_lowrank(weight, r, niter), which takes no generator (Halko et al. 2009, algorithms 4.4 and 5.1)."""
    if weight.shape[0] < weight.shape[1]:
        U, S, Vh = _svd_lowrank(weight.T, r, niter, generator)
        return Vh.T, S, U.T
    random = torch.randn(weight.shape[1], r, generator=generator, dtype=weight.dtype).to(weight.device)
    Q, _ = torch.linalg.qr(weight @ random)                        # its columns span nearly what weight's main ones do
    for _ in range(niter):
        Q, _ = torch.linalg.qr(weight.T @ Q)
        Q, _ = torch.linalg.qr(weight @ Q)
    U, S, Vh = torch.linalg.svd(Q.T @ weight, full_matrices=False)
    return Q @ U, S, Vh


def olora_start(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A [r, d_in], B [d_out, r]): the first rows of R and columns of Q, weight = Q R, so that B's are orthonormal."""
    Q, R = torch.linalg.qr(weight)
    return R[:r].clone(), Q[:, :r].clone()


def loftq_start(weight: Tensor, r: int, scaling: float, quantized: Callable[[Tensor], Tensor],
                iterations: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(A [r, d_in], B [d_out, r], Q [d_out, d_in]): Q = quantized(W − s·BA) and s·BA = the rank-r part of W − Q, in
    turn, `iterations` times from BA = 0.

    `quantized` gives a matrix as it is after quantizing and dequantizing. peft's `loftq_init` leaves the scale out, so
    that its start is right for α = r only, where the two are equal.
    """
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"LoftQ's iterations must be a whole number, 1 or more; got {iterations!r}. Try 1, or 5.")
    rest = weight
    for _ in range(iterations):
        Q = quantized(rest)
        A, B = principal_parts(weight - Q, r, scaling)
        rest = weight - (scaling * B) @ A
    return A, B, Q
