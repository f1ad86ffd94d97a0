/* Sums of squares of many tensors, of which most are small. */
#include <stdint.h>

#include "lanes.h"
#include "threads.h"

/* Rows whose squares are added up by themselves: a sum's order does not depend on the threads. They
 * are read in STREAMS at a time, far apart: the processor looks ahead in each of them, but no
 * further than a page, so they are asked for so many numbers AHEAD. */
enum { SQUARED_ROWS = 256, STREAMS = 4, AHEAD = 1024 };

/* Adds the squares of STREAMS rows, `step` numbers apart: of a row in fp32, of the rows in fp64. */
INLINE double squares_of_rows(const float *x, int64_t step, int64_t width) {
    lanes sums[STREAMS] = {{0}};
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES)
        for (int s = 0; s < STREAMS; s++) {
            const lanes v = load(x + s * step + j);
            __builtin_prefetch(x + s * step + j + AHEAD);
            sums[s] += v * v;
        }
    double squares = 0;
    for (int s = 0; s < STREAMS; s++) {
        float sum = total(sums[s]);
        for (int64_t i = j; i < width; i++) sum += x[s * step + i] * x[s * step + i];
        squares += sum;
    }
    return squares;
}

/* Of one row. */
static float squares_of_row(const float *x, int64_t width) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < width; j++) squares += x[j] * x[j];
    return squares;
}

/* Adds to sums[kinds[i]] the squares of a tensor of rows[i] rows of widths[i] numbers at
 * addresses[i], divided by divisors[i]. `room` has a number for each SQUARED_ROWS of the longest
 * one. */
void sums_of_squares(double *restrict sums, double *restrict room,
                     const float *const *restrict addresses, const int64_t *restrict rows,
                     const int64_t *restrict widths, const int64_t *restrict kinds,
                     const int64_t *restrict divisors, int64_t count, int64_t threads) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t width = widths[i], blocks = (rows[i] + SQUARED_ROWS - 1) / SQUARED_ROWS;
#pragma omp parallel for schedule(static) num_threads(worth(threads, rows[i] * width))
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t left = rows[i] - b * SQUARED_ROWS;
            const int64_t here = left < SQUARED_ROWS ? left : SQUARED_ROWS, each = here / STREAMS;
            const float *x = addresses[i] + b * SQUARED_ROWS * width;
            double sum = 0;
            for (int64_t r = 0; r < each; r++)
                sum += squares_of_rows(x + r * width, each * width, width);
            for (int64_t r = STREAMS * each; r < here; r++)
                sum += squares_of_row(x + r * width, width);
            room[b] = sum;
        }
        double of_all = 0;
        for (int64_t b = 0; b < blocks; b++) of_all += room[b];
        sums[kinds[i]] += of_all / divisors[i];
    }
}
