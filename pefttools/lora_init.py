"""LoRA's start put into a layer: A, B, and the base weight where the start changes it (PiSSA, OLoRA, LoftQ).

    initialise(layer, "default", "pissa")

        before    base_layer.weight = W
        after     base_layer.weight = W − s·B₀A₀     lora_A, lora_B = A₀, B₀     kept aside: W, A₀, B₀

The starts themselves, with their formulas and sources, are in `pefttools.lora_starts`. Keeping W costs that weight's
memory once more; for it, `detach` and `disabled` give the model back bit by bit. (In peft the base stays changed: a
disabled PiSSA adapter leaves W − s·B₀A₀ speaking, which is no model that anybody trained.)

Files: the field init_lora_weights is saved, and whoever loads the adapter, peft or this library, decomposes W again and
gets the same residual. (Not in peft for "pissa_niter_…", whose random numbers are others there at each load, and for
"loftq" only on a GPU.) To be free of that, and of W kept aside: `pefttools.lora_convert.to_plain_lora`.
"""
from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.lora_starts import (gaussian_start, loftq_start, olora_start, orthogonal_start, principal_parts,
                                   random_B)

STARTS = ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "loftq_iter_5")


# ----------------------------------------------------------------------------------------------- the setting and peft's

def check_start(start: Any) -> str | bool:
    """`init_lora_weights` in one spelling: True, False, or a name of the table. Raises ValueError for anything else."""
    name = start.lower() if isinstance(start, str) else start
    if name in (True, None, "kaiming", "true"):
        return True
    if name is False or name in ("gaussian", "orthogonal", "pissa", "olora", "loftq") \
            or re.fullmatch(r"pissa_niter_\d+|loftq_iter_[1-9]\d*", str(name)):
        return name
    known = "True, False, " + ", ".join(map(repr, STARTS))
    if name in ("eva", "corda", "lora_ga"):
        raise ValueError(f"init_lora_weights={start!r} starts from a sample of the training data (its activations or "
                         f"gradients), which is not supported. Choose one of {known}.")
    raise ValueError(f"init_lora_weights must be one of {known}; got {start!r}.")


def changes_base(start: str | bool) -> bool:
    """Whether a layer started so has another base weight than before."""
    return isinstance(start, str) and start.startswith(("pissa", "olora", "loftq"))


