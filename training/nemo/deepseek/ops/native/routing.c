/* What a router decides, token by token; all tensors are contiguous. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "decoding.h"
#include "products.h"
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
#pragma omp parallel for schedule(static) num_threads(worth(threads, 16 * rows *width))
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
    const int64_t work = 8 * sequences * tokens * experts;
#pragma omp parallel for schedule(static) num_threads(worth(threads, work))
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

/* Of each layer, `sums` (layers, 2): how far the last of a real token's chosen experts lies above
 * the best other one, over the tokens of which that is a finite number, and how many these are.
 * The others have an address for each layer. */
void margin_sums(double *restrict sums, const float *const *choice, const int64_t *const *chosen,
                 const char *const *real, int64_t layers, int64_t tokens, int64_t experts,
                 int64_t choices) {
    char is_chosen[experts];
    memset(is_chosen, 0, experts);
    memset(sums, 0, 2 * layers * sizeof *sums);
    for (int64_t i = 0; i < layers * tokens; i++) {
        const int64_t layer = i / tokens, t = i % tokens;
        if (!real[layer][t]) continue;
        const float *x = choice[layer] + t * experts;
        const int64_t *places = chosen[layer] + t * choices;
        float last = INFINITY, next = -INFINITY;
        for (int64_t k = 0; k < choices; k++) {
            is_chosen[places[k]] = 1;
            if (x[places[k]] < last || isnan(x[places[k]])) last = x[places[k]];
        }
        for (int64_t e = 0; e < experts; e++)
            if (!is_chosen[e] && is_larger(x[e], next)) next = x[e];
        for (int64_t k = 0; k < choices; k++) is_chosen[places[k]] = 0;
        if (!isfinite(last - next)) continue;
        sums[layer * 2] += last - next;
        sums[layer * 2 + 1] += 1;
    }
}

/* The balance loss of sums (sequences, 2 experts + 1), and its gradient by them. */
void balance_loss(float *restrict loss, float *restrict by_sums, const float *restrict sums,
                  int64_t sequences, int64_t experts, int64_t choices) {
    double all = 0;
    memset(by_sums, 0, sequences * (2 * experts + 1) * sizeof *by_sums);
    for (int64_t b = 0; b < sequences; b++) {
        const float *chosen = sums + b * (2 * experts + 1), *share = chosen + experts;
        float *by_share = by_sums + b * (2 * experts + 1) + experts;
        const float length = share[experts] < 1 ? 1 : share[experts];
        for (int64_t e = 0; e < experts; e++) {
            by_share[e] = chosen[e] / length * ((float)experts / choices);
            all += by_share[e] * share[e];
        }
    }
    *loss = (float)all;
}

/* How many real tokens have chosen each expert. */
void count_experts(int64_t *restrict counts, const int64_t *restrict chosen,
                   const char *restrict real, int64_t tokens, int64_t experts, int64_t choices) {
    memset(counts, 0, experts * sizeof *counts);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < choices; k++) counts[chosen[t * choices + k]] += real[t];
}

/* -inf for all experts outside of the best groups. Those with the largest score, or the largest
 * sum of their two largest. */
static void mask_groups(float *choice, int64_t experts, int64_t groups, int64_t kept,
                        int64_t best) {
    int64_t size = experts / groups, places[best > kept ? best : kept];
    float score[groups];
    char chosen[groups];
    memset(chosen, 0, groups);
    for (int64_t g = 0; g < groups; g++) {
        const float *choice_g = choice + g * size;
        find_largest(places, choice_g, size, best);
        score[g] = 0;
        for (int64_t i = 0; i < best; i++) score[g] += choice_g[places[i]];
    }
    find_largest(places, score, groups, kept);
    for (int64_t i = 0; i < kept; i++) chosen[places[i]] = 1;
    for (int64_t e = 0; e < experts; e++)
        if (!chosen[e / size]) choice[e] = -INFINITY;
}

/* The whole decision for few tokens: logits and scores (tokens, experts), ids and weights (tokens,
 * choices), of x (tokens, dim), w (experts, dim) and bias (experts) or NULL; contiguous.
 *
 *   softmax: how scores are made; 0: sigmoid.
 *   groups, kept: only the experts of so many groups; one group: all.
 *   best: numbers of a group that are its score.
 *   normalise: weights sum to `factor`; 0: they are scores times it. */
void route(float *logits, float *scores, int64_t *ids, float *weights, const float *x,
           const float *w, const float *bias, int64_t tokens, int64_t experts, int64_t choices,
           int64_t dim, int64_t softmax, int64_t groups, int64_t kept, int64_t best,
           int64_t normalise, float factor, int64_t threads) {
#pragma omp parallel num_threads(worth(threads, tokens *experts *dim))
    {
        part mine = my_part(experts, TILE_WIDTH);
        dots(tokens, mine.end - mine.begin, dim, x, dim, w + mine.begin * dim, dim,
             logits + mine.begin, experts);
#pragma omp barrier
#pragma omp for
        for (int64_t t = 0; t < tokens; t++) {
            const float *logits_t = logits + t * experts;
            float *scores_t = scores + t * experts, choice[experts], sum = 0;
            int64_t *ids_t = ids + t * choices;
            if (softmax) {
                int64_t most_at = 0;
                find_largest(&most_at, logits_t, experts, 1);
                float most = logits_t[most_at];
                for (int64_t e = 0; e < experts; e++) sum += scores_t[e] = expf(logits_t[e] - most);
                for (int64_t e = 0; e < experts; e++) scores_t[e] /= sum;
            } else {
                for (int64_t e = 0; e < experts; e++) scores_t[e] = 1 / (1 + expf(-logits_t[e]));
            }
            for (int64_t e = 0; e < experts; e++) choice[e] = scores_t[e] + (bias ? bias[e] : 0);
            if (groups > 1) mask_groups(choice, experts, groups, kept, best);
            find_largest(ids_t, choice, experts, choices);
            /* The bias chooses, but does not weigh. */
            weigh_experts(weights + t * choices, scores_t, ids_t, 1, experts, choices, normalise,
                          factor);
        }
    }
}
