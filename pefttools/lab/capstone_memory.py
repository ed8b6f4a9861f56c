"""The memory of a training step, predicted before and counted after: on a GPU by torch's counters, on a CPU by a trace.

    predicted(job)          ──► bytes of tensors at the peak, by pefttools.vram: the formula, or the simulator
    counted(model, rows)    ──► the same of one real step: what lies there, and the most that comes to it

On a CPU there is no counter of allocated tensors, so `Trace` counts every storage that a real step makes, to the byte,
and what was there before (weights, adapter, optimizer) is added. pefttools.vram computes for CUDA; of its figure the
workspace of cuBLAS is taken off, which a CPU does not have. CPU and GPU still differ in their kernels.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

# Names of the methods in the chapter → those of pefttools.vram
JOBS = {"adapter": "bottleneck"}


def job_of(model: Any, method: str, batch: int, seq: int, **settings: Any) -> Any:
    """The job that is run: `lab.train` lets the logits go when the loss is there, and pads rows of several lengths."""
    from pefttools.vram.job import Job

    return Job(getattr(model, "config", model), JOBS.get(method, method), batch, seq,
               **{"keep_outputs": False, "padded": True, **settings})


def predicted(job: Any, simulated: bool = False) -> int:
    """Bytes of tensors at the peak of the job's step; without cuBLAS's workspaces where no GPU is named."""
    from pefttools.vram import estimate, simulate
    from pefttools.vram.formula import CUBLAS_THREADS
    from pefttools.vram.gpus import DEFAULT, find_gpu

    memory = simulate(job) if simulated else estimate(job)
    on_cpu = 0 if job.gpu else CUBLAS_THREADS * find_gpu(DEFAULT).cublas_workspace
    return memory.total - on_cpu


def resident(model: Any, optimizer: Any = None) -> int:
    """Bytes of a model's parameters and buffers, shared ones once, packed ones as they lie; and of an optimizer's
    state."""
    tensors = [*model.parameters(), *model.buffers(), *_inside(model)]
    if optimizer is not None:
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _inside(model: Any) -> list[torch.Tensor]:
    """Tensors of quantized weights that are neither parameters nor buffers."""
    found = []
    for module in model.modules():
        for value in vars(module).values():
            if type(value).__name__ == "NF4Tensor":
                found += [t for t in vars(value).values() if isinstance(t, torch.Tensor)]
    return found


def counted(model: Any, rows: list[dict], pad_id: int, checkpointing: bool = False, accumulate: int = 1) -> int:
    """Bytes of tensors at the peak of one real training step on these rows: the second one, when AdamW's state is
    there.

    With accumulation the rows are passed twice: from the second pass on, gradients lie there. On a GPU torch's own
    counter counts. The learning rate is 0, so the weights stay as they are. Leaves the model in eval mode, without
    gradients and without checkpointing.
    """
    from pefttools.lab.text import IGNORE, collate
    from pefttools.lab.training import loss_sum

    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    batch = {name: tensor.to(device) for name, tensor in collate(rows, pad_id).items()}
    targets = int((batch["labels"][:, 1:] != IGNORE).sum())
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step() -> None:
        for _ in range(min(accumulate, 2)):
            (loss_sum(model, batch) / targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        from pefttools.bench.memory import Trace

        there = resident(model, optimizer)
        with Trace() as trace:
            step()
        peak = there + trace.peak
    if checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    return peak
