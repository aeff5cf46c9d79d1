/* What mixtures of experts need in either dtype. */
#include "tile.h"

static inline float silu(float x) {
    float e = exp_(x < 0 ? x : -x);
    return x * (x < 0 ? e : 1) / (1 + e);
}

/* Sorts pairs of a token and one of its k experts by expert: `token` and `share` of those of e lie in
   [ends[e - 1], ends[e]), from 0 for the first. ends [count + 1] is zeros before. */
static void by_expert(const long *chosen, const float *shares, long pairs, long k, long count, long *ends, long *token,
                      float *share) {
    for (long i = 0; i < pairs; i++) ends[chosen[i] + 1]++;
    for (long e = 0; e < count; e++) ends[e + 1] += ends[e];
    for (long i = 0; i < pairs; i++) {
        long at = ends[chosen[i]]++;
        token[at] = i / k; share[at] = shares[i];
    }
}
