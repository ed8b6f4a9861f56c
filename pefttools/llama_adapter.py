"""LLaMA-Adapter: prefix attention beside the model's own, behind a gate that starts at zero.

    o_t = W_o ( softmax(q_t Kᵀ/√d_h) V  +  g · softmax(q_t P_kᵀ/√d_h) P_v ),     P_k = W_k p,  P_v = W_v p

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", arXiv:2303.16199,
section 3.2. p: [P, d] is trained, one for each of the top layers, and goes through the layer's own frozen W_k and W_v.

                 hidden_states [B, T, d]
                   │           │
        ┌──────────┴───┐   ┌───┴──────────────┐
        │ attention of │   │ q over p's keys: │      its softmax is apart from the words': a prefix inside theirs
        │ the words    │   │ softmax · P_v    │      (pefttools.prefix) would take weight from them from the start
        └──────────┬───┘   └───┬──────────────┘
                   └──── + ────┘ · g                 g = 0 at the start: the base model, exactly; g learns first
                         │
                        W_o

Two gates are in use. The authors' code multiplies by tanh(g); peft by g itself (`AdaptionPromptConfig`,
peft/tuners/adaption_prompt), and so does this file by default. `tanh=True` is the authors'; its files hold tanh(g), so
that peft reads them. For GPT-2 peft adds the second part after W_o and not before; so does this file. A worked number:
Llama-3.2-1B, P = 10 in the top 8 of 16 layers: 8 · (10 · 2048 + 1) = 163,848, 0.013 % of 1,235,814,400.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.layer import AdapterLayer

# model type → the attention module's name. peft has llama, mistral and gpt2; Qwen2's attention is built as Llama's.
ATTENTION = {"llama": "self_attn", "mistral": "self_attn", "qwen2": "self_attn", "gpt2": "attn"}


# ------------------------------------------------------------------------------------------------ pure functions

def gated_prefix(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, gate: Tensor, tanh: bool = False) -> Tensor:
    """g · softmax(q P_kᵀ/√d_h) P_v: what the prefix adds. q [B, H, T, d_h], prefix_k and _v [P, H_kv, d_h] → as q.

    gate: [1]; with `tanh` it is tanh(gate) that multiplies. The softmax is in float32, as in peft.
    """
    groups = q.shape[1] // prefix_k.shape[1]
    K, V = (t.to(q.dtype).transpose(0, 1).repeat_interleave(groups, dim=0) for t in (prefix_k, prefix_v))  # [H, P, d_h]
    scores = q @ K.mT / q.shape[-1] ** 0.5                                                           # [B, H, T, P]
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (gate.tanh() if tanh else gate) * weights @ V


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on queries [B, H, T, d_h], cos and sin [B, T, d_h], as Llama has it: halves, not pairs."""
    a, b = q.chunk(2, dim=-1)
    return q * cos.unsqueeze(1) + torch.cat([-b, a], dim=-1) * sin.unsqueeze(1)


# ------------------------------------------------------------------------------------------------ the module

