"""How near the engine comes to what the device can do: MFU of prefill, bandwidth utilisation of decode.

The one idea: both are measured against rates of the same device in the same process (a large matrix product, a large
copy), in a pass of their own with a synchronisation around every step, so the timed passes are not disturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from actors.engine.cpu_layers import PackedLinear
from actors.engine.engine import ContinuousEngine
from actors.engine.kv_cache import KVShape
from actors.engine.sampling import Sampled
from actors.engine.scheduler import Chunk
from actors.engine.types import Request


@dataclass(frozen=True)
class Rates:
    """What the device does at best."""

    flops: float
    """Of a large matrix product, a second, by the library that is faster at it."""
    bandwidth: float
    """Bytes read and written by a large copy, a second."""


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
    if (
        device.type == "cpu" and dtype == torch.float32
    ):  # another library than mm's, twice as fast on some machines
        packed = PackedLinear(torch.randn(side, side), None)
        products.append(lambda: packed(a))
    return Rates(
        flops=2 * side**3 / min(_best_seconds(product) for product in products),
        bandwidth=2 * source.numel() / _best_seconds(lambda: target.copy_(source)),
    )


def utilisation(
    engine: ContinuousEngine, model: PreTrainedModel, rows: Sequence[Request], rates: Rates
) -> dict[str, float]:
    """`prefill_mfu` of steps that compute prompts, `decode_bandwidth` of the others; both in [0, 1]."""
    shape = KVShape.of(model.config.get_text_config(), model.dtype)
    active, heads = active_parameters(model), model.config.get_text_config().num_attention_heads
    prefill = decode = flops = moved = 0.0
    original = engine.runner.step

    def step(chunks: Sequence[Chunk]) -> Sampled:
        nonlocal prefill, decode, flops, moved
        _synchronize()
        begin = time.perf_counter()
        sampled = original(chunks)
        _synchronize()
        seconds = time.perf_counter() - begin
        if any(chunk.length > 1 for chunk in chunks):
            prefill += seconds
            for chunk in chunks:
                seen = chunk.length * (chunk.start + chunk.end) / 2
                flops += 2 * active * chunk.length + 4 * seen * heads * shape.head_dim * shape.layers
        else:
            decode += seconds
            moved += (
                active * model.dtype.itemsize + sum(chunk.end for chunk in chunks) * shape.bytes_per_token
            )
        return sampled

    engine.runner.step = step  # type: ignore[method-assign]
    try:
        list(engine.generate(rows))
    finally:
        engine.runner.step = original  # type: ignore[method-assign]
    return {
        "prefill_mfu": round(flops / prefill / rates.flops, 3) if prefill else 0.0,
        "decode_bandwidth": round(moved / decode / rates.bandwidth, 3) if decode else 0.0,
    }


def active_parameters(model: PreTrainedModel) -> int:
    """Weights that one token of text meets, the output layer not counted (only sampled tokens meet it)."""
    text = model.config.get_text_config()
    total = 0
    for name, parameter in model.model.language_model.layers.named_parameters():
        share = text.moe_topk / text.moe_num_experts if ".experts." in name and parameter.dim() == 3 else 1
        total += int(parameter.numel() * share)
    return total


def _best_seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(8):
        _synchronize()
        begin = time.perf_counter()
        run()
        _synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
