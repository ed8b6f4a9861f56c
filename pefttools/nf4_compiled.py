"""Encoding and decoding 4-bit blocks in C, built by the machine's own compiler in less than a second: `compiled=True`.

The same arithmetic as `pefttools.nf4_kernels`, so the same bytes, with nothing written to memory in between. Why not
`torch.compile`: it takes many seconds the first time, and again for other shapes, and its decoder, which looks up one
level at a time, is no faster than eager torch; this one is as fast as a copy in memory.

On processors with AVX-512, sixteen weights go through one register, and the sixteen levels lie in another: a look-up
is one instruction (vpermps). Encoding is a bisection: is s above midpoint 7? then 11 or 3? … four look-ups, four
comparisons. Elsewhere plain C does it: 15 comparisons, added up, which compilers vectorize.

The library is built once a process in a temporary folder and holds no state. Only on request, since many machines have
no compiler and the eager kernels need none: by `compiled=True` for one call, `use()` for all from here on, or the
environment variable PEFTTOOLS_COMPILED=1.
"""
from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = r"""
#include <stdint.h>
#include <string.h>

static inline float load(const void *x, long i, int bf16) {          /* bfloat16 is the upper half of a float */
    float v;
    uint32_t bits;
    if (bf16) { bits = (uint32_t)((const uint16_t *)x)[i] << 16; memcpy(&v, &bits, 4); return v; }
    return ((const float *)x)[i];
}
static inline void store(void *x, long i, int bf16, float v) {
    uint32_t bits;
    if (!bf16) { ((float *)x)[i] = v; return; }
    memcpy(&bits, &v, 4);
    ((uint16_t *)x)[i] = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  /* to the nearest, ties to even */
}
/* Magnitudes compare alike as floats and as integers, and so NaN and infinity come out on top. */
static inline float largest(const void *x, long size, int bf16) {
    int32_t top = 0, bits;
    float v;
    for (long i = 0; i < size; i++) {
        v = load(x, i, bf16); memcpy(&bits, &v, 4); bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    memcpy(&v, &top, 4);
    return v;
}

#ifdef __AVX512F__
#include <immintrin.h>
static inline __m512 load16(const void *x, long i, int bf16) {
    if (!bf16) return _mm512_loadu_ps((const float *)x + i);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline void store16(void *x, long i, int bf16, __m512 v) {
    if (!bf16) { _mm512_storeu_ps((float *)x + i, v); return; }
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    _mm256_storeu_si256((__m256i *)((uint16_t *)x + i), _mm512_cvtepi32_epi16(bits));
}
static inline __m512i code16(__m512 s, __m512 bounds, __m512i order) {
    __m512i c = _mm512_setzero_si512();
    for (int step = 8; step; step /= 2) {
        __m512 bound = _mm512_permutexvar_ps(_mm512_add_epi32(c, _mm512_set1_epi32(step - 1)), bounds);
        c = _mm512_mask_add_epi32(c, _mm512_cmp_ps_mask(s, bound, _CMP_GT_OQ), c, _mm512_set1_epi32(step));
    }
    return _mm512_permutexvar_epi32(c, order);
}
static inline void encode_block(const void *x, const float *bounds, const int32_t *order, uint8_t *packed,
                                float inverse, long size, int bf16) {
    __m512 b = _mm512_loadu_ps(bounds), v = _mm512_set1_ps(inverse);
    __m512i o = _mm512_loadu_si512(order);
    for (long i = 0; i < size; i += 32) {
        __m512i p = code16(_mm512_mul_ps(load16(x, i, bf16), v), b, o);        /* 16 codes in 32 bits each */
        __m512i q = code16(_mm512_mul_ps(load16(x, i + 16, bf16), v), b, o);
        p = _mm512_or_si512(_mm512_slli_epi64(p, 4), _mm512_srli_epi64(p, 32));  /* first << 4 | second */
        q = _mm512_or_si512(_mm512_slli_epi64(q, 4), _mm512_srli_epi64(q, 32));
        _mm_storel_epi64((__m128i *)(packed + i / 2), _mm512_cvtepi64_epi8(p));
        _mm_storel_epi64((__m128i *)(packed + i / 2 + 8), _mm512_cvtepi64_epi8(q));
    }
}
static inline void decode_block(const uint8_t *packed, float absmax, const float *code, void *out, long size,
                                int bf16) {
    __m512 table = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(absmax));
    for (long i = 0; i < size; i += 16) {
        /* each byte twice, in the two halves of 64 bits; the upper half is the second, low four bits */
        __m512i c = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(packed + i / 2)));
        c = _mm512_or_si512(_mm512_srli_epi64(c, 4), _mm512_slli_epi64(c, 32));   /* vpermps looks at four bits only */
        store16(out, i, bf16, _mm512_permutexvar_ps(c, table));
    }
}
#else
static inline void encode_block(const void *x, const float *bounds, const int32_t *order, uint8_t *packed,
                                float inverse, long size, int bf16) {
    int32_t c[4096];                                                  /* the largest block */
    for (long i = 0; i < size; i++) {
        float s = load(x, i, bf16) * inverse;
        c[i] = 0;
        for (int k = 0; k < 15; k++) c[i] += s > bounds[k];
    }
    for (long i = 0; i < size / 2; i++) packed[i] = order[c[2 * i]] << 4 | order[c[2 * i + 1]];
}
static inline void decode_block(const uint8_t *packed, float absmax, const float *code, void *out, long size,
                                int bf16) {
    float table[16];
    for (int k = 0; k < 16; k++) table[k] = code[k] * absmax;
    for (long i = 0; i < size / 2; i++) {
        store(out, 2 * i, bf16, table[packed[i] >> 4]);
        store(out, 2 * i + 1, bf16, table[packed[i] & 15]);
    }
}
#endif

#define KERNELS(dtype, bf16, bytes) \
void encode_##dtype(uint8_t *packed, float *absmax, const char *x, const float *bounds, const int32_t *order, \
                    long blocks, long size, int threads) { \
    _Pragma("omp parallel for num_threads(threads) if(threads > 1)") \
    for (long n = 0; n < blocks; n++) { \
        const char *own = x + n * size * bytes; \
        absmax[n] = largest(own, size, bf16); \
        encode_block(own, bounds, order, packed + n * size / 2, 1.0f / (absmax[n] < 1e-38f ? 1e-38f : absmax[n]), \
                     size, bf16); \
    } \
} \
void decode_##dtype(const uint8_t *packed, const float *absmax, char *out, const float *code, long blocks, \
                    long size, int threads) { \
    _Pragma("omp parallel for num_threads(threads) if(threads > 1)") \
    for (long n = 0; n < blocks; n++) \
        decode_block(packed + n * size / 2, absmax[n], code, out + n * size * bytes, size, bf16); \
}
KERNELS(float32, 0, 4)
KERNELS(bfloat16, 1, 2)
"""
NATIVE = (torch.float32, torch.bfloat16)       # what C reads and writes; another dtype goes through float32
THREAD = 1 << 16                               # weights that are worth another thread: some 10 microseconds of work
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")          # no fused multiply-add: the same bits as torch


