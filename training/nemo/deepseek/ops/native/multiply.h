/* Products of small matrices that lie in the caches. */
#ifndef MULTIPLY_H
#define MULTIPLY_H

#include <stdint.h>

#include "lanes.h"

/* Rows of a tile of sums, and vectors: as many as there are registers, less those for what is
 * multiplied. */
#if defined(__AVX512F__) || defined(__aarch64__)
enum { SUM_ROWS = 6, SUM_WIDTH = 4 };
#else
enum { SUM_ROWS = 4, SUM_WIDTH = 2 };
#endif

INLINE void multiply_tile(const int rows, const int width, int64_t depth, float *y, int64_t y_step,
                          const float *a, int64_t a_row, int64_t a_depth, const float *b,
                          int64_t b_step, const int adds) {
    lanes sum[SUM_ROWS][SUM_WIDTH];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < width; c++)
            sum[r][c] = adds ? load(y + r * y_step + c * LANES) : (lanes){0};
    for (int64_t i = 0; i < depth; i++) {
        lanes b_i[SUM_WIDTH];
        for (int c = 0; c < width; c++) b_i[c] = load(b + i * b_step + c * LANES);
        for (int r = 0; r < rows; r++) {
            const float a_ri = a[r * a_row + i * a_depth];
            for (int c = 0; c < width; c++) sum[r][c] += a_ri * b_i[c];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < width; c++) store(y + r * y_step + c * LANES, sum[r][c]);
}

INLINE void multiply_rows(const int rows, int64_t columns, int64_t depth, float *y, int64_t y_step,
                          const float *a, int64_t a_row, int64_t a_depth, const float *b,
                          int64_t b_step, const int adds) {
    int64_t c = 0;
    for (; c + SUM_WIDTH * LANES <= columns; c += SUM_WIDTH * LANES)
        multiply_tile(rows, SUM_WIDTH, depth, y + c, y_step, a, a_row, a_depth, b + c, b_step, adds);
#if defined(__AVX512F__) || defined(__aarch64__)
    if (c + 3 * LANES <= columns) {
        multiply_tile(rows, 3, depth, y + c, y_step, a, a_row, a_depth, b + c, b_step, adds);
        c += 3 * LANES;
    }
    if (c + 2 * LANES <= columns) {
        multiply_tile(rows, 2, depth, y + c, y_step, a, a_row, a_depth, b + c, b_step, adds);
        c += 2 * LANES;
    }
#endif
    if (c + LANES <= columns)
        multiply_tile(rows, 1, depth, y + c, y_step, a, a_row, a_depth, b + c, b_step, adds);
}

/* y (rows, columns) = a (rows, depth) b (depth, columns), or added to it. Columns are a multiple of
 * LANES; y and b have their steps from a row to the next, a may lie in any way. */
INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, float *y, int64_t y_step,
                     const float *a, int64_t a_row, int64_t a_depth, const float *b,
                     int64_t b_step, const int adds) {
    int64_t r = 0;
    for (; r + SUM_ROWS <= rows; r += SUM_ROWS)
        multiply_rows(SUM_ROWS, columns, depth, y + r * y_step, y_step, a + r * a_row, a_row,
                      a_depth, b, b_step, adds);
    for (; r + 2 <= rows; r += 2)
        multiply_rows(2, columns, depth, y + r * y_step, y_step, a + r * a_row, a_row, a_depth, b,
                      b_step, adds);
    for (; r < rows; r++)
        multiply_rows(1, columns, depth, y + r * y_step, y_step, a + r * a_row, a_row, a_depth, b,
                      b_step, adds);
}

#endif
