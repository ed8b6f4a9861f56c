"""Intrinsic dimension: train a whole model inside a random subspace of d dimensions.

    θ = θ₀ + P d          θ₀ [D] the model's parameters, frozen;  P [D, d] random, fixed;  d the only thing trained
    θᵢ = θ₀ᵢ + λᵢ (P d)ᵢ  with `said`: one scale λᵢ more for each tensor ("structure-aware"), counted within d

Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv:1804.08838, equation 2; Aghajanyan et
al. 2020, arXiv:2012.13255, equations 1 and 3. The smallest d that reaches 90 % of what training all D parameters
reaches is the task's intrinsic dimension d₉₀: about 200 for RoBERTa-large (355 M) on MRPC.

      d = (d₁, d₂, d₃)                every parameter listens to one of the d coordinates, with a random sign:
         ╱   │   ╲
    θ₀ ± d₂  ± d₁  ± d₃  ± d₁ …       P = one ±1/√c in each row, c of them in each column: P has orthonormal columns,
    [D parameters]                    costs 4 bytes a parameter, and P d is one look-up: O(D), where a dense P is O(D·d)

A worked number: D = 10, d = 3: the columns have 4, 3, 3 entries of size 1/√4, 1/√3, 1/√3. ‖P d‖ = ‖d‖, so one step on
d moves each parameter about √(D/d) times less than the same step on θ would: use a learning rate that much larger.

Why `torch.nn.utils.parametrize`: whoever reads `layer.weight` gets θ, also outside the layer's forward and when
`generate` calls T5's encoder by itself; hooks on the model or on its layers miss those. θ is made when it is read, so
only what autograd keeps stays in memory. `with parametrize.cached():` makes it once for a whole `generate`. (The price:
a model can be deep-copied while attached, but not pickled.)
peft has no such method, so the file format is our own: `pefttools.intrinsic_file`.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pefttools.intrinsic_config import IntrinsicConfig, movable


# ------------------------------------------------------------------------------------------------ pure functions

def hashed_rows(sizes: Iterable[int], d: int, seed: int) -> list[Tensor]:
    """For each tensor of n entries an int32 tensor [n]: parameter i listens to coordinate h (value h) or −h (h + d).

    Balanced: over all tensors each coordinate is heard ⌊D/d⌋ or ⌈D/d⌉ times. Drawn on the CPU, so that a seed means
    the same P on every device.
    """
    generator, start, rows = torch.Generator().manual_seed(seed), 0, []
    for n in sizes:
        # positions start … start+n−1, shuffled within the tensor: memory for one tensor, never for all D
        h = (torch.randperm(n, generator=generator) + start) % d
        rows.append((h + d * torch.randint(0, 2, (n,), generator=generator)).to(torch.int32))
        start += n
    return rows


def hashed_update(vector: Tensor, row: Tensor, D: int) -> Tensor:
    """(P d) for one tensor: vector [d], row [n] of `hashed_rows` → [n]. Its gradient is Pᵀg, one scatter."""
    d = len(vector)
    count = D // d + (torch.arange(d, device=vector.device) < D % d)      # c of each column
    scaled = vector * count.to(torch.promote_types(vector.dtype, torch.float32)).rsqrt().to(vector.dtype)
    return torch.cat((scaled, -scaled)).index_select(0, row)


def dense_rows(sizes: Iterable[int], d: int, seed: int) -> list[Tensor]:
    """For each tensor of n entries its rows [n, d] of one dense P with orthonormal columns: O(D·d), for tiny models."""
    sizes = list(sizes)
    if (D := sum(sizes)) * d > 2**28:
        raise ValueError(f"projection='dense' would store D·d = {D:,}·{d:,} numbers ({4e-9 * D * d:.1f} GB); "
                         f"use projection='hashed', which stores {D:,}.")
    P = torch.randn(D, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(torch.linalg.qr(P).Q.split(sizes))


def d90(results: Mapping[int, float] | Iterable[tuple[int, float]], full: float, baseline: float = 0.0,
        share: float = 0.9) -> int | None:
    """The smallest d whose score reaches 90 % of the way from `baseline` to `full`; None if no d does.

    results: {d: score} or (d, score) pairs; several scores of one d (seeds) are averaged. `full` is the score of
    training all parameters; `baseline` that of the untouched model, needed where 0 is not "nothing learned" (a loss:
    baseline 3.0, full 2.0 asks for a loss of 2.1 or less). Raises ValueError for full = baseline or no results.
    """
    scores: dict[int, list[float]] = {}
    for d, score in (results.items() if isinstance(results, Mapping) else results):
        scores.setdefault(d, []).append(score)
    if not scores or full == baseline:
        raise ValueError(f"d90 needs results and full ≠ baseline; got {len(scores)} values of d, full={full!r}, "
                         f"baseline={baseline!r}.")
    gains = {d: (sum(s) / len(s) - baseline) / (full - baseline) for d, s in scores.items()}
    return min((d for d, gain in gains.items() if gain >= share - 1e-12), default=None)


# ------------------------------------------------------------------------------------------------ the module

class _Moved(nn.Module):
    """The parametrization of one tensor: θ₀ → θ₀ + λ·(P d)."""

    def __init__(self, row: Tensor, number: int, subspace: IntrinsicSubspace) -> None:
        super().__init__()
        self.register_buffer("row", row, persistent=False)               # what is saved is the seed
        self.number, self.shared = number, (subspace,)                    # in a tuple: not a submodule of every layer

    def forward(self, original: Tensor) -> Tensor:
        subspace, = self.shared
        if not (subspace.enabled and subspace.active):
            return original
        vector = subspace.vector * subspace.active[subspace.names[0]]
        update = hashed_update(vector, self.row, subspace.D) if self.row.dtype == torch.int32 else self.row @ vector
        if subspace.scales is not None:
            update = update * subspace.scales[self.number]
        return (original + update.view(original.shape)).to(original.dtype)    # rounded once, to the model's dtype


class IntrinsicSubspace(nn.Module):
    """All floating-point parameters of `model`, moved within one random subspace; d numbers are trained.

    `vector` [d] starts at zero, so the model computes what it did. With `said` there is `scales` [number of tensors],
    ones at the start, and the vector is that much shorter. Both are float32, float64 if a parameter is. A tied tensor
    is one tensor. Quantized weights stay as they are. In a 16-bit model a movement that is less than half a unit in
    the weight's last place (2⁻⁹ of it in bfloat16) is lost: prefer float32.
    """

    merged, stacked = False, False

    def __init__(self, model: nn.Module, config: IntrinsicConfig, name: str = "default") -> None:
        super().__init__()
        if any(parametrize.is_parametrized(module) for module in model.modules()):
            raise ValueError("this model has parametrized weights already (an intrinsic subspace, or weight_norm); "
                             "detach or remove them first.")
        named = movable(model)
        self.D, m = sum(p.numel() for p in named.values()), len(named) * config.said
        if not m < config.d <= self.D:
            raise ValueError(f"d must be from {m + 1} to {self.D:,}, the number of parameters that can move"
                             f"{f' ({m} of the d are the scales of said)' if m else ''}; got {config.d}.")
        make = {"hashed": hashed_rows, "dense": dense_rows}[config.projection]
        rows = make((p.numel() for p in named.values()), config.d - m, config.seed)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in named.values()) else torch.float32
        options = {"dtype": dtype, "device": next(iter(named.values())).device}
        self.config, self.names, self.active, self.enabled = config, [name], {name: 1.0}, True
        self.vector = nn.Parameter(torch.zeros(config.d - m, **options))
        self.scales = nn.Parameter(torch.ones(m, **options)) if m else None

        moved = {id(p): _Moved(row.to(p.device, dtype if config.projection == "dense" else None), number, self)
                 for number, (p, row) in enumerate(zip(named.values(), rows))}
        self.before = [(module, type(module), dict(module._parameters)) for module in model.modules()
                       if any(id(p) in moved for p in module._parameters.values())]
        for module, _, parameters in self.before:
            for key, p in parameters.items():
                if id(p) in moved:                                         # unsafe: without a trial run
                    parametrize.register_parametrization(module, key, moved[id(p)], unsafe=True)
        self.model = (model,)
        model.intrinsic = self

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: an nn.Sequential calls whatever is registered in it."""
        return x

    def uninstall(self) -> None:
        """Take the subspace out: the same Parameter objects, names and order as before. What was trained is gone."""
        for module, kind, parameters in self.before:
            # not remove_parametrizations: that changes the parameters' order, and breaks a deepcopy of the model
            now = dict(module._parameters) | {key: entry.original for key, entry in module.parametrizations.items()}
            del module.parametrizations
            module.__class__ = kind
            module._parameters.clear()
            module._parameters.update({key: now[key] for key in parameters})
        del self.model[0].intrinsic

    def adapter_parameters(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """What is trained: exactly d numbers."""
        return dict(self.named_parameters()) if name in (None, *self.names) else {}

    def add(self, name: str, config: Any, generator: torch.Generator | None = None) -> None:
        raise ValueError("a model has one intrinsic subspace at a time: call detach(model) first.")

    def check_active(self, weights: dict[str, float], stacked: bool) -> None:
        """Every weight of the one subspace makes sense."""

    def remove(self, name: str) -> None:
        """There is never a second one to forget."""

    def merge(self) -> None:
        raise TypeError("an intrinsic subspace moves embeddings and norms too and is not merged. Keep it attached.")

    def unmerge(self) -> None:
        """Nothing to do: it is never merged."""
