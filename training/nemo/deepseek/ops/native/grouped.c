/* Products of rows, sorted by expert, with each expert's own matrix, and the gradients of both.
 *
 * All is contiguous. Rows starts[e] to starts[e + 1] are those of expert e; `starts` has one number
 * more than there are experts.
 *
 * Of a product c = a b, b is read where it lies, if a has few rows; for many, a block of it is laid
 * out in panels, as many columns as a tile of sums is wide, which stay in a core's cache while all
 * rows pass by (see `way`). Where a's rows lie in columns it is a that is laid out, for all panels.
 * An expert's matrix comes from memory, so what is read next is asked for meanwhile. Each sum is
 * added up in the order of its terms, whichever the way: no result depends on other rows, on where
 * its row lies, nor on threads. */
#include "lanes.h"
#include "quarters.h"
#include "threads.h"
#include "tile.h"

enum {
    LINE = 16,          /* floats in a line of the caches */
    ROOM = 1 << 17,     /* floats of a block in panels: a quarter of a large second cache */
    DEPTH = 2048,       /* most terms of a block of b that lies (columns, depth) */
    ROWS = 256,         /* of one that lies (depth, columns): few long rows, no short pieces */
    PLACE = 64,         /* of one that is read there: it and the next are in the cache */
    ONCE = 512,         /* of a slab of a; of no more terms, c, which is large, is written once */
    SIDE = (TILE + 7) / 8 * 8,    /* floats of a column of its tiles, which is not in two lines */
    NEAR = 1 << 13,               /* of panels that meet it together: of the first cache */
    LAID = ROOM + PANEL * DEPTH,  /* that a thread lays out: a block and one panel more, a slab */
    FEW = 96,           /* rows for which b is not laid out, if it lies (depth, columns) */
    NARROW = 32,        /* if it lies (columns, depth): of more, too many lanes are empty */
    STRIP = 96,         /* columns of c that are turned at a time: panels */
    SLOWEST = LINE / 4,   /* numbers a step: no line is asked for often */
    ROWS_PACE = LINE / 2, /* of rows: at a line a step others wait for their turn */
    READING = 16,       /* reading a matrix takes as long as multiplying so many rows, about */
    TOGETHER = 8,       /* columns that have a number for their squares: no panel has fewer */
    SHARE = 2,          /* of a thread's share it takes this part: it has two, one of them ahead */
    LEAST = 64          /* columns that it takes, at least: each time rows are read anew */
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

/* c (rows, width vectors) = a (rows, depth) b (depth, width vectors), or added to it; the squares
 * of c are added to `squares`, unless that is NULL. */
INLINE void tile(const int rows, const int width, int64_t depth, float *c, int64_t c_step,
                 const float *a, int64_t a_row, int64_t a_depth, const float *b, int64_t b_step,
                 int adds, int streams, double *squares, wanted *next) {
    lanes sum[TILE][WIDTH];
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int v = 0; v < width; v++)
            sum[r][v] = adds ? load(c + r * c_step + v * LANES) : (lanes){0};
    const float *asks = asked(next, depth), *ahead = asks ? asks : b; /* b is there already */
    add_products(sum, rows, width, depth, a, a_row, a_depth, b, b_step, 1, ahead,
                 asks ? next->pace : 0);
    UNROLLED for (int r = 0; r < rows; r++, c += c_step) {
        OPAQUE(c); /* an address of each row would be laid aside meanwhile */
        UNROLLED for (int v = 0; v < width; v++) {
            if (streams)
                stream(c + v * LANES, sum[r][v]);
            else
                store(c + v * LANES, sum[r][v]);
        }
    }
    if (!squares) return;
    lanes of_rows[WIDTH] = {{0}};
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int v = 0; v < width; v++) of_rows[v] += sum[r][v] * sum[r][v];
    *squares += total(width == 1 ? of_rows[0] : of_rows[0] + of_rows[1]);
}

/* Numbers of rows as constants, so that every tile is a loop whose sums are registers. */
#define OF_ROWS(rows)                                                                            \
    case rows:                                                                                   \
        tile(rows, width, depth, c, c_step, a, a_row, a_depth, b, b_step, adds, streams,         \
             squares, next);                                                                     \
        break;
