"""What lives only for a moment of a layer's backward pass, beyond what the layer kept.

The feed-forward comes first in the backward pass, while everything that the layer kept is still there, so its moments
are the candidates; attention's come when the feed-forward's tensors are gone.

    ∂down     g (e·N·h), ∂product (e·N·m), and with an adapter there: products in its dtype (below)
    ∂product  g, ∂product, ∂act, ∂up: e·N·h + 3·e·N·m, less the product itself where it was kept
    ∂attn     `attention.attention_backward`, less what the feed-forward kept
    NF4       the dequantized weight of the matrix at work: e·d_in·d_out, and its scales in float32 (4/64 · d_in·d_out,
              twice for a moment where they are nested)

LoRA of this library (pefttools.lora_update): ∂x of the base in e, the adapter's part in a, cast to e, then added:
(2e + a)·N·d_in + a·N·d_out. peft's: the gradient in float32, twice, and ∂x in float32: a·N·d_in + 2a·N·d_out, x already
gone. DoRA: `dora_product`, `DoraLinearLayer`.
"""
from __future__ import annotations

from pefttools.vram.job import DTYPES, Job
from pefttools.vram.shape import Linear, Shape
from pefttools.vram.terms import adapters
from pefttools.vram.terms.activations import Method
from pefttools.vram.terms.attention import attention_backward, kernel
from pefttools.vram.terms.kept import Kept, Tokens
from pefttools.vram.terms.sites import LORA

FEED_FORWARD = ("gate", "act(gate)", "up", "product", "normed 2", "act", "activation", "gelu", "feedforward", "beside",
                "mlp.", "fc1", "fc2", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm", "ln_2", "final_layer_norm")                # and the norm before it


def layer_backward(job: Job, s: Shape, t: Tokens, method: Method, kept: Kept) -> int:
    """Bytes at the highest moment of one layer's backward, with what the layer kept, without parameter gradients."""
    e = DTYPES[job.dtype]
    g, wide = e * t.N * s.h, e * t.N * s.m
    down, up = s.linears[-1], s.linears[-2]
    total, product = kept.total, kept.get("product", kept.get("act", 0) if s.family != "opt" else 0)
    gated = s.family == "llama"
    moments = [total + g + matrix_backward(job, s, t, down, method),
               total - product + g + (3 if gated else 3 if s.act == "gelu_new" else 2) * wide]
    after = total - product - sum(kept.get(name, 0) for name in ("act(gate)", "up")) - _of(kept, down.path)
    moments.append(after + g + (2 if gated else 1) * wide + matrix_backward(job, s, t, up, method) - wide * gated)
    feed_forward = sum(size for name, size in kept.items() if name.startswith(FEED_FORWARD))
    gone = sum(kept.get(name, 0) for name in ("o", "v")) if kernel(job, s, method.masked) in ("eager", "math") else 0
    moments.append(total - feed_forward - gone + 2 * g + attention_backward(job, s, t, method.masked))
    moments.append(total - feed_forward + g + matrix_backward(job, s, t, s.linears[0], method) + e * t.N * s.q)
    return max(moments)


def matrix_backward(job: Job, s: Shape, t: Tokens, each: Linear, method: Method) -> int:
    """Bytes taken by the backward of one matrix at its highest: ∂x, the adapter's products, a dequantized weight."""
    e, a, N = DTYPES[job.dtype], adapters.trained_size(job), t.N
    x, y = N * each.d_in, N * each.d_out
    weight = dequantized(job, each) if job.quantization else 0
    plain = e * x + weight
    if job.method == "full":
        return plain + e * each.d_in * each.d_out
    if each.path not in method.adapted or job.method not in LORA:
        return plain
    dora = job.method.endswith("dora")
    if job.library == "peft":
        scaled = 4 * a * y if dora else 2 * a * y
        return max(plain + a * y, scaled + a * x)
    if dora:
        return max((e + 2 * a) * x + (a + e) * y + weight, (a + e) * x + (2 * a + e) * y + weight,
                   (a + e + a) * x + (a + e) * y)
    return max(plain, (2 * e + a) * x + a * y if e < a else (e + a) * x)


def dequantized(job: Job, each: Linear) -> int:
    """e·d_in·d_out, and its scales in float32 while they are read (nested: before and after the offset is added)."""
    n = each.d_in * each.d_out
    scales = -(-n // 64) * 4 * 2 if job.quantization == "nf4-dq" else 0
    return DTYPES[job.dtype] * n + scales


def weight_norm(job: Job, s: Shape, method: Method) -> int:
    """DoRA's ‖W₀ + sBA‖ in the forward pass, bytes for the largest matrix.

    peft forms in float32 and whole I [d_in, d_in] (the graph of BA holds it), BA, W₀, sBA and W₀ + sBA: 4·d_in² +
    4·4·d_in·d_out (`DoraLinearLayer.forward`). pefttools takes some rows at a time, in 2 MiB.
    """
    if not job.method.endswith("dora") or not method.adapted:
        return 0
    if job.library == "pefttools":
        return 2 ** 21
    return max(4 * each.d_in ** 2 + 4 * 4 * each.d_in * each.d_out for each in s.linears if each.path in method.adapted)


def _of(kept: Kept, path: str) -> int:
    return sum(size for name, size in kept.items() if name.startswith(f"{path}:"))
