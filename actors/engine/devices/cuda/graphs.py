"""CUDA graphs for decoding: a step of one token a sequence is launched as one piece.

Such a step has the same shape every time but for its number of rows, and launching its thousand small kernels one by
one costs the host 8 - 30 ms, longer than the device needs to run them. So it is captured for a few batch sizes
(`capture_sizes`), over buffers that stay, when the engine starts: a capture that fails then costs speed, not rows. A
step fills the buffers of the next larger size and replays it. Rows beyond the batch write to the cache's scratch page,
which nothing reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.engine.devices.cuda.cache import PAGE, PagedCache, PagedStep
from actors.engine.devices.proof import Choice, Path, check_close, choose
from actors.engine.scheduler import Chunk
from actors.engine.transfer import upload

Decode = Callable[[Tensor, Tensor, PagedStep], Tensor]
"""Slots of the sequences int64 [B], positions int64 [B] and their step -> logits [B, V]."""
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A call over fixed buffers -> what repeats it, and where its result lies."""


def capture_decoding(
    cache: PagedCache, decode: Decode, rows: int, tokens: int
) -> tuple[DecodeGraphs | None, Choice]:
    """Graphs for decoding steps of up to `rows` sequences of up to `tokens` tokens, each compared with the eager step;
    None where they cannot be captured or differ. Raises DeviceLost where the device is gone with the attempt."""
    graphs: list[DecodeGraphs] = []

    def prove() -> None:
        captured = DecodeGraphs(cache, decode, rows, tokens, CudaCapture())
        captured.check()
        graphs.append(captured)

    choice = choose("graphs", [Path(f"up to {rows} sequences", prove), Path("none")], cache.device)
    if not graphs and cache.device.type == "cuda":
        torch.cuda.empty_cache()  # what the graphs before it held
    return (graphs[0] if graphs else None), choice


class DecodeGraphs:
    """Decoding steps of up to `rows` sequences of up to `tokens` tokens, captured."""

    def __init__(self, cache: PagedCache, decode: Decode, rows: int, tokens: int, capture: Capture) -> None:
        self.cache, self._decode, self._capture = cache, decode, capture
        self._scratch = rows
        self.capture_sizes = capture_sizes(rows)
        self._pages = -(-tokens // PAGE)
        self._tables = np.full((rows, self._pages), cache.spare)
        """The pages of the sequence in each slot."""
        self._holders: list[Any] = [None] * rows
        # The largest first: the smaller ones then find room in the memory it left in the pool.
        self._captured = {size: self._at(size) for size in reversed(self.capture_sizes)}

    def __call__(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Logits [R, V] of a step over decoding `chunks`; None where no captured size fits."""
        size = next((size for size in self.capture_sizes if size >= len(chunks)), None)
        if size is None or max(chunk.end for chunk in chunks) > self._pages * PAGE:
            return None
        captured = self._captured[size]
        slots = np.fromiter((chunk.sequence.slot for chunk in chunks), np.int64, len(chunks))
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
        for chunk, slot in zip(chunks, slots, strict=True):
            pages = chunk.sequence.reservation
            if self._holders[slot] is not pages:
                self._holders[slot] = pages
                self._tables[slot] = self.cache.spare
                self._tables[slot, : len(pages.ids)] = pages.ids[: self._pages]
        captured.fill(slots, starts, self._tables[slots])
        captured.replay()
        return captured.logits[: len(chunks)]

    def check(self) -> None:
        """Raises Disagrees where a captured step yields other logits than the eager one. The cache holds nothing
        yet."""
        pages = self.cache.spare
        for cache in (self.cache.keys, self.cache.values):
            cache[:, :, : 8 + self._scratch // pages].normal_()
        for size, captured in self._captured.items():
            rows = np.arange(size)
            starts = 3 + rows // pages  # no two rows write to one place
            held = [(int(page),) for page in rows % pages]
            tables = np.full((size, self._pages), pages)
            tables[:, 0] = rows % pages
            captured.fill(rows, starts, tables)
            captured.replay()
            step = self.cache.step_over([(start, start + 1) for start in starts.tolist()], held)
            slots, positions = upload(rows, self.cache.device), upload(starts, self.cache.device)
            check_close(captured.logits, self._decode(slots, positions, step), f"at {size} sequences")

    def _at(self, size: int) -> _Captured:
        device, spare = self.cache.device, self.cache.spare
        packed = torch.zeros(4 + self._pages, size, dtype=torch.int64, device=device)
        rows, positions, slots = packed[0], packed[1], packed[2]
        rows.fill_(self._scratch)
        slots.fill_(spare * PAGE)
        ends = torch.ones(size, dtype=torch.int32, device=device)
        table = torch.full((size, self._pages), spare, dtype=torch.int32, device=device)
        step = PagedStep(self.cache, slots, ends, table, [(0, 1)] * size, longest=self._pages * PAGE)

        def run() -> Tensor:
            ends.copy_(packed[3])
            if self.cache.attention == "flash":
                step.cu_seq_k[1:].copy_(packed[3].cumsum(0))
            table.copy_(packed[4:].t())
            return self._decode(rows, positions, step)

        packed[3].fill_(1)
        packed[4:].fill_(spare)
        replay, logits = self._capture(run)
        return _Captured(packed, replay, logits)


class _Captured:
    """One captured size. Everything a step needs is in one int64 buffer [4 + pages, size]: slots of the sequences,
    positions, slots of the cache, live tokens, pages; so it travels in one copy."""

    def __init__(self, packed: Tensor, replay: Callable[[], None], logits: Tensor) -> None:
        self.packed, self.replay, self.logits = packed, replay, logits
        padding = packed.cpu()
        # Two: while one is filled, the other may still be on its way, for a step that has not been waited for.
        self._staging = [padding, padding.clone()]
        if packed.device.type == "cuda":
            self._staging = [each.pin_memory() for each in self._staging]
        self._padding = padding.numpy().copy()

    def fill(self, slots: np.ndarray, starts: np.ndarray, tables: np.ndarray) -> None:
        """int64: slots and positions [R] of the rows, and the pages of each [R, pages]."""
        self._staging.reverse()
        staging, rows = self._staging[0].numpy(), len(slots)
        staging[:, rows:] = self._padding[:, rows:]
        staging[0, :rows], staging[1, :rows], staging[3, :rows] = slots, starts, starts + 1
        staging[2, :rows] = tables[np.arange(rows), starts // PAGE] * PAGE + starts % PAGE
        staging[4:, :rows] = tables.T
        self.packed.copy_(self._staging[0], non_blocking=True)


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
