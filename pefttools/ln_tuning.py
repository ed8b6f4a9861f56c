"""Layer-norm tuning: train the normalisation layers, and nothing else.

    y = γ ⊙ (x − μ)/σ + β         γ, β: [d], trained copies; everything else is frozen

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv:2312.11420.
Houlsby et al. 2019 (arXiv:1902.00751) train them beside their adapters, as do `AdapterConfig(train_layer_norms=True)`.

       x ──► base_layer   γ₀, β₀ frozen      (disabled)
       x ──► a copy       γ, β   trained     (otherwise)          the start is the model itself, exactly

A worked number: Llama-3.2-1B has 16 layers with 2 RMSNorms of 2048, and a last one: 33 · 2048 = 67,584, 0.005 %.

Equal to peft's `LNTuningConfig` (peft/tuners/ln_tuning). Merging puts the copy's values into the norm: exact, and free.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.layer import AdapterLayer
from pefttools.targets import default_for

# peft's table for text models (its rows for llava are not norms only)
_LLAMA = ("input_layernorm", "post_attention_layernorm", "norm")
_GEMMA2 = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
           "norm")
TARGETS: dict[str, tuple[str, ...]] = {
    "llama": _LLAMA, "mistral": _LLAMA, "gemma": _LLAMA, "gemma2": _GEMMA2, "gemma3_text": _GEMMA2,
    "qwen2": ("post_attention_layernorm",), "qwen3": ("post_attention_layernorm",),
    "gpt2": ("ln_1", "ln_2", "ln_f"), "gptj": ("ln_1", "ln_f"),
    "bloom": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "falcon": ("input_layernorm", "post_attention_layernorm", "ln_f"), "phi": ("input_layernorm", "final_layernorm"),
    "t5": ("layer_norm", "final_layer_norm"), "mt5": ("layer_norm", "final_layer_norm"),
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
}


def norm_shapes(base: nn.Module) -> dict[str, tuple[int, ...]]:
    """{"weight": [d], "bias": [d]} of a normalisation layer; TypeError for any other, and one without parameters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    if not shapes or not set(shapes) <= {"weight", "bias"} or any(len(shape) != 1 for shape in shapes.values()):
        held = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:3]) or "no parameters"
        raise TypeError(f"this is a {type(base).__name__} with {held}, and layer-norm tuning is for normalisation "
                        f"layers: a weight [d], perhaps a bias [d].")
    return shapes


class LNTuningLayer(AdapterLayer):
    """A given norm, frozen, and named copies of it that are trained: [..., d] → [..., d]. One acts at a time.

    State-dict keys are peft's: base_layer.weight, ln_tuning_layers.default.weight. A copy has the norm's own dtype.
    """

    holds = ("ln_tuning_layers",)

    def __init__(self, base: nn.Module) -> None:
        norm_shapes(base)
        super().__init__(base)
        self.ln_tuning_layers = nn.ModuleDict()
        self.train(base.training)

    def add(self, name: str, config: Any = None, generator: torch.Generator | None = None) -> None:
        self.ln_tuning_layers[name] = copy.deepcopy(self.base_layer).requires_grad_(True)

    def check_active(self, weights: dict[str, float], stacked: bool) -> None:
        if len(weights) > 1 or any(weight != 1 for weight in weights.values()):
            raise ValueError(f"a norm has one γ at a time: {', '.join(weights)} cannot act together or with a weight "
                             f"other than 1 where norms are trained. For an average, see pefttools.compose.soup.")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged or not self.enabled or not self.active:
            return self.base_layer(x, *args, **kwargs)
        return self.ln_tuning_layers[next(iter(self.active))](x, *args, **kwargs)

    def merged_tensors(self) -> dict[str, Tensor]:
        if not self.active:
            return {}
        trained = self.ln_tuning_layers[next(iter(self.active))]
        # cloned, so that training on does not change a merged model
        return {key: parameter.detach().clone() for key, parameter in trained.named_parameters()}


@dataclass(frozen=True)
class LNTuningConfig:
    """Which norms are trained: names, a regular expression, or None for peft's choice for the model's family."""

    target_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None

    def default_targets(self, model: nn.Module) -> list[str]:
        return default_for(model, TARGETS, "layer-norm tuning")

    def shapes(self, base: nn.Module) -> dict[str, tuple[int, ...]]:
        """The tensors in the file, after the layer's own name. Raises TypeError unless `base` is a norm."""
        return {f"ln_tuning_layers.{key}": shape for key, shape in norm_shapes(base).items()}

    def build(self, base: nn.Module, generator: torch.Generator | None = None, name: str = "default") -> LNTuningLayer:
        layer = LNTuningLayer(base)
        layer.add(name, self, generator)
        layer.active = {name: 1.0}
        return layer

    def to_peft(self) -> dict[str, Any]:
        return {"peft_type": "LN_TUNING"}

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> LNTuningConfig:
        return cls(fields["target_modules"], fields.get("layers_to_transform"))
