"""What the engine derives from the device it runs on: the cache, its size, and what a step may hold.

The one idea: these are no knobs. Memory that is free after the weights are loaded is the cache; the rest follows from
what keeps that kind of device busy.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers import PreTrainedModel

from actors.engine.attention import Cache
from actors.engine.cpu import CpuCache
from actors.engine.kv_cache import KVShape
from actors.engine.packed_experts import choose_experts
from actors.engine.packed_linear import pack_linears
from actors.engine.scheduler import Limits
from actors.families.base import Family

CPU_LIMITS = Limits(sequences=32, prefill_tokens=2048, visual_tokens=16384)
_CPU_SHARE = 0.25
"""Of the memory that is available: a CPU machine runs more than the engine."""
_TILE_PIXELS_CPU = 4 * 384 * 384


@dataclass(frozen=True, slots=True)
class Device:
    cache: Cache
    limits: Limits
    tiles: int
    """Tiles encoded at once."""


def prepare_device(
    model: PreTrainedModel, family: Family, limits: Limits | None, kv_tokens: int | None
) -> Device:
    """The cache and limits for `model` on its device."""
    shape = KVShape.of(model.config.get_text_config(), model.dtype)
    _, height, width = family.tile_shape
    limits = limits or CPU_LIMITS
    if pack_linears(model):
        choose_experts(model)
    if kv_tokens is None:
        fits = int(_available_memory() * _CPU_SHARE) // shape.bytes_per_token
        kv_tokens = min(fits, limits.sequences * family.max_positions)
    return Device(CpuCache(shape, kv_tokens), limits, max(1, _TILE_PIXELS_CPU // (height * width)))


def _available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
