"""What an optimizer keeps from step to step, and what its step takes beside.

    n trained numbers of p bytes (4 beside a 16-bit base, 2 in full fine-tuning of one)

    adamw               m, v in the parameter's dtype         2·p·n          step: + p·n   √v of all tensors (foreach)
    adamw_8bit          tensors of < 4,096 numbers: float32   8·n
                        others: 1 byte each, and a scale a    2·n + 8·n/256
                        block of 256, for m and for v
    paged_…             the same; tensors of 100,000 numbers and more in unified memory, which torch does not count
    sgd                 no momentum: nothing
    adafactor           a matrix [i, j]: i + j float32; a vector [i]: i

Loshchilov & Hutter 2019 (AdamW); Dettmers et al. 2022, arXiv:2110.02861 (8 bits; `min_8bit_size` 4096 in
bitsandbytes/optim/optimizer.py, `get_state_buffer` there for what is paged); Shazeer & Stern 2018, arXiv:1804.04235.

`√v of all tensors`: torch.optim.AdamW's foreach path makes one list `exp_avg_sq_sqrt` of the size of v
(torch/optim/adam.py, `_multi_tensor_adam`), which the formulas that stop at 16 bytes a parameter leave out.
"""
from __future__ import annotations

from collections.abc import Iterable

from pefttools.vram.job import Job
from pefttools.vram.shape import Shape
from pefttools.vram.terms.adapters import trained_size, trained_tensors
from pefttools.vram.terms.tensors import Tensors, block, bytes_of, numbers

MIN_8BIT, QUANT_BLOCK, PAGED_FROM = 4096, 256, 100_000


def optimizer_state(job: Job, s: Shape) -> int:
    """Bytes on the GPU between steps."""
    tensors, size = trained_tensors(job, s), trained_size(job)
    if job.optimizer == "sgd":
        return 0
    if job.optimizer == "adafactor":
        return sum(count * factored(numel) for numel, count in _shaped(job, s))
    if job.optimizer == "adamw":
        return 2 * bytes_of(tensors, size)
    paged, bits = job.optimizer.startswith("paged"), 8 if job.optimizer.endswith("8bit") else 32
    return sum(count * _bnb(numel, bits, paged) for numel, count in tensors) + (2 * block(4 * 256) if bits == 8 else 0)


def _bnb(n: int, bits: int, paged: bool) -> int:
    """m and v of one tensor in bitsandbytes."""
    moments = 2 * block(n if bits == 8 and n >= MIN_8BIT else 4 * n)
    if paged and n >= PAGED_FROM:
        moments = 0
    scales = 2 * block(4 * -(-n // QUANT_BLOCK)) if bits == 8 and n >= MIN_8BIT else 0
    return moments + scales


def step_temporary(job: Job, s: Shape) -> int:
    """Bytes that the optimizer's step takes beside its state: √v of everything in AdamW's foreach path, else little."""
    if job.optimizer == "adamw":
        return bytes_of(trained_tensors(job, s), trained_size(job))
    if job.optimizer == "adafactor":
        return adafactor_temporary(job, s)
    return 0


# ------------------------------------------------------------------------------------------------ Adafactor

def _shaped(job: Job, s: Shape) -> list[tuple[tuple[int, ...], int]]:
    """((rows, columns) or (length,), how many) of what is trained: what Adafactor's factors depend on."""
    from pefttools.vram.terms.adapters import rank

    if job.method == "full":
        vectors = s.norm_vectors
        return [*(((each.d_out, each.d_in), s.L) for each in s.linears), ((s.V, s.h), 1 if s.tied else 2),
                *([((s.positions, s.h), 1)] if s.positions else []),
                *(((each.d_out,), s.L) for each in s.linears if each.bias),
                *(((width,), s.L * vectors) for _, width in s.norms), ((s.h,), vectors)]
    if job.method in ("lora", "qlora", "dora", "qdora"):
        r = rank(job)
        return [((numel // r, r) if numel % r == 0 and numel > r else (numel,), count)
                for numel, count in trained_tensors(job, s)]
    return [((numel // s.h, s.h) if numel > s.h and numel % s.h == 0 else (numel,), count)
            for numel, count in trained_tensors(job, s)]


def factored(shape: tuple[int, ...]) -> int:
    """Bytes of Adafactor's second moments of one tensor: i + j numbers for [i, j], i for [i]."""
    return sum(block(4 * n) for n in shape)


def adafactor_temporary(job: Job, s: Shape) -> int:
    """Of the largest tensor, for tensors come one after the other: g² and the update, and where it is of 16 bits the
    gradient and the parameter, too, all in float32 (transformers/optimization.py, `Adafactor.step`)."""
    largest = max(tensor.numel for tensor in trained_tensors(job, s))
    return (4 if trained_size(job) < 4 else 2) * block(4 * largest)


def trained_numbers(tensors: Iterable[Tensors]) -> int:
    """n of the module's docstring."""
    return numbers(tensors)
