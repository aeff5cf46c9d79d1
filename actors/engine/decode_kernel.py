"""Attention of decoding tokens on a CPU, in C: all sequences of a step in one call.

The one idea: one query attends to hundreds of keys, so the work is reading memory; torch's kernel, made for many
queries, reads it at a third of the speed that these forty lines reach. They are compiled for the model's shape with
the machine's own compiler, in under a second; without one, `scaled_dot_product_attention` does the same work.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import tempfile
from collections.abc import Sequence as Seq
from functools import cache
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SOURCE = r"""
#include <math.h>
#include <stdlib.h>

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

/* q, out [rows, HEADS, GROUP, DIM]; keys, values [HEADS, capacity, DIM]; a row attends to [starts, ends). */
void decode(const float *q, const float *keys, const float *values, float *out, const long *starts, const long *ends,
            long rows, long capacity, float scale) {
    #pragma omp parallel for schedule(dynamic)
    for (long task = 0; task < rows * HEADS; task++) {
        long row = task / HEADS, head = task % HEADS, length = ends[row] - starts[row];
        const float *key = keys + (head * capacity + starts[row]) * DIM, *query = q + task * GROUP * DIM;
        const float *value = values + (head * capacity + starts[row]) * DIM;
        float *scores = malloc(sizeof(float) * GROUP * length), sum[GROUP], total[GROUP][DIM] = {{0}};
        for (long t = 0; t < length; t++)
            for (int g = 0; g < GROUP; g++) {
                float dot = 0;
                #pragma omp simd reduction(+ : dot)
                for (int d = 0; d < DIM; d++) dot += query[g * DIM + d] * key[t * DIM + d];
                scores[g * length + t] = dot * scale;
            }
        for (int g = 0; g < GROUP; g++) {
            float *score = scores + g * length, most = -INFINITY, all = 0;
            #pragma omp simd reduction(max : most)
            for (long t = 0; t < length; t++) most = score[t] > most ? score[t] : most;
            #pragma omp simd reduction(+ : all)
            for (long t = 0; t < length; t++) { score[t] = exp_(score[t] - most); all += score[t]; }
            sum[g] = all;
        }
        for (long t = 0; t < length; t++)
            for (int g = 0; g < GROUP; g++) {
                float weight = scores[g * length + t];
                #pragma omp simd
                for (int d = 0; d < DIM; d++) total[g][d] += weight * value[t * DIM + d];
            }
        for (int g = 0; g < GROUP; g++)
            for (int d = 0; d < DIM; d++) out[(task * GROUP + g) * DIM + d] = total[g][d] / sum[g];
        free(scores);
    }
}
"""


class DecodeKernel:
    """The compiled function, for float32 caches of `heads` key heads of `dim`, each shared by `group` query heads."""

    def __init__(self, heads: int, group: int, dim: int) -> None:
        self.heads, self.group, self.dim = heads, group, dim
        self._call = _compile(heads, group, dim)

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, spans: Seq[tuple[int, int]], scale: float
    ) -> Tensor:
        """query [R, heads * group, dim], keys and values [heads, capacity, dim], where row r attends to places
        [start, end) = spans[r] -> [R, heads * group, dim]."""
        query = query.contiguous()
        out = torch.empty_like(query)
        rows = len(spans)
        places = ctypes.c_long * rows
        starts, ends = zip(*spans, strict=True)
        self._call(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            places(*starts),
            places(*ends),
            rows,
            keys.shape[1],
            scale,
        )
        return out


def decode_kernel(heads: int, group: int, dim: int, dtype: torch.dtype) -> DecodeKernel | None:
    """The kernel for a cache's shape, or None where it cannot be had."""
    if dtype != torch.float32 or which("cc") is None:
        return None
    try:
        return DecodeKernel(heads, group, dim)
    except (OSError, subprocess.CalledProcessError, AttributeError, StopIteration) as error:
        log.info("no compiled decode attention: %s", error)
        return None


@cache
def _compile(heads: int, group: int, dim: int) -> Any:
    # torch's own OpenMP: a second one would bring threads that fight with torch's for the same cores.
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    # Not -ffast-math: it would change how the whole process treats tiny numbers.
    flags = ["-O3", "-march=native", "-fopenmp"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]
    shape = [f"-DHEADS={heads}", f"-DGROUP={group}", f"-DDIM={dim}"]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "decode.c", Path(folder) / "decode.so"
        source.write_text(_SOURCE)
        for command in (
            ["cc", *flags, *shape, "-fPIC", "-c", str(source), "-o", f"{folder}/decode.o"],
            ["cc", "-shared", f"{folder}/decode.o", str(openmp), "-lm", "-o", str(library)],
        ):
            subprocess.run(command, check=True, capture_output=True)
        function = ctypes.CDLL(str(library)).decode
    pointer, long = ctypes.c_void_p, ctypes.c_long
    function.argtypes = [pointer, pointer, pointer, pointer, pointer, pointer, long, long, ctypes.c_float]
    function.restype = None
    return function
