/* What changed in a tile, where, and by how much. */

#ifndef LONGSHORE_SCAN_H
#define LONGSHORE_SCAN_H

#include "streams.h"
#include "tiles.h"

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

/* Elements that differ, as bits; n: from 1 to BLOCKS * BLOCK. Returns how many. */
INLINE int64_t compare(const uint8_t *a, const uint8_t *b, int64_t n, uint64_t changed[BLOCKS], int width) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        uint64_t bits = 0;
        if (n - i >= BLOCK) {
            bits = differ(a + i * width, b + i * width, width);
        } else {
            for (int64_t k = i; k < n; k++)
                bits |= (uint64_t)(element(a + k * width, width) != element(b + k * width, width)) << (k - i);
        }
        changed[i / BLOCK] = bits;
        found += __builtin_popcountll(bits);
    }
    return found;
}

typedef struct {
    uint8_t common[EXPONENTS]; /* exponents that are counted in every tile */
    int commons;
    tiers tiers;
    event *events;
    uint16_t before[EXPONENTS][BLOCKS]; /* of the tile, by row */
    uint16_t row[EXPONENTS];            /* 1 + row of an exponent; 0: it has none in this tile */
} scanner;

INLINE scanner scanner_of(const uint8_t *a, int64_t n, event *events, format f) {
    scanner s = {.tiers = tiers_of(a, n, f), .events = events};
    for (uint32_t i = s.tiers.low; i <= s.tiers.high; i++) s.common[s.commons++] = (uint8_t)i;
    if (s.tiers.zeros) s.common[s.commons++] = 0;
    return s;
}

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

/* changed[j]: a bit an element of the j-th block. */
INLINE void scan_tile(scanner *s, table *t, const tile *own, const uint8_t *a, const uint8_t *b,
                      const uint64_t changed[BLOCKS], format f) {
    uint8_t exponent[EXPONENTS];
    uint32_t counts[EXPONENTS];
    int rows = 0;
    for (int j = 0; j < own->blocks; j++) {
        for (uint64_t bits = changed[j]; bits; bits &= bits - 1) {
            int k = __builtin_ctzll(bits);
            int64_t i = (j * BLOCK + k) * f.width;
            uint32_t old = element(a + i, f.width), new = element(b + i, f.width), e = old >> f.shift & f.mask;
            if (!s->row[e]) {
                counts[rows] = count_before(own, e, s->before[rows]);
                exponent[rows] = (uint8_t)e;
                s->row[e] = (uint16_t)++rows;
            }
            uint32_t seen = t->elements[e] + s->before[s->row[e] - 1][j] +
                            (uint32_t)__builtin_popcountll(equal(own->block[j], e) & first_bits(k));
            record(s->events++, t, seen, old, new, e, 1u << (8 * f.width - 1));
        }
    }
    for (int k = 0; k < s->commons; k++) {
        /* While this tile is counted, a part of the next one is fetched; past the end that does no harm. */
        if (k < PARTS) {
            prefetch(a + (BLOCKS * BLOCK + k * PART) * f.width, PART * f.width);
            prefetch(b + (BLOCKS * BLOCK + k * PART) * f.width, PART * f.width);
        }
        if (!s->row[s->common[k]]) t->elements[s->common[k]] += count(own, s->common[k]);
    }
    for (int j = 0; j < own->blocks; j++) {
        uint64_t rare = ~within(own->block[j], s->tiers.low, s->tiers.high) & valid(own, j);
        if (s->tiers.zeros) rare &= ~equal(own->block[j], 0);
        for (; rare; rare &= rare - 1) {
            uint32_t e = element(a + (j * BLOCK + __builtin_ctzll(rare)) * f.width, f.width) >> f.shift & f.mask;
            t->elements[e] += !s->row[e];
        }
    }
    for (int k = 0; k < rows; k++) t->elements[exponent[k]] += counts[k], s->row[exponent[k]] = 0;
}

#endif