INLINE void tile_of_rows(int64_t rows, const int width, int64_t depth, float *c, int64_t c_step,
                         const float *a, int64_t a_row, int64_t a_depth, const float *b,
                         int64_t b_step, int adds, int streams, double *squares, wanted *next) {
    switch (rows) {
        OF_ROWS(1) OF_ROWS(2) OF_ROWS(3) OF_ROWS(4) OF_ROWS(5) OF_ROWS(6)
#if defined(__AVX512F__) || defined(__aarch64__)
        OF_ROWS(7) OF_ROWS(8) OF_ROWS(9) OF_ROWS(10) OF_ROWS(11) OF_ROWS(12) OF_ROWS(13) OF_ROWS(14)
#endif
    }
}
#undef OF_ROWS

static void any_tile(int64_t rows, int64_t columns, int64_t depth, float *c, int64_t c_step,
                     const float *a, int64_t a_row, int64_t a_depth, const float *b, int64_t b_step,
                     int adds, int streams, double *squares, wanted *next) {
    float edge[TILE * PANEL];
    const int64_t step = c_step;
    float *to = c;
    if (columns % LANES) { /* no whole vectors: beside c, and copied */
        c = edge, c_step = PANEL, streams = 0;
        if (adds) memset(edge, 0, sizeof edge); /* what is behind the columns is squared, too */
        for (int64_t r = 0; adds && r < rows; r++)
            for (int64_t i = 0; i < columns; i++) edge[r * PANEL + i] = to[r * step + i];
    }
    if (columns > LANES)
        tile_of_rows(rows, 2, depth, c, c_step, a, a_row, a_depth, b, b_step, adds, streams,
                     squares, next);
    else
        tile_of_rows(rows, 1, depth, c, c_step, a, a_row, a_depth, b, b_step, adds, streams,
                     squares, next);
    for (int64_t r = 0; to != c && r < rows; r++)
        for (int64_t i = 0; i < columns; i++) to[r * step + i] = edge[r * PANEL + i];
}

/* The vectors of the panel that begins at `begin`, of so many columns. */
INLINE int64_t panel_step(int64_t begin, int64_t columns) {
    return columns - begin > LANES ? PANEL : LANES;
}

/* Panels [k][column] of b (depth, columns). */
static void lay_rows(float *panels, const float *b, int64_t b_step, int64_t depth,
                     int64_t columns) {
    for (int64_t n = 0; n < columns; n += PANEL) {
        const int64_t step = panel_step(n, columns), here = columns - n < step ? columns - n : step;
        float *to = panels + n * depth;
        if (here == PANEL)
            for (int64_t k = 0; k < depth; k++)
                for (int v = 0; v < WIDTH; v++)
                    store(to + k * PANEL + v * LANES, load(b + k * b_step + n + v * LANES));
        else
            for (int64_t k = 0; k < depth; k++)
                for (int64_t i = 0; i < step; i++)
                    to[k * step + i] = i < here ? b[k * b_step + n + i] : 0;
    }
}

/* What a thread works with: what is read by many tiles, and what stays in the first cache. */
static _Thread_local float panels_of_thread[LAID] __attribute__((aligned(64)));
static _Thread_local float near_of_thread[LANES * DEPTH] __attribute__((aligned(64)));

/* Panels [k][column] of b^T, b (columns, depth). */
static void lay_columns(float *panels, const float *b, int64_t b_step, int64_t depth,
                        int64_t columns) {
    for (int64_t n = 0; n < columns; n += LANES, b += LANES * b_step) {
        const int64_t begin = n / PANEL * PANEL, step = panel_step(begin, columns);
        const float *rows = b;
        int64_t rows_step = b_step;
        if (n + LANES > columns) { /* no whole vector: zeros beside the rest */
            rows = near_of_thread, rows_step = depth;
            memset(near_of_thread, 0, LANES * depth * sizeof *b);
            for (int64_t i = 0; n + i < columns; i++)
                memcpy(near_of_thread + i * depth, b + i * b_step, depth * sizeof *b);
        }
        turn_rows(panels + begin * depth + (n - begin), step, rows, rows_step, depth);
    }
}

static _Thread_local float turned_of_thread[STRIP * NARROW] __attribute__((aligned(64)));

/* Rows in tiles, of which `longer` have one more than the others. */
typedef struct {
    int64_t tiles, each, longer;
} tiling;

INLINE tiling tiling_of(int64_t rows) {
    const int64_t tiles = parts_of(rows, TILE);
    return (tiling){tiles, tiles ? rows / tiles : 0, tiles ? rows % tiles : 0};
}

/* Where tile `t` begins. */
INLINE int64_t tile_begin(tiling of, int64_t t) {
    return t * of.each + (t < of.longer ? t : of.longer);
}

/* Where b (depth, columns) lies: the panel of column n begins at n * `panel`; `step` from a row to
 * the next, 0: as wide as the panel. */
typedef struct {
    const float *at;
    int64_t panel, step;
} laid;

