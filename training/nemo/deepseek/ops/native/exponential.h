/* e^x that the compiler makes vectors of. */
#ifndef EXPONENTIAL_H
#define EXPONENTIAL_H

#include <stdint.h>
#include <string.h>

#include "lanes.h"

/* Of each place the first number where the mask's bits are set, else the second. */
INLINE lanes either(whole_lanes mask, lanes one, lanes other) {
    return (lanes)(((whole_lanes)one & mask) | ((whole_lanes)other & ~mask));
}

/* p, which holds the first coefficient, becomes e^r: of a number or a vector. */
#define TO_POWER_R(p, r)              \
    do {                              \
        p = p * r + 1.3981999507e-3f; \
        p = p * r + 8.3334519073e-3f; \
        p = p * r + 4.1665795894e-2f; \
        p = p * r + 1.6666665459e-1f; \
        p = p * r + 5.0000001201e-1f; \
        p = p * r * r + r + 1.0f;     \
    } while (0)

/* Within 2 units in the last place, of what is representable; 0 below -87, where numbers lose
 * theirs. x = n log 2 + r: 2^n is made of its bits, e^r of a polynomial (Cephes' expf, its
 * coefficients). */
static inline float exponential(float x) {
    const int is_nothing = x < -87.0f;
    x = is_nothing ? -87.0f : x > 88.0f ? 88.0f : x;
    const float to_whole = 12582912.0f; /* 3 * 2^22: the sum has no room for what is no whole */
    const float n = (x * 1.44269504f + to_whole) - to_whole;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    TO_POWER_R(p, r);
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23; /* of what is no number, any */
    float power;
    memcpy(&power, &bits, sizeof power);
    return is_nothing ? 0 : p * power;
}

/* The same of a vector, none of whose numbers is larger than 88; what is none remains so. */
INLINE lanes exponentials(lanes x) {
    const lanes zero = {0};
    /* As above, but n + 127, which are the power's bits, in the last places of `n`. */
    const float to_whole = 12582912.0f + 127.0f;
    const lanes shifted = x * 1.44269504f + to_whole, n = shifted - to_whole;
    const lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    lanes p = zero + 1.9875691500e-4f;
    TO_POWER_R(p, r);
    const lanes power = (lanes)((whole_lanes)shifted << 23);
    return (lanes)((whole_lanes)(p * power) & ~(x < zero - 87.0f));
}

#undef TO_POWER_R

#endif
