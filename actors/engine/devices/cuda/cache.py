"""The paged KV cache of CUDA: pages of 256 tokens, and steps over them.

A step's attention finds each sequence's past through a table of pages, so nothing is padded or copied, and a prefix may
stand in pages that several sequences hold. Three paths compute it, of which the device takes the first that proves
itself (`attention_paths`):

    triton     attention.py: every CUDA device of the last years, and torch from 2.11 on
    flash      `torch.nn.attention.varlen`, which takes pages from torch 2.13 on
    gathered   each sequence's pages copied together, then `scaled_dot_product_attention`: exact, anywhere, slow
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.devices.base import window_mask
from actors.engine.devices.kv_cache import KVShape, PageAllocator, Pages
from actors.engine.devices.proof import Path, check_close
from actors.engine.scheduler import Chunk
from actors.engine.transfer import upload

PAGE = 256
"""Tokens a page: what the flash kernel's page size must be a multiple of."""

Attention = Literal["triton", "flash", "gathered"]


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
        self.attention: Attention = "gathered"
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
        """The step over tokens [start, end) of sequences that hold `pages`; those of one token come first."""
        tables = [ids[: -(-end // PAGE)] for ids, (_, end) in zip(pages, spans, strict=True)]
        table = np.full((len(spans), max(map(len, tables), default=1)), self.spare, np.int32)
        for row, ids in zip(table, tables, strict=True):
            row[: len(ids)] = ids
        slots = [slot_of(ids, np.arange(*span)) for ids, span in zip(tables, spans, strict=True)]
        ends = np.array([end for _, end in spans], np.int32)
        return PagedStep(
            self,
            slots=upload(np.concatenate(slots) if slots else np.zeros(0, np.int64), self.device),
            ends=upload(ends, self.device),
            table=upload(table, self.device),
            spans=spans,
        )


class PagedStep:
    """One step: where its tokens are written, and what each sequence may read.

    slots int64 [N] (page * PAGE + offset), ends int32 [S] (live tokens: the keys), table int32 [S, pages]; `spans` the
    (start, end) of each sequence on the host, those of one token first. `longest` is the most keys of a sequence.
    """

    def __init__(
        self,
        cache: PagedCache,
        slots: Tensor,
        ends: Tensor,
        table: Tensor,
        spans: Sequence[tuple[int, int]],
        longest: int | None = None,
    ) -> None:
        self.cache, self.slots, self.ends, self.table, self.spans = cache, slots, ends, table, spans
        self.longest = longest or max((end for _, end in spans), default=0)
        lengths = [end - start for start, end in spans]
        self.lone = next((row for row, length in enumerate(lengths) if length > 1), len(lengths))
        """Sequences of one token: they decode."""
        if any(length == 1 for length in lengths[self.lone :]):
            raise ValueError("sequences of one token come first")
        self.cu_seq_q = self.cu_seq_k = self.blocks = ends  # of no use
        if cache.attention == "flash":
            self.cu_seq_q = upload(np.cumsum([0, *lengths], dtype=np.int32), cache.device)
            self.cu_seq_k = F.pad(ends.cumsum(0, dtype=torch.int32), (1, 0))
        elif cache.attention == "triton" and self.lone < len(spans):
            from actors.engine.devices.cuda.attention import prompt_blocks

            blocks = prompt_blocks(spans[self.lone :], self.lone)
            self.blocks = upload(np.array(blocks, np.int32), cache.device)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        if self.cache.attention == "triton":
            from actors.engine.devices.cuda import attention

            attention.store(key[0], value[0], self.cache.keys[layer], self.cache.values[layer], self.slots)
            return
        for cache, new in ((self.cache.keys[layer], key), (self.cache.values[layer], value)):
            cache.flatten(0, 1).index_copy_(0, self.slots, new[0].transpose(0, 1))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        self.store(layer, key, value)
        queries = query[0].transpose(0, 1)  # [N, H, d]
        compute = {"triton": self._triton, "flash": self._flash, "gathered": self._gathered}
        return compute[self.cache.attention](layer, queries, scaling, window)[None]

    def _triton(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Tensor:
        from actors.engine.devices.cuda import attention

        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self.lone:
            some = slice(self.lone)
            attention.decode(
                query[some], keys, values, self.table[some], self.ends[some], scaling, window, out[some]
            )
        if self.lone < len(self.spans):
            table = self.table[self.lone :]
            attention.prompt(query, keys, values, table, self.blocks, scaling, window, out)
        return out

    def _flash(self, layer: int, query: Tensor, scaling: float, window: int | None) -> Tensor:
        query = query.contiguous()
        parts = []
        if self.lone:
            parts.append(self._varlen(layer, query[: self.lone], slice(self.lone), 1, scaling, window))
        if self.lone < len(self.spans):
            longest = max(end - start for start, end in self.spans)
            rows = slice(self.lone, None)
            parts.append(self._varlen(layer, query[self.lone :], rows, longest, scaling, window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _varlen(
        self, layer: int, query: Tensor, rows: slice, longest: int, scaling: float, window: int | None
    ) -> Tensor:
        """Attention of some sequences, of up to `longest` queries each."""
        from torch.nn.attention.varlen import varlen_attn

        keys, values = self.cache.keys[layer], self.cache.values[layer]
        # The kernel counts the tokens before a query, transformers the query itself too.
        sees = (-1 if window is None else window - 1, 0)
        if window is None and longest == 1:
            sees = (-1, -1)  # a lone query stands last and sees all; only asked so, grouped heads are packed
        first = rows.start or 0
        bounds = slice(first, None if rows.stop is None else rows.stop + 1)
        cu_seq_q, cu_seq_k = self.cu_seq_q[bounds], self.cu_seq_k[bounds]
        attended: Any = varlen_attn(
            query,
            keys,
            values,
            cu_seq_q - cu_seq_q[:1] if first else cu_seq_q,
            # The kernel wants both or none, though `seqused_k` and the table say it all.
            cu_seq_k - cu_seq_k[:1] if first else cu_seq_k,
            longest,
            self.longest,
            scale=scaling,
            window_size=sees,
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.ends[rows],
            block_table=self.table[rows],
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


def attention_paths(
    shape: KVShape, heads: int, windows: Iterable[int | None], rows: int, device: torch.device
) -> list[Path]:
    """Attention of `heads` query heads over keys and values of this shape in up to `rows` sequences, fastest first; the
    last is exact. `windows` are those of the model's layers."""
    names: tuple[Attention, ...] = ("triton", "flash")
    proofs = [Path(name, _proof(name, shape, heads, {*windows, None}, rows, device)) for name in names]
    return [*proofs, Path("gathered")]


def _proof(
    name: Attention, shape: KVShape, heads: int, windows: set[int | None], rows: int, device: torch.device
) -> Callable[[], None]:
    """Compares the path `name` with the gathered one: decoding and prompts, apart and in one step, about a page's end,
    about a window's, with one sequence, a few and a full batch."""

    def prove() -> None:
        cache = PagedCache(replace(shape, layers=1), 8 * PAGE, device)
        generator = torch.Generator(device).manual_seed(0)
        draw = np.random.default_rng(0)
        cache.keys.normal_(generator=generator)
        cache.values.normal_(generator=generator)
        for window in windows:
            near = [1, 3, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 70]
            near += [window, window + 1, window + PAGE + 9] if window else []
            for spans in _spans(near, rows, draw):
                pages = [tuple(draw.integers(0, 8, -(-end // PAGE)).tolist()) for _, end in spans]
                query = torch.randn(
                    (sum(end - start for start, end in spans), heads, shape.head_dim),
                    generator=generator,
                    dtype=shape.dtype,
                    device=device,
                )
                # Larger scores than a model's: each query then sees few keys, and a wrong one shows.
                scale = 4 * shape.head_dim**-0.5
                found, exact = (
                    _computed(cache, path, spans, pages, query, scale, window) for path in (name, "gathered")
                )
                check_close(found, exact, f"at {len(spans)} sequences, window {window}")
        _check_store(cache, name, generator)

    return prove


def _spans(near: Sequence[int], rows: int, draw: np.random.Generator) -> Iterable[list[tuple[int, int]]]:
    """The tokens [start, end) of each sequence in some steps, of sequences that end near `near`."""
    for count in sorted({1, 2, 3, 7, 16, rows}):
        ends = [int(draw.choice(near)) for _ in range(count)]
        ends[0] = near[-1]
        yield [(end - 1, end) for end in ends]
    prompts = [
        (max(0, end - length), end)
        for end, length in zip(near[1:], (2, 200, 256, 130, 500) * 2, strict=False)
    ]
    yield prompts[:1]
    yield prompts
    yield [(near[-1] - 1, near[-1]), (4, 5), *prompts]


def _computed(
    cache: PagedCache,
    path: Attention,
    spans: Sequence[tuple[int, int]],
    pages: Sequence[Sequence[int]],
    query: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    cache.attention = path
    step = cache.step_over(spans, pages)
    compute = {"triton": step._triton, "flash": step._flash, "gathered": step._gathered}[path]
    return compute(0, query, scale, window)


def _check_store(cache: PagedCache, path: Attention, generator: torch.Generator) -> None:
    _, _, _, heads, dim = cache.keys.shape
    new = torch.randn(2, 1, 5, heads, dim, generator=generator, dtype=cache.keys.dtype, device=cache.device)
    key, value = new.transpose(2, 3)
    step = cache.step_over([(PAGE - 2, PAGE + 3)], [(5, 1)])
    stored = []
    for name in (path, "gathered"):
        cache.attention = name
        cache.keys.zero_()
        cache.values.zero_()
        step.store(0, key, value)
        stored.append(torch.stack([cache.keys, cache.values]))
    if not torch.equal(*stored):
        raise ArithmeticError("it stores keys and values elsewhere")
