/* The sparse delta's inner loops. kernel_numpy.py does the same, byte for byte; codes.py tells what the streams mean.

   What a payload says is checked in sparse.py before it comes here, its streams are read within their bounds, and every
   loop ends with the elements of the segments, which the caller made from the tensors themselves. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "streams.h"
#include "tiles.h"

/* A run of elements of one piece. */
typedef struct {
    const uint8_t *a;
    uint8_t *b; /* fill: the tensor to fill */
    int64_t n;
    const uint64_t *changed; /* scan: a bit an element of the tensor */
    int64_t first;           /* scan: of the tensor's elements */
    int32_t piece;           /* scan: the piece's row of the tables */
    int32_t class;           /* fill: the piece's; negative where nothing changed */
} segment;

typedef struct {
    uint32_t gap;      /* elements of the exponent before this one, since its last change or the piece's start */
    int32_t step;      /* |new| - |old|, as integers */
    uint32_t exponent; /* of the old value; FLIP is set where the sign changed */
} event;

/* Of one piece, by exponent. */
typedef struct {
    uint64_t changed[EXPONENTS], excess[EXPONENTS];
    uint32_t elements[EXPONENTS], tail[EXPONENTS]; /* all, and those after the last change */
} table;

/* Which library runs here: 2 with AVX-512, 1 with AVX2, else 0. */
int ls_level(void) {
#if defined(__x86_64__)
    int one = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
              __builtin_cpu_supports("popcnt");
    int two = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return one + (one && two);
#else
    return 0;
#endif
}

/* ---- compare ---- */

/* Sets a bit for every element that differs, lists those of `b`, and counts them by the exponent in `a`. Returns how
   many there are. */
INLINE int64_t compare(const uint8_t *a, const uint8_t *b, int64_t n, format f, uint64_t *changed, uint8_t *values,
                       uint64_t *counts) {
    const uint8_t *start = values;
    for (int64_t i = 0; i < n; i += BLOCK) {
        uint64_t bits = 0;
        if (n - i >= BLOCK) {
            bits = differ(a + i * f.width, b + i * f.width, f.width);
        } else {
            for (int64_t k = i; k < n; k++)
                bits |= (uint64_t)(element(a + k * f.width, f.width) != element(b + k * f.width, f.width)) << (k - i);
        }
        changed[i / BLOCK] = bits;
        for (; bits; bits &= bits - 1, values += f.width) {
            int64_t k = (i + __builtin_ctzll(bits)) * f.width;
            counts[element(a + k, f.width) >> f.shift & f.mask]++;
            memcpy(values, b + k, (size_t)f.width);
        }
    }
    return (values - start) / f.width;
}

int64_t ls_compare(const uint8_t *a, const uint8_t *b, int64_t n, int shift, uint32_t mask, int width,
                   uint64_t *changed, uint8_t *values, uint64_t *counts) {
    if (width == 4) return compare(a, b, n, (format){4, shift, mask}, changed, values, counts);
    return compare(a, b, n, (format){2, shift, mask}, changed, values, counts);
}

/* ---- scan: what changed, where, by how much ---- */

typedef struct {
    uint8_t common[EXPONENTS]; /* exponents that are counted in every tile */
    int commons;
    tiers tiers;
    event *events;
    const uint8_t *values;
    uint16_t before[EXPONENTS][BLOCKS]; /* of the tile, by row */
    uint16_t row[EXPONENTS];            /* 1 + row of an exponent; 0: it has none in this tile */
} scanner;

/* `seen`: elements of the exponent before this one in the piece. */
INLINE void record(event *to, table *t, uint32_t seen, uint32_t old, uint32_t new, uint32_t exponent, uint32_t top) {
    uint32_t flip = ((old ^ new) & top) != 0;
    int32_t step = (int32_t)(new & (top - 1)) - (int32_t)(old & (top - 1));
    *to = (event){seen - t->tail[exponent], step, exponent | (flip ? FLIP : 0)};
    t->changed[exponent]++;
    t->excess[exponent] += (uint64_t)(step < 0 ? -(int64_t)step : step) + 2 * flip - 1;
    /* Until the piece ends: those before the next one. */
    t->tail[exponent] = seen + 1;
}

