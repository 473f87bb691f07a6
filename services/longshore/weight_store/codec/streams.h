/* A section's two streams: bits, and the bytes of an adaptive binary range coder; gaps and steps in them. streams.py has
   the same in Python. Readers give zeros past the end of their stream, and can tell that they did. */

#ifndef LONGSHORE_STREAMS_H
#define LONGSHORE_STREAMS_H

#include <stdint.h>
#include <string.h>

enum { MAX_UNARY = 24, ADAPTIVE = 128, UNIT = 0, FLIP = 256 };

/* How a context's gaps and steps are written; see sparse.py. */
typedef struct {
    uint8_t gap, step;
} code;

/* ---- bits, from the lowest on ---- */

typedef struct {
    const uint8_t *p, *end;
    uint64_t word;
    int count;
    int64_t beyond; /* zero bytes handed out past the end */
} bit_reader;

static inline uint64_t load64(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

/* At least 56 bits are there afterwards. */
static inline void refill(bit_reader *r) {
    if (__builtin_expect(r->end - r->p >= 8, 1)) {
        r->word |= load64(r->p) << r->count;
        int taken = (63 - r->count) >> 3;
        r->p += taken;
        r->count += taken * 8;
        return;
    }
    while (r->count <= 56) {
        if (r->p < r->end)
            r->word |= (uint64_t)*r->p++ << r->count;
        else
            r->beyond++;
        r->count += 8;
    }
}

static inline uint64_t take(bit_reader *r, int n) {
    uint64_t value = r->word & ((1ull << n) - 1);
    r->word >>= n;
    r->count -= n;
    return value;
}

/* `end` is eight bytes before the buffer's: words are stored whole. */
typedef struct {
    uint8_t *p, *end;
    uint64_t word;
    int count, full;
} bit_writer;

/* n <= 56; `value` has no bits above them. */
static inline void put(bit_writer *w, uint64_t value, int n) {
    w->word |= value << w->count;
    w->count += n;
    if (w->p > w->end) {
        w->p = w->end;
        w->full = 1;
    }
    memcpy(w->p, &w->word, 8);
    w->p += w->count >> 3;
    w->word >>= w->count & ~7;
    w->count &= 7;
}

/* ---- adaptive binary range coder, as in LZMA, with a rate that falls as 1/n ---- */

typedef struct {
    uint16_t p, n; /* P(bit is 0) * 65536; bits seen, up to SLOWEST */
} bin;

enum { SLOWEST = 127, TOP = 1 << 24 };

typedef struct {
    bin unit, flip, down[2], longer[4][32], mantissa[4][32][4]; /* by flip, and down */
} step_bins;

typedef struct {
    bin more[64];
    step_bins step[64];
} bins;

static uint16_t rates[SLOWEST + 1]; /* 65536 / (n + 1.5) */

static void reset(bins *b) {
    bin *one = (bin *)b;
    for (size_t i = 0; i < sizeof(bins) / sizeof(bin); i++) one[i] = (bin){32768, 0};
    for (int n = 0; n <= SLOWEST; n++) rates[n] = (uint16_t)(131072 / (2 * n + 3));
}

static inline void learn(bin *b, int bit) {
    int32_t to = bit ? 64 : 65472;
    b->p = (uint16_t)(b->p + (((to - b->p) * (int64_t)rates[b->n]) >> 16));
    b->n += b->n < SLOWEST;
}

typedef struct {
    const uint8_t *p, *end;
    uint32_t range, code;
    int started;
} range_decoder;

static inline uint32_t next_byte(range_decoder *d) { return d->p < d->end ? *d->p++ : 0; }

static inline int decode_bit(range_decoder *d, bin *b) {
    if (!d->started) {
        d->started = 1;
        d->range = UINT32_MAX;
        for (int i = 0; i < 4; i++) d->code = d->code << 8 | next_byte(d);
    }
    uint32_t bound = (d->range >> 16) * b->p;
    int bit = d->code >= bound;
    if (bit) {
        d->code -= bound;
        d->range -= bound;
    } else {
        d->range = bound;
    }
    learn(b, bit);
    while (d->range < TOP) {
        d->range <<= 8;
        d->code = d->code << 8 | next_byte(d);
    }
    return bit;
}

typedef struct {
    uint8_t *p, *end;
    uint64_t low;
    uint32_t range;
    uint8_t cache;
    uint64_t pending; /* bytes not written yet, because a carry may still come */
    int full, used;
} range_encoder;

static void shift_low(range_encoder *e) {
    if (e->low < 0xFF000000u || e->low > UINT32_MAX) {
        uint8_t byte = e->cache, carry = (uint8_t)(e->low >> 32);
        for (; e->pending; e->pending--, byte = 0xFF) {
            if (e->p < e->end)
                *e->p++ = (uint8_t)(byte + carry);
            else
                e->full = 1;
        }
        e->cache = (uint8_t)(e->low >> 24);
    }
    e->pending++;
    e->low = (e->low & 0x00FFFFFF) << 8;
}

static inline void encode_bit(range_encoder *e, bin *b, int bit) {
    uint32_t bound = (e->range >> 16) * b->p;
    e->used = 1;
    if (bit) {
        e->low += bound;
        e->range -= bound;
    } else {
        e->range = bound;
    }
    learn(b, bit);
    while (e->range < TOP) {
        e->range <<= 8;
        shift_low(e);
    }
}


/* ---- gaps and steps ---- */

/* A context's code, taken apart. */
typedef struct {
    uint32_t m;          /* Golomb's divisor; 0: gaps are the range coder's */
    uint32_t short_ones; /* remainders that are one bit shorter than the others */
    int bits;            /* of a short remainder */
    uint8_t gap, step;
} plan;

static inline plan plan_of(code c) {
    if (c.gap >= ADAPTIVE) return (plan){0, 0, 0, c.gap, c.step};
    uint32_t q = c.gap - 1u, m = (uint32_t)(((uint64_t)(4 + (q & 3)) << (q >> 2)) >> 2);
    int bits = m < 2 ? 1 : 32 - __builtin_clz(m - 1);
    return (plan){m, (uint32_t)((1ull << bits) - m), bits - 1, c.gap, c.step};
}

typedef struct {
    bit_reader bits;
    range_decoder ranges;
    bins bins;
    int64_t budget; /* adaptive gaps add up to the section's elements at most, which bounds the time that they take */
} reader;

/* Elements of the context before its next change. At least 55 bits must be there. */
static inline uint32_t read_golomb(bit_reader *r, const plan *c) {
    uint64_t zeros = ~r->word;
    int q = zeros ? __builtin_ctzll(zeros) : 64;
    if (__builtin_expect(q >= MAX_UNARY, 0)) {
        take(r, MAX_UNARY);
        return (uint32_t)take(r, 31);
    }
    uint64_t word = r->word >> (q + 1);
    uint32_t rest = (uint32_t)(word & ((1ull << c->bits) - 1));
    int is_long = rest >= c->short_ones;
    rest = is_long ? 2 * rest + (uint32_t)(word >> c->bits & 1) - c->short_ones : rest;
    take(r, q + 1 + c->bits + is_long);
    return (uint32_t)q * c->m + rest;
}

static uint32_t read_adaptive(reader *r, uint8_t gap_code) {
    uint32_t gap = 0;
    bin *more = &r->bins.more[gap_code & 63];
    while (r->budget > 0 && decode_bit(&r->ranges, more)) gap++, r->budget--;
    return gap;
}

/* By what the value changes: its magnitude in the bits below `top`, its sign in that one. */
static uint32_t read_step(reader *r, uint8_t step_code, uint32_t top) {
    step_bins *b = &r->bins.step[step_code & 63];
    if (step_code == UNIT || decode_bit(&r->ranges, &b->unit)) return take(&r->bits, 1) ? top - 1 : 1;
    int flip = decode_bit(&r->ranges, &b->flip), down = decode_bit(&r->ranges, &b->down[flip]);
    int kind = flip * 2 + down, length = 0, shown = 0, node = 1;
    while (length < 31 && decode_bit(&r->ranges, &b->longer[kind][length])) length++;
    for (; shown < 2 && shown < length; shown++)
        node = node << 1 | decode_bit(&r->ranges, &b->mantissa[kind][length][node]);
    refill(&r->bits);
    uint32_t size = (uint32_t)node << (length - shown) | (uint32_t)take(&r->bits, length - shown);
    size -= (uint32_t)flip;
    return ((down ? 0 - size : size) & (top - 1)) | (flip ? top : 0);
}

typedef struct {
    bit_writer bits;
    range_encoder ranges;
    bins bins;
} writer;

static inline void write_gap(writer *w, const plan *c, uint32_t gap) {
    if (__builtin_expect(!c->m, 0)) {
        bin *more = &w->bins.more[c->gap & 63];
        for (uint32_t i = 0; i < gap; i++) encode_bit(&w->ranges, more, 1);
        encode_bit(&w->ranges, more, 0);
        return;
    }
    uint32_t q = gap / c->m, rest = gap % c->m;
    if (__builtin_expect(q >= MAX_UNARY, 0)) {
        put(&w->bits, ((1ull << MAX_UNARY) - 1) | (uint64_t)gap << MAX_UNARY, MAX_UNARY + 31);
        return;
    }
    int is_long = rest >= c->short_ones;
    rest += is_long ? c->short_ones : 0;
    uint64_t coded = is_long ? rest >> 1 | (uint64_t)(rest & 1) << c->bits : rest;
    put(&w->bits, ((1ull << q) - 1) | coded << (q + 1), (int)q + 1 + c->bits + is_long);
}

static void write_step(writer *w, uint8_t step_code, int32_t step, int flip) {
    int down = step < 0;
    int unit = !flip && (step == 1 || step == -1);
    step_bins *b = &w->bins.step[step_code & 63];
    if (step_code != UNIT) encode_bit(&w->ranges, &b->unit, unit);
    if (unit) {
        put(&w->bits, (uint64_t)down, 1);
        return;
    }
    encode_bit(&w->ranges, &b->flip, flip);
    encode_bit(&w->ranges, &b->down[flip], down);
    uint32_t size = (down ? 0 - (uint32_t)step : (uint32_t)step) + (uint32_t)flip;
    int kind = flip * 2 + down, length = 31 - __builtin_clz(size), node = 1, shown = 0;
    for (int i = 0; i < length; i++) encode_bit(&w->ranges, &b->longer[kind][i], 1);
    if (length < 31) encode_bit(&w->ranges, &b->longer[kind][length], 0);
    for (; shown < 2 && shown < length; shown++) {
        int bit = size >> (length - 1 - shown) & 1;
        encode_bit(&w->ranges, &b->mantissa[kind][length][node], bit);
        node = node << 1 | bit;
    }
    put(&w->bits, size & ((1ull << (length - shown)) - 1), length - shown);
}

#endif
