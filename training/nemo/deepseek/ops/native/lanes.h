/* Vectors of floats as wide as the processor's registers, in the notation of GCC and clang. */
#ifndef LANES_H
#define LANES_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

/* What takes numbers of rows as constants must become one function with its caller. */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));

/* memcpy, since a cast pointer would promise an alignment that tensors do not have. */
INLINE lanes load(const float *x) {
    lanes v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE void store(float *x, lanes v) { memcpy(x, &v, sizeof v); }

/* The sum of a vector's numbers. */
INLINE float total(lanes v) {
    quad parts[LANES / 4], sum;
    memcpy(parts, &v, sizeof v);
    sum = parts[0];
    for (int k = 1; k < LANES / 4; k++) sum += parts[k];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

#endif
