/* RMSNorm, row by row: a row's numbers do not depend on how many rows there are. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "decoding.h"
#include "threads.h"

/* y = x / rms(x) * w; x (rows, width) with `x_step` numbers from a row to the next, y contiguous;
 * `scale` (rows) gets 1 / rms(x). */
void rms_norm(float *restrict y, float *restrict scale, const float *restrict x,
              const float *restrict w, int64_t rows, int64_t width, int64_t x_step, float eps,
              int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(worth(threads, rows *width))
    for (int64_t r = 0; r < rows; r++) {
        const float *x_r = x + r * x_step;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += x_r[i] * x_r[i];
        const float factor = 1 / sqrtf(squares / width + eps);
        scale[r] = factor;
        for (int64_t i = 0; i < width; i++) y[r * width + i] = x_r[i] * factor * w[i];
    }
}

/* Rows whose part of a weight's gradient is added up by itself: a sum's order is that of the rows,
 * whatever the number of threads. */
enum { BLOCK = 32 };

/* `by_x` (rows, width), `by_w` (width) or NULL; `parts` (rows / BLOCK, rounded up, width) is used
 * for `by_w`. `grad` is contiguous, and so is `plus`, which is added to `by_x`, or NULL. */
void rms_norm_backward(float *restrict by_x, float *restrict by_w, float *restrict parts,
                       const float *restrict grad, const float *restrict x,
                       const float *restrict w, const float *restrict scale,
                       const float *restrict plus, int64_t rows, int64_t width, int64_t x_step,
                       int64_t threads) {
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(worth(threads, 2 * rows *width))
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t end = (b + 1) * BLOCK < rows ? (b + 1) * BLOCK : rows;
        float *part = parts + b * width;
        if (by_w) memset(part, 0, width * sizeof *part);
        for (int64_t r = b * BLOCK; r < end; r++) {
            const float *x_r = x + r * x_step, *grad_r = grad + r * width;
            const float factor = scale[r];
            float along = 0; /* how much the gradient would change rms(x) */
#pragma omp simd reduction(+ : along)
            for (int64_t i = 0; i < width; i++) along += grad_r[i] * x_r[i] * w[i];
            along *= -factor * factor * factor / width;
            for (int64_t i = 0; i < width; i++)
                by_x[r * width + i] = grad_r[i] * w[i] * factor + x_r[i] * along;
            if (plus)
                for (int64_t i = 0; i < width; i++) by_x[r * width + i] += plus[r * width + i];
            if (by_w)
                for (int64_t i = 0; i < width; i++) part[i] += grad_r[i] * x_r[i] * factor;
        }
    }
    if (!by_w) return;
    memset(by_w, 0, width * sizeof *by_w);
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = 0; i < width; i++) by_w[i] += parts[b * width + i];
}
