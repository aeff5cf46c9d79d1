/* The register tile that the CPU kernels are built of: QB rows times NV vectors, as many sums as registers hold. */
#ifndef CPU_TILE_H
#define CPU_TILE_H
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define W 16            /* floats of a vector */
#define NV 4            /* vectors of a tile's row */
#else
#define W 8
#define NV 2
#endif
#define QB 6            /* rows of a tile */

typedef float vec __attribute__((vector_size(4 * W)));

/* exp(x) for x <= 0 to 1e-7: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes, expf); it vectorises. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = nearbyintf(x * 1.44269504088896341f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f; p = p * r * r + r + 1.0f;
    union { int i; float f; } power = { ((int)n + 127) << 23 };
    return p * power.f;
}

/* c [QB, n * W] = (c * keep[row] +) rows a[QB] of depth * b [depth, n * W]; n is a constant at every call. */
static inline __attribute__((always_inline)) void product(const int n, const float *const *a, const float *b, long ldb,
        long depth, float *c, long ldc, const float *keep) {
    vec sum[QB][NV];
    #pragma GCC unroll 8
    for (int i = 0; i < QB; i++)
        #pragma GCC unroll 4
        for (int j = 0; j < n; j++) sum[i][j] = keep ? *(vec *)(c + i * ldc + j * W) * keep[i] : (vec){0};
    for (long k = 0; k < depth; k++) {
        vec row[NV];
        #pragma GCC unroll 4
        for (int j = 0; j < n; j++) row[j] = *(const vec *)(b + k * ldb + j * W);
        #pragma GCC unroll 8
        for (int i = 0; i < QB; i++)
            #pragma GCC unroll 4
            for (int j = 0; j < n; j++) sum[i][j] += a[i][k] * row[j];
    }
    #pragma GCC unroll 8
    for (int i = 0; i < QB; i++)
        #pragma GCC unroll 4
        for (int j = 0; j < n; j++) *(vec *)(c + i * ldc + j * W) = sum[i][j];
}

#endif
