"""The base model: what is quantized, what stays, and the constants of what is quantized.

    16 bits       2 · (linear + rest)                        bytes, a tied head counted once
    NF4           ½ · linear      + 2 · rest                 + constants: 4/64 · linear
    NF4, nested   ½ · linear      + 2 · rest                 + constants: (1/64 + 4/(64·256)) · linear

    rest: embeddings, positions, norms, biases and the head (transformers leaves the head, and whatever is tied to it,
    unquantized: its errors would go straight into the logits)

Dettmers et al. 2023, arXiv:2305.14314, section 3. A worked number, Llama-3.2-1B: 973,078,528 of 1,235,814,400 weights
are in linear layers: 2 · 1,235,814,400 = 2.30 GiB become 973,078,528/2 + 2 · 262,735,872 = 0.94 GiB, and 14.9 MiB of
constants.
"""
from __future__ import annotations

import math

from pefttools.vram.job import DTYPES, Job
from pefttools.vram.shape import Shape
from pefttools.vram.terms.tensors import Tensors, block, bytes_of

BLOCK_SIZE, NESTED_BLOCK = 64, 256          # weights that share a scale; scales that share a scale
CODE, NESTED_CODE = 16, 256                 # levels of NF4; of the 8-bit type


def linear_tensors(s: Shape) -> list[Tensors]:
    """The matrices of all decoder layers: L · (h·q + 2·h·kv + q·h + 3·h·m) numbers in a Llama."""
    return [Tensors(each.d_in * each.d_out, s.L) for each in s.linears]


def rest_tensors(s: Shape) -> list[Tensors]:
    """Embedding V·h, head V·h unless tied, positions, norms, biases."""
    vectors = s.norm_vectors
    return [Tensors(s.V * s.h, 1 if s.tied else 2), *([Tensors(s.positions * s.h)] if s.positions else []),
            *(Tensors(each.d_out, s.L) for each in s.linears if each.bias),
            *(Tensors(width, s.L * vectors) for _, width in s.norms), Tensors(s.h, vectors)]


def base_tensors(s: Shape) -> list[Tensors]:
    return [*linear_tensors(s), *rest_tensors(s)]


def weights(job: Job, s: Shape) -> int:
    """Bytes of the model in the base's dtype e: e·linear + e·rest, or with NF4 ½·linear + e·rest."""
    e = DTYPES[job.dtype]
    return bytes_of(linear_tensors(s), 0.5 if job.quantization else e) + bytes_of(rest_tensors(s), e)


def constants(job: Job, s: Shape) -> int:
    """Bytes of the scales of NF4 weights: `nf4_constants` of every matrix; 0 for a base that is not quantized."""
    if not job.quantization:
        return 0
    return sum(count * nf4_constants(numel, job.quantization == "nf4-dq") for numel, count in linear_tensors(s))


def nf4_constants(n: int, double: bool) -> int:
    """Of one weight of n numbers, as NF4Linear and bitsandbytes keep them, each tensor in its own block:

    absmax        float32 [⌈n/64⌉], or nested uint8 [⌈n/64⌉]           code           float32 [16]
    with nested   nested_absmax float32 [⌈⌈n/64⌉/256⌉], nested_code float32 [256], offset float32 [1]
    """
    scales = math.ceil(n / BLOCK_SIZE)
    sizes = [scales * (1 if double else 4), 4 * CODE]
    if double:
        sizes += [4 * math.ceil(scales / NESTED_BLOCK), 4 * NESTED_CODE, 4]
    return sum(map(block, sizes))


def nf4_bits(double: bool) -> float:
    """Bits a weight costs: 4 + 32/64 = 4.5; nested 4 + 8/64 + 32/(64·256) = 4.127. (Code tables left out.)"""
    return 4 + (8 / BLOCK_SIZE + 32 / (BLOCK_SIZE * NESTED_BLOCK) if double else 32 / BLOCK_SIZE)
