"""What the engine derives from the device it runs on: the cache, its size, and what a step may hold.

These are no knobs. Memory that is free after the weights are loaded is the cache; the rest follows from
what keeps that kind of device busy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from actors.engine.devices.base import Cache
from actors.engine.devices.cpu import memory as cpu_memory
from actors.engine.devices.cpu.cache import CpuCache, use_image_attention
from actors.engine.devices.cpu.kernels import attention_kernel
from actors.engine.devices.cpu.layers import prepare_layers
from actors.engine.devices.cuda import memory as cuda_memory
from actors.engine.devices.cuda.cache import PagedCache, flash_agrees
from actors.engine.devices.experts import choose_experts
from actors.engine.devices.kv_cache import KVShape
from actors.engine.scheduler import Limits
from actors.families.base import Family

CPU_LIMITS = Limits(sequences=64, prefill_tokens=2048, visual_tokens=16384)
CUDA_LIMITS = Limits(sequences=256, prefill_tokens=8192, visual_tokens=65536)
_TILE_PIXELS = {"cpu": 4 * 384 * 384, "cuda": 64 * 384 * 384}


@dataclass(frozen=True, slots=True)
class Device:
    """A device made ready for a model."""

    cache: Cache
    limits: Limits
    tiles: int
    """Tiles encoded at once."""


def prepare_device(
    model: PreTrainedModel, family: Family, limits: Limits | None, kv_tokens: int | None
) -> Device:
    """The cache and limits for `model` on its device; its layers are re-arranged for that device."""
    shape = KVShape.of(model.config.get_text_config(), model.dtype)
    kind = model.device.type
    limits = limits or (CUDA_LIMITS if kind == "cuda" else CPU_LIMITS)
    _, height, width = family.tile_shape
    tiles = max(1, _TILE_PIXELS[kind] // (height * width))
    if kind == "cpu":
        _prepare_cpu(model)
    choose_experts(model)
    if kv_tokens is None:
        free = cuda_memory.cache_bytes(model, limits) if kind == "cuda" else cpu_memory.cache_bytes()
        fits = free // shape.bytes_per_token
        kv_tokens = max(1, min(fits, limits.sequences * family.max_positions))
    heads = model.config.get_text_config().num_attention_heads
    if kind == "cuda":
        cache = PagedCache(shape, kv_tokens, model.device)
        cache.flash = flash_agrees(shape, heads, model.device)
        return Device(cache, limits, tiles)
    group = heads // shape.heads
    kernel = attention_kernel(shape.heads, group, shape.head_dim, shape.dtype)
    return Device(CpuCache(shape, kv_tokens, kernel), limits, tiles)


def _prepare_cpu(model: PreTrainedModel) -> None:
    """Re-arranges the layers of `model`."""
    cpu_memory.keep_freed_memory()
    use_image_attention(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            # Patches then come out one after the other, [tiles, patches, D] without gaps. Otherwise every layer of the
            # tower adds to and normalises a transposed view.
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    prepare_layers(model)
