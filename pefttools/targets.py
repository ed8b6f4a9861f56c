"""Which layers a configuration selects: `target_modules` and `layers_to_transform`, with peft's meaning.

    target_modules                    selects
    ["q_proj", "v_proj"]              every module whose name is one of these, or ends in a dot and one of these
    r".*\\.[01]\\..*_proj"            every module whose whole name matches the regular expression
    "all-linear"                      every linear layer but the output head
    None                              what the method's paper or peft takes for this family of models

    layers_to_transform=[0, 1]        of those (names only): the ones in `….0.…` and `….1.…`

As `check_target_module_exists` and `_maybe_include_all_linear_layers` in peft/tuners/tuners_utils.py, but here a name
that selects nothing is an error, which lists the names that exist.
"""
from __future__ import annotations

import difflib
import re
import sys
from typing import TYPE_CHECKING

from torch import nn

from pefttools.layer import AdapterLayer

if TYPE_CHECKING:
    from pefttools.inject import AdapterConfig


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a matrix that LoRA can sit beside: nn.Linear (quantized ones too) or GPT-2's Conv1D."""
    if isinstance(module, nn.Linear):
        return True
    # whoever has an instance of these has imported their modules; nobody else should have to
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    nf4 = getattr(sys.modules.get("pefttools.nf4_linear"), "NF4Linear", ())
    return isinstance(module, (conv1d, nf4)) if conv1d or nf4 else False


def plain_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """{name: module} of the model as it is without adapters, in its order: a wrapped layer stands for its wrapper.

    Also where an adapter is inside a block that is wrapped itself. The model (no parent to be replaced in) and the
    modules that methods added do not appear.
    """
    found: dict[str, nn.Module] = {}
    wrapped: dict[str, str] = {}                 # where a wrapped module really is → its name without adapters
    added: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        outer = max((where for where in wrapped if f"{name}.".startswith(f"{where}.")), key=len, default="")
        plain = wrapped[outer] + name[len(outer):] if outer else name
        if not name or f"{name}.".startswith(added):
            continue
        if isinstance(module, AdapterLayer):
            wrapped[f"{name}.base_layer"] = plain
            added += tuple(f"{name}.{child}." for child, _ in module.named_children() if child != "base_layer")
        elif callable(getattr(module, "adapter_parameters", None)):
            added += (f"{name}.",)
        else:
            found[plain] = module
    return found


def find_targets(model: nn.Module, config: AdapterConfig, strict: bool = True) -> dict[str, nn.Module]:
    """The modules that `config` selects, by name, in the model's order. Changes nothing.

    target_modules: a list of names (equal to the module's, or to its end after a dot), a regular expression for the
    whole name, "all-linear": every linear layer but the output head (`model.get_output_embeddings()`), or None: what
    `config.default_targets(model)` says. layers_to_transform: with a list of names, only these numbered layers.
    With `strict`, each name of the list and each layer must select something; peft ignores those that do not.
    Raises ValueError with the names that exist and the nearest one, TypeError where `config` cannot wrap a module.
    """
    if hasattr(config, "targets"):
        found = config.targets(model, strict)
    else:
        found = _by_name(model, config, strict)
    _check(model, config, found)
    return found


def _by_name(model: nn.Module, config: AdapterConfig, strict: bool) -> dict[str, nn.Module]:
    targets, layers = config.target_modules, config.layers_to_transform
    layers = [layers] if isinstance(layers, int) else layers
    if targets is None:
        targets = config.default_targets(model)
    modules = plain_modules(model)
    if isinstance(targets, str):
        if layers is not None:
            raise ValueError("layers_to_transform works with a list of names in target_modules; with a string, write "
                             "the layers into the regular expression, e.g. r\".*\\.layers\\.(0|1)\\..*q_proj\".")
        names = _by_string(model, modules, targets)
    else:
        targets = list(targets) if isinstance(targets, (list, tuple, set, frozenset)) else [targets]
        names = _by_suffix(model, modules, targets, layers, strict)
    return {name: modules[name] for name in names}


