/* Cross-entropy of logits, row by row, and its gradient in their place. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "exponential.h"
#include "threads.h"

/* Numbers of a row that are added up in fp32; the sums of these in fp64. */
enum { STRETCH = 1024, EXPONENTIAL = 8 };
/* The label of a row that has none. */
enum { NONE = -100 };

/* losses[r] = -log softmax(logits[r])[labels[r]]; 0 for NONE, and NaN for any other label that is
 * no place in a row: nothing is read or written there. The logits (rows, width) are overwritten, if
 * `needs_gradient` by the gradient of the loss. */
void softmax_loss(float *restrict losses, float *restrict logits, const int64_t *restrict labels,
                  int64_t rows, int64_t width, int64_t needs_gradient, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(worth(threads, EXPONENTIAL *rows *width))
    for (int64_t r = 0; r < rows; r++) {
        float *x = logits + r * width, most = -INFINITY;
        if (labels[r] < 0 || labels[r] >= width) {
            losses[r] = labels[r] == NONE ? 0 : NAN;
            if (needs_gradient) memset(x, 0, width * sizeof *x);
            continue;
        }
        /* less the largest, so that no exponential overflows */
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < width; i++) most = x[i] > most ? x[i] : most;
        const float label = x[labels[r]] - most;
        double sum = 0;
        for (int64_t begin = 0; begin < width; begin += STRETCH) {
            const int64_t end = begin + STRETCH < width ? begin + STRETCH : width;
            float part = 0;
#pragma omp simd reduction(+ : part)
            for (int64_t i = begin; i < end; i++) {
                x[i] = exponential(x[i] - most);
                part += x[i];
            }
            sum += part;
        }
        losses[r] = (float)(log(sum) - label);
        if (!needs_gradient) continue;
        const float by = (float)(1 / sum); /* softmax, less 1 at the label */
        for (int64_t i = 0; i < width; i++) x[i] *= by;
        x[labels[r]] -= 1;
    }
}
