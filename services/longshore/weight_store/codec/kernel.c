/* The sparse delta's inner loops. kernel_numpy.py does the same, byte for byte; codes.py tells what the streams mean.

   Everything that a payload says is checked here or before it comes here: streams are read within their bounds, and
   every loop ends with the elements of the segments, which the caller made from the tensors themselves. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "simd.h"
#include "streams.h"

#define EXPONENTS 256
#define BLOCK 64

/* A run of elements of one piece. */
typedef struct {
    const uint8_t *a;
    uint8_t *b; /* scan: the new tensor; decode: the tensor to fill */
    int64_t n;
    const uint64_t *changed; /* scan: a bit an element of the tensor */
    int64_t first;           /* scan: of the tensor's elements */
    int32_t piece;           /* scan: the piece's row of the tables */
    int32_t class;           /* decode: the piece's; negative where nothing changed */
} segment;

typedef struct {
    uint32_t gap;      /* elements of the context before this one, since its last change or the piece's start */
    int32_t step;      /* |new| - |old|, as integers */
    uint32_t exponent; /* of the old value; FLIP is set where the sign changed */
} event;

/* Of one piece, by exponent. */
typedef struct {
    uint64_t changed[EXPONENTS], excess[EXPONENTS];
    uint32_t elements[EXPONENTS]; /* only of the exponents that scan was told */
    uint32_t tail[EXPONENTS];     /* of them, those after the last change */
} table;

/* The instruction set that this machine runs: 4, 3 or 0. */
int ls_level(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
        return 4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt")) return 3;
#endif
    return 0;
}

INLINE uint64_t first_bits(int64_t n) { return n >= 64 ? UINT64_MAX : (1ull << n) - 1; }

/* ---- compare ---- */

/* Sets a bit for every element that differs, and counts them by the exponent in `a`. Returns how many differ. */
INLINE int64_t compare(const uint8_t *a, const uint8_t *b, int64_t n, format f, uint64_t *changed, uint64_t *counts) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        uint64_t bits = 0;
        if (n - i >= BLOCK) {
            bits = differ(a + i * f.width, b + i * f.width, f.width);
        } else {
            for (int64_t k = i; k < n; k++)
                bits |= (uint64_t)(element(a + k * f.width, f.width) != element(b + k * f.width, f.width)) << (k - i);
        }
        changed[i / BLOCK] = bits;
        found += __builtin_popcountll(bits);
        for (; bits; bits &= bits - 1)
            counts[element(a + (i + __builtin_ctzll(bits)) * f.width, f.width) >> f.shift & f.mask]++;
    }
    return found;
}

int64_t ls_compare(const uint8_t *a, const uint8_t *b, int64_t n, int shift, uint32_t mask, int width,
                   uint64_t *changed, uint64_t *counts) {
    if (width == 4) return compare(a, b, n, (format){4, shift, mask}, changed, counts);
    return compare(a, b, n, (format){2, shift, mask}, changed, counts);
}

/* ---- scan: what changed, where, by how much ---- */

typedef struct {
    uint8_t common[EXPONENTS]; /* exponents to count in every block */
    int commons;
    uint32_t limit; /* exponents from 1 to below it are rare: counted one by one */
    event *events;
} scanner;

static void record(scanner *s, table *t, const uint32_t *seen, uint32_t rank, uint32_t old, uint32_t new, uint32_t e,
                   uint32_t top) {
    uint32_t flip = ((old ^ new) & top) != 0;
    int32_t step = (int32_t)(new & (top - 1)) - (int32_t)(old & (top - 1));
    *s->events++ = (event){seen[e] + rank - t->tail[e], step, e | (flip ? FLIP : 0)};
    t->changed[e]++;
    t->excess[e] += (uint64_t)(step < 0 ? -(int64_t)step : step) + 2 * flip - 1;
    /* For now: the number of the next element. */
    t->tail[e] = seen[e] + rank + 1;
}

