"""bitsandbytes on a CPU, made safe: three faults of its CPU path, found, and worked around.

bitsandbytes 0.50.2 (`Linear4bit`, NF4) is right on GPUs. On a CPU with AVX-512 three things go wrong in silence:

    fault               processors       what happens                                       measured by find_faults()
    gradients_lost      AVX-512 bf16     the first forward in eval mode repacks the weight;  gradient None or 0
                                         every later training forward has no gradient
    eval_difference     AVX-512 bf16     that repacked weight computes in bfloat16,          2.9e-3, should be 0
                                         whatever compute_dtype says
    width_error         AVX-512          dequantization takes another row's scales where     0.28, should be 0.09
                                         in_features is a multiple of 16 but not of the
                                         block size (48, 96 with blocks of 64)

AVX-512 bf16: Intel Cooper Lake, Sapphire Rapids and later servers; AMD Zen 4 and later. AVX-512: those, Intel servers
since Skylake, some laptops of the 11th generation. Not: ARM, Apple, other laptops, most desktops by Intel.

    model = AutoModelForCausalLM.from_pretrained(…, quantization_config=BitsAndBytesConfig(load_in_4bit=True, …))
    make_safe(model)          # before the first forward in eval mode; load_base does it by itself

The causes, in bitsandbytes' own source, are in docs/upstream/bitsandbytes_cpu.md. `pefttools.qlora` has none of them.
"""
from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------ what is wrong here

@dataclass(frozen=True)
class Faults:
    """What `find_faults` measured. `eval_difference` and `width_error` are relative errors (norm of the difference)."""

    gradients_lost: bool
    eval_difference: float
    width_error: float

    @property
    def eval_in_bf16(self) -> bool:
        return self.eval_difference > 1e-4       # float32 differs by 1e-7 at most, bfloat16 has 8 bits: 2⁻⁸ = 4e-3

    @property
    def widths_wrong(self) -> bool:
        return not self.width_error < 0.12       # NF4 in blocks of 64 on normal weights: 0.092


