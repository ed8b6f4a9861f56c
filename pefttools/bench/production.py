"""The other side of every comparison: peft's layers and models, bitsandbytes' 4-bit layers, made safe on a CPU.

bitsandbytes' own fault (gradients lost after the first evaluation; see pefttools.bnb) would make it look fast here, so
its repacking is switched off on every layer, and everything runs in training mode.
"""
from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class Holder(nn.Module):
    """A model of one linear layer: what get_peft_model needs to wrap a layer."""

    def __init__(self, lin: nn.Module) -> None:
        super().__init__()
        self.lin = lin

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def linear4bit(dense: nn.Linear) -> nn.Module:
    """bitsandbytes' NF4 layer with double quantization of this layer's weight, computing in the weight's dtype."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = dense.weight.detach()
    layer = Linear4bit(dense.in_features, dense.out_features, bias=dense.bias is not None, compute_dtype=weight.dtype,
                       compress_statistics=True, quant_type="nf4", device="meta")
    layer.weight = Params4bit(weight.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4")
    if dense.bias is not None:
        layer.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
    layer = layer.to("cpu")                                     # quantizes
    layer.support_avx512bf16_for_cpu = False
    return layer


def quantize(model: nn.Module) -> nn.Module:
    """Every linear layer but the output head in bitsandbytes' NF4, as BitsAndBytesConfig(load_in_4bit=True) does."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear4bit(module))
    model.is_loaded_in_4bit = True
    return model


def adapted(model: nn.Module, r: int, dora: bool = False, target_modules: Any = "all-linear",
            causal: bool = True) -> nn.Module:
    """peft's LoRA or DoRA with its defaults (adapters in float32), in training mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        config = peft.LoraConfig(r=r, lora_alpha=r, use_dora=dora, target_modules=target_modules,
                                 task_type="CAUSAL_LM" if causal else None)
        return peft.get_peft_model(model, config).train()


def layer(base: nn.Module, r: int, dora: bool = False, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """(peft's layer around `base`, its adapter by the keys of peft's file: "lora_A.weight", …). B is not zero."""
    from peft import get_peft_model_state_dict

    holder = Holder(base)
    holder.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
    model = adapted(holder, r, dora, ["lin"], causal=False)
    lora = model.base_model.model.lin
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (lora.lora_A, lora.lora_B):
            part["default"].weight.normal_(0, 0.02, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = get_peft_model_state_dict(model)
    return lora, {key.split(".lin.", 1)[1]: tensor.detach().clone() for key, tensor in tensors.items()}
