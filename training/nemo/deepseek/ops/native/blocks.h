/* Products of rows with a matrix, block by block of that.
 *
 * The matrix is read where it lies, if there are few rows; for many, a block of it is laid out in
 * panels, which stay in a core's cache while all rows pass by (see `way`). */
#ifndef BLOCKS_H
#define BLOCKS_H

#include <stdint.h>

#include "ahead.h"
#include "panels.h"
#include "product.h"
#include "threads.h"

enum {
    PLACE = 64,          /* terms of a block that is read in place: it and the next are cached */
    FEW = 96,            /* rows for which b is not laid out, if it lies (depth, columns) */
    NARROW = 32,         /* if it lies (columns, depth): of more, too many lanes are empty */
    STRIP = 96,          /* columns of c that are turned at a time: panels */
    ROWS_PACE = LINE / 2 /* of rows: at a line a step others wait for their turn */
};

static _Thread_local float turned_of_thread[STRIP * NARROW] __attribute__((aligned(64)));

/* Where b (depth, columns) lies: the panel of column n begins at n * `panel`; `step` from a row to
 * the next, 0: as wide as the panel. */
typedef struct {
    const float *at;
    int64_t panel, step;
} laid;

/* What tiles ask for: if `a` or `c`, rows of it that the next tile will need, which come as late
 * from memory as a tenth of the multiplications takes; and what follows on the block. */
typedef struct {
    int a, c;
    wanted next;
} requests;

/* Whole rows side by side, from the first to before `end`. */
INLINE wanted rows_of(const float *rows, int64_t first, int64_t end, int64_t width) {
    return (wanted){rows + first * width, end > first, (end - first) * width, 0, 0, ROWS_PACE};
}

/* c (rows, columns) = a (rows, depth) b (depth, columns), or added to it. */
static void multiply_panels(int64_t rows, int64_t columns, int64_t depth, float *c, int64_t c_step,
                            const float *a, int64_t a_step, laid b, int adds, requests *ahead) {
    const tiling of = tiling_of(rows);
    for (int64_t t = 0; t < of.tiles; t++) {
        const int64_t begin = tile_begin(of, t), end = tile_begin(of, t + 1);
        const int64_t after = t + 1 < of.tiles ? tile_begin(of, t + 2) : end;
        wanted of_a = rows_of(a, end, ahead->a ? after : end, a_step);
        wanted of_c = rows_of(c, end, ahead->c ? after : end, c_step);
        for (int64_t n = 0; n < columns; n += PANEL) {
            wanted *rest = of_c.rows ? &of_c : &ahead->next, *now = of_a.rows ? &of_a : rest;
            any_tile(end - begin, columns - n < PANEL ? columns - n : PANEL, depth,
                     c + begin * c_step + n, c_step, a + begin * a_step, a_step, 1,
                     b.at + n * b.panel, b.step ? b.step : panel_step(n, columns), adds, 0, NULL,
                     now);
        }
    }
}

/* How c = a b is made. PANELS: b is laid out. IN_PLACE: b, which lies by rows of whole vectors, is
 * read there. TURNED: as c^T = b^T a^T, where b lies by columns; a is laid out. To turn a few rows
 * is cheaper than to turn a matrix, though their vectors are not full. */
typedef enum { PANELS, IN_PLACE, TURNED } way;

static way way_of(const product *p) {
    if (p->rows > FEW) return PANELS;
    if (p->kind == BACK) return p->columns % LANES ? PANELS : IN_PLACE;
    return p->rows <= NARROW && p->depth <= DEPTH ? TURNED : PANELS;
}

/* The part of a product that is made of one block of b. */
typedef struct {
    int64_t n, columns, k, depth;
} block;

/* Block `i` of some columns of a product; without columns: there is no such. */
static block block_at(const product *p, part mine, int64_t i) {
    const way how = way_of(p);
    const int64_t deepest = how == IN_PLACE ? PLACE : p->kind == BACK ? ROWS : DEPTH;
    const int64_t deep = p->depth > deepest ? parts_of(p->depth, deepest) : 1;
    const int64_t depth = parts_of(p->depth, deep);
    int64_t most = how == TURNED ? STRIP : ROOM / (depth ? depth : 1) / PANEL * PANEL;
    if (most < PANEL) most = PANEL;
    const int64_t panels = parts_of(mine.end - mine.begin, PANEL);
    const int64_t wide = parts_of(panels * PANEL, most), n = i / deep, k = i % deep * depth;
    block b = {mine.end, 0, k, 0};
    if (n >= wide) return b;
    const int64_t end = mine.begin + (n + 1) * panels / wide * PANEL;
    b.n = mine.begin + n * panels / wide * PANEL;
    b.columns = (end < mine.end ? end : mine.end) - b.n;
    b.depth = p->depth - k < depth ? p->depth - k : depth;
    return b;
}

