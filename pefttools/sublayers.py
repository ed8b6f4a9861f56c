"""Where the sublayers of a transformer are: their names, family by family.

A layer of a transformer is two sublayers, each with a residual connection around it:

    h = h + attention(norm(h))        pre-norm: Llama, GPT-2, T5, OPT      h = norm(h + attention(h))    post-norm: BERT
    h = h + feed_forward(norm(h))                                          h = norm(h + feed_forward(h))

Adapters go to the end of a sublayer (its last projection, before the residual sum), beside one, or around a layer.
Names are relative to the layer ("model.layers.7." + "self_attn.o_proj"); `*` stands for a number.

The feed-forward is a module of its own in most families, and then what it is given is its input. In two it is not:
    BERT   `output` is called with (activations, x) and computes norm(dense(activations) + x), where x is what the
           feed-forward was given: an update of it can be added to x there
    OPT    fc1, the activation and fc2 stand in the layer itself: the input is to be had where fc1 is called
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from pefttools.targets import plain_modules


@dataclass(frozen=True)
class Sublayers:
    """The names in one family of models."""

    layers: str                   # the list of layers
    attention: str                # the last projection of the self-attention
    feedforward: str              # the last projection of the feed-forward
    beside: str                   # the module to whose output an update beside the feed-forward is added
    kind: str = "beside"          # "beside": fed by what this module is given; "residual": BERT's; "tapped": OPT's
    source: str | None = None     # "tapped": the module that is given the feed-forward's input


_LLAMA = Sublayers("layers", "self_attn.o_proj", "mlp.down_proj", "mlp")
_BERT = Sublayers("encoder.layer", "attention.output.dense", "output.dense", "output", "residual")
_T5 = Sublayers("block", "layer.0.SelfAttention.o", "layer.*.DenseReluDense.wo", "layer.*.DenseReluDense")
SUBLAYERS: dict[str, Sublayers] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    "gpt2": Sublayers("h", "attn.c_proj", "mlp.c_proj", "mlp"),
    "gpt_neox": Sublayers("layers", "attention.dense", "mlp.dense_4h_to_h", "mlp"),
    "phi": Sublayers("layers", "self_attn.dense", "mlp.fc2", "mlp"),
    "opt": Sublayers("layers", "self_attn.out_proj", "fc2", "fc2", "tapped", "fc1"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    **dict.fromkeys(("t5", "mt5"), _T5),
}


def sublayers_of(model: nn.Module) -> Sublayers:
    """The table's row for this model. Raises ValueError with the families that have one."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in SUBLAYERS:
        raise ValueError(f"it is not known where the sublayers of "
                         f"{f'model type {family!r}' if family else 'a model without a configuration'} are; known are "
                         f"{', '.join(SUBLAYERS)}. For another: "
                         f"pefttools.sublayers.SUBLAYERS[{family!r}] = Sublayers(layers=…, attention=…, …).")
    return SUBLAYERS[family]


def layers_of(model: nn.Module) -> dict[str, tuple[str, int]]:
    """{name of a layer: (name of its stack, number)} in the model's order. T5 has two stacks, encoder and decoder."""
    pattern = re.compile(rf"((?:.*\.)?{re.escape(sublayers_of(model).layers)})\.(\d+)")
    found = {name: (match[1], int(match[2])) for name in plain_modules(model) if (match := pattern.fullmatch(name))}
    if not found:
        raise ValueError(f"{type(model).__name__} has no layers named {sublayers_of(model).layers!r}.")
    return found


def pick_layers(model: nn.Module, keep: int | Iterable[int] | None = None,
                drop: int | Iterable[int] | None = None) -> list[str]:
    """The layers with a number in `keep` (None: all) and not in `drop`. Raises ValueError for numbers of no layer."""
    layers = layers_of(model)
    numbers = sorted({number for _, number in layers.values()})
    keep, drop = as_list(keep), as_list(drop)
    for name, given in (("layers_to_transform", keep), ("drop_layers", drop)):
        if missing := sorted(set(given or ()) - set(numbers)):
            raise ValueError(f"{name}: there is no layer {', '.join(map(str, missing))}; the layers are {numbers[0]} "
                             f"to {numbers[-1]}, counted from 0.")
    picked = [name for name, (_, number) in layers.items()
              if (not keep or number in keep) and number not in (drop or ())]   # an empty list is no restriction
    if not picked:
        raise ValueError("drop_layers: no layer is left.")
    return picked


def inside(model: nn.Module, layers: Iterable[str], path: str) -> dict[str, nn.Module]:
    """{name: module} of the modules called `path` inside these layers."""
    pattern = re.compile("(.*)\\." + re.escape(path).replace(r"\*", r"\d+"))
    layers = set(layers)
    return {name: module for name, module in plain_modules(model).items()
            if (match := pattern.fullmatch(name)) and match[1] in layers}


def features(base: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer: nn.Linear, a quantized one, or GPT-2's Conv1D, whose weight is [d_in, d_out]."""
    if hasattr(base, "in_features"):
        return base.in_features, base.out_features
    return tuple(base.weight.shape)


def as_list(layers: int | Iterable[int] | None) -> list[int] | None:
    return layers if layers is None else [layers] if isinstance(layers, int) else list(layers)


class Notes:
    """{module: what a configuration found out about it when it selected it}; forgotten with the module.

    A copy of a configuration starts with none: they are about this model's modules, and not about those of its copy.
    """

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()

    def __getitem__(self, module: nn.Module) -> object:
        return self._of[module]

    def __setitem__(self, module: nn.Module, note: object) -> None:
        self._of[module] = note

    def get(self, module: nn.Module) -> object | None:
        return self._of.get(module)

    def __reduce__(self) -> tuple[type, tuple]:
        return Notes, ()
