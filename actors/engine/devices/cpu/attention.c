/* Attention on a CPU in float32: one query over its past (decode), many queries over keys (attend).

   Compiled for a model's shape: HEADS key heads of DIM, each shared by GROUP query heads. `kernels.py` compiles and
   calls it. */
#include "tile.h"

#define TASK (8 * QB)   /* queries of a task */
#define TILE 64         /* keys at once: theirs and their values' slices stay in the first-level cache */
#define VECTORS ((DIM + W - 1) / W)
#define WIDE (VECTORS * W)

typedef float real;
#define load(x) (x)
#define save(x) (x)
#include "decode.h"

/* stride: of batch, head and token in q, keys, values and out, in floats.
   Causal where past >= 0: query i stands at past + i and sees what is not after it, `window` tokens of it at most. */
void attend(const float *q, const float *keys, const float *values, float *out, const long *stride, long batch,
            long queries, long length, long past, long window, float scale) {
    const long tiles = (length + TILE - 1) / TILE, blocks = (queries + TASK - 1) / TASK;
    float *turned = aligned_alloc(64, sizeof(float) * batch * HEADS * tiles * TILE * DIM);
    float *padded = aligned_alloc(64, sizeof(float) * batch * HEADS * tiles * TILE * WIDE);
    #pragma omp parallel for schedule(static)
    for (long at = 0; at < batch * HEADS * tiles; at++) {
        long tile = at % tiles, head = at / tiles % HEADS, row = at / tiles / HEADS, first = tile * TILE;
        long count = length - first < TILE ? length - first : TILE;
        const float *key = keys + row * stride[3] + head * stride[4] + first * stride[5];
        const float *value = values + row * stride[6] + head * stride[7] + first * stride[8];
        float *kt = turned + at * TILE * DIM, *vp = padded + at * TILE * WIDE;
        for (long t = 0; t < count; t++) {
            for (int d = 0; d < DIM; d++) kt[d * TILE + t] = key[t * stride[5] + d];
            memcpy(vp + t * WIDE, value + t * stride[8], sizeof(float) * DIM);
            for (int d = DIM; d < WIDE; d++) vp[t * WIDE + d] = 0;
        }
        for (long t = count; t < TILE; t++)
            for (int d = 0; d < DIM; d++) kt[d * TILE + t] = 0;
    }
    #pragma omp parallel for schedule(dynamic)
    for (long task = 0; task < batch * HEADS * GROUP * blocks; task++) {
        long block = blocks - 1 - task % blocks, head = task / blocks % (HEADS * GROUP), row = task / blocks / (HEADS * GROUP);
        long begin = block * TASK, rows = queries - begin < TASK ? queries - begin : TASK;
        float query[TASK][DIM] __attribute__((aligned(64))), total[TASK][WIDE] __attribute__((aligned(64)));
        float score[QB][TILE] __attribute__((aligned(64))), most[TASK], all[TASK], keep[QB];
        const float *scores[QB], *some[QB];
        for (int i = 0; i < QB; i++) scores[i] = score[i];
        for (long i = 0; i < TASK; i++) {
            const float *from = q + row * stride[0] + head * stride[1] + (begin + i) * stride[2];
            for (int d = 0; d < DIM; d++) query[i][d] = i < rows ? from[d] * scale : 0;
            for (int d = 0; d < WIDE; d++) total[i][d] = 0;
            most[i] = -1e30f; all[i] = 0;
        }
        long low = 0, high = length;  /* keys that any of these queries sees */
        if (past >= 0) {
            high = past + begin + rows < length ? past + begin + rows : length;
            low = past + begin - window + 1 > 0 ? past + begin - window + 1 : 0;
        }
        for (long tile = low / TILE; tile * TILE < high; tile++) {
            long first = tile * TILE, count = high - first < TILE ? high - first : TILE;
            long at = (row * HEADS + head / GROUP) * tiles + tile;
            const float *kt = turned + at * TILE * DIM, *vp = padded + at * TILE * WIDE;
            for (long i0 = 0; i0 < rows; i0 += QB) {
                long position = past + begin + i0;
                if (past >= 0 && (first > position + QB - 1 || first + TILE <= position - window + 1)) continue;
                for (int i = 0; i < QB; i++) some[i] = query[i0 + i];
                #pragma GCC unroll 4
                for (int j = 0; j < TILE; j += NV * W)
                    product(NV, some, kt + j, TILE, DIM, score[0] + j, TILE, 0);
                int whole = count == TILE && (past < 0 || (first + TILE - 1 <= position && first > position + QB - 1 - window));
                for (int i = 0; i < QB; i++) {
                    if (!whole) {
                        long last = past < 0 ? length - 1 : position + i, since = past < 0 ? 0 : position + i - window + 1;
                        for (long j = 0; j < TILE; j++)
                            score[i][j] = first + j <= last && first + j >= since ? score[i][j] : -1e30f;
                    }
                    float top = most[i0 + i], sum = 0;
                    #pragma omp simd reduction(max : top)
                    for (int j = 0; j < TILE; j++) top = score[i][j] > top ? score[i][j] : top;
                    #pragma omp simd reduction(+ : sum)
                    for (int j = 0; j < TILE; j++) { score[i][j] = exp_(score[i][j] - top); sum += score[i][j]; }
                    keep[i] = exp_(most[i0 + i] - top);
                    all[i0 + i] = all[i0 + i] * keep[i] + sum;
                    most[i0 + i] = top;
                }
                int column = 0;
                for (; column + NV <= VECTORS; column += NV)
                    product(NV, scores, vp + column * W, WIDE, count, total[i0] + column * W, WIDE, keep);
                if (VECTORS % NV)
                    product(VECTORS % NV, scores, vp + column * W, WIDE, count, total[i0] + column * W, WIDE, keep);
            }
        }
        for (long i = 0; i < rows; i++) {
            float *to = out + row * stride[9] + head * stride[10] + (begin + i) * stride[11], one = 1 / all[i];
            for (int d = 0; d < DIM; d++) to[d] = total[i][d] * one;
        }
    }
    free(turned);
    free(padded);
}