@functools.cache
def find_faults(device: str = "cpu") -> Faults:
    """Measure the three on this machine, in a fraction of a second (after bitsandbytes' import: about 2 s).

    Raises ImportError where bitsandbytes is not installed.
    """
    from bitsandbytes import functional, nn as bnn

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).to(device)
    back = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    width_error = ((back - weight).norm() / weight.norm()).item()

    # The order of every notebook: a baseline in eval mode first, then training.
    layer = bnn.Linear4bit(256, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight.data = torch.randn(64, 256, generator=generator)
    layer = layer.to(device)
    x = torch.randn(4, 256, generator=generator).to(device)
    with torch.no_grad():
        trained, evaluated = layer.train()(x), layer.eval()(x)
    x.requires_grad_()
    y = layer.train()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # torch's, that this operator has no backward: what we want to know
        gradient = torch.autograd.grad(y.sum(), x, allow_unused=True)[0] if y.requires_grad else None
    return Faults(gradients_lost=gradient is None or not bool(gradient.abs().sum() > 0),
                  eval_difference=((evaluated - trained).norm() / trained.norm()).item(), width_error=width_error)


# ------------------------------------------------------------------------------------------------ what to do

def make_safe(model: nn.Module, unpack: bool = False) -> nn.Module:
    """Keep every `Linear4bit` in `model` off the faulty paths, and return the model. Call it right after loading.

    • `support_avx512bf16_for_cpu = False`: the weight is never repacked, so training after an evaluation keeps its
      gradients, eval computes in compute_dtype, and layers of any size work in eval mode (the repacking refuses
      out_features that are no multiple of 32). The cost: evaluation loses the fast bfloat16 kernel.
    • layers whose in_features is no multiple of the block size dequantize rightly (their class becomes
      `SafeLinear4bit`, which is a `Linear4bit` to everybody who asks). `bitsandbytes.functional.dequantize_4bit` and
      what calls it (peft's merge) stays wrong for them: use `pefttools.bnb.dequantize`.

    A layer that has run in eval mode already has been repacked: its codes can be put back, but its scales were
    rounded to bfloat16 and the originals are gone. So this raises ValueError: load the model again and call
    `make_safe` before the first forward. With `unpack=True` such layers are put back as they are now: right codes,
    scales with a relative error of up to 2⁻⁸ (0.4 %), no longer doubly quantized.

    Twice is once. Models without a `Linear4bit` pass through. Raises TypeError if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module; got {type(model).__name__}. From load_base(), pass .model.")
    layers = [(name, module) for name, module in model.named_modules() if _is_linear4bit(module)]
    packed = [name for name, layer in layers if _is_packed(layer)]
    if packed and not unpack:
        raise ValueError(
            f"{len(packed)} of {len(layers)} Linear4bit layers have run in eval mode and been repacked (the first: "
            f"{packed[0]!r}). Their scales are rounded to bfloat16 for good. Load the model again and call make_safe "
            f"before its first forward; or make_safe(model, unpack=True) to go on with the rounded scales.")
    for _, layer in layers:
        if _is_packed(layer):
            _unpack(layer)
        layer.support_avx512bf16_for_cpu = False
        if layer.in_features % layer.weight.blocksize:
            layer.__class__ = _safe_linear4bit()
    return model


def dequantize(weight: Any, quant_state: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [d_out, d_in] that a bitsandbytes `Params4bit` stands for (or its packed bytes and their QuantState).

    Equal to `bitsandbytes.functional.dequantize_4bit` where that is right, and right for any d_in: the bytes are
    handed over as rows of one block each, so that no row begins inside a block. `dtype`: that of the result, by
    default the quantized weight's own. Raises ValueError for a weight that is not quantized, or repacked for eval.
    """
    from bitsandbytes import functional

    state = getattr(weight, "quant_state", None) if quant_state is None else quant_state
    if state is None:
        raise ValueError("this weight has no quant_state, so it is not quantized yet: bitsandbytes quantizes when the "
                         "layer is moved to a device, layer.to(\"cpu\").")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("this weight has been repacked by a forward in eval mode; see pefttools.bnb.make_safe.")
    absmax, count = state.absmax, state.shape.numel()
    if state.nested:
        absmax = (functional.dequantize_blockwise(absmax, state.state2) + state.offset).float()
    rows = [count // state.blocksize, state.blocksize] if count % state.blocksize == 0 else [1, count]
    packed = weight.data if isinstance(weight, nn.Parameter) else weight
    dtype = dtype or state.dtype
    kernel = dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32   # no others: no error
    flat = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.view(torch.uint8).reshape(-1, 1), absmax, state.blocksize, state.quant_type, rows, kernel)
    return flat.reshape(state.shape).to(dtype)


def _is_linear4bit(module: nn.Module) -> bool:
    # by name along its ancestry: no import of bitsandbytes for a model that does not use it
    return any(cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsandbytes")
               for cls in type(module).__mro__)


def _is_packed(layer: nn.Module) -> bool:
    return getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)


def _unpack(layer: nn.Module) -> None:
    """Undo the repacking for eval. bitsandbytes' own inverse forgets to turn the scales back (see the report)."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = layer.weight.quant_state
    absmax = state.absmax.T.contiguous().reshape(-1).float()     # [d_in/block, d_out] → one per block, row by row
    state.original_nested = False                                # quantizing the scales again would round them again
    layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax, state.nested, state.state2, state.offset = absmax, False, None, None


# ------------------------------------------------------------------------------------------------ any in_features

class _DequantizedLinear(torch.autograd.Function):
    """x Wᵀ + b with W dequantized in forward and once more in backward, as bitsandbytes' MatMul4Bit does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, dequantize(weight, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        of_x = gradient @ dequantize(ctx.weight, dtype=gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias


@functools.cache
def _safe_linear4bit() -> type:
    from bitsandbytes.nn import Linear4bit

    class SafeLinear4bit(Linear4bit):
        """A `Linear4bit` that is right for any in_features."""

        def forward(self, x: Tensor) -> Tensor:
            dtype = self.compute_dtype or x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            return _DequantizedLinear.apply(x.to(dtype), self.weight, bias).to(x.dtype)

    SafeLinear4bit.__module__, SafeLinear4bit.__qualname__ = __name__, "SafeLinear4bit"   # so that it can be pickled
    return SafeLinear4bit


def __getattr__(name: str) -> Any:
    if name == "SafeLinear4bit":                 # made when asked for: `import pefttools.bnb` imports torch only
        return _safe_linear4bit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
