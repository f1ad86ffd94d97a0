/* Causal attention of short sequences, head by head: all that a head needs lies in the caches.
 *
 * Scores of TILE queries at a time are made, against the keys that one of them may see, and dropped
 * after use; the backward pass makes them again from the largest and the sum that the forward pass
 * has kept of each query. Each sum is added up in an order of its own, whatever the number of
 * sequences, heads and threads.
 *
 * Everything comes and goes token by token, contiguous: queries (B, S, N, plain + 2 pairs), whose
 * pairs are turned here by the angles of `cosines` and `sines` (B, S, pairs); what is made of
 * latents, (B, S, N, plain + values): keys without position, and values; `shared` (B, S, 2 pairs),
 * the rest of all heads' keys, turned already; the result and its gradient (B, S, N, values).
 * `documents` (B, S) or NULL: a query sees the keys of its own alone. Rows are padded to whole
 * vectors by zeros in `room`, of `room_size` numbers for each thread. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "exponential.h"
#include "multiply.h"
#include "threads.h"
#include "turn.h"

enum { TILE = 4 * SUM_ROWS };

typedef struct {
    int64_t sequences, heads, tokens, plain, pairs, values;
} sizes;

INLINE int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* y (columns, `step`) = x (rows, columns), with `x_step` from a row of x to the next; zeros behind. */
static void transpose(float *restrict y, int64_t step, const float *restrict x, int64_t x_step,
                      int64_t rows, int64_t columns) {
    for (int64_t c = 0; c < columns; c++) {
        for (int64_t r = 0; r < rows; r++) y[c * step + r] = x[r * x_step + c];
        for (int64_t r = rows; r < step; r++) y[c * step + r] = 0;
    }
}

/* Rows from x to y, each with its own step from a row to the next; zeros from `columns` to `width`. */
static void copy_rows(float *restrict y, int64_t y_step, const float *restrict x, int64_t x_step,
                      int64_t rows, int64_t columns, int64_t width) {
    for (int64_t r = 0; r < rows; r++) {
        memcpy(y + r * y_step, x + r * x_step, columns * sizeof *y);
        for (int64_t c = columns; c < width; c++) y[r * y_step + c] = 0;
    }
}

/* Queries from `begin` to `end` of a head, turned. */
static void turned_queries(float *restrict y, const float *restrict q, const float *restrict cosines,
                           const float *restrict sines, sizes n, int64_t b, int64_t head,
                           int64_t begin, int64_t end) {
    const int64_t width = n.plain + 2 * n.pairs, h = whole(width);
    for (int64_t i = begin; i < end; i++) {
        const int64_t token = b * n.tokens + i;
        const float *from = q + (token * n.heads + head) * width;
        float *to = y + (i - begin) * h;
        memcpy(to, from, n.plain * sizeof *y);
        turn(to + n.plain, from + n.plain, cosines + token * n.pairs, sines + token * n.pairs,
             n.pairs, 1);
        for (int64_t c = width; c < h; c++) to[c] = 0;
    }
}

/* Which keys of a vector, the first of them `key`, a query sees; if documents are isolated, `own` is
 * its document, and `documents` have whole vectors. */
INLINE whole_lanes sees(int32_t query, int32_t key, const int32_t *documents, int32_t own) {
    whole_lanes keys, of;
    for (int k = 0; k < LANES; k++) keys[k] = key + k;
    whole_lanes mask = keys <= query;
    if (documents) {
        memcpy(&of, documents + key, sizeof of);
        mask &= of == own;
    }
    return mask;
}

INLINE float largest_of(lanes v) {
    quad part[LANES / 4];
    memcpy(part, &v, sizeof v);
    quad most = part[0];
    for (int k = 1; k < LANES / 4; k++) {
        typedef int32_t quad_mask __attribute__((vector_size(16)));
        const quad_mask larger = part[k] > most;
        most = (quad)(((quad_mask)part[k] & larger) | ((quad_mask)most & ~larger));
    }
    const float one = most[0] > most[1] ? most[0] : most[1];
    const float other = most[2] > most[3] ? most[2] : most[3];
    return one > other ? one : other;
}

/* Scores of a query become the shares of its keys, whole vectors of them; those that it may not see
 * get 0. */
