/* Multi-head latent attention of new tokens over a cache, in its absorbed form.
 *
 * All heads of a sequence read its latents together, a block at a time, for scores and for the
 * weighted sum, while the block is in the nearest caches. The softmax is made on the way: what has
 * been added up so far is scaled down whenever a larger score appears.
 *
 * Sequences are shared by the threads, and parts of their caches where they are fewer.
 */
#include <math.h>

#include "decoding.h"
#include "exponential.h"
#include "products.h"
#include "threads.h"
#include "turn.h"

/* Tokens of a block. */
enum { BLOCK = 64 };
/* Columns of a matrix that one thread takes at a time. */
enum { COLUMNS = 64 };

typedef struct {
    int64_t sequences, tokens, heads;   /* tokens: new ones, of each sequence */
    int64_t nope, rope, latent, values; /* dims of a head, of a latent, of a head's values */
    int64_t start;                      /* tokens of each sequence that are in the cache */
    int64_t sequence_step, token_step;  /* of the cache */
    int64_t splits;                     /* parts of each cache */
} sizes;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* A new token's latent, normed, and its rotated key, to their place in the cache. */
static void keep(float *kept, const float *kv, const float *norm, const float *cos,
                 const float *sin, const sizes *n, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < n->latent; c++) squares += kv[c] * kv[c];
    float factor = 1 / sqrtf(squares / n->latent + eps);
    for (int64_t c = 0; c < n->latent; c++) kept[c] = kv[c] * factor * norm[c];
    turn(kept + n->latent, kv + n->latent, cos, sin, n->rope / 2, 1);
}

/* Attention of all heads of one sequence's new tokens to the slots `begin` to `end` of its cache:
 * `y` (rows, latent) is the sum of e^(score - largest) latents, `sum` that of the factors. A row
 * is a token and a head; those of padding see themselves alone. */
static void attend(float *y, float *largest, float *sum, const float *q, const float *kept,
                   int64_t padding, int64_t begin, int64_t end, float *scores, const sizes *n) {
    int64_t rows = n->tokens * n->heads, width = n->latent + n->rope;
    memset(y, 0, rows * n->latent * sizeof *y);
    for (int64_t r = 0; r < rows; r++) {
        largest[r] = -INFINITY;
        sum[r] = 0;
    }
    for (int64_t m = begin; m < end; m += BLOCK) {
        int64_t count = least(BLOCK, end - m);
        const float *block = kept + m * n->token_step;
        dots(rows, count, width, q, width, block, n->token_step, scores, BLOCK);
        for (int64_t r = 0; r < rows; r++) {
            float *scores_r = scores + r * BLOCK, new_largest = largest[r], added = 0;
            int64_t self = n->start + r / n->heads - m;
            int64_t from = most(0, least(padding - m, self)), to = least(count, self + 1);
            for (int64_t i = 0; i < least(from, count); i++) scores_r[i] = 0;
            for (int64_t i = most(to, 0); i < count; i++) scores_r[i] = 0;
            if (from >= to) continue; /* nothing here that it may see */
#pragma omp simd reduction(max : new_largest)
            for (int64_t i = from; i < to; i++)
                new_largest = scores_r[i] > new_largest ? scores_r[i] : new_largest;
            if (new_largest > largest[r]) {
                float factor = exponential(largest[r] - new_largest);
                for (int64_t c = 0; c < n->latent; c++) y[r * n->latent + c] *= factor;
                sum[r] *= factor;
                largest[r] = new_largest;
            }
#pragma omp simd reduction(+ : added)
            for (int64_t i = from; i < to; i++) {
                scores_r[i] = exponential(scores_r[i] - new_largest);
                added += scores_r[i];
            }
            sum[r] += added;
        }
        sums(rows, n->latent, count, scores, BLOCK, block, n->token_step, y, n->latent, 1);
    }
}

/* One row of the parts of a cache as if it had been whole, to `y`. */
static void merge(float *y, const float *parts, const float *largest, const float *sum,
                  int64_t part_rows, const sizes *n) {
    float all = -INFINITY, total = 0;
    for (int64_t s = 0; s < n->splits; s++) all = fmaxf(all, largest[s * part_rows]);
    for (int64_t s = 0; s < n->splits; s++)
        total += sum[s * part_rows] * exponential(largest[s * part_rows] - all);
    for (int64_t s = 0; s < n->splits; s++) {
        float factor = exponential(largest[s * part_rows] - all) / total;
        const float *part = parts + s * part_rows * n->latent;
        for (int64_t c = 0; c < n->latent; c++)
            y[c] = s ? y[c] + factor * part[c] : factor * part[c];
    }
}

