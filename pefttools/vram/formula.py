"""estimate(): peak memory of a training step in closed form, term by term, at once.

    peak = weights + constants + adapter + optimizer
         + max over moments of (gradients + activations + logits + temporary)

    moment               gradients          activations            logits             temporary
    loss                 –                  L layers, last norm    (e + 12)·N·V       –
    backward of head     –                  L layers               2·e·N·V            ∂W of a trained head
    backward of layer i  of what lies above layers up to i         e·N·V              the layer's backward
    optimizer step       all                –                      e·N·V              √v of all (AdamW)

With checkpointing "L layers" are L·e·N·h, and layer i is there whole when its turn comes. With accumulation the
gradients of the passes before are there all the time. Letters: `pefttools.vram.shape`; terms: `pefttools.vram.terms`,
each a function with its derivation. Nothing is fitted; what is a stated margin says so (`margin`, `GPU.context`).
"""
from __future__ import annotations

from typing import Any, NamedTuple

from pefttools.vram.gpus import DEFAULT, find_gpu
from pefttools.vram.job import DTYPES, Job, make_job
from pefttools.vram.memory import TERMS, Memory, Moment
from pefttools.vram.plain_config import plain_config
from pefttools.vram.shape import Shape, shape_of
from pefttools.vram.terms import adapters, logits, temporaries
from pefttools.vram.terms.kept import Tokens, tokens_of
from pefttools.vram.terms.margin import margin
from pefttools.vram.terms.model import Layers, checkpoint, layers_of
from pefttools.vram.terms.optimizer import optimizer_state, step_temporary
from pefttools.vram.terms.tensors import block, numbers
from pefttools.vram.terms.weights import base_tensors, constants, weights

CUBLAS_THREADS = 2                        # the caller's and autograd's: each has a workspace


class Parts(NamedTuple):
    """What the moments are made of."""

    job: Job
    s: Shape
    t: Tokens
    layers: Layers
    steady: dict[str, int]                # there at every moment


def estimate(model: Any, method: str = "lora", batch: int = 1, seq: int = 512, **options: Any) -> Memory:
    """Peak memory of one training step of a job (see `Job` for the arguments), by the formula.

    Raises ValueError for a job that cannot be, and for a model whose layer the formula does not know.
    """
    job = make_job(model, method, batch, seq, **options)
    s = shape_of(plain_config(job.model))
    check(job, s)
    t = tokens_of(job)
    parts = Parts(job, s, t, layers_of(job, s, t), steady(job, s))
    moments = [loss(parts), head_backward(parts), *layer_backwards(parts), embedding_backward(parts), step(parts)]
    forward = weight_norm(parts)
    moments += [forward] if forward else []
    moments = [Moment(m.phase, m.where, _all(parts, m.terms)) for m in moments]
    peak = max(moments, key=lambda moment: moment.total)
    lasting = sum(parts.steady.values())
    tensors = adapters.trained_tensors(job, s)
    trained = numbers(tensors)
    total = numbers(base_tensors(s)) + (0 if job.method in ("full", "ln_tuning") else trained)
    total += trained if job.method == "ln_tuning" else 0
    gpu = find_gpu(job.gpu or DEFAULT)
    return Memory(job, "formula", peak.terms, f"{peak.phase}: {peak.where}" if peak.phase != "step" else "step",
                  peak.total + margin(peak.total - lasting, parts.steady["optimizer"] + accumulated(parts),
                                      logits.loss_peak(job, s, t)), gpu.context, trained, total, tuple(moments),
                  _holders(parts), notes(job))


def check(job: Job, s: Shape) -> None:
    """Raise ValueError for what cannot be run at all."""
    adapters.trained_tensors(job, s)                 # a target, rank or placement that there is not
    if s.softcap and job.attention != "eager":
        raise ValueError(f"attention={job.attention!r}: {s.kind} caps its attention scores, which fused kernels do not "
                         f"do, and transformers refuses. Use attention='eager'.")
    if s.positions and tokens_of(job).S > s.positions:
        raise ValueError(f"seq={job.seq}: {s.kind} has a table of {s.positions} positions, and {tokens_of(job).S} are "
                         f"needed. Use seq ≤ {s.positions - (tokens_of(job).S - job.seq)}.")
    if job.library == "peft" and job.method == "llama_adapter" and s.kind == "qwen2":
        raise ValueError("method='llama_adapter' with library='peft': peft has it for llama, mistral and gpt2.")
    if job.master:
        raise ValueError("master=True: the formula does not follow autocast and its copies; simulate() does.")
    if job.gpus > 1:
        raise ValueError(f"gpus={job.gpus}: the formula is for one GPU; simulate() follows FSDP over several.")


def notes(job: Job) -> tuple[str, ...]:
    low, high = find_gpu(job.gpu or DEFAULT).context_range
    return (f"CUDA context: between {low / 2**20:.0f} and {high / 2**20:.0f} MiB; the middle is taken.",
            "reserved: allocated and a stated margin (see terms/margin.py); simulate() replays the allocator.")


# ------------------------------------------------------------------------------------------------ the moments

def steady(job: Job, s: Shape) -> dict[str, int]:
    """What is there at every moment of a step: model, adapter, optimizer state, cuBLAS's workspaces."""
    return {"weights": weights(job, s), "constants": constants(job, s), "adapter": adapters.adapter(job, s),
            "optimizer": optimizer_state(job, s),
            "temporary": CUBLAS_THREADS * find_gpu(job.gpu or DEFAULT).cublas_workspace}