INLINE void scan_segment(scanner *s, const segment *g, table *t, format f) {
    uint32_t *seen = t->elements;
    for (int64_t i = 0; i < g->n; i += BLOCK) {
        const uint8_t *a = g->a + i * f.width;
        uint8_t whole[BLOCK * 4];
        uint64_t valid = first_bits(g->n - i);
        if (valid != UINT64_MAX) {
            memset(whole, 0, sizeof(whole));
            memcpy(whole, a, (size_t)((g->n - i) * f.width));
            a = whole;
        }
        exponents e = load_exponents(a, f);
        int64_t at = g->first + i;
        uint64_t bits = g->changed[at / 64] >> (at % 64);
        if (at % 64) bits |= g->changed[at / 64 + 1] << (64 - at % 64);
        for (bits &= valid; bits; bits &= bits - 1) {
            int k = __builtin_ctzll(bits);
            uint32_t old = element(a + k * f.width, f.width), new = element(g->b + (i + k) * f.width, f.width);
            uint32_t own = old >> f.shift & f.mask;
            uint32_t rank = (uint32_t)__builtin_popcountll(equal(e, own) & first_bits(k));
            record(s, t, seen, rank, old, new, own, 1u << (8 * f.width - 1));
        }
        for (int k = 0; k < s->commons; k++)
            seen[s->common[k]] += (uint32_t)__builtin_popcountll(equal(e, s->common[k]) & valid);
        for (uint64_t rare = between(e, s->limit) & valid; rare; rare &= rare - 1)
            seen[element(a + __builtin_ctzll(rare) * f.width, f.width) >> f.shift & f.mask]++;
    }
}

/* `used`: whether an exponent's elements are to be counted; those below `limit` always are. Room for an event a change
   is at `events`. Returns how many there were. */
int64_t ls_scan(const segment *segments, int64_t count, table *tables, int64_t pieces, event *events,
                const uint8_t *used, uint32_t limit, int shift, uint32_t mask, int width) {
    scanner s = {.events = events, .limit = limit};
    for (int i = 0; i < EXPONENTS; i++)
        if (used[i] && (i == 0 || (uint32_t)i >= limit)) s.common[s.commons++] = (uint8_t)i;
    for (int64_t i = 0; i < count; i++) {
        table *t = tables + segments[i].piece;
        if (width == 4)
            scan_segment(&s, &segments[i], t, (format){4, shift, mask});
        else
            scan_segment(&s, &segments[i], t, (format){2, shift, mask});
    }
    for (table *t = tables; t < tables + pieces; t++)
        for (int i = 0; i < EXPONENTS; i++) t->tail[i] = t->elements[i] - t->tail[i];
    return s.events - events;
}

/* ---- emit: a section's streams ---- */

typedef struct {
    const table *tables;
    const int32_t *classes;
    int64_t pieces;
    event *events; /* their gaps are overwritten */
    int64_t count;
    const code *codes; /* [contexts] = [classes][EXPONENTS] */
    int64_t contexts;
    uint8_t *bits, *ranges;
    int64_t bits_size, ranges_size; /* room; then what was written */
} emission;

/* From gaps within pieces to the gap that follows each event in the section; `rest` becomes the first gaps. */
static void link_gaps(const emission *e, uint32_t *rest) {
    event *one = e->events + e->count;
    for (int64_t piece = e->pieces - 1; piece >= 0; piece--) {
        const table *t = &e->tables[piece];
        if (e->classes[piece] < 0) continue;
        uint32_t *own = rest + e->classes[piece] * EXPONENTS;
        uint64_t changed = 0;
        for (int i = 0; i < EXPONENTS; i++) own[i] += t->tail[i], changed += t->changed[i];
        for (; changed; changed--) {
            one--;
            uint32_t *context = &own[one->exponent % EXPONENTS], before = one->gap;
            one->gap = *context;
            *context = before;
        }
    }
}

