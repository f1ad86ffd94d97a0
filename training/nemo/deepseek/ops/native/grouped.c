/* Products of rows, sorted by expert, with each expert's own matrix, and the gradients of both.
 *
 * All is contiguous. Rows starts[e] to starts[e + 1] are those of expert e; `starts` has one number
 * more than there are experts.
 *
 * An expert's matrix comes from memory, so what is read next is asked for meanwhile (`ahead.h`).
 * Each sum is added up in the order of its terms, whichever the way (`blocks.h`, `slabs.h`): no
 * result depends on other rows, on where its row lies, nor on threads. */
#include "blocks.h"
#include "lanes.h"
#include "product.h"
#include "slabs.h"
#include "threads.h"

enum {
    READING = 16, /* reading a matrix takes as long as multiplying so many rows, about */
    SHARE = 2,    /* of a thread's share it takes this part: it has two, one of them ahead */
    LEAST = 64    /* columns that it takes, at least: each time rows are read anew */
};

/* Products of all experts: c of a and b, each by expert or by row. */
typedef struct {
    enum kind kind;
    float *c;
    const float *a, *b;
    const int64_t *starts;
    int64_t experts, outputs, inputs, adds;
    double *squares; /* of OUTER: of each expert's columns, see there; or NULL */
} products;

static product product_of(const products *all, int64_t e) {
    const int64_t begin = all->starts[e], rows = all->starts[e + 1] - begin;
    const int64_t o = all->outputs, i = all->inputs;
    const int adds = all->adds != 0;
    if (all->kind == LINEAR)
        return (product){LINEAR, all->c + begin * o, all->a + begin * i, all->b + e * o * i,
                         rows, o, i, i, i, adds, NULL};
    if (all->kind == BACK)
        return (product){BACK, all->c + begin * i, all->a + begin * o, all->b + e * o * i,
                         rows, i, o, o, i, adds, NULL};
    return (product){OUTER, all->c + e * o * i, all->a + begin * o, all->b + begin * i,
                     o, i, rows, o, i, adds,
                     all->squares ? all->squares + e * parts_of(i, TOGETHER) : NULL};
}

/* How long an expert takes, in rows; 0: there is nothing to do. */
INLINE int64_t work_of(const products *all, int64_t e) {
    const int64_t rows = all->starts[e + 1] - all->starts[e];
    return rows || (all->kind == OUTER && !all->adds) ? rows + READING : 0;
}

/* The panels of all experts, one expert's after another's. As with `items`, a thread takes the next
 * ones of its share when it is ready, and then of what others have left: what an expert takes is a
 * guess, and a core may be busy with other processes, too. */
typedef struct {
    int64_t columns, panels;       /* of each expert */
    int64_t count;                 /* of shares */
    int64_t taken[SHARES * APART]; /* panels before the next one of each share */
    int64_t end[SHARES];           /* panels before each share's end */
    int64_t work[SHARES];          /* and their work, a panel's being all of its expert's */
} shares;

/* An expert, this thread's columns of its product, and where it has found them. */
typedef struct {
    int64_t e, before; /* work of the experts before */
    int64_t tried;     /* shares in which nothing is left */
    part mine;
} turn_of_thread;

/* Even work to each share; an expert that is cut is so at a multiple of LEAST columns. */
static void share_out(shares *of, const products *all, int64_t work) {
    const int64_t least = LEAST / PANEL;
    int64_t before = 0, place = 0;
    for (int64_t s = 0, e = 0; s < of->count; s++) {
        const int64_t until = (s + 1) * work / of->count;
        while (e < all->experts && before + work_of(all, e) <= until) before += work_of(all, e++);
        int64_t cut = 0;
        if (e < all->experts)
            cut = ((until - before) * of->panels / work_of(all, e) + least / 2) / least * least;
        of->taken[s * APART] = place;
        of->end[s] = place = e * of->panels + (cut < of->panels ? cut : of->panels);
        of->work[s] = until;
    }
}

/* The panels of a share from so many on: at most those of one expert, and towards the end so few
 * that no thread has much left when others have nothing. 0: there are none. */
