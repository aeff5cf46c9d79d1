/* A mixture of gated experts on a CPU in bfloat16, with sums in float32: as `experts.c`, of products on 32 rows at once.

   Weights lie in panels of 32 columns and in pairs of rows: gate_up [experts, panels, width / 2, 32, 2], where a panel is
   16 gates and the values that they gate; down [experts, panels, inner / 2, 32, 2]. Zeros fill up what is no multiple of
   32 deep, or the last panel. */
#include "tile16.h"
#include "experts.h"

#define HALF (COLUMNS / 2)

const long panel = COLUMNS;

/* hidden, out [tokens, width]; chosen, shares [tokens, k]: a token's experts and their weights.
   A token's result does not depend on the others': its sums run over the same numbers in the same order. */
void experts(const bf16 *hidden, const long *chosen, const float *shares, const bf16 *gate_up, const bf16 *down,
             bf16 *out, long tokens, long k, long count, long width, long inner) {
    const long pairs = tokens * k, panels = (inner + HALF - 1) / HALF, outs = (width + COLUMNS - 1) / COLUMNS;
    const long deep = UP(width), within = UP(panels * HALF);
    long *ends = calloc(count + 1, sizeof(long)), *token = malloc(sizeof(long) * pairs);
    /* Rows of expert after expert; a product reads up to 32 of them, and what it makes of the next expert's is not used. */
    bf16 *rows = aligned_alloc(64, sizeof(bf16) * (pairs + ROWS) * deep);
    bf16 *gated = aligned_alloc(64, sizeof(bf16) * (pairs + ROWS) * within);
    float *share = malloc(sizeof(float) * pairs), *sums = aligned_alloc(64, sizeof(float) * tokens * outs * COLUMNS);
    by_expert(chosen, shares, pairs, k, count, ends, token, share);
    #pragma omp parallel
    {
        float tile[ROWS][COLUMNS] __attribute__((aligned(64)));
        PRODUCTS_BEGIN
        #pragma omp for schedule(static)
        for (long i = 0; i < pairs; i++) {
            memcpy(rows + i * deep, hidden + token[i] * width, sizeof(bf16) * width);
            memset(rows + i * deep + width, 0, sizeof(bf16) * (deep - width));
            memset(gated + i * within + panels * HALF, 0, sizeof(bf16) * (within - panels * HALF));
        }
        #pragma omp for schedule(dynamic)
        for (long task = 0; task < count * panels; task++) {
            long e = task / panels, column = task % panels * HALF, end = ends[e];
            for (long first = e ? ends[e - 1] : 0; first < end; first += ROWS) {
                long n = end - first < ROWS ? end - first : ROWS;
                product16(rows + first * deep, deep, gate_up + task * deep * COLUMNS, deep, tile[0], COLUMNS, 0, n);
                for (long i = 0; i < n; i++)
                    for (int j = 0; j < HALF; j++)
                        gated[(first + i) * within + column + j] = narrow(silu(tile[i][j]) * tile[i][HALF + j]);
            }
        }
        #pragma omp for schedule(dynamic)
        for (long p = 0; p < outs; p++) {
            long column = p * COLUMNS, columns = width - column < COLUMNS ? width - column : COLUMNS;
            float *sum = sums + p * tokens * COLUMNS;
            memset(sum, 0, sizeof(float) * tokens * COLUMNS);
            for (long e = 0; e < count; e++)
                for (long first = e ? ends[e - 1] : 0; first < ends[e]; first += ROWS) {
                    long n = ends[e] - first < ROWS ? ends[e] - first : ROWS;
                    product16(gated + first * within, within, down + (e * outs + p) * within * COLUMNS, within, tile[0],
                              COLUMNS, 0, n);
                    for (long i = 0; i < n; i++)
                        for (int j = 0; j < COLUMNS; j++)
                            sum[token[first + i] * COLUMNS + j] += share[first + i] * tile[i][j];
                }
            for (long t = 0; t < tokens; t++)
                for (long j = 0; j < columns; j++) out[t * width + column + j] = narrow(sum[t * COLUMNS + j]);
        }
        PRODUCTS_END
    }
    free(ends); free(token); free(share); free(rows); free(gated); free(sums);
}
