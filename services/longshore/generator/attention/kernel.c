/* Attention of single tokens over a paged cache, in float32; see paged.py.

   A page holds PAGE tokens of one layer: for each key head first the keys as [dim][PAGE], so that the scores of a page's
   tokens are one vector, then the values as [PAGE][dim]. A row is one token of one sequence; a sequence's pages stand in
   its line of `tables`. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PAGE 16
#define MOST_DIM 256
/* Query heads that are worked on together. */
#define HEADS 4

/* Floats in a register. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vector __attribute__((vector_size(LANES * sizeof(float))));

#ifndef LONGSHORE_SOURCE
#define LONGSHORE_SOURCE 0
#endif

/* Of which source this was built: arguments may differ. */
uint32_t ls_source(void) { return LONGSHORE_SOURCE; }

/* Which library runs here: 2 with AVX-512, 1 with AVX2, else 0. */
int ls_level(void) {
#if defined(__x86_64__)
    int one = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int two = one && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    return two ? 2 : one;
#else
    return 0;
#endif
}

typedef struct {
    float *qkv;             /* [rows][heads + 2 * kv_heads][dim] */
    float *out;             /* [rows][heads][dim] */
    float *cache;           /* [pages][kv_heads][2][PAGE * dim] */
    const int64_t *tables;  /* [sequences][width] pages */
    const int64_t *sequence;/* [rows] */
    const int64_t *position;/* [rows] */
    const float *cosine;    /* [context][dim / 2] */
    const float *sine;
    int64_t width, heads, kv_heads, dim;
    float scale;
} batch;

/* exp of x <= 0, to 2 units in the last place; a polynomial, so that a loop of it is vectors. */
static inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x > 0.0f ? 0.0f : x;
    float z = x * 1.44269504088896341f + 12582912.0f;
    float n = z - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static inline vector load(const float *from) {
    vector made;
    memcpy(&made, from, sizeof made);
    return made;
}

static void rotate(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float low = x[i], high = x[half + i];
        x[i] = low * cosine[i] - high * sine[i];
        x[half + i] = high * cosine[i] + low * sine[i];
    }
}

/* Rotates the queries where they are, and writes the rotated keys and the values of rows first..last-1 to the cache. */
void ls_store(const batch *b, int64_t first, int64_t last) {
    int64_t dim = b->dim, half = dim / 2, line = (b->heads + 2 * b->kv_heads) * dim;
    for (int64_t row = first; row < last; row++) {
        int64_t at = b->position[row], place = at % PAGE;
        const float *cosine = b->cosine + at * half, *sine = b->sine + at * half;
        float *q = b->qkv + row * line, *k = q + b->heads * dim, *v = k + b->kv_heads * dim;
        int64_t page = b->tables[b->sequence[row] * b->width + at / PAGE];
        for (int64_t head = 0; head < b->heads; head++) rotate(q + head * dim, cosine, sine, half);
        for (int64_t head = 0; head < b->kv_heads; head++, k += dim, v += dim) {
            float *keys = b->cache + ((page * b->kv_heads + head) * 2) * PAGE * dim;
            rotate(k, cosine, sine, half);
            for (int64_t i = 0; i < dim; i++) keys[i * PAGE + place] = k[i];
            memcpy(keys + PAGE * dim + place * dim, v, dim * sizeof(float));
        }
    }
}

#define INLINE static inline __attribute__((always_inline))

/* scores[h][t] of the page's tokens for `count` heads; dims go by two, so that no sum waits for the one before it. */
INLINE void score(const float *q, const float *keys, int64_t dim, float scale, const int count, float scores[][PAGE]) {
    for (int t = 0; t < PAGE; t += LANES) {
        vector even[HEADS], odd[HEADS];
        for (int h = 0; h < count; h++) even[h] = odd[h] = (vector){0};
        for (int64_t i = 0; i < dim; i += 2)
            for (int h = 0; h < count; h++) {
                even[h] += q[h * dim + i] * load(keys + i * PAGE + t);
                odd[h] += q[h * dim + i + 1] * load(keys + (i + 1) * PAGE + t);
            }
        for (int h = 0; h < count; h++) {
            vector both = (even[h] + odd[h]) * scale;
            memcpy(scores[h] + t, &both, sizeof both);
        }
    }
}

