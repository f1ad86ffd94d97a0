/* Products of small matrices that lie in the caches. */
#ifndef MULTIPLY_H
#define MULTIPLY_H

#include <stdint.h>

#include "lanes.h"
#include "tile.h"

/* Rows of a tile, a multiple of ROW_STEP. Its two vectors are a panel of b, so narrow that its rows
 * stay in the first cache while all tiles pass by. */
enum { SUM_ROWS = TILE / 6 * 6, ROW_STEP = SUM_ROWS / 3 };

/* Which numbers of a matrix count: of row r those from `first` + r to before `end` + r. */
typedef struct {
    int64_t first, end;
} band;

static const band EVERYTHING = {INT64_MIN / 2, INT64_MAX / 2};

INLINE void multiply_tile(const int rows, const int width, int64_t depth, float *y, int64_t y_step,
                          const float *a, int64_t a_row, int64_t a_depth, const float *b,
                          int64_t b_step, const int adds) {
    lanes sum[TILE][WIDTH];
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int c = 0; c < width; c++)
            sum[r][c] = adds ? load(y + r * y_step + c * LANES) : (lanes){0};
    add_products(sum, rows, width, depth, a, a_row, a_depth, b, b_step, 0, NULL, 0);
    UNROLLED for (int r = 0; r < rows; r++, y += y_step) {
        OPAQUE(y); /* an address of each row would be laid aside meanwhile */
        UNROLLED for (int c = 0; c < width; c++) store(y + c * LANES, sum[r][c]);
    }
}

/* A tile of so many rows, from row r on. */
#define TILE_OF(rows)                                                                              \
    multiply_tile(rows, width, last - first, y + r * y_step, y_step,                               \
                  a + r * a_row + first * a_depth, a_row, a_depth, b + first * b_step, b_step,     \
                  adds)

INLINE void multiply_panel(const int width, int64_t rows, int64_t depth, float *y, int64_t y_step,
                           const float *a, int64_t a_row, int64_t a_depth, const float *b,
                           int64_t b_step, const int adds, band counts) {
    for (int64_t r = 0, of_tile; r < rows; r += of_tile) {
        const int64_t left = rows - r;
        of_tile = left < 2 * ROW_STEP ? ROW_STEP : left < SUM_ROWS ? 2 * ROW_STEP : SUM_ROWS;
        const int64_t first = counts.first + r > 0 ? counts.first + r : 0;
        const int64_t end = counts.end + r + of_tile - 1, last = end < depth ? end : depth;
        if (of_tile == SUM_ROWS)
            TILE_OF(SUM_ROWS);
        else if (of_tile == 2 * ROW_STEP)
            TILE_OF(2 * ROW_STEP);
        else
            TILE_OF(ROW_STEP);
    }
}

#undef TILE_OF

/* y (rows, columns) = a (rows, depth) b (depth, columns), or added to it. Rows are a multiple of
 * ROW_STEP, columns of LANES; y and b have their steps from a row to the next, a may lie in any
 * way. Of a tile of a, what counts in none of its rows is not read. */
INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, float *y, int64_t y_step,
                     const float *a, int64_t a_row, int64_t a_depth, const float *b,
                     int64_t b_step, const int adds, band counts) {
    int64_t c = 0;
    for (; c + PANEL <= columns; c += PANEL)
        multiply_panel(WIDTH, rows, depth, y + c, y_step, a, a_row, a_depth, b + c, b_step,
                       adds, counts);
    if (c < columns)
        multiply_panel(1, rows, depth, y + c, y_step, a, a_row, a_depth, b + c, b_step, adds,
                       counts);
}

#endif
