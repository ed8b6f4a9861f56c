"""How a step of `lab.train` is computed: in which precision, and by how many processes.

    weights     trained      computed in             gradients
    float32     float32      float32                 as they are
    bfloat16    float32      bfloat16                as they are
    float16     float32      float16                 the loss is multiplied by a large factor before the backward pass
                                                     and the gradients divided by it after (float16 ends at 6e-8)

What is trained is always float32: AdamW adds steps of 1e-5 to numbers near 1, which 16 bits round away (and in float16
its ε = 1e-8 is zero, so that the second step is NaN). A frozen 16-bit base computes in its own dtype, and our layers
on it join float32 parameters to it by themselves, in less memory than under autocast; so autocast is on only where
parameters of the model itself are trained, or where a float32 model is to be computed in 16 bits.

    accelerate launch --num_processes 2 script.py      every process trains on its own passes of a step:
        pass 0   pass 1   pass 2   pass 3              the gradient is that of the mean over the targets of all of
        rank 0   rank 1   rank 0   rank 1              them, summed over the processes once a step

So P processes that add up A passes each do what one process does that adds up P·A of them, up to the order of a sum.
"""
from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor, nn

COMPUTED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = ("auto", *COMPUTED)
BUCKET = 2**24  # numbers that are summed over the processes at once: 64 MiB in float32


class Processes:
    """The processes of one run: which of them this is, and sums over all. Of one process, everything is as it was."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank, self.count, self.device = 0, 1, device
        if int(os.environ.get("WORLD_SIZE") or 1) < 2:
            return
        for name in ("FSDP", "DEEPSPEED"):
            if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
                raise ValueError(f"accelerate is configured for {name}, which lab.train does not do: every process "
                                 "holds the whole model here. Launch with --multi_gpu.")
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available() or device is not None and device.type == "cpu")
        self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum of a number over all processes, in float64; the number itself where there is one."""
        if self.count == 1:
            return value
        sent = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sent)
        return type(value)(sent.item())

    def add_up(self, tensors: list[Tensor], from_first: bool = False) -> None:
        """Replace tensors of one dtype by their sums over all processes, or by the first process's values."""
        if self.count == 1:
            return
        while tensors:
            some, size = [], 0
            while tensors and (not some or size + tensors[0].numel() <= BUCKET):
                some.append(tensors[0])
                size += tensors[0].numel()
                tensors = tensors[1:]
            flat = torch.cat([t.detach().flatten() for t in some])
            torch.distributed.broadcast(flat, 0) if from_first else torch.distributed.all_reduce(flat)
            for t, new in zip(some, flat.split([t.numel() for t in some])):
                t.copy_(new.view_as(t))

    def gathered(self, thing: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        if self.count == 1:
            return [thing]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, thing)
        return found

    def from_first(self, thing: Any) -> Any:
        """What the first process has."""
        if self.count == 1:
            return thing
        sent = [thing]
        torch.distributed.broadcast_object_list(sent, 0, device=self.device if self.device.type == "cuda" else None)
        return sent[0]

    def wait(self) -> None:
        """Until all processes are here."""
        self.total(0.0)


def leave() -> None:
    """Close the connection between processes, where there is one: the last thing that a command does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def compute_dtype(model: nn.Module, precision: str = "auto") -> torch.dtype:
    """What the products of a step are computed in: as asked; "auto" is the dtype of most of the model's weights.

    Codes of 4 bits do not count: what stands beside them says what they are multiplied in. ValueError for another word.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: there are {', '.join(PRECISIONS)}.")
    if precision != "auto":
        return COMPUTED[precision]
    sizes: dict[torch.dtype, int] = {}
    adapters = {id(p) for p in adapter_values(model)}
    for p in model.parameters():
        if p.is_floating_point() and id(p) not in adapters:
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def adapter_values(model: nn.Module) -> list[nn.Parameter]:
    from pefttools.attached import adapter_parameters

    return list(adapter_parameters(model).values())


class Engine(Processes):
    """Precision and processes of one run over `params`, the trained parameters {name: parameter} of `model`.

    Parameters of 16 bits are made float32 while they are trained (`finish` makes them what they were).
    """

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], precision: str = "auto") -> None:
        super().__init__(next(iter(params.values())).device)
        self.params = params
        self.device = next(iter(params.values())).device
        self.dtype = compute_dtype(model, precision)
        own = {id(p) for p in adapter_values(model)}
        short = self.dtype in (torch.float16, torch.bfloat16)
        weights = {p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in own}
        if self.dtype == torch.float32 and weights & {torch.float16, torch.bfloat16}:
            raise ValueError("precision='float32', and the model has weights of 16 bits: load it with "
                             "dtype=torch.float32, or leave the precision to be 'auto'.")
        self.before = {name: p.dtype for name, p in params.items() if p.dtype in (torch.float16, torch.bfloat16)}
        # what was of 16 bits (the model's own weights; norms) does not know how to meet 16 bits once it is float32
        self.autocast = short and (self.dtype not in weights or bool(self.before)
                                   or any(id(p) not in own for p in params.values()))
        for name in self.before:
            params[name].data = params[name].data.float()
        self.scaler = torch.amp.GradScaler(self.device.type) if self.dtype == torch.float16 else None
        self.skipped = 0  # steps whose scaled gradients were too large for float16, and that changed nothing
        self.add_up([p.data for p in params.values()], from_first=True)

    def passes(self, step: int, grad_accum: int) -> list[int]:
        """The numbers of this process's passes of a step; all processes' passes of a step follow each other."""
        return [(step * grad_accum + j) * self.count + self.rank for j in range(grad_accum)]

    def computing(self) -> contextlib.AbstractContextManager:
        """Around a forward pass."""
        return torch.autocast(self.device.type, self.dtype) if self.autocast else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def collect(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradients of all processes, summed, and divided by what the loss was multiplied by."""
        if self.count > 1:
            for p in self.params.values():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            self.add_up([p.grad for p in self.params.values()])
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """optimizer.step(); in float16 not where a gradient was too large, and then the factor is halved."""
        if self.scaler is None:
            optimizer.step()
            return
        factor = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < factor

    def finish(self) -> None:
        """Give the trained parameters the dtype that they had before."""
        for name, dtype in self.before.items():
            self.params[name].data = self.params[name].data.to(dtype)

    # ---- for the checkpoint
    def state(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same dropout and scale the same loss. All processes call it together."""
        mine = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.device)
        return {"rng": self.gathered(mine), "skipped": self.skipped,
                "scaler": None if self.scaler is None else self.scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        if len(state["rng"]) == self.count:  # with another number of processes nobody can go on where he was
            torch.set_rng_state(state["rng"][self.rank]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["rng"][self.rank]:
                torch.cuda.set_rng_state(state["rng"][self.rank]["cuda"], self.device)
        self.skipped = state["skipped"]
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
