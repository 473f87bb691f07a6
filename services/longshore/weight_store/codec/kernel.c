/* The sparse delta's inner loops. kernel_numpy.py does the same, byte for byte; codes.py tells what the streams mean.

   What a payload says is checked in sparse.py before it comes here, its streams are read within their bounds, and every
   loop ends with the elements of the segments, which the caller made from the tensors themselves. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "product.h"
#include "scan.h"
#include "streams.h"
#include "tiles.h"

/* A run of elements of one piece. */
typedef struct {
    const uint8_t *a;
    uint8_t *b; /* the tensor to compare, or to fill */
    int64_t n;
    int64_t first; /* scan: the first element's number in the tensor */
    int32_t piece; /* scan: its row of the tables */
    int32_t class; /* fill: the piece's; negative where nothing changed */
} segment;

#ifndef LONGSHORE_SOURCE
#define LONGSHORE_SOURCE 0
#endif

/* Of which source this was built: arguments may differ. */
uint32_t ls_source(void) { return LONGSHORE_SOURCE; }

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

/* ---- scan ---- */

static void end_piece(table *t) {
    for (int i = 0; i < EXPONENTS; i++) t->tail[i] = t->elements[i] - t->tail[i];
}

INLINE int64_t scan(const uint8_t *a, const uint8_t *b, int64_t n, int64_t piece, uint64_t *changed, table *tables,
                    event *events, int64_t room, int64_t row, uint8_t *rows, format f) {
    scanner s = scanner_of(a, n, events, f);
    int64_t left = room, row_end = 0;
    for (int64_t first = 0; first < n; first += piece, tables++) {
        int64_t end = n - first < piece ? n : first + piece;
        for (int64_t i = first; i < end; i += BLOCKS * BLOCK) {
            int64_t size = end - i < BLOCKS * BLOCK ? end - i : BLOCKS * BLOCK;
            left -= compare(a + i * f.width, b + i * f.width, size, changed + i / BLOCK, f.width);
            if (left < 0) return -1;
            for (int64_t j = 0; j * BLOCK < size; j++) {
                for (uint64_t bits = changed[i / BLOCK + j]; bits; bits &= bits - 1) {
                    int64_t k = i + j * BLOCK + __builtin_ctzll(bits);
                    if (k < row_end) continue;
                    /* The narrow division takes half the time. */
                    int64_t number = n <= UINT32_MAX ? (uint32_t)k / (uint32_t)row : k / row;
                    rows[number] = 1;
                    row_end = (number + 1) * row;
                }
            }
            tile own;
            load_tile(&own, a + i * f.width, size, f);
            scan_tile(&s, tables, &own, a + i * f.width, b + i * f.width, changed + i / BLOCK, f);
        }
        end_piece(tables);
    }
    return s.events - events;
}

/* A whole tensor of n elements, by pieces of so many, which are whole blocks. Returns how many elements changed, -1
   when there are more than `room`. Those are bits in `changed`; rows, of `row` elements each, that have any are marked. */
int64_t ls_scan(const uint8_t *a, const uint8_t *b, int64_t n, int64_t piece, uint64_t *changed, table *tables,
                event *events, int64_t room, int64_t row, uint8_t *rows, int shift, uint32_t mask, int width) {
    if (width == 4) return scan(a, b, n, piece, changed, tables, events, room, row, rows, (format){4, shift, mask});
    return scan(a, b, n, piece, changed, tables, events, room, row, rows, (format){2, shift, mask});
}

INLINE void scan_segments(const segment *segments, int64_t count, const uint64_t *changed, table *tables,
                          event *events, format f) {
    if (!count) return;
    scanner s = scanner_of(segments->a, segments->n, events, f);
    for (const segment *g = segments; g != segments + count; g++) {
        for (int64_t i = 0; i < g->n; i += BLOCKS * BLOCK) {
            int64_t n = g->n - i < BLOCKS * BLOCK ? g->n - i : BLOCKS * BLOCK;
            uint64_t bits[BLOCKS];
            tile own;
            load_tile(&own, g->a + i * f.width, n, f);
            for (int j = 0; j < own.blocks; j++) {
                int64_t at = g->first + i + j * BLOCK;
                bits[j] = changed[at / 64] >> (at % 64);
                if (at % 64) bits[j] |= changed[at / 64 + 1] << (64 - at % 64);
                bits[j] &= valid(&own, j);
            }
            scan_tile(&s, tables + g->piece, &own, g->a + i * f.width, g->b + i * f.width, bits, f);
        }
        if (g + 1 == segments + count || g[1].piece != g->piece) end_piece(tables + g->piece);
    }
}

/* Segments of one tensor, in the order of their pieces; what changed in it is in `changed`, and a word more. */
void ls_scan_segments(const segment *segments, int64_t count, const uint64_t *changed, table *tables, event *events,
                      int shift, uint32_t mask, int width) {
    if (width == 4)
        scan_segments(segments, count, changed, tables, events, (format){4, shift, mask});
    else
        scan_segments(segments, count, changed, tables, events, (format){2, shift, mask});
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

/* size: from 1 to BLOCKS * BLOCK elements; `b` holds what `a` does. */
INLINE void fill_tile(contexts *c, const course *way, const uint8_t *a, uint8_t *b, int64_t size, format f) {
    tile own;
    uint16_t before[BLOCKS];
    load_tile(&own, a, size, f);
    for (int slot = 0; slot < way->commons; slot++) {
        if (slot < PARTS) prefetch(a + (BLOCKS * BLOCK + slot * PART) * f.width, PART * f.width);
        uint32_t exponent = way->common[slot];
        int64_t n = count(&own, exponent), until = c->until[exponent];
        if (until >= n) {
            c->until[exponent] = until - n;
            continue;
        }
        count_before(&own, exponent, before);
        const change *next = c->next[exponent];
        while (until < n) {
            int j = block_of(before, until);
            apply(next, a, b, j * BLOCK + place(equal(own.block[j], exponent), (uint32_t)(until - before[j])), f.width);
            next++;
            until += 1 + (int64_t)next->gap;
        }
        c->next[exponent] = next;
        c->until[exponent] = until - n;
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

/* ---- products ---- */

void ls_add_product(const uint8_t *old, uint8_t *new, const float *down, const float *up, int64_t rows, int64_t columns,
                    int64_t rank, int shift, int width) {
    add_product(old, new, down, up, rows, columns, rank, shift, width);
}
