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

/* Items that threads take one by one. Those of neighbours lie side by side, and were mostly made by
 * one thread: each takes them of its own share first, as they lie in its core's caches, and then
 * what others have left, since a core may be busy, and items may take unequally long. */
enum { SHARES = 64, APART = 8 }; /* APART: no two counts in a line of the caches */

typedef struct {
    int64_t count, taken[SHARES * APART];
} items;

static inline int64_t shares_of(int64_t threads) { return threads < SHARES ? threads : SHARES; }

/* The next one for this thread; `count`: there is none left. */
static inline int64_t next_item(items *all) {
    const int64_t shares = shares_of(omp_get_num_threads()), thread = omp_get_thread_num();
    for (int64_t i = 0; i < shares; i++) {
        const int64_t share = (thread + i) % shares;
        const int64_t begin = share * all->count / shares, end = (share + 1) * all->count / shares;
        int64_t *taken = all->taken + share * APART;
        const int64_t n = begin + __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
        if (n < end) return n;
    }
    return all->count;
}

#endif