def start_to_peft(start: str | bool) -> dict[str, Any]:
    """The fields of adapter_config.json that say how A and B started: peft makes the residual weight by them again."""
    start = check_start(start)
    if isinstance(start, str) and start.startswith("loftq"):
        iterations = int(start.rpartition("_")[2]) if "_" in start else 1
        return {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": iterations}}
    return {"init_lora_weights": start}


def start_from_peft(fields: dict[str, Any]) -> str | bool:
    """The start that these fields name. One that left the base as it was and is unknown here is as good as True.

    Raises ValueError for one that changes the base in a way that cannot be repeated here.
    """
    start, loftq = fields.get("init_lora_weights", True), fields.get("loftq_config") or {}
    if start == "loftq":
        if loftq.get("loftq_bits", 4) != 4:
            raise ValueError(f"loftq_bits={loftq['loftq_bits']}: LoftQ is in 4 bits (NF4) here.")
        return check_start(f"loftq_iter_{loftq['loftq_iter']}" if loftq.get("loftq_iter", 1) != 1 else "loftq")
    return True if start == "eva" else check_start(start)


# ------------------------------------------------------------------------------------------------ the layer

def is_quantized(base: nn.Module) -> bool:
    """Whether the weight is stored as codes. (bitsandbytes can keep its 4-bit codes in a tensor that says bfloat16.)"""
    return not base.weight.is_floating_point() or type(base.weight).__name__ == "Params4bit"


def dense_weight(base: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a linear layer as [d_out, d_in]: a view where there is one, dequantized (to `dtype`) where not."""
    if callable(getattr(base, "dequantize", None)):                                # pefttools' NF4Linear
        return base.dequantize(dtype)
    if is_quantized(base):                                                         # bitsandbytes' Linear4bit
        from pefttools.bnb import dequantize

        return dequantize(base.weight, dtype=dtype)
    return base.weight if isinstance(base, nn.Linear) else base.weight.T           # GPT-2's Conv1D is [d_in, d_out]


@torch.no_grad()
def initialise(layer: nn.Module, name: str, start: str | bool = True, generator: torch.Generator | None = None) -> None:
    """Give A and B of the adapter `name`, fresh from `lora_init`, their first values, and the base what goes with them.

    Random numbers are drawn on the CPU, so that a seed means the same everywhere; decompositions run in float32 (in
    float64 for such a weight). pissa_niter_… draws by a seed of its own, so that loading makes the same residual again.
    Raises ValueError for an unknown start, and for one that changes the base weight if another adapter shares it (or
    the other way round), TypeError if the base is quantized already and the start needs its weight. Nothing is changed
    then.
    """
    start = check_start(start)
    A, B, base = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.base_layer
    r, d_in, d_out, s = len(A), A.shape[1], len(B), layer.scaling[name]
    if not changes_base(start):
        if hasattr(layer, "_before_start"):
            raise ValueError("the first adapter started from PiSSA, OLoRA or LoftQ and changed the base weight, so no "
                             "second one can share it. Make the first a plain LoRA: to_plain_lora(model).")
        new_A, new_B = A, B                                 # for True they are what they should be
        if start is False:
            new_B = random_B(d_out, r, generator)
        elif start in ("gaussian", "orthogonal"):
            make = gaussian_start if start == "gaussian" else orthogonal_start
            new_A, new_B = make(d_in, d_out, r, generator)
    else:
        if len(layer.names) > 1:
            raise ValueError(f"init_lora_weights={start!r} changes the base weight, which {len(layer.names) - 1} other "
                             f"adapter(s) in this layer rely on. Use it for the only adapter.")
        if is_quantized(base):
            raise TypeError(f"init_lora_weights={start!r} needs the weight that a quantized layer no longer has. "
                            + ("Attach without it, then call replace_lora_weights_loftq(model, the original weights)."
                               if start.startswith("loftq") else "Attach to the model before it is quantized."))
        W = dense_weight(base).detach()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        new_A, new_B, new_W = _start_from(W, r, s, start)
        layer.register_buffer("_before_start", base.weight.data, persistent=False)
        layer.register_buffer("_start_A", new_A.to(A.dtype), persistent=False)
        layer.register_buffer("_start_B", new_B.to(B.dtype), persistent=False)
        new_W = new_W.to(base.weight.dtype)
        base.weight.data = (new_W if isinstance(base, nn.Linear) else new_W.T).contiguous()
    A.copy_(new_A)
    B.copy_(new_B)


def _start_from(W: Tensor, r: int, s: float, start: str) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, the new base weight) for the starts that decompose W [d_out, d_in]."""
    number = int(start.rpartition("_")[2]) if start[-1].isdigit() else None
    if start.startswith("loftq"):
        from pefttools.nf4 import dequantize_nf4, quantize_nf4

        return loftq_start(W, r, s, lambda rest: dequantize_nf4(quantize_nf4(rest)), number or 1)
    A, B = olora_start(W, r) if start == "olora" else \
        principal_parts(W, r, s, number, None if number is None else torch.Generator().manual_seed(0))
    return A, B, W - (s * B) @ A


@torch.no_grad()
def swap_base(layer: nn.Module) -> None:
    """Exchange the base weight and the original that a start put aside. Without one, nothing happens."""
    if hasattr(layer, "_before_start"):
        weight = layer.base_layer.weight
        weight.data, layer._before_start = layer._before_start, weight.data


def restore_base(layer: nn.Module) -> None:
    """Put the original base weight back for good, bit by bit, and forget what was kept for it."""
    if hasattr(layer, "_before_start"):
        if layer.enabled:                                   # disabled, the original is in place
            swap_base(layer)
        del layer._before_start, layer._start_A, layer._start_B


class BaseMayChange:
    """For a layer: after a start that changed the base weight, the original speaks while the adapter is disabled."""

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if hasattr(self, "_before_start") and value != self._enabled:
            swap_base(self)
        self._enabled = value

    def restore_base(self) -> None:
        restore_base(self)