/* `at`: the first element's number in the tensor. */
INLINE void scan_tile(scanner *s, table *t, const uint8_t *a, int64_t n, const uint64_t *changed, int64_t at,
                      format f) {
    tile own;
    uint32_t counts[EXPONENTS];
    load_tile(&own, a, n, f);
    memset(s->row, 0, sizeof(s->row));
    int rows = 0;
    for (; rows < s->commons; rows++) {
        counts[rows] = count_tile(&own, s->common[rows], s->before[rows]);
        s->row[s->common[rows]] = (uint16_t)(rows + 1);
    }
    for (int j = 0; j < own.blocks; j++, at += BLOCK) {
        uint64_t bits = changed[at / 64] >> (at % 64);
        if (at % 64) bits |= changed[at / 64 + 1] << (64 - at % 64);
        for (bits &= valid(&own, j); bits; bits &= bits - 1) {
            int k = __builtin_ctzll(bits);
            uint32_t old = element(a + (j * BLOCK + k) * f.width, f.width), new = element(s->values, f.width);
            uint32_t e = old >> f.shift & f.mask;
            s->values += f.width;
            if (__builtin_expect(!s->row[e], 0)) {
                count_tile(&own, e, s->before[rows]);
                s->row[e] = (uint16_t)++rows;
            }
            uint32_t seen = t->elements[e] + s->before[s->row[e] - 1][j] +
                            (uint32_t)__builtin_popcountll(equal(own.block[j], e) & first_bits(k));
            record(s->events++, t, seen, old, new, e, 1u << (8 * f.width - 1));
        }
    }
    for (int k = 0; k < s->commons; k++) t->elements[s->common[k]] += counts[k];
    for (int j = 0; j < own.blocks; j++) {
        uint64_t rare = ~within(own.block[j], s->tiers.low, s->tiers.high) & valid(&own, j);
        if (s->tiers.zeros) rare &= ~equal(own.block[j], 0);
        for (; rare; rare &= rare - 1)
            t->elements[element(a + (j * BLOCK + __builtin_ctzll(rare)) * f.width, f.width) >> f.shift & f.mask]++;
    }
}

INLINE int64_t scan(const segment *segments, int64_t count, const uint8_t *values, table *tables, event *events,
                    format f) {
    if (!count) return 0;
    scanner s = {.tiers = tiers_of(segments->a, segments->n, f), .events = events, .values = values};
    for (uint32_t i = s.tiers.low; i <= s.tiers.high; i++) s.common[s.commons++] = (uint8_t)i;
    if (s.tiers.zeros) s.common[s.commons++] = 0;
    for (const segment *g = segments; g != segments + count; g++) {
        table *t = tables + g->piece;
        for (int64_t i = 0; i < g->n; i += BLOCKS * BLOCK) {
            int64_t n = g->n - i < BLOCKS * BLOCK ? g->n - i : BLOCKS * BLOCK;
            scan_tile(&s, t, g->a + i * f.width, n, g->changed, g->first + i, f);
        }
        if (g + 1 != segments + count && g[1].piece == g->piece) continue;
        for (int i = 0; i < EXPONENTS; i++) t->tail[i] = t->elements[i] - t->tail[i];
    }
    return s.events - events;
}

/* Segments of one tensor, in the order of their pieces. `values` are those that changed, new; room for an event each is
   at `events`. Returns how many there were. */
int64_t ls_scan(const segment *segments, int64_t count, const uint8_t *values, table *tables, event *events, int shift,
                uint32_t mask, int width) {
    if (width == 4) return scan(segments, count, values, tables, events, (format){4, shift, mask});
    return scan(segments, count, values, tables, events, (format){2, shift, mask});
}

/* ---- emit: a section's streams ---- */

/* Puts the events of some pieces where they belong among all of the section, by context, and lets gaps go on from piece
   to piece: `ends` says where each context's next event goes, `rest` how many of its elements came since the last. */
void ls_sort(const event *events, const table *tables, const int32_t *classes, int64_t pieces, event *sorted,
             int64_t *ends, uint32_t *rest) {
    for (int64_t piece = 0; piece < pieces; piece++) {
        const table *t = &tables[piece];
        if (classes[piece] < 0) continue;
        int64_t *to = ends + classes[piece] * EXPONENTS;
        uint32_t *own = rest + classes[piece] * EXPONENTS;
        uint64_t changed = 0;
        for (int i = 0; i < EXPONENTS; i++) changed += t->changed[i];
        for (; changed; changed--, events++) {
            uint32_t exponent = events->exponent % EXPONENTS;
            sorted[to[exponent]++] = (event){events->gap + own[exponent], events->step, events->exponent};
            own[exponent] = 0;
        }
        for (int i = 0; i < EXPONENTS; i++) own[i] += t->tail[i];
    }
}

