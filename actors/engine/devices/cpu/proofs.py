"""What the compiled kernels must compute before they are used: torch's own attention, and the model's own experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from actors.engine.devices.base import window_mask
from actors.engine.devices.cpu.kernels import AttentionKernel, ExpertsKernel, attention_kernel
from actors.engine.devices.proof import check_close

_CAPACITY = 300
_WINDOWS = (None, 7, 64)
_SHARP = 4
"""Larger scores than a model's: each query then sees few keys, and a wrong one shows."""


def prove_attention(heads: int, group: int, dim: int, dtype: torch.dtype) -> None:
    """Decoding of one to sixteen sequences and prompts behind some past, windowed and not."""
    kernel = _kernel(heads, group, dim, dtype)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, heads, _CAPACITY, dim, generator=generator, dtype=dtype)
    scale = _SHARP * dim**-0.5
    for rows in (1, 3, 16):
        spans = [(7 * row, 7 * row + 1 + 11 * row) for row in range(rows)]
        query = torch.randn(rows, heads * group, dim, generator=generator, dtype=dtype)
        exact = torch.stack(
            [
                F.scaled_dot_product_attention(
                    one[:, None], keys[:, start:end], values[:, start:end], scale=scale, enable_gqa=True
                )[:, 0]
                for one, (start, end) in zip(query, spans, strict=True)
            ]
        )
        check_close(kernel.decode(query, keys, values, spans, scale), exact, f"at {rows} sequences")
    for window in _WINDOWS:
        for past, length in ((0, 1), (0, 70), (5, 2), (130, 70)):
            query = torch.randn(1, heads * group, length, dim, generator=generator, dtype=dtype)
            k, v = keys[None, :, : past + length], values[None, :, : past + length]
            exact = F.scaled_dot_product_attention(
                query,
                k,
                v,
                attn_mask=window_mask(length, past, window, dtype, query.device),
                scale=scale,
                enable_gqa=True,
            )
            found = kernel.attend(query, k, v, scale, past, window)
            check_close(found.transpose(1, 2), exact, f"of {length} queries behind {past}, window {window}")


def prove_image_attention(heads: int, dim: int, dtype: torch.dtype) -> None:
    """Every patch of a tile sees every other."""
    kernel = _kernel(heads, 1, dim, dtype)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, heads, 70, dim, generator=generator, dtype=dtype)
    scale = _SHARP * dim**-0.5
    exact = F.scaled_dot_product_attention(query, key, value, scale=scale)
    check_close(kernel.attend(query, key, value, scale).transpose(1, 2), exact, "of 70 patches")


def prove_experts(model: PreTrainedModel, experts: nn.Module) -> None:
    """A layer's experts against the model's own loop over them."""
    down = experts.get_parameter("down_proj")
    width, generator = down.shape[2], torch.Generator().manual_seed(0)
    kernel = ExpertsKernel(experts.get_parameter("gate_up_proj"), down)
    model.set_experts_implementation({"text_config": "eager"})
    for tokens in (1, 37):
        hidden = torch.randn(tokens, width, generator=generator).to(down.dtype)
        shares, chosen = torch.rand(tokens, down.shape[0], generator=generator).to(down.dtype).topk(2)
        check_close(kernel(hidden, chosen, shares), experts(hidden, chosen, shares), f"at {tokens} tokens")


def _kernel(heads: int, group: int, dim: int, dtype: torch.dtype) -> AttentionKernel:
    kernel = attention_kernel(heads, group, dim, dtype)
    if kernel is None:
        raise NotImplementedError(f"none in {str(dtype).removeprefix('torch.')}, or no C compiler")
    return kernel
