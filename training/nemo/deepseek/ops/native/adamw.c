/* AdamW of many parameters at once, most of them small. */
#include <math.h>
#include <stdint.h>

#include "lanes.h"
#include "threads.h"

/* What is changed at a time, so that copies of it stay in the nearest cache: threads share a
 * parameter in such pieces. LINE: of the caches. */
enum { PIECE = 1 << 10, LINE = 16, UPDATE = 4 };

typedef struct {
    float size, root, keep, epsilon, to_first, to_second, of_second;
} rule;

/* Where a piece lies in memory; its moments take so many bytes each. */
typedef struct {
    const char *p, *g, *m, *v;
    int64_t bytes;
} piece;

INLINE void update_line(float *restrict p, const float *restrict g, float *restrict m,
                        float *restrict v, int64_t count, rule r) {
    for (int64_t j = 0; j < count; j++) {
        m[j] += (g[j] - m[j]) * r.to_first;
        v[j] = v[j] * r.of_second + g[j] * g[j] * r.to_second;
        p[j] = p[j] * r.keep - r.size * m[j] / (sqrtf(v[j]) * r.root + r.epsilon);
    }
}

/* Meanwhile the next piece is asked for, of all four in turn: the processor's own foresight begins
 * anew on every page, of which there are four at a time. */
static void update(float *restrict p, const float *restrict g, float *restrict m, float *restrict v,
                   int64_t count, rule r, piece next) {
    int64_t j = 0;
    for (; j + LINE <= count; j += LINE) {
        __builtin_prefetch(next.p + j * sizeof *p);
        __builtin_prefetch(next.g + j * sizeof *g);
        __builtin_prefetch(next.m + j * next.bytes);
        __builtin_prefetch(next.v + j * next.bytes);
        update_line(p + j, g + j, m + j, v + j, LINE, r);
    }
    update_line(p + j, g + j, m + j, v + j, count - j, r);
}

/* bf16: the upper half of a float. */
static void widened(float *restrict wide, const uint16_t *restrict half, int64_t count) {
    union {
        uint32_t bits;
        float number;
    } x;
    for (int64_t j = 0; j < count; j++) {
        x.bits = (uint32_t)half[j] << 16;
        wide[j] = x.number;
    }
}

/* To the nearest, of two as near to the even one; as torch rounds, NaN too. */
static void narrowed(uint16_t *restrict half, const float *restrict wide, int64_t count) {
    union {
        float number;
        uint32_t bits;
    } x;
    for (int64_t j = 0; j < count; j++) {
        x.number = wide[j];
        uint32_t rounded = (x.bits + 0x7FFF + (x.bits >> 16 & 1)) >> 16;
        half[j] = (uint16_t)(x.number != x.number ? 0x7FC0 : rounded);
    }
}

/* Gradients as they would be if they had been multiplied before: in memory of their own, since a
 * product that is only used becomes part of an fma, which does not round it. */
static const float *multiplied(float *restrict room, const float *restrict g, float factor,
                               int64_t count) {
    for (int64_t j = 0; j < count; j++) room[j] = g[j] * factor;
    return room;
}

typedef struct {
    float *p;
    const float *g;
    char *m, *v;
    int64_t bytes; /* of a moment's number */
} parameter;

/* A part of a parameter, which begins and ends between pieces. */
static void update_part(parameter x, part mine, float factor, rule r) {
    float room[PIECE], firsts[PIECE], seconds[PIECE];
    const int64_t bytes = x.bytes;
    const int halves = bytes == sizeof(uint16_t);
    for (int64_t at = mine.begin; at < mine.end; at += PIECE) {
        const int64_t n = at + PIECE < mine.end ? PIECE : mine.end - at;
        const float *here = factor == 1 ? x.g + at : multiplied(room, x.g + at, factor, n);
        float *p_n = x.p + at, *m_n = firsts, *v_n = seconds;
        char *m_at = x.m + at * bytes, *v_at = x.v + at * bytes;
        const piece next = {(char *)(p_n + PIECE), (char *)(x.g + at + PIECE),
                            m_at + PIECE * bytes, v_at + PIECE * bytes, bytes};
        if (halves) {
            widened(m_n, (uint16_t *)m_at, n), widened(v_n, (uint16_t *)v_at, n);
        } else {
            m_n = (float *)m_at, v_n = (float *)v_at;
        }
        update(p_n, here, m_n, v_n, n, r, next);
        if (halves) narrowed((uint16_t *)m_at, m_n, n), narrowed((uint16_t *)v_at, v_n, n);
    }
}

/* How many of `size` numbers are before a place: whole pieces. */
static int64_t before(int64_t place, int64_t size) {
    if (place <= 0) return 0;
    const int64_t pieces = (place + PIECE - 1) / PIECE * PIECE;
    return pieces < size ? pieces : size;
}

/* `addresses` (4, count): of parameters, gradients and both moments, of sizes[i] numbers each; the
 * moments are bf16 if `halves`. `steps` are the updates before this one, and are counted.
 * Gradients count `factor` times.
 *
 * The threads share all numbers evenly, not those of each parameter: of a small one there is too
 * little for two. */
void adamw(const int64_t *restrict addresses, const int64_t *restrict step_addresses,
           const int64_t *restrict sizes, int64_t count, double rate, double first_decay,
           double second_decay, double epsilon, double weight_decay, float factor, int64_t halves,
           int64_t threads) {
    int64_t all = 0;
    for (int64_t i = 0; i < count; i++) {
        *(float *)step_addresses[i] += 1;
        all += sizes[i];
    }
#pragma omp parallel num_threads(worth(threads, UPDATE *all))
    {
        const part mine = my_part(all, 1);
        for (int64_t i = 0, first = 0; i < count && first < mine.end; first += sizes[i++]) {
            const part here = {before(mine.begin - first, sizes[i]),
                               before(mine.end - first, sizes[i])};
            if (here.begin >= here.end) continue;
            const float step = *(const float *)step_addresses[i];
            const double one = 1 - pow(first_decay, step), two = 1 - pow(second_decay, step);
            const rule r = {
                .size = (float)(rate / one),
                .root = (float)(1 / sqrt(two)),
                .keep = (float)(1 - rate * weight_decay),
                .epsilon = (float)epsilon,
                .to_first = (float)(1 - first_decay),
                .to_second = (float)(1 - second_decay),
                .of_second = (float)second_decay,
            };
            const parameter x = {(float *)addresses[i], (const float *)addresses[count + i],
                                 (char *)addresses[2 * count + i],
                                 (char *)addresses[3 * count + i],
                                 halves ? sizeof(uint16_t) : sizeof(float)};
            update_part(x, here, factor, r);
        }
    }
}
