"""Do two matrices use the same directions? Grassmann similarity φ and principal angles.

    φ(A, B, i, j) = ‖U_Aⁱᵀ U_Bʲ‖_F² / min(i, j)   in [0, 1]          Hu et al. 2021 (LoRA), section 7.2, equation 4

U_Aⁱ [n, i] are the first i *right*-singular vectors of A [r_A, n] (of LoRA's A: directions of the layer's input), U_Bʲ
those of B. φ = 1: one span contains the other. φ = 0: orthogonal. Two random spans in n dimensions: max(i, j)/n on
average. The paper's finding: the first direction of r = 8 lies within that of r = 64 with φ > 0.5, later ones do not.

       B's first j ──►                         φ is the mean of cos²θ over the min(i, j) principal angles θ₁ ≤ θ₂ ≤ …
    A's │ 1.0  0.6  0.4         one call of
 first i│ 0.6  0.5  0.4         subspace_table  For directions of the output (LoRA's B), pass the transposes: B.T.
        ▼ 0.4  0.4  0.4

A worked number: rows (1, 0, 0) and (cos 30°, sin 30°, 0): φ(1, 1) = cos² 30° = 0.75, the angle is π/6 = 0.5236.
"""
from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor


def subspace_similarity(A: Any, B: Any, i: int, j: int) -> float:
    """φ(A, B, i, j) of A [r_A, n] and B [r_B, n]: how much of the smaller of two spans lies in the other.

    Raises ValueError unless 1 ≤ i ≤ rank(A) and 1 ≤ j ≤ rank(B) (beyond its rank a matrix has no singular directions,
    only arbitrary ones), where A and B have another number of columns, and for NaN or infinity.
    """
    return subspace_table(A, B, i, j)[-1, -1].item()


def subspace_table(A: Any, B: Any, i: int | None = None, j: int | None = None) -> Tensor:
    """All of φ(A, B, 1…i, 1…j) [i, j]: entry [p−1, q−1] is φ(A, B, p, q), the heat map of the LoRA paper's figure 3.

    By default up to the ranks. ‖·‖_F² of every pair of leading parts is a cumulative sum of squared inner products,
    so the table costs what one entry costs. Raises as `subspace_similarity`.
    """
    U, V = _bases(A, B)                                               # [rank A, n], [rank B, n]
    i, j = (len(U) if i is None else i), (len(V) if j is None else j)
    check_k("i", i, len(U), "the rank of A")
    check_k("j", j, len(V), "the rank of B")
    inner = (U[:i] @ V[:j].mH).abs().square()                         # [i, j]
    p, q = (torch.arange(1, size + 1, device=inner.device) for size in (i, j))
    return inner.cumsum(0).cumsum(1) / torch.minimum(p[:, None], q)


def principal_angles(A: Any, B: Any) -> Tensor:
    """The angles θ₁ ≤ θ₂ ≤ … in [0, π/2] between the row spans of A [r_A, n] and B [r_B, n]: [min(rank A, rank B)].

    Radians. cos θ are the singular values of U_AᵀU_B (Björck & Golub 1973). Near θ = 0 the cosine is flat: in float32
    every angle below 2e-4 has a cosine of 1. So angles below 45° are read off their sines, the singular values of
    what is left of the smaller span after projection onto the larger (Knyazev & Argentati 2002, algorithm 3.1).
    Raises as `subspace_similarity`.
    """
    large, small = sorted(_bases(A, B), key=len, reverse=True)
    inner = small @ large.mH
    cosine = torch.linalg.svdvals(inner)                              # falling, so the angles rise
    sine = torch.linalg.svdvals(small - inner @ large).flip(-1)       # rising
    return torch.where(cosine.square() >= 0.5, sine.clamp(max=1).asin(), cosine.clamp(max=1).acos())


def _bases(A: Any, B: Any) -> tuple[Tensor, Tensor]:
    """Orthonormal rows, main direction first, that span the rows of A and those of B: [rank A, n], [rank B, n]."""
    A, B = as_matrix(A), as_matrix(B, "B")
    if A.shape[1] != B.shape[1]:
        raise ValueError(f"A and B must have equally many columns, since their rows are compared; got {list(A.shape)} "
                         f"and {list(B.shape)}. For the columns, pass A.T and B.T.")
    dtype = torch.promote_types(A.dtype, B.dtype)
    return _basis(A.to(dtype), "A"), _basis(B.to(dtype), "B")


def _basis(A: Tensor, name: str) -> Tensor:
    S, Vh = torch.linalg.svd(A, full_matrices=False)[1:]
    rank = int((S > S.amax() * (max(A.shape) * torch.finfo(S.dtype).eps)).sum()) if len(S) else 0
    if rank == 0:
        raise ValueError(f"{name} is zero, so it spans nothing and has no direction to compare. (LoRA's B is zero "
                         f"before the first step of training.)")
    return Vh[:rank]


# ------------------------------------------------------------------------------------------------ shared with rank.py

def as_matrix(A: Any, name: str = "A", batches: bool = False) -> Tensor:
    """A tensor of at least float32, [m, n] or with `batches` [..., m, n], from a tensor, an array or nested lists.

    Raises ValueError naming the argument for NaN, infinity or another number of dimensions, TypeError for no numbers.
    """
    try:
        if isinstance(A, Tensor):
            given = A.detach()
        else:                                                         # lists are float64, as in numpy
            array = hasattr(A, "__array_interface__")                 # copied: torch takes no negative strides
            given = torch.as_tensor(A.copy() if array else A, dtype=None if array else torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a matrix: a tensor, an array or nested lists of numbers; {error}.") from None
    if given.dim() < 2 or given.dim() > 2 and not batches:
        raise ValueError(f"{name} must be {'[..., m, n]' if batches else '[m, n]'}; got shape {list(given.shape)}.")
    if not (given.is_floating_point() or given.is_complex()):
        given = given.to(torch.float64)                               # whole numbers, as in numpy
    elif given.element_size() < 4:
        given = given.float()                                         # 16 bits: there is no SVD in them
    if not given.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite entries ({int((~given.isfinite()).sum())} of {given.numel()}).")
    return given


def check_k(name: str, k: int, most: int | None = None, what: str = "") -> None:
    """Raises ValueError unless k is a whole number from 1 to `most`."""
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 1 or most is not None and k > most:
        raise ValueError(f"{name} must be a whole number from 1 {'up' if most is None else f'to {what} = {most}'}; "
                         f"got {k!r}.")
