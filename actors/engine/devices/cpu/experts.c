/* A mixture of gated experts on a CPU in float32. `kernels.py` compiles and calls it.

   Weights lie in panels of PANEL columns, so that what a tile reads is one stream:
   gate_up [experts, panels, width, PANEL], where a panel is PANEL / 2 gates and the values that they gate;
   down [experts, panels, inner, PANEL]. The last panel of each may end in zeros. */
#include "experts.h"

#define PANEL (NV * W)
#define HALF (PANEL / 2)

const long panel = PANEL;

/* hidden, out [tokens, width]; chosen, shares [tokens, k]: a token's experts and their weights.
   A token's result does not depend on the others': its sums run over the same numbers in the same order. */
void experts(const float *hidden, const long *chosen, const float *shares, const float *gate_up, const float *down,
             float *out, long tokens, long k, long count, long width, long inner) {
    const long pairs = tokens * k, panels = (inner + HALF - 1) / HALF, outs = (width + PANEL - 1) / PANEL;
    long *ends = calloc(count + 1, sizeof(long)), *token = malloc(sizeof(long) * pairs);
    float *share = malloc(sizeof(float) * pairs), *gated = aligned_alloc(64, sizeof(float) * pairs * panels * HALF);
    by_expert(chosen, shares, pairs, k, count, ends, token, share);
    #pragma omp parallel
    {
        const float *rows[QB];
        float tile[QB][PANEL] __attribute__((aligned(64)));
        #pragma omp for schedule(dynamic)
        for (long task = 0; task < count * panels; task++) {
            long e = task / panels, column = task % panels * HALF, end = ends[e];
            for (long first = e ? ends[e - 1] : 0; first < end; first += QB) {
                long n = end - first < QB ? end - first : QB;
                for (long i = 0; i < QB; i++) rows[i] = hidden + token[first + (i < n ? i : 0)] * width;
                product(NV, rows, gate_up + task * width * PANEL, PANEL, width, tile[0], PANEL, 0);
                for (long i = 0; i < n; i++)
                    for (int j = 0; j < HALF; j++)
                        gated[(first + i) * panels * HALF + column + j] = silu(tile[i][j]) * tile[i][HALF + j];
            }
        }
        #pragma omp for schedule(dynamic)
        for (long p = 0; p < outs; p++) {
            long column = p * PANEL, columns = width - column < PANEL ? width - column : PANEL;
            for (long t = 0; t < tokens; t++) memset(out + t * width + column, 0, sizeof(float) * columns);
            for (long e = 0; e < count; e++)
                for (long first = e ? ends[e - 1] : 0; first < ends[e]; first += QB) {
                    long n = ends[e] - first < QB ? ends[e] - first : QB;
                    for (long i = 0; i < QB; i++) rows[i] = gated + (first + (i < n ? i : 0)) * panels * HALF;
                    product(NV, rows, down + (e * outs + p) * inner * PANEL, PANEL, inner, tile[0], PANEL, 0);
                    for (long i = 0; i < n; i++)
                        for (long j = 0; j < columns; j++)
                            out[token[first + i] * width + column + j] += share[first + i] * tile[i][j];
                }
        }
    }
    free(ends); free(token); free(share); free(gated);
}
