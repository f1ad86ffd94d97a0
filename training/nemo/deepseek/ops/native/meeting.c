/* Where processes of one machine wait for each other: a word in memory that they share.
 *
 * The word counts who has come, two for each, since it was zero. Its lowest bit tells that somebody
 * has lost patience: then all meet elsewhere, by what also knows of time-outs and of dead
 * processes. It is set only while somebody is missing, and cleared when all have read it, so all
 * decide alike.
 */
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { IMPATIENT = 1, ONE = 2, EVERYBODY = INT32_MAX };
/* Of Linux: its own headers are not there wherever a compiler is. */
enum { FUTEX_WAIT = 0, FUTEX_WAKE = 1 };

/* This process has come. */
void come(uint32_t *word) {
    __atomic_fetch_add(word, ONE, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, word, FUTEX_WAKE, EVERYBODY, NULL, NULL, 0);
}

/* All have met elsewhere. */
void forgive(uint32_t *word) { __atomic_fetch_and(word, ~(uint32_t)IMPATIENT, __ATOMIC_SEQ_CST); }

static int64_t now(void) { /* nanoseconds */
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Wait until so many have come in all. `impatient` (1) gets whether they must meet elsewhere.
 *
 * Asleep: to look for some microseconds first was no faster, and others may want the core. */
void meet(int64_t *impatient, uint32_t *word, int64_t comers, int64_t nanoseconds) {
    const uint32_t all = (uint32_t)comers * ONE;
    const int64_t end = now() + nanoseconds;
    for (;;) {
        uint32_t seen = __atomic_load_n(word, __ATOMIC_SEQ_CST);
        *impatient = seen & IMPATIENT;
        if (*impatient || (int32_t)(seen - all) >= 0) return; /* counts may have wrapped around */
        const int64_t left = end - now();
        if (left <= 0) {
            if (__atomic_compare_exchange_n(word, &seen, seen | IMPATIENT, 0, __ATOMIC_SEQ_CST,
                                            __ATOMIC_SEQ_CST)) {
                *impatient = 1;
                syscall(SYS_futex, word, FUTEX_WAKE, EVERYBODY, NULL, NULL, 0);
                return;
            }
            continue; /* one more has come */
        }
        const struct timespec rest = {left / 1000000000, left % 1000000000};
        syscall(SYS_futex, word, FUTEX_WAIT, seen, &rest, NULL, 0);
    }
}
