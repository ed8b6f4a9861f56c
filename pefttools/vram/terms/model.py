"""The layers of the whole model: what each keeps, and whether a gradient reaches it.

    embedding ── layer 0 ── layer 1 ── … ── layer L−1 ── last norm ── head ── loss
       no gradient ▲   ▲ first adapted layer: from here on activations are kept

With checkpointing a layer keeps its input alone, e·N·h, and everything else is made again in the backward pass.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from pefttools.vram.job import DTYPES, Job
from pefttools.vram.shape import Shape
from pefttools.vram.terms import adapters
from pefttools.vram.terms.activations import Method, layer_kept
from pefttools.vram.terms.attention import looks_back
from pefttools.vram.terms.kept import Kept, Tokens
from pefttools.vram.terms.sites import LORA, adapted, trained_norms
from pefttools.vram.terms.tensors import block


@dataclass(frozen=True)
class Layers:
    """For each layer: what the method does there, what its operations keep, and whether a gradient reaches it."""

    methods: list[Method]
    kept: list[Kept]
    reached: list[bool]
    around: int                      # kept outside of the layers: rotary tables, the last norm, what the head needs


def layers_of(job: Job, s: Shape, t: Tokens) -> Layers:
    methods = [replace(method, masked=looks_back(s, t, i)) for i, method in enumerate(methods_of(job, s))]
    gradient = job.method in ("full", "prompt", "ptuning") or job.checkpointing and job.library == "peft"
    kept, reached = [], []
    memo: dict[tuple[Method, bool], tuple[Kept, bool]] = {}
    for method in methods:
        if (method, gradient) not in memo:
            memo[method, gradient] = layer_kept(job, s, t, method, gradient)
        mine, after = memo[method, gradient]
        kept.append(mine)
        reached.append(after)
        gradient = after
    return Layers(methods, kept, reached, around(job, s, t))


def methods_of(job: Job, s: Shape) -> list[Method]:
    """What the job's method does in each layer."""
    if job.method in LORA or job.method == "ia3":
        return [Method(adapted=paths) for paths in adapted(job, s)]
    if job.method == "ln_tuning":
        return [Method(norms=names) for names in trained_norms(job, s)[0]]
    if job.method == "llama_adapter":
        count, P = adapters.llama_adapter_layers(job, s), adapters.virtual_tokens(job)
        return [Method(prompts=P if i >= s.L - count else 0) for i in range(s.L)]
    if job.method == "bottleneck":
        return [_bottlenecks(job, s, i) for i in range(s.L)]
    return [Method()] * s.L


def _bottlenecks(job: Job, s: Shape, i: int) -> Method:
    where = adapters.placement(job)
    some = job.options.get("layers_to_transform")
    some = [some] if isinstance(some, int) else some
    drop = job.options.get("drop_layers")
    drop = [drop] if isinstance(drop, int) else drop or []
    norms = frozenset(name for name, d in s.norms if d == s.h) if job.options.get("train_layer_norms") else frozenset()
    if where in adapters.BLOCKS:
        here = ({"before"} if i == 0 and "input" in where else set()) \
            | ({"block"} if i == s.L - 1 and "output" in where else set())
    elif some and i not in some or i in drop:
        return Method()
    else:
        here = {"houlsby": {"attention", "feedforward"}, "pfeiffer": {"feedforward"}, "parallel": {"beside"},
                "bapna": {"block"}}[where]
    return Method(bottlenecks=frozenset(here), norms=norms)


def around(job: Job, s: Shape, t: Tokens) -> int:
    """Kept outside of the layers, in bytes.

    rotary tables cos, sin      2·e·T·d, for all layers together (Llama; Gemma-3 has two pairs)
    last norm                   as in a layer; trained: its normalised input
    head                        trained: its input e·N·h
    a mask                      e·B·T·S (eager), B·T·S (sdpa): with checkpointing, which runs layers again, they wait
    the tokens: ids and labels, shifted labels, 8 bytes each
    """
    from pefttools.vram.terms.activations import _Walk
    from pefttools.vram.terms.attention import has_mask, kernel

    e = DTYPES[job.dtype]
    last = frozenset({"last"}) if job.method == "ln_tuning" and trained_norms(job, s)[1] else frozenset()
    walk = _Walk(job, s, t, Method(norms=last))
    walk.norm("last", True)
    if job.method == "full":
        walk.kept.keep("head's input", e * t.N * s.h)
        if s.dropout and s.family == "gpt2":
            walk.kept.keep("embedding: dropout's mask", t.N * s.h)
    tables = (4 if s.kind == "gemma3_text" else 2) * block(e * t.T * s.d) if s.family == "llama" else 0
    mask = 0
    if job.checkpointing and kernel(job, s) == "eager":
        mask = block(e * t.B * t.T * t.S)
    elif job.checkpointing and has_mask(job):
        mask = block(t.B * t.T * t.S)
    return walk.kept.total + tables + mask + 4 * block(8 * t.N)


def checkpoint(job: Job, s: Shape, t: Tokens) -> int:
    """What a checkpointed layer keeps: its input, e·N·h bytes."""
    return block(DTYPES[job.dtype] * t.N * s.h)
