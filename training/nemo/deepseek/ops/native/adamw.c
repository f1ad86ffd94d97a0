/* AdamW of many parameters at once, most of them small. */
#include <math.h>
#include <stdint.h>

#include "lanes.h"
#include "threads.h"

/* A part of a parameter, so that the threads have equal shares of large ones; and what of it is
 * changed at a time, so that copies of it stay in the nearest cache. LINE: of the caches. */
enum { PART = 1 << 14, PIECE = 1 << 10, LINE = 16, UPDATE = 4 };

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

/* `addresses` (4, count): of parameters, gradients and both moments, of sizes[i] numbers each; the
 * moments are bf16 if `halves`. `steps` are the updates before this one, and are counted.
 * Gradients count `factor` times. */
void adamw(const int64_t *restrict addresses, const int64_t *restrict step_addresses,
           const int64_t *restrict sizes, int64_t count, double rate, double first_decay,
           double second_decay, double epsilon, double weight_decay, float factor, int64_t halves,
           int64_t threads) {
    const int64_t bytes = halves ? sizeof(uint16_t) : sizeof(float);
    for (int64_t i = 0; i < count; i++) {
        float *p = (float *)addresses[i];
        const float *g = (const float *)addresses[count + i];
        char *m = (char *)addresses[2 * count + i], *v = (char *)addresses[3 * count + i];
        float *step = (float *)step_addresses[i];
        *step += 1;
        const double first = 1 - pow(first_decay, *step), second = 1 - pow(second_decay, *step);
        const rule r = {
            .size = (float)(rate / first),
            .root = (float)(1 / sqrt(second)),
            .keep = (float)(1 - rate * weight_decay),
            .epsilon = (float)epsilon,
            .to_first = (float)(1 - first_decay),
            .to_second = (float)(1 - second_decay),
            .of_second = (float)second_decay,
        };
        const int64_t parts = (sizes[i] + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(worth(threads, UPDATE *sizes[i]))
        for (int64_t part = 0; part < parts; part++) {
            const int64_t end = (part + 1) * PART < sizes[i] ? (part + 1) * PART : sizes[i];
            float room[PIECE], firsts[PIECE], seconds[PIECE];
            for (int64_t at = part * PART; at < end; at += PIECE) {
                const int64_t n = at + PIECE < end ? PIECE : end - at;
                const float *here = factor == 1 ? g + at : multiplied(room, g + at, factor, n);
                float *p_n = p + at, *m_n = firsts, *v_n = seconds;
                char *m_at = m + at * bytes, *v_at = v + at * bytes;
                const piece next = {(char *)(p_n + PIECE), (char *)(g + at + PIECE),
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
    }
}
