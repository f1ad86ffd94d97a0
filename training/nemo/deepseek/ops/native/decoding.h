/* The kernels that a half of a block is made of in decoding; each tells its own arguments. */
#ifndef DECODING_H
#define DECODING_H

#include <stdint.h>

void rms_norm(float *restrict y, float *restrict scale, const float *restrict x,
              const float *restrict w, int64_t rows, int64_t width, int64_t x_step, float eps,
              int64_t threads);

void linear(float *y, const float *x, const float *w, int64_t rows, int64_t outputs,
            int64_t inputs, int64_t threads);

void latent_attention(float *y, const float *q, const float *kv, const float *norm,
                      const float *cos, const float *sin, const float *wkv_b, float *cache,
                      const int64_t *padding, float *work, int64_t sequences, int64_t tokens,
                      int64_t heads, int64_t nope, int64_t rope, int64_t latent, int64_t values,
                      int64_t start, int64_t sequence_step, int64_t token_step, int64_t splits,
                      float eps, float scale, int64_t threads);

void feed_forward(float *y, const float *x, const float *w1, const float *w3, const float *w2,
                  float *work, int64_t rows, int64_t dim, int64_t width, int64_t threads);

void few_experts(float *y, const float *x, const int64_t *ids, const float *weights,
                 const float *w1, const float *w3, const float *w2, int64_t *order, float *work,
                 int64_t tokens, int64_t choices, int64_t experts, int64_t dim, int64_t width,
                 int64_t threads);

void route(float *logits, float *scores, int64_t *ids, float *weights, const float *x,
           const float *w, const float *bias, int64_t tokens, int64_t experts, int64_t choices,
           int64_t dim, int64_t softmax, int64_t groups, int64_t kept, int64_t best,
           int64_t normalise, float factor, int64_t threads);

#endif
