/* Sixty-four elements at a time: their exponents as bytes, and questions about all of them, answered by a bit each.
   The library is built for several instruction sets (hatch_build.py); native.py loads the best that runs here. */

#ifndef LONGSHORE_SIMD_H
#define LONGSHORE_SIMD_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Where an element has its exponent: bytes an element (2 or 4), shift, mask. */
typedef struct {
    int width, shift;
    uint32_t mask;
} format;

INLINE uint32_t element(const uint8_t *p, int width) {
    uint32_t value = 0;
    memcpy(&value, p, (size_t)width);
    return value;
}

#if defined(__AVX512BW__)

#include <immintrin.h>

typedef __m512i exponents;

INLINE exponents load_exponents(const uint8_t *p, format f) {
    __m128i shift = _mm_cvtsi32_si128(f.shift);
    if (f.width == 2) {
        __m512i mask = _mm512_set1_epi16((short)f.mask);
        __m512i low = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(p), shift), mask);
        __m512i high = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(p + 64), shift), mask);
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low)), _mm512_cvtepi16_epi8(high), 1);
    }
    __m512i all = _mm512_setzero_si512(), mask = _mm512_set1_epi32((int)f.mask);
#define PART(k)                                                                                                        \
    all = _mm512_inserti32x4(                                                                                          \
        all,                                                                                                           \
        _mm512_cvtepi32_epi8(_mm512_and_si512(_mm512_srl_epi32(_mm512_loadu_si512(p + 64 * (k)), shift), mask)), k)
    PART(0);
    PART(1);
    PART(2);
    PART(3);
#undef PART
    return all;
}

INLINE uint64_t equal(exponents e, uint32_t value) { return _mm512_cmpeq_epi8_mask(e, _mm512_set1_epi8((char)value)); }

/* low <= exponent <= high */
INLINE uint64_t within(exponents e, uint32_t low, uint32_t high) {
    __m512i above = _mm512_sub_epi8(e, _mm512_set1_epi8((char)low));
    return _mm512_cmple_epu8_mask(above, _mm512_set1_epi8((char)(high - low)));
}

INLINE uint64_t differ(const uint8_t *a, const uint8_t *b, int width) {
    uint64_t bits = 0;
    if (width == 2) {
        for (int k = 0; k < 2; k++)
            bits |= (uint64_t)_mm512_cmpneq_epi16_mask(_mm512_loadu_si512(a + 64 * k), _mm512_loadu_si512(b + 64 * k))
                    << (32 * k);
    } else {
        for (int k = 0; k < 4; k++)
            bits |= (uint64_t)_mm512_cmpneq_epi32_mask(_mm512_loadu_si512(a + 64 * k), _mm512_loadu_si512(b + 64 * k))
                    << (16 * k);
    }
    return bits;
}

/* Counts of up to 255 blocks' elements with one exponent, by place. */
typedef __m512i tally;

INLINE tally no_tally(void) { return _mm512_setzero_si512(); }

INLINE tally add_equal(tally t, exponents e, uint32_t value) {
    return _mm512_mask_sub_epi8(t, equal(e, value), t, _mm512_set1_epi8(-1));
}

INLINE uint32_t sum(tally t) { return (uint32_t)_mm512_reduce_add_epi64(_mm512_sad_epu8(t, _mm512_setzero_si512())); }

#elif defined(__AVX2__)

#include <immintrin.h>

typedef struct {
    __m256i half[2];
} exponents;

INLINE __m256i load256(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* 32 numbers of 0 to 255, or -1 and 0, as bytes: from two or four vectors, of 16 or 32 bits. */
INLINE __m256i narrow(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xD8); }

INLINE exponents load_exponents(const uint8_t *p, format f) {
    __m128i shift = _mm_cvtsi32_si128(f.shift);
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    exponents e;
    for (int k = 0; k < 2; k++) {
        const uint8_t *q = p + k * 32 * f.width;
        if (f.width == 2) {
            __m256i mask = _mm256_set1_epi16((short)f.mask);
            __m256i low = _mm256_and_si256(_mm256_srl_epi16(load256(q), shift), mask);
            __m256i high = _mm256_and_si256(_mm256_srl_epi16(load256(q + 32), shift), mask);
            e.half[k] = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
        } else {
            __m256i mask = _mm256_set1_epi32((int)f.mask), part[4];
            for (int i = 0; i < 4; i++) part[i] = _mm256_and_si256(_mm256_srl_epi32(load256(q + 32 * i), shift), mask);
            __m256i low = _mm256_packus_epi32(part[0], part[1]), high = _mm256_packus_epi32(part[2], part[3]);
            e.half[k] = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
        }
    }
    return e;
}

