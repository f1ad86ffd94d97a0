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
typedef int32_t whole_lanes __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));

/* memcpy, since a cast pointer would promise an alignment that tensors do not have. */
INLINE lanes load(const float *x) {
    lanes v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE void store(float *x, lanes v) { memcpy(x, &v, sizeof v); }

/* Four numbers each from LANES / 4 places. */
INLINE lanes load_quads(const float *x, int64_t step) {
    quad q[LANES / 4];
    lanes v;
    for (int k = 0; k < LANES / 4; k++) memcpy(q + k, x + k * step, sizeof *q);
#if LANES == 16 && (defined(__clang__) || __GNUC__ >= 12)
    typedef float half __attribute__((vector_size(32)));
    const half one = __builtin_shufflevector(q[0], q[1], 0, 1, 2, 3, 4, 5, 6, 7);
    const half other = __builtin_shufflevector(q[2], q[3], 0, 1, 2, 3, 4, 5, 6, 7);
    v = __builtin_shufflevector(one, other, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LANES == 8 && (defined(__clang__) || __GNUC__ >= 12)
    v = __builtin_shufflevector(q[0], q[1], 0, 1, 2, 3, 4, 5, 6, 7);
#else
    memcpy(&v, q, sizeof v);
#endif
    return v;
}

/* Numbers of two vectors, LANES more for those of the second. */
INLINE lanes shuffled(lanes one, lanes other, whole_lanes from) {
#if defined(__clang__)
    lanes v;
    for (int k = 0; k < LANES; k++)
        v[k] = from[k] < LANES ? one[from[k]] : other[from[k] - LANES];
    return v;
#else
    return __builtin_shuffle(one, other, from);
#endif
}

/* Past the caches, where the processor can: what is written in whole lines and not read soon need
 * not be fetched first. Only where `x` is aligned to a vector; `streamed` before another thread
 * reads. */
INLINE void stream(float *x, lanes v) {
#if defined(__clang__)
    __builtin_nontemporal_store(v, (lanes *)x);
#elif defined(__AVX512F__)
    __builtin_ia32_movntps512(x, v);
#elif defined(__AVX__)
    __builtin_ia32_movntps256(x, v);
#elif defined(__SSE__)
    __builtin_ia32_movntps(x, v);
#else
    store(x, v);
#endif
}

INLINE void streamed(void) {
#if defined(__SSE__)
    __builtin_ia32_sfence();
#endif
}

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
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) +
           __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
#else
    return (quad){total(v[0]), total(v[1]), total(v[2]), total(v[3])};
#endif
}

#endif
