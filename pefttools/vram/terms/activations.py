"""What one decoder layer keeps for the backward pass, tensor by tensor, for each method.

An operation keeps what its gradient needs. Of y = f(x) with a frozen weight that is often less than with a trained one:

    operation                 keeps                                         frozen    trained    (bytes a token, e = 2)
    RMSNorm                   x in float32, 1/rms; trained: x/rms           4h + 4    6h + 4
    linear y = xWᵀ            trained: x                                    0         2·d_in
    attention (flash)         q, k, v, out, logsumexp                       4q + 4kv + 4H
    act(gate) · up            gate, act(gate), up                           6m        6m
    residual sum              nothing

    full fine-tuning of a Llama        16h + 4q + 4kv + 8m + 4H + 8
    a frozen Llama                      8h + 4q + 4kv + 6m + 4H + 8

What an adapter on a matrix adds (a = 4: its own dtype, r the rank):

    pefttools LoRA    x as it came (shared by q, k, v; gate, up)            + a·r each
    peft LoRA         x in float32 for each matrix                          4·d_in + a·r each; dropout: + d_in
    pefttools DoRA    x as it came, vectors; narrow (d_in < 1024): + e·d_out + a·r
    peft DoRA         x in float32, W₀x, BAx                                4·d_in + a·r + (2 + 4)·d_out each
    IA³               what is scaled                                        2·d_out, or at the input 2·d_in (peft: 4)
    bottleneck        h in float32, the activation                          4h + 4w each
    LLaMA-Adapter     q again, its scores over P prompts                    2q + 8·H·P

    A worked number, Llama-3.2-1B (h 2048, q 2048, kv 512, m 8192), KiB a token and layer: full 106.1, pefttools' LoRA
    on all matrices (r = 16) 98.6, peft's 154.6.

Nothing is kept where no gradient flows: below the first adapted layer, and in its input norm.
"""
from __future__ import annotations

from dataclasses import dataclass

from pefttools.vram.job import DTYPES, Job
from pefttools.vram.shape import Linear, Shape
from pefttools.vram.terms import adapters
from pefttools.vram.terms.attention import keep_attention
from pefttools.vram.terms.kept import Kept, Tokens
from pefttools.vram.terms.sites import LORA, at_input


@dataclass(frozen=True)
class Method:
    """What the job does in one layer."""

    adapted: frozenset[str] = frozenset()         # matrices with LoRA, DoRA or IA³
    norms: frozenset[str] = frozenset()           # norms that are trained
    bottlenecks: frozenset[str] = frozenset()     # "before" the layer, "attention", "feedforward", "beside", "block"
    prompts: int = 0                              # P of LLaMA-Adapter
    masked: bool = False                          # (the layer's own, not the method's:) attention has a mask of its own


def layer_kept(job: Job, s: Shape, t: Tokens, method: Method, gradient: bool) -> tuple[Kept, bool]:
    """(what the layer keeps, whether its output needs a gradient); `gradient`: whether its input does."""
    walk = _Walk(job, s, t, method)
    return {"llama": _llama, "gpt2": _gpt2, "opt": _opt}[s.family](walk, walk.bottleneck("before", gradient))


