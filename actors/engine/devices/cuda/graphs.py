"""CUDA graphs for decoding: a step of one token a sequence is launched as one piece.

Such a step has the same shape every time but for its number of rows, and launching its thousand small kernels one by
one costs the host 8 - 30 ms, longer than the device needs to run them. So it is captured for a few batch sizes
(`capture_sizes`), over buffers that stay, when the engine starts: a capture that fails then costs speed, not rows. A
step fills the buffers of the next larger size and replays it. Rows beyond the batch write to the cache's scratch page,
which nothing reads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.engine.devices.cuda.cache import PAGE, PagedCache, PagedStep, slot_of
from actors.engine.failures import describe, device_is_lost
from actors.engine.scheduler import Chunk
from actors.engine.types import DeviceLost

log = logging.getLogger(__name__)

Decode = Callable[[Tensor, Tensor, PagedStep], Tensor]
"""ids int64 [B], positions int64 [B] and their step -> logits [B, V]."""
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A call over fixed buffers -> what repeats it, and where its result lies."""


def capture_decoding(cache: PagedCache, decode: Decode, rows: int, tokens: int) -> DecodeGraphs | None:
    """Graphs for decoding steps of up to `rows` sequences of up to `tokens` tokens; None where they cannot be
    captured, and the log says why. Raises DeviceLost where the device is gone with the attempt."""
    begin = time.perf_counter()
    try:
        graphs = DecodeGraphs(cache, decode, rows, tokens, CudaCapture())
    except Exception as error:
        if device_is_lost(cache.device):
            raise DeviceLost(describe(error)) from error
        reason = describe(error).splitlines()[0]
        log.warning("decoding runs without CUDA graphs, since their capture failed: %s", reason)
    else:
        seconds = time.perf_counter() - begin
        log.info("captured CUDA graphs for decoding %s sequences in %.1f s", graphs.capture_sizes, seconds)
        return graphs
    torch.cuda.empty_cache()  # what the graphs before it held
    return None


class DecodeGraphs:
    """Decoding steps of up to `rows` sequences of up to `tokens` tokens, captured."""

    def __init__(self, cache: PagedCache, decode: Decode, rows: int, tokens: int, capture: Capture) -> None:
        self.cache, self._decode, self._capture = cache, decode, capture
        self.capture_sizes = capture_sizes(rows)
        self._pages = -(-tokens // PAGE)
        # The largest first: the smaller ones then find room in the memory it left in the pool.
        self._captured = {size: self._at(size) for size in reversed(self.capture_sizes)}

    def __call__(self, chunks: Sequence[Chunk], ids: Sequence[int]) -> Tensor | None:
        """Logits [R, V] of a step over decoding `chunks` and their last ids; None where no captured size fits."""
        size = next((size for size in self.capture_sizes if size >= len(chunks)), None)
        if size is None or max(chunk.end for chunk in chunks) > self._pages * PAGE:
            return None
        captured = self._captured[size]
        captured.fill(self.cache, chunks, ids)
        captured.replay()
        return captured.logits[: len(chunks)]

    def _at(self, size: int) -> _Captured:
        device, spare = self.cache.device, self.cache.spare
        packed = torch.zeros(4 + self._pages, size, dtype=torch.int64, device=device)
        ids, positions, slots = packed[0], packed[1], packed[2]
        slots.fill_(spare * PAGE)
        ends = torch.ones(size, dtype=torch.int32, device=device)
        table = torch.full((size, self._pages), spare, dtype=torch.int32, device=device)
        step = PagedStep(self.cache, slots, ends, table, [(0, 1)] * size, longest=self._pages * PAGE)

        def run() -> Tensor:
            ends.copy_(packed[3])
            if self.cache.attention == "flash":
                step.cu_seq_k[1:].copy_(packed[3].cumsum(0))
            table.copy_(packed[4:].t())
            return self._decode(ids, positions, step)

        packed[3].fill_(1)
        packed[4:].fill_(spare)
        replay, logits = self._capture(run)
        return _Captured(packed, replay, logits, step)


class _Captured:
    """One captured size. Everything a step needs is in one int64 buffer [4 + pages, size]: ids, positions, slots, live
    tokens, pages; so it travels in one copy."""

    def __init__(self, packed: Tensor, replay: Callable[[], None], logits: Tensor, step: PagedStep) -> None:
        self.packed, self.replay, self.logits, self.step = packed, replay, logits, step
        pinned = packed.device.type == "cuda"
        # One is enough: a step ends with its tokens on the host, and so after this copy.
        self._staging = torch.zeros(packed.shape, dtype=torch.int64, pin_memory=pinned)

    def fill(self, cache: PagedCache, chunks: Sequence[Chunk], ids: Sequence[int]) -> None:
        staging = self._staging.numpy()
        rows = len(chunks)
        staging[0, :rows] = ids
        staging[1, :rows] = [chunk.start for chunk in chunks]
        staging[2:, :] = cache.spare
        staging[2] *= PAGE
        staging[3] = 1
        for row, chunk in enumerate(chunks):
            pages = chunk.sequence.reservation.ids[: -(-chunk.end // PAGE)]
            staging[2, row] = slot_of(pages, np.array([chunk.start]))[0]
            staging[3, row] = chunk.end
            staging[4 : 4 + len(pages), row] = pages
        self.step.spans = [(chunk.start, chunk.end) for chunk in chunks] + [(0, 1)] * (
            self.packed.shape[1] - rows
        )
        self.packed.copy_(self._staging, non_blocking=True)


class CudaCapture:
    """Captures a call as a CUDA graph; all graphs share one memory pool, since one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up: libraries allocate their workspaces outside the graph
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The outer context is for captures that fail: torch's own then leaves its stream the current one.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
            logits = run()
        self._pool = graph.pool()
        return graph.replay, logits


def capture_sizes(rows: int) -> list[int]:
    """Batch sizes to capture: powers of two to 16, then steps of 16 to 128 and of 64 beyond.

    >>> capture_sizes(40)
    [1, 2, 4, 8, 16, 32, 40]
    """
    sizes = [1, 2, 4, 8, *range(16, 129, 16), *range(192, rows + 1, 64)]
    return [size for size in sizes if size < rows] + [rows]