def kept_before(parts: Parts, i: int) -> int:
    """Activations of layers 0 … i − 1."""
    job, s, t, layers = parts.job, parts.s, parts.t, parts.layers
    if job.checkpointing:
        return i * checkpoint(job, s, t)
    return sum(kept.total for kept in layers.kept[:i])


def loss(parts: Parts) -> Moment:
    """When log_softmax's gradient is made: all activations, (e + 12)·N·V of logits."""
    job, s, t = parts.job, parts.s, parts.t
    return Moment("loss", "cross entropy", {"gradients": accumulated(parts),
                                            "activations": kept_before(parts, s.L) + parts.layers.around,
                                            "logits": logits.loss_peak(job, s, t)})


def head_backward(parts: Parts) -> Moment:
    """A trained head makes its gradient, e·V·h, while all layers wait."""
    job, s, t = parts.job, parts.s, parts.t
    own = block(DTYPES[job.dtype] * s.V * s.h) if job.method == "full" else 0
    return Moment("backward", "head", {"gradients": accumulated(parts) + own,
                                       "activations": kept_before(parts, s.L) + parts.layers.around,
                                       "logits": logits.head_peak(job, s, t)})


def layer_backwards(parts: Parts) -> list[Moment]:
    """For each layer that a gradient reaches: what waits below, the gradients from above, and its own moments."""
    job, s, t, layers = parts.job, parts.s, parts.t, parts.layers
    found: list[Moment] = []
    all_gradients, share = adapters.gradients(job, s), gradients_by_layer(parts)
    memo: dict[Any, int] = {}
    above = all_gradients - sum(share)
    for i in reversed(range(s.L)):
        method, kept = layers.methods[i], layers.kept[i]
        if not layers.reached[i]:
            break
        key = (method, kept.total)
        if key not in memo:
            memo[key] = temporaries.layer_backward(job, s, t, method, kept)
        waiting = kept_before(parts, i) + (checkpoint(job, s, t) if job.checkpointing else 0)
        waiting += layers.around
        got = all_gradients if job.accumulate > 1 else above
        found.append(Moment("backward", f"{s.layers}.{i}",
                            {"gradients": got, "activations": waiting + kept.total,
                             "logits": logits.held(job, s, t), "temporary": memo[key] - kept.total}))
        above += share[i]
    return found


def gradients_by_layer(parts: Parts) -> list[int]:
    """Bytes of the gradients that each layer's backward makes; what is in no layer (embeddings, prompts) not."""
    job, s = parts.job, parts.s
    if job.method in ("prompt", "ptuning", "prefix"):
        return [0] * s.L
    size = adapters.trained_size(job)
    whole = adapters.gradients(job, s)
    if job.method == "full":
        one = sum(block(each.d_in * each.d_out * size) + (block(each.d_out * size) if each.bias else 0)
                  for each in s.linears) + sum(s.norm_vectors * block(width * size) for _, width in s.norms)
        return [one] * s.L
    active = [bool(method.adapted or method.norms or method.bottlenecks or method.prompts)
              for method in parts.layers.methods]
    return [whole // max(1, sum(active)) if on else 0 for on in active]


def embedding_backward(parts: Parts) -> Moment:
    """The last of the backward pass in full fine-tuning. A tied weight has two gradients, the head's and the
    embedding's, and autograd makes their sum in a third place: 2·e·V·h beyond the sum itself. (The head's is a
    transposed view, which InputBuffer::accumulate does not write into.) With accumulation each new one is there beside
    the sum."""
    job, s, t = parts.job, parts.s, parts.t
    one = block(DTYPES[job.dtype] * s.V * s.h)
    extra = (2 * one if s.tied else one if job.accumulate > 1 else 0) if job.method == "full" else 0
    return Moment("backward", "embedding", {"gradients": adapters.gradients(job, s) + extra,
                                            "activations": parts.layers.around, "logits": logits.held(job, s, t)})


def step(parts: Parts) -> Moment:
    """The optimizer's step: all gradients, no activations, the logits still held by `outputs`."""
    job, s, t = parts.job, parts.s, parts.t
    return Moment("step", job.optimizer, {"gradients": adapters.gradients(job, s), "logits": logits.held(job, s, t),
                                          "optimizer": step_temporary(job, s)})


def weight_norm(parts: Parts) -> Moment | None:
    """DoRA's norm of W₀ + sBA in the last layer, where most activations are there already: in its forward pass, or with
    checkpointing when it is run again, in the backward pass."""
    job, s, t, layers = parts.job, parts.s, parts.t, parts.layers
    extra = temporaries.weight_norm(job, s, layers.methods[-1])
    if not extra:
        return None
    again = {"activations": layers.kept[-1].total, "logits": logits.held(job, s, t)} if job.checkpointing else {}
    return Moment("backward" if again else "forward", f"{s.layers}.{s.L - 1}",
                  {"gradients": accumulated(parts), "temporary": extra, "logits": again.get("logits", 0),
                   "activations": kept_before(parts, s.L) + layers.around + again.get("activations", 0)})


def accumulated(parts: Parts) -> int:
    """Gradients of the passes before, with accumulation."""
    return adapters.gradients(parts.job, parts.s) if parts.job.accumulate > 1 else 0


def _all(parts: Parts, terms: dict[str, int]) -> dict[str, int]:
    return {name: parts.steady.get(name, 0) + terms.get(name, 0) for name in TERMS}


def _holders(parts: Parts) -> dict[str, int]:
    """Activations by layer, most first."""
    found = {f"{parts.s.layers}.{i}": checkpoint(parts.job, parts.s, parts.t) if parts.job.checkpointing else kept.total
             for i, kept in enumerate(parts.layers.kept)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
