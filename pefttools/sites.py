"""The modules of a model at which a placement puts its adapters, and what each of them is to do.

    find_sites(model, "houlsby")     {"model.layers.0.self_attn.o_proj": (module, Site("after", d_model)),
                                      "model.layers.0.mlp.down_proj":    (module, Site("after", d_model)), …}

What the placements mean is told in `pefttools.placements`; the names of the sublayers are in `pefttools.sublayers`.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pefttools.sublayers import features, inside, layers_of, pick_layers, sublayers_of
from pefttools.targets import plain_modules

PLACEMENTS = ("houlsby", "pfeiffer", "bapna", "parallel", "input", "output", "input_output")


@dataclass(frozen=True)
class Site:
    """One place for an adapter."""

    kind: str                          # which class of pefttools.adapter_layers; "norm": a norm that is trained
    d_model: int
    where: tuple[str, ...] = ()        # of a block: "before", "after"
    source: nn.Module | None = None    # "tapped": who is given the input


def find_sites(model: nn.Module, placement: str, layers: list[str] | None = None) -> dict[str, tuple[nn.Module, Site]]:
    """{module's name: (module, its Site)} for a placement, in these layers (None: all), in the model's order."""
    names, layers = sublayers_of(model), pick_layers(model) if layers is None else layers
    d_model = features(next(iter(inside(model, layers_of(model), names.attention).values())))[1]
    if placement in ("houlsby", "pfeiffer"):
        paths = [names.attention, names.feedforward] if placement == "houlsby" else [names.feedforward]
        found = {n: (m, Site("after", d_model)) for path in paths for n, m in inside(model, layers, path).items()}
    elif placement == "parallel":
        sources = inside(model, layers, names.source) if names.source else {}
        found = {n: (m, Site(names.kind, d_model, source=sources.get(n.rpartition(".")[0] + f".{names.source}")))
                 for n, m in inside(model, layers, names.beside).items()}
    else:
        modules = plain_modules(model)
        found = {n: (modules[n], Site("block", d_model, where)) for n, where in _blocks(model, placement, layers)}
    order = {name: place for place, name in enumerate(plain_modules(model))}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _blocks(model: nn.Module, placement: str, layers: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    if placement == "bapna":
        return [(name, ("after",)) for name in layers]
    stacks: dict[str, list[str]] = {}
    for name, (stack, _) in layers_of(model).items():
        stacks.setdefault(stack, []).append(name)
    wanted = {}
    for stack in stacks.values():
        if "input" in placement:
            wanted[stack[0]] = ("before",)
        if "output" in placement:
            wanted[stack[-1]] = wanted.get(stack[-1], ()) + ("after",)
    return list(wanted.items())


def norms_of(model: nn.Module, layers: list[str], d_model: int) -> dict[str, nn.Module]:
    """{name: norm} of the normalisation layers of width d_model inside these layers."""
    def is_norm(module: nn.Module) -> bool:
        return "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None \
            and module.weight.shape == (d_model,)

    return {name: module for name, module in plain_modules(model).items()
            if any(name.startswith(f"{layer}.") for layer in layers) and is_norm(module)}
