/* Gradients of matrices, slab by slab of a, whose rows lie in columns.
 *
 * A slab is laid out for all panels of b. */
#ifndef SLABS_H
#define SLABS_H

#include <stdint.h>
#include <string.h>

#include "ahead.h"
#include "panels.h"
#include "product.h"
#include "threads.h"

enum {
    ONCE = 512,                /* terms of a slab; of no more, c, which is large, is written once */
    SIDE = (TILE + 7) / 8 * 8, /* floats of a column of its tiles, which is not in two lines */
    NEAR = 1 << 13,            /* of panels that meet it together: of the first cache */
    TOGETHER = 8               /* columns with a number for their squares: no panel has fewer */
};

/* What is laid out at a time of a that lies (depth, rows): some tiles, and some of the depth. */
typedef struct {
    int64_t first, tiles, k, depth;
} slab;

/* Slab `i` of a product; without tiles: there is no such. */
static slab slab_at(const product *p, int64_t i) {
    const int64_t deep = p->depth > ONCE ? parts_of(p->depth, ROWS) : 1;
    const int64_t depth = parts_of(p->depth, deep), k = i % deep * depth;
    const int64_t tiles = parts_of(p->rows, TILE);
    const int64_t high = parts_of(tiles, LAID / (SIDE * (depth ? depth : 1))), h = i / deep;
    if (h >= high) return (slab){0};
    const int64_t first = h * tiles / high, here = p->depth - k < depth ? p->depth - k : depth;
    return (slab){first, (h + 1) * tiles / high - first, k, here};
}

/* [tile][k][row]. */
static void lay_slab(const product *p, slab s) {
    const tiling of = tiling_of(p->rows);
    const int64_t all = p->depth * p->rows;
    for (int64_t k = 0; k < s.depth; k++)
        for (int64_t t = 0; t < s.tiles; t++) {
            float *side = panels_of_thread + (t * s.depth + k) * SIDE;
            const int64_t begin = tile_begin(of, s.first + t);
            const int64_t at = (s.k + k) * p->rows + begin;
            if (at + SIDE <= all)
                memcpy(side, p->a + at, SIDE * sizeof *side); /* those behind are not used */
            else
                memcpy(side, p->a + at, (tile_begin(of, s.first + t + 1) - begin) * sizeof *side);
        }
}

/* What is read for a slab that follows on one of so many steps: of a, and some columns of b. */
static void next_slab(wanted next[2], const product *p, slab s, part columns, int64_t steps) {
    const tiling of = tiling_of(p->rows);
    const int64_t first = tile_begin(of, s.first), rows = tile_begin(of, s.first + s.tiles) - first;
    const int64_t wide = columns.end - columns.begin;
    next[0] = wanted_of(p->a + s.k * p->a_step + first, s.depth, rows, p->a_step);
    next[1] = wanted_of(p->b + s.k * p->b_step + columns.begin, s.depth, wide, p->b_step);
    next[0].pace = next[1].pace = pace_of(s.depth * (rows + wide), steps);
}

/* Asks for a tile of c that will be read, or written by way of the caches. */
INLINE void ask_tile(const float *c, int64_t step) {
    for (int64_t r = 0; r < TILE; r++)
        for (int64_t i = 0; i < PANEL; i += LINE) __builtin_prefetch(c + r * step + i, 1, 2);
}

/* Some columns of a product whose a lies (depth, rows), and their squares: those of a panel go to
 * its first number. Meanwhile its next slab is asked for, and then that of `after`. A tile writes c
 * past the caches, if nothing is added to it: it is large, and not read soon. */
static void multiply_slabs(const product *p, part mine, const product *after, part its) {
    const int aligned = (uintptr_t)p->c % sizeof(lanes) == 0 && p->columns % LANES == 0;
    const tiling of = tiling_of(p->rows);
    slab next = slab_at(p, 0);
    for (int64_t i = 0; next.tiles; i++) {
        const slab now = next;
        const int adds = p->adds || now.k > 0;
        const int last_terms = now.k + now.depth == p->depth;
        const int streams = aligned && !p->adds && last_terms;
        double *squares = p->squares && last_terms ? p->squares + mine.begin / TOGETHER : NULL;
        if (squares && now.first == 0)
            memset(squares, 0, parts_of(mine.end - mine.begin, TOGETHER) * sizeof *squares);
        const int64_t steps = parts_of(mine.end - mine.begin, PANEL) * now.tiles * now.depth;
        const int64_t panels = now.depth ? NEAR / (PANEL * now.depth) : 0;
        const int64_t wide = panels > 1 ? panels * PANEL : PANEL;
        wanted ahead[2];
        next = slab_at(p, i + 1);
        if (next.tiles)
            next_slab(ahead, p, next, mine, steps);
        else
            next_slab(ahead, after, slab_at(after, 0), its, steps);
        lay_slab(p, now);
        for (int64_t n = mine.begin; n < mine.end; n += wide) {
            const int64_t columns = mine.end - n < wide ? mine.end - n : wide;
            lay_rows(near_of_thread, p->b + now.k * p->b_step + n, p->b_step, now.depth, columns);
            for (int64_t t = 0; t < now.tiles; t++) {
                const int64_t begin = tile_begin(of, now.first + t);
                const int64_t end = tile_begin(of, now.first + t + 1);
                const float *a = panels_of_thread + t * now.depth * SIDE;
                float *c = p->c + begin * p->columns + n;
                for (int64_t i = 0; i < columns; i += PANEL) {
                    if (!streams && t + 1 < now.tiles)
                        ask_tile(c + (end - begin) * p->columns + i, p->columns);
                    any_tile(end - begin, columns - i < PANEL ? columns - i : PANEL, now.depth,
                             c + i, p->columns, a, 1, SIDE, near_of_thread + i * now.depth,
                             panel_step(i, columns), adds, streams,
                             squares ? squares + (n - mine.begin + i) / TOGETHER : NULL,
                             ahead + !ahead->rows);
                }
            }
        }
    }
}

#endif