INLINE void share(float *scores, int32_t query, int32_t keys, const int32_t *documents,
                  float scale, float *largest, float *sum_of_all) {
    const int32_t own = documents ? documents[query] : 0, end = query / LANES * LANES + LANES;
    const int32_t plain = documents ? 0 : (query + 1) / LANES * LANES; /* all of them are seen */
    const lanes zero = {0};
    lanes most = zero - INFINITY, sum = zero;
    for (int32_t j = 0; j < plain; j += LANES) {
        const lanes s = load(scores + j);
        most = either(s > most, s, most);
    }
    for (int32_t j = plain; j < end; j += LANES) {
        const lanes s = either(sees(query, j, documents, own), load(scores + j), zero - INFINITY);
        most = either(s > most, s, most);
    }
    const float highest = largest_of(most);
    for (int32_t j = 0; j < end; j += LANES) {
        lanes e = exponentials((load(scores + j) - highest) * scale);
        if (j >= plain) e = either(sees(query, j, documents, own), e, zero);
        store(scores + j, e);
        sum += e;
    }
    *largest = highest * scale;
    *sum_of_all = total(sum);
    const float by = 1 / *sum_of_all;
    for (int32_t j = 0; j < end; j += LANES) store(scores + j, load(scores + j) * by);
    for (int32_t j = end; j < keys; j += LANES) store(scores + j, zero);
}

/* Scores become shares again, and what the shares' gradients were the gradients of scores. */
INLINE void share_backward(float *scores, float *by, int32_t query, int32_t keys,
                           const int32_t *documents, float scale, float largest, float sum) {
    const int32_t own = documents ? documents[query] : 0, end = query / LANES * LANES + LANES;
    const int32_t plain = documents ? 0 : (query + 1) / LANES * LANES;
    const float by_sum = 1 / sum;
    const lanes zero = {0};
    lanes along = zero;
    for (int32_t j = 0; j < end; j += LANES) {
        lanes e = exponentials(load(scores + j) * scale - largest) * by_sum;
        if (j >= plain) e = either(sees(query, j, documents, own), e, zero);
        store(scores + j, e);
        along += e * load(by + j);
    }
    const float mean = total(along);
    for (int32_t j = 0; j < end; j += LANES)
        store(by + j, load(scores + j) * (load(by + j) - mean) * scale);
    for (int32_t j = end; j < keys; j += LANES) {
        store(scores + j, zero);
        store(by + j, zero);
    }
}

/* The documents of a sequence in whole vectors; NULL: they are not isolated. */
INLINE const int32_t *padded(void *room, const int32_t *documents, int64_t tokens) {
    if (!documents) return NULL;
    memcpy(room, documents, tokens * sizeof *documents);
    memset((int32_t *)room + tokens, -1, (whole(tokens) - tokens) * sizeof *documents);
    return room;
}

/* `largest` (B, N, S) gets the largest score of each query, `sums` the sum of its exponentials. */
void attention(float *restrict y, float *restrict largest, float *restrict sums,
               float *restrict room, const float *restrict q, const float *restrict made,
               const float *restrict shared, const float *restrict cosines,
               const float *restrict sines, const int32_t *restrict documents, int64_t sequences,
               int64_t heads, int64_t tokens, int64_t plain, int64_t pairs, int64_t values,
               float scale, int64_t room_size, int64_t threads) {
    const sizes all = {sequences, heads, tokens, plain, pairs, values};
    const int64_t width = plain + 2 * pairs, made_width = plain + values;
    const int64_t work = sequences * heads * tokens * tokens * (width + values) / 2;
    const int64_t t = whole(tokens), h = whole(width), u = whole(values);
#pragma omp parallel for schedule(static) num_threads(worth(threads, work))
    for (int64_t n = 0; n < sequences * heads; n++) {
        const int64_t b = n / heads, head = n % heads;
        const float *made_n = made + (b * tokens * heads + head) * made_width;
        float *mine = room + omp_get_thread_num() * room_size;
        const int32_t *documents_b = padded(mine, documents ? documents + b * tokens : NULL, tokens);
        float *k_t = mine + t, *v_u = k_t + width * t;
        float *scores = v_u + tokens * u, *q_h = scores + TILE * t, *y_u = q_h + TILE * h;
        transpose(k_t, t, made_n, heads * made_width, tokens, plain);
        transpose(k_t + plain * t, t, shared + b * tokens * 2 * pairs, 2 * pairs, tokens, 2 * pairs);
        copy_rows(v_u, u, made_n + plain, heads * made_width, tokens, values, u);
        for (int64_t begin = 0; begin < tokens; begin += TILE) {
            const int64_t end = begin + TILE < tokens ? begin + TILE : tokens, keys = whole(end);
            turned_queries(q_h, q, cosines, sines, all, b, head, begin, end);
            multiply(end - begin, keys, width, scores, t, q_h, h, 1, k_t, t, 0);
            for (int64_t i = begin; i < end; i++) {
                float *s = scores + (i - begin) * t;
                float *most = largest + n * tokens + i, *sum = sums + n * tokens + i;
                share(s, i, keys, documents_b, scale, most, sum);
            }
            multiply(end - begin, u, end, y_u, u, scores, t, 1, v_u, u, 0);
            copy_rows(y + ((b * tokens + begin) * heads + head) * values, heads * values, y_u, u,
                      end - begin, values, values);
        }
    }
}

