"""KV cache allocation: how much a token takes, and which sequence holds which places.

A sequence reserves room for its prompt and everything it may generate when it enters, so nothing
is ever evicted or moved. A reservation is a set of places in one arena: on a CPU a contiguous run of tokens (so
that attention reads plain slices), on CUDA pages of 256 tokens (what the flash kernel takes).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token takes in the cache."""

    layers: int
    heads: int
    """Key / value heads (fewer than query heads under grouped-query attention)."""
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, text_config: PreTrainedConfig, dtype: torch.dtype) -> KVShape:
        query_heads = int(text_config.num_attention_heads)
        return cls(
            layers=int(text_config.num_hidden_layers),
            heads=int(getattr(text_config, "num_key_value_heads", None) or query_heads),
            head_dim=int(getattr(text_config, "head_dim", None) or text_config.hidden_size // query_heads),
            dtype=dtype,
        )

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Extent:
    """Tokens [start, start + length) of the arena."""

    start: int
    length: int


class ExtentAllocator:
    """Hands out extents (contiguous runs) of `capacity` places, first fit from the bottom.

    >>> extents = ExtentAllocator(10)
    >>> a, b = extents.allocate(4), extents.allocate(4)
    >>> extents.allocate(4) is None, extents.used
    (True, 8)
    >>> extents.free(a); extents.allocate(3)
    Extent(start=0, length=3)
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._holes: list[tuple[int, int]] = [(0, capacity)]  # (start, end), sorted, never adjacent

    def allocate(self, length: int) -> Extent | None:
        """An extent of `length` places, or None while no hole is large enough."""
        for index, (start, end) in enumerate(self._holes):
            if end - start >= length:
                self._holes[index : index + 1] = [(start + length, end)] if end - start > length else []
                self.used += length
                return Extent(start, length)
        return None

    def free(self, extent: Extent) -> None:
        """Gives an extent back and joins it with the holes at its ends."""
        insort(self._holes, (extent.start, extent.start + extent.length))
        self.used -= extent.length
        joined: list[tuple[int, int]] = []
        for start, end in self._holes:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self._holes = joined


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages that together hold a sequence, in order; the first `shared` of them belong to others as well."""

    ids: tuple[int, ...]
    shared: int = 0


class PageAllocator:
    """Hands out pages of `page_size` tokens and counts who holds each: a prefix may have several holders.

    >>> pages = PageAllocator(pages=4, page_size=256)
    >>> a = pages.allocate(300)
    >>> b = pages.allocate(600, prefix=a.ids[:1])   # shares a's full first page
    >>> pages.used, b.ids[0] == a.ids[0]
    (4, True)
    >>> pages.free(a); pages.used
    3
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.capacity = pages
        self.page_size = page_size
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages

    @property
    def used(self) -> int:
        return self.capacity - len(self._free)

    def allocate(self, tokens: int, prefix: tuple[int, ...] = ()) -> Pages | None:
        """Pages for `tokens`, the first of them being `prefix`; None while too few are free."""
        need = max(0, -(-tokens // self.page_size) - len(prefix))
        if need > len(self._free):
            return None
        ids = prefix + tuple(self._free.pop() for _ in range(need))
        for page in ids:
            self._holders[page] += 1
        return Pages(ids, shared=len(prefix))

    def free(self, pages: Pages) -> None:
        for page in pages.ids:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