/* Returns 0 when the streams do not fit. */
int ls_emit(emission *e) {
    uint32_t *rest = calloc((size_t)e->contexts + 1, sizeof(uint32_t));
    writer *w = calloc(1, sizeof(writer));
    int done = 0;
    if (!rest || !w) goto end;
    w->bits = (bit_writer){e->bits, e->bits + e->bits_size, 0, 0, 0};
    w->ranges = (range_encoder){e->ranges, e->ranges + e->ranges_size, 0, UINT32_MAX, 0, 1, 0, 0};
    reset(&w->bins);
    link_gaps(e, rest);
    for (int64_t i = 0; i < e->contexts; i++)
        if (e->codes[i].gap) write_gap(w, e->codes[i].gap, rest[i]);
    const event *one = e->events;
    for (int64_t piece = 0; piece < e->pieces; piece++) {
        if (e->classes[piece] < 0) continue;
        const code *codes = e->codes + e->classes[piece] * EXPONENTS;
        uint64_t changed = 0;
        for (int i = 0; i < EXPONENTS; i++) changed += e->tables[piece].changed[i];
        for (; changed && !w->bits.full && !w->ranges.full; changed--, one++) {
            code c = codes[one->exponent % EXPONENTS];
            write_step(w, c.step, one->step, one->exponent >= FLIP);
            write_gap(w, c.gap, one->gap);
        }
    }
    if (w->bits.count) put(&w->bits, 0, 8 - w->bits.count);
    for (int i = 0; i < 5 && w->ranges.used; i++) shift_low(&w->ranges);
    done = !w->bits.full && !w->ranges.full;
    e->bits_size = w->bits.p - e->bits;
    e->ranges_size = w->ranges.p - e->ranges;
end:
    free(rest);
    free(w);
    return done;
}

/* ---- decode ---- */

/* One class's contexts. Of the rare ones, elements are counted one by one; of the common ones, in every block. */
typedef struct {
    uint8_t common[EXPONENTS];
    int commons;
    uint32_t limit;              /* exponents from 1 to below it are rare */
    int32_t until[EXPONENTS];    /* of a common one, by its place in `common`: elements before its next change */
    int32_t rare[EXPONENTS];     /* of a rare one, by exponent */
    code codes[EXPONENTS];
} contexts;

enum { RARE_DIVISOR = 12 };

/* Reads the class's first gaps. Small values change often, and are rare: where the ones end and the others begin shows
   in the codes. */
static void start(contexts *c, const code *codes, reader *r) {
    memcpy(c->codes, codes, sizeof(c->codes));
    c->limit = 1;
    for (int i = 1, often = 0, most = 0; i < EXPONENTS - 1; i++) {
        if (!codes[i].gap) continue;
        often += codes[i].gap >= ADAPTIVE || divisor(codes[i].gap).m <= RARE_DIVISOR ? 1 : -1;
        if (often > most) most = often, c->limit = (uint32_t)i + 1;
    }
    for (int i = 0; i < EXPONENTS; i++) {
        c->rare[i] = INT32_MAX;
        if (!codes[i].gap) continue;
        int32_t gap = (int32_t)read_gap(r, codes[i].gap);
        if (i && (uint32_t)i < c->limit) {
            c->rare[i] = gap;
        } else {
            c->until[c->commons] = gap;
            c->common[c->commons++] = (uint8_t)i;
        }
    }
}

/* The common contexts that change in a block. */
typedef struct {
    uint64_t left[EXPONENTS]; /* the context's elements that are not behind yet */
    uint8_t slot[EXPONENTS], at[EXPONENTS];
    int count;
} due_list;

INLINE int next_of(const due_list *due) {
    int best = 0;
    for (int k = 1; k < due->count; k++)
        if (due->at[k] < due->at[best]) best = k;
    return best;
}

INLINE void change(const uint8_t *a, uint8_t *b, int k, uint8_t step_code, reader *r, format f) {
    uint32_t new = read_step(r, step_code, element(a + k * f.width, f.width), 1u << (8 * f.width - 1));
    memcpy(b + k * f.width, &new, (size_t)f.width);
}

/* Changes the due context's element, and finds its next one. */
INLINE void change_due(contexts *c, due_list *due, int which, const uint8_t *a, uint8_t *b, reader *r, format f) {
    int slot = due->slot[which], k = due->at[which];
    code own = c->codes[c->common[slot]];
    change(a, b, k, own.step, r, f);
    int32_t gap = (int32_t)read_gap(r, own.gap);
    uint64_t left = due->left[which] & ~first_bits(k + 1);
    int32_t n = __builtin_popcountll(left);
    if (gap < n) {
        due->left[which] = left;
        due->at[which] = (uint8_t)place(left, (uint32_t)gap);
        return;
    }
    c->until[slot] = gap - n;
    due->count--;
    due->left[which] = due->left[due->count];
    due->slot[which] = due->slot[due->count];
    due->at[which] = due->at[due->count];
}

