/* Panels of a matrix, as many columns as a tile of sums is wide, and the tiles that meet them. */
#ifndef PANELS_H
#define PANELS_H

#include <stdint.h>
#include <string.h>

#include "ahead.h"
#include "lanes.h"
#include "quarters.h"
#include "tile.h"

enum {
    ROOM = 1 << 17,             /* floats of panels: a quarter of a large second cache */
    DEPTH = 2048,               /* most terms of panels of a matrix that lies (columns, depth) */
    ROWS = 256,                 /* of one that lies (depth, columns): long rows, no short pieces */
    LAID = ROOM + PANEL * DEPTH /* floats that a thread lays out: one panel more, or a slab */
};

/* c (rows, width vectors) = a (rows, depth) b (depth, width vectors), or added to it; the squares
 * of c are added to `squares`, unless that is NULL. */
INLINE void tile(const int rows, const int width, int64_t depth, float *c, int64_t c_step,
                 const float *a, int64_t a_row, int64_t a_depth, const float *b, int64_t b_step,
                 int adds, int streams, double *squares, wanted *next) {
    lanes sum[TILE][WIDTH];
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int v = 0; v < width; v++)
            sum[r][v] = adds ? load(c + r * c_step + v * LANES) : (lanes){0};
    const float *asks = asked(next, depth), *ahead = asks ? asks : b; /* b is there already */
    add_products(sum, rows, width, depth, a, a_row, a_depth, b, b_step, 1, ahead,
                 asks ? next->pace : 0);
    UNROLLED for (int r = 0; r < rows; r++, c += c_step) {
        OPAQUE(c); /* an address of each row would be laid aside meanwhile */
        UNROLLED for (int v = 0; v < width; v++) {
            if (streams)
                stream(c + v * LANES, sum[r][v]);
            else
                store(c + v * LANES, sum[r][v]);
        }
    }
    if (!squares) return;
    lanes of_rows[WIDTH] = {{0}};
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int v = 0; v < width; v++) of_rows[v] += sum[r][v] * sum[r][v];
    *squares += total(width == 1 ? of_rows[0] : of_rows[0] + of_rows[1]);
}

/* Numbers of rows as constants, so that every tile is a loop whose sums are registers. */
#define OF_ROWS(rows)                                                                            \
    case rows:                                                                                   \
        tile(rows, width, depth, c, c_step, a, a_row, a_depth, b, b_step, adds, streams,         \
             squares, next);                                                                     \
        break;
INLINE void tile_of_rows(int64_t rows, const int width, int64_t depth, float *c, int64_t c_step,
                         const float *a, int64_t a_row, int64_t a_depth, const float *b,
                         int64_t b_step, int adds, int streams, double *squares, wanted *next) {
    switch (rows) {
        OF_ROWS(1) OF_ROWS(2) OF_ROWS(3) OF_ROWS(4) OF_ROWS(5) OF_ROWS(6)
#if defined(__AVX512F__) || defined(__aarch64__)
        OF_ROWS(7) OF_ROWS(8) OF_ROWS(9) OF_ROWS(10) OF_ROWS(11) OF_ROWS(12) OF_ROWS(13) OF_ROWS(14)
#endif
    }
}
#undef OF_ROWS

static void any_tile(int64_t rows, int64_t columns, int64_t depth, float *c, int64_t c_step,
                     const float *a, int64_t a_row, int64_t a_depth, const float *b, int64_t b_step,
                     int adds, int streams, double *squares, wanted *next) {
    float edge[TILE * PANEL];
    const int64_t step = c_step;
    float *to = c;
    if (columns % LANES) { /* no whole vectors: beside c, and copied */
        c = edge, c_step = PANEL, streams = 0;
        if (adds) memset(edge, 0, sizeof edge); /* what is behind the columns is squared, too */
        for (int64_t r = 0; adds && r < rows; r++)
            for (int64_t i = 0; i < columns; i++) edge[r * PANEL + i] = to[r * step + i];
    }
    if (columns > LANES)
        tile_of_rows(rows, 2, depth, c, c_step, a, a_row, a_depth, b, b_step, adds, streams,
                     squares, next);
    else
        tile_of_rows(rows, 1, depth, c, c_step, a, a_row, a_depth, b, b_step, adds, streams,
                     squares, next);
    for (int64_t r = 0; to != c && r < rows; r++)
        for (int64_t i = 0; i < columns; i++) to[r * step + i] = edge[r * PANEL + i];
}

/* The vectors of the panel that begins at `begin`, of so many columns. */
INLINE int64_t panel_step(int64_t begin, int64_t columns) {
    return columns - begin > LANES ? PANEL : LANES;
}

/* Panels [k][column] of b (depth, columns). */
static void lay_rows(float *panels, const float *b, int64_t b_step, int64_t depth,
                     int64_t columns) {
    for (int64_t n = 0; n < columns; n += PANEL) {
        const int64_t step = panel_step(n, columns), here = columns - n < step ? columns - n : step;
        float *to = panels + n * depth;
        if (here == PANEL)
            for (int64_t k = 0; k < depth; k++)
                for (int v = 0; v < WIDTH; v++)
                    store(to + k * PANEL + v * LANES, load(b + k * b_step + n + v * LANES));
        else
            for (int64_t k = 0; k < depth; k++)
                for (int64_t i = 0; i < step; i++)
                    to[k * step + i] = i < here ? b[k * b_step + n + i] : 0;
    }
}

/* What a thread works with: what is read by many tiles, and what stays in the first cache. */
static _Thread_local float panels_of_thread[LAID] __attribute__((aligned(64)));
static _Thread_local float near_of_thread[LANES * DEPTH] __attribute__((aligned(64)));

/* Panels [k][column] of b^T, b (columns, depth). */
static void lay_columns(float *panels, const float *b, int64_t b_step, int64_t depth,
                        int64_t columns) {
    for (int64_t n = 0; n < columns; n += LANES, b += LANES * b_step) {
        const int64_t begin = n / PANEL * PANEL, step = panel_step(begin, columns);
        const float *rows = b;
        int64_t rows_step = b_step;
        if (n + LANES > columns) { /* no whole vector: zeros beside the rest */
            rows = near_of_thread, rows_step = depth;
            memset(near_of_thread, 0, LANES * depth * sizeof *b);
            for (int64_t i = 0; n + i < columns; i++)
                memcpy(near_of_thread + i * depth, b + i * b_step, depth * sizeof *b);
        }
        turn_rows(panels + begin * depth + (n - begin), step, rows, rows_step, depth);
    }
}

/* Rows in tiles, of which `longer` have one more than the others. */
typedef struct {
    int64_t tiles, each, longer;
} tiling;

INLINE tiling tiling_of(int64_t rows) {
    const int64_t tiles = parts_of(rows, TILE);
    return (tiling){tiles, tiles ? rows / tiles : 0, tiles ? rows % tiles : 0};
}

/* Where tile `t` begins. */
INLINE int64_t tile_begin(tiling of, int64_t t) {
    return t * of.each + (t < of.longer ? t : of.longer);
}

#endif
