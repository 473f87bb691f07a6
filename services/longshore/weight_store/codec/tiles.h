/* Some blocks of elements at a time, and which exponents in them to count how. */

#ifndef LONGSHORE_TILES_H
#define LONGSHORE_TILES_H

#include "simd.h"

#define EXPONENTS 256
#define BLOCK 64
#define BLOCKS 16

INLINE uint64_t first_bits(int64_t n) { return n >= 64 ? UINT64_MAX : (1ull << n) - 1; }

/* ---- common and rare exponents ---- */

/* Elements of common exponents are counted in whole blocks, others one by one; that is only for speed. */
typedef struct {
    uint32_t low, high; /* common, and all between are */
    int zeros;          /* exponent 0 is common besides */
} tiers;

enum { SAMPLE = 2048, COMMON = 2 };

/* By a sample of n elements, of which there is at least one. */
INLINE tiers tiers_of(const uint8_t *a, int64_t n, format f) {
    uint16_t counts[EXPONENTS] = {0};
    int64_t stride = n < SAMPLE ? 1 : n / SAMPLE;
    for (int64_t i = 0; i < n; i += stride) counts[element(a + i * f.width, f.width) >> f.shift & f.mask]++;
    tiers t = {1, EXPONENTS - 1, counts[0] >= COMMON};
    while (t.low < EXPONENTS - 1 && counts[t.low] < COMMON) t.low++;
    while (t.high > t.low && counts[t.high] < COMMON) t.high--;
    return t;
}

/* ---- tiles ---- */

/* A tile comes into the cache part by part, so that the processor need not wait for any. */
enum { PARTS = 8, PART = BLOCKS * BLOCK / PARTS };

INLINE void prefetch(const uint8_t *p, int size) {
    for (int i = 0; i < size; i += 64) __builtin_prefetch(p + i);
}

typedef struct {
    exponents block[BLOCKS];
    uint64_t last; /* the last block's elements */
    int blocks;
    int full; /* all elements of all blocks are there */
} tile;

/* n: from 1 to BLOCKS * BLOCK elements. */
INLINE void load_tile(tile *t, const uint8_t *a, int64_t n, format f) {
    int whole = (int)(n / BLOCK), rest = (int)(n % BLOCK);
    for (int j = 0; j < whole; j++) t->block[j] = load_exponents(a + j * BLOCK * f.width, f);
    if (rest) {
        uint8_t some[BLOCK * 4] = {0};
        memcpy(some, a + whole * BLOCK * f.width, (size_t)(rest * f.width));
        t->block[whole] = load_exponents(some, f);
    }
    t->blocks = whole + (rest > 0);
    t->last = rest ? first_bits(rest) : UINT64_MAX;
    t->full = n == BLOCKS * BLOCK;
}

INLINE uint64_t valid(const tile *t, int j) { return j + 1 < t->blocks ? UINT64_MAX : t->last; }

/* How many elements have the exponent. */
INLINE uint32_t count(const tile *t, uint32_t exponent) {
    tally some = no_tally();
    if (t->full) {
#pragma GCC unroll 16
        for (int j = 0; j < BLOCKS; j++) some = add_equal(some, t->block[j], exponent);
        return sum(some);
    }
    for (int j = 0; j < t->blocks - 1; j++) some = add_equal(some, t->block[j], exponent);
    return sum(some) + (uint32_t)__builtin_popcountll(equal(t->block[t->blocks - 1], exponent) & t->last);
}

/* The same; before[j]: how many are in blocks before the j-th. */
INLINE uint32_t count_before(const tile *t, uint32_t exponent, uint16_t before[BLOCKS]) {
    uint32_t n = 0;
    if (t->full) {
#pragma GCC unroll 16
        for (int j = 0; j < BLOCKS; j++) {
            before[j] = (uint16_t)n;
            n += (uint32_t)__builtin_popcountll(equal(t->block[j], exponent));
        }
        return n;
    }
    for (int j = 0; j < t->blocks; j++) {
        before[j] = (uint16_t)n;
        n += (uint32_t)__builtin_popcountll(equal(t->block[j], exponent) & valid(t, j));
    }
    for (int j = t->blocks; j < BLOCKS; j++) before[j] = UINT16_MAX;
    return n;
}

/* The last block that has no more than so many of the counted elements before it. */
INLINE int block_of(const uint16_t before[BLOCKS], int64_t many) {
#if defined(__AVX512VL__) && defined(__AVX512BW__)
    __m256i all = _mm256_set1_epi16((short)many), own = _mm256_loadu_si256((const __m256i *)before);
    return __builtin_popcount(_mm256_cmple_epu16_mask(own, all)) - 1;
#else
    int last = 0;
    for (int half = BLOCKS / 2; half; half /= 2) last += before[last + half] <= many ? half : 0;
    return last;
#endif
}

#endif
