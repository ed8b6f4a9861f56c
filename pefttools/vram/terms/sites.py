"""Which modules a method adapts: names of a layer's matrices or norms, for each layer. Without building the model.

    targets                     as in pefttools.targets, which is as in peft: names, a regular expression for the whole
                                name, "all-linear", or None for the method's default for the model's type
    options["layers_to_transform"]     only in these layers
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from pefttools.vram.job import Job
from pefttools.vram.shape import Shape

LORA = ("lora", "qlora", "dora", "qdora")


def adapted(job: Job, s: Shape) -> list[frozenset[str]]:
    """For each layer the paths (`self_attn.q_proj`) of the matrices that LoRA, DoRA or IA³ adapt.

    Raises ValueError for a target that selects nothing (with the nearest names), or a layer that there is none of.
    """
    paths = [each.path for each in s.linears]
    return _select(job, s, paths, _default(job, s))


def trained_norms(job: Job, s: Shape) -> tuple[list[frozenset[str]], bool]:
    """For each layer the norms that layer-norm tuning trains, and whether it trains the last one of the model."""
    from pefttools.ln_tuning import TARGETS

    targets = job.targets if job.targets is not None else TARGETS.get(s.kind)
    if targets is None:
        raise ValueError(f"targets must be given: layer-norm tuning has no customary norms for model type {s.kind!r} "
                         f"(it has for {', '.join(sorted(TARGETS))}). This model's are "
                         f"{', '.join(name for name, _ in s.norms)} and {s.last_norm.rpartition('.')[2]}.")
    paths = [name for name, _ in s.norms]
    last = _matches(targets, s.last_norm)
    return _select(job, s, paths, targets, allow_none=last), last


def at_input(s: Shape, path: str, job: Job) -> bool:
    """IA³: whether this matrix is scaled at its input (the feed-forward's last one) and not at its output."""
    from pefttools.ia3 import FEEDFORWARD

    inputs = job.options.get("feedforward_modules", FEEDFORWARD.get(s.kind, ()))
    return _matches(inputs, path)


def _default(job: Job, s: Shape) -> str | tuple[str, ...]:
    if job.targets is not None:
        return job.targets
    if job.options.get("target_modules") is not None:
        return job.options["target_modules"]
    if job.method in LORA:
        from pefttools.lora_targets import DEFAULT_TARGETS as table
    else:
        from pefttools.ia3 import TARGETS as table
    return table[s.kind]


def _matches(targets: str | Iterable[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _select(job: Job, s: Shape, paths: list[str], targets: str | Iterable[str],
            allow_none: bool = False) -> list[frozenset[str]]:
    layers = job.options.get("layers_to_transform")
    wanted = [layers] if isinstance(layers, int) else layers
    if wanted and (missing := [i for i in wanted if i not in range(s.L)]):
        raise ValueError(f"layers_to_transform: there is no layer {', '.join(map(str, missing))}; the layers are 0 to "
                         f"{s.L - 1}.")
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    found = [frozenset(path for path in paths
                       if (everything or _matches(targets, f"{s.layers}.{i}.{path}")) and (not wanted or i in wanted))
             for i in range(s.L)]
    if not any(found) and not allow_none:
        names = [path.rpartition(".")[2] for path in paths]
        first = targets if isinstance(targets, str) else next(iter(targets), "")
        near = difflib.get_close_matches(first, names, n=1, cutoff=0.4)
        raise ValueError(f"targets={targets!r} selects nothing in a {s.kind}. Its modules are named {', '.join(names)}"
                         + (f"; the nearest to {first!r} is {near[0]!r}." if near else "."))
    if not isinstance(targets, str):
        for target in targets:
            if not any(_matches([target], f"{s.layers}.{i}.{path}") for i in range(s.L) for path in paths) \
                    and not _matches([target], s.last_norm):
                names = [path.rpartition(".")[2] for path in paths]
                near = difflib.get_close_matches(target, names, n=1, cutoff=0.4)
                raise ValueError(f"targets: no module is named {target!r} in a {s.kind}; there are {', '.join(names)}"
                                 + (f", of which {near[0]!r} is the nearest." if near else "."))
    return found
