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

/* The sum of a vector's quarters, eighths or whatever four numbers are of it. */
INLINE quad folded(lanes v) {
    quad parts[LANES / 4], sum;
    memcpy(parts, &v, sizeof v);
    sum = parts[0];
    for (int k = 1; k < LANES / 4; k++) sum += parts[k];
    return sum;
}

/* The sum of a vector's numbers. */
INLINE float total(lanes v) {
    quad sum = folded(v);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* Those of four vectors, added up in the same order. */
INLINE quad totals(const lanes *v) {
#if defined(__clang__) || __GNUC__ >= 12
    quad a = folded(v[0]), b = folded(v[1]), c = folded(v[2]), d = folded(v[3]);
    quad ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    quad cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
#else
    return (quad){total(v[0]), total(v[1]), total(v[2]), total(v[3])};
#endif
}

#endif
