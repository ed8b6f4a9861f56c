"""IA³: rescale what attention and the feed-forward compute, by one learned number for each feature.

    k ← l_k ⊙ (W_k x),      v ← l_v ⊙ (W_v x),      feed-forward: W_2 (l_ff ⊙ f(W_1 x))

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638, section 3.3 and figure 1: "Infused Adapter by Inhibiting and Amplifying Inner Activations".

         keys, values                    second linear of the feed-forward
       x ──► W ──► ⊙ l ──► y             x ──► ⊙ l ──► W ──► y
               l: [d_out, 1]             l: [1, d_in]               l = 1 at the start: y is W x + b exactly

A worked number: W_k of Llama-3.2-1B (2048 → 512) gets 512 numbers, W_v 512, W_2 (8192 → 2048) 8192: 9,216 a layer, and
147,456 in 16 layers, 0.012 % of the model.

A factor for each row, or each column, of W is a change of W: merged, IA³ costs nothing (diag(l)·W and l ⊙ b, or
W·diag(l)). Equal to peft's `IA3Config` (peft/tuners/ia3), whose choice of layers is taken, too: for some families it is
not the paper's (OPT: q and k; Qwen2, Gemma: q and v; GPT-2: all of the fused q, k, v).
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pefttools.layer import AdapterLayer
from pefttools.sublayers import Notes, features
from pefttools.targets import default_for, find_targets, is_linear

# {family: (scaled at the output, scaled at the input)}: peft's two tables in one
_QV, _KV, _FUSED = ("q_proj", "v_proj"), ("k_proj", "v_proj"), ("query_key_value",)
FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "t5": (("k", "v"), ("wo",)), "mt5": (("k", "v", "wi_1"), ()), "gpt2": (("c_attn",), ("mlp.c_proj",)),
    "gpt_bigcode": (("c_attn",), ("mlp.c_proj",)), "bloom": (_FUSED, ("mlp.dense_4h_to_h",)),
    **dict.fromkeys(("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"), (_FUSED, ("dense_4h_to_h",))),
    **dict.fromkeys(("bert", "roberta"), (("key", "value"), ("output.dense",))),
    "deberta-v2": (("key_proj", "value_proj"), ("output.dense",)), "deberta": (("in_proj",), ("output.dense",)),
    "opt": (("q_proj", "k_proj"), ("fc2",)), "bart": (_QV, ("fc2",)), "phi": (_QV, ("fc2",)),
    "gptj": (_QV, ("fc_out",)), "gpt_neo": (_QV, ("c_proj",)), "mixtral": (_KV, ("w2",)),
    **dict.fromkeys(("llama", "mistral"), (_KV, ("down_proj",))),
    **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (_QV, ("down_proj",))),
}
TARGETS = {family: output + inputs for family, (output, inputs) in FAMILIES.items()}
FEEDFORWARD = {family: inputs for family, (_, inputs) in FAMILIES.items()}


# ------------------------------------------------------------------------------------------------ pure functions

def ia3_scale(x: Tensor, l: Tensor) -> Tensor:                                                   # noqa: E741
    """x ⊙ l: x [..., d], l with d entries → [..., d]. Computed in the wider of the two dtypes, given back in x's."""
    if x.dim() == 0 or x.shape[-1] != l.numel():
        raise ValueError(f"x must be [..., {l.numel()}], one feature for each entry of l; got {list(x.shape)}.")
    return (x * l.flatten()).to(x.dtype)


def ia3_merge(weight: Tensor, bias: Tensor | None, l: Tensor,                                        # noqa: E741
              feedforward: bool) -> tuple[Tensor, Tensor | None]:
    """(diag(l) W, l ⊙ b), or with `feedforward` (W diag(l), b). weight [d_out, d_in], in its dtype as they come."""
    if l.numel() != weight.shape[int(feedforward)]:
        raise ValueError(f"l must have {weight.shape[int(feedforward)]} entries for a weight {list(weight.shape)} "
                         f"scaled at its {'input' if feedforward else 'output'}; got {l.numel()}.")
    merged = (weight * (l.reshape(1, -1) if feedforward else l.reshape(-1, 1))).to(weight.dtype)
    return merged, bias if bias is None or feedforward else (bias * l.flatten()).to(bias.dtype)


# ------------------------------------------------------------------------------------------------ the module

