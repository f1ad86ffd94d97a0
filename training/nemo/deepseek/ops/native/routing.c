/* The router's small steps, token by token; all tensors are contiguous. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "threads.h"

/* NaN is larger than all, as to torch. */
static inline int is_larger(float one, float other) {
    return one > other || (isnan(one) && !isnan(other));
}

/* The places of the `wanted` largest, the largest first, and the first of equal ones. */
static inline void find_largest(int64_t *places, const float *x, int64_t count, int64_t wanted) {
    for (int64_t i = 0; i < count; i++) {
        int64_t at = i < wanted ? i : wanted;
        while (at > 0 && is_larger(x[i], x[places[at - 1]])) {
            if (at < wanted) places[at] = places[at - 1];
            at--;
        }
        if (at < wanted) places[at] = i;
    }
}

/* `places` (rows, wanted) of each row. */
void largest_places(int64_t *restrict places, const float *restrict x, int64_t rows, int64_t width,
                    int64_t wanted, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(worth(threads, 4 * rows *width))
    for (int64_t r = 0; r < rows; r++)
        find_largest(places + r * wanted, x + r * width, width, wanted);
}

/* Weights of the chosen experts (tokens, choices): their scores, over their sum if `normalises`,
 * times `factor`. */
void weigh_experts(float *restrict weights, const float *restrict scores,
                   const int64_t *restrict chosen, int64_t tokens, int64_t experts,
                   int64_t choices, int64_t normalises, float factor) {
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t *chosen_t = chosen + t * choices;
        float sum = 0;
        for (int64_t k = 0; k < choices; k++) sum += scores[t * experts + chosen_t[k]];
        const float by = normalises ? factor / (sum + 1e-20f) : factor;
        for (int64_t k = 0; k < choices; k++)
            weights[t * choices + k] = scores[t * experts + chosen_t[k]] * by;
    }
}

void weigh_experts_backward(float *restrict by_scores, const float *restrict grad,
                            const float *restrict scores, const int64_t *restrict chosen,
                            int64_t tokens, int64_t experts, int64_t choices, int64_t normalises,
                            float factor) {
    memset(by_scores, 0, tokens * experts * sizeof *by_scores);
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t *chosen_t = chosen + t * choices;
        const float *grad_t = grad + t * choices, *scores_t = scores + t * experts;
        float sum = 1e-20f, along = 0, by = factor;
        if (normalises) {
            for (int64_t k = 0; k < choices; k++) sum += scores_t[chosen_t[k]];
            for (int64_t k = 0; k < choices; k++) along += grad_t[k] * scores_t[chosen_t[k]];
            by /= sum;
            along /= sum;
        }
        for (int64_t k = 0; k < choices; k++)
            by_scores[t * experts + chosen_t[k]] += (grad_t[k] - along) * by;
    }
}

/* What the balance loss of each sequence is made of, sums (sequences, 2 experts + 1) over its real
 * tokens: how many have an expert among their `choices` largest scores, its share of their scores,
 * and how many tokens there are. */
void sequence_sums(float *restrict sums, const float *restrict scores, const char *restrict real,
                   int64_t sequences, int64_t tokens, int64_t experts, int64_t choices,
                   int64_t threads) {
    const int64_t work = 8 * sequences * tokens * experts;
#pragma omp parallel for schedule(static) num_threads(worth(threads, work))
    for (int64_t b = 0; b < sequences; b++) {
        float *chosen = sums + b * (2 * experts + 1), *share = chosen + experts;
        int64_t places[choices];
        memset(chosen, 0, (2 * experts + 1) * sizeof *sums);
        for (int64_t t = b * tokens; t < (b + 1) * tokens; t++) {
            if (!real[t]) continue;
            const float *scores_t = scores + t * experts;
            float all = 0;
            for (int64_t e = 0; e < experts; e++) all += scores_t[e];
            for (int64_t e = 0; e < experts; e++) share[e] += scores_t[e] / all;
            find_largest(places, scores_t, experts, choices);
            for (int64_t k = 0; k < choices; k++) chosen[places[k]] += 1;
            share[experts] += 1;
        }
    }
}

/* `by_sums` (sequences, 2 experts + 1): shares alone have a gradient by scores. */
void sequence_sums_backward(float *restrict by_scores, const float *restrict by_sums,
                            const float *restrict scores, const char *restrict real,
                            int64_t sequences, int64_t tokens, int64_t experts, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(worth(threads, sequences *tokens *experts))
    for (int64_t t = 0; t < sequences * tokens; t++) {
        const float *by_share = by_sums + t / tokens * (2 * experts + 1) + experts;
        const float *scores_t = scores + t * experts;
        float *by_t = by_scores + t * experts, all = 0, along = 0;
        for (int64_t e = 0; e < experts; e++) all += scores_t[e];
        for (int64_t e = 0; e < experts; e++) along += by_share[e] * scores_t[e];
        for (int64_t e = 0; e < experts; e++)
            by_t[e] = real[t] ? (by_share[e] - along / all) / all : 0;
    }
}

/* How many real tokens have chosen each expert. */
void count_experts(int64_t *restrict counts, const int64_t *restrict chosen,
                   const char *restrict real, int64_t tokens, int64_t experts, int64_t choices) {
    memset(counts, 0, experts * sizeof *counts);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < choices; k++) counts[chosen[t * choices + k]] += real[t];
}
