"""simulate(): the real training step of the real model on tensors without memory, every allocation followed.

    Job ──► skeleton: the model on meta ──► step: two of them ──► ledger: who came and went ──► reading: terms,
                                              │ kernels: what CUDA's would keep and take           timeline; allocator
                                              └                                                    replayed: reserved

    simulate("llama-3.2-1b", "lora", batch=4, seq=512).total                      bytes
    simulate_peft("llama-3.2-3b", {"peft_type": "VERA", "r": 256}, 4, 768)        any method of peft

`terms` are bytes at the peak of max_memory_allocated() (blocks as the allocator gives them, multiples of 512); and
`reserved` is max_memory_reserved() after loading and two steps of the same shape (and those of `Job.shapes` before).

What runs is the code of transformers, of torch.optim and of the method's library on the meta device, so what is stated
in a formula elsewhere is found here. Stated, not found: CUDA's attention, dropout and work areas (`kernels.py`),
bitsandbytes' kernels and optimizers (`skeleton.py`, `optimizers.py`), and FSDP (`fsdp.py`). Not simulated: compiled
models, several streams, and what another library holds outside of torch's allocator.
"""
from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pefttools.vram import skeleton
from pefttools.vram.job import Job, make_job
from pefttools.vram.kernels import DEFAULT_CAPABILITY, CUDAKernels, cublas_workspace, workspaces
from pefttools.vram.ledger import Ledger
from pefttools.vram.memory import Memory
from pefttools.vram.optimizers import make
from pefttools.vram.peft_on_meta import as_without_data, attach_peft, stays_on_host
from pefttools.vram.reading import read
from pefttools.vram.step import as_on_cuda, run_step


def simulate(model: Any, method: str = "lora", batch: int = 1, seq: int = 512, **options: Any) -> Memory:
    """Peak memory of a training step of the job (see `Job`), by running it without data.

    Raises ValueError for a job that cannot be, as `Job` does, and what a method raises that does not suit the model.
    """
    job = make_job(model, method, batch, seq, **options)
    return run(job, skeleton.build(job))


def simulate_peft(model: Any, peft_config: Any, batch: int = 1, seq: int = 512, *, use_cache: bool | None = None,
                  empty_cache: bool = False, mask: bool | None = None, **options: Any) -> Memory:
    """The same for any configuration of peft: a PeftConfig, adapter_config.json's dictionary, or None (full).

    use_cache    of the forward pass; by default the model's configuration's, which is what a script that says nothing
                 gets: keys and values are in the outputs then, and stay as long as those
    empty_cache  the cache is emptied before the step, as a script that calls torch.cuda.empty_cache() does
    mask         whether an attention_mask is passed (default: where `padded`)

    AdaMSS does not run: the shapes of its parameters depend on the values of the base's weights.
    """
    job = make_job(model, "full" if peft_config is None else "lora", batch, seq, **({"library": "peft"} | options))
    base = skeleton.build_base(job)
    if job.checkpointing:
        skeleton.enable_checkpointing(base)
    built = base if peft_config is None else attach_peft(base, peft_config, job)
    if use_cache is None:
        use_cache = bool(getattr(base.config, "use_cache", False)) and not job.checkpointing
    return run(job, built.train(), use_cache=use_cache, empty_cache=empty_cache, mask=mask)


