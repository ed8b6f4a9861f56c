"""What each method adds and trains: its tensors, counted exactly.

    full           every parameter
    lora           r·(d_in + d_out)                       a matrix            Hu et al. 2021, section 4.1
    dora           r·(d_in + d_out) + d_out               with the magnitude  Liu et al. 2024, equation 5
    bottleneck     2·w·h + h + w                          an adapter of width w; houlsby has two a layer
    ia3            d_out, or d_in for the feed-forward    a matrix            Liu et al. 2022
    ln_tuning      d (and d with a bias)                  a norm
    prompt         P·h                                    in the model
    ptuning        P·h + 3·(h² + h)                       the encoder (its last layers h → h' → h' → h)
    prefix         P·L·2·kv                               (with projection: an MLP before that)
    llama_adapter  P·h + 1                                a layer

A test compares every one of them, for every preset, with what is attached and with peft.
"""
from __future__ import annotations

from pefttools.vram.job import DTYPES, Job
from pefttools.vram.shape import Linear, Shape
from pefttools.vram.terms.sites import adapted, trained_norms
from pefttools.vram.terms.tensors import Tensors, bytes_of, numbers
from pefttools.vram.terms.weights import base_tensors

BLOCKS = ("input", "output", "input_output")
LLAMA_ADAPTER = ("llama", "mistral", "qwen2", "gpt2")


def trained_tensors(job: Job, s: Shape) -> list[Tensors]:
    """Every tensor that the optimizer sees. Raises ValueError where the method cannot be had on this model."""
    return {"full": _full, "lora": _lora, "qlora": _lora, "dora": _lora, "qdora": _lora, "bottleneck": _bottleneck,
            "ia3": _ia3, "ln_tuning": _norms, "prompt": _prompt, "ptuning": _ptuning, "prefix": _prefix,
            "llama_adapter": _llama_adapter}[job.method](job, s)


def trainable(job: Job, s: Shape) -> int:
    """How many parameters are trained."""
    return numbers(trained_tensors(job, s))


def trained_size(job: Job) -> int:
    """Bytes of a trained number: the base's dtype where the base, its norms or (in 16 bits) LLaMA-Adapter's prompts are
    trained; otherwise the adapter's, float32 by default, as in peft (`autocast_adapter_dtype`)."""
    in_the_base = job.method == "full" or job.library == "pefttools" and job.method == "ln_tuning" \
        or job.method == "llama_adapter" and not job.quantization
    if in_the_base:
        return DTYPES[job.dtype if job.adapter_dtype == "float32" or job.method == "full" else job.adapter_dtype]
    return DTYPES[job.adapter_dtype]


def adapter(job: Job, s: Shape) -> int:
    """Bytes of what the method adds; 0 for full fine-tuning, whose trained tensors are the weights."""
    return 0 if job.method == "full" else bytes_of(trained_tensors(job, s), trained_size(job))


def gradients(job: Job, s: Shape) -> int:
    """Bytes of the gradients of everything that is trained, in its own dtype."""
    return bytes_of(trained_tensors(job, s), trained_size(job))


# ------------------------------------------------------------------------------------------------ method by method

def _full(job: Job, s: Shape) -> list[Tensors]:
    return base_tensors(s)


def rank(job: Job) -> int:
    return job.options.get("r", job.r)


def check_rank(r: int, linear: Linear) -> None:
    """Raise ValueError where r is more than the matrix has rows or columns (peft allows it, and wastes parameters)."""
    most = min(linear.d_in, linear.d_out)
    if r > most:
        raise ValueError(f"r={r} is above the rank that {linear.path} [{linear.d_out}, {linear.d_in}] can have: {most}"
                         f". Use r ≤ {most}, or leave {linear.name!r} out of targets.")


def _lora(job: Job, s: Shape) -> list[Tensors]:
    r, found = rank(job), []
    for layer in adapted(job, s):
        for each in s.linears:
            if each.path in layer:
                if job.library == "pefttools":
                    check_rank(r, each)
                found += [Tensors(r * each.d_in), Tensors(r * each.d_out)]
                found += [Tensors(each.d_out)] if job.method.endswith("dora") else []
    return found


def width(job: Job, s: Shape) -> int:
    """w of a bottleneck: `width`, or h / reduction_factor."""
    if job.options.get("reduction_factor"):
        return max(1, int(s.h / job.options["reduction_factor"]))
    return job.options.get("bottleneck", job.width)


def placement(job: Job) -> str:
    return job.options.get("placement", "pfeiffer")


def own_norm(job: Job) -> bool:
    norm = job.options.get("layer_norm")
    return placement(job) == "bapna" if norm is None else bool(norm)


