/* The two matrix products that the kernels are made of, for few rows.
 *
 * With few rows the matrix is read once, from memory, and this takes longest. So the matrix is
 * walked through in the order in which it lies there, and all rows, which stay in the caches, are
 * multiplied with what has just arrived. A tile of sums is held in registers meanwhile, so that
 * each number that is loaded takes part in several products.
 *
 * Each sum is added up in an order of its own, which does not depend on how many rows there are.
 */
#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "lanes.h"

/* Rows and outputs of a tile: 16 sums, and the vectors that are multiplied. Where there are 16
 * registers only, two rows. */
#if defined(__AVX__) && !defined(__AVX512F__)
enum { TILE_ROWS = 2, TILE_WIDTH = 4 };
#else
enum { TILE_ROWS = 4, TILE_WIDTH = 4 };
#endif

/* `first`: no tile has read this part of w before. While it is, the part behind it is asked for:
 * the processor's own foresight follows a few long runs, and loses them while other rows are
 * multiplied. */
INLINE void dots_tile(const int rows, const int outputs, const int first, int64_t inputs,
                      const float *x, int64_t x_step, const float *w, int64_t w_step, float *y,
                      int64_t y_step) {
    lanes sum[TILE_ROWS][TILE_WIDTH];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) sum[r][o] = (lanes){0};
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) {
        lanes w_i[TILE_WIDTH];
        for (int o = 0; o < outputs; o++) {
            w_i[o] = load(w + o * w_step + i);
            if (first) __builtin_prefetch(w + (o + TILE_WIDTH) * w_step + i);
        }
        for (int r = 0; r < rows; r++) {
            lanes x_i = load(x + r * x_step + i);
            for (int o = 0; o < outputs; o++) sum[r][o] += x_i * w_i[o];
        }
    }
    for (int r = 0; r < rows; r++) {
        float *y_r = y + r * y_step;
        if (outputs == TILE_WIDTH) {
            quad four = totals(sum[r]);
            memcpy(y_r, &four, sizeof four);
        } else {
            for (int o = 0; o < outputs; o++) y_r[o] = total(sum[r][o]);
        }
        if (i == inputs) continue;
        for (int o = 0; o < outputs; o++)
            for (int64_t j = i; j < inputs; j++) y_r[o] += x[r * x_step + j] * w[o * w_step + j];
    }
}

/* Numbers of rows and outputs as constants, so that every tile is a loop of its own whose sums are
 * registers. */
#define DOTS_OF(rows, outputs)                                                      \
    if (first)                                                                      \
        dots_tile(rows, outputs, 1, inputs, x, x_step, w, w_step, y, y_step);       \
    else                                                                            \
        dots_tile(rows, outputs, 0, inputs, x, x_step, w, w_step, y, y_step)

INLINE void dots_rows(const int rows, int64_t outputs, int first, int64_t inputs, const float *x,
                      int64_t x_step, const float *w, int64_t w_step, float *y, int64_t y_step) {
    if (outputs >= TILE_WIDTH) {
        DOTS_OF(rows, TILE_WIDTH);
        return;
    }
    for (int64_t o = 0; o < outputs; o++, w += w_step, y++) {
        DOTS_OF(rows, 1);
    }
}

#undef DOTS_OF

/* y[r][o] = sum over i of x[r][i] w[o][i]: the numbers of a row lie together in both. */
static inline void dots(int64_t rows, int64_t outputs, int64_t inputs, const float *x,
                        int64_t x_step, const float *w, int64_t w_step, float *y, int64_t y_step) {
    for (int64_t o = 0; o < outputs; o += TILE_WIDTH, w += TILE_WIDTH * w_step, y += TILE_WIDTH) {
        int64_t r = 0;
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
            dots_rows(TILE_ROWS, outputs - o, r == 0, inputs, x + r * x_step, x_step, w, w_step,
                      y + r * y_step, y_step);
        for (; r < rows; r++)
            dots_rows(1, outputs - o, r == 0, inputs, x + r * x_step, x_step, w, w_step,
                      y + r * y_step, y_step);
    }
}

INLINE void sums_tile(const int rows, const int vectors, int64_t inputs, const float *a,
                      int64_t a_step, const float *b, int64_t b_step, float *y, int64_t y_step,
                      const int adds) {
    lanes sum[TILE_ROWS][TILE_WIDTH];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = adds ? load(y + r * y_step + v * LANES) : (lanes){0};
    for (int64_t i = 0; i < inputs; i++) {
        lanes b_i[TILE_WIDTH];
        for (int v = 0; v < vectors; v++) b_i[v] = load(b + i * b_step + v * LANES);
        for (int r = 0; r < rows; r++) {
            float a_i = a[r * a_step + i];
            for (int v = 0; v < vectors; v++) sum[r][v] += a_i * b_i[v];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) store(y + r * y_step + v * LANES, sum[r][v]);
}

INLINE void sums_rows(const int rows, int64_t outputs, int64_t inputs, const float *a,
                      int64_t a_step, const float *b, int64_t b_step, float *y, int64_t y_step,
                      const int adds) {
    int64_t o = 0;
    for (; o + TILE_WIDTH * LANES <= outputs; o += TILE_WIDTH * LANES)
        sums_tile(rows, TILE_WIDTH, inputs, a, a_step, b + o, b_step, y + o, y_step, adds);
    for (; o + LANES <= outputs; o += LANES)
        sums_tile(rows, 1, inputs, a, a_step, b + o, b_step, y + o, y_step, adds);
    for (; o < outputs; o++)
        for (int r = 0; r < rows; r++) {
            float sum = adds ? y[r * y_step + o] : 0;
            for (int64_t i = 0; i < inputs; i++) sum += a[r * a_step + i] * b[i * b_step + o];
            y[r * y_step + o] = sum;
        }
}

/* y[r][o] = sum over i of a[r][i] b[i][o], or added to y: rows of b lie together. */
INLINE void sums(int64_t rows, int64_t outputs, int64_t inputs, const float *a, int64_t a_step,
                 const float *b, int64_t b_step, float *y, int64_t y_step, const int adds) {
    int64_t r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        sums_rows(TILE_ROWS, outputs, inputs, a + r * a_step, a_step, b, b_step, y + r * y_step,
                  y_step, adds);
    for (; r < rows; r++)
        sums_rows(1, outputs, inputs, a + r * a_step, a_step, b, b_step, y + r * y_step, y_step,
                  adds);
}

#endif
