"""Exposure beyond what a sample can show: a skew-normal fitted to losses (Carlini et al. 2019, section 4.3).

    density of the losses of random candidates        2/ω φ(z) Φ(αz),   z = (x − ξ)/ω
    exposure ≈ −log2 P(X ≤ loss of the secret)

          candidates        .:||:.                     n candidates alone give at most log2(n+1) bits: "better than
          secret   |      .:||||||:.                   all of them". The tail of the fitted curve goes on from there.

An extrapolation is as good as the fit: `extrapolated` reports the Kolmogorov-Smirnov distance between the candidates
and the curve, and whether it is below the usual 5 % bound. That says nothing about a tail that no candidate reached;
where `canary.exact_rank` can search, take it instead. (Both are compared in the tests, and in docs/redteam.md.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Extrapolated(NamedTuple):
    """`bits`: the exposure. `distance`: Kolmogorov-Smirnov, of the fit. `fits`: whether that is below 1.36/√n."""

    bits: float
    distance: float
    fits: bool


def log_density(x: Tensor, xi: Tensor | float, omega: Tensor | float, alpha: Tensor | float) -> Tensor:
    """log of 2/ω φ(z) Φ(αz), element by element."""
    z = (x - xi) / omega
    return (
        math.log(2)
        - 0.5 * math.log(2 * math.pi)
        - torch.as_tensor(omega).log()
        - 0.5 * z * z
        + torch.special.log_ndtr(alpha * z)
    )


def log_below(x: float, xi: float, omega: float, alpha: float, points: int = 4000) -> float:
    """log P(X ≤ x), by the trapezium rule downwards from x on a grid that is finest near x, where a far tail has its
    mass."""
    x = min(x, xi + 10 * omega)  # nothing is left above, and the grid is to reach the mass below
    steps = (
        torch.cat(
            [torch.zeros(1, dtype=torch.float64), torch.logspace(-8, math.log10(60), points, dtype=torch.float64)]
        )
        * omega
    )
    down = log_density(x - steps, xi, omega, alpha)
    widths = (steps[1:] - steps[:-1]).log()
    halves = torch.logaddexp(down[1:], down[:-1]) - math.log(2)
    return min(0.0, torch.logsumexp(halves + widths, 0).item())


def fit(losses: Sequence[float], rounds: int = 100) -> tuple[float, float, float]:
    """ξ, ω, α of greatest likelihood, from a start by moments. Raises ValueError for fewer than 20 or equal losses."""
    x = torch.as_tensor(list(losses), dtype=torch.float64)
    if len(x) < 20 or not torch.isfinite(x).all() or x.std() < 1e-12:
        raise ValueError(f"losses: a skew-normal needs at least 20 finite losses that are not all equal; got {len(x)}")
    mean, std = x.mean(), x.std()
    skew = (((x - mean) / std) ** 3).mean().clamp(-0.95, 0.95)  # a skew-normal's skewness stays below 0.9953
    a = skew.abs() ** (2 / 3)
    delta = skew.sign() * (math.pi / 2 * a / (a + (2 - math.pi / 2) ** (2 / 3))).sqrt().clamp(max=0.99)
    omega = std / (1 - 2 * delta**2 / math.pi).sqrt()
    theta = torch.stack([mean - omega * delta * math.sqrt(2 / math.pi), omega.log(), delta / (1 - delta**2).sqrt()])
    theta.requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=rounds, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -log_density(x, theta[0], theta[1].exp(), theta[2]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    xi, log_omega, alpha = theta.detach().tolist()
    return xi, math.exp(log_omega), alpha


def extrapolated(loss: float, others: Sequence[float]) -> Extrapolated:
    """Exposure of a secret with this loss by a skew-normal fitted to the losses of random candidates."""
    xi, omega, alpha = fit(others)
    ordered = sorted(others)
    n = len(ordered)
    curve = [math.exp(log_below(x, xi, omega, alpha, points=400)) for x in ordered]
    distance = max(max(abs(c - i / n), abs(c - (i + 1) / n)) for i, c in enumerate(curve))
    return Extrapolated(-log_below(loss, xi, omega, alpha) / math.log(2), distance, distance < 1.36 / math.sqrt(n))