def bottlenecks(job: Job, s: Shape) -> int:
    """How many adapters there are."""
    where = placement(job)
    layers = job.options.get("layers_to_transform")
    layers = s.L if layers is None else 1 if isinstance(layers, int) else len(layers) or s.L
    drop = job.options.get("drop_layers")
    layers -= 0 if drop is None else 1 if isinstance(drop, int) else len(drop)
    return {"houlsby": 2 * layers, "input_output": 2, "input": 1, "output": 1}.get(where, layers)


def _bottleneck(job: Job, s: Shape) -> list[Tensors]:
    if job.library == "peft":
        raise ValueError("method='bottleneck' with library='peft': peft does not have it. Use library='pefttools'.")
    from pefttools.sites import PLACEMENTS
    from pefttools.vram.job import among

    among("placement", placement(job), PLACEMENTS)
    w, n = width(job, s), bottlenecks(job, s)
    one = [Tensors(w * s.h, n), Tensors(w, n), Tensors(w * s.h, n), Tensors(s.h, n)]
    if own_norm(job):
        one += [Tensors(s.h, 2 * n)]
    if job.options.get("scale") == "learned":
        one += [Tensors(1, n)]
    if job.options.get("train_layer_norms"):
        one += [Tensors(d, s.L * s.norm_vectors) for _, d in s.norms if d == s.h]
    return one


def _ia3(job: Job, s: Shape) -> list[Tensors]:
    from pefttools.vram.terms.sites import at_input

    return [Tensors(each.d_in if at_input(s, each.path, job) else each.d_out)
            for layer in adapted(job, s) for each in s.linears if each.path in layer]


def _norms(job: Job, s: Shape) -> list[Tensors]:
    layers, last = trained_norms(job, s)
    found = [Tensors(d, s.norm_vectors) for layer in layers for name, d in s.norms if name in layer]
    return found + ([Tensors(s.h, s.norm_vectors)] if last else [])


def virtual_tokens(job: Job) -> int:
    """P of prompt tuning, P-tuning, prefix tuning and LLaMA-Adapter."""
    names = ("length", "num_virtual_tokens", "adapter_len")
    return next((job.options[name] for name in names if name in job.options), job.length)


def _prompt(job: Job, s: Shape) -> list[Tensors]:
    return [Tensors(virtual_tokens(job) * s.h)]


def _ptuning(job: Job, s: Shape) -> list[Tensors]:
    h, P = s.h, virtual_tokens(job)
    w = job.options.get("hidden") or job.options.get("encoder_hidden_size") or h
    if job.options.get("kind", job.options.get("encoder_reparameterization_type", "MLP")) == "LSTM":
        depth = job.options.get("layers", job.options.get("encoder_num_layers", 2))
        lstm = [Tensors(n, 2) for i in range(depth)
                for n in (4 * w * (h if i == 0 else 2 * w), 4 * w * w, 4 * w, 4 * w)]
        return [Tensors(P * h), *lstm, Tensors(4 * w * w), Tensors(2 * w), Tensors(2 * w * h), Tensors(h)]
    return [Tensors(P * h), Tensors(h * w), Tensors(w), Tensors(w * w), Tensors(w), Tensors(w * h), Tensors(h)]


def _prefix(job: Job, s: Shape) -> list[Tensors]:
    P, out = virtual_tokens(job), s.L * 2 * s.kv
    if not job.options.get("projection", job.options.get("prefix_projection", False)):
        return [Tensors(P * out)]
    w = job.options.get("hidden") or job.options.get("encoder_hidden_size") or s.kv
    return [Tensors(P * s.kv), Tensors(s.kv * w), Tensors(w), Tensors(w * out), Tensors(out)]


def llama_adapter_layers(job: Job, s: Shape) -> int:
    """How many layers, from the top, get a gated prompt."""
    count = job.options.get("layers", job.options.get("adapter_layers", 8))
    if not 1 <= count <= s.L:
        raise ValueError(f"llama_adapter: layers={count}, but this model has {s.L}. Give options={{\"layers\": …}}.")
    return count


def _llama_adapter(job: Job, s: Shape) -> list[Tensors]:
    if s.kind not in LLAMA_ADAPTER:
        raise ValueError(f"LLaMA-Adapter is for {', '.join(LLAMA_ADAPTER)}; this model's type is {s.kind!r}. Prefix "
                         f"tuning works on any.")
    count = llama_adapter_layers(job, s)
    return [Tensors(virtual_tokens(job) * s.h, count), Tensors(1, count)]