class IA3Linear(AdapterLayer):
    """A given linear layer, frozen, whose output (or with `feedforward` its input) is multiplied by l.

    State-dict keys are peft's: base_layer.weight, ia3_l.default [d_out, 1] or [1, d_in]. l is float32 beside a weight
    of 16 bits or fewer. Several adapters at once multiply, as in peft; with a weight w a factor is 1 + w (l − 1).
    Raises TypeError unless `base` is linear.
    """

    holds = ("ia3_l",)

    def __init__(self, base: nn.Module, feedforward: bool = False) -> None:
        if not is_linear(base):
            raise TypeError(f"base must be a linear layer; got {type(base).__name__}.")
        super().__init__(base)
        self.feedforward, self.conv1d = feedforward, type(base).__name__ == "Conv1D"
        self.ia3_l = nn.ParameterDict()
        self.train(base.training)

    def add(self, name: str, config: Any = None, generator: torch.Generator | None = None) -> None:
        feedforward = self.feedforward if config is None else config.is_feedforward(self.base_layer)
        if feedforward != self.feedforward:
            raise ValueError(f"feedforward_modules: {name!r} scales the {'input' if feedforward else 'output'} of a "
                             f"layer that the adapters before it scale at the other end. Give both the same "
                             f"feedforward_modules.")
        weight = self.base_layer.weight
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        shape = ia3_shape(self.base_layer, feedforward)
        self.ia3_l[name] = nn.Parameter(torch.ones(shape, dtype=dtype, device=weight.device))

    def _factors(self) -> list[Tensor]:
        return [self.ia3_l[name] if weight == 1 else 1 + weight * (self.ia3_l[name] - 1)
                for name, weight in self.active.items()]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged or not self.enabled or not self.active:
            return self.base_layer(x, *args, **kwargs)
        first, *others = self._factors()
        for factor in others:
            first = first * factor
        if self.feedforward:
            return self.base_layer(ia3_scale(x, first), *args, **kwargs)
        return ia3_scale(self.base_layer(x, *args, **kwargs), first)

    def merged_tensors(self) -> dict[str, Tensor]:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        for factor in self._factors():                # one after the other, each rounded, as peft does
            if self.conv1d:                           # its weight is [d_in, d_out]
                turned, bias = ia3_merge(weight.T, bias, factor, self.feedforward)
                weight = turned.T
            else:
                weight, bias = ia3_merge(weight, bias, factor, self.feedforward)
        return {"weight": weight} | ({} if bias is None or self.feedforward else {"bias": bias})

    def extra_repr(self) -> str:
        return f"feedforward={self.feedforward}, merged={self.merged}"


def ia3_shape(base: nn.Module, feedforward: bool) -> tuple[int, int]:
    """Of l: [1, d_in] where the input is scaled, [d_out, 1] where the output is."""
    d_in, d_out = features(base)
    return (1, d_in) if feedforward else (d_out, 1)


# ------------------------------------------------------------------------------------------------ the configuration

@dataclass(frozen=True)
class IA3Config:
    """Which layers are scaled, and at which end. `None`: what peft takes for the model's family.

    `feedforward_modules`: those of `target_modules` that are scaled at their input (names that a module's name ends
    in, or a regular expression for the whole name).
    """

    target_modules: Sequence[str] | str | None = None
    feedforward_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    _at_input: Notes = field(default_factory=Notes, init=False, repr=False, compare=False)
    # what the check of foreign fields may leave out: a Conv1D is seen without being told, and names have no order
    without_effect: ClassVar[tuple[str, ...]] = ("init_ia3_weights", "fan_in_fan_out", "feedforward_modules")

    def __post_init__(self) -> None:
        names, inputs = self.target_modules, self.feedforward_modules
        if names is not None and inputs is not None and not isinstance(names, str) and not isinstance(inputs, str) \
                and (outside := sorted(set(inputs) - set(names))):
            raise ValueError(f"feedforward_modules must be among target_modules; {', '.join(outside)} is not.")

    def default_targets(self, model: nn.Module) -> list[str]:
        return default_for(model, TARGETS, "IA³")

    def targets(self, model: nn.Module, strict: bool = True) -> dict[str, nn.Module]:
        """The layers by name, as `pefttools.targets` finds them; which of them are scaled at the input is noted."""
        inputs = self.feedforward_modules
        if inputs is None:
            inputs = default_for(model, FEEDFORWARD, "IA³ (feedforward_modules)")
        names = SimpleNamespace(target_modules=self.target_modules, layers_to_transform=self.layers_to_transform,
                                default_targets=self.default_targets, shapes=_linear_or_error)
        found = find_targets(model, names, strict)
        for name, module in found.items():
            self._at_input[module] = bool(re.fullmatch(inputs, name)) if isinstance(inputs, str) \
                else any(name.endswith(end) for end in inputs)
        return found

    def is_feedforward(self, base: nn.Module) -> bool:
        """Whether this layer is scaled at its input. Raises ValueError for one that `targets` did not select."""
        note = self._at_input.get(base)
        if note is None:
            raise ValueError("at which end a layer is scaled depends on its name: call config.targets(model) first "
                             "(attach does), or make the layer yourself: IA3Linear(base, feedforward=…).")
        return note

    def shapes(self, base: nn.Module) -> dict[str, tuple[int, ...]]:
        """{"ia3_l": …}, the tensor in the file. Raises TypeError unless `base` is linear."""
        _linear_or_error(base)
        return {"ia3_l": ia3_shape(base, self.is_feedforward(base))}

    def build(self, base: nn.Module, generator: torch.Generator | None = None, name: str = "default") -> IA3Linear:
        layer = IA3Linear(base, self.is_feedforward(base))
        layer.add(name, self, generator)
        layer.active = {name: 1.0}
        return layer

    def to_peft(self) -> dict[str, Any]:
        inputs = self.feedforward_modules
        return {"peft_type": "IA3", "feedforward_modules": sorted(inputs) if inputs is not None
                and not isinstance(inputs, str) else inputs}

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> IA3Config:
        return cls(fields["target_modules"], fields["feedforward_modules"], fields.get("layers_to_transform"))


def _linear_or_error(base: nn.Module) -> dict[str, tuple[int, ...]]:
    if not is_linear(base):
        raise TypeError(f"this is a {type(base).__name__}, and IA³ scales linear layers.")
    return {}
