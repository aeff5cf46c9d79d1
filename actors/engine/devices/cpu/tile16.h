/* Products of bfloat16 with sums in float32: on AMX, with AVX512-BF16, or with any vectors.

   a [rows, depth] lies row by row; b [depth, 32] in pairs of rows, [depth / 2, 32, 2], as the hardware takes it. */
#ifndef CPU_TILE16_H
#define CPU_TILE16_H
#include <stdint.h>
#include <unistd.h>
#include "tile.h"
#if defined __AMX_BF16__ || defined __AVX512BF16__
#include <immintrin.h>
#endif

#define ROWS 32         /* rows of a product: of `a` and of `c` so many are read, whatever they hold */
#define COLUMNS 32
#define UP(n) (((n) + 31) / 32 * 32)  /* depths, and columns in all, are multiples of 32, filled up with zeros */

typedef uint16_t bf16;
typedef uint32_t bits __attribute__((vector_size(4 * W)));

static inline float wide(bf16 x) { union { uint32_t i; float f; } u = { (uint32_t)x << 16 }; return u.f; }

/* The nearest bfloat16, ties to even; NaN stays NaN. */
static inline bf16 narrow(float x) {
    union { float f; uint32_t i; } u = { x };
    uint32_t rounded = (u.i + 0x7fff + (u.i >> 16 & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}

#ifdef __AMX_BF16__
struct tiles { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } __attribute__((aligned(64)));

/* Linux gives a process its tiles when it asks (ARCH_REQ_XCOMP_PERM of XTILE_DATA). */
int ready(void) { return syscall(158, 0x1023, 18) == 0; }

/* A thread's tiles may be another library's: they are given back as they were. */
#define PRODUCTS_BEGIN \
    struct tiles before, ours = { .palette = 1 }; \
    for (int t = 0; t < 8; t++) { ours.bytes[t] = 64; ours.rows[t] = 16; } \
    _tile_storeconfig(&before); \
    _tile_loadconfig(&ours);
#define PRODUCTS_END _tile_loadconfig(&before);

/* c [32, ldc] = (c +) a [32, depth] * b; of rows beyond the first `rows`, nothing can be said. */
static inline __attribute__((always_inline)) void product16(const bf16 *a, long lda, const bf16 *b, long depth, float *c,
        long ldc, int more, long rows) {
    const int two = rows > 16;
    if (more) {
        _tile_loadd(0, c, 4 * ldc); _tile_loadd(1, c + 16, 4 * ldc);
        if (two) { _tile_loadd(2, c + 16 * ldc, 4 * ldc); _tile_loadd(3, c + 16 * ldc + 16, 4 * ldc); }
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (long k = 0; k < depth; k += 32) {
        _tile_loadd(4, a + k, 2 * lda);
        _tile_loadd(6, b + k * COLUMNS, 128); _tile_loadd(7, b + k * COLUMNS + 32, 128);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, a + 16 * lda + k, 2 * lda);
            _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 4 * ldc); _tile_stored(1, c + 16, 4 * ldc);
    if (two) { _tile_stored(2, c + 16 * ldc, 4 * ldc); _tile_stored(3, c + 16 * ldc + 16, 4 * ldc); }
}
#else
int ready(void) { return 1; }
#define PRODUCTS_BEGIN
#define PRODUCTS_END
#define VECTORS16 (COLUMNS / W)
#define AT_ONCE (W == 16 ? 8 : 2)

static inline __attribute__((always_inline)) void product16(const bf16 *a, long lda, const bf16 *b, long depth, float *c,
        long ldc, int more, long rows) {
    for (long first = 0; first < rows; first += AT_ONCE) {
        vec sum[AT_ONCE][VECTORS16];
        #pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; i++)
            #pragma GCC unroll 4
            for (int j = 0; j < VECTORS16; j++)
                sum[i][j] = more ? *(vec *)(c + (first + i) * ldc + j * W) : (vec){0};
        for (long k = 0; k < depth; k += 2) {
            bits pairs[VECTORS16];
            #pragma GCC unroll 4
            for (int j = 0; j < VECTORS16; j++) pairs[j] = *(const bits *)(b + k * COLUMNS + 2 * j * W);
            #pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; i++) {
                const bf16 *pair = a + (first + i) * lda + k;
                #pragma GCC unroll 4
                for (int j = 0; j < VECTORS16; j++) {
#ifdef __AVX512BF16__
                    __m512bh both = (__m512bh)_mm512_set1_epi32(*(const int *)pair);
                    sum[i][j] = (vec)_mm512_dpbf16_ps((__m512)sum[i][j], both, (__m512bh)pairs[j]);
#else
                    sum[i][j] += wide(pair[0]) * (vec)(pairs[j] << 16) + wide(pair[1]) * (vec)(pairs[j] & 0xffff0000u);
#endif
                }
            }
        }
        #pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; i++)
            #pragma GCC unroll 4
            for (int j = 0; j < VECTORS16; j++) *(vec *)(c + (first + i) * ldc + j * W) = sum[i][j];
    }
}
#endif
#endif
