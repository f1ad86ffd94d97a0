/* Queries, keys and values, from token by token to head by head and back.
 *
 * B sequences of S tokens, N heads; a head has `plain` numbers without position, and pairs of
 * numbers that its position turns by an angle, whose cosines and sines are (B, S, pairs). */
#include <stdint.h>
#include <string.h>

#include "threads.h"
#include "turn.h"

/* y = x with its pairs turned, by -1 times the angles if `sign` is -1. The steps are numbers from a
 * sequence, token and head to the next; a head is contiguous. */
void turn_heads(float *restrict y, const float *restrict x, const float *restrict cosines,
                const float *restrict sines, int64_t sequences, int64_t tokens, int64_t heads,
                int64_t plain, int64_t pairs, int64_t y_sequence, int64_t y_token, int64_t y_head,
                int64_t x_sequence, int64_t x_token, int64_t x_head, float sign, int64_t threads) {
    const int64_t work = sequences * tokens * heads * (plain + 8 * pairs);
#pragma omp parallel for schedule(static) num_threads(worth(threads, work))
    for (int64_t t = 0; t < sequences * tokens; t++) {
        const int64_t b = t / tokens, s = t % tokens;
        for (int64_t n = 0; n < heads; n++) {
            float *y_h = y + b * y_sequence + s * y_token + n * y_head;
            const float *x_h = x + b * x_sequence + s * x_token + n * x_head;
            memcpy(y_h, x_h, plain * sizeof *y);
            turn(y_h + plain, x_h + plain, cosines + t * pairs, sines + t * pairs, pairs, sign);
        }
    }
}

/* keys (B, N, S, plain + turned) and values (B, N, S, valued) of what is made of latents, (B, S, N,
 * plain + valued), and of the part that all heads share, (B, S, turned). */
void lay_keys(float *restrict keys, float *restrict values, const float *restrict made,
              const float *restrict shared, int64_t sequences, int64_t tokens, int64_t heads,
              int64_t plain, int64_t turned, int64_t valued, int64_t threads) {
    const int64_t work = sequences * tokens * heads * (plain + turned + valued);
#pragma omp parallel for schedule(static) num_threads(worth(threads, work))
    for (int64_t t = 0; t < sequences * tokens; t++) {
        const int64_t b = t / tokens, s = t % tokens;
        for (int64_t n = 0; n < heads; n++) {
            const int64_t there = (b * heads + n) * tokens + s;
            const float *made_h = made + (t * heads + n) * (plain + valued);
            float *key = keys + there * (plain + turned);
            memcpy(key, made_h, plain * sizeof *key);
            memcpy(key + plain, shared + t * turned, turned * sizeof *key);
            memcpy(values + there * valued, made_h + plain, valued * sizeof *key);
        }
    }
}

/* The way back of gradients; that of the shared part is added up in the order of the heads. */
void lay_keys_backward(float *restrict by_made, float *restrict by_shared,
                       const float *restrict by_keys, const float *restrict by_values,
                       int64_t sequences, int64_t tokens, int64_t heads, int64_t plain,
                       int64_t turned, int64_t valued, int64_t threads) {
    const int64_t work = sequences * tokens * heads * (plain + turned + valued);
#pragma omp parallel for schedule(static) num_threads(worth(threads, work))
    for (int64_t t = 0; t < sequences * tokens; t++) {
        const int64_t b = t / tokens, s = t % tokens;
        float *sum = by_shared + t * turned;
        memset(sum, 0, turned * sizeof *sum);
        for (int64_t n = 0; n < heads; n++) {
            const int64_t there = (b * heads + n) * tokens + s;
            float *made_h = by_made + (t * heads + n) * (plain + valued);
            const float *key = by_keys + there * (plain + turned);
            memcpy(made_h, key, plain * sizeof *sum);
            for (int64_t i = 0; i < turned; i++) sum[i] += key[plain + i];
            memcpy(made_h + plain, by_values + there * valued, valued * sizeof *sum);
        }
    }
}
