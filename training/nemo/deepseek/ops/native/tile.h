/* Sums of products that are held in registers. */
#ifndef TILE_H
#define TILE_H

#include <stdint.h>

#include "lanes.h"

/* Of a tile as many rows, of two vectors each, as there are registers, less those for what is
 * multiplied. */
#if defined(__AVX512F__) || defined(__aarch64__)
enum { TILE = 14 };
#else
enum { TILE = 6 };
#endif
enum { WIDTH = 2, PANEL = WIDTH * LANES, HALF = 7 };

/* A number whose value the compiler is not to know anything of. */
#define OPAQUE(x) __asm__("" : "+r"(x))

/* Of loops over a tile's sums: unrolled later they are registers in the loop between alone, and
 * move to the stack and back before it and behind. */
#define UNROLLED _Pragma("GCC unroll 14")

/* sum (rows, width vectors) += a (rows, depth) b (depth, width vectors), in the order of the depth.
 * At each step memory is asked for, if it `asks`, `pace` numbers after that of the step before.
 *
 * A compiler that knows how a's rows lie keeps an address of each, for which there are too few
 * registers: those that it lays aside come back by way of the units that multiply. Two rows and
 * three multiples of the step between them are enough for all. */
INLINE void add_products(lanes sum[TILE][WIDTH], const int rows, const int width, int64_t depth,
                         const float *a, int64_t a_row, int64_t a_depth, const float *b,
                         int64_t b_step, const int asks, const float *ahead, int64_t pace) {
    const float *low = a, *high = rows > HALF ? a + HALF * a_row : a;
    int64_t two = 2 * a_row, three = 3 * a_row, five = 5 * a_row;
    OPAQUE(two);
    OPAQUE(three);
    OPAQUE(five);
    for (int64_t k = 0; k < depth; k++) {
        lanes b_k[WIDTH];
        /* into the second cache: the first has no room */
        if (asks) __builtin_prefetch(ahead + k * pace, 0, 2);
        UNROLLED for (int v = 0; v < width; v++) b_k[v] = load(b + k * b_step + v * LANES);
        OPAQUE(low);
        OPAQUE(high);
        const int64_t places[HALF] = {0, a_row, 2 * a_row, three, 2 * two, five, 2 * three};
        UNROLLED for (int r = 0; r < rows; r++) {
            const float a_rk = (r < HALF ? low : high)[places[r % HALF]];
            UNROLLED for (int v = 0; v < width; v++) sum[r][v] += a_rk * b_k[v];
        }
        low += a_depth, high += a_depth;
    }
}

#endif