INLINE uint64_t bits_of(__m256i low, __m256i high) {
    return (uint32_t)_mm256_movemask_epi8(low) | (uint64_t)(uint32_t)_mm256_movemask_epi8(high) << 32;
}

INLINE uint64_t equal(exponents e, uint32_t value) {
    __m256i all = _mm256_set1_epi8((char)value);
    return bits_of(_mm256_cmpeq_epi8(e.half[0], all), _mm256_cmpeq_epi8(e.half[1], all));
}

/* low <= exponent <= high */
INLINE uint64_t within(exponents e, uint32_t low, uint32_t high) {
    __m256i first = _mm256_set1_epi8((char)low), range = _mm256_set1_epi8((char)(high - low)), in[2];
    for (int k = 0; k < 2; k++) {
        __m256i above = _mm256_sub_epi8(e.half[k], first);
        in[k] = _mm256_cmpeq_epi8(_mm256_min_epu8(above, range), above);
    }
    return bits_of(in[0], in[1]);
}

INLINE uint64_t differ(const uint8_t *a, const uint8_t *b, int width) {
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), same[2];
    for (int k = 0; k < 2; k++) {
        const uint8_t *p = a + k * 32 * width, *q = b + k * 32 * width;
        if (width == 2) {
            same[k] = narrow(_mm256_cmpeq_epi16(load256(p), load256(q)),
                             _mm256_cmpeq_epi16(load256(p + 32), load256(q + 32)));
        } else {
            __m256i part[4];
            for (int i = 0; i < 4; i++) part[i] = _mm256_cmpeq_epi32(load256(p + 32 * i), load256(q + 32 * i));
            __m256i low = _mm256_packs_epi32(part[0], part[1]), high = _mm256_packs_epi32(part[2], part[3]);
            same[k] = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        }
    }
    return ~bits_of(same[0], same[1]);
}

/* Counts of up to 255 blocks' elements with one exponent, by place. */
typedef exponents tally;

INLINE tally no_tally(void) { return (tally){{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }

INLINE tally add_equal(tally t, exponents e, uint32_t value) {
    __m256i all = _mm256_set1_epi8((char)value);
    for (int k = 0; k < 2; k++) t.half[k] = _mm256_sub_epi8(t.half[k], _mm256_cmpeq_epi8(e.half[k], all));
    return t;
}

INLINE uint32_t sum(tally t) {
    __m256i zero = _mm256_setzero_si256();
    __m256i s = _mm256_add_epi64(_mm256_sad_epu8(t.half[0], zero), _mm256_sad_epu8(t.half[1], zero));
    return (uint32_t)(_mm256_extract_epi64(s, 0) + _mm256_extract_epi64(s, 1) + _mm256_extract_epi64(s, 2) +
                      _mm256_extract_epi64(s, 3));
}

#else

typedef struct {
    uint8_t byte[64];
} exponents;

INLINE exponents load_exponents(const uint8_t *p, format f) {
    exponents e;
    for (int i = 0; i < 64; i++) e.byte[i] = (uint8_t)(element(p + i * f.width, f.width) >> f.shift & f.mask);
    return e;
}

INLINE uint64_t equal(exponents e, uint32_t value) {
    const uint64_t ones = 0x0101010101010101u;
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++) {
        uint64_t word;
        memcpy(&word, e.byte + 8 * i, 8);
        word ^= ones * value;
        uint64_t zero = ~(((word & (0x7F * ones)) + 0x7F * ones) | word | 0x7F * ones);
        bits |= ((zero >> 7) * 0x0102040810204080u >> 56) << (8 * i);
    }
    return bits;
}

/* low <= exponent <= high */
INLINE uint64_t within(exponents e, uint32_t low, uint32_t high) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; i++) bits |= (uint64_t)(low <= e.byte[i] && e.byte[i] <= high) << i;
    return bits;
}

INLINE uint64_t differ(const uint8_t *a, const uint8_t *b, int width) {
    uint64_t bits = 0;
    if (!memcmp(a, b, 64 * (size_t)width)) return 0;
    for (int i = 0; i < 64; i++) bits |= (uint64_t)(element(a + i * width, width) != element(b + i * width, width)) << i;
    return bits;
}

typedef uint32_t tally;

INLINE tally no_tally(void) { return 0; }

INLINE tally add_equal(tally t, exponents e, uint32_t value) {
    return t + (uint32_t)__builtin_popcountll(equal(e, value));
}

INLINE uint32_t sum(tally t) { return t; }

#endif

/* Where the bit number k of those that are set is; there are more than k. */
INLINE int place(uint64_t bits, uint32_t k) {
#if defined(__BMI2__)
    return (int)_tzcnt_u64(_pdep_u64(1ull << k, bits));
#else
    for (; k; k--) bits &= bits - 1;
    return __builtin_ctzll(bits);
#endif
}

#endif
