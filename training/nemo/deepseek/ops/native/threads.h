/* How the threads of a parallel region share work. */
#ifndef THREADS_H
#define THREADS_H

#include <omp.h>
#include <stdint.h>

/* Multiplications below which a second thread costs more than it helps: to wake it and to wait for
 * it takes microseconds. A region of one thread starts none. */
enum { ENOUGH = 1 << 15 };

/* How many threads so many multiplications are worth, of those that the caller grants: torch's
 * number is told with every call, since the runtime keeps one for each thread that calls. */
static inline int worth(int64_t threads, int64_t products) {
    int64_t most = products / ENOUGH + 1;
    return (int)(threads < most ? threads : most);
}

typedef struct {
    int64_t begin, end;
} part;

/* This thread's share of so many items, neighbours, in multiples of `step`. */
static inline part my_part(int64_t items, int64_t step) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t steps = (items + step - 1) / step;
    part mine = {thread * steps / threads * step, (thread + 1) * steps / threads * step};
    if (mine.begin > items) mine.begin = items;
    if (mine.end > items) mine.end = items;
    return mine;
}

#endif