class _Walk:
    """The operations of a layer, in its order: each writes what it keeps and says whether a gradient goes on."""

    def __init__(self, job: Job, s: Shape, t: Tokens, method: Method) -> None:
        self.job, self.s, self.t, self.method = job, s, t, method
        self.e, self.a = DTYPES[job.dtype], adapters.trained_size(job)
        self.full = job.method == "full"
        self.kept = Kept()

    def norm(self, name: str, gradient: bool, n: int | None = None) -> bool:
        """RMSNorm computes in float32 (Gemma's multiplies there too); LayerNorm is one kernel: x, two numbers a row."""
        s, t, e = self.s, self.t, self.e
        n = t.N * s.h if n is None else n
        rows = n // (s.h if "q_norm" not in name and "k_norm" not in name else s.d)
        trained = self.full or name in self.method.norms
        if not (gradient or trained):
            return False
        if s.norm == "layer":
            self.kept.keep(f"{name}: x", e * n)
            self.kept.keep(f"{name}: mean", 4 * rows)
            self.kept.keep(f"{name}: 1/std", 4 * rows)
            return True
        if gradient:
            self.kept.keep(f"{name}: x in float32", 4 * n)
            self.kept.keep(f"{name}: 1/rms", 4 * rows)
        if trained:
            self.kept.keep(f"{name}: x/rms", (4 if s.norm == "gemma" else e) * n)
        return True

    def linear(self, path: str, x: str, gradient: bool) -> bool:
        """y = xWᵀ + b with what the method puts beside it; `x` names the input, which several may share."""
        each, t, keep = self.s.linear(path), self.t, self.kept.keep
        if self.full:
            keep(x, self.e * t.N * each.d_in)
            return True
        if path not in self.method.adapted:
            return gradient
        if self.job.method in LORA:
            self._lora(each, x)
        elif at_input(self.s, path, self.job):
            if self.job.library == "peft":
                keep(f"{path}: x in float32", self.a * t.N * each.d_in)
            else:
                keep(x, self.e * t.N * each.d_in)
        else:
            keep(f"{path}: y", self.e * t.N * each.d_out)
        return True

    def _lora(self, each: Linear, x: str) -> None:
        t, a, e, keep = self.t, self.a, self.e, self.kept.keep
        r, dora = adapters.rank(self.job), self.job.method.endswith("dora")
        dropout = self.job.options.get("lora_dropout", self.job.options.get("dropout", 0.0)) > 0
        if self.job.library == "peft":
            keep(f"{each.path}: x in float32" if e < a or dropout else x, a * t.N * each.d_in)
            keep(f"{each.path}: Ax", a * t.N * r)
            if dora:
                keep(f"{each.path}: W₀x", e * t.N * each.d_out)
                keep(f"{each.path}: BAx", a * t.N * each.d_out)
        elif dora:
            keep(x, e * t.N * each.d_in)
            if each.d_in < 1024 or e > 2:
                keep(f"{each.path}: W₀x", e * t.N * each.d_out)
                keep(f"{each.path}: Ax", a * t.N * r)
        else:
            if dropout:
                keep(f"{each.path}: dropped x", a * t.N * each.d_in)
            else:
                keep(x, e * t.N * each.d_in)
            keep(f"{each.path}: Ax", a * t.N * r)
        if dropout:
            keep(f"{each.path}: dropout's mask", t.N * each.d_in)

    def bottleneck(self, where: str, gradient: bool) -> bool:
        """h in float32 for W_down, f(…) for W_up; an own norm keeps its input and its output is what W_down needs."""
        if where not in self.method.bottlenecks:
            return gradient
        t, h, w, keep = self.t, self.s.h, adapters.width(self.job, self.s), self.kept.keep
        keep(f"{where}: h in float32", self.a * t.N * h)
        keep(f"{where}: f(W_down h)", self.a * t.N * w)
        if self.job.options.get("activation", "relu") not in ("relu", "tanh", "sigmoid", "identity"):
            keep(f"{where}: W_down h", self.a * t.N * w)
        if adapters.own_norm(self.job):
            keep(f"{where}: LN(h)", self.a * t.N * h)
        if self.job.options.get("scale") == "learned":
            keep(f"{where}: update", self.a * t.N * h)
        return True

    def dropout(self, name: str, gradient: bool) -> bool:
        """One byte a number."""
        if self.s.dropout and gradient:
            self.kept.keep(f"{name}: dropout's mask", self.t.N * self.s.h)
        return gradient

    def prompts(self) -> None:
        """LLaMA-Adapter: q for its own scores, K and V of P prompts for each row, softmax in float32, gated softmax."""
        t, s, e, P = self.t, self.s, self.e, self.method.prompts
        keep = self.kept.keep
        keep("prompts: q", e * t.N * s.q)
        keep("prompts: K", e * t.B * s.q * P)
        keep("prompts: V", e * t.B * s.q * P)
        keep("prompts: softmax", 4 * t.N * s.H * P)
        keep("prompts: softmax in the base's dtype", e * t.N * s.H * P)
        keep("prompts: gated", e * t.N * s.H * P)

    def attend(self, q: bool, k: bool, v: bool) -> bool:
        """Attention; a prefix's keys need a gradient whatever the words' do."""
        gradient = q or k or v or self.job.method == "prefix"
        if gradient:
            keep_attention(self.kept, self.job, self.s, self.t, self.method.masked)
        return gradient


