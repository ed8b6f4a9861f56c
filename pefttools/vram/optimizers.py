"""Optimizers that are not torch.optim's, by what they keep and take on the GPU.

    adamw_8bit          bitsandbytes: two states of one byte, and a float32 scale for each 256 of each; float32 states
                        for tensors of fewer than 4096 numbers (`min_8bit_size`); two tables of 256 float32
    paged_adamw(_8bit)  the same, but states of 100,000 numbers and more are in CUDA's managed memory: no memory of
                        torch's, and on the GPU only while there is room (bitsandbytes' get_state_buffer)
    adafactor           transformers' own code, as Trainer sets it: no first moment; of a matrix [n, m] n + m float32

Its kernels write in place, tensor by tensor: no temporaries (AdamW's foreach step takes √v of all tensors).
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256                                # optimizer.py: blocks = ceil(n / 256) where blockwise
MIN_8BIT = 4096                            # min_8bit_size
MIN_PAGED = 100_000                        # get_state_buffer: smaller ones are ordinary tensors


def state_bytes(numel: int, bits: int = 8, paged: bool = False) -> int:
    """Bytes on the GPU of bitsandbytes' AdamW for a tensor of `numel` numbers, without the common tables."""
    eight = bits == 8 and numel >= MIN_8BIT
    states = 0 if paged and numel >= MIN_PAGED else 2 * numel * (1 if eight else 4)
    return states + (2 * 4 * -(-numel // BLOCK) if eight else 0)


class BitsAndBytesAdamW:
    """AdamW with bitsandbytes' states: the first `step` makes them."""

    def __init__(self, parameters: list[nn.Parameter], bits: int = 8, paged: bool = False) -> None:
        self.parameters, self.bits, self.paged = parameters, bits, paged
        self.state: dict[nn.Parameter, list[Tensor]] = {}
        self.tables: list[Tensor] = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if parameter not in self.state:
                self.state[parameter] = self._states(parameter)

    def _states(self, parameter: nn.Parameter) -> list[Tensor]:
        n = parameter.numel()
        eight = self.bits == 8 and n >= MIN_8BIT
        made = []
        if not (self.paged and n >= MIN_PAGED):
            made += [parameter.new_empty(n, dtype=torch.uint8 if eight else torch.float32) for _ in range(2)]
        if eight:
            if not self.tables:
                self.tables = [parameter.new_empty(256, dtype=torch.float32) for _ in range(2)]
            made += [parameter.new_empty(-(-n // BLOCK), dtype=torch.float32) for _ in range(2)]
        return made


def make(name: str, parameters: list[nn.Parameter]) -> Any:
    """The optimizer of a Job's `optimizer`."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-4, foreach=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)
    return BitsAndBytesAdamW(parameters, 8 if name.endswith("8bit") else 32, name.startswith("paged"))
