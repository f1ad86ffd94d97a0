/* Rows of numbers on their way to experts and back; all tensors are contiguous. */
#include <stdint.h>
#include <string.h>

#include "threads.h"

/* A stable sort by expert: row order[i] comes to place i, and row i to place inverse[i]. `counts`
 * (experts) gets the rows of each. */
void sort_rows(int64_t *restrict order, int64_t *restrict inverse, int64_t *restrict counts,
               const int64_t *restrict experts_of_rows, int64_t rows, int64_t experts) {
    memset(counts, 0, experts * sizeof *counts);
    for (int64_t r = 0; r < rows; r++) counts[experts_of_rows[r]]++;
    int64_t place = 0;
    for (int64_t e = 0; e < experts; e++) { /* now the first place of each */
        const int64_t count = counts[e];
        counts[e] = place;
        place += count;
    }
    for (int64_t r = 0; r < rows; r++) {
        inverse[r] = counts[experts_of_rows[r]]++;
        order[inverse[r]] = r;
    }
    for (int64_t e = experts - 1; e > 0; e--) counts[e] -= counts[e - 1];
}

/* Padded counts, and the slots of the rows: see `aligned_slots`. Counts that do not add up to
 * `rows` write no slot beyond them. */
void align_rows(int64_t *restrict padded, int64_t *restrict slots, const int64_t *restrict counts,
                int64_t rows, int64_t experts, int64_t alignment, int64_t least) {
    int64_t slot = 0, row = 0;
    for (int64_t e = 0; e < experts; e++) {
        const int64_t held = counts[e] < least ? least : counts[e];
        padded[e] = (held + alignment - 1) / alignment * alignment;
        for (int64_t i = 0; i < counts[e] && row < rows; i++) slots[row++] = slot + i;
        slot += padded[e];
    }
}

/* starts (experts + 1): where each expert's rows begin, and where the last one's end; no counts
 * beyond `rows`. */
void row_starts(int64_t *restrict starts, const int64_t *restrict counts, int64_t experts,
                int64_t rows) {
    starts[0] = 0;
    for (int64_t e = 0; e < experts; e++) {
        const int64_t rest = rows - starts[e];
        starts[e + 1] = starts[e] + (counts[e] < rest ? counts[e] : rest);
    }
}

/* y[r] = x[index[r] / copies] */
void take_rows(float *restrict y, const float *restrict x, const int64_t *restrict index,
               int64_t rows, int64_t width, int64_t copies, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(worth(threads, rows *width))
    for (int64_t r = 0; r < rows; r++)
        memcpy(y + r * width, x + index[r] / copies * width, width * sizeof *y);
}

/* y[slots[r]] = x[r], and zeros elsewhere; slots ascend, of `num_slots`. */
void spread_rows(float *restrict y, const float *restrict x, const int64_t *restrict slots,
                 int64_t rows, int64_t num_slots, int64_t width, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(worth(threads, num_slots *width))
    for (int64_t r = 0; r <= rows; r++) { /* each with the empty slots before it */
        const int64_t begin = r > 0 ? slots[r - 1] + 1 : 0, end = r < rows ? slots[r] : num_slots;
        memset(y + begin * width, 0, (end - begin) * width * sizeof *y);
        if (r < rows) memcpy(y + end * width, x + r * width, width * sizeof *y);
    }
}

/* y[t] = the sum of the rows x[index[t, k]], in the order of k, one or more; and then of one[t] and
 * of two[t], each of them or NULL. */
void add_rows(float *restrict y, const float *restrict x, const int64_t *restrict index,
              const float *restrict one, const float *restrict two, int64_t tokens,
              int64_t choices, int64_t width, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(worth(threads, tokens *choices *width))
    for (int64_t t = 0; t < tokens; t++) {
        float *y_t = y + t * width;
        memcpy(y_t, x + index[t * choices] * width, width * sizeof *y);
        for (int64_t k = 1; k < choices; k++) {
            const float *x_r = x + index[t * choices + k] * width;
            for (int64_t i = 0; i < width; i++) y_t[i] += x_r[i];
        }
        if (one)
            for (int64_t i = 0; i < width; i++) y_t[i] += one[t * width + i];
        if (two)
            for (int64_t i = 0; i < width; i++) y_t[i] += two[t * width + i];
    }
}
