"""pass@k: how likely at least one of k answers passes, from n answers of which c passed (Chen et al. 2021, eq. 1).

    pass@k  =  1 − C(n − c, k) / C(n, k)        one minus the chance that k of the n, drawn without replacement, all fail

1 − (1 − c/n)^k looks like the same and is too low: the k draws would be with replacement from a share that is itself
only an estimate (the paper's figure 13 measures the bias).
"""

from __future__ import annotations

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of pass@k from n samples of a row, c of which passed; between 0 and 1.

    As a product, so that no binomial coefficient is ever formed. Raises ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    for name, value in (("n", n), ("c", c), ("k", k)):
        if isinstance(value, bool) or int(value) != value:
            raise ValueError(f"{name} must be a whole number, got {value!r}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and n={n}, got {k}: pass@{k} needs at least {k} samples of each row")
    if not 0 <= c <= n:
        raise ValueError(f"c must be between 0 and n={n}, got {c}: no more can pass than were drawn")
    if n - c < k:
        return 1.0
    if c <= k:  # C(n−c, k) / C(n, k) = Π over i < c of (n − k − i) / (n − i); the shorter of two equal products
        return 1.0 - math.prod((n - k - i) / (n - i) for i in range(c))
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))
