"""AdamW for QLoRA: bitsandbytes' optimizer with moments of 8 bits, and paged memory on GPUs.

    moments per trained parameter:   m, v in float32   8 bytes
                                     m, v in 8 bits    2 bytes, plus a float32 scale per block of 256 of each: 2.03

Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861. Paged optimizers: Dettmers et
al. 2023, "QLoRA", arXiv:2305.14314, section 3: the moments live in unified memory, and move to the host by themselves
when the GPU is full.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import nn


def adamw(model: nn.Module, lr: float, bits: int = 8, paged: bool = False, **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW over `trainable(model)`, its two moments kept in 8 bits (or 32), optionally in paged memory.

    Moments of tensors under 4,096 elements stay in float32 (`min_8bit_size`): at r = 8, every A of width below 512.
    On a CPU the 8-bit kind works; paging does not exist there (bitsandbytes warns and keeps the moments in ordinary
    memory), so `paged=True` is refused unless a parameter is on a GPU.

    `settings` go to bitsandbytes (betas, eps, weight_decay, min_8bit_size …). Raises ValueError for nothing to train,
    bits other than 8 and 32, and paging on a CPU; ImportError, with what to do, without bitsandbytes.
    """
    from pefttools.inject import trainable

    parameters = list(trainable(model).values())
    if not parameters:
        raise ValueError("adamw: no parameter of this model is trainable. Attach an adapter first: attach(model, "
                         "config).")
    if bits not in (8, 32):
        raise ValueError(f"bits must be 8 or 32 (of each moment); got {bits!r}.")
    if paged and not any(parameter.is_cuda for parameter in parameters):
        raise ValueError("paged=True needs a GPU: paging moves the moments between its memory and the host's, and "
                         "these parameters are in the host's already. Use paged=False.")
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ImportError("adamw needs bitsandbytes (pip install bitsandbytes). Without it, "
                          "torch.optim.AdamW(trainable(model).values(), lr=…) does the same with moments in the "
                          "parameters' dtype.") from error
    kind = getattr(optim, f"{'Paged' if paged else ''}AdamW{bits}bit")
    return kind(parameters, lr=lr, **settings)
