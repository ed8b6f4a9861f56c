"""Prefix tuning: P trained keys and values in front of the words' own, in every layer.

    attention with a prefix:   o_t = softmax( q_t [P_k ; K_≤t]ᵀ / √d_h ) [P_v ; V_≤t],     P_k, P_v: [P, d_h] per head

Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, section 4.2; section
4.3 is the reparametrisation. There are keys and values and no queries: a query is asked by a position that goes on to
predict something, and a prefix predicts nothing.

      keys        P_k          k₁ k₂ k₃ k₄
              ┌──────────┬─────────────┐
      q₁      │ ■  ■  ■  │ ■           │    each word sees the whole prefix,
      q₂      │ ■  ■  ■  │ ■  ■        │    and the words before it
      q₃      │ ■  ■  ■  │ ■  ■  ■     │
      q₄      │ ■  ■  ■  │ ■  ■  ■  ■  │    = what a model sees whose cache is P long already
              └──────────┴─────────────┘

So the prefix goes in as a cache of transformers (pefttools.prefix_cache), and nothing in the model changes. With
grouped-query attention it has the H_kv heads of the keys, not the H of the queries: P · L · 2 · H_kv · d_h numbers.

A worked number: Llama-3.2-1B (L = 16, H = 32, H_kv = 8, d_h = 64), P = 20: 327,680, which is 0.027 % of 1,235,814,400;
with H in place of H_kv it were four times as many. With the MLP of section 4.3 (512 → h → L · 2 · 512, h = 512)
8,677,888 are trained; it is folded away after training, and the file holds the 327,680.

`init`: "random" (peft's: N(0, 1)), "zero", or "text": the keys and values of a real text, the best start in the paper
(section 7.4), which peft has as `initialize_kv_prefix_from_text` (peft/tuners/cartridge/utils.py). PromptTuning is in
pefttools.prompt, LlamaAdapter in pefttools.llama_adapter; both names are found here, too.
"""
from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.virtual_config import dimensions

INITS = ("random", "zero", "text")


def __getattr__(name: str) -> Any:
    where = {"PrefixTuningConfig": "prefix_config", "PromptTuning": "prompt", "PromptTuningConfig": "prompt", "PTuning": "ptuning", "PTuningConfig": "ptuning",
             "LlamaAdapter": "llama_adapter", "LlamaAdapterConfig": "llama_adapter"}
    if name in where:
        return getattr(import_module(f"pefttools.{where[name]}"), name)
    raise AttributeError(f"module 'pefttools.prefix' has no attribute {name!r}")


# ------------------------------------------------------------------------------------------------ pure functions