/* y (sequences, tokens, heads, values), contiguous as all but the cache is:
 *
 *   q (sequences, tokens, heads, nope + rope), not rotated;
 *   kv (sequences, tokens, latent + rope), neither normed nor rotated; norm (latent);
 *   cos, sin (sequences, tokens, rope / 2);
 *   wkv_b (heads, nope + values, latent);
 *   cache (sequences, at least start + tokens, latent + rope), gets the new tokens;
 *   padding (sequences): slots at the left that hold no token.
 *
 * With R = sequences tokens heads and X = latent + rope, `work` has room for
 * R X + R latent + splits R (latent + 2) + threads tokens heads 64. */
void latent_attention(float *y, const float *q, const float *kv, const float *norm,
                      const float *cos, const float *sin, const float *wkv_b, float *cache,
                      const int64_t *padding, float *work, int64_t sequences, int64_t tokens,
                      int64_t heads, int64_t nope, int64_t rope, int64_t latent, int64_t values,
                      int64_t start, int64_t sequence_step, int64_t token_step, int64_t splits,
                      float eps, float scale, int64_t threads) {
    const sizes n = {sequences, tokens, heads,         nope,       rope,  latent,
                     values,    start,  sequence_step, token_step, splits};
    int64_t new_tokens = sequences * tokens, rows = new_tokens * heads, width = latent + rope;
    int64_t q_head = nope + rope, w_head = (nope + values) * latent;
    int64_t sequence_rows = tokens * heads, end = start + tokens;
    float *absorbed = work, *merged = absorbed + rows * width, *parts = merged + rows * latent;
    float *largest = parts + splits * rows * latent, *sum = largest + splits * rows;
    float *scores = sum + splits * rows;
    int64_t work_done = rows * (nope + values) * latent + rows * (2 * latent + rope) * end;
#pragma omp parallel num_threads(worth(threads, work_done))
    {
        /* 1. New tokens into the cache; queries as latents: q W_uk, then the rotated part. */
#pragma omp for nowait
        for (int64_t t = 0; t < new_tokens; t++) {
            int64_t slot = t / tokens * sequence_step + (start + t % tokens) * token_step;
            const float *cos_t = cos + t * rope / 2, *sin_t = sin + t * rope / 2;
            keep(cache + slot, kv + t * width, norm, cos_t, sin_t, &n, eps);
            for (int64_t h = 0; h < heads; h++) {
                float *turned = absorbed + (t * heads + h) * width + latent;
                turn(turned, q + (t * heads + h) * q_head + nope, cos_t, sin_t, rope / 2, 1);
                for (int64_t i = 0; i < rope; i++) turned[i] *= scale;
            }
        }
        int64_t columns = (latent + COLUMNS - 1) / COLUMNS;
#pragma omp for
        for (int64_t i = 0; i < heads * columns; i++) {
            int64_t h = i / columns, c = i % columns * COLUMNS, some = least(COLUMNS, latent - c);
            float *absorbed_h = absorbed + h * width + c;
            sums(new_tokens, some, nope, q + h * q_head, heads * q_head, wkv_b + h * w_head + c,
                 latent, absorbed_h, heads * width, 0);
            for (int64_t t = 0; t < new_tokens; t++)
                for (int64_t j = 0; j < some; j++) absorbed_h[t * heads * width + j] *= scale;
        }
        /* 2. Attention over the cache. */
#pragma omp for
        for (int64_t i = 0; i < sequences * splits; i++) {
            int64_t b = i / splits, s = i % splits, part = (b * splits + s) * sequence_rows;
            int64_t first = least(padding[b], start), seen = end - first;
            attend(parts + part * latent, largest + part, sum + part,
                   absorbed + b * sequence_rows * width, cache + b * sequence_step, padding[b],
                   first + s * seen / splits, first + (s + 1) * seen / splits,
                   scores + omp_get_thread_num() * sequence_rows * BLOCK, &n);
        }
#pragma omp for
        for (int64_t r = 0; r < rows; r++) {
            int64_t part = r / sequence_rows * splits * sequence_rows + r % sequence_rows;
            merge(merged + r * latent, parts + part * latent, largest + part, sum + part,
                  sequence_rows, &n);
        }
        /* 3. Values of each head: W_uv y. */
        columns = (values + COLUMNS - 1) / COLUMNS;
#pragma omp for
        for (int64_t i = 0; i < heads * columns; i++) {
            int64_t h = i / columns, u = i % columns * COLUMNS;
            dots(new_tokens, least(COLUMNS, values - u), latent, merged + h * latent,
                 heads * latent, wkv_b + h * w_head + (nope + u) * latent, latent,
                 y + h * values + u, heads * values);
        }
    }
}