@functools.cache
def library() -> ctypes.CDLL:
    """The built kernels. Raises RuntimeError where there is no C compiler or it fails, with its words."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise RuntimeError("compiled=True needs a C compiler, and none of cc, gcc, clang is on the PATH. Install one "
                           "(Debian, Ubuntu: apt install gcc; macOS: xcode-select --install), or use compiled=False.")
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "nf4.c"), Path(folder, "nf4.so")
        source.write_text(SOURCE)
        # Not every clang knows the first, and Apple's not OpenMP; without it the work is done on one thread.
        for flags in (("-march=native", "-fopenmp", *FLAGS), ("-march=native", *FLAGS), FLAGS):
            try:
                subprocess.run([*compiler.split(), *flags, str(source), "-o", str(built)], check=True,
                               capture_output=True, text=True)
                return ctypes.CDLL(str(built))                # once loaded, the file is not needed
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", "") or error
    raise RuntimeError(f"compiled=True: {compiler} could not build the kernels: {reason} Use compiled=False.")


def use(on: bool = True) -> None:
    """Whether calls that leave `compiled` open are to use these kernels. Builds them at once; raises as `library`."""
    global _in_use
    if on:
        library()
    _in_use = on


def in_use() -> bool:
    """What `use` was last told; to begin with, whether the environment variable PEFTTOOLS_COMPILED is 1."""
    return _in_use


_in_use = os.environ.get("PEFTTOOLS_COMPILED") == "1"


def _call(name: str, packed: Tensor, absmax: Tensor, weights: Tensor, *tables: Tensor) -> None:
    """C reads and writes where it is told to, so sizes are checked here."""
    if 2 * packed.numel() != weights.numel() or len(absmax) != len(weights) or not all(
            t.is_contiguous() for t in (packed, absmax, weights, *tables)):
        raise ValueError(f"{packed.numel()} packed bytes and {len(absmax)} absmaxes do not fit a weight in blocks "
                         f"{list(weights.shape)}, or are scattered.")
    function = getattr(library(), name)
    function.restype = None
    function(*(ctypes.c_void_p(t.data_ptr()) for t in (packed, absmax, weights, *tables)),
             *(ctypes.c_long(size) for size in weights.shape),
             ctypes.c_int(min(torch.get_num_threads(), weights.numel() // THREAD)))


class _Kernel:
    """What both have in common."""

    own_threads = True                         # OpenMP's, of which torch.get_num_threads() says how many

    @staticmethod
    def chunk(weights: Tensor, otherwise: int) -> int:
        """How many weights at a time: all, where none are converted or gathered on the way."""
        return weights.numel() if weights.dtype in NATIVE and weights.is_contiguous() else otherwise

    @staticmethod
    def scratch(*tensors: Tensor) -> None:
        """None is needed."""


class Encoder(_Kernel):
    """Encodes a chunk of whole blocks: w [blocks, block_size] → packed [blocks, block_size/2], absmax [blocks, 1]."""

    def __init__(self, bounds: Tensor, order: Tensor) -> None:
        library()
        self.tables = torch.nn.functional.pad(bounds, (0, 1), value=torch.inf), order.int()   # 16, as a register has

    def __call__(self, w: Tensor, packed: Tensor, absmax: Tensor, scratch: None) -> None:
        w = (w if w.dtype in NATIVE else w.float()).contiguous()
        _call(f"encode_{str(w.dtype)[6:]}", packed, absmax, w, *self.tables)


class Decoder(_Kernel):
    """Decodes a chunk of whole blocks: packed [blocks, block_size/2], absmax [blocks, 1] → out [blocks, block_size]."""

    def __init__(self, code: Tensor) -> None:
        library()
        self.code = code.float().contiguous()

    def __call__(self, out: Tensor, packed: Tensor, absmax: Tensor, scratch: None) -> None:
        target = out if out.dtype in NATIVE else torch.empty(out.shape, dtype=torch.float32, device="cpu")
        _call(f"decode_{str(target.dtype)[6:]}", packed, absmax, target, self.code)
        if target is not out:
            out.copy_(target)
