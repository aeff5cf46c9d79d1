"""Attention and mixtures of experts on a CPU in C: `attention.c`, `experts.c`, and `attention16.c`, `experts16.c` for
bfloat16.

Torch's kernels are made for any shape and called one by one; compiled for one shape by the machine's own
compiler, in a second, the same arithmetic reads a cache three times as fast for one query and runs 2.5 times as fast
for many (float32, one Zen 5 core), and all experts of a layer are one call. In bfloat16 products use the machine's
matrix unit (AMX) or its AVX512-BF16, where it has them. Without a compiler, or in another dtype, torch and the model's
own code do the same work.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

KERNEL_DTYPES = {torch.float32: "", torch.bfloat16: "16"}
"""What the kernels compute in, and how their sources' names end."""

_UNBOUNDED = 2**62
_NO_COMPILER = (OSError, subprocess.CalledProcessError, AttributeError, StopIteration)
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class AttentionKernel:
    """The compiled functions, for a dtype of `KERNEL_DTYPES` and `heads` key heads of `dim`, each shared by `group`
    query heads. Scores and sums are float32."""

    def __init__(self, heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
        shape = {"HEADS": heads, "GROUP": group, "DIM": dim}
        library = _compile(f"attention{KERNEL_DTYPES[dtype]}.c", "-fassociative-math", **shape)
        self._decode, self._attend = library.decode, library.attend
        self._decode.argtypes = [*[_POINTER] * 6, _LONG, _LONG, _FLOAT]
        self._attend.argtypes = [*[_POINTER] * 5, *[_LONG] * 5, _FLOAT]
        self._decode.restype = self._attend.restype = None

    def decode(
        self, query: Tensor, keys: Tensor, values: Tensor, spans: Sequence[tuple[int, int]], scale: float
    ) -> Tensor:
        """query [R, heads * group, dim], keys and values [heads, capacity, dim], where row r attends to places
        [start, end) = spans[r] -> [R, heads * group, dim]."""
        query = query.contiguous()
        out = torch.empty_like(query)
        rows = len(spans)
        places = ctypes.c_long * rows
        starts, ends = zip(*spans, strict=True)
        self._decode(
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

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        past: int | None = None,
        window: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """query [B, heads * group, n, dim], keys and values [B, heads, L, dim] -> [B, n, heads * group, dim].

        With `past`, causal: query i stands at position past + i and sees what is not after it, the `window` last of
        it if given. Without, every query sees every key. Only the last dimension need be contiguous. The result is
        written to `out` if given.
        """
        for tensor in (query, keys, values):
            if tensor.stride(-1) != 1:  # C would read its neighbours
                raise ValueError(f"the last of dimensions {tuple(tensor.shape)} is not contiguous")
        batch, heads, queries, dim = query.shape
        if out is None:
            out = query.new_empty(batch, queries, heads, dim)
        seen = out.transpose(1, 2)
        strides = [stride for each in (query, keys, values, seen) for stride in each.stride()[:3]]
        self._attend(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            (ctypes.c_long * 12)(*strides),
            batch,
            queries,
            keys.shape[2],
            -1 if past is None else past,
            _UNBOUNDED if window is None else window,
            scale,
        )
        return out


class ExpertsKernel:
    """A layer's gated experts (SiLU), their weights packed: gate_up [E, D, 2 * I] and down [E, I, D], of a dtype of
    `KERNEL_DTYPES`."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        library = _experts_library(down.dtype)
        panel = ctypes.c_long.in_dll(library, "panel").value
        self._experts = library.experts
        self._experts.argtypes = [*[_POINTER] * 6, *[_LONG] * 5]
        self._experts.restype = None
        self.count, self.inner, self.width = down.shape
        both = (_panels(part, panel // 2) for part in gate_up.split(self.inner, dim=2))
        self.gate_up = _in_pairs(torch.cat(list(both), dim=3)).contiguous()
        self.down = _in_pairs(_panels(down, panel)).contiguous()

    def __call__(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """hidden [N, D]; int64 ids and weights [N, k] of each token's experts -> [N, D]."""
        hidden, chosen, shares = hidden.contiguous(), chosen.contiguous(), shares.float().contiguous()
        out = torch.empty_like(hidden)
        tokens, choices = chosen.shape
        pointers = [each.data_ptr() for each in (hidden, chosen, shares, self.gate_up, self.down, out)]
        self._experts(*pointers, tokens, choices, self.count, self.width, self.inner)
        return out


def _panels(weights: Tensor, columns: int) -> Tensor:
    """[E, K, N] -> [E, panels, K, columns], the last panel padded with zeros."""
    padded = F.pad(weights, (0, -weights.shape[2] % columns))
    return padded.unflatten(2, (-1, columns)).transpose(1, 2)


def _in_pairs(panels: Tensor) -> Tensor:
    """bfloat16 [E, panels, K, columns] -> [E, panels, K / 2, columns, 2], K padded to a multiple of 32. float32 stays
    as it is."""
    if panels.dtype == torch.float32:
        return panels
    padded = F.pad(panels, (0, 0, 0, -panels.shape[2] % 32))
    return padded.unflatten(2, (-1, 2)).transpose(3, 4)


@cache
def attention_kernel(heads: int, group: int, dim: int, dtype: torch.dtype) -> AttentionKernel | None:
    """The kernel for a shape, or None where it cannot be had."""
    if dtype not in KERNEL_DTYPES:
        return None
    try:
        return AttentionKernel(heads, group, dim, dtype)
    except _NO_COMPILER as error:
        log.info("no compiled attention: %s", error)
        return None


def experts_can_be_compiled(dtype: torch.dtype) -> bool:
    """Whether an ExpertsKernel can be made here."""
    try:
        _experts_library(dtype)
    except _NO_COMPILER as error:
        log.info("no compiled experts: %s", error)
        return False
    return True


@cache
def _experts_library(dtype: torch.dtype) -> ctypes.CDLL:
    # Nothing is re-ordered: copies of a loop would round differently, and a token's last bit depend on its place.
    return _compile(f"experts{KERNEL_DTYPES[dtype]}.c")


def _compile(source: str, *more: str, **constants: int) -> ctypes.CDLL:
    """The library of `source`; in bfloat16 without the matrix unit where the system does not lend it."""
    library = _build(source, *more, **constants)
    if hasattr(library, "ready") and not library.ready():
        library = _build(source, "-mno-amx-bf16", "-mno-amx-tile", *more, **constants)
    return library


def _build(source: str, *more: str, **constants: int) -> ctypes.CDLL:
    # torch's own OpenMP: a second one would bring threads that fight with torch's for the same cores.
    openmp = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    # Not -ffast-math: it would change how the whole process treats tiny numbers.
    flags = ["-O3", "-march=native", "-fopenmp"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", *more]
    shape = [f"-D{name}={value}" for name, value in constants.items()]
    with tempfile.TemporaryDirectory() as folder:
        built, library = f"{folder}/kernel.o", f"{folder}/kernel.so"
        for command in (
            ["cc", *flags, *shape, "-fPIC", "-c", str(Path(__file__).with_name(source)), "-o", built],
            ["cc", "-shared", built, str(openmp), "-lm", "-o", library],
        ):
            subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(library)
