/* An adapter's product, added to a tensor: the same bits on every processor, by every compiler and in kernel_numpy.py.

       sum = 0, then sum + up[i,k] * down[k,j] for k = 0, 1, 2, ..   each operation rounded to float32
       new = old where sum is zero, else old + sum, rounded to float32 and then to the tensor's dtype

   So the order of sums is told, nothing is fused (hatch_build.py says -ffp-contract=off), subnormal numbers are kept
   whatever the thread's mode is, and every NaN is the same one. Columns are computed side by side, each by itself. */

#ifndef LONGSHORE_PRODUCT_H
#define LONGSHORE_PRODUCT_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
typedef unsigned int float_mode;
/* Not flushed to zero, not taken for zero, rounded to nearest. */
static float_mode exact_floats(void) {
    float_mode before = _mm_getcsr();
    _mm_setcsr(before & ~0xE040u);
    return before;
}
static void restore_floats(float_mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
typedef uint64_t float_mode;
static float_mode exact_floats(void) {
    float_mode before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before & ~((1ull << 24) | (3ull << 22) | (1ull << 19))));
    return before;
}
static void restore_floats(float_mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
typedef int float_mode;
static float_mode exact_floats(void) { return 0; }
static void restore_floats(float_mode mode) { (void)mode; }
#endif

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t word_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* ---- dtypes, told apart by their exponents' shifts as in FORMATS ---- */

static float from_float16(uint32_t half) {
    uint32_t bits = (half & 0x7FFF) << 13, exponent = bits & 0x0F800000;
    if (exponent == 0x0F800000) {
        bits += (255 - 31) << 23;
    } else if (exponent) {
        bits += (127 - 15) << 23;
    } else {
        bits = word_of(float_of(bits + (113 << 23)) - float_of(113 << 23));
    }
    return float_of(bits | (half & 0x8000) << 16);
}

static uint32_t to_float16(uint32_t bits) {
    uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return 0x7E00;
    /* What is rounded up from 65520. */
    if (bits >= 0x477FF000) return sign | 0x7C00;
    /* Subnormal: the sum is rounded where float16 ends. */
    if (bits < 0x38800000) return sign | (word_of(float_of(bits) + 0.5f) - word_of(0.5f));
    return sign | (bits - (112 << 23) + 0xFFF + (bits >> 13 & 1)) >> 13;
}

static uint32_t to_bfloat16(uint32_t bits) {
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

/* ---- sums ---- */

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));
enum { ROWS = 2, COLUMNS = 2 * LANES };

/* Two rows, and columns of two registers: what is read of `down` serves both rows. */
static void sums_of_tile(const float *down, const float *up, int64_t columns, int64_t rank, float *out) {
    lanes a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t k = 0; k < rank; k++) {
        lanes left, right;
        memcpy(&left, down + k * columns, sizeof left);
        memcpy(&right, down + k * columns + LANES, sizeof right);
        lanes first = left * up[k], second = right * up[k];
        lanes third = left * up[rank + k], fourth = right * up[rank + k];
        a = a + first;
        b = b + second;
        c = c + third;
        d = d + fourth;
    }
    memcpy(out, &a, sizeof a);
    memcpy(out + LANES, &b, sizeof b);
    memcpy(out + COLUMNS, &c, sizeof c);
    memcpy(out + COLUMNS + LANES, &d, sizeof d);
}

static void sums_of_edge(const float *down, const float *up, int64_t columns, int64_t rank, int64_t rows, int64_t count,
                         float *out) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < count; j++) {
            float sum = 0.0f;
            for (int64_t k = 0; k < rank; k++) {
                float next = up[i * rank + k] * down[k * columns + j];
                sum = sum + next;
            }
            out[i * COLUMNS + j] = sum;
        }
    }
}

static void add_sums(const uint8_t *old, uint8_t *new, const float *sums, int64_t count, int shift) {
    if (shift == 23) {
        for (int64_t j = 0; j < count; j++) {
            uint32_t before;
            memcpy(&before, old + 4 * j, 4);
            uint32_t after = word_of(float_of(before) + sums[j]);
            after = (after & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : after;
            after = sums[j] == 0.0f ? before : after;
            memcpy(new + 4 * j, &after, 4);
        }
        return;
    }
    for (int64_t j = 0; j < count; j++) {
        uint16_t before;
        memcpy(&before, old + 2 * j, 2);
        float wide = shift == 7 ? float_of((uint32_t)before << 16) : from_float16(before);
        uint32_t bits = word_of(wide + sums[j]);
        uint16_t after = (uint16_t)(shift == 7 ? to_bfloat16(bits) : to_float16(bits));
        after = sums[j] == 0.0f ? before : after;
        memcpy(new + 2 * j, &after, 2);
    }
}

/* old, new: [rows, columns] of the dtype with that shift (7, 10, 23) and width; down: [rank, columns];
   up: [rows, rank]. */
static void add_product(const uint8_t *old, uint8_t *new, const float *down, const float *up, int64_t rows,
                        int64_t columns, int64_t rank, int shift, int width) {
    float sums[ROWS * COLUMNS];
    float_mode mode = exact_floats();
    for (int64_t i = 0; i < rows; i += ROWS) {
        int64_t height = rows - i < ROWS ? rows - i : ROWS;
        for (int64_t j = 0; j < columns; j += COLUMNS) {
            int64_t count = columns - j < COLUMNS ? columns - j : COLUMNS;
            if (height == ROWS && count == COLUMNS) {
                sums_of_tile(down + j, up + i * rank, columns, rank, sums);
            } else {
                sums_of_edge(down + j, up + i * rank, columns, rank, height, count, sums);
            }
            for (int64_t row = 0; row < height; row++) {
                int64_t at = ((i + row) * columns + j) * width;
                add_sums(old + at, new + at, sums + row * COLUMNS, count, shift);
            }
        }
    }
    restore_floats(mode);
}

#endif
