/* What is asked of memory before it is read: a matrix comes from there, and waits. */
#ifndef AHEAD_H
#define AHEAD_H

#include <stdint.h>

#include "lanes.h"

enum {
    LINE = 16,         /* floats in a line of the caches */
    SLOWEST = LINE / 4 /* numbers a step: no line is asked for often */
};

INLINE int64_t parts_of(int64_t all, int64_t most) { return (all + most - 1) / most; }

INLINE int64_t whole(int64_t count, int64_t of) { return parts_of(count, of) * of; }

/* Memory that will be read next, `rows` of `width`; each step of a tile asks for it `pace` numbers
 * further on: evenly, since a core has few requests under way. */
typedef struct {
    const float *at;
    int64_t rows, width, step, done, pace;
} wanted;

/* Where a tile of so many steps begins to ask, all in one row; NULL: nothing is left. */
INLINE const float *asked(wanted *next, int64_t steps) {
    if (next->rows <= 0) return NULL;
    const float *at = next->at + next->done;
    next->done += steps * next->pace;
    if (next->done >= next->width) next->done = 0, next->at += next->step, next->rows--;
    return at;
}

/* A part of a matrix. */
INLINE wanted wanted_of(const float *at, int64_t rows, int64_t width, int64_t step) {
    if (width == step) width *= rows, rows = rows > 0;
    return (wanted){at, rows, width, step, 0, LINE};
}

/* How fast tiles of so many steps ask for so many numbers. */
INLINE int64_t pace_of(int64_t numbers, int64_t steps) {
    const int64_t even = steps ? parts_of(numbers, steps) : LINE;
    return even < SLOWEST ? SLOWEST : even < LINE ? even : LINE;
}

#endif