static int64_t next_panels(turn_of_thread *turn, const products *all, const shares *of,
                           int64_t share, int64_t taken) {
    for (; turn->e < taken / of->panels; turn->e++) turn->before += work_of(all, turn->e);
    while (turn->e < all->experts && !work_of(all, turn->e)) turn->e++;
    const int64_t first = taken / of->panels == turn->e ? taken % of->panels : 0;
    const int64_t here = of->end[share] - turn->e * of->panels;
    const int64_t rest = (here < of->panels ? here : of->panels) - first;
    if (rest <= 0) return 0;
    const int64_t each = work_of(all, turn->e), parts = of->count > 1 ? SHARE : 1;
    const int64_t left = (of->work[share] - turn->before) * of->panels - first * each;
    const int64_t fair = left / (parts * each), least = LEAST / PANEL;
    const int64_t turns = parts_of(rest, fair > least ? fair : least);
    const int64_t end = first + parts_of(rest, turns);
    turn->mine = (part){first * PANEL, end < of->panels ? end * PANEL : of->columns};
    return turn->e * of->panels + end;
}

/* This thread's next columns of an expert; beyond the last expert: none. */
static void next_turn(turn_of_thread *turn, const products *all, shares *of) {
    for (; turn->tried < of->count; turn->tried++, turn->e = 0, turn->before = 0) {
        const int64_t share = (omp_get_thread_num() + turn->tried) % of->count;
        int64_t *at = of->taken + share * APART, taken = __atomic_load_n(at, __ATOMIC_RELAXED), end;
        do
            end = next_panels(turn, all, of, share, taken);
        while (end && !__atomic_compare_exchange_n(at, &taken, end, 0, __ATOMIC_RELAXED,
                                                   __ATOMIC_RELAXED));
        if (end) return;
    }
    turn->e = all->experts;
}

static void multiply_all(const products *all, int64_t threads) {
    const int64_t columns = all->kind == LINEAR ? all->outputs : all->inputs;
    int64_t work = 0;
    for (int64_t e = 0; e < all->experts; e++) work += work_of(all, e);
    if (!columns) return;
    const int most = worth(threads, work * all->outputs * all->inputs);
    shares of = {.columns = columns, .panels = parts_of(columns, PANEL), .count = shares_of(most)};
    share_out(&of, all, work);
#pragma omp parallel num_threads(most)
    {
        turn_of_thread now = {0}, next;
        next_turn(&now, all, &of);
        for (; now.e < all->experts; now = next) {
            next = now;
            next_turn(&next, all, &of);
            const product here = product_of(all, now.e);
            const product after = product_of(all, next.e < all->experts ? next.e : now.e);
            if (all->kind == OUTER)
                multiply_slabs(&here, now.mine, &after, next.mine);
            else
                multiply_columns(&here, now.mine, &after, next.mine);
        }
        streamed();
    }
}

/* y[r] = w[e(r)] x[r], or added to it; w (experts, outputs, inputs). */
void grouped_linear(float *y, const float *x, const float *w, const int64_t *starts,
                    int64_t experts, int64_t outputs, int64_t inputs, int64_t adds,
                    int64_t threads) {
    const products all = {LINEAR, y, x, w, starts, experts, outputs, inputs, adds, NULL};
    multiply_all(&all, threads);
}

/* x_grad[r] = y_grad[r] w[e(r)], or added to it. */
void grouped_linear_back(float *x_grad, const float *y_grad, const float *w,
                         const int64_t *starts, int64_t experts, int64_t outputs, int64_t inputs,
                         int64_t adds, int64_t threads) {
    const products all = {BACK, x_grad, y_grad, w, starts, experts, outputs, inputs, adds,
                          NULL};
    multiply_all(&all, threads);
}

/* w_grad[e] = y_grad[rows of e]^T x[rows of e], or added to it. Unless it is NULL, `squares` has a
 * number for each TOGETHER columns of an expert: their sum is that of the squares of w_grad[e]. */
void grouped_outer(float *w_grad, double *squares, const float *y_grad, const float *x,
                   const int64_t *starts, int64_t experts, int64_t outputs, int64_t inputs,
                   int64_t adds, int64_t threads) {
    const products all = {OUTER, w_grad, y_grad, x, starts, experts, outputs, inputs, adds,
                          squares};
    multiply_all(&all, threads);
}

/* y (rows, outputs) = x w^T, of one matrix w (outputs, inputs). */
void dense_linear(float *y, const float *x, const float *w, int64_t rows, int64_t outputs,
                  int64_t inputs, int64_t threads) {
    const int64_t starts[] = {0, rows};
    grouped_linear(y, x, w, starts, 1, outputs, inputs, 0, threads);
}
