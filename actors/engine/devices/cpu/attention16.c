/* Attention on a CPU in bfloat16, with scores and sums in float32: as `attention.c`, of products on 32 queries at once. */
#include "tile16.h"

#define BLOCK 256       /* keys between two looks at the largest score */
#define DEEP UP(DIM)
#define PANELS (DEEP / COLUMNS)

/* 2^x for x <= 0 to 4e-5: what is made of it has 8 bits. */
static inline float exp2_(float x) {
    x = x < -126 ? -126 : x;
    float n = nearbyintf(x), r = x - n;
    float p = (((9.618437e-3f * r + 5.550332e-2f) * r + 2.402265e-1f) * r + 6.931472e-1f) * r + 1;
    union { int i; float f; } power = { ((int)n + 127) << 23 };
    return p * power.f;
}

/* As `narrow`, but ties go up: a few instructions less for what is no result. */
static inline bf16 rounded(float x) { union { float f; uint32_t i; } u = { x }; return (u.i + 0x8000) >> 16; }

typedef bf16 real;
#define load(x) wide(x)
#define save(x) narrow(x)
#include "decode.h"

/* stride, past, window: as in `attention.c`. Keys and values are packed first, filled up with zeros: keys
   [length / 32, DEEP / 2, 32, 2], a column each; values [PANELS, length / 2, 32, 2]. */
void attend(const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out, const long *stride, long batch, long queries,
            long length, long past, long window, float scale) {
    const float binary = scale * 1.44269504088896341f;  /* so that weights are powers of 2 */
    const long deep = (length + BLOCK - 1) / BLOCK * BLOCK, blocks = (queries + ROWS - 1) / ROWS, tiles = deep / COLUMNS;
    bf16 *turned = aligned_alloc(64, sizeof(bf16) * batch * HEADS * deep * DEEP);
    bf16 *paired = aligned_alloc(64, sizeof(bf16) * batch * HEADS * deep * DEEP);
    #pragma omp parallel for schedule(static)
    for (long at = 0; at < batch * HEADS * tiles; at++) {
        long tile = at % tiles, head = at / tiles % HEADS, row = at / tiles / HEADS, first = tile * COLUMNS;
        long count = length - first < COLUMNS ? length - first : COLUMNS;
        const bf16 *key = keys + row * stride[3] + head * stride[4] + first * stride[5];
        const bf16 *value = values + row * stride[6] + head * stride[7] + first * stride[8];
        bf16 *kt = turned + at * COLUMNS * DEEP, *vp = paired + (row * HEADS + head) * deep * DEEP + first * COLUMNS;
        uint32_t *columns = (uint32_t *)kt;
        for (long t = 0; t < COLUMNS; t++) {
            bf16 one[DEEP] __attribute__((aligned(64))) = {0};
            if (t < count) memcpy(one, key + t * stride[5], sizeof(bf16) * DIM);
            for (int d = 0; d < DEEP / 2; d++) memcpy(columns + d * COLUMNS + t, one + 2 * d, 4);
        }
        for (long t = 0; t < COLUMNS; t += 2) {
            bf16 one[DEEP] = {0}, other[DEEP] = {0};
            if (t < count) memcpy(one, value + t * stride[8], sizeof(bf16) * DIM);
            if (t + 1 < count) memcpy(other, value + (t + 1) * stride[8], sizeof(bf16) * DIM);
            for (int p = 0; p < PANELS; p++) {
                bf16 *pair = vp + p * deep * COLUMNS + t * COLUMNS;
                for (int d = 0; d < COLUMNS; d++) { pair[2 * d] = one[p * COLUMNS + d]; pair[2 * d + 1] = other[p * COLUMNS + d]; }
            }
        }
    }
    #pragma omp parallel
    {
    PRODUCTS_BEGIN
    #pragma omp for schedule(dynamic)
    for (long task = 0; task < batch * HEADS * GROUP * blocks; task++) {
        long block = blocks - 1 - task % blocks, head = task / blocks % (HEADS * GROUP), row = task / blocks / (HEADS * GROUP);
        long begin = block * ROWS, rows = queries - begin < ROWS ? queries - begin : ROWS;
        bf16 query[ROWS][DEEP] __attribute__((aligned(64))), weight[ROWS][BLOCK] __attribute__((aligned(64)));
        float score[ROWS][BLOCK] __attribute__((aligned(64))), total[ROWS][DEEP] __attribute__((aligned(64)));
        float most[ROWS], all[ROWS];
        for (long i = 0; i < ROWS; i++) {
            const bf16 *from = q + row * stride[0] + head * stride[1] + (begin + i) * stride[2];
            for (int d = 0; d < DEEP; d++) { query[i][d] = i < rows && d < DIM ? from[d] : 0; total[i][d] = 0; }
            most[i] = -1e30f; all[i] = 0;
        }
        long low = 0, high = length;  /* keys that any of these queries sees */
        if (past >= 0) {
            high = past + begin + rows < length ? past + begin + rows : length;
            low = past + begin - window + 1 > 0 ? past + begin - window + 1 : 0;
        }
        const long own = row * HEADS + head / GROUP;
        for (long first = low / COLUMNS * COLUMNS; first < high; first += BLOCK) {
            long count = high - first < BLOCK ? UP(high - first) : BLOCK;
            for (long j = 0; j < count; j += COLUMNS)
                product16(query[0], DEEP, turned + (own * deep + first + j) * DEEP, DEEP, score[0] + j, BLOCK, 0, rows);
            for (long i = 0; i < rows; i++) {
                long last = past < 0 ? length - 1 : past + begin + i, since = past < 0 ? 0 : last - window + 1;
                float *s = score[i], top = -INFINITY, sum = 0;
                if (first < since || first + count - 1 > last)
                    for (long j = 0; j < count; j++) s[j] = first + j <= last && first + j >= since ? s[j] : -INFINITY;
                #pragma omp simd reduction(max : top)
                for (long j = 0; j < count; j++) top = s[j] > top ? s[j] : top;
                top = top * binary > most[i] ? top * binary : most[i];
                #pragma omp simd reduction(+ : sum)
                for (long j = 0; j < count; j++) {
                    float e = exp2_(s[j] * binary - top);
                    sum += e;
                    weight[i][j] = rounded(e);
                }
                if (top > most[i]) {
                    float keep = exp2_(most[i] - top);
                    for (int d = 0; d < DEEP; d++) total[i][d] *= keep;
                    all[i] *= keep;
                    most[i] = top;
                }
                all[i] += sum;
            }
            for (int p = 0; p < PANELS; p++)
                product16(weight[0], BLOCK, paired + own * deep * DEEP + p * deep * COLUMNS + first * COLUMNS, count,
                          total[0] + p * COLUMNS, DEEP, 1, rows);
        }
        for (long i = 0; i < rows; i++) {
            bf16 *to = out + row * stride[9] + head * stride[10] + (begin + i) * stride[11];
            float one = 1 / all[i];
            for (int d = 0; d < DIM; d++) to[d] = narrow(total[i][d] * one);
        }
    }
    PRODUCTS_END
    }
    free(turned);
    free(paired);
}
