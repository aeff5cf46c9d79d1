"""The CUDA cache and attention: pages of 256 tokens, and the flash kernels that ship with torch.

The one idea: one kernel call serves decoding tokens and prompt chunks of any length side by side; it finds each
sequence's past through a table of pages, so nothing is padded or copied, and a prefix may stand in pages that several
sequences hold.

`torch.nn.attention.varlen` takes pages from torch 2.13 on, in 16-bit types. Elsewhere (torch 2.11, float32, a CPU in
tests) each sequence's pages are gathered and attended to by `scaled_dot_product_attention`: exact, but slow.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.attention import window_mask
from actors.engine.kv_cache import KVShape, PageAllocator, Pages
from actors.engine.scheduler import Chunk

PAGE = 256
"""Tokens a page: what the flash kernel's page size must be a multiple of."""


class PagedCache:
    """Keys and values of all layers, each [layers, pages, PAGE, heads, head_dim]. The last page is nobody's: what
    must be written somewhere, but is never read, goes there."""

    def __init__(self, shape: KVShape, capacity: int, device: torch.device) -> None:
        pages = max(1, capacity // PAGE)
        size = (shape.layers, pages + 1, PAGE, shape.heads, shape.head_dim)
        self.keys = torch.zeros(size, dtype=shape.dtype, device=device)
        self.values = torch.zeros(size, dtype=shape.dtype, device=device)
        self.device = device
        self.capacity = pages * PAGE
        self.spare = pages
        self.flash = device.type == "cuda" and shape.dtype.itemsize == 2 and _flash_takes_pages()
        self._pages = PageAllocator(pages, PAGE)

    @property
    def used(self) -> int:
        return self._pages.used

    def reserve(self, tokens: int, leader: Pages | None = None, shared: int = 0) -> Pages | None:
        return self._pages.allocate(tokens, leader.ids[: shared // PAGE] if leader else ())

    def release(self, reservation: Pages) -> None:
        self._pages.free(reservation)

    def copy_prefix(self, source: Pages, target: Pages, tokens: int) -> None:
        pages = -(-tokens // PAGE)
        pairs = [(a, b) for a, b in zip(source.ids[:pages], target.ids[:pages], strict=True) if a != b]
        if pairs:
            old, new = torch.tensor(pairs, device=self.device).unbind(1)
            for cache in (self.keys, self.values):
                cache[:, new] = cache[:, old]

    def bucket(self, rows: int) -> int:
        return rows

    def step(self, chunks: Seq[Chunk]) -> PagedStep:
        tables = [chunk.sequence.reservation.ids[: -(-chunk.end // PAGE)] for chunk in chunks]
        table = np.full((len(chunks), max(map(len, tables), default=1)), self.spare, np.int32)
        for row, pages in zip(table, tables, strict=True):
            row[: len(pages)] = pages
        slots = [
            slot_of(pages, np.arange(chunk.start, chunk.end))
            for pages, chunk in zip(tables, chunks, strict=True)
        ]
        lengths = [chunk.length for chunk in chunks]
        return PagedStep(
            self,
            slots=upload(np.concatenate(slots) if slots else np.zeros(0, np.int64), self.device),
            starts=upload(np.cumsum([0, *lengths]).astype(np.int32), self.device),
            ends=upload(np.array([chunk.end for chunk in chunks], np.int32), self.device),
            table=upload(table, self.device),
            longest=(max(lengths, default=0), max((chunk.end for chunk in chunks), default=0)),
            spans=[(chunk.start, chunk.end) for chunk in chunks],
        )


class PagedStep:
    """One step: where its tokens are written, and what each sequence may read.

    slots int64 [N] (page * PAGE + offset), starts int32 [S + 1] (cumulative query lengths), ends int32 [S] (live
    tokens), table int32 [S, pages]; `longest` query and past; `spans` the (start, end) of each sequence on the host.
    """

    def __init__(
        self,
        cache: PagedCache,
        slots: Tensor,
        starts: Tensor,
        ends: Tensor,
        table: Tensor,
        longest: tuple[int, int],
        spans: Seq[tuple[int, int]],
    ) -> None:
        self.cache, self.slots, self.starts, self.ends, self.table = cache, slots, starts, ends, table
        self.longest, self.spans = longest, spans

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        for cache, new in ((self.cache.keys[layer], key), (self.cache.values[layer], value)):
            cache.flatten(0, 1).index_copy_(0, self.slots, new[0].transpose(0, 1))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        self.store(layer, key, value)
        queries = query[0].transpose(0, 1)  # [N, H, d]
        if self.cache.flash:
            return self._flash(layer, queries, scaling, window)[None]
        return self._gathered(layer, queries, scaling, window)[None]

    def _flash(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        keys, values = self.cache.keys[layer], self.cache.values[layer]
        attended: Any = varlen_attn(
            query.contiguous(),
            keys,
            values,
            self.starts,
            None,
            self.longest[0],
            self.longest[1],
            scale=scaling,
            # The kernel counts the tokens before a query, transformers the query itself too.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.ends,
            block_table=self.table,
        )
        return attended

    def _gathered(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Tensor:
        first, outputs = 0, []
        for row, (start, end) in enumerate(self.spans):
            length = end - start
            pages = self.table[row, : -(-end // PAGE)].long()
            keys, values = (
                cache[layer, pages].flatten(0, 1)[:end].transpose(0, 1)[None]
                for cache in (self.cache.keys, self.cache.values)
            )
            attended = F.scaled_dot_product_attention(
                query[first : first + length].transpose(0, 1)[None],
                keys,
                values,
                attn_mask=window_mask(length, start, window, query.dtype, query.device),
                scale=scaling,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
            outputs.append(attended[0].transpose(0, 1))
            first += length
        return torch.cat(outputs)


def slot_of(pages: Seq[int], positions: np.ndarray) -> np.ndarray:
    """int64: where positions of a sequence lie in the flattened pages."""
    return np.asarray(pages, np.int64)[positions // PAGE] * PAGE + positions % PAGE


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Host -> device; pinned, so that the copy does not wait for what the device is doing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _flash_takes_pages() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"block_table", "seqused_k"} <= inspect.signature(varlen_attn).parameters.keys()
