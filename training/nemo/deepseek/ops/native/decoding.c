/* A half of a block, with the norm before it and the residual addition behind, for few tokens: what
 * calls the kernels one by one from Python takes as long as some of them. */
#include "decoding.h"

/* y = h + y, of so many numbers. */
static void add_to(float *restrict y, const float *restrict h, int64_t count) {
    for (int64_t i = 0; i < count; i++) y[i] += h[i];
}

/* y and h (sequences, tokens, dim), contiguous as all weights are: `wq_a` (q_latent, dim) and its
 * norm are NULL where queries have no latent, of q_latent = dim then; `wq_b` (heads (nope + rope),
 * q_latent), `wkv_a` (latent + rope, dim), `wo` (dim, heads values). The rest as in
 * `latent_attention`.
 *
 * With T = sequences tokens, `work` has room for T (dim + 1 + 2 q_latent + heads (nope + rope) +
 * latent + rope + heads values) besides what that needs. */
void decode_attention(float *y, const float *h, const float *norm, const float *wq_a,
                      const float *q_norm, const float *wq_b, const float *wkv_a,
                      const float *kv_norm, const float *cos, const float *sin,
                      const float *wkv_b, const float *wo, float *cache, const int64_t *padding,
                      float *work, int64_t dim, int64_t q_latent, int64_t sequences,
                      int64_t tokens, int64_t heads, int64_t nope, int64_t rope, int64_t latent,
                      int64_t values, int64_t start, int64_t sequence_step, int64_t token_step,
                      int64_t splits, float eps, float scale, int64_t threads) {
    int64_t rows = sequences * tokens, q_width = heads * (nope + rope), kv_width = latent + rope;
    float *x = work, *scales = x + rows * dim, *down = scales + rows;
    float *normed = down + rows * q_latent, *q = normed + rows * q_latent;
    float *kv = q + rows * q_width, *of_heads = kv + rows * kv_width;
    rms_norm(x, scales, h, norm, rows, dim, dim, eps, threads);
    linear(kv, x, wkv_a, rows, kv_width, dim, threads);
    if (wq_a) {
        linear(down, x, wq_a, rows, q_latent, dim, threads);
        rms_norm(normed, scales, down, q_norm, rows, q_latent, q_latent, eps, threads);
    }
    linear(q, wq_a ? normed : x, wq_b, rows, q_width, q_latent, threads);
    latent_attention(of_heads, q, kv, kv_norm, cos, sin, wkv_b, cache, padding,
                     of_heads + rows * heads * values, sequences, tokens, heads, nope, rope,
                     latent, values, start, sequence_step, token_step, splits, eps, scale,
                     threads);
    linear(y, of_heads, wo, rows, dim, heads * values, threads);
    add_to(y, h, rows * dim);
}

/* y and h (rows, dim), weights as in `feed_forward`; `work`: rows (dim + 1 + 2 width). */
void decode_feed_forward(float *y, const float *h, const float *norm, const float *w1,
                         const float *w3, const float *w2, float *work, int64_t rows, int64_t dim,
                         int64_t width, float eps, int64_t threads) {
    float *x = work, *scales = x + rows * dim;
    rms_norm(x, scales, h, norm, rows, dim, dim, eps, threads);
    feed_forward(y, x, w1, w3, w2, scales + rows, rows, dim, width, threads);
    add_to(y, h, rows * dim);
}

/* y and h (tokens, dim); what the router decides, `scores` (tokens, experts) and `ids` (tokens,
 * choices), and its arguments as in `route`; stacks and `order` as in `few_experts`, and of the
 * experts that all tokens share, or NULL, as in `feed_forward`.
 *
 * With T tokens and R = T choices rows, `work` has room for T (2 dim + 1 + experts + choices + 2
 * shared_width) + R (dim + 2 width + 1). */
void decode_mixture(float *y, float *scores, int64_t *ids, const float *h, const float *norm,
                    const float *gate, const float *bias, const float *w1, const float *w3,
                    const float *w2, const float *shared_w1, const float *shared_w3,
                    const float *shared_w2, int64_t *order, float *work, int64_t tokens,
                    int64_t choices, int64_t experts, int64_t dim, int64_t width,
                    int64_t shared_width, int64_t softmax, int64_t groups, int64_t kept,
                    int64_t best, int64_t normalise, float factor, float eps, int64_t threads) {
    int64_t count = tokens * dim;
    float *x = work, *shared = x + count, *scales = shared + count, *logits = scales + tokens;
    float *weights = logits + tokens * experts, *rest = weights + tokens * choices;
    float *rows = rest + 2 * tokens * shared_width;
    rms_norm(x, scales, h, norm, tokens, dim, dim, eps, threads);
    route(logits, scores, ids, weights, x, gate, bias, tokens, experts, choices, dim, softmax,
          groups, kept, best, normalise, factor, threads);
    few_experts(y, x, ids, weights, w1, w3, w2, order, rows, tokens, choices, experts, dim, width,
                threads);
    if (shared_w1) {
        feed_forward(shared, x, shared_w1, shared_w3, shared_w2, rest, tokens, dim, shared_width,
                     threads);
        add_to(y, shared, count);
    }
    add_to(y, h, count);
}
