"""The dimensions of a decoder, named once: what every term of the formula is made of.

    B rows, T tokens in a row, N = B·T        h  width of the residual stream       V  words
    L layers                                  q = H·d    queries (H heads of d)      e  bytes of the base's dtype (2)
    m width of the feed-forward part          kv = H_kv·d   keys, and values         a  bytes of the adapter's (4)

          Llama, Mistral, Qwen2, Gemma                GPT-2                                OPT
    x ─┬─ norm ─ q k v ─ rotate ─ attention ─ o ─+    ln ─ c_attn ─ attention ─ c_proj     ln ─ q k v ─ attention ─ out
       └─────────────────────────────────────────┘
       ┬─ norm ─ gate, up ─ act·up ─ down ──────+     ln ─ c_fc ─ act ─ c_proj             ln ─ fc1 ─ act ─ fc2
       └─────────────────────────────────────────┘

Three families of layers are known here. For another type of model the formula says so, and `simulate` runs it as it is.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA = ("llama", "mistral", "qwen2", "gemma", "gemma2", "gemma3_text")
FAMILIES = {**dict.fromkeys(LLAMA, "llama"), "gpt2": "gpt2", "opt": "opt"}
FOUR_NORMS = ("gemma2", "gemma3_text")            # a norm behind each sublayer too


@dataclass(frozen=True)
class Linear:
    """One matrix of a decoder layer: [d_out, d_in], and a bias of d_out or none. `path`: its name inside the layer."""

    path: str
    d_in: int
    d_out: int
    bias: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Shape:
    """See the module's docstring for the letters."""

    kind: str                                     # model_type
    family: str                                   # "llama", "gpt2" or "opt"
    L: int
    h: int
    H: int
    H_kv: int
    d: int
    m: int
    V: int
    tied: bool
    linears: tuple[Linear, ...]                   # of one layer, in the model's order
    norms: tuple[tuple[str, int], ...]            # of one layer: (name, width)
    layers: str                                   # the path of the layers: "model.layers"
    last_norm: str
    norm: str                                     # "rms", "gemma" (float32 to its end) or "layer" (weight and bias)
    act: str
    positions: int = 0                            # rows of a table of positions
    dropout: float = 0.0                          # on what goes into the residual sum
    attention_dropout: float = 0.0
    softcap: bool = False                         # of attention's scores
    logit_softcap: bool = False
    windows: tuple[int, ...] = ()                 # of each layer: how far back it looks; 0 is to the beginning

    @property
    def q(self) -> int:
        return self.H * self.d

    @property
    def kv(self) -> int:
        return self.H_kv * self.d

    @property
    def norm_vectors(self) -> int:
        """Parameters of a norm for each of its numbers: a weight, and in LayerNorm a bias."""
        return 2 if self.norm == "layer" else 1

    def linear(self, name: str) -> Linear:
        return next(each for each in self.linears if each.name == name or each.path == name)


def shape_of(config: Any) -> Shape:
    """The dimensions of a configuration of transformers. Raises ValueError for a type whose layer is not known here."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"the formula does not know the layer of model_type={kind!r} (it knows {', '.join(FAMILIES)}"
                         f"). simulate() runs any causal language model of transformers: use that.")
    return {"llama": _llama, "gpt2": _gpt2, "opt": _opt}[FAMILIES[kind]](config, kind)


def _llama(c: Any, kind: str) -> Shape:
    h, m, H = c.hidden_size, c.intermediate_size, c.num_attention_heads
    H_kv = getattr(c, "num_key_value_heads", None) or H
    d = getattr(c, "head_dim", None) or h // H
    bias, mlp_bias = bool(getattr(c, "attention_bias", False)), bool(getattr(c, "mlp_bias", False))
    qkv_bias = bias or kind == "qwen2"
    linears = (Linear("self_attn.q_proj", h, H * d, qkv_bias), Linear("self_attn.k_proj", h, H_kv * d, qkv_bias),
               Linear("self_attn.v_proj", h, H_kv * d, qkv_bias), Linear("self_attn.o_proj", H * d, h, bias),
               Linear("mlp.gate_proj", h, m, mlp_bias), Linear("mlp.up_proj", h, m, mlp_bias),
               Linear("mlp.down_proj", m, h, mlp_bias))
    norms = [("input_layernorm", h), ("post_attention_layernorm", h)]
    if kind in FOUR_NORMS:
        norms += [("pre_feedforward_layernorm", h), ("post_feedforward_layernorm", h)]
    if kind == "gemma3_text":
        norms = [("self_attn.q_norm", d), ("self_attn.k_norm", d), *norms]
    act = getattr(c, "hidden_activation", None) or getattr(c, "hidden_act", "silu")
    types, window = getattr(c, "layer_types", None), getattr(c, "sliding_window", None) or 0
    windows = tuple(window if types is None or types[i] == "sliding_attention" else 0
                    for i in range(c.num_hidden_layers))
    return Shape(kind, "llama", c.num_hidden_layers, h, H, H_kv, d, m, c.vocab_size, bool(c.tie_word_embeddings),
                 linears, tuple(norms), "model.layers", "model.norm",
                 "gemma" if kind.startswith("gemma") else "rms", act,
                 attention_dropout=float(getattr(c, "attention_dropout", 0.0) or 0.0),
                 softcap=getattr(c, "attn_logit_softcapping", None) is not None,
                 logit_softcap=getattr(c, "final_logit_softcapping", None) is not None, windows=windows)


def _gpt2(c: Any, kind: str) -> Shape:
    h, H = c.n_embd, c.n_head
    m = c.n_inner or 4 * h
    linears = (Linear("attn.c_attn", h, 3 * h, True), Linear("attn.c_proj", h, h, True), Linear("mlp.c_fc", h, m, True),
               Linear("mlp.c_proj", m, h, True))
    return Shape(kind, "gpt2", c.n_layer, h, H, H, h // H, m, c.vocab_size, bool(c.tie_word_embeddings), linears,
                 (("ln_1", h), ("ln_2", h)), "transformer.h", "transformer.ln_f", "layer", c.activation_function,
                 c.n_positions, float(c.resid_pdrop), float(c.attn_pdrop))


def _opt(c: Any, kind: str) -> Shape:
    h, H, m, bias = c.hidden_size, c.num_attention_heads, c.ffn_dim, bool(c.enable_bias)
    if c.word_embed_proj_dim != h or not c.do_layer_norm_before:
        raise ValueError(f"the formula knows OPT with word_embed_proj_dim = hidden_size and a norm before each sublayer"
                         f"; this one has word_embed_proj_dim={c.word_embed_proj_dim}, hidden_size={h}, "
                         f"do_layer_norm_before={c.do_layer_norm_before}. simulate() runs it: use that.")
    linears = (*(Linear(f"self_attn.{name}", h, h, bias) for name in ("k_proj", "v_proj", "q_proj", "out_proj")),
               Linear("fc1", h, m, bias), Linear("fc2", m, h, bias))
    return Shape(kind, "opt", c.num_hidden_layers, h, H, H, h // H, m, c.vocab_size, bool(c.tie_word_embeddings),
                 linears, (("self_attn_layer_norm", h), ("final_layer_norm", h)), "model.decoder.layers",
                 "model.decoder.final_layer_norm", "layer", c.activation_function, c.max_position_embeddings + 2,
                 float(c.dropout), float(c.attention_dropout))