INLINE const float *block_of(const product *p, block b) {
    return p->kind == BACK ? p->b + b.k * p->b_step + b.n : p->b + b.n * p->b_step + b.k;
}

/* b of a block, where a tile reads it; if TURNED: a, which has been laid out for all blocks. */
static laid lay_block(const product *p, block b, way how) {
    const laid in_place = {block_of(p, b), 1, p->b_step}, panels = {panels_of_thread, b.depth, 0};
    if (how == IN_PLACE) return in_place;
    if (how == PANELS && p->kind == LINEAR)
        lay_columns(panels_of_thread, block_of(p, b), p->b_step, b.depth, b.columns);
    if (how == PANELS && p->kind == BACK)
        lay_rows(panels_of_thread, block_of(p, b), p->b_step, b.depth, b.columns);
    return panels;
}

/* c^T of a block, and turned back; `panels`: of a^T. */
static void multiply_turned(const product *p, block now, laid panels,
                            requests *ahead) {
    const int64_t step = whole(p->rows, LANES);
    float *c = p->c + now.n, *c_t = turned_of_thread;
    for (int64_t r = 0; p->adds && r < p->rows; r++)
        for (int64_t i = 0; i < now.columns; i++) c_t[i * step + r] = c[r * p->columns + i];
    multiply_panels(now.columns, step, p->depth, c_t, step, block_of(p, now), p->b_step, panels,
                    p->adds, ahead);
    int64_t i = 0;
    for (; i + LANES <= now.columns; i += LANES)
        turn_rows(c + i, p->columns, c_t + i * step, step, p->rows);
    for (; i < now.columns; i++)
        for (int64_t r = 0; r < p->rows; r++) c[r * p->columns + i] = c_t[i * step + r];
}

/* A block of a product that follows on one of so many steps. */
static wanted next_block(const product *p, block b, int64_t steps) {
    const int by_rows = p->kind == BACK;
    wanted next = wanted_of(block_of(p, b), by_rows ? b.depth : b.columns,
                            by_rows ? b.columns : b.depth, p->b_step);
    next.pace = pace_of(b.depth * b.columns, steps);
    return next;
}

/* The rows that tiles of a product's first block ask for: others find them in the second cache. Not
 * those of few rows, whose time is that of the matrix. */
static requests requests_of(const product *p, part mine, int64_t i) {
    const int asks = i == 0 && way_of(p) == PANELS, all = mine.end - mine.begin == p->columns;
    return (requests){asks, asks && all, {0}};
}

/* Steps of a block's tiles, of so many rows and columns, in which they ask for what follows. */
static int64_t steps_left(const product *p, const requests *ahead, int64_t rows, int64_t columns,
                          int64_t depth) {
    const int64_t panels = parts_of(columns, PANEL), asked = ROWS_PACE * depth;
    const int64_t of_rows = (ahead->a ? p->a_step : 0) + (ahead->c ? p->columns : 0);
    const int64_t taken = depth ? parts_of(TILE * of_rows, asked) : 0;
    return parts_of(rows, TILE) * (panels > taken ? panels - taken : 1) * depth;
}

/* Some columns of a product; meanwhile its next block is asked for, and then that of `after`. */
static void multiply_columns(const product *p, part mine, const product *after, part its) {
    const way how = way_of(p);
    block next = block_at(p, mine, 0);
    if (how == TURNED) lay_columns(panels_of_thread, p->a, p->a_step, p->depth, p->rows);
    for (int64_t i = 0; next.columns; i++) {
        const block now = next;
        const int64_t rows = how == TURNED ? now.columns : p->rows;
        const int64_t columns = how == TURNED ? p->rows : now.columns;
        const laid b = lay_block(p, now, how);
        requests ahead = requests_of(p, mine, i);
        const int64_t steps = steps_left(p, &ahead, rows, columns, now.depth);
        next = block_at(p, mine, i + 1);
        ahead.next = next.columns ? next_block(p, next, steps)
                                  : next_block(after, block_at(after, its, 0), steps);
        if (how == TURNED)
            multiply_turned(p, now, b, &ahead);
        else
            multiply_panels(p->rows, now.columns, now.depth, p->c + now.n, p->columns,
                            p->a + now.k, p->a_step, b, p->adds || now.k > 0, &ahead);
    }
}

#endif
