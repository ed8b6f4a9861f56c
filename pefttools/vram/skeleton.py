"""The model that a job trains, without data: transformers' own class on the meta device, with the method attached.

    config_of(job.model) ──► from_config on meta ──► NF4 in the place of its linear layers ──► the method ──► train()
                              shapes, ties                packed codes, scales, scales'            ours or peft's
                                                          scales: empty tensors of their sizes

Nothing is drawn and nothing is computed: a model of 405 billion parameters is there once Python has made its modules.
"""
from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import fields as fields_of
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.nf4 import NF4Tensor
from pefttools.nf4_linear import NF4Linear
from pefttools.qlora import quantizable
from pefttools.vram.job import Job

# Method of a Job → our configuration, and peft's class; both by the names of the fields that a Job has.
OURS = {"lora": "pefttools.lora:LoRAConfig", "qlora": "pefttools.lora:LoRAConfig",
        "dora": "pefttools.dora:DoRAConfig", "qdora": "pefttools.dora:DoRAConfig",
        "bottleneck": "pefttools.placements:AdapterConfig", "ia3": "pefttools.ia3:IA3Config",
        "ln_tuning": "pefttools.ln_tuning:LNTuningConfig", "prompt": "pefttools.prompt:PromptTuningConfig",
        "ptuning": "pefttools.ptuning:PTuningConfig", "prefix": "pefttools.prefix:PrefixTuningConfig",
        "llama_adapter": "pefttools.llama_adapter:LlamaAdapterConfig"}
PEFTS = {"lora": "LoraConfig", "qlora": "LoraConfig", "dora": "LoraConfig", "qdora": "LoraConfig", "ia3": "IA3Config",
         "ln_tuning": "LNTuningConfig", "prompt": "PromptTuningConfig", "ptuning": "PromptEncoderConfig",
         "prefix": "PrefixTuningConfig", "llama_adapter": "AdaptionPromptConfig"}


def build_base(job: Job) -> nn.Module:
    """transformers' causal language model of the job on meta, in job.dtype; its attention and checkpointing set."""
    from transformers import AutoModelForCausalLM

    from pefttools.vram.presets import config_of

    config = config_of(job.model)
    implementation = "eager" if job.attention == "eager" else "sdpa"
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        dtype = torch.float32 if job.master else getattr(torch, job.dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    if job.quantization:
        quantize_on_meta(model, double_quant=job.quantization == "nf4-dq")
    return model


def enable_checkpointing(model: nn.Module) -> None:
    """transformers' own, each decoder layer by itself, not reentrant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def build(job: Job) -> nn.Module:
    """The whole of it: base, quantization, method, checkpointing, in train mode."""
    model = build_base(job)
    if job.checkpointing:
        enable_checkpointing(model)
    if job.method != "full" and job.library == "peft":
        model = attach_peft(model, peft_config(job), job)
    elif job.method != "full":
        model = attach_ours(model, job)
    return model.train()


# ------------------------------------------------------------------------------------------------ NF4 without numbers

def empty_nf4(shape: torch.Size, dtype: torch.dtype, double_quant: bool = True, block_size: int = 64,
              device: str = "meta") -> NF4Tensor:
    """The quantized weight of `shape`: half a byte a number, a scale each 64, and the scales' own tables."""
    n = math.prod(shape)
    blocks = -(-n // block_size)

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    nested = {"nested_absmax": empty(-(-blocks // 256), dtype=torch.float32),
              "nested_code": empty(256, dtype=torch.float32),
              "offset": empty(1, dtype=torch.float32).squeeze()} if double_quant else {}
    return NF4Tensor(empty((n + 1) // 2, 1, dtype=torch.uint8),
                     empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
                     empty(16, dtype=torch.float32), torch.Size(shape), dtype, block_size, **nested)


def quantize_on_meta(model: nn.Module, double_quant: bool = True) -> nn.Module:
    """What `quantize_model` does, for weights that have no numbers."""
    for name, base in quantizable(model).items():
        shape = base.weight.shape if isinstance(base, nn.Linear) else base.weight.T.shape
        layer = NF4Linear.__new__(NF4Linear)
        nn.Module.__init__(layer)
        layer._hold(empty_nf4(shape, base.weight.dtype, double_quant))
        layer.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
        layer.compute_dtype = None
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return model


def dequantized(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' `dequantize_4bit`: the scales in float32 first where they are quantized too, then one weight."""
    if q.nested:
        scales = q.packed.new_empty(q.absmax.numel(), dtype=torch.float32)
        shifted = scales + q.offset
        weight = q.packed.new_empty(q.shape, dtype=dtype)
        del scales, shifted
        return weight
    return q.packed.new_empty(q.shape, dtype=dtype)


@contextlib.contextmanager
def gpu_kernels_of_nf4() -> Iterator[None]:
    """Inside, our NF4Linear dequantizes as a GPU kernel does: into one new weight, without other temporaries."""
    module = import_module("pefttools.nf4_linear")
    before = module._in_scratch, NF4Tensor.dequantize
    module._in_scratch = dequantized
    NF4Tensor.dequantize = lambda self, out=None, dtype=None, compiled=None: \
        dequantized(self, dtype or self.dtype) if out is None else out
    try:
        yield
    finally:
        module._in_scratch, NF4Tensor.dequantize = before


# ------------------------------------------------------------------------------------------------ methods

def our_config(job: Job) -> Any:
    """Our configuration of the job's method."""
    module, _, name = OURS[job.method].partition(":")
    cls = getattr(import_module(module), name)
    known = {f.name for f in fields_of(cls)}
    given = {"r": job.r, "alpha": job.r, "length": job.length, "bottleneck": job.width, "width": job.width}
    if job.targets is not None:
        given["target_modules"] = list(job.targets) if isinstance(job.targets, tuple) else job.targets
    return cls(**({key: value for key, value in given.items() if key in known} | job.options))


def attach_ours(model: nn.Module, job: Job) -> nn.Module:
    from pefttools.inject import attach

    attach(model, our_config(job))
    if job.adapter_dtype != "float32":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, job.adapter_dtype))
    return model


def peft_config(job: Job) -> Any:
    """peft's configuration of the job's method."""
    import peft

    if job.method not in PEFTS:
        raise ValueError(f"method={job.method!r} with library='peft': peft does not have it. Use library='pefttools'.")
    cls = getattr(peft, PEFTS[job.method])
    given: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if PEFTS[job.method] == "LoraConfig":
        given |= {"r": job.r, "lora_alpha": job.r, "use_dora": job.method.endswith("dora")}
    if job.method in ("prompt", "ptuning", "prefix"):
        given["num_virtual_tokens"] = job.length
    if job.method == "llama_adapter":
        given |= {"adapter_len": job.length}
    if job.targets is not None:
        given["target_modules"] = list(job.targets) if isinstance(job.targets, tuple) else job.targets
    return cls(**(given | job.options))


def attach_peft(model: nn.Module, config: Any, job: Job) -> nn.Module:
    """See `peft_on_meta.attach_peft`."""
    from pefttools.vram.peft_on_meta import attach_peft as attach

    return attach(model, config, job)
