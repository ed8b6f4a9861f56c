/* Encoding and decoding 4-bit blocks; built, called and explained by nf4_compiled.py.

   A decoded weight is one of sixteen values in its block, code[k] * absmax, rounded to the dtype that is wanted. The
   sixteen are made and rounded once a block, and a weight costs no more than a look-up. Nothing is fused (the build
   says -ffp-contract=off), so that every value has the bits that torch's operations, one after the other, give it. */
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { NESTED_BLOCK = 256 };                      /* absmaxes that share one of their own, with double quantization */
typedef uint32_t float32;                         /* all three as bits; bfloat16's are the upper half of float32's */
typedef uint16_t bfloat16, float16;

/* ---- one number of each dtype, as a float and back to the nearest, ties to even */
static inline uint32_t bits_of(float v) { uint32_t u; memcpy(&u, &v, 4); return u; }
static inline float of_bits(uint32_t u) { float v; memcpy(&v, &u, 4); return v; }

static inline float load_float32(float32 x) { return of_bits(x); }
static inline float load_bfloat16(bfloat16 x) { return of_bits((uint32_t)x << 16); }
static inline float load_float16(float16 x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff;
    if (rest >= 0x7c00) return of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);         /* infinity, NaN */
    float v = rest < 0x400 ? rest * 0x1p-24f : of_bits((rest << 13) + (112 << 23));       /* subnormal, normal */
    return of_bits(bits_of(v) | sign);
}
static inline float32 round_float32(float v) { return bits_of(v); }
static inline bfloat16 round_bfloat16(float v) {
    uint32_t u = bits_of(v);
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
static inline float16 round_float16(float v) {
    uint32_t u = bits_of(v), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00;                                          /* NaN */
    if (rest >= 0x477ff000) return sign | 0x7c00;                                         /* 65520 and more: infinity */
    if (rest < 0x38800000)                                /* below 2^-14; adding 0.5 rounds to multiples of 2^-24 */
        return sign | (bits_of(of_bits(rest) + 0.5f) - 0x3f000000);
    return sign | (rest - (112 << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
}

/* ---- the inner loops: 16 weights at a time with AVX-512, whose registers hold a table of sixteen; else plain C */
#ifdef __AVX512F__
static inline __m512 load16_float32(const float32 *x) { return _mm512_castsi512_ps(_mm512_loadu_si512(x)); }
static inline __m512 load16_bfloat16(const bfloat16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}
static inline __m512 load16_float16(const float16 *x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
}

/* Sixteen bisections: is s above midpoint 7? then 11 or 3? ... Four look-ups, four comparisons. */
static inline __m512i code16(__m512 s, __m512 bounds, __m512i order) {
    __m512i c = _mm512_setzero_si512();
    for (int step = 8; step; step /= 2) {
        __m512 bound = _mm512_permutexvar_ps(_mm512_add_epi32(c, _mm512_set1_epi32(step - 1)), bounds);
        c = _mm512_mask_add_epi32(c, _mm512_cmp_ps_mask(s, bound, _CMP_GT_OQ), c, _mm512_set1_epi32(step));
    }
    return _mm512_permutexvar_epi32(c, order);
}
/* 16 codes in 32 bits each to 8 bytes: first << 4 | second */
static inline int64_t pack16(__m512i codes) {
    codes = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
    return _mm_cvtsi128_si64(_mm512_cvtepi64_epi8(codes));
}
#define ENCODE_BLOCK(dtype) \
    __m512 b = _mm512_loadu_ps(bounds), v = _mm512_set1_ps(inverse); \
    __m512i o = _mm512_loadu_si512(order); \
    for (long i = 0; i < size; i += 16) { \
        int64_t eight = pack16(code16(_mm512_mul_ps(load16_##dtype(x + i), v), b, o)); \
        memcpy(packed + i / 2, &eight, 8); \
    }
#else
#define ENCODE_BLOCK(dtype) \
    int32_t c[4096];                                            /* the largest block */ \
    for (long i = 0; i < size; i++) { \
        float s = load_##dtype(x[i]) * inverse; \
        c[i] = 0; \
        for (int k = 0; k < 15; k++) c[i] += s > bounds[k]; \
    } \
    for (long i = 0; i < size / 2; i++) packed[i] = order[c[2 * i]] << 4 | order[c[2 * i + 1]];
#endif

static inline void spread(const uint8_t *packed, const void *table, void *out, long n, int bytes) {
    if (bytes == 4) {
        const uint32_t *t = table;
        uint32_t *y = out;
        long i = 0;
#ifdef __AVX512F__
        __m512i values = _mm512_loadu_si512(t);
        for (; i + 16 <= n; i += 16) {
            /* each byte in 64 bits: in the lower half its first code, in the upper its second, and dirt: vpermd looks
               at 4 bits */
            __m512i c = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(packed + i / 2)));
            c = _mm512_or_si512(_mm512_srli_epi64(c, 4), _mm512_slli_epi64(c, 32));
            _mm512_storeu_si512(y + i, _mm512_permutexvar_epi32(c, values));
        }
#endif
        for (; i < n; i++) y[i] = t[packed[i / 2] >> (i % 2 ? 0 : 4) & 15];
    } else {
        const uint16_t *t = table;
        uint16_t *y = out;
        long i = 0;
#ifdef __AVX512BW__
        __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)t));
        for (; i + 32 <= n; i += 32) {           /* likewise in 32; vpermw looks at 5 bits, the table is there twice */
            __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(packed + i / 2)));
            c = _mm512_or_si512(_mm512_srli_epi32(c, 4), _mm512_slli_epi32(c, 16));
            _mm512_storeu_si512(y + i, _mm512_permutexvar_epi16(c, values));
        }
#endif
        for (; i < n; i++) y[i] = t[packed[i / 2] >> (i % 2 ? 0 : 4) & 15];
    }
}

