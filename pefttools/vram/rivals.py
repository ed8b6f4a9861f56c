"""What other public calculators say of the same job: one of them run, the others' published formulas in our own words.

    rivals(job)  ->  [(calculator, bytes or None, why not)]

    accelerate estimate-memory   run as installed: the parameters in float32, doubled; no batch, no length, no method
    gpu_poor                     4h² an attention, two embeddings, S² attention always, LoRA's rank fixed at 8
    EleutherAI cookbook          18 bytes a parameter; activations of Megatron's layer, S² attention; full only
    DeepSpeed estimate_zero2     4 + 16/N bytes a parameter; no activations; frozen ones count as well
    LLaMA-Factory's README       2 bytes a parameter (LoRA), ½ (QLoRA), 8 (full, bfloat16): "estimated", no length

Each function's docstring has its source and what it does not cover. They answer another question than ours, some of
them by their own account: the page shows what somebody with this job would be told. Not here: Unsloth Studio's estimate
(AGPL; it leaves the logits out, because its own kernels do), calculators that must be trained on measurements first,
and those that publish no formula.
"""
from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from math import sqrt
from typing import Any

from pefttools.vram.job import Job
from pefttools.vram.units import GB, MiB


def rivals(job: Job) -> list[tuple[str, int | None, str]]:
    """(name, bytes or None, why there are none) of each calculator for this job."""
    answers = []
    for name, calculator in CALCULATORS.items():
        try:
            answers.append((name, round(calculator(job)), ""))
        except NotImplementedError as error:
            answers.append((name, None, str(error)))
    return answers


def _config(job: Job) -> Any:
    from pefttools.vram.presets import config_of

    return config_of(job.model)


def _key(config: Any) -> str:
    return config.to_json_string()


# ------------------------------------------------------------------------------------------------ run as it is

def accelerate(job: Job) -> int:
    """`accelerate estimate-memory`'s "Training using Adam" in 16 bits, by the installed accelerate's own functions.

    commands/estimate.py: an empty AutoModel in float32 (without a head), `calculate_maximum_sizes`, then the largest of
    `estimate_training_usage`'s stages. The command asks the hub for the configuration; here it is a preset's. Does not
    know: batch ("batch size 1"), length, checkpointing, method, quantization (prints N/A for int4).
    """
    config = _config(job)
    return _accelerate(_key(config), type(config))


@functools.lru_cache
def _accelerate(fields: str, cls: type) -> int:
    import json

    import torch
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel

    with warnings.catch_warnings(), init_empty_weights():
        warnings.simplefilter("ignore")
        model = AutoModel.from_config(cls.from_dict(json.loads(fields)), dtype=torch.float32)
    total, _ = calculate_maximum_sizes(model)
    return max(estimate_training_usage(total, "float16").values())


# ------------------------------------------------------------------------------------------------ as published

def gpu_poor(job: Job) -> float:
    """RahulSChand/gpu_poor, src/App.js (05d18ab8f093): `computeModelSize`, `getGradOptMemory`, `getActivationMemory`.

    Full, LoRA, QLoRA, Adam. Its LoRA has rank 8 on everything, its attention keeps S × S numbers three times, grouped
    keys and tied embeddings are not known; checkpointing multiplies the activations by 0.15. 650 MiB for CUDA.
    """
    if job.method not in ("full", "lora", "qlora"):
        raise NotImplementedError("full, LoRA and QLoRA only")
    c, (S, B) = _config(job), (job.seq, job.batch)
    h, L, H, m, V = c.hidden_size, c.num_hidden_layers, c.num_attention_heads, _feed_forward(c), c.vocab_size
    parameters = 2 * V * h + 4 * L * h * h + 3 * L * m * h
    e = 2
    extra = (15 * h + 6 * m) * L * 50 * sqrt(max(1.0, S / 50))
    if job.method == "full":
        states = parameters * e + 3 * parameters * e
    elif job.method == "lora" and not job.quantization:
        states = parameters * e + L * 8 * h * 2 * 4 * 3 * 2
    else:
        states = parameters * 0.5 + L * 8 * h * 0.5 * 4 * 3 + 0.75 * extra * B
    attention = 8 * S * h * e + S * S * H * (2 * e + 4)
    layer = attention + 2 * S * h * e + 6 * S * m * e + 8 * S + 6 * S * h * e
    return states + layer * L * B * (0.15 if job.checkpointing else 1) + 650 * MiB


def eleuther(job: Job) -> float:
    """EleutherAI/cookbook, calc/calc_transformer_mem.py (069ae2ef9f69): `calc_mem`, mixed precision, one GPU.

    Full training only: 2 bytes of weights, 4 of gradients and 12 of optimizer for each parameter, activations
    s·b·h·L·(34 + 5·a·s/h), with checkpointing s·b·h·L·34. Two embeddings and learned positions are counted.
    """
    if job.quantization:
        raise NotImplementedError("no quantized base")
    c, (S, B) = _config(job), (job.seq, job.batch)
    h, L, H, m, V = c.hidden_size, c.num_hidden_layers, c.num_attention_heads, _feed_forward(c), c.vocab_size
    ratio = (getattr(c, "num_key_value_heads", None) or H) / H
    parameters = (2 * V * h + h * S + 8 * h * L + 2 * h + 2 * (1 + ratio) * L * h * h
                  + _mlp_matrices(c) * L * h * m)
    activations = S * B * h * L * (34 + (0 if job.checkpointing else 5 * H * S / h))
    return parameters * (2 + 4 + 12) + activations


def deepspeed(job: Job) -> float:
    """DeepSpeed, runtime/zero/stage_1_and_2.py: `estimate_zero2_model_states_mem_needs`, no offload.

    4 bytes a parameter and 16 shared by N GPUs. Model states only, as its name says; a frozen parameter counts as a
    trained one (deepspeedai/DeepSpeed#5304).
    """
    if job.quantization:
        raise NotImplementedError("no quantized base")
    return parameters_of(_config(job)) * (4 + 16 / job.gpus)


def llama_factory(job: Job) -> float:
    """LLaMA-Factory, README, "Hardware Requirement" ("estimated"): x billion parameters need 8x GB (full, pure bf16),
    2x GB (freeze, LoRA, in 16 bits), x/2 GB (QLoRA, 4 bits). No batch, length, rank or checkpointing."""
    if job.method not in ("full", "lora", "qlora", "dora", "qdora"):
        raise NotImplementedError("full, LoRA and QLoRA only")
    x = parameters_of(_config(job)) / 1e9
    return (8 if job.method == "full" else 0.5 if job.quantization else 2) * x * GB


CALCULATORS: dict[str, Callable[[Job], float]] = {
    "accelerate": accelerate, "gpu_poor": gpu_poor, "EleutherAI": eleuther, "DeepSpeed": deepspeed,
    "LLaMA-Factory": llama_factory,
}


def parameters_of(config: Any) -> int:
    """Of the causal language model, tied ones once."""
    return _parameters(_key(config), type(config))


@functools.lru_cache
def _parameters(fields: str, cls: type) -> int:
    import json

    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(cls.from_dict(json.loads(fields)))
    return sum(parameter.numel() for parameter in model.parameters())


def _feed_forward(config: Any) -> int:
    for name in ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * config.hidden_size


def _mlp_matrices(config: Any) -> int:
    return 2 if config.model_type in ("gpt2", "opt", "gpt_neox", "phi", "falcon", "bloom") else 3
