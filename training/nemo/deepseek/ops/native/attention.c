/* Causal attention, head by head, of which one block of scores exists at a time.
 *
 * A block of queries passes the blocks of keys that one of them may see. Its scores lie key by key,
 * a vector of them being of neighbouring queries: so the largest and the sum of each query are made
 * without a look across a vector, and products read whole vectors. Where a larger score comes, what
 * was added up before is made smaller. The backward pass makes scores again, from the largest and
 * the sum that the forward pass has kept of each query. Each sum is added up in an order of its
 * own, whatever the number of sequences, heads and threads.
 *
 * Everything comes and goes token by token, contiguous: queries (B, S, N, plain + 2 pairs), whose
 * pairs are turned here by the angles of `cosines` and `sines` (B, S, pairs); what is made of
 * latents, (B, S, N, plain + values): keys without position, and values; `shared` (B, S, 2 pairs),
 * the rest of all heads' keys, turned already; the result and its gradient (B, S, N, values).
 * `documents` (B, S) or NULL: a query sees the keys of its own alone. `room` is what a thread needs
 * besides, `room_size` numbers for each. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "exponential.h"
#include "multiply.h"
#include "quarters.h"
#include "threads.h"
#include "turn.h"

/* Numbers of a cache line; queries and keys of a block, whole panels and tiles; from one key's
 * scores to the next, an odd number of lines; and of a result that stays in a core's caches. */
enum { LINE = 16, BLOCK = 96, STEP = BLOCK + LINE, NEAR = 1 << 19 };

typedef struct {
    int64_t sequences, heads, tokens, plain, pairs, values;
} sizes;

INLINE int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* From a row to the next, an odd number of cache lines: rows at an even one share few of the first
 * cache's places, and drive each other out. */
INLINE int64_t step_of(int64_t columns) { return (whole(columns, LINE) / LINE | 1) * LINE; }

/* `count` numbers of the room, whole lines. */
INLINE float *taken(float **room, int64_t count) {
    float *mine = *room;
    *room += whole(count, LINE);
    return mine;
}

/* x (rows, `x_step`) in panels (columns, PANEL) of so many rows; columns are a multiple of 4. */
static void lay_panels(float *restrict y, const float *restrict x, int64_t x_step, int64_t rows,
                       int64_t columns) {
    for (int64_t r = 0; r < rows; r += PANEL)
        for (int64_t v = 0; v < PANEL; v += LANES)
            turn_rows(y + r * columns + v, PANEL, x + (r + v) * x_step, x_step, columns);
}

/* Rows from x to y, each with its own step from a row to the next. */
static void copy_rows(float *restrict y, int64_t y_step, const float *restrict x, int64_t x_step,
                      int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r++)
        memcpy(y + r * y_step, x + r * x_step, columns * sizeof *y);
}

/* The same of a result's rows; where it is `far` larger than the caches past them: lines that are
 * fetched before they are written take longer, and drive out what a head's blocks are made of. */
static void give_rows(float *restrict y, int64_t y_step, const float *restrict x, int64_t x_step,
                      int64_t rows, int64_t columns, int far) {
    const int in_vectors = (uintptr_t)y % sizeof(lanes) == 0 && y_step % LANES == 0;
    if (!far || !in_vectors || columns % LANES) {
        copy_rows(y, y_step, x, x_step, rows, columns);
        return;
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += LANES)
            stream(y + r * y_step + c, load(x + r * x_step + c));
}

/* Zeros behind `rows` and `columns` of (`all_rows`, `step`). */
static void pad(float *restrict y, int64_t step, int64_t rows, int64_t columns, int64_t all_rows) {
    for (int64_t r = 0; r < all_rows; r++) {
        const int64_t from = r < rows ? columns : 0;
        memset(y + r * step + from, 0, (step - from) * sizeof *y);
    }
}

/* Keys (whole lines of tokens, `k_step`) and values (the same, `v_step`) of a head's tokens from
 * `begin` on. */
static void lay_keys(float *restrict k, int64_t k_step, float *restrict v, int64_t v_step,
                     const float *restrict made, const float *restrict shared, sizes n, int64_t b,
                     int64_t head, int64_t begin, int64_t count) {
    const int64_t made_width = n.plain + n.values, turned = 2 * n.pairs;
    const int64_t first = b * n.tokens + begin, rows = whole(count, LINE);
    const float *made_n = made + (first * n.heads + head) * made_width;
    copy_rows(k, k_step, made_n, n.heads * made_width, count, n.plain);
    copy_rows(k + n.plain, k_step, shared + first * turned, turned, count, turned);
    copy_rows(v, v_step, made_n + n.plain, n.heads * made_width, count, n.values);
    pad(k, k_step, count, n.plain + turned, rows);
    pad(v, v_step, count, n.values, rows);
}