#define ROUND_TABLE(dtype) for (int k = 0; k < 16; k++) table[k] = round_##dtype(code[k] * scale);
#define ROUND_TABLE_float32 ROUND_TABLE(float32)
#define ROUND_TABLE_bfloat16 ROUND_TABLE(bfloat16)
#ifdef __AVX512F__
#define ROUND_TABLE_float16 _mm256_storeu_si256((__m256i *)table, _mm512_cvtps_ph( \
        _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale)), _MM_FROUND_TO_NEAREST_INT));
#else
#define ROUND_TABLE_float16 ROUND_TABLE(float16)
#endif

/* ---- what Python calls: whole blocks to encode; any number of weights to decode, the last block may be short */
#define KERNELS(dtype) \
static inline void encode_block_##dtype(const dtype *x, const float *bounds, const int32_t *order, uint8_t *packed, \
                                        float inverse, long size) { ENCODE_BLOCK(dtype) } \
void encode_##dtype(const dtype *x, uint8_t *packed, float *absmax, const float *bounds, const int32_t *order, \
                    long blocks, long size, int threads) { \
    _Pragma("omp parallel for num_threads(threads) if(threads > 1)") \
    for (long n = 0; n < blocks; n++) { \
        const dtype *own = x + n * size; \
        dtype top = 0;       /* magnitudes compare alike as numbers and as bits; NaN and infinity come out on top */ \
        for (long i = 0; i < size; i++) { \
            dtype magnitude = own[i] & (((dtype)-1) >> 1); \
            top = magnitude > top ? magnitude : top; \
        } \
        absmax[n] = load_##dtype(top); \
        float inverse = 1.0f / (absmax[n] < 1e-38f ? 1e-38f : absmax[n]); \
        encode_block_##dtype(own, bounds, order, packed + n * size / 2, inverse, size); \
    } \
} \
void decode_##dtype(const uint8_t *packed, dtype *out, const float *code, const float *absmax, const uint8_t *codes, \
                    const float *nested, const float *levels, const float *offset, long n, long size, int threads) { \
    _Pragma("omp parallel for num_threads(threads) if(threads > 1)") \
    for (long b = 0; b < (n + size - 1) / size; b++) { \
        float scale = codes ? levels[codes[b]] * nested[b / NESTED_BLOCK] + *offset : absmax[b]; \
        dtype table[16]; \
        ROUND_TABLE_##dtype \
        long rest = n - b * size; \
        spread(packed + b * size / 2, table, out + b * size, rest < size ? rest : size, sizeof(dtype)); \
    } \
}
KERNELS(float32)
KERNELS(bfloat16)
KERNELS(float16)

/* Double quantization: what is left of each absmax without the mean, in 8 bits. `level` is the code for each of 65,536
   bins of [-1, 1]. See double_quant.py. */
void encode_nested(const float *absmax, const float *offset, const uint8_t *level, uint8_t *codes, float *nested,
                   long n, int threads) {
    _Pragma("omp parallel for num_threads(threads) if(threads > 1)")
    for (long start = 0; start < n; start += NESTED_BLOCK) {
        long end = n - start < NESTED_BLOCK ? n : start + NESTED_BLOCK;
        int32_t bits = 0;                        /* as above: magnitudes compare alike as bits */
        for (long i = start; i < end; i++) {
            union { float value; int32_t bits; } x = {absmax[i] - *offset};
            int32_t magnitude = x.bits & 0x7fffffff;
            bits = magnitude > bits ? magnitude : bits;
        }
        union { int32_t bits; float value; } top = {bits};
        nested[start / NESTED_BLOCK] = top.value;
        float inverse = 1.0f / top.value;
        for (long i = start; i < end; i++) {
            float s = (absmax[i] - *offset) * inverse;
            s = s > 1 ? 1 : s < -1 ? -1 : s == s ? s : 0;              /* 0 times the inverse of a subnormal is NaN */
            codes[i] = top.value > 0 ? level[(int32_t)((s + 1) * 0.5f * 65535 + 0.5f)] : 0;
        }
    }
}
