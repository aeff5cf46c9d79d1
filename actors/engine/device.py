"""What the engine derives from the device it runs on: the cache, its size, and what a step may hold.

The one idea: these are no knobs. Memory that is free after the weights are loaded is the cache; the rest follows from
what keeps that kind of device busy.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from actors.engine.attention import Cache
from actors.engine.cpu import CpuCache, use_image_attention
from actors.engine.cpu_kernels import attention_kernel
from actors.engine.cpu_layers import prepare_layers
from actors.engine.experts import choose_experts
from actors.engine.kv_cache import KVShape
from actors.engine.paged import PagedCache, flash_agrees
from actors.engine.scheduler import Limits
from actors.families.base import Family

CPU_LIMITS = Limits(sequences=64, prefill_tokens=2048, visual_tokens=16384)
CUDA_LIMITS = Limits(sequences=256, prefill_tokens=8192, visual_tokens=65536)
_CPU_SHARE = 0.25
"""Of the memory that is available: a CPU machine runs more than the engine."""
_CUDA_SHARE = 0.9
"""Of the memory that is free, less what a step needs: fragmentation, workspaces and graphs want some."""
_TILE_PIXELS = {"cpu": 4 * 384 * 384, "cuda": 64 * 384 * 384}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


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
        fits = _cache_bytes(model, limits) // shape.bytes_per_token
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
    _keep_freed_memory()
    use_image_attention(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            # Patches then come out one after the other, [tiles, patches, D] without gaps. Otherwise every layer of the
            # tower adds to and normalises a transposed view.
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    prepare_layers(model)


def _keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one, up to a gigabyte. Given back and asked for again, every page
    of it would be a page fault: a quarter of a long prompt's feed-forward blocks."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_ARENA_MAX, 1)  # the arenas of other threads give back whatever is empty, thresholds or not


def _cache_bytes(model: PreTrainedModel, limits: Limits) -> int:
    """What the cache may take, once the weights are loaded."""
    if model.device.type == "cpu":
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_SHARE)
    free, _ = torch.cuda.mem_get_info(model.device)
    text = model.config.get_text_config()
    # A step's widest moment: a layer's inner activations of all its tokens, and the logits in float32, copied.
    inner = (8 * text.hidden_size + 4 * text.intermediate_size) * model.dtype.itemsize
    step = limits.prefill_tokens * inner + 4 * limits.sequences * text.vocab_size * 4
    return max(0, int(free * _CUDA_SHARE) - step)