/* `b` holds what `a` does already; both have 64 elements, of which the valid ones count. */
INLINE void decode_block(contexts *c, const uint8_t *a, uint8_t *b, uint64_t valid, reader *r, format f) {
    exponents e = load_exponents(a, f);
    due_list due;
    due.count = 0;
    for (int slot = 0; slot < c->commons; slot++) {
        uint64_t own = equal(e, c->common[slot]) & valid;
        int32_t until = c->until[slot], n = __builtin_popcountll(own);
        if (__builtin_expect(until < n, 0)) {
            due.left[due.count] = own;
            due.slot[due.count] = (uint8_t)slot;
            due.at[due.count++] = (uint8_t)place(own, (uint32_t)until);
        } else {
            c->until[slot] = until - n;
        }
    }
    for (uint64_t rare = between(e, c->limit) & valid; rare; rare &= rare - 1) {
        int k = __builtin_ctzll(rare);
        uint32_t own = element(a + k * f.width, f.width) >> f.shift & f.mask;
        if (--c->rare[own] >= 0) continue;
        /* Changes are written in the elements' order. */
        for (int which; due.count && due.at[which = next_of(&due)] < k;) change_due(c, &due, which, a, b, r, f);
        change(a, b, k, c->codes[own].step, r, f);
        c->rare[own] = (int32_t)read_gap(r, c->codes[own].gap);
    }
    while (due.count) change_due(c, &due, next_of(&due), a, b, r, f);
}

INLINE void decode_segment(contexts *c, const segment *g, reader *r, format f) {
    int64_t i = 0;
    for (; i + BLOCK <= g->n; i += BLOCK) {
        memcpy(g->b + i * f.width, g->a + i * f.width, (size_t)(BLOCK * f.width));
        decode_block(c, g->a + i * f.width, g->b + i * f.width, UINT64_MAX, r, f);
    }
    if (i == g->n) return;
    uint8_t old[BLOCK * 4] = {0}, new[BLOCK * 4];
    size_t size = (size_t)((g->n - i) * f.width);
    memcpy(old, g->a + i * f.width, size);
    memcpy(new, old, sizeof(new));
    decode_block(c, old, new, first_bits(g->n - i), r, f);
    memcpy(g->b + i * f.width, new, size);
}

/* Fills the segments' `b`. Returns 1 when the stream of bits has the length that was read, 0 when not, -1 without
   memory. Streams: bits, ranges. */
int ls_decode(const segment *segments, int64_t count, const code *codes, int64_t classes,
              const uint8_t *const streams[2], const int64_t sizes[2], int shift, uint32_t mask, int width) {
    contexts *all = calloc((size_t)classes + 1, sizeof(contexts));
    reader *r = calloc(1, sizeof(reader));
    int right = -1;
    if (!all || !r) goto end;
    r->bits = (bit_reader){streams[0], streams[0] + sizes[0], 0, 0, 0};
    r->ranges = (range_decoder){streams[1], streams[1] + sizes[1], 0, 0, 0};
    reset(&r->bins);
    r->budget = 1;
    for (int64_t i = 0; i < count; i++) r->budget += segments[i].n;
    for (int64_t i = 0; i < classes; i++) start(&all[i], codes + i * EXPONENTS, r);
    for (const segment *g = segments; g != segments + count; g++) {
        if (g->class < 0)
            memcpy(g->b, g->a, (size_t)(g->n * width));
        else if (width == 4)
            decode_segment(&all[g->class], g, r, (format){4, shift, mask});
        else
            decode_segment(&all[g->class], g, r, (format){2, shift, mask});
    }
    /* Whole bytes that were read ahead are given back. */
    right = r->bits.p - r->bits.count / 8 + r->bits.beyond == r->bits.end;
end:
    free(all);
    free(r);
    return right;
}
