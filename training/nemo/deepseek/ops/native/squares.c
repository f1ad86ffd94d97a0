/* Sums of squares of many tensors, of which most are small. */
#include <stdint.h>

#include "threads.h"

/* Rows whose squares are added up by themselves: a sum's order does not depend on the threads. */
enum { SQUARED_ROWS = 256 };

/* sums[i] = the squares of a tensor of rows[i] rows of widths[i] numbers at addresses[i]: of a row
 * in fp32, of the rows in fp64. `room` has a number for each SQUARED_ROWS of the longest. */
void sums_of_squares(double *restrict sums, double *restrict room,
                     const float *const *restrict addresses, const int64_t *restrict rows,
                     const int64_t *restrict widths, int64_t count, int64_t threads) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t width = widths[i], blocks = (rows[i] + SQUARED_ROWS - 1) / SQUARED_ROWS;
        const float *x = addresses[i];
#pragma omp parallel for schedule(static) num_threads(worth(threads, rows[i] * width))
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t end = (b + 1) * SQUARED_ROWS;
            double sum = 0;
            for (int64_t r = b * SQUARED_ROWS; r < end && r < rows[i]; r++) {
                float squares = 0;
#pragma omp simd reduction(+ : squares)
                for (int64_t j = 0; j < width; j++) squares += x[r * width + j] * x[r * width + j];
                sum += squares;
            }
            room[b] = sum;
        }
        sums[i] = 0;
        for (int64_t b = 0; b < blocks; b++) sums[i] += room[b];
    }
}
