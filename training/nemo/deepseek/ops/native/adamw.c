/* AdamW of many parameters at once, most of them small. */
#include <math.h>
#include <stdint.h>

#include "threads.h"

/* A part of a parameter, so that the threads have equal shares of large ones. */
enum { PART = 1 << 14, UPDATE = 4 };

/* `addresses` (4, count): of parameters, gradients and both moments, of sizes[i] numbers each.
 * `steps` are the updates before this one, and are counted. */
void adamw(const int64_t *restrict addresses, const int64_t *restrict step_addresses,
           const int64_t *restrict sizes, int64_t count, double rate, double first_decay,
           double second_decay, double epsilon, double weight_decay, int64_t threads) {
    for (int64_t i = 0; i < count; i++) {
        float *restrict p = (float *)addresses[i], *restrict m = (float *)addresses[2 * count + i];
        float *restrict v = (float *)addresses[3 * count + i];
        const float *restrict g = (const float *)addresses[count + i];
        float *step = (float *)step_addresses[i];
        *step += 1;
        const double first = 1 - pow(first_decay, *step), second = 1 - pow(second_decay, *step);
        const float size = (float)(rate / first), root = (float)(1 / sqrt(second));
        const float keep = (float)(1 - rate * weight_decay), eps = (float)epsilon;
        const float to_first = (float)(1 - first_decay), to_second = (float)(1 - second_decay);
        const float of_second = (float)second_decay;
        const int64_t parts = (sizes[i] + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(worth(threads, UPDATE *sizes[i]))
        for (int64_t part = 0; part < parts; part++) {
            const int64_t begin = part * PART;
            const int64_t end = begin + PART < sizes[i] ? begin + PART : sizes[i];
            for (int64_t j = begin; j < end; j++) {
                m[j] += (g[j] - m[j]) * to_first;
                v[j] = v[j] * of_second + g[j] * g[j] * to_second;
                p[j] = p[j] * keep - size * m[j] / (sqrtf(v[j]) * root + eps);
            }
        }
    }
}
