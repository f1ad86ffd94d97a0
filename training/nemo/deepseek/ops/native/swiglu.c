/* SwiGLU's product of gate and up, row by row, each with a weight of its own if there are any. */
#include <stdint.h>

#include "exponential.h"
#include "threads.h"

enum { EXPONENTIAL = 8 }; /* as long as so many multiplications, about */

/* hidden = silu(gate) * up * weights; all (rows, width) and contiguous, weights (rows) or NULL. */
void swiglu(float *restrict hidden, const float *restrict gate, const float *restrict up,
            const float *restrict weights, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(worth(threads, EXPONENTIAL *rows *width))
    for (int64_t r = 0; r < rows; r++) {
        const float weight = weights ? weights[r] : 1;
        const float *gate_r = gate + r * width, *up_r = up + r * width;
        float *hidden_r = hidden + r * width;
        for (int64_t i = 0; i < width; i++)
            hidden_r[i] = gate_r[i] / (1 + exponential(-gate_r[i])) * up_r[i] * weight;
    }
}

/* Gradients of gate, up and weights; `by_weights` is NULL if these are. `hidden`, which may be
 * `grad`, gets what the forward pass has made; NULL: it is not wanted. */
void swiglu_backward(float *restrict by_gate, float *restrict by_up, float *restrict by_weights,
                     float *hidden, const float *grad, const float *restrict gate,
                     const float *restrict up, const float *restrict weights, int64_t rows,
                     int64_t width, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(worth(threads, EXPONENTIAL *rows *width))
    for (int64_t r = 0; r < rows; r++) {
        const float weight = weights ? weights[r] : 1;
        const float *gate_r = gate + r * width, *up_r = up + r * width, *grad_r = grad + r * width;
        float *by_gate_r = by_gate + r * width, *by_up_r = by_up + r * width, by_weight = 0;
        float *hidden_r = hidden ? hidden + r * width : by_gate_r; /* overwritten there */
#pragma omp simd reduction(+ : by_weight)
        for (int64_t i = 0; i < width; i++) {
            const float open = 1 / (1 + exponential(-gate_r[i])), grad_i = grad_r[i];
            const float silu = gate_r[i] * open, by_product = silu * grad_i;
            by_weight += by_product * up_r[i];
            hidden_r[i] = silu * up_r[i] * weight;
            by_up_r[i] = by_product * weight;
            by_gate_r[i] = grad_i * up_r[i] * weight * open * (1 + gate_r[i] * (1 - open));
        }
        if (by_weights) by_weights[r] = by_weight;
    }
}
