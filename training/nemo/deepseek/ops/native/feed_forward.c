/* SwiGLU feed-forward of few rows, w2(silu(w1 x) * w3 x): one, or the chosen experts of a stack.
 *
 * The weights of an expert are read once for all of its rows. Each thread has the same part of
 * every expert's hidden values, and then of its results, so that none waits for another whose
 * expert has more rows.
 */
#include "decoding.h"
#include "exponential.h"
#include "products.h"
#include "threads.h"

/* The hidden values `mine` of some rows, (rows, width) as `up` is, which is used meanwhile;
 * `weights` of the rows, or NULL: 1. */
static void hidden_values(float *hidden, float *up, const float *x, const float *w1,
                          const float *w3, const float *weights, part mine, int64_t rows,
                          int64_t dim, int64_t width) {
    int64_t outputs = mine.end - mine.begin;
    float *hidden_m = hidden + mine.begin, *up_m = up + mine.begin;
    dots(rows, outputs, dim, x, dim, w1 + mine.begin * dim, dim, hidden_m, width);
    dots(rows, outputs, dim, x, dim, w3 + mine.begin * dim, dim, up_m, width);
    for (int64_t r = 0; r < rows; r++) {
        float weight = weights ? weights[r] : 1;
        float *hidden_r = hidden_m + r * width;
        const float *up_r = up_m + r * width;
        for (int64_t i = 0; i < outputs; i++) {
            float silu = hidden_r[i] / (1 + exponential(-hidden_r[i]));
            hidden_r[i] = silu * up_r[i] * weight;
        }
    }
}

/* y (rows, dim) of x (rows, dim), w1 and w3 (width, dim), w2 (dim, width); contiguous.
 * `work`: 2 rows width numbers. */
void feed_forward(float *y, const float *x, const float *w1, const float *w3, const float *w2,
                  float *work, int64_t rows, int64_t dim, int64_t width, int64_t threads) {
    float *hidden = work, *up = work + rows * width;
#pragma omp parallel num_threads(worth(threads, 3 * rows *dim *width))
    {
        hidden_values(hidden, up, x, w1, w3, NULL, my_part(width, TILE_WIDTH), rows, dim, width);
#pragma omp barrier
        part mine = my_part(dim, TILE_WIDTH);
        dots(rows, mine.end - mine.begin, width, hidden, width, w2 + mine.begin * width, width,
             y + mine.begin, dim);
    }
}

/* y (tokens, dim) = sum over the choices of weights times the expert's result; ids and weights
 * (tokens, choices), stacks w1 and w3 (experts, width, dim), w2 (experts, dim, width); contiguous.
 * Of R = tokens choices rows, `order` has room for 2 R + experts + 1, `work` for R (dim + 2 width
 * + 1). */
void few_experts(float *y, const float *x, const int64_t *ids, const float *weights,
                 const float *w1, const float *w3, const float *w2, int64_t *order, float *work,
                 int64_t tokens, int64_t choices, int64_t experts, int64_t dim, int64_t width,
                 int64_t threads) {
    int64_t all = tokens * choices, size = dim * width;
    int64_t *place = order + all, *begin = order + 2 * all;
    float *rows = work, *hidden = rows + all * dim, *up = hidden + all * width;
    float *weight = up + all * width;
    /* Rows by expert, as they come: begin[e] of the expert, place[i] of choice i. */
    memset(begin, 0, (experts + 1) * sizeof *begin);
    for (int64_t i = 0; i < all; i++) begin[ids[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) begin[e + 1] += begin[e];
    for (int64_t i = 0; i < all; i++) {
        place[i] = begin[ids[i]]++;
        order[place[i]] = i;
        weight[place[i]] = weights[i];
    }
    memmove(begin + 1, begin, experts * sizeof *begin); /* each is now where the next one begins */
    begin[0] = 0;
#pragma omp parallel num_threads(worth(threads, 3 * all *size))
    {
        part mine = my_part(all, 1);
        for (int64_t i = mine.begin; i < mine.end; i++)
            memcpy(rows + i * dim, x + order[i] / choices * dim, dim * sizeof *rows);
#pragma omp barrier
        mine = my_part(width, TILE_WIDTH);
        for (int64_t e = 0; e < experts; e++) {
            int64_t first = begin[e], count = begin[e + 1] - first;
            if (count)
                hidden_values(hidden + first * width, up + first * width, rows + first * dim,
                              w1 + e * size, w3 + e * size, weight + first, mine, count, dim,
                              width);
        }
#pragma omp barrier
        /* Results take the place of the rows, which nobody needs any more. */
        mine = my_part(dim, TILE_WIDTH);
        for (int64_t e = 0; e < experts; e++) {
            int64_t first = begin[e], count = begin[e + 1] - first;
            if (count)
                dots(count, mine.end - mine.begin, width, hidden + first * width, width,
                     w2 + e * size + mine.begin * width, width, rows + first * dim + mine.begin,
                     dim);
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t k = 0; k < choices; k++) {
                const float *row = rows + place[t * choices + k] * dim;
                float *y_t = y + t * dim;
                for (int64_t i = mine.begin; i < mine.end; i++)
                    y_t[i] = k ? y_t[i] + row[i] : row[i];
            }
    }
}
