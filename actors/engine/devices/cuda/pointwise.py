"""Fused pointwise kernels in Triton: norms, rotary embeddings, the product of a gated feed-forward block.

The stock modules take five to ten kernels for each, and each reads and writes all of its tensors; when few tokens
decode, launching them takes longer than a layer's matrix products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(x, weight, out, width, eps, CENTERED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        value = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if not CENTERED:  # stock rounds before it scales
        value = value.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, (value * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_kernel(both, out, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(both + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    active = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * inner + at, (active * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    token,
    heads,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, LANES)
    inside = lane < DIM // 2
    if INTERLEAVED:
        first, second = 2 * lane, 2 * lane + 1
    else:
        first, second = lane, lane + DIM // 2
    cosines, sines = cos + row * DIM, sin + row * DIM
    here = x + row * token + head[:, None] * DIM
    some = (head < heads)[:, None] & inside[None, :]
    a = tl.load(here + first[None, :], mask=some, other=0.0).to(tl.float32)
    b = tl.load(here + second[None, :], mask=some, other=0.0).to(tl.float32)
    cos_a, cos_b = (
        tl.load(cosines + first, mask=inside, other=0.0).to(tl.float32)[None, :],
        tl.load(cosines + second, mask=inside, other=0.0).to(tl.float32)[None, :],
    )
    sin_a, sin_b = (
        tl.load(sines + first, mask=inside, other=0.0).to(tl.float32)[None, :],
        tl.load(sines + second, mask=inside, other=0.0).to(tl.float32)[None, :],
    )
    kind = x.dtype.element_ty
    tl.store(here + first[None, :], (a * cos_a - b * sin_a).to(kind), mask=some)
    tl.store(here + second[None, :], (b * cos_b + a * sin_b).to(kind), mask=some)


def normalized(x: Tensor, weight: Tensor, eps: float, centered: bool) -> Tensor:
    """RMSNorm of the last dimension, or LayerNorm without a bias (`centered`), computed in float32; of x's shape."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(width)
    _norm_kernel[(x.numel() // width,)](
        x, weight, out, width, eps, CENTERED=centered, BLOCK=block, num_warps=min(16, max(1, block // 512))
    )
    return out


def silu_mul(both: Tensor) -> Tensor:
    """[N, 2 I], gate beside up -> silu(gate) * up [N, I]."""
    both = both.contiguous()
    rows, inner = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, inner, dtype=both.dtype, device=both.device)
    _silu_mul_kernel[(rows, triton.cdiv(inner, 1024))](both, out, inner, BLOCK=1024, num_warps=4)
    return out


def rotate(x: Tensor, heads: int, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotary position embedding (Su et al., 2021), in place, of the first `heads` heads of x [N, heads and more, d],
    whose last two dimensions are contiguous. cos and sin [N, d]; pairs are (i, i + d / 2), or neighbours if
    `interleaved`."""
    tokens, _, dim = x.shape
    _rotate_kernel[(tokens, triton.cdiv(heads, 8))](
        x,
        cos.contiguous(),
        sin.contiguous(),
        x.stride(0),
        heads,
        DIM=dim,
        INTERLEAVED=interleaved,
        HEADS=8,
        LANES=triton.next_power_of_2(dim // 2),
        num_warps=2,
    )