/* Queries of a head from `begin` on, turned and scaled: (whole panels, `step`), and in panels. */
static void lay_queries(float *restrict y, int64_t step, float *restrict panels,
                        const float *restrict q, const float *restrict cosines,
                        const float *restrict sines, sizes n, float scale, int64_t b, int64_t head,
                        int64_t begin, int64_t count) {
    const int64_t width = n.plain + 2 * n.pairs;
    for (int64_t i = 0; i < count; i++) {
        const int64_t token = b * n.tokens + begin + i;
        const float *from = q + (token * n.heads + head) * width;
        float *to = y + i * step;
        memcpy(to, from, n.plain * sizeof *y);
        turn(to + n.plain, from + n.plain, cosines + token * n.pairs, sines + token * n.pairs,
             n.pairs, 1);
        for (int64_t c = 0; c < width; c++) to[c] *= scale;
    }
    pad(y, step, count, width, whole(count, PANEL));
    lay_panels(panels, y, step, count, whole(width, 4));
}

/* The documents of a sequence in whole lines; NULL: they are not isolated. */
INLINE const int32_t *lay_documents(float *room, const int32_t *documents, sizes n, int64_t b) {
    if (!documents) return NULL;
    memcpy(room, documents + b * n.tokens, n.tokens * sizeof *documents);
    memset(room + n.tokens, -1, (whole(n.tokens, LINE) - n.tokens) * sizeof *documents);
    return (const int32_t *)room;
}

/* Some queries and some keys of a head. */
typedef struct {
    int64_t query, queries, key, keys;
    const int32_t *documents; /* of all tokens; NULL: not isolated */
    int hides, hides_all;     /* whether some query does not see some key; no query any key */
} block;

INLINE block block_of(int64_t query, int64_t queries, int64_t key, int64_t keys,
                      const int32_t *documents) {
    const int ahead = key + whole(keys, ROW_STEP) > query + 1;
    if (!documents) return (block){query, queries, key, keys, documents, ahead, 0};
    int32_t low_q = INT32_MAX, high_q = INT32_MIN, low_k = INT32_MAX, high_k = INT32_MIN;
    for (int64_t i = query; i < query + queries; i++) {
        low_q = documents[i] < low_q ? documents[i] : low_q;
        high_q = documents[i] > high_q ? documents[i] : high_q;
    }
    for (int64_t i = key; i < key + keys; i++) {
        low_k = documents[i] < low_k ? documents[i] : low_k;
        high_k = documents[i] > high_k ? documents[i] : high_k;
    }
    const int one = low_q == high_q && low_k == high_k && low_q == low_k;
    const int apart = low_q > high_k || low_k > high_q;
    return (block){query, queries, key, keys, documents, ahead || !one, apart};
}

/* The block's keys that are not ahead of the last query of a vector, the first of which is the
 * block's `c`th: whole steps of rows. */
INLINE int64_t keys_before(block x, int64_t c) {
    const int64_t keys = smaller(x.keys, x.query + c + LANES - x.key);
    return keys > 0 ? whole(keys, ROW_STEP) : 0;
}

/* Which queries of a vector see the block's key `k`. */
INLINE whole_lanes sees(block x, int64_t k, int64_t c) {
    whole_lanes queries, of;
    for (int i = 0; i < LANES; i++) queries[i] = (int32_t)(x.query + c) + i;
    whole_lanes mask = queries >= (int32_t)(x.key + k);
    if (x.documents) {
        memcpy(&of, x.documents + x.query + c, sizeof of);
        mask &= of == x.documents[x.key + k];
    }
    return mask;
}

/* y (keys, STEP) = a (keys, depth) b, which is panels; nothing of keys ahead of a vector. */
INLINE void scores_of(float *y, block x, const float *a, int64_t a_step, const float *b,
                      int64_t depth) {
    for (int64_t c = 0; c < x.queries; c += PANEL, b += PANEL * depth) {
        const int64_t both = keys_before(x, c), more = keys_before(x, c + LANES) - both;
        multiply(both, PANEL, depth, y + c, STEP, a, a_step, 1, b, PANEL, 0, EVERYTHING);
        multiply(more, LANES, depth, y + both * STEP + c + LANES, STEP, a + both * a_step,
                 a_step, 1, b + LANES, PANEL, 0, EVERYTHING);
    }
}

