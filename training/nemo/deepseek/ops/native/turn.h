/* Pairs of numbers turned by the angles of a position. */
#ifndef TURN_H
#define TURN_H

#include <stdint.h>

/* By -1 times the angles if `sign` is -1. */
static inline void turn(float *restrict y, const float *restrict x, const float *restrict cosines,
                        const float *restrict sines, int64_t pairs, float sign) {
    for (int64_t a = 0; a < pairs; a++) {
        const float even = x[2 * a], odd = x[2 * a + 1];
        const float cosine = cosines[a], sine = sign * sines[a];
        y[2 * a] = even * cosine - odd * sine;
        y[2 * a + 1] = even * sine + odd * cosine;
    }
}

#endif