typedef struct {
    const event *events; /* by context */
    const code *codes;   /* [contexts] = [classes][EXPONENTS] */
    const uint32_t *counts;
    int64_t contexts;
    uint8_t *bits, *ranges;
    int64_t bits_size, ranges_size; /* room; then what was written */
} emission;

/* Returns 0 when the streams do not fit, -1 without memory. */
int ls_emit(emission *e) {
    writer *w = calloc(1, sizeof(writer));
    if (!w) return -1;
    w->bits = (bit_writer){e->bits, e->bits + e->bits_size - 8, 0, 0, 0};
    w->ranges = (range_encoder){e->ranges, e->ranges + e->ranges_size, 0, UINT32_MAX, 0, 1, 0, 0};
    reset(&w->bins);
    const event *one = e->events;
    for (int64_t i = 0; i < e->contexts; i++) {
        if (!e->counts[i]) continue;
        plan own = plan_of(e->codes[i]);
        for (const event *end = one + e->counts[i]; one != end && !w->bits.full && !w->ranges.full; one++) {
            write_gap(w, &own, one->gap);
            write_step(w, own.step, one->step, one->exponent >= FLIP);
        }
    }
    if (w->bits.count) put(&w->bits, 0, 8 - w->bits.count);
    for (int i = 0; i < 5 && w->ranges.used; i++) shift_low(&w->ranges);
    int done = !w->bits.full && !w->ranges.full;
    e->bits_size = w->bits.p - e->bits;
    e->ranges_size = w->ranges.p - e->ranges;
    free(w);
    return done;
}

/* ---- read: a section's changes, by context ---- */

typedef struct {
    uint32_t gap;
    uint32_t by; /* what the value changes by: its magnitude in the lower bits, its sign in the highest */
} change;

typedef struct {
    const code *codes;
    const uint32_t *counts;
    int64_t contexts, elements;
    const uint8_t *bits, *ranges;
    int64_t bits_size, ranges_size;
    change *changes; /* of each context that has any, as many as counted and one more, which never comes */
    uint32_t top;
} reading;

enum { NEVER = INT32_MAX };

/* Returns whether the stream of bits is as long as what was read, or -1 without memory. */
int ls_read(const reading *in) {
    reader *r = calloc(1, sizeof(reader));
    if (!r) return -1;
    r->bits = (bit_reader){in->bits, in->bits + in->bits_size, 0, 0, 0};
    r->ranges = (range_decoder){in->ranges, in->ranges + in->ranges_size, 0, 0, 0};
    r->budget = in->elements;
    reset(&r->bins);
    change *to = in->changes;
    for (int64_t i = 0; i < in->contexts; i++) {
        if (!in->counts[i]) continue;
        plan own = plan_of(in->codes[i]);
        change *end = to + in->counts[i];
        if (own.m && own.step == UNIT) {
            for (; to != end; to++) {
                refill(&r->bits);
                to->gap = read_golomb(&r->bits, &own);
                to->by = take(&r->bits, 1) ? in->top - 1 : 1;
            }
        } else {
            for (; to != end; to++) {
                refill(&r->bits);
                to->gap = own.m ? read_golomb(&r->bits, &own) : read_adaptive(r, own.gap);
                to->by = read_step(r, own.step, in->top);
            }
        }
        *to++ = (change){NEVER, 0};
    }
    /* Whole bytes that were read ahead are given back. */
    int right = r->bits.p - r->bits.count / 8 + r->bits.beyond == r->bits.end;
    free(r);
    return right;
}

/* ---- fill: a tensor's part of a section ---- */

/* One class's contexts, by exponent. */
typedef struct {
    int64_t until[EXPONENTS];      /* elements before the next change */
    const change *next[EXPONENTS]; /* NULL where there never is one */
} contexts;

/* Makes room for so many classes what ls_fill needs. */
void ls_start(contexts *all, const uint32_t *counts, int64_t classes, const change *changes) {
    for (int64_t i = 0; i < classes * EXPONENTS; i++) {
        contexts *c = &all[i / EXPONENTS];
        c->next[i % EXPONENTS] = counts[i] ? changes : NULL;
        c->until[i % EXPONENTS] = counts[i] ? changes->gap : NEVER;
        if (counts[i]) changes += counts[i] + 1;
    }
}