/* Zeros for the keys ahead of a vector: tiles of the products that follow are wider than one. */
INLINE void clear_ahead(float *y, block x, int64_t c) {
    for (int64_t k = keys_before(x, c); k < whole(x.keys, ROW_STEP); k++)
        store(y + k * STEP + c, (lanes){0});
}

INLINE lanes larger(lanes a, lanes b) { return either(a > b, a, b); }

/* A vector of queries: their scores become e^(score - largest); `largest` and `sum` take in the
 * block's. `factor` gets what the sums before are to be multiplied by. */
INLINE void take_in(float *scores, const int hides, block x, int64_t c, float *largest, float *sum,
                    float *factor) {
    const lanes zero = {0}, nothing = zero - INFINITY, before = load(largest + c);
    const int64_t keys = keys_before(x, c);
    lanes most[ROW_STEP], all[ROW_STEP]; /* several, since each waits for the one before */
    for (int i = 0; i < ROW_STEP; i++) most[i] = before, all[i] = zero;
    for (int64_t k = 0; k < keys; k += ROW_STEP)
        for (int i = 0; i < ROW_STEP; i++) {
            float *s = scores + (k + i) * STEP + c;
            if (hides) store(s, either(sees(x, k + i, c), load(s), nothing));
            most[i] = larger(load(s), most[i]);
        }
    for (int i = 1; i < ROW_STEP; i++) most[0] = larger(most[i], most[0]);
    /* A query that has seen nothing yet has no largest to be taken off. */
    const lanes highest = hides ? either(most[0] == nothing, zero, most[0]) : most[0];
    for (int64_t k = 0; k < keys; k += ROW_STEP)
        for (int i = 0; i < ROW_STEP; i++) {
            float *s = scores + (k + i) * STEP + c;
            const lanes e = exponentials(load(s) - highest);
            store(s, e);
            all[i] += e;
        }
    for (int i = 1; i < ROW_STEP; i++) all[0] += all[i];
    const lanes by = exponentials(before - highest);
    store(factor + c, by);
    store(largest + c, most[0]);
    store(sum + c, load(sum + c) * by + all[0]);
}

/* A vector of queries: their scores become shares again, and what the shares' gradients were the
 * gradients of scores. `mean`: of the shares' gradients. */
INLINE void share_backward(float *scores, float *by, const int hides, block x, int64_t c,
                           const float *largest, const float *sum, const float *mean) {
    const lanes zero = {0}, most = load(largest + c), by_sum = 1 / load(sum + c);
    const lanes mean_c = load(mean + c);
    for (int64_t k = 0; k < keys_before(x, c); k++) {
        float *s = scores + k * STEP + c, *b = by + k * STEP + c;
        lanes e = exponentials(load(s) - most) * by_sum, g = e * (load(b) - mean_c);
        if (hides) {
            const whole_lanes seen = sees(x, k, c);
            e = either(seen, e, zero), g = either(seen, g, zero);
        }
        store(s, e);
        store(b, g);
    }
}

/* The sum of x[i] y[i]. */
INLINE float along(const float *x, const float *y, int64_t count) {
    lanes sums = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sums += load(x + i) * load(y + i);
    float sum = total(sums);
    for (; i < count; i++) sum += x[i] * y[i];
    return sum;
}

