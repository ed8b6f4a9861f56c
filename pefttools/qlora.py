"""QLoRA: the base model in 4 bits, LoRA on top in 16 or 32.

    y = x · dequantize(q)ᵀ + b + (α/r) · B A x          q frozen, A and B trained

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, equations 5 and 6.

    embed_tokens   stays                 a look-up, not a product
    q_proj …       NF4Linear             4.127 bits a weight, where bfloat16 has 16
      lora_A, B    float32               what learns
    norm           stays                 few and sensitive
    lm_head        stays                 its errors go straight into the logits; often tied to embed_tokens

A worked number: Llama-3.2-1B has 1,235,814,400 weights, of which 973,078,528 are in linear layers: 2.30 GiB in bfloat16
becomes 973,078,528 · 4.127 / 8 + 262,735,872 · 2 bytes = 0.96 GiB.

    model = quantize_model(model)                                        # in place, one layer at a time
    attach(model, LoRAConfig(r=16, target_modules="all-linear"))
    optimizer = adamw(model, lr=2e-4)                                    # pefttools.adamw: moments in 8 bits

The layer is in `pefttools.nf4_linear`, LoRA in `pefttools.lora`; nothing here knows of LoRA, nor LoRA of this.
"""
from __future__ import annotations

import re

import torch
from torch import nn

from pefttools.layer import AdapterLayer
from pefttools.nf4_linear import NF4Linear, is_plain_linear, nf4_linear, release_scratch

__all__ = ["NF4Linear", "nf4_linear", "quantizable", "quantize_model", "release_scratch"]


def quantize_model(model: nn.Module, block_size: int = 64, double_quant: bool = True,
                   compute_dtype: torch.dtype | None = None, skip: list[str] | None = None,
                   progress: bool | None = None) -> nn.Module:
    """Replace the linear layers of `model` by `NF4Linear`, one after the other, and return the same model.

    Which: the layers that transformers' BitsAndBytesConfig quantizes, i.e. every nn.Linear and Conv1D except the output
    head, whatever is tied, the module of the last parameter (a classifier's head), and what the model class wants in
    float32 (T5's `wo`). Embeddings and norms are neither, so they stay. `skip`: further names to leave out, from the
    start or the end of a module's full name, or a regular expression for its start. In a model that is not of
    transformers only tied weights are left out by themselves.

    Each weight is freed as its codes are there: at the most the model and one layer are in memory. `progress` shows a
    bar (by default from 10⁸ weights on). A second call finds nothing left to do. Raises TypeError if `model` is not a
    module or is a linear layer itself, ValueError if adapters are attached or there is no linear layer.
    """
    found = quantizable(model, skip)
    if not found and not any(isinstance(module, NF4Linear) for module in model.modules()):
        raise ValueError(f"quantize_model: {type(model).__name__} has no linear layer to quantize"
                         + (f" besides those that skip={skip} leaves out." if skip else "."))
    if progress is None:
        progress = sum(module.weight.numel() for module in found.values()) >= 10 ** 8
    names = list(found)
    if progress:
        from tqdm.auto import tqdm

        names = tqdm(names, desc="quantizing", unit="layer")
    done: dict[nn.Module, NF4Linear] = {}                        # a layer in two places stays one layer
    for name in names:
        base = found.pop(name)
        if base not in done:
            done[base] = NF4Linear(base, block_size, double_quant, compute_dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, done[base])
        if base not in found.values():
            done.pop(base)
        del base                                                 # here its weight is freed
    return model


def quantizable(model: nn.Module, skip: list[str] | None = None) -> dict[str, nn.Module]:
    """{name: layer} of what `quantize_model` would quantize, in the model's order. Raises what it raises."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module; got {type(model).__name__}. From load_base(), pass .model.")
    if is_plain_linear(model):
        raise TypeError("model is a linear layer itself, which nothing can be put in the place of: NF4Linear(layer).")
    if isinstance(skip, str):
        raise TypeError(f"skip must be a list of names; got {skip!r}. Write skip=[{skip!r}].")
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer) or hasattr(module, "base_layer"):
            raise ValueError(f"quantize_model: {name!r} has an adapter, whose own matrices must not be quantized. "
                             f"Quantize first, attach afterwards.")
    kept = _kept(model) + list(skip or [])
    return {name: module for name, module in model.named_modules(remove_duplicate=False)
            if is_plain_linear(module) and not any(_matches(name, key) for key in kept)}


def _kept(model: nn.Module) -> list[str]:
    """Names left out by rule, as `get_keys_to_not_convert` in transformers/quantizers/base.py finds them."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    tied = [name for names in owners.values() if len({modules[n.rpartition(".")[0]] for n in names}) > 1
            for name in names]
    if not hasattr(model, "get_output_embeddings"):
        return [name.removesuffix(".weight") for name in tied]
    head = model.get_output_embeddings()
    heads = [name for name, module in modules.items() if head is not None and module is head]
    last = [name for name, _ in model.named_parameters()][-1:]
    float32 = list(getattr(model, "_keep_in_fp32_modules", None) or [])
    return [name.removesuffix(".weight") for name in tied + last] + heads + float32


def _matches(name: str, key: str) -> bool:
    # transformers' should_convert_module: a regular expression from the start to the end of a part, or a suffix
    return bool(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name)) or name.endswith(key)
