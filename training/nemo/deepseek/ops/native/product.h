/* A product of two matrices, as it is made, or as its gradients are. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include <stdint.h>

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

#endif
