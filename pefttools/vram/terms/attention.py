"""What attention keeps for the backward pass, and what its backward takes: by kernel.

    flash        q, k, v, out      e·N·(2q + 2kv)   lse 4·N·H                  no T × T matrix
    efficient    the same, with k and v repeated for every head of q (transformers repeats them where there is a mask),
                 and the mask in numbers: e·B·T·⌈S/16⌉·16
    eager        q, k, v once more, in the order of heads: 3·e·N·q (k and v repeated)
                 softmax in float32 4·N·H·S, in the base's dtype e·N·H·S
    math         what torch runs where no kernel fits (on a T4: models whose heads share keys): all in float32,
                 q, k, v 12·N·q, softmax 4·N·H·S

    B rows, T tokens, N = B·T, S = T + P keys (P of a prefix), H heads of width d, q = H·d, kv = H_kv·d

Dao 2023, arXiv:2307.08691 (flash); `eager_attention_forward` in transformers' modeling files; what torch chooses is in
`pefttools.vram.kernels`. A worked number, Llama-3.2-1B (H = 32), T = 4096: eager keeps 6·32·4096 = 768 KiB a token and
layer, flash 10.1 KiB.
"""
from __future__ import annotations

from pefttools.vram.job import DTYPES, Job
from pefttools.vram.shape import Shape
from pefttools.vram.terms.kept import Kept, Tokens

AMPERE = (8, 0)


def kernel(job: Job, s: Shape, masked: bool = False) -> str:
    """"flash", "efficient", "math" or "eager": what runs on the job's GPU (an A100 where none is named)."""
    if job.attention == "eager":
        return "eager"
    from pefttools.vram.gpus import DEFAULT, find_gpu

    ampere = find_gpu(job.gpu or DEFAULT).capability >= AMPERE
    half = DTYPES[job.dtype] == 2
    if job.attention == "flash" and half:
        return "flash"
    masked = masked or has_mask(job)
    if not masked and half and ampere and s.d <= 256:
        return "flash"
    fits = s.d % (8 if half else 4) == 0 and (job.dtype != "bfloat16" or ampere)
    return "efficient" if fits and (asks_for_repeat(s, masked) or s.H == s.H_kv) else "math"


def has_mask(job: Job) -> bool:
    """Whether transformers makes a T × S mask: rows of several lengths, or keys that no query stands for (a prefix)."""
    return job.padded or job.method == "prefix"


def repeats(s: Shape, masked: bool) -> bool:
    """Whether k and v are copied for every head of q: with a mask, and for heads wider than 256. (One key for all heads
    is repeated without a copy.)"""
    return 1 < s.H_kv < s.H and asks_for_repeat(s, masked)


def asks_for_repeat(s: Shape, masked: bool) -> bool:
    """Whether transformers gives attention as many keys as queries (`use_gqa_in_sdpa`)."""
    return masked or s.d > 256


def looks_back(s: Shape, t: Tokens, i: int) -> bool:
    """Whether layer i has a window that the row does not fit into: then it has a mask (Gemma-2 and -3, Mistral)."""
    return bool(s.windows and s.windows[i] and t.S >= s.windows[i])


def keep_attention(kept: Kept, job: Job, s: Shape, t: Tokens, masked: bool = False) -> None:
    """Into `kept`: what one layer's attention keeps. `masked`: it has a mask of its own (`looks_back`)."""
    e, which, masked = DTYPES[job.dtype], kernel(job, s, masked), masked or has_mask(job)
    if which == "eager":
        _keep_eager(kept, s, t, e)
    elif which == "math":
        _keep_math(kept, s, t, e)
    else:
        width = s.q if repeats(s, masked) else s.kv
        fused = s.family == "gpt2"                                   # q, k and v are views of one product
        kept.keep("c_attn" if fused else "q", e * t.N * (3 if fused else 1) * s.q)
        if not fused or t.S > t.T:
            kept.keep("k", e * t.B * t.S * width)
            kept.keep("v", e * t.B * t.S * width)
        if t.S > t.T and width > s.kv:                               # the prefix's cache, before heads are repeated
            kept.keep("cached k", e * t.B * t.S * s.kv)
            kept.keep("cached v", e * t.B * t.S * s.kv)
        kept.keep("o", e * t.N * s.q)
        rows = -(-t.T // 32) * 32 if which == "efficient" else t.T
        kept.keep("lse", 4 * t.B * s.H * rows)
        if which == "efficient" and masked:
            kept.keep("mask", e * t.B * t.T * (-(-t.S // 16) * 16))


def _keep_eager(kept: Kept, s: Shape, t: Tokens, e: int) -> None:
    scores = t.N * s.H * t.S
    kept.keep("q", e * t.N * s.q)
    kept.keep("k", e * t.B * t.S * s.q)
    kept.keep("v", e * t.B * t.S * s.q)
    if s.softcap:
        kept.keep("tanh of scores", e * scores)
    if s.family == "gpt2":
        kept.keep("softmax", e * scores)
    else:
        kept.keep("softmax", 4 * scores)
        if e < 4:
            kept.keep("softmax in the base's dtype", e * scores)
    if s.attention_dropout:
        kept.keep("dropout's mask of scores", scores)
        kept.keep("dropped scores", e * scores)
        kept.pop("softmax in the base's dtype", None)


def _keep_math(kept: Kept, s: Shape, t: Tokens, e: int) -> None:
    # torch's math kernel computes in float32, also for 16 bits: scaled q and k, v, and softmax wait in it
    for name, rows in (("q", t.N), ("k", t.B * t.S), ("v", t.B * t.S)):
        kept.keep(name, 4 * rows * s.q)
    kept.keep("softmax", 4 * t.N * s.H * t.S)


def attention_backward(job: Job, s: Shape, t: Tokens, masked: bool = False) -> int:
    """Bytes that attention's backward takes at its most, beyond what was kept.

    flash, efficient: ∂out, ∂q, ∂k, ∂v, a sum of ∂q in float32 (4·N·q, heads padded to a multiple of 32) and one number
    a row; where heads share keys ∂k, ∂v for every head, before they are summed.
    eager, math: the gradients of softmax and of its input, both in float32 (bfloat16 scores are cast before softmax,
    see `softmax` in aten/src/ATen/native/SoftMax.cpp): 8·N·H·S; eager's softmax in the base's dtype is gone by then:
    − e·N·H·S.
    GPT-2's softmax is in the base's dtype: 2·e·N·H·S, less the dropped scores.
    """
    e, which = DTYPES[job.dtype], kernel(job, s, masked)
    scores = t.N * s.H * t.S
    if which == "eager" and s.family == "gpt2":
        return 2 * e * scores - (e * scores if s.attention_dropout else 0)
    if which in ("eager", "math"):
        return 8 * scores - (e * scores if which == "eager" and e < 4 else 0)
    width = -(-s.d // 32) * 32
    wide = s.q if s.H != s.H_kv else 0
    return e * (2 * t.N * s.q + 2 * t.B * t.S * s.kv + 2 * t.B * t.S * wide) + 4 * t.N * (s.H * width + s.H)
