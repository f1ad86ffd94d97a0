/* Rows that become columns, by vectors. */
#ifndef QUARTERS_H
#define QUARTERS_H

#include <stdint.h>

#include "lanes.h"

/* Four vectors, each of quarters of rows: four numbers of LANES rows become four columns. */
INLINE void turn_quarters(lanes x[4]) {
    whole_lanes low, high, first, second;
    for (int i = 0; i < LANES; i++) {
        const int one = i / 4 * 4, half = i % 4 / 2, other = i % 2 ? LANES : 0;
        low[i] = one + half + other, high[i] = one + 2 + half + other;
        first[i] = one + i % 2 + half * LANES, second[i] = first[i] + 2;
    }
    const lanes a = shuffled(x[0], x[1], low), b = shuffled(x[2], x[3], low);
    const lanes c = shuffled(x[0], x[1], high), d = shuffled(x[2], x[3], high);
    x[0] = shuffled(a, b, first);
    x[1] = shuffled(a, b, second);
    x[2] = shuffled(c, d, first);
    x[3] = shuffled(c, d, second);
}

/* to (depth, LANES) = b^T, b (LANES, depth), each with its step from a row to the next. */
INLINE void turn_rows(float *to, int64_t to_step, const float *b, int64_t b_step, int64_t depth) {
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
        lanes x[4];
        for (int j = 0; j < 4; j++) x[j] = load_quads(b + j * b_step + k, 4 * b_step);
        turn_quarters(x);
        for (int j = 0; j < 4; j++) store(to + (k + j) * to_step, x[j]);
    }
    for (; k < depth; k++)
        for (int64_t i = 0; i < LANES; i++) to[k * to_step + i] = b[i * b_step + k];
}

#endif