/* Which exponents are counted in whole blocks, and from which to which others change: those are gone through singly. */
typedef struct {
    uint8_t common[EXPONENTS];
    int commons;
    uint32_t low, high; /* none where high < low */
    int zeros;          /* exponent 0 is not among them */
} course;

INLINE course course_of(const contexts *c, const uint8_t *a, int64_t n, format f) {
    tiers t = tiers_of(a, n, f);
    course own = {.low = t.low, .high = 0, .zeros = t.zeros};
    for (uint32_t i = 0; i < EXPONENTS; i++) {
        if (!c->next[i]) continue;
        if ((i || t.zeros) && (i >= t.low || !i)) {
            own.common[own.commons++] = (uint8_t)i;
        } else {
            own.low = i < own.low ? i : own.low;
            own.high = i > own.high ? i : own.high;
        }
    }
    if (own.low == t.low) own.low = 1, own.high = 0;
    return own;
}

/* Not memcpy, of which compilers make a slow instruction where they do not know the size. */
INLINE void copy(uint8_t *to, const uint8_t *from, int64_t size) {
    int64_t i = 0;
    for (; i + 64 <= size; i += 64) memcpy(to + i, from + i, 64);
    for (; i < size; i++) to[i] = from[i];
}

INLINE void apply(const change *own, const uint8_t *a, uint8_t *b, int64_t i, int width) {
    uint32_t top = 1u << (8 * width - 1), old = element(a + i * width, width);
    uint32_t new = ((old + own->by) & (top - 1)) | ((old ^ own->by) & top);
    memcpy(b + i * width, &new, (size_t)width);
}

/* n: from 1 to BLOCKS * BLOCK elements; `b` holds what `a` does. */
INLINE void fill_tile(contexts *c, const course *way, const uint8_t *a, uint8_t *b, int64_t n, format f) {
    tile own;
    uint16_t before[BLOCKS];
    load_tile(&own, a, n, f);
    for (int slot = 0; slot < way->commons; slot++) {
        uint32_t exponent = way->common[slot];
        int64_t count = count_tile(&own, exponent, before), until = c->until[exponent];
        const change *next = c->next[exponent];
        while (until < count) {
            /* The last block that has not more elements before it. */
            int j = 0;
            for (int half = BLOCKS / 2; half; half /= 2) j += before[j + half] <= until ? half : 0;
            apply(next, a, b, j * BLOCK + place(equal(own.block[j], exponent), (uint32_t)(until - before[j])), f.width);
            next++;
            until += 1 + (int64_t)next->gap;
        }
        c->next[exponent] = next;
        c->until[exponent] = until - count;
    }
    if (way->high < way->low) return;
    for (int j = 0; j < own.blocks; j++) {
        uint64_t rare = within(own.block[j], way->low, way->high) & valid(&own, j);
        if (way->zeros) rare &= ~equal(own.block[j], 0);
        for (; rare; rare &= rare - 1) {
            int64_t i = j * BLOCK + __builtin_ctzll(rare);
            uint32_t exponent = element(a + i * f.width, f.width) >> f.shift & f.mask;
            if (--c->until[exponent] >= 0) continue;
            apply(c->next[exponent]++, a, b, i, f.width);
            c->until[exponent] = c->next[exponent]->gap;
        }
    }
}

INLINE void fill_segment(contexts *c, const course *way, const segment *g, format f) {
    for (int64_t i = 0; i < g->n; i += BLOCKS * BLOCK) {
        int64_t n = g->n - i < BLOCKS * BLOCK ? g->n - i : BLOCKS * BLOCK;
        copy(g->b + i * f.width, g->a + i * f.width, n * f.width);
        fill_tile(c, way, g->a + i * f.width, g->b + i * f.width, n, f);
    }
}

INLINE void fill(contexts *all, const segment *segments, int64_t count, format f) {
    int64_t class = -1;
    course way;
    for (const segment *g = segments; g != segments + count; g++) {
        if (g->class < 0) {
            memcpy(g->b, g->a, (size_t)(g->n * f.width));
            continue;
        }
        if (g->class != class) way = course_of(&all[g->class], g->a, g->n, f);
        class = g->class;
        fill_segment(&all[class], &way, g, f);
    }
}

/* Fills the `b` of the section's next segments. */
void ls_fill(contexts *all, const segment *segments, int64_t count, int shift, uint32_t mask, int width) {
    if (width == 4)
        fill(all, segments, count, (format){4, shift, mask});
    else
        fill(all, segments, count, (format){2, shift, mask});
}