def _llama(w: _Walk, gradient: bool) -> tuple[Kept, bool]:
    s, four, residual = w.s, len(w.s.norms) >= 4, gradient
    normed = w.norm("input_layernorm", gradient)
    q, k, v = (w.linear(f"self_attn.{name}_proj", "normed", normed) for name in "qkv")
    if s.kind == "gemma3_text":
        q, k = w.norm("self_attn.q_norm", q, w.t.N * s.q), w.norm("self_attn.k_norm", k, w.t.N * s.kv)
    y = w.linear("self_attn.o_proj", "o", w.attend(q, k, v))
    y = w.bottleneck("attention", y)
    if w.method.prompts:
        w.prompts()
        y = True
    if four:
        y = w.norm("post_attention_layernorm", y)
    residual = residual or y
    normed = w.norm("pre_feedforward_layernorm" if four else "post_attention_layernorm", residual)
    gate, up = w.linear("mlp.gate_proj", "normed 2", normed), w.linear("mlp.up_proj", "normed 2", normed)
    wide = w.e * w.t.N * s.m
    if gate:
        w.kept.keep("gate", wide)
    if up:
        w.kept.keep("act(gate)", wide)
    if gate:
        w.kept.keep("up", wide)
    y = w.linear("mlp.down_proj", "product", gate or up)
    y = w.bottleneck("beside", w.bottleneck("feedforward", y))
    if four:
        y = w.norm("post_feedforward_layernorm", y)
    return w.kept, w.bottleneck("block", residual or y)


def _gpt2(w: _Walk, gradient: bool) -> tuple[Kept, bool]:
    s = w.s
    qkv = w.linear("attn.c_attn", "normed", w.norm("ln_1", gradient))
    y = w.linear("attn.c_proj", "o", w.attend(qkv, qkv, qkv))
    y = w.dropout("attention", w.bottleneck("attention", y))
    if w.method.prompts:
        w.prompts()
        y = True
    residual = gradient or y
    y = w.linear("mlp.c_fc", "normed 2", w.norm("ln_2", residual))
    wide = w.e * w.t.N * s.m
    if y and s.act == "gelu_new":                  # written out in operations: x/2, x for x³, tanh, 1 + tanh
        for part in ("x/2", "x", "tanh", "1 + tanh"):
            w.kept.keep(f"gelu: {part}", wide)
    elif y:
        w.kept.keep("activation" if s.act != "relu" else "act", wide)
    y = w.linear("mlp.c_proj", "act", y)
    y = w.bottleneck("beside", w.dropout("feedforward", w.bottleneck("feedforward", y)))
    return w.kept, w.bottleneck("block", residual or y)


def _opt(w: _Walk, gradient: bool) -> tuple[Kept, bool]:
    s = w.s
    normed = w.norm("self_attn_layer_norm", gradient)
    q, k, v = (w.linear(f"self_attn.{name}_proj", "normed", normed) for name in "qkv")
    y = w.linear("self_attn.out_proj", "o", w.attend(q, k, v))
    y = w.dropout("attention", w.bottleneck("attention", y))
    residual = gradient or y
    y = w.linear("fc1", "normed 2", w.norm("final_layer_norm", residual))
    if y:
        w.kept.keep("act" if s.act == "relu" else "activation", w.e * w.t.N * s.m)  # relu keeps its output, fc2's input
    y = w.linear("fc2", "act", y)
    y = w.bottleneck("beside", w.bottleneck("feedforward", y))
    return w.kept, w.bottleneck("block", w.dropout("feedforward", y) or residual)
