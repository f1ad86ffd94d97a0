/* The router's decision for few tokens: which experts, and with what weights. */
#include <math.h>

#include "products.h"
#include "threads.h"

/* The first of the largest numbers that are not taken; what is no number is the largest of all,
 * as it is for torch. Always one of them: its place is an address. */
static int64_t largest(const float *x, const char *taken, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || x[i] > x[best] || (x[i] != x[i] && x[best] == x[best])))
            best = i;
    return best;
}

/* -inf for all experts outside of the best groups. Those with the largest score, or the largest
 * sum of their two largest. */
static void mask_groups(float *choice, int64_t experts, int64_t groups, int64_t kept, int64_t best) {
    int64_t size = experts / groups;
    float score[groups];
    char taken[experts], chosen[groups];
    memset(taken, 0, experts);
    memset(chosen, 0, groups);
    for (int64_t g = 0; g < groups; g++) {
        score[g] = 0;
        for (int64_t i = 0; i < best; i++) {
            int64_t e = largest(choice + g * size, taken + g * size, size);
            taken[g * size + e] = 1;
            score[g] += choice[g * size + e];
        }
    }
    for (int64_t i = 0; i < kept; i++) chosen[largest(score, chosen, groups)] = 1;
    for (int64_t e = 0; e < experts; e++)
        if (!chosen[e / size]) choice[e] = -INFINITY;
}

/* Logits and scores (tokens, experts), ids and weights (tokens, choices), of x (tokens, dim), w
 * (experts, dim) and bias (experts) or NULL; contiguous.
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
            char taken[experts];
            memset(taken, 0, experts);
            if (softmax) {
                float most = logits_t[largest(logits_t, taken, experts)];
                for (int64_t e = 0; e < experts; e++) sum += scores_t[e] = expf(logits_t[e] - most);
                for (int64_t e = 0; e < experts; e++) scores_t[e] /= sum;
            } else {
                for (int64_t e = 0; e < experts; e++) scores_t[e] = 1 / (1 + expf(-logits_t[e]));
            }
            for (int64_t e = 0; e < experts; e++) choice[e] = scores_t[e] + (bias ? bias[e] : 0);
            if (groups > 1) mask_groups(choice, experts, groups, kept, best);
            sum = 0;
            for (int64_t k = 0; k < choices; k++) {
                int64_t e = largest(choice, taken, experts);
                taken[e] = 1;
                ids[t * choices + k] = e;
                /* The bias chooses, but does not weigh. */
                sum += weights[t * choices + k] = scores_t[e];
            }
            for (int64_t k = 0; k < choices; k++)
                weights[t * choices + k] *= normalise ? factor / (sum + 1e-20f) : factor;
        }
    }
}
