"""The CPU's cache and attention: plain slices of one arena, attended to by the compiled kernel or torch's.

A sequence's keys lie in one contiguous run, so its attention reads exactly its live tokens, without
padding, copies or repeated heads. The arena's memory is not touched, and so costs nothing, until tokens are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from actors.engine.devices.base import window_mask
from actors.engine.devices.cpu.kernels import AttentionKernel, attention_kernel
from actors.engine.devices.cpu.layers import bucket
from actors.engine.devices.cpu.proofs import prove_image_attention
from actors.engine.devices.kv_cache import Extent, ExtentAllocator, KVShape
from actors.engine.devices.proof import Choice, Path, choose
from actors.engine.scheduler import Chunk

_IMAGE_ATTENTION = "tessera_images"
_BLOCK = 256
"""Queries at a time under torch's kernel, where a mask is needed: it bounds the mask's size."""


class CpuCache:
    """Keys and values of all layers, each [layers, heads, capacity, head_dim]."""

    def __init__(self, shape: KVShape, capacity: int, kernel: AttentionKernel | None = None) -> None:
        size = (shape.layers, shape.heads, capacity, shape.head_dim)
        self.keys = torch.empty(size, dtype=shape.dtype)
        self.values = torch.empty(size, dtype=shape.dtype)
        self.capacity = capacity
        self.kernel = kernel
        self._extents = ExtentAllocator(capacity)

    @property
    def used(self) -> int:
        return self._extents.used

    def reserve(self, tokens: int, prefix_source: Extent | None = None, shared: int = 0) -> Extent | None:
        return self._extents.allocate(tokens)

    def release(self, reservation: Extent) -> None:
        self._extents.free(reservation)

    def copy_prefix(self, source: Extent, target: Extent, tokens: int) -> None:
        for cache in (self.keys, self.values):
            copied = cache[:, :, source.start : source.start + tokens]
            cache[:, :, target.start : target.start + tokens] = copied

    def bucket(self, rows: int) -> int:
        return bucket(rows)

    def step(self, chunks: Sequence[Chunk]) -> CpuStep:
        return CpuStep(self, chunks)


class CpuStep:
    """One step: decoding tokens first, then prompt chunks."""

    def __init__(self, cache: CpuCache, chunks: Sequence[Chunk]) -> None:
        self.cache = cache
        decoding = [chunk for chunk in chunks if chunk.length == 1]
        self.prefills = [chunk for chunk in chunks if chunk.length > 1]
        if [*decoding, *self.prefills] != list(chunks):
            raise ValueError("chunks of one token come first")
        self.spans = [
            (chunk.sequence.reservation.start, chunk.sequence.reservation.start + chunk.end)
            for chunk in decoding
        ]
        self.places = torch.tensor([end - 1 for _, end in self.spans])
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        rows = len(self.spans)
        for cache, new in ((self.cache.keys[layer], key[0]), (self.cache.values[layer], value[0])):
            if rows:
                cache.index_copy_(1, self.places, new[:, :rows])
            first = rows
            for chunk in self.prefills:
                start = chunk.sequence.reservation.start
                cache[:, start + chunk.start : start + chunk.end] = new[:, first : first + chunk.length]
                first += chunk.length

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        self.store(layer, key, value)
        keys, values = self.cache.keys[layer, None], self.cache.values[layer, None]
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        first = len(self.spans)
        if first:
            out[:, :first] = self._decode(query[0, :, :first], keys, values, scaling, window)
        for chunk in self.prefills:
            part = slice(first, first + chunk.length)
            self._prefill(chunk, query[:, :, part], keys, values, scaling, window, out[:, part])
            first += chunk.length
        out[:, first:] = 0  # padding, of which nobody reads anything
        return out

    def _decode(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """query [H, R, d], one token of each of R sequences -> [1, R, H, d]."""
        heads, rows, width = query.shape
        if self.cache.kernel is not None:
            spans = self.spans
            if window is not None:
                spans = [(max(start, end - window), end) for start, end in spans]
            return self.cache.kernel.decode(query.transpose(0, 1), keys[0], values[0], spans, scaling)[None]
        shared = keys.shape[1]
        grouped = query.transpose(0, 1).reshape(rows, shared, heads // shared, width)
        outputs = []
        for row, (start, end) in enumerate(self.spans):
            if window is not None and end - start > window:
                start = end - window
            outputs.append(
                F.scaled_dot_product_attention(
                    grouped[row : row + 1], keys[:, :, start:end], values[:, :, start:end], scale=scaling
                )
            )
        return torch.cat(outputs).view(1, rows, heads, width)

    def _prefill(
        self,
        chunk: Chunk,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """query [1, H, n, d] of one sequence's next n tokens; fills out [1, n, H, d]."""
        start = chunk.sequence.reservation.start
        if self.cache.kernel is not None:
            at = slice(start, start + chunk.end)
            self.cache.kernel.attend(
                query, keys[:, :, at], values[:, :, at], scaling, chunk.start, window, out
            )
            return
        # A mask a block bounds its size; without one, torch masks by itself.
        masked = chunk.start > 0 or (window is not None and chunk.end > window)
        for begin in range(chunk.start, chunk.end, _BLOCK if masked else chunk.length):
            end = min(begin + _BLOCK, chunk.end) if masked else chunk.end
            low = 0 if window is None else max(0, begin - window + 1)
            part = slice(begin - chunk.start, end - chunk.start)
            attended = F.scaled_dot_product_attention(
                query[:, :, part],
                keys[:, :, start + low : start + end],
                values[:, :, start + low : start + end],
                attn_mask=self._mask(end - begin, begin - low, window, query.dtype) if masked else None,
                is_causal=not masked,
                scale=scaling,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
            out[:, part] = attended.transpose(1, 2)

    def _mask(self, queries: int, past: int, window: int | None, dtype: torch.dtype) -> Tensor:
        # Layers, and most blocks of a layer, need the same few masks.
        key = (queries, past, window)
        if key not in self._masks:
            self._masks[key] = window_mask(queries, past, window, dtype, torch.device("cpu"))
        return self._masks[key]


def use_image_attention(model: PreTrainedModel) -> Choice:
    """Makes the vision tower of a CPU model, where it has one, attend through the compiled kernel once that has proven
    itself."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return Choice("none")
    heads = vision.num_attention_heads
    proof = partial(prove_image_attention, heads, vision.hidden_size // heads, model.dtype)
    choice = choose("attention of images", [Path("compiled", proof), Path("sdpa")], model.device)
    if choice.path == "sdpa":
        return choice
    AttentionInterface.register(_IMAGE_ATTENTION, _attend_images)
    AttentionMaskInterface.register(_IMAGE_ATTENTION, sdpa_mask)
    model.set_attn_implementation({"vision_config": _IMAGE_ATTENTION})
    return choice


def _attend_images(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **others: Any,
) -> tuple[Tensor, None]:
    """query, key and value [tiles, H, N, d] -> [tiles, N, H, d]; every patch of a tile sees every other."""
    kernel = attention_kernel(query.shape[1], 1, query.shape[3], query.dtype)
    if kernel is None or attention_mask is not None or key.shape[1] != query.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return kernel.attend(query, key, value, scaling), None
