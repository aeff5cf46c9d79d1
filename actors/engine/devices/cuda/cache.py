"""The paged KV cache and attention of CUDA: pages of 256 tokens, and the flash kernels that ship with torch.

One kernel call serves decoding tokens and prompt chunks of any length side by side; it finds each sequence's past
through a table of pages, so nothing is padded or copied, and a prefix may stand in pages that several sequences hold.

`torch.nn.attention.varlen` takes pages from torch 2.13 on, in 16-bit types. Elsewhere (torch 2.11 and 2.12, float32, a
CPU in tests) each sequence's pages are gathered and attended to by `scaled_dot_product_attention`: exact, but slow.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.devices.base import window_mask
from actors.engine.devices.kv_cache import KVShape, PageAllocator, Pages
from actors.engine.failures import describe, device_is_lost
from actors.engine.scheduler import Chunk
from actors.engine.types import DeviceLost

log = logging.getLogger(__name__)

PAGE = 256
"""Tokens a page: what the flash kernel's page size must be a multiple of."""


class PagedCache:
    """Keys and values of all layers, each [layers, pages, PAGE, heads, head_dim]. The last page is scratch: padding
    rows of CUDA graphs write there, nothing reads it."""

    def __init__(self, shape: KVShape, capacity: int, device: torch.device) -> None:
        pages = max(1, capacity // PAGE)
        size = (shape.layers, pages + 1, PAGE, shape.heads, shape.head_dim)
        self.keys = torch.zeros(size, dtype=shape.dtype, device=device)
        self.values = torch.zeros(size, dtype=shape.dtype, device=device)
        self.device = device
        self.capacity = pages * PAGE
        self.spare = pages
        self.flash = False
        """Whether steps attend by the flash kernel; `flash_agrees` says where they may."""
        self._pages = PageAllocator(pages, PAGE)

    @property
    def used(self) -> int:
        return self._pages.used

    def reserve(self, tokens: int, prefix_source: Pages | None = None, shared: int = 0) -> Pages | None:
        return self._pages.allocate(tokens, prefix_source.ids[: shared // PAGE] if prefix_source else ())

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

    def step(self, chunks: Sequence[Chunk]) -> PagedStep:
        spans = [(chunk.start, chunk.end) for chunk in chunks]
        return self.step_over(spans, [chunk.sequence.reservation.ids for chunk in chunks])

    def step_over(self, spans: Sequence[tuple[int, int]], pages: Sequence[Sequence[int]]) -> PagedStep:
        """The step over tokens [start, end) of sequences that hold `pages`."""
        tables = [ids[: -(-end // PAGE)] for ids, (_, end) in zip(pages, spans, strict=True)]
        table = np.full((len(spans), max(map(len, tables), default=1)), self.spare, np.int32)
        for row, ids in zip(table, tables, strict=True):
            row[: len(ids)] = ids
        slots = [slot_of(ids, np.arange(*span)) for ids, span in zip(tables, spans, strict=True)]
        lengths, ends = [end - start for start, end in spans], [end for _, end in spans]
        return PagedStep(
            self,
            slots=upload(np.concatenate(slots) if slots else np.zeros(0, np.int64), self.device),
            cu_seq_q=upload(np.cumsum([0, *lengths], dtype=np.int32), self.device),
            cu_seq_k=upload(np.cumsum([0, *ends], dtype=np.int32), self.device),
            ends=upload(np.array(ends, np.int32), self.device),
            table=upload(table, self.device),
            longest=(max(lengths, default=0), max(ends, default=0)),
            spans=spans,
        )


class PagedStep:
    """One step: where its tokens are written, and what each sequence may read.

    slots int64 [N] (page * PAGE + offset), cu_seq_q and cu_seq_k int32 [S + 1] (cumulative lengths of queries, and of
    keys), ends int32 [S] (live tokens: the keys), table int32 [S, pages]; `longest` query and keys; `spans` the
    (start, end) of each sequence on the host.
    """

    def __init__(
        self,
        cache: PagedCache,
        slots: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        ends: Tensor,
        table: Tensor,
        longest: tuple[int, int],
        spans: Sequence[tuple[int, int]],
    ) -> None:
        self.cache, self.slots, self.cu_seq_q, self.cu_seq_k = cache, slots, cu_seq_q, cu_seq_k
        self.ends, self.table = ends, table
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
        # The kernel counts the tokens before a query, transformers the query itself too.
        sees = (-1 if window is None else window - 1, 0)
        if window is None and self.longest[0] == 1:
            # A lone query stands last and sees all; only asked so, the kernel packs grouped heads
            sees = (
                -1,
                -1,
            )
        attended: Any = varlen_attn(
            query.contiguous(),
            keys,
            values,
            self.cu_seq_q,
            self.cu_seq_k,  # the kernel wants both or none, though `seqused_k` and the table say it all
            self.longest[0],
            self.longest[1],
            scale=scaling,
            window_size=sees,
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.ends,
            block_table=self.table,
            num_splits=1,  # split over pages, only the first sequence's rows are written (pytorch #194167)
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


def slot_of(pages: Sequence[int], positions: np.ndarray) -> np.ndarray:
    """int64: where positions of a sequence lie in the flattened pages."""
    return np.asarray(pages, np.int64)[positions // PAGE] * PAGE + positions % PAGE


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Host -> device; pinned, so that the copy does not wait for what the device is doing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def flash_agrees(shape: KVShape, heads: int, device: torch.device) -> bool:
    """Whether the flash kernel may be used for `heads` query heads over keys and values of this shape: not before it
    has agreed, on this device, with the gathered path. Where it does not, or cannot run (float32, before torch 2.13,
    below compute capability 8, a head size it does not have), the log says why. Raises DeviceLost."""
    cache = PagedCache(replace(shape, layers=1), 3 * PAGE, device)
    generator = torch.Generator(device).manual_seed(0)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    ends, pages = (PAGE + 9, 70, 3), ((2, 0), (1,), (cache.spare,))
    try:
        for lengths in ((1, 1, 1), (1, 70, 2)):
            step = cache.step_over([(end - n, end) for end, n in zip(ends, lengths, strict=True)], pages)
            query = torch.randn(
                sum(lengths), heads, shape.head_dim, generator=generator, dtype=shape.dtype, device=device
            )
            for window in (None, 40):
                found = step._flash(0, query, shape.head_dim**-0.5, window)
                exact = step._gathered(0, query, shape.head_dim**-0.5, window)
                if not torch.allclose(found, exact, rtol=0.02, atol=0.05):
                    raise ArithmeticError(f"it computes other values for {lengths} queries, window {window}")
    except Exception as error:
        if device_is_lost(device):
            raise DeviceLost(describe(error)) from error
        log.warning("attention runs without the flash kernel, slowly: %s", describe(error).splitlines()[0])
        return False
    return True