def run(job: Job, model: nn.Module, *, use_cache: bool = False, empty_cache: bool = False, mask: bool | None = None,
        ledgers: list[Ledger] | None = None) -> Memory:
    """Two steps of `job` (after one for each of `job.shapes`) with this model on meta; the last one is read.

    `ledgers`: a list to which the ledger is added, for whoever wants to look closer.
    """
    capability = _capability(job)
    names = {id(module): name for name, module in model.named_modules()}
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    ledger = Ledger(int(getattr(text, "vocab_size", 0)), workspaces)
    kernels = CUDAKernels(capability, job.attention, getattr(torch, job.dtype) if job.master else None)
    one = [(job.batch, job.seq)] * job.accumulate
    steps = [[shape] * job.accumulate for shape in job.shapes] + [one, one]
    gc.collect()
    with contextlib.ExitStack() as stack:
        for context in (ledger, kernels, as_on_cuda(job.padded), skeleton.gpu_kernels_of_nf4(),
                        as_without_data(), _following(names, ledger)):
            stack.enter_context(context)
        counts = _enter_model(model, ledger)
        stack.callback(_mark_gradients(model, ledger))
        optimizer = make(job.optimizer, [p for p in model.parameters() if p.requires_grad])
        ledger.lasting(cublas_workspace(capability), "temporary", "cuBLAS, forward")
        ledger.lasting(cublas_workspace(capability), "temporary", "cuBLAS, backward")
        for batches in steps:
            if batches is steps[-1] and empty_cache:
                ledger.empty_cache()
            start = ledger.clock
            run_step(model, optimizer, ledger, job, batches, use_cache, job.padded if mask is None else mask,
                     kernels.forget)
    ledger.close()
    if ledgers is not None:
        ledgers.append(ledger)
    lives, notes = ledger.lives, ()
    if job.gpus > 1:
        from pefttools.vram.fsdp import RULES, shard

        lives, notes = shard(ledger, job.gpus), RULES
    return read(job, lives, start, counts, ledger.emptied, _context(job), notes)


def _capability(job: Job) -> tuple[int, int]:
    if job.gpu is None:
        return DEFAULT_CAPABILITY
    from pefttools.vram.gpus import find_gpu

    return find_gpu(job.gpu).capability


def _context(job: Job) -> int:
    from pefttools.vram.gpus import DEFAULT, find_gpu

    return find_gpu(job.gpu or DEFAULT).context


def _enter_model(model: nn.Module, ledger: Ledger) -> tuple[int, int]:
    """Enter parameters and buffers by term; (trainable, all) parameters."""
    from pefttools.nf4_linear import NF4Linear

    trained, total, seen = 0, 0, set()
    full = all(p.requires_grad for p in model.parameters())
    for name, module in model.named_modules():
        quantized = isinstance(module, NF4Linear)
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += module._q.shape.numel() if quantized and parameter is module.weight else parameter.numel()
            trained += parameter.numel() * parameter.requires_grad
            _given(ledger, parameter, name, "adapter" if parameter.requires_grad and not full else "weights")
        for key, buffer in module.named_buffers(recurse=False):
            if stays_on_host(module, key):
                ledger.on_host(buffer)
            else:
                _given(ledger, buffer, name, "weights")
        if quantized:
            for part, tensor in vars(module._q).items():
                if isinstance(tensor, torch.Tensor) and part != "packed":
                    _given(ledger, tensor, name, "constants")
    return trained, total


def _given(ledger: Ledger, tensor: torch.Tensor, where: str, term: str) -> None:
    if tensor.device.type == "meta" and (life := ledger.see(tensor, "given", term)) is not None:
        life.where = where


def _mark_gradients(model: nn.Module, ledger: Ledger) -> Any:
    """A hook on each trained parameter: its gradient's storage is of the term gradients from the start."""
    where = {id(p): name for name, module in model.named_modules() for p in module.parameters(recurse=False)}

    def mark(parameter: torch.Tensor) -> None:
        if parameter.grad is not None and (life := ledger.see(parameter.grad, "gradient", "gradients")) is not None:
            life.where = where[id(parameter)]

    handles = [p.register_post_accumulate_grad_hook(mark) for p in model.parameters() if p.requires_grad]
    return lambda: [handle.remove() for handle in handles]


@contextlib.contextmanager
def _following(names: dict[int, str], ledger: Ledger) -> Iterator[None]:
    """Inside, the ledger knows which module is at work. (Not by hooks: layers ask whether somebody listens.)"""
    call = nn.Module.__call__

    def followed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = names.get(id(self))
        if name is None:
            return call(self, *args, **kwargs)
        ledger.enter(name)
        try:
            return call(self, *args, **kwargs)
        finally:
            ledger.leave()

    nn.Module.__call__ = followed
    try:
        yield
    finally:
        nn.Module.__call__ = call