def _check(model: nn.Module, config: AdapterConfig, found: dict[str, nn.Module]) -> None:
    aliases: dict[int, list[str]] = {}
    for name, module in plain_modules(model, remove_duplicate=False).items():
        aliases.setdefault(id(module), []).append(name)
    for name, module in found.items():
        if len(aliases[id(module)]) > 1:
            raise ValueError(f"target_modules selects one module that the model holds under several names: "
                             f"{', '.join(aliases[id(module)])}. Replacing one of them would leave the others.")
        try:
            config.shapes(module)
        except (TypeError, ValueError) as error:
            exists = _existing(model) if isinstance(error, TypeError) else ""
            raise type(error)(f"target_modules selects {name!r}: {error}{exists}") from None


def default_for(model: nn.Module, table: dict[str, tuple[str, ...]], method: str) -> list[str]:
    """The entry of a method's table for this model's family; ValueError that asks for `target_modules` otherwise."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in table:
        raise ValueError(f"target_modules must be given: {method} has no customary layers for "
                         f"{f'model type {family!r}' if family else 'a model without a configuration'} "
                         f"(it has for {', '.join(sorted(table))}).{_existing(model)}")
    return list(table[family])


def _by_string(model: nn.Module, modules: dict[str, nn.Module], pattern: str) -> list[str]:
    if pattern.lower() == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        head = getattr(head, "base_layer", head)
        found = [name for name, module in modules.items() if is_linear(module) and module is not head]
    else:
        try:
            found = [name for name in modules if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ValueError(f"target_modules={pattern!r} is not a regular expression: {error}. "
                             f"For names, give a list: [\"q_proj\", \"v_proj\"].") from None
    if found:
        return found
    as_list = f" A string is a regular expression for the whole name; did you mean the list [{pattern!r}]?" \
        if any(_ends_with(name, pattern) for name in modules) else ""
    raise ValueError(f"target_modules={pattern!r} selects no module.{as_list}{_existing(model, pattern)}")


def _by_suffix(model: nn.Module, modules: dict[str, nn.Module], targets: list[str], layers: list[int] | None,
               strict: bool) -> list[str]:
    if not targets or not all(isinstance(target, str) and target for target in targets):
        raise ValueError(f"target_modules must name at least one layer; got {targets!r}.{_existing(model)}")
    found = [name for name in modules if any(_ends_with(name, target) for target in targets)]
    for target in targets:
        if not any(_ends_with(name, target) for name in found) and (strict or not found):
            raise ValueError(f"target_modules: no module is named {target!r}.{_existing(model, target)}")
    if layers is None or len(layers) == 0:  # an empty list is no restriction, as in peft
        return found

    # The first numbered part of the name is the layer; a name given in full is taken whatever its layer, as in peft.
    numbered = {name: int(match[1]) for name in found if (match := re.match(r".*?\.[^.]*\.(\d+)\.", name))}
    missing = [layer for layer in layers if layer not in numbered.values()]
    kept = [name for name in found if name in targets or numbered.get(name) in layers]
    if not kept or (strict and missing):
        raise ValueError(f"layers_to_transform: there is no layer {', '.join(map(str, missing))} with such a module; "
                         f"the layers are {sorted(set(numbered.values()))}, counted from 0.")
    return kept


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _existing(model: nn.Module, wanted: str | None = None) -> str:
    """ The linear layers that the model has are named …; the nearest to … is …"""
    linear = (name for name, module in plain_modules(model).items() if is_linear(module))
    names = dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear)
    if not names:
        return f" ({type(model).__name__} holds no nn.Linear inside it.)"
    nearest = difflib.get_close_matches(wanted, names, n=1, cutoff=0.4) if wanted else []
    return (f" The linear layers of this model are named {', '.join(names)}"
            + (f"; the nearest to {wanted!r} is {nearest[0]!r}." if nearest else "."))