/* Adds the page's first `here` values to `sums`, each weighed by its share; `width` vectors of dims from `i` on. */
INLINE void mix(float sums[][MOST_DIM], const float shares[][PAGE], const float *values, int64_t here, int64_t dim,
                int64_t i, const int width, const int count) {
    vector sum[HEADS][2];
    for (int h = 0; h < count; h++)
        for (int w = 0; w < width; w++) sum[h][w] = load(sums[h] + i + w * LANES);
    for (int64_t t = 0; t < here; t++)
        for (int w = 0; w < width; w++) {
            vector value = load(values + t * dim + i + w * LANES);
            for (int h = 0; h < count; h++) sum[h][w] += shares[h][t] * value;
        }
    for (int h = 0; h < count; h++)
        for (int w = 0; w < width; w++) memcpy(sums[h] + i + w * LANES, &sum[h][w], sizeof(vector));
}

/* `count` query heads that share a key head, over the first `length` tokens of their sequence; the softmax is kept up
   page by page. */
INLINE void attend(const batch *b, const float *q, const int64_t *table, int64_t head, int64_t length, const int count,
                   float *out) {
    int64_t dim = b->dim;
    float sums[HEADS][MOST_DIM], shares[HEADS][PAGE], highest[HEADS], total[HEADS];
    for (int h = 0; h < count; h++) {
        highest[h] = -INFINITY;
        total[h] = 0.0f;
        memset(sums[h], 0, dim * sizeof(float));
    }
    for (int64_t first = 0; first < length; first += PAGE) {
        const float *keys = b->cache + ((table[first / PAGE] * b->kv_heads + head) * 2) * PAGE * dim;
        int64_t here = length - first < PAGE ? length - first : PAGE, i = 0;
        score(q, keys, dim, b->scale, count, shares);
        for (int h = 0; h < count; h++) {
            float top = highest[h];
            for (int t = 0; t < here; t++) top = shares[h][t] > top ? shares[h][t] : top;
            if (top > highest[h]) {
                float shrink = exp_of(highest[h] - top);
                total[h] *= shrink;
                for (int64_t d = 0; d < dim; d++) sums[h][d] *= shrink;
                highest[h] = top;
            }
            for (int t = 0; t < PAGE; t++) shares[h][t] = exp_of(shares[h][t] - top);
            for (int t = 0; t < here; t++) total[h] += shares[h][t];
        }
        for (; i + 2 * LANES <= dim; i += 2 * LANES) mix(sums, shares, keys + PAGE * dim, here, dim, i, 2, count);
        for (; i < dim; i += LANES) mix(sums, shares, keys + PAGE * dim, here, dim, i, 1, count);
    }
    for (int h = 0; h < count; h++)
        for (int64_t d = 0; d < dim; d++) out[h * dim + d] = sums[h][d] / total[h];
}

/* What each of the rows first..last-1 gets from its own and all earlier positions; after ls_store of all of them. */
void ls_attend(const batch *b, int64_t first, int64_t last) {
    int64_t group = b->heads / b->kv_heads, line = (b->heads + 2 * b->kv_heads) * b->dim;
    for (int64_t row = first; row < last; row++) {
        const int64_t *table = b->tables + b->sequence[row] * b->width;
        for (int64_t head = 0; head < b->heads;) {
            int64_t left = group - head % group, at = row * line + head * b->dim, to = (row * b->heads + head) * b->dim;
            int64_t length = b->position[row] + 1, shared = head / group;
            switch (left) {
                case 1: attend(b, b->qkv + at, table, shared, length, 1, b->out + to); break;
                case 2: attend(b, b->qkv + at, table, shared, length, 2, b->out + to); break;
                case 3: attend(b, b->qkv + at, table, shared, length, 3, b->out + to); break;
                default: attend(b, b->qkv + at, table, shared, length, HEADS, b->out + to);
            }
            head += left < HEADS ? left : HEADS;
        }
    }
}
