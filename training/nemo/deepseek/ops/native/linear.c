/* A linear map of few rows. */
#include "decoding.h"
#include "products.h"
#include "threads.h"

/* y (rows, outputs) = x (rows, inputs) w (outputs, inputs)^T; all of them contiguous. */
void linear(float *y, const float *x, const float *w, int64_t rows, int64_t outputs,
            int64_t inputs, int64_t threads) {
#pragma omp parallel num_threads(worth(threads, rows *outputs *inputs))
    {
        part mine = my_part(outputs, TILE_WIDTH);
        dots(rows, mine.end - mine.begin, inputs, x, inputs, w + mine.begin * inputs, inputs,
             y + mine.begin, outputs);
    }
}