/* What tiles ask for: if `a` or `c`, rows of it that the next tile will need, which come as late
 * from memory as a tenth of the multiplications takes; and what follows on the block. */
typedef struct {
    int a, c;
    wanted next;
} requests;

/* Whole rows side by side, from the first to before `end`. */
INLINE wanted rows_of(const float *rows, int64_t first, int64_t end, int64_t width) {
    return (wanted){rows + first * width, end > first, (end - first) * width, 0, 0, ROWS_PACE};
}

/* c (rows, columns) = a (rows, depth) b (depth, columns), or added to it. */
static void multiply_panels(int64_t rows, int64_t columns, int64_t depth, float *c, int64_t c_step,
                            const float *a, int64_t a_step, laid b, int adds, requests *ahead) {
    const tiling of = tiling_of(rows);
    for (int64_t t = 0; t < of.tiles; t++) {
        const int64_t begin = tile_begin(of, t), end = tile_begin(of, t + 1);
        const int64_t after = t + 1 < of.tiles ? tile_begin(of, t + 2) : end;
        wanted of_a = rows_of(a, end, ahead->a ? after : end, a_step);
        wanted of_c = rows_of(c, end, ahead->c ? after : end, c_step);
        for (int64_t n = 0; n < columns; n += PANEL) {
            wanted *rest = of_c.rows ? &of_c : &ahead->next, *now = of_a.rows ? &of_a : rest;
            any_tile(end - begin, columns - n < PANEL ? columns - n : PANEL, depth,
                     c + begin * c_step + n, c_step, a + begin * a_step, a_step, 1,
                     b.at + n * b.panel, b.step ? b.step : panel_step(n, columns), adds, 0, NULL,
                     now);
        }
    }
}

enum kind { LINEAR, BACK, OUTER };

/* c (rows, columns) = a (rows, depth) b (depth, columns), or added to c. b lies (columns, depth) if
 * LINEAR, a lies (depth, rows) if OUTER; steps are from a row to the next, as they lie. */
typedef struct {
    enum kind kind;
    float *c;
    const float *a, *b;
    int64_t rows, columns, depth, a_step, b_step;
    int adds;
    double *squares; /* of TOGETHER columns of c each; NULL: nobody wants them */
} product;

/* How c = a b is made. PANELS: b is laid out. IN_PLACE: b, which lies by rows of whole vectors, is
 * read there. TURNED: as c^T = b^T a^T, where b lies by columns; a is laid out. To turn a few rows
 * is cheaper than to turn a matrix, though their vectors are not full. */
typedef enum { PANELS, IN_PLACE, TURNED } way;

static way way_of(const product *p) {
    if (p->rows > FEW) return PANELS;
    if (p->kind == BACK) return p->columns % LANES ? PANELS : IN_PLACE;
    return p->rows <= NARROW && p->depth <= DEPTH ? TURNED : PANELS;
}

/* The part of a product that is made of one block of b. */
typedef struct {
    int64_t n, columns, k, depth;
} block;

/* Block `i` of some columns of a product; without columns: there is no such. */
static block block_at(const product *p, part mine, int64_t i) {
    const way how = way_of(p);
    const int64_t deepest = how == IN_PLACE ? PLACE : p->kind == BACK ? ROWS : DEPTH;
    const int64_t deep = p->depth > deepest ? parts_of(p->depth, deepest) : 1;
    const int64_t depth = parts_of(p->depth, deep);
    int64_t most = how == TURNED ? STRIP : ROOM / (depth ? depth : 1) / PANEL * PANEL;
    if (most < PANEL) most = PANEL;
    const int64_t panels = parts_of(mine.end - mine.begin, PANEL);
    const int64_t wide = parts_of(panels * PANEL, most), n = i / deep, k = i % deep * depth;
    block b = {mine.end, 0, k, 0};
    if (n >= wide) return b;
    const int64_t end = mine.begin + (n + 1) * panels / wide * PANEL;
    b.n = mine.begin + n * panels / wide * PANEL;
    b.columns = (end < mine.end ? end : mine.end) - b.n;
    b.depth = p->depth - k < depth ? p->depth - k : depth;
    return b;
}

INLINE const float *block_of(const product *p, block b) {
    return p->kind == BACK ? p->b + b.k * p->b_step + b.n : p->b + b.n * p->b_step + b.k;
}