def prefix_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, causal: bool = True,
                     scale: float | None = None) -> Tensor:
    """Attention with P more keys and values, written out.

    q [B, H, T, d_h]; k, v [B, H_kv, S, d_h] with S ≥ T (the last T are the queries' own positions); prefix_k, prefix_v
    [P, H_kv, d_h] → [B, H, T, d_h]. Each of the H_kv heads serves H / H_kv queries. causal: a query sees the prefix and
    what is not after it. scale: 1/√d_h by default. Raises ValueError naming what does not fit.
    """
    (B, H, T, d_h), (H_kv, S) = q.shape, k.shape[1:3]
    if H % H_kv or k.shape != v.shape or S < T and causal:
        raise ValueError(f"q must be [B, H, T, d_h], k and v [B, H_kv, S, d_h], H a multiple of H_kv and S ≥ T; "
                         f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}.")
    if prefix_k.shape != prefix_v.shape or prefix_k.shape[1:] != (H_kv, d_h):
        raise ValueError(f"prefix_k and prefix_v must be [P, H_kv={H_kv}, d_h={d_h}]: as many heads as the keys; "
                         f"got {list(prefix_k.shape)} and {list(prefix_v.shape)}.")
    K = torch.cat([prefix_k.transpose(0, 1).expand(B, -1, -1, -1), k], dim=2).repeat_interleave(H // H_kv, dim=1)
    V = torch.cat([prefix_v.transpose(0, 1).expand(B, -1, -1, -1), v], dim=2).repeat_interleave(H // H_kv, dim=1)
    scores = q @ K.mT * (d_h ** -0.5 if scale is None else scale)                             # [B, H, T, P + S]
    if causal:
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(nn.functional.pad(hidden, (len(prefix_k), 0)), float("-inf"))
    return scores.softmax(dim=-1) @ V


def split_prefix(flat: Tensor, layers: int, H_kv: int, d_h: int) -> list[tuple[Tensor, Tensor]]:
    """[P, L·2·H_kv·d_h], as stored (peft's `prompt_embeddings`), → for each layer (keys, values), [P, H_kv, d_h]."""
    by_layer = flat.view(len(flat), layers, 2, H_kv, d_h)
    return [(by_layer[:, i, 0], by_layer[:, i, 1]) for i in range(layers)]


def join_prefix(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The other way round: (keys, values) [P, H_kv, d_h] of each layer → [P, L·2·H_kv·d_h]."""
    return torch.stack([torch.stack(pair, dim=1) for pair in pairs], dim=1).flatten(1)


def prefix_count(length: int, layers: int, H_kv: int, d_h: int, hidden: int | None = None) -> int:
    """Trained numbers: P·L·2·H_kv·d_h; with an MLP of width `hidden` before it, those of the MLP and its P inputs."""
    d, out = H_kv * d_h, layers * 2 * H_kv * d_h
    return length * out if hidden is None else length * d + (d + 1) * hidden + (hidden + 1) * out


@torch.no_grad()
def prefix_of_text(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """The keys and values that the model computes for these tokens: [P, L·2·H_kv·d_h], P = len(ids).

    A prefix of them does what the text in front of the input does. Raises ValueError for an encoder–decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(f"init=\"text\" for a prefix needs a model with a causal cache; {type(model).__name__} has "
                         f"none.")
    training = model.training
    try:
        cache = model.eval()(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=True).past_key_values
    finally:
        model.train(training)
    return join_prefix([(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers])


# ------------------------------------------------------------------------------------------------ the modules

class PrefixTuning(nn.Module):
    """The trained prefix: forward() → [P, L·2·H_kv·d_h], of which `split_prefix` makes keys and values.

    config: the transformers model's (L, H_kv and d_h are taken from it). hidden: width of the MLP of section 4.3, or
    None for no MLP. Keys are peft's: embedding.weight, and with the MLP transform.0.weight, transform.2.weight, ….
    submodules=2 is peft's reading for encoder–decoders: layer i of the decoder takes part 2i mod L of the prefix. (It
    means to leave parts for cross-attention, and does not use them: for even L half of what is trained has no effect.
    With 1 each layer has its own part; in peft cross-attention then writes into the prefix's cache.)
    """

    def __init__(self, config: Any, length: int, hidden: int | None = None, init: str = "random",
                 submodules: int = 1) -> None:
        super().__init__()
        about = dimensions(config)
        self.length, self.sizes = length, (about["num_layers"], about["kv_heads"], about["head_dim"])
        self.order = [submodules * i % self.sizes[0] for i in range(self.sizes[0])]
        self.width = 2 * self.sizes[0] * self.sizes[1] * self.sizes[2]
        last = None
        if hidden is None:
            last = self.embedding = nn.Embedding(length, self.width)
        else:
            d = self.sizes[1] * self.sizes[2]
            self.embedding = nn.Embedding(length, d)
            self.transform = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), last := nn.Linear(hidden, self.width))
        if init == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @property
    def folded(self) -> bool:
        return not hasattr(self, "transform")

    def forward(self) -> Tensor:
        return self.embedding.weight if self.folded else self.transform(self.embedding.weight)

    def keys_and_values(self, flat: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """For each layer (keys, values), each [P, H_kv, d_h]; of `flat` instead of its own forward() if given."""
        pairs = split_prefix(self() if flat is None else flat, *self.sizes)
        return [pairs[i] for i in self.order]

    def to_save(self) -> Tensor:
        return self().detach()

    @torch.no_grad()
    def fold(self) -> None:
        """What the MLP says becomes the parameter, and the MLP goes: the same output. Twice is once."""
        if not self.folded:
            flat, trains = self(), self.embedding.weight.requires_grad
            self.embedding = nn.Embedding.from_pretrained(flat, freeze=not trains)
            del self.transform
