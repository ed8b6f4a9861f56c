"""Hypernetwork adapters: one shared network writes the adapters of every layer, for every task.

    I = W_2 relu(W_1 [z_τ; l_i; p_j] + b_1) + b_2             the address: task τ, layer i, position j
    W_down, b, W_up, b_up, γ, β = linear functions of I       what a bottleneck adapter and its norm consist of
    y = h + LN_{γ,β}( W_up f(W_down h + b) + b_up )

Mahabadi et al. 2021, "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks",
arXiv:2106.04489, section 2, in the version with one network for all layers (HyperFormer++).

        task z_τ ─┐                           ┌─► W_down [m, d] ─┐
       layer l_i ─┼─►  MLP  ─►  I [e]  ─────► ├─► W_up   [d, m]  ├─►  the adapter at layer i, position j
    position p_j ─┘                           └─► γ, β   [d]    ─┘

What is trained is the network and the embeddings: tasks share it, and a further task costs e numbers. A worked number:
T5-base (24 layers, d = 768), m = 24, e = 64, MLP of 128, 8 tasks: 2,582,616 parameters (`hyper_size`). Plain
adapters, 48 for each task, have 8·48·(2md + d + m) = 14,459,904.

An adapter's name is its task here: attach(model, config, name="cola"), attach(model, config, name="rte"), and then
set_adapter(model, "rte"). The settings are `pefttools.hyper_config.HyperConfig`, and `fold` there writes the adapters
of one task out, once and for all, as plain ones. Position j is after attention (0) or after the feed-forward (1).
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pefttools.adapters import bottleneck_size, bottleneck_update

if TYPE_CHECKING:
    from pefttools.hyper_config import HyperConfig

ATTRIBUTE = "hyper_adapters"


# ------------------------------------------------------------------------------------------------ pure functions

def hyper_size(d: int, m: int, layers: int, tasks: int, e: int, hidden: int, layer_norm: bool = True) -> int:
    """Embeddings (tasks + layers + 2)·e, the MLP, and e + 1 parameters for each number of one adapter and its norm."""
    return (tasks + layers + 2) * e + (3 * e + 1) * hidden + (hidden + 1) * e \
        + (e + 1) * (bottleneck_size(d, m) + (2 * d if layer_norm else 0))


def norm_after(u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """LN_{γ,β}(u) over the last dimension: u [..., d], γ and β [d]."""
    return F.layer_norm(u, gamma.shape, gamma, beta)


# ------------------------------------------------------------------------------------------------ the module

class HyperAdapters(nn.Module):
    """The hypernetwork, and what adds its adapters' updates to the outputs of the projections in `sites`.

    `sites`: [(the projection, layer i, position j)]. An adapter name is a task: `tasks[name]` is its embedding z [e].
    With several active tasks the embeddings are added up with their weights.
    """

    def __init__(self, sites: list[tuple[nn.Module, int, int]], d_model: int, config: HyperConfig,
                 generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config, self.d_model, self.where = config, d_model, [(i, j) for _, i, j in sites]
        self.active: dict[str, float] = {}
        self.enabled, self.merged, self.stacked = True, False, False
        self._hooks: list[Any] = []
        shared = shared_tensors(config, d_model, 1 + max(i for i, _ in self.where), generator)
        self.tasks = nn.ParameterDict()
        self.shared = nn.ParameterDict({key: t.to(device, dtype) for key, t in shared.items()})

    # ---- what is computed
    def generated(self, site: int, weights: dict[str, float] | None = None) -> dict[str, Tensor]:
        """The adapter of one site for these tasks (None: the active ones), under `BottleneckAdapter`'s names."""
        weights, s = self.active if weights is None else weights, self.shared
        i, j = self.where[site]
        z = sum(self.tasks[name] if weight == 1 else weight * self.tasks[name] for name, weight in weights.items())
        address = torch.cat([z, s["layers"][i], s["positions"][j]])                                        # [3e]
        address = F.linear(F.relu(F.linear(address, s["W_1"], s["b_1"])), s["W_2"], s["b_2"])              # [e]
        return {key: F.linear(address, s[_generator(key)], s[_generator(key, "bias")]).view(shape)
                for key, shape in self.config.one(self.d_model).items()}

    def update(self, site: int, h: Tensor) -> Tensor:
        """What the active tasks' adapter of this site adds to h [..., d], in the dtype of the hypernetwork."""
        own = self.generated(site)
        u = bottleneck_update(h, own["down.weight"], own["down.bias"], own["up.weight"], own["up.bias"],
                              self.config.activation)
        return norm_after(u, own["norm.weight"], own["norm.bias"]) if "norm.weight" in own else u

    # ---- what pefttools.inject asks
    @property
    def names(self) -> list[str]:
        # Whoever freezes what does not act goes through the names in order, and the tasks share: the acting ones last.
        return sorted(self.tasks, key=lambda name: name in self.active)

    def adapter_parameters(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """What is trained: the shared network, and the embedding of this task (None: of all)."""
        return {key: p for key, p in self.named_parameters() if name is None or not key.startswith("tasks.")
                or key == f"tasks.{name}"}

    def add(self, name: str, config: HyperConfig, generator: torch.Generator | None = None) -> None:
        """A further task. Raises ValueError for other settings than the first task's: they share one network."""
        if config != self.config:
            raise ValueError(f"tasks share one hypernetwork, so {name!r} must have its settings: they are "
                             f"{self.config}, and {config} was given.")
        like = self.shared["b_2"]
        self.tasks[name] = nn.Parameter(torch.randn(config.e, generator=generator).to(like))

    def remove(self, name: str) -> None:
        """Forget a task's embedding; the network stays."""
        if name in self.tasks:
            del self.tasks[name]
        self.active.pop(name, None)

    def check_active(self, weights: dict[str, float], stacked: bool) -> None:
        if stacked:
            raise ValueError("stacked=True: tasks of one hypernetwork act side by side; their embeddings are added up.")

    def merge(self) -> None:
        raise TypeError("adapters have an activation inside, which no weight of the model can express, so they cannot "
                        "be merged. pefttools.hyper_config.fold writes them out as plain adapters.")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def uninstall(self) -> None:
        """Leave the model as it was: no hook, no submodule."""
        for hook in self._hooks:
            hook.remove()
        delattr(self._model[0], ATTRIBUTE)

    def file_tensors(self, name: str) -> dict[str, Tensor]:
        """The network and one task's embedding, by their complete keys."""
        return {file_key(key): p.detach() for key, p in self.adapter_parameters(name).items()}

    @torch.no_grad()
    def read_file_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take the values of a file. Raises ValueError if other tasks rely on a network that is not the file's."""
        own = {key: (p, tensors[file_key(key)]) for key, p in self.adapter_parameters(name).items()}
        if len(self.tasks) > 1 and any(not torch.equal(p, t.to(p)) for key, (p, t) in own.items()
                                       if key.startswith("shared.")):
            others = ", ".join(other for other in self.tasks if other != name)
            raise ValueError(f"the file's shared network is not the one in the model, on which {others} relies. "
                             f"Load it into a model of its own.")
        for parameter, tensor in own.values():
            parameter.copy_(tensor)


class Behind:
    """The hook on one projection. A class and not a closure, so that the model can be copied and pickled."""

    def __init__(self, frame: HyperAdapters, site: int) -> None:
        self.frame, self.site = frame, site

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not self.frame.enabled or not self.frame.active:
            return output
        return (output + self.frame.update(self.site, output)).to(output.dtype)


def shared_tensors(config: HyperConfig, d_model: int, layers: int,
                   generator: torch.Generator | None) -> dict[str, Tensor]:
    """The start. What is written last (W_up, or the norm's γ and β) starts at zero, so the model is exactly itself."""
    e, hidden = config.e, config.hidden
    drawn = {"layers": torch.randn(layers, e, generator=generator), "positions": torch.randn(2, e, generator=generator)}
    for k, (n_in, n_out) in enumerate(((3 * e, hidden), (hidden, e)), 1):
        drawn[f"W_{k}"] = torch.randn(n_out, n_in, generator=generator) / n_in ** 0.5
        drawn[f"b_{k}"] = torch.zeros(n_out)
    for key, shape in config.one(d_model).items():
        n, last = torch.Size(shape).numel(), "norm" if config.layer_norm else "up"
        zero = key.startswith(last) or key.endswith("bias")
        drawn[_generator(key)] = torch.zeros(n, e) if zero else \
            torch.randn(n, e, generator=generator) / (d_model * e) ** 0.5
        drawn[_generator(key, "bias")] = torch.zeros(n)
    return drawn


def _generator(key: str, part: str = "weight") -> str:
    """down.weight → the names of the linear function that writes it: down_weight_weight, down_weight_bias."""
    return f"{key.replace('.', '_')}_{part}"


def file_key(key: str) -> str:
    """tasks.cola → hyper_adapters.task: a file is of one task, and does not say under which name."""
    return f"{ATTRIBUTE}.task" if key.startswith("tasks.") else f"{ATTRIBUTE}.{key}"
