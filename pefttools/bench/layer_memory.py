"""KiB that one Llama-3.2-1B decoder layer keeps per token for the backward pass, by method.

Real models of one and two layers with the 1B shapes (bfloat16, random weights, few words) run forward on two lengths:

    per token and layer = [ (kept(2 layers, T₂) − kept(1, T₂)) − (kept(2, T₁) − kept(1, T₁)) ] / (T₂ − T₁)

The first difference takes out embedding and head, the second what does not grow with the length (A and B cast to
bfloat16, say). A third length must give the same slope: then the figure is exact, and nothing grows with T².

    full fine-tuning:  16 h + 4 q + 4 k + 8 m bytes  =  16·2048 + 4·2048 + 4·512 + 8·8192  =  106 KiB
    (h hidden, q = heads · width, k = key/value heads · width, m = MLP; bfloat16 activations, float32 inside RMSNorm)

and 0.13 KiB more than that formula: 4 bytes a head for the softmax's logsumexp, and 4 for each of the two norms' rsqrt.
Attention is scaled_dot_product_attention's flash kernel of the CPU. It saves q, k, v, its output and the logsumexp,
which is what the flash kernel of CUDA saves; CUDA's math kernel (a T4 without flash) saves heads · T · T entries more.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.bench.harness import attempt
from pefttools.bench.memory import Trace, kept_bytes

SHAPES_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
             "head_dim": 64}
LENGTHS = (32, 64, 128)
R = 16


def llama(layers: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **shapes: int) -> nn.Module:
    """A LlamaForCausalLM of `layers` layers of the 1B shapes (or others), 128 words, with weights from N(0, 0.02²)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPES_1B, "vocab_size": 128, "num_hidden_layers": layers, **shapes},
                         tie_word_embeddings=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _no_init():
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1) if parameter.dim() == 1 else parameter.data.normal_(0, 0.02, generator=generator)
    return model.train()


def _no_init() -> Any:
    from transformers.initialization import no_init_weights

    return no_init_weights()


# ------------------------------------------------------------------------------------------------ the methods

def peft_lora(model: nn.Module, dora: bool = False, r: int = R, target_modules: Any = "all-linear") -> nn.Module:
    """peft's LoRA or DoRA, with its defaults (adapters in float32)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=r, use_dora=dora, task_type="CAUSAL_LM",
                                                          target_modules=target_modules))


def our_lora(model: nn.Module, r: int = R, target_modules: Any = "all-linear") -> nn.Module:
    from pefttools.inject import attach
    from pefttools.lora import LoRAConfig

    return attach(model, LoRAConfig(r=r, alpha=r, target_modules=target_modules))


def our_dora(model: nn.Module, r: int = R, target_modules: Any = "all-linear") -> nn.Module:
    from pefttools.dora import DoRAConfig
    from pefttools.inject import attach

    return attach(model, DoRAConfig(r=r, alpha=r, target_modules=target_modules))


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full fine-tuning": lambda model: model,
    "LoRA, peft": peft_lora,
    "LoRA, ours": our_lora,
    "DoRA, peft": lambda model: peft_lora(model, dora=True),
    "DoRA, ours": our_dora,
}
BOUNDS = {"LoRA, ours": 100.0, "DoRA, ours": 99.0}      # KiB, issue "The library"


# ------------------------------------------------------------------------------------------------ measuring

def kib_per_token_and_layer(method: Callable[[nn.Module], nn.Module], dtype: torch.dtype = torch.bfloat16,
                            lengths: tuple[int, int, int] = LENGTHS, **shapes: int) -> float:
    """See the module's docstring. Raises ValueError where three lengths do not lie on one line."""
    kept = {layers: [kept_bytes(lambda: _logits(model, T)) for T in lengths]
            for layers in (1, 2) for model in [method(llama(layers, dtype, **shapes))]}
    layer = [two - one for one, two in zip(kept[1], kept[2])]
    first, second = ((b - a) / (t - s) for (a, s), (b, t) in zip(zip(layer, lengths), zip(layer[1:], lengths[1:])))
    if first != second:
        raise ValueError(f"what a layer keeps does not grow in proportion to the tokens: {first} and then {second} "
                         f"bytes a token, at {lengths} tokens. Is the attention's mask or its T × T matrix kept?")
    return first / 1024


def _logits(model: nn.Module, T: int) -> Tensor:
    ids = torch.arange(T).unsqueeze(0) % 128
    return model(input_ids=ids, use_cache=False).logits


def backward_excess(d_in: int = 2048, d_out: int = 8192, tokens: int = 128, dtype: torch.dtype = torch.bfloat16,
                    lora: bool = True) -> tuple[int, int, int]:
    """(most bytes alive in the backward pass of a quantized layer, bare or with LoRA; the floor; the weight's bytes).

    The floor is the same pass through a frozen linear layer that holds the weight from the start. What the quantized
    layer allocates on first use and keeps, a scratch buffer, is counted where it is the largest so far, so measure in a
    new process; a look-up table of 2 KiB, which all layers share, is not: a layer of 64 × 64 has run before.
    """
    from pefttools.lora import LoRAConfig
    from pefttools.qlora import NF4Linear

    def peak(base: nn.Module) -> int:
        layer = base.requires_grad_(False)
        if lora:
            layer = LoRAConfig(r=R, alpha=R).build(base, torch.Generator().manual_seed(0))
            for parameter in layer.adapter_parameters().values():
                parameter.requires_grad_(True)
        x = torch.ones(tokens, base.in_features, dtype=dtype, requires_grad=True)
        gradient = torch.ones(tokens, base.out_features, dtype=dtype)
        with Trace() as trace:
            y = layer(x)
            trace.peak = trace.live             # from here on
            y.backward(gradient)
        return trace.peak

    dense, small = (nn.Linear(i, o, bias=False, dtype=dtype) for i, o in ((d_in, d_out), (64, 64)))
    peak(NF4Linear(small, double_quant=True))
    quantized = peak(NF4Linear(dense, double_quant=True))
    return quantized, peak(dense), dense.weight.numel() * dense.weight.element_size()


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """The group "memory": a row a method. `quick` takes shapes of an eighth, for which no bound is stated."""
    shapes = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 8} if quick else {}
    for name, method in METHODS.items():
        row = {"row": name, "unit": "KiB", "sense": "≤", "bound": None if quick else BOUNDS.get(name)}
        yield attempt(row, lambda: {"value": kib_per_token_and_layer(method, **shapes)})

    for lora, name in ((False, "NF4 layer 2048→8192, peak of the backward pass over that of the frozen linear"),
                       (True, "the same with LoRA on it, over that of LoRA on the frozen linear")):
        def excess() -> dict[str, Any]:
            peak, floor, weight = backward_excess(*((256, 1024) if quick else (2048, 8192)), lora=lora)
            return {"value": (peak - floor) / weight}

        yield attempt({"row": name, "unit": "weights", "sense": "≤", "bound": None if quick else 1.0}, excess)