class LlamaAdapter(AdapterLayer):
    """An attention module of transformers, frozen, and beside it P gated virtual tokens.

    Parameters as in peft's file: adaption_prompt [1, P, d] and adaption_gate [1], in the dtype of the layer's weights
    (float32 where those are quantized). base: an attention module with q_proj, k_proj, v_proj and o_proj (Llama,
    Mistral, Qwen2) or c_attn (GPT-2); TypeError for any other.
    """

    holds = ("adaption_prompt", "adaption_gate")

    def __init__(self, base: nn.Module) -> None:
        _check_attention(base)
        super().__init__(base)
        self.adaption_prompt, self.adaption_gate = nn.ParameterDict(), nn.ParameterDict()
        self.tanh: dict[str, bool] = {}

    def add(self, name: str, config: LlamaAdapterConfig, generator: torch.Generator | None = None) -> None:
        weight = next(self.base_layer.parameters())
        like = {"device": weight.device, "dtype": weight.dtype if weight.is_floating_point() else torch.float32}
        shape = config.shapes(self.base_layer)["adaption_prompt"]
        self.adaption_prompt[name] = nn.Parameter(torch.randn(shape, generator=generator).to(**like))
        self.adaption_gate[name] = nn.Parameter(torch.zeros(1, **like))
        self.tanh[name] = config.tanh

    def remove(self, name: str) -> None:
        super().remove(name)
        self.tanh.pop(name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.base_layer(*args, **kwargs)
        if not self.enabled or not self.active:
            return outputs
        hidden = args[0] if args else kwargs["hidden_states"]
        q = self.queries(hidden, kwargs)
        added = 0
        for name, weight in self.active.items():
            prefix_k, prefix_v = self.keys_and_values(self.adaption_prompt[name][0].to(hidden.dtype))
            part = gated_prefix(q, prefix_k, prefix_v, self.adaption_gate[name], self.tanh[name])
            added = added + (part if weight == 1.0 else part * weight)
        added = added.transpose(1, 2).flatten(2)                                              # [B, T, H · d_h]
        if hasattr(self.base_layer, "o_proj"):
            added = self.base_layer.o_proj(added.to(hidden.dtype))
        return (outputs[0] + added).to(q.dtype), *outputs[1:]

    def queries(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The layer's queries once more: [B, H, T, d_h]; attention modules do not hand theirs out."""
        base = self.base_layer
        if hasattr(base, "c_attn"):
            q = base.c_attn(hidden).split(base.split_size, dim=2)[0]
            return q.unflatten(-1, (-1, base.head_dim)).transpose(1, 2)
        q = base.q_proj(hidden).unflatten(-1, (-1, base.head_dim)).transpose(1, 2)
        if kwargs.get("position_embeddings") is None:
            raise ValueError("LLaMA-Adapter needs position_embeddings=(cos, sin) by name, as transformers' models pass "
                             "them.")
        return rotate(q, *kwargs["position_embeddings"])

    def keys_and_values(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """W_k p and W_v p, without positions: prompt [P, d] → each [P, H_kv, d_h]."""
        base = self.base_layer
        pair = base.c_attn(prompt).split(base.split_size, dim=1)[1:] if hasattr(base, "c_attn") \
            else (base.k_proj(prompt), base.v_proj(prompt))
        return tuple(t.unflatten(-1, (-1, base.head_dim)) for t in pair)

    def file_tensors(self, name: str) -> dict[str, Tensor]:
        tensors = super().file_tensors(name)
        return tensors | {"adaption_gate": tensors["adaption_gate"].tanh()} if self.tanh[name] else tensors

    @torch.no_grad()
    def read_file_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        gate = tensors["adaption_gate"]
        if self.tanh[name] and gate.abs().max() >= 1:
            raise ValueError(f"the file's gate is {gate.tolist()}, which no tanh(g) is: use "
                             f"LlamaAdapterConfig(tanh=False).")
        super().read_file_tensors(name, tensors | {"adaption_gate": gate.atanh() if self.tanh[name] else gate})


def _check_attention(base: nn.Module) -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")
    if not hasattr(base, "c_attn") and not all(hasattr(base, name) for name in names):
        raise TypeError(f"LlamaAdapter wraps a self-attention module with q_proj, k_proj, v_proj and o_proj, or c_attn;"
                        f" got {type(base).__name__}.")


# ------------------------------------------------------------------------------------------------ the configuration

@dataclass
class LlamaAdapterConfig:
    """length: P, tokens in each layer (peft: adapter_len). layers: how many, from the top (adapter_layers).

    tanh: the authors' gate, see the module's docstring.
    """

    length: int = 10
    layers: int = 8
    tanh: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}.")

    def targets(self, model: nn.Module, strict: bool = True) -> dict[str, nn.Module]:
        """The attention modules of the top `layers` layers. ValueError for a type without them, or with fewer."""
        from pefttools.targets import plain_modules

        family = getattr(getattr(model, "config", None), "model_type", None)
        if family not in ATTENTION:
            raise ValueError(f"LLaMA-Adapter is for {', '.join(ATTENTION)}; this model's type is {family!r}. Prefix "
                             f"tuning (PrefixTuningConfig) works on any.")
        found = {name: module for name, module in plain_modules(model).items()
                 if name.endswith("." + ATTENTION[family])}
        if len(found) < self.layers:
            raise ValueError(f"layers={self.layers}, but this model has {len(found)}.")
        return dict(list(found.items())[-self.layers:])

    def shapes(self, base: nn.Module) -> dict[str, tuple[int, ...]]:
        _check_attention(base)
        return {"adaption_prompt": (1, self.length, base.config.hidden_size), "adaption_gate": (1,)}

    def build(self, base: nn.Module, generator: torch.Generator | None = None, name: str = "default") -> LlamaAdapter:
        layer = LlamaAdapter(base)
        layer.add(name, self, generator)
        layer.active = {name: 1.0}
        return layer.train(base.training)

    def to_peft(self) -> dict[str, Any]:
        return {"peft_type": "ADAPTION_PROMPT", "adapter_len": self.length, "adapter_layers": self.layers,
                "target_modules": None}           # None: peft has the same table

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> LlamaAdapterConfig:
        if (target := fields.get("target_modules")) not in (None, *ATTENTION.values()):
            raise ValueError(f"target_modules={target!r}: only whole self-attention modules are supported.")
        return cls(fields["adapter_len"], fields["adapter_layers"])