/* `largest` (B, N, S) gets the largest score of each query, `sums` the sum of its exponentials. */
void attention(float *restrict y, float *restrict largest, float *restrict sums,
               float *restrict room, const float *restrict q, const float *restrict made,
               const float *restrict shared, const float *restrict cosines,
               const float *restrict sines, const int32_t *restrict documents, int64_t sequences,
               int64_t heads, int64_t tokens, int64_t plain, int64_t pairs, int64_t values,
               float scale, int64_t room_size, int64_t threads) {
    const sizes all = {sequences, heads, tokens, plain, pairs, values};
    const int64_t width = plain + 2 * pairs, depth = whole(width, 4);
    const int64_t work = sequences * heads * tokens * tokens * (width + values) / 2;
    const int64_t rows = whole(tokens, LINE), u = whole(values, LANES);
    const int64_t k_step = step_of(width), v_step = step_of(values);
    const int far = sequences * tokens * heads * values > NEAR;
    items all_heads = {sequences * heads, {0}};
#pragma omp parallel num_threads(worth(threads, work))
    for (int64_t n = next_item(&all_heads); n < all_heads.count; n = next_item(&all_heads)) {
        const int64_t b = n / heads, head = n % heads;
        float *mine = room + omp_get_thread_num() * room_size;
        const int32_t *of = lay_documents(taken(&mine, rows), documents, all, b);
        float *k = taken(&mine, rows * k_step), *v = taken(&mine, rows * v_step);
        float *q_h = taken(&mine, BLOCK * k_step), *q_t = taken(&mine, BLOCK * depth);
        float *scores = taken(&mine, BLOCK * STEP), *y_u = taken(&mine, BLOCK * v_step);
        float most[BLOCK], sum[BLOCK], factor[BLOCK];
        for (int64_t begin = 0; begin < tokens; begin += BLOCK) {
            const int64_t count = smaller(BLOCK, tokens - begin), end = begin + count;
            lay_keys(k + begin * k_step, k_step, v + begin * v_step, v_step, made, shared, all, b,
                     head, begin, count);
            lay_queries(q_h, k_step, q_t, q, cosines, sines, all, scale, b, head, begin, count);
            for (int i = 0; i < BLOCK; i++) most[i] = -INFINITY, sum[i] = 0;
            int adds = 0;
            for (int64_t key = 0; key < end; key += BLOCK) {
                const block x = block_of(begin, count, key, smaller(BLOCK, end - key), of);
                const band before = {EVERYTHING.first, begin + 1 - key};
                if (x.hides_all) continue;
                scores_of(scores, x, k + key * k_step, k_step, q_t, depth);
                for (int64_t c = 0; c < count; c += LANES) {
                    if (x.hides) {
                        take_in(scores, 1, x, c, most, sum, factor);
                        clear_ahead(scores, x, c);
                    } else
                        take_in(scores, 0, x, c, most, sum, factor);
                }
                for (int64_t i = 0; adds && i < count; i++) {
                    float *y_i = y_u + i * v_step;
                    for (int64_t c = 0; factor[i] != 1 && c < u; c += LANES)
                        store(y_i + c, load(y_i + c) * factor[i]);
                }
                multiply(whole(count, ROW_STEP), u, x.keys, y_u, v_step, scores, 1, STEP,
                         v + key * v_step, v_step, adds, before);
                adds = 1;
            }
            memcpy(largest + n * tokens + begin, most, count * sizeof *most);
            memcpy(sums + n * tokens + begin, sum, count * sizeof *sum);
            for (int64_t i = 0; i < count; i++) {
                float *y_i = y_u + i * v_step;
                const float by = 1 / sum[i];
                for (int64_t c = 0; c < u; c += LANES) store(y_i + c, load(y_i + c) * by);
            }
            give_rows(y + ((b * tokens + begin) * heads + head) * values, heads * values, y_u,
                      v_step, count, values, far);
        }
        streamed();
    }
}

/* Gradients laid out as what was given; `shares_of_heads` (B, N, S, 2 pairs) is used for that of
 * the shared part, which is added up in the order of the heads. `y`, `largest` and `sums` are what
 * `attention` has made. */
