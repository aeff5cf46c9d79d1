"""Paged attention in Triton, which comes with every CUDA build of torch: a kernel for decoding tokens, one for prompts.

Decoding is bound by reading keys and values, so all query heads of a key head share one reading of them, and where few
sequences run, several programs share a sequence (flash-decoding: Dao et al., 2023); what they found is combined by a
third kernel. Prompts are computed a block of queries at a time (FlashAttention-2: Dao, 2023). Both find a sequence's
tokens through its table of pages, and neither reads what a sliding window hides.

How many programs run follows from shapes alone, never from how long the sequences are: so a CUDA graph may hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634
_KEYS = 64
"""Keys of a decoding sequence at a time; a page is a multiple of it. (On an H100, LLaVA-OneVision 7B's shape: 2.6 TB/s,
with 32 or 128 of them 2.4.)"""
_QUERIES = 128
"""Query tokens of a prompt at a time ..."""
_PROMPT_KEYS = 128
"""... and keys that they meet. (Likewise: 383 TFLOP/s, with 64 of them 330.)"""
_ROWS = 16
"""Rows of the smallest matrix product on tensor cores: grouped heads are padded to it."""
_PROGRAMS = 512
"""Enough for every processor of a large GPU to have some (132 on an H100, and each runs several)."""
_MOST_SPLITS = 32


@triton.jit
def _store_kernel(
    key,
    value,
    keys,
    values,
    slots,
    key_token,
    key_head,
    value_token,
    value_head,
    width,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    head, lane = at // DIM, at % DIM
    inside = at < width
    place = tl.load(slots + token) * width + at
    tl.store(
        keys + place, tl.load(key + token * key_token + head * key_head + lane, mask=inside), mask=inside
    )
    tl.store(
        values + place,
        tl.load(value + token * value_token + head * value_head + lane, mask=inside),
        mask=inside,
    )


@triton.jit
def _decode_kernel(
    query,
    keys,
    values,
    table,
    ends,
    out,
    parts,
    marks,
    scale,
    query_token,
    query_head,
    pages,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    some = (row < GROUP)[:, None] & (lane < DIM)[None, :]
    end = tl.load(ends + sequence)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(end - WINDOW, 0)
    first = begin // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(end - first, SPLITS), KEYS) * KEYS
    low = first + split * share
    high = tl.minimum(low + share, end)
    asked = tl.load(
        query + sequence * query_token + (head * GROUP + row)[:, None] * query_head + lane[None, :],
        mask=some,
        other=0.0,
    )
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(low, high, KEYS):
        at = start + tl.arange(0, KEYS)
        page = tl.load(table + sequence * pages + start // PAGE).to(tl.int64)
        place = ((page * PAGE + at % PAGE) * HEADS + head) * DIM
        full = (lane < DIM)[None, :]
        k = tl.load(keys + place[:, None] + lane[None, :], mask=full, other=0.0)
        v = tl.load(values + place[:, None] + lane[None, :], mask=full, other=0.0)
        scores = tl.dot(asked, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((at >= begin)[None, :] & (at < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher
    heads = HEADS * GROUP
    place = sequence * heads + head * GROUP + row
    if SPLITS == 1:
        tl.store(
            out + place[:, None] * DIM + lane[None, :],
            (sums / total[:, None]).to(out.dtype.element_ty),
            mask=some,
        )
    else:
        place = place * SPLITS + split
        tl.store(parts + place[:, None] * DIM + lane[None, :], sums, mask=some)
        tl.store(marks + place * 2, best, mask=row < GROUP)
        tl.store(marks + place * 2 + 1, total, mask=row < GROUP)


@triton.jit
def _combine_kernel(parts, marks, out, DIM: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr):
    place = tl.program_id(0)
    split, lane = tl.arange(0, SPLITS), tl.arange(0, LANES)
    best = tl.load(marks + (place * SPLITS + split) * 2)
    total = tl.load(marks + (place * SPLITS + split) * 2 + 1)
    weight = tl.where(total > 0, tl.exp2(best - tl.max(best, 0)), 0.0)
    sums = tl.load(
        parts + (place * SPLITS + split)[:, None] * DIM + lane[None, :], mask=(lane < DIM)[None, :], other=0.0
    )
    found = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + place * DIM + lane, found.to(out.dtype.element_ty), mask=lane < DIM)


@triton.jit
def _prompt_keys(
    low,
    high,
    sums,
    total,
    best,
    asked,
    keys,
    values,
    table,
    lane,
    position,
    head,
    scale,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    full = (lane < DIM)[None, :]
    for start in range(low, high, KEYS):
        at = start + tl.arange(0, KEYS)
        page = tl.load(table + start // PAGE).to(tl.int64)
        place = ((page * PAGE + at % PAGE) * HEADS + head) * DIM
        k = tl.load(keys + place[:, None] + lane[None, :], mask=full, other=0.0)
        scores = tl.dot(asked, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            distance = position[:, None] - at[None, :]
            seen = distance >= 0
            if WINDOW > 0:
                seen = seen & (distance < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen nothing yet: -inf less -inf would be NaN
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(best - base)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values + place[:, None] + lane[None, :], mask=full, other=0.0)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher
    return sums, total, best


@triton.jit
def _prompt_kernel(
    query,
    keys,
    values,
    table,
    blocks,
    out,
    scale,
    query_token,
    query_head,
    pages,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    block, head = tl.program_id(1), tl.program_id(0)
    sequence = tl.load(blocks + block * 4)
    first = tl.load(blocks + block * 4 + 1)  # its first query's place among the step's tokens ...
    count = tl.load(blocks + block * 4 + 2)
    start = tl.load(blocks + block * 4 + 3)  # ... and in the sequence
    row, lane = tl.arange(0, QUERIES), tl.arange(0, LANES)
    some = (row < count)[:, None] & (lane < DIM)[None, :]
    asked = tl.load(
        query + (first + row)[:, None] * query_token + head * query_head + lane[None, :], mask=some, other=0.0
    )
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, LANES], tl.float32)
    table += sequence * pages
    position = start + row
    low = 0
    clear = start // KEYS * KEYS  # keys before it are seen by every query, and need no mask
    if WINDOW > 0:  # hides some from almost every block
        low = tl.maximum(start - WINDOW + 1, 0) // KEYS * KEYS
        clear = low
    end = start + count
    sums, total, best = _prompt_keys(
        low,
        clear,
        sums,
        total,
        best,
        asked,
        keys,
        values,
        table,
        lane,
        position,
        head // GROUP,
        scale,
        WINDOW,
        PAGE,
        HEADS,
        DIM,
        KEYS,
        False,
    )
    sums, total, best = _prompt_keys(
        clear,
        end,
        sums,
        total,
        best,
        asked,
        keys,
        values,
        table,
        lane,
        position,
        head // GROUP,
        scale,
        WINDOW,
        PAGE,
        HEADS,
        DIM,
        KEYS,
        True,
    )
    heads = HEADS * GROUP
    place = ((first + row) * heads + head) * DIM
    tl.store(
        out + place[:, None] + lane[None, :], (sums / total[:, None]).to(out.dtype.element_ty), mask=some
    )


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Writes key and value [H, N, d] of N tokens to pages [P, PAGE, H, d], at int64 `slots` [N]."""
    heads, tokens, dim = key.shape
    width = heads * dim
    _store_kernel[(tokens,)](
        key,
        value,
        keys,
        values,
        slots,
        key.stride(1),
        key.stride(0),
        value.stride(1),
        value.stride(0),
        width,
        DIM=dim,
        BLOCK=triton.next_power_of_2(width),
    )


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    ends: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
) -> None:
    """Attends from the last token of each of S sequences; fills `out` [S, H, d].

    query [S, H, d]; keys and values [P, PAGE, H_kv, d]; table int32 [S, pages]; ends int32 [S], the live tokens of
    each, at least one. With a `window` the last so many of them are seen.
    """
    sequences, heads, dim = query.shape
    _, page, shared, _ = keys.shape
    group = heads // shared
    splits = decode_splits(sequences * shared, table.shape[1] * page)
    parts = marks = out  # not touched
    if splits > 1:
        parts = torch.empty(sequences * heads * splits, dim, dtype=torch.float32, device=query.device)
        marks = torch.empty(sequences * heads * splits, 2, dtype=torch.float32, device=query.device)
    lanes = triton.next_power_of_2(dim)
    _decode_kernel[(sequences, shared, splits)](
        query,
        keys,
        values,
        table,
        ends,
        out,
        parts,
        marks,
        scale * _LOG2E,
        query.stride(0),
        query.stride(1),
        table.stride(0),
        WINDOW=window or 0,
        PAGE=page,
        HEADS=shared,
        GROUP=group,
        ROWS=max(_ROWS, triton.next_power_of_2(group)),
        DIM=dim,
        LANES=lanes,
        KEYS=_KEYS,
        SPLITS=splits,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _combine_kernel[(sequences * heads,)](
            parts, marks, out, DIM=dim, LANES=lanes, SPLITS=splits, num_warps=1
        )


def decode_splits(programs: int, tokens: int) -> int:
    """Among how many programs the keys of a sequence of up to `tokens` are divided, where `programs` would run without.

    >>> [decode_splits(programs, 8192) for programs in (4, 64, 1024)], decode_splits(4, 256)
    ([32, 8, 1], 4)
    """
    splits = 1
    while splits < _MOST_SPLITS and programs * splits * 2 <= _PROGRAMS and splits * 2 * _KEYS <= tokens:
        splits *= 2
    return splits


def prompt_blocks(spans: Sequence[tuple[int, int]], first: int) -> list[tuple[int, int, int, int]]:
    """Blocks of queries: (sequence, first token of the step, tokens, position in the sequence) for each. `spans` are
    the (start, end) of the sequences' new tokens, which stand one behind the other from token `first` on.

    >>> prompt_blocks([(0, 130), (7, 9)], 5)
    [(0, 5, 128, 0), (0, 133, 2, 128), (1, 135, 2, 7)]
    """
    blocks = []
    for sequence, (start, end) in enumerate(spans):
        for position in range(start, end, _QUERIES):
            count = min(_QUERIES, end - position)
            blocks.append((sequence, first, count, position))
            first += count
    return blocks


def prompt(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    blocks: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
) -> None:
    """Attends causally from `blocks` of queries (`prompt_blocks`, int32 [B, 4]); fills their rows of `out` [N, H, d].

    query [N, H, d]; keys and values [P, PAGE, H_kv, d]; table int32 [sequences, pages].
    """
    _, heads, dim = query.shape
    _, page, shared, _ = keys.shape
    wide = query.element_size() > 2
    _prompt_kernel[(heads, len(blocks))](
        query,
        keys,
        values,
        table,
        blocks,
        out,
        scale * _LOG2E,
        query.stride(0),
        query.stride(1),
        table.stride(0),
        WINDOW=window or 0,
        PAGE=page,
        HEADS=shared,
        GROUP=heads // shared,
        DIM=dim,
        LANES=triton.next_power_of_2(dim),
        QUERIES=_QUERIES,
        KEYS=_KEYS if wide else _PROMPT_KEYS,
        num_warps=8,
        num_stages=1 if wide else 2,
    )
