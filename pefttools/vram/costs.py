"""What an optimizer step costs in arithmetic: the part of a configuration's speed that follows from shapes alone.

    for every token                              frozen base      full fine-tuning      with checkpointing
    forward          2·N  (a multiply, an add)        2N                2N                    2N
    again in backward, layers only                                                          + 2N_layers
    gradient of inputs                                2N                2N                    2N
    gradient of weights                                                 2N
    the adapter itself (forward, both gradients)      6·P
    attention, causal, S tokens a row, L layers       2·q·S·L forward, 2.5 times that backward

N: the weights that a token is multiplied with: layers and output head, not the embedding (a look-up). P: parameters
of LoRA, DoRA or a bottleneck. 2.5: a fused kernel computes the scores again (Dao 2023, "FlashAttention-2",
arXiv:2307.08691, section 3.1: 5 products backward, 2 forward). Kaplan et al. 2020, arXiv:2001.08361, section 2.1
counts 6·N.

FLOPs are no seconds: small passes use a GPU badly, 4-bit weights are unpacked on the way (2 operations a weight and
pass, counted), DoRA's norms and optimizers move memory (not counted). As a ratio of two ways to run one step they are
fair.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pefttools.vram.job import Job
from pefttools.vram.memory import Memory

PRODUCTS = ("lora", "qlora", "dora", "qdora", "bottleneck")   # whose parameters multiply every token


@dataclass(frozen=True)
class Cost:
    """Of one optimizer step, over all passes and GPUs. `passes`: forward and backward runs one after the other."""

    flops: float
    recomputed: float       # of these, the layers' second forward under checkpointing
    passes: int


@dataclass(frozen=True)
class Shape:
    """What of a model's configuration the arithmetic depends on: h, V, L and q = heads · head width."""

    h: int
    V: int
    L: int
    q: int
    tied: bool

    @classmethod
    def of(cls, model: Any) -> Shape:
        from pefttools.vram import shape
        from pefttools.vram.plain_config import plain_config

        config = plain_config(model)
        if config.model_type in shape.FAMILIES:
            s = shape.shape_of(config)
            return cls(s.h, s.V, s.L, s.q, s.tied)
        heads = config.num_attention_heads                     # a family that only the simulator knows
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.hidden_size, config.vocab_size, config.num_hidden_layers, heads * width,
                   bool(getattr(config, "tie_word_embeddings", False)))


def cost(job: Job, memory: Memory, shape: Shape | None = None) -> Cost:
    """From the job's shapes and the numbers of parameters in `memory`."""
    shape = shape or Shape.of(job.model)
    base = memory.parameters - (0 if job.method == "full" else memory.trainable)
    head = shape.V * shape.h
    body = max(0, base - head * (1 if shape.tied else 2))
    rows, passes = job.batch * job.accumulate * job.gpus, job.accumulate
    own = job.seq + (job.length if job.method in ("prompt", "ptuning") else 0)
    seen = own + (job.length if job.method in ("prefix", "llama_adapter") else 0)
    T = rows * own
    attention = 2.0 * shape.q * seen * shape.L * T
    layers = 2.0 * body * T + attention
    adapter = 2.0 * memory.trainable * T if job.method in PRODUCTS else 0.0
    again = layers + adapter if job.checkpointing else 0.0
    weights = 2.0 * (body + head) * T if job.method == "full" else 0.0
    unpack = 2.0 * body * passes * job.gpus * (3 if job.checkpointing else 2) if job.quantization else 0.0
    fused = 2.0 if job.attention == "eager" else 2.5
    backward = 2.0 * (body + head) * T + fused * attention + 2 * adapter + weights
    return Cost(layers + adapter + 2.0 * head * T + backward + again + unpack, again, passes)
