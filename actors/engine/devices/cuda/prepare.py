"""A model made ready for a CUDA device."""

from __future__ import annotations

from transformers import PreTrainedModel

from actors.engine.devices.base import Device, device_name
from actors.engine.devices.cuda import memory
from actors.engine.devices.cuda.cache import PagedCache, flash_agrees
from actors.engine.devices.cuda.experts import choose_experts
from actors.engine.devices.kv_cache import KVShape
from actors.engine.devices.proof import Choice
from actors.engine.scheduler import Limits
from actors.families.base import Family

LIMITS = Limits(sequences=256, prefill_tokens=8192, visual_tokens=65536)
_TILE_PIXELS = 64 * 384 * 384


def prepare_cuda(
    model: PreTrainedModel, family: Family, limits: Limits | None, kv_tokens: int | None
) -> Device:
    """See `prepare_device`."""
    experts = choose_experts(model)
    text = model.config.get_text_config()
    shape, limits = KVShape.of(text, model.dtype), limits or LIMITS
    if kv_tokens is None:
        fits = memory.cache_bytes(model, limits) // shape.bytes_per_token
        kv_tokens = max(1, min(fits, limits.sequences * family.max_positions))
    cache = PagedCache(shape, kv_tokens, model.device)
    cache.flash = flash_agrees(shape, text.num_attention_heads, model.device)
    _, height, width = family.tile_shape
    return Device(
        name=device_name(model.device),
        cache=cache,
        limits=limits,
        tiles=max(1, _TILE_PIXELS // (height * width)),
        choices={"attention": Choice("flash" if cache.flash else "gathered"), "experts": experts},
    )