void attention_backward(float *restrict by_q, float *restrict by_made, float *restrict by_shared,
                        float *restrict shares_of_heads, float *restrict room,
                        const float *restrict grad, const float *restrict y,
                        const float *restrict largest, const float *restrict sums,
                        const float *restrict q, const float *restrict made,
                        const float *restrict shared, const float *restrict cosines,
                        const float *restrict sines, const int32_t *restrict documents,
                        int64_t sequences, int64_t heads, int64_t tokens, int64_t plain,
                        int64_t pairs, int64_t values, float scale, int64_t room_size,
                        int64_t threads) {
    const sizes all = {sequences, heads, tokens, plain, pairs, values};
    const int64_t turned = 2 * pairs, width = plain + turned, made_width = plain + values;
    const int64_t work = sequences * heads * tokens * tokens * (width + values);
    const int64_t rows = whole(tokens, LINE), h = whole(width, LANES), u = whole(values, LANES);
    const int64_t depth = whole(width, 4), v_depth = whole(values, 4);
    const int64_t k_step = step_of(width), v_step = step_of(values);
    const int far = sequences * tokens * heads * width > NEAR;
    items all_heads = {sequences * heads, {0}};
#pragma omp parallel num_threads(worth(threads, work))
    for (int64_t n = next_item(&all_heads); n < all_heads.count; n = next_item(&all_heads)) {
        const int64_t b = n / heads, head = n % heads;
        float *mine = room + omp_get_thread_num() * room_size;
        const int32_t *of = lay_documents(taken(&mine, rows), documents, all, b);
        float *k = taken(&mine, rows * k_step), *v = taken(&mine, rows * v_step);
        float *by_k = taken(&mine, rows * k_step), *by_v = taken(&mine, rows * v_step);
        float *q_h = taken(&mine, BLOCK * k_step), *q_t = taken(&mine, BLOCK * depth);
        float *grad_u = taken(&mine, BLOCK * v_step), *grad_t = taken(&mine, BLOCK * v_depth);
        float *shares = taken(&mine, BLOCK * STEP), *by_scores = taken(&mine, BLOCK * STEP);
        float *by_q_h = taken(&mine, BLOCK * k_step);
        float most[BLOCK] = {0}, sum[BLOCK] = {0}, mean[BLOCK] = {0};
        for (int64_t begin = 0; begin < tokens; begin += BLOCK) {
            const int64_t count = smaller(BLOCK, tokens - begin), end = begin + count;
            const int64_t first = (b * tokens + begin) * heads + head;
            lay_keys(k + begin * k_step, k_step, v + begin * v_step, v_step, made, shared, all, b,
                     head, begin, count);
            lay_queries(q_h, k_step, q_t, q, cosines, sines, all, scale, b, head, begin, count);
            copy_rows(grad_u, v_step, grad + first * values, heads * values, count, values);
            pad(grad_u, v_step, count, values, whole(count, PANEL));
            lay_panels(grad_t, grad_u, v_step, count, v_depth);
            memcpy(most, largest + n * tokens + begin, count * sizeof *most);
            memcpy(sum, sums + n * tokens + begin, count * sizeof *sum);
            for (int64_t i = 0; i < count; i++)
                mean[i] = along(y + (first + i * heads) * values, grad_u + i * v_step, values);
            int adds = 0;
            for (int64_t key = 0; key < end; key += BLOCK) {
                const block x = block_of(begin, count, key, smaller(BLOCK, end - key), of);
                const int64_t keys = whole(x.keys, ROW_STEP);
                const band later = {key - begin, EVERYTHING.end};
                const band before = {EVERYTHING.first, begin + 1 - key};
                if (x.hides_all) continue;
                scores_of(shares, x, k + key * k_step, k_step, q_t, depth);
                scores_of(by_scores, x, v + key * v_step, v_step, grad_t, v_depth);
                for (int64_t c = 0; c < count; c += LANES) {
                    if (x.hides) {
                        share_backward(shares, by_scores, 1, x, c, most, sum, mean);
                        clear_ahead(shares, x, c);
                        clear_ahead(by_scores, x, c);
                    } else
                        share_backward(shares, by_scores, 0, x, c, most, sum, mean);
                }
                multiply(keys, u, count, by_v + key * v_step, v_step, shares, STEP, 1, grad_u,
                         v_step, key < begin, later);
                multiply(keys, h, count, by_k + key * k_step, k_step, by_scores, STEP, 1, q_h,
                         k_step, key < begin, later);
                multiply(whole(count, ROW_STEP), h, x.keys, by_q_h, k_step, by_scores, 1, STEP,
                         k + key * k_step, k_step, adds, before);
                adds = 1;
            }
            for (int64_t i = 0; i < count; i++) {
                const int64_t token = b * tokens + begin + i;
                float *by = by_q_h + i * k_step;
                for (int64_t c = 0; c < width; c++) by[c] *= scale;
                turn(q_h + i * k_step, by + plain, cosines + token * pairs, sines + token * pairs,
                     pairs, -1);
            }
            float *to = by_q + first * width;
            give_rows(to, heads * width, by_q_h, k_step, count, plain, far);
            give_rows(to + plain, heads * width, q_h, k_step, count, turned, far);
        }
        float *by_made_n = by_made + (b * tokens * heads + head) * made_width;
        give_rows(by_made_n, heads * made_width, by_k, k_step, tokens, plain, far);
        give_rows(by_made_n + plain, heads * made_width, by_v, v_step, tokens, values, far);
        copy_rows(shares_of_heads + n * tokens * turned, turned, by_k + plain, k_step, tokens,
                  turned);
        streamed();
    }
#pragma omp parallel for num_threads(worth(threads, sequences * heads * tokens * turned))
    for (int64_t token = 0; token < sequences * tokens; token++) {
        const int64_t b = token / tokens, i = token % tokens;
        float *to = by_shared + token * turned;
        for (int64_t c = 0; c < turned; c++) to[c] = 0;
        for (int64_t n = b * heads; n < (b + 1) * heads; n++)
            for (int64_t c = 0; c < turned; c++)
                to[c] += shares_of_heads[(n * tokens + i) * turned + c];
    }
}
