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

/* Where in a tensor's blocks a place is that lies so many numbers from its first. */
static int64_t block_at(int64_t place, int64_t width, int64_t blocks) {
    const int64_t size = SQUARED_ROWS * width, block = place > 0 ? (place + size - 1) / size : 0;
    return block < blocks ? block : blocks;
}

/* Of a block; `left`: rows from its first on. */
static double squares_of_block(const float *x, int64_t left, int64_t width) {
    const int64_t here = left < SQUARED_ROWS ? left : SQUARED_ROWS, each = here / STREAMS;
    double sum = 0;
    for (int64_t r = 0; r < each; r++) sum += squares_of_rows(x + r * width, each * width, width);
    for (int64_t r = STREAMS * each; r < here; r++) sum += squares_of_row(x + r * width, width);
    return sum;
}

/* Adds to sums[kinds[i]] the squares of a tensor of rows[i] rows of widths[i] numbers at
 * addresses[i], divided by divisors[i]. `room` has a number for each SQUARED_ROWS of each tensor.
 * The threads share all blocks evenly, not those of each tensor, which may be one. */
void sums_of_squares(double *restrict sums, double *restrict room,
                     const float *const *restrict addresses, const int64_t *restrict rows,
                     const int64_t *restrict widths, const int64_t *restrict kinds,
                     const int64_t *restrict divisors, int64_t count, int64_t threads) {
    int64_t all = 0;
    for (int64_t i = 0; i < count; i++) all += rows[i] * widths[i];
#pragma omp parallel num_threads(worth(threads, all))
    {
        const part mine = my_part(all, 1);
        double *sums_of_blocks = room;
        for (int64_t i = 0, first = 0; i < count; first += rows[i] * widths[i], i++) {
            const int64_t width = widths[i], blocks = (rows[i] + SQUARED_ROWS - 1) / SQUARED_ROWS;
            const int64_t end = block_at(mine.end - first, width, blocks);
            for (int64_t b = block_at(mine.begin - first, width, blocks); b < end; b++) {
                const int64_t r = b * SQUARED_ROWS;
                sums_of_blocks[b] = squares_of_block(addresses[i] + r * width, rows[i] - r, width);
            }
            sums_of_blocks += blocks;
        }
    }
    for (int64_t i = 0; i < count; i++) {
        double of_all = 0;
        for (int64_t r = 0; r < rows[i]; r += SQUARED_ROWS) of_all += *room++;
        sums[kinds[i]] += of_all / divisors[i];
    }
}