/* b of a block, where a tile reads it; if TURNED: a, which has been laid out for all blocks. */
static laid lay_block(const product *p, block b, way how) {
    const laid in_place = {block_of(p, b), 1, p->b_step}, panels = {panels_of_thread, b.depth, 0};
    if (how == IN_PLACE) return in_place;
    if (how == PANELS && p->kind == LINEAR)
        lay_columns(panels_of_thread, block_of(p, b), p->b_step, b.depth, b.columns);
    if (how == PANELS && p->kind == BACK)
        lay_rows(panels_of_thread, block_of(p, b), p->b_step, b.depth, b.columns);
    return panels;
}

/* c^T of a block, and turned back; `panels`: of a^T. */
static void multiply_turned(const product *p, block now, laid panels,
                            requests *ahead) {
    const int64_t step = whole(p->rows, LANES);
    float *c = p->c + now.n, *c_t = turned_of_thread;
    for (int64_t r = 0; p->adds && r < p->rows; r++)
        for (int64_t i = 0; i < now.columns; i++) c_t[i * step + r] = c[r * p->columns + i];
    multiply_panels(now.columns, step, p->depth, c_t, step, block_of(p, now), p->b_step, panels,
                    p->adds, ahead);
    int64_t i = 0;
    for (; i + LANES <= now.columns; i += LANES)
        turn_rows(c + i, p->columns, c_t + i * step, step, p->rows);
    for (; i < now.columns; i++)
        for (int64_t r = 0; r < p->rows; r++) c[r * p->columns + i] = c_t[i * step + r];
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

/* A block of a product that follows on one of so many steps. */
static wanted next_block(const product *p, block b, int64_t steps) {
    const int by_rows = p->kind == BACK;
    wanted next = wanted_of(block_of(p, b), by_rows ? b.depth : b.columns,
                            by_rows ? b.columns : b.depth, p->b_step);
    next.pace = pace_of(b.depth * b.columns, steps);
    return next;
}

/* The rows that tiles of a product's first block ask for: others find them in the second cache. Not
 * those of few rows, whose time is that of the matrix. */
static requests requests_of(const product *p, part mine, int64_t i) {
    const int asks = i == 0 && way_of(p) == PANELS, all = mine.end - mine.begin == p->columns;
    return (requests){asks, asks && all, {0}};
}

/* Steps of a block's tiles, of so many rows and columns, in which they ask for what follows. */
static int64_t steps_left(const product *p, const requests *ahead, int64_t rows, int64_t columns,
                          int64_t depth) {
    const int64_t panels = parts_of(columns, PANEL), asked = ROWS_PACE * depth;
    const int64_t of_rows = (ahead->a ? p->a_step : 0) + (ahead->c ? p->columns : 0);
    const int64_t taken = depth ? parts_of(TILE * of_rows, asked) : 0;
    return parts_of(rows, TILE) * (panels > taken ? panels - taken : 1) * depth;
}

/* Some columns of a product; meanwhile its next block is asked for, and then that of `after`. */
static void multiply_columns(const product *p, part mine, const product *after, part its) {
    const way how = way_of(p);
    block next = block_at(p, mine, 0);
    if (how == TURNED) lay_columns(panels_of_thread, p->a, p->a_step, p->depth, p->rows);
    for (int64_t i = 0; next.columns; i++) {
        const block now = next;
        const int64_t rows = how == TURNED ? now.columns : p->rows;
        const int64_t columns = how == TURNED ? p->rows : now.columns;
        const laid b = lay_block(p, now, how);
        requests ahead = requests_of(p, mine, i);
        const int64_t steps = steps_left(p, &ahead, rows, columns, now.depth);
        next = block_at(p, mine, i + 1);
        ahead.next = next.columns ? next_block(p, next, steps)
                                  : next_block(after, block_at(after, its, 0), steps);
        if (how == TURNED)
            multiply_turned(p, now, b, &ahead);
        else
            multiply_panels(p->rows, now.columns, now.depth, p->c + now.n, p->columns,
                            p->a + now.k, p->a_step, b, p->adds || now.k > 0, &ahead);
    }
}

/* What is laid out at a time of a that lies (depth, rows): some tiles, and some of the depth. */
typedef struct {
    int64_t first, tiles, k, depth;
} slab;

/* Slab `i` of a product; without tiles: there is no such. */
static slab slab_at(const product *p, int64_t i) {
    const int64_t deep = p->depth > ONCE ? parts_of(p->depth, ROWS) : 1;
    const int64_t depth = parts_of(p->depth, deep), k = i % deep * depth;
    const int64_t tiles = parts_of(p->rows, TILE);
    const int64_t high = parts_of(tiles, LAID / (SIDE * (depth ? depth : 1))), h = i / deep;
    if (h >= high) return (slab){0};
    const int64_t first = h * tiles / high, here = p->depth - k < depth ? p->depth - k : depth;
    return (slab){first, (h + 1) * tiles / high - first, k, here};
}

/* [tile][k][row]. */
static void lay_slab(const product *p, slab s) {
    const tiling of = tiling_of(p->rows);
    const int64_t all = p->depth * p->rows;
    for (int64_t k = 0; k < s.depth; k++)
        for (int64_t t = 0; t < s.tiles; t++) {
            float *side = panels_of_thread + (t * s.depth + k) * SIDE;
            const int64_t begin = tile_begin(of, s.first + t);
            const int64_t at = (s.k + k) * p->rows + begin;
            if (at + SIDE <= all)
                memcpy(side, p->a + at, SIDE * sizeof *side); /* those behind are not used */
            else
                memcpy(side, p->a + at, (tile_begin(of, s.first + t + 1) - begin) * sizeof *side);
        }
}

/* What is read for a slab that follows on one of so many steps: of a, and some columns of b. */
static void next_slab(wanted next[2], const product *p, slab s, part columns, int64_t steps) {
    const tiling of = tiling_of(p->rows);
    const int64_t first = tile_begin(of, s.first), rows = tile_begin(of, s.first + s.tiles) - first;
    const int64_t wide = columns.end - columns.begin;
    next[0] = wanted_of(p->a + s.k * p->a_step + first, s.depth, rows, p->a_step);
    next[1] = wanted_of(p->b + s.k * p->b_step + columns.begin, s.depth, wide, p->b_step);
    next[0].pace = next[1].pace = pace_of(s.depth * (rows + wide), steps);
}

/* Asks for a tile of c that will be read, or written by way of the caches. */
INLINE void ask_tile(const float *c, int64_t step) {
    for (int64_t r = 0; r < TILE; r++)
        for (int64_t i = 0; i < PANEL; i += LINE) __builtin_prefetch(c + r * step + i, 1, 2);
}

/* Some columns of a product whose a lies (depth, rows), and their squares: those of a panel go to
 * its first number. Meanwhile its next slab is asked for, and then that of `after`. A tile writes c
 * past the caches, if nothing is added to it: it is large, and not read soon. */
static void multiply_slabs(const product *p, part mine, const product *after, part its) {
    const int aligned = (uintptr_t)p->c % sizeof(lanes) == 0 && p->columns % LANES == 0;
    const tiling of = tiling_of(p->rows);
    slab next = slab_at(p, 0);
    for (int64_t i = 0; next.tiles; i++) {
        const slab now = next;
        const int adds = p->adds || now.k > 0;
        const int last_terms = now.k + now.depth == p->depth;
        const int streams = aligned && !p->adds && last_terms;
        double *squares = p->squares && last_terms ? p->squares + mine.begin / TOGETHER : NULL;
        if (squares && now.first == 0)
            memset(squares, 0, parts_of(mine.end - mine.begin, TOGETHER) * sizeof *squares);
        const int64_t steps = parts_of(mine.end - mine.begin, PANEL) * now.tiles * now.depth;
        const int64_t panels = now.depth ? NEAR / (PANEL * now.depth) : 0;
        const int64_t wide = panels > 1 ? panels * PANEL : PANEL;
        wanted ahead[2];
        next = slab_at(p, i + 1);
        if (next.tiles)
            next_slab(ahead, p, next, mine, steps);
        else
            next_slab(ahead, after, slab_at(after, 0), its, steps);
        lay_slab(p, now);
        for (int64_t n = mine.begin; n < mine.end; n += wide) {
            const int64_t columns = mine.end - n < wide ? mine.end - n : wide;
            lay_rows(near_of_thread, p->b + now.k * p->b_step + n, p->b_step, now.depth, columns);
            for (int64_t t = 0; t < now.tiles; t++) {
                const int64_t begin = tile_begin(of, now.first + t);
                const int64_t end = tile_begin(of, now.first + t + 1);
                const float *a = panels_of_thread + t * now.depth * SIDE;
                float *c = p->c + begin * p->columns + n;
                for (int64_t i = 0; i < columns; i += PANEL) {
                    if (!streams && t + 1 < now.tiles)
                        ask_tile(c + (end - begin) * p->columns + i, p->columns);
                    any_tile(end - begin, columns - i < PANEL ? columns - i : PANEL, now.depth,
                             c + i, p->columns, a, 1, SIDE, near_of_thread + i * now.depth,
                             panel_step(i, columns), adds, streams,
                             squares ? squares + (n - mine.begin + i) / TOGETHER : NULL,
                             ahead + !ahead->rows);
                }
            }
        }
    }
}

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
