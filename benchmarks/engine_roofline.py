"""How near the engine comes to what the device can do: MFU of prefill, bandwidth utilisation of decode.

Measured in a pass of its own, with a synchronisation around every step, so that the timed passes are not disturbed.
What the device can do is the highest rate seen in that pass: of large matrix products and copies between the steps, and
of the steps themselves. A product timed once beforehand is no limit: on a shared machine it ran at 91 or at 148 GFLOP/s
a minute apart, and a step that came at the better time exceeded it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from actors.engine.devices.cpu.layers import PackedLinear
from actors.engine.devices.kv_cache import KVShape
from actors.engine.engine import ContinuousEngine
from actors.engine.sampling import Tokens
from actors.engine.scheduler import Chunk
from actors.engine.types import Request


class Peak:
    """The highest rates seen on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.flops = 0.0
        """Floating-point operations a second."""
        self.bandwidth = 0.0
        """Bytes a second, read or written."""
        self.seconds = 0.0
        """Spent on sampling."""
        cuda = device.type == "cuda"
        side = 8192 if cuda else 1024
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        source = torch.ones(1 << (28 if cuda else 25), dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        self._products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
        if not cuda and dtype == torch.float32:  # another library than mm's, faster on some machines
            packed = PackedLinear(b, None)
            self._products.append(lambda: packed(a))
        self._operations = 2 * side**3
        self._bytes = source.nbytes
        self._copy, self._read = (lambda: target.copy_(source)), source.sum

    def sample(self) -> None:
        begin = time.perf_counter()
        for product in self._products:
            self.flops = max(self.flops, self._operations / seconds_of(product))
        self.bandwidth = max(
            self.bandwidth, 2 * self._bytes / seconds_of(self._copy), self._bytes / seconds_of(self._read)
        )
        self.seconds += time.perf_counter() - begin


@dataclass(frozen=True)
class Work:
    """What steps must compute and read, whatever else they do."""

    weights: int
    """That every token of text meets; the output layer is not counted (only sampled tokens meet it)."""
    last: int
    """Of the last layer behind its attention: only tokens that yield one meet these."""
    windows: tuple[int | None, ...]
    """Tokens that each layer's attention sees; None: all before."""
    width: int
    """Of a layer's queries."""
    shape: KVShape

    @classmethod
    def of(cls, model: PreTrainedModel) -> Work:
        """Of a stock model: an engine re-arranges its own."""
        text = model.config.get_text_config()
        layers = model.model.language_model.layers
        shape = KVShape.of(text, model.dtype)
        counts = [0, 0]
        for index, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                expert = ".experts." in name and parameter.dim() == 3
                share = text.moe_topk / text.moe_num_experts if expert else 1
                behind = index == len(layers) - 1 and not name.startswith("self_attn.")
                counts[behind] += int(parameter.numel() * share)
        windows = tuple(getattr(layer.self_attn, "sliding_window", None) for layer in layers)
        weights, last = counts
        return cls(weights, last, windows, text.num_attention_heads * shape.head_dim, shape)

    def flops(self, chunk: Chunk) -> float:
        *others, last = self.windows
        kinds = Counter(others)
        seen = sum(count * _seen(chunk.start, chunk.end, window) for window, count in kinds.items())
        operations = 2 * self.weights * chunk.length
        if chunk.samples:
            seen += _seen(chunk.end - 1, chunk.end, last)
            operations += 2 * self.last
        return operations + 4 * self.width * seen

    def bytes_of_decoding(self, chunks: Sequence[Chunk]) -> float:
        """Of a step of one token a sequence: the weights once, and the keys and values each sequence sees."""
        kinds = Counter(self.windows)
        seen = sum(
            count * _seen(chunk.end - 1, chunk.end, window)
            for chunk in chunks
            for window, count in kinds.items()
        )
        a_layer = self.shape.bytes_per_token / self.shape.layers
        return (self.weights + self.last) * self.shape.dtype.itemsize + seen * a_layer


def utilisation(
    engine: ContinuousEngine, model: PreTrainedModel, rows: Sequence[Request]
) -> dict[str, float]:
    """`prefill_mfu` of steps that compute prompts, `decode_bandwidth` of the others; both in [0, 1]."""
    work, peak = Work.of(model), Peak(model.device, model.dtype)
    prefill = decode = flops = moved = 0.0
    original = engine.runner.step

    def step(chunks: Sequence[Chunk]) -> Tokens | None:
        nonlocal prefill, decode, flops, moved
        if peak.seconds <= prefill + decode:
            peak.sample()
        _synchronize()
        begin = time.perf_counter()
        sampled = original(chunks)
        _synchronize()
        seconds = time.perf_counter() - begin
        if any(chunk.length > 1 for chunk in chunks):
            operations = sum(map(work.flops, chunks))
            prefill, flops = prefill + seconds, flops + operations
            peak.flops = max(peak.flops, operations / seconds)
        else:
            size = work.bytes_of_decoding(chunks)
            decode, moved = decode + seconds, moved + size
            peak.bandwidth = max(peak.bandwidth, size / seconds)
        return sampled

    engine.runner.step = step  # type: ignore[method-assign]
    try:
        list(engine.generate(rows))
    finally:
        engine.runner.step = original  # type: ignore[method-assign]
    return {
        "prefill_mfu": round(flops / prefill / peak.flops, 3) if prefill else 0.0,
        "decode_bandwidth": round(moved / decode / peak.bandwidth, 3) if decode else 0.0,
    }


def seconds_of(run: Callable[[], object]) -> float:
    _synchronize()
    begin = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - begin


def _seen(start: int, end: int, window: int | None) -> int:
    """Keys that tokens [start, end) attend to, together."""
    window = window or end
    growing, full = min(end, window), max(start, window)  # before a window is full, each token sees one more
    more = (growing * (growing + 1) - start * (start + 1)) // 2 if start < window else 0
    return more + max(0, end - full) * window


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
