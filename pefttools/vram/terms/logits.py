"""The logits and what the loss makes of them: often the largest thing of a step.

    logits = x W_headᵀ           e·N·V     held by `outputs` until the step is over
    logits.float()               4·N·V     freed when the loss is returned      (transformers/loss/loss_utils.py)
    log_softmax                  4·N·V     kept for the backward pass
    ∂ of log_softmax             4·N·V     made by nll_loss's backward
    ∂ of logits, float32         4·N·V     made by log_softmax's backward: the peak, with the two above and the logits
                                 ───────
                                 e + 12 = 14·V bytes a token in 16 bits; 16·V in float32 ( `.float()` copies nothing)

N = B·T tokens, V words. A worked number: V = 128,256 is 1.80 MB a token; 4 · 2,048 tokens: 13.7 GiB. Gemma-2's
soft cap on the logits keeps its tanh: + e·V.
"""
from __future__ import annotations

from pefttools.vram.job import DTYPES, Job
from pefttools.vram.shape import Shape
from pefttools.vram.terms.kept import Tokens
from pefttools.vram.terms.tensors import block


def held(job: Job, s: Shape, t: Tokens) -> int:
    """The logits themselves, e·N·V: alive as long as `outputs` is, through backward and step (`Job.keep_outputs`)."""
    return one(job, s, t) if job.keep_outputs else 0


def one(job: Job, s: Shape, t: Tokens) -> int:
    """A number for each token and word in the base's dtype: e·N·V."""
    return block(DTYPES[job.dtype] * t.N * s.V)


def soft_cap(job: Job, s: Shape, t: Tokens) -> int:
    """What tanh keeps where logits are capped, e·N·V."""
    return one(job, s, t) if s.logit_softcap else 0


def loss_peak(job: Job, s: Shape, t: Tokens) -> int:
    """(e + 12)·N·V bytes: logits; log-softmax, its gradient and the gradient of the logits, all three in float32."""
    return held(job, s, t) + soft_cap(job, s, t) + 3 * block(4 * t.N * s.V)


def head_peak(job: Job, s: Shape, t: Tokens) -> int:
    """In the head's backward: the logits, their gradient in the base's dtype, and ∂x = e·N·h."""
    e = DTYPES[job.dtype]
    return held(job, s, t) + soft_cap(job, s, t) + one(job, s, t) + block(e * t.N * s.h)
