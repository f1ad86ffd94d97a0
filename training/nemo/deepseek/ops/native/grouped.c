/* Products of rows, sorted by expert, with each expert's own matrix, and the gradients of both.
 *
 * All is contiguous. Rows starts[e] to starts[e + 1] are those of expert e; `starts` has one number
 * more than there are experts. Each sum is added up in an order of its own: no result depends on
 * other rows, on where its row lies, nor on threads. */
#include "multiply.h"
#include "products.h"
#include "threads.h"

static int64_t rows_of_all(const int64_t *starts, int64_t experts) {
    return starts[experts] - starts[0];
}

/* y[r] = w[e(r)] x[r]; w (experts, outputs, inputs). */
void grouped_linear(float *y, const float *x, const float *w, const int64_t *starts,
                    int64_t experts, int64_t outputs, int64_t inputs, int64_t threads) {
    const int64_t work = rows_of_all(starts, experts) * outputs * inputs;
#pragma omp parallel for schedule(dynamic) num_threads(worth(threads, work))
    for (int64_t e = 0; e < experts; e++)
        dots(starts[e + 1] - starts[e], outputs, inputs, x + starts[e] * inputs, inputs,
             w + e * outputs * inputs, inputs, y + starts[e] * outputs, outputs);
}

/* x_grad[r] = y_grad[r] w[e(r)]. */
void grouped_linear_back(float *x_grad, const float *y_grad, const float *w,
                         const int64_t *starts, int64_t experts, int64_t outputs, int64_t inputs,
                         int64_t threads) {
    const int64_t work = rows_of_all(starts, experts) * outputs * inputs;
#pragma omp parallel for schedule(dynamic) num_threads(worth(threads, work))
    for (int64_t e = 0; e < experts; e++)
        sums(starts[e + 1] - starts[e], inputs, outputs, y_grad + starts[e] * outputs, outputs,
             w + e * outputs * inputs, inputs, x_grad + starts[e] * inputs, inputs, 0);
}

/* w_grad[e] = y_grad[rows of e]^T x[rows of e], or added to it. */
void grouped_outer(float *w_grad, const float *y_grad, const float *x, const int64_t *starts,
                   int64_t experts, int64_t outputs, int64_t inputs, int64_t adds,
                   int64_t threads) {
    const int64_t work = rows_of_all(starts, experts) * outputs * inputs;
    const int64_t whole = inputs / LANES * LANES;
#pragma omp parallel for schedule(dynamic) num_threads(worth(threads, work))
    for (int64_t e = 0; e < experts; e++) {
        const int64_t rows = starts[e + 1] - starts[e];
        const float *y_grad_e = y_grad + starts[e] * outputs, *x_e = x + starts[e] * inputs;
        float *w_grad_e = w_grad + e * outputs * inputs;
        if (adds)
            multiply(outputs, whole, rows, w_grad_e, inputs, y_grad_e, 1, outputs, x_e, inputs, 1);
        else
            multiply(outputs, whole, rows, w_grad_e, inputs, y_grad_e, 1, outputs, x_e, inputs, 0);
        for (int64_t o = 0; o < outputs; o++)
            for (int64_t i = whole; i < inputs; i++) {
                float sum = adds ? w_grad_e[o * inputs + i] : 0;
                for (int64_t r = 0; r < rows; r++)
                    sum += y_grad_e[r * outputs + o] * x_e[r * inputs + i];
                w_grad_e[o * inputs + i] = sum;
            }
    }
}
