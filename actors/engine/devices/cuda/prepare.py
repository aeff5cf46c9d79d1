"""A model made ready for a CUDA device."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel

from actors.engine.devices.base import Device, device_name, keep_patches_together
from actors.engine.devices.cuda import memory
from actors.engine.devices.cuda.cache import Attention, PagedCache, attention_paths
from actors.engine.devices.cuda.experts import choose_experts
from actors.engine.devices.cuda.layers import prepare_layers
from actors.engine.devices.kv_cache import KVShape
from actors.engine.devices.proof import choose
from actors.engine.scheduler import Limits
from actors.families.base import Family

LIMITS = Limits(sequences=256, prefill_tokens=8192, visual_tokens=65536)
_TILE_PIXELS = 64 * 384 * 384


def prepare_cuda(
    model: PreTrainedModel, family: Family, limits: Limits | None, kv_tokens: int | None
) -> Device:
    """See `prepare_device`."""
    keep_patches_together(model)
    experts = choose_experts(model)
    layers = prepare_layers(model)
    text = model.config.get_text_config()
    shape, limits = KVShape.of(text, model.dtype), limits or LIMITS
    _, height, width = family.tile_shape
    tiles, encoding = memory.encoding_bytes(model, family, max(1, _TILE_PIXELS // (height * width)))
    if kv_tokens is None:
        fits = memory.cache_bytes(model, limits, encoding) // shape.bytes_per_token
        kv_tokens = max(1, min(fits, limits.sequences * family.max_positions))
    modules = model.model.language_model.modules()
    windows = {module.sliding_window for module in modules if hasattr(module, "sliding_window")}
    paths = attention_paths(shape, text.num_attention_heads, windows, limits.sequences, model.device)
    attention = choose("attention", paths, model.device)
    cache = PagedCache(shape, kv_tokens, model.device)
    cache.attention = cast(Attention, attention.path)
    return Device(
        name=device_name(model.device),
        cache=cache,
        limits=limits,
        tiles=tiles,
        choices={"attention": attention, "layers": layers, "experts": experts},
    )