/* Gradients laid out as what was given; `shares_of_heads` (B, N, S, 2 pairs) is used for that of
 * the shared part, which is added up in the order of the heads. */
void attention_backward(float *restrict by_q, float *restrict by_made, float *restrict by_shared,
                        float *restrict shares_of_heads, float *restrict room,
                        const float *restrict grad, const float *restrict largest,
                        const float *restrict sums, const float *restrict q,
                        const float *restrict made, const float *restrict shared,
                        const float *restrict cosines, const float *restrict sines,
                        const int32_t *restrict documents, int64_t sequences, int64_t heads,
                        int64_t tokens, int64_t plain, int64_t pairs, int64_t values, float scale,
                        int64_t room_size, int64_t threads) {
    const sizes all = {sequences, heads, tokens, plain, pairs, values};
    const int64_t turned = 2 * pairs, width = plain + turned, made_width = plain + values;
    const int64_t work = sequences * heads * tokens * tokens * (width + values);
    const int64_t t = whole(tokens), h = whole(width), u = whole(values);
#pragma omp parallel for schedule(static) num_threads(worth(threads, work))
    for (int64_t n = 0; n < sequences * heads; n++) {
        const int64_t b = n / heads, head = n % heads;
        const float *made_n = made + (b * tokens * heads + head) * made_width;
        const float *shared_b = shared + b * tokens * turned;
        float *mine = room + omp_get_thread_num() * room_size;
        const int32_t *documents_b = padded(mine, documents ? documents + b * tokens : NULL, tokens);
        float *k_t = mine + t, *v_t = k_t + width * t;
        float *k_h = v_t + values * t, *by_k_h = k_h + tokens * h, *by_v_u = by_k_h + tokens * h;
        float *shares = by_v_u + tokens * u, *by_scores = shares + TILE * t;
        float *q_h = by_scores + TILE * t, *by_q_h = q_h + TILE * h, *grad_u = by_q_h + TILE * h;
        transpose(k_t, t, made_n, heads * made_width, tokens, plain);
        transpose(k_t + plain * t, t, shared_b, turned, tokens, turned);
        transpose(v_t, t, made_n + plain, heads * made_width, tokens, values);
        copy_rows(k_h, h, made_n, heads * made_width, tokens, plain, plain);
        copy_rows(k_h + plain, h, shared_b, turned, tokens, turned, h - plain);
        memset(by_k_h, 0, tokens * (h + u) * sizeof *by_k_h);
        for (int64_t begin = 0; begin < tokens; begin += TILE) {
            const int64_t end = begin + TILE < tokens ? begin + TILE : tokens, keys = whole(end);
            const int64_t rows = end - begin;
            turned_queries(q_h, q, cosines, sines, all, b, head, begin, end);
            copy_rows(grad_u, u, grad + ((b * tokens + begin) * heads + head) * values,
                      heads * values, rows, values, u);
            multiply(rows, keys, width, shares, t, q_h, h, 1, k_t, t, 0);
            multiply(rows, keys, values, by_scores, t, grad_u, u, 1, v_t, t, 0);
            for (int64_t i = begin; i < end; i++) {
                float *s = shares + (i - begin) * t, *by = by_scores + (i - begin) * t;
                const float most = largest[n * tokens + i], sum = sums[n * tokens + i];
                share_backward(s, by, i, keys, documents_b, scale, most, sum);
            }
            multiply(end, u, rows, by_v_u, u, shares, 1, t, grad_u, u, 1);
            multiply(end, h, rows, by_k_h, h, by_scores, 1, t, q_h, h, 1);
            multiply(rows, h, end, by_q_h, h, by_scores, t, 1, k_h, h, 0);
            for (int64_t i = begin; i < end; i++) {
                const int64_t token = b * tokens + i;
                const float *from = by_q_h + (i - begin) * h;
                float *to = by_q + (token * heads + head) * width;
                memcpy(to, from, plain * sizeof *to);
                turn(to + plain, from + plain, cosines + token * pairs, sines + token * pairs,
                     pairs, -1);
            }
        }
        float *by_made_n = by_made + (b * tokens * heads + head) * made_width;
        copy_rows(by_made_n, heads * made_width, by_k_h, h, tokens, plain, plain);
        copy_rows(by_made_n + plain, heads * made_width, by_v_u, u, tokens, values, values);
        copy_rows(shares_of_heads + n * tokens * turned, turned, by_k_h + plain, h, tokens, turned,
                  turned);
    }
    for (int64_t b = 0; b < sequences; b++)
        for (int64_t i = 0; i < tokens * turned; i++) {
            float sum = 0;
            for (int64_t n = b * heads; n < (b + 1) * heads; n++)
                sum += shares_of_heads[n * tokens * turned + i];
            by_shared[b * tokens * turned + i] = sum;
        }
}
