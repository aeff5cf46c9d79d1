"""A model made ready for a CPU."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedModel

from actors.engine.devices.base import Device, device_name, keep_patches_together
from actors.engine.devices.cpu import memory
from actors.engine.devices.cpu.cache import CpuCache, use_image_attention
from actors.engine.devices.cpu.experts import choose_experts
from actors.engine.devices.cpu.kernels import AttentionKernel, attention_kernel
from actors.engine.devices.cpu.layers import prepare_layers
from actors.engine.devices.cpu.proofs import prove_attention
from actors.engine.devices.kv_cache import KVShape
from actors.engine.devices.proof import Choice, Path, choose
from actors.engine.scheduler import Limits
from actors.families.base import Family

LIMITS = Limits(sequences=64, prefill_tokens=2048, visual_tokens=16384)
_TILE_PIXELS = 4 * 384 * 384


def prepare_cpu(
    model: PreTrainedModel, family: Family, limits: Limits | None, kv_tokens: int | None
) -> Device:
    """See `prepare_device`."""
    memory.keep_freed_memory()
    keep_patches_together(model)
    text = model.config.get_text_config()
    shape, limits = KVShape.of(text, model.dtype), limits or LIMITS
    with torch.inference_mode():
        attention, kernel = _attention(model, shape, text.num_attention_heads // shape.heads)
        experts = choose_experts(model)  # before layers, which are compared by the model's own
        layers = prepare_layers(model)
    if kv_tokens is None:
        fits = memory.cache_bytes() // shape.bytes_per_token
        kv_tokens = max(1, min(fits, limits.sequences * family.max_positions))
    _, height, width = family.tile_shape
    return Device(
        name=device_name(model.device),
        cache=CpuCache(shape, kv_tokens, kernel),
        limits=limits,
        tiles=max(1, _TILE_PIXELS // (height * width)),
        choices={"attention": attention, "layers": layers, "experts": experts},
    )


def _attention(model: PreTrainedModel, shape: KVShape, group: int) -> tuple[Choice, AttentionKernel | None]:
    """The kernel that the cache attends by, if any, and why none; the vision tower's is chosen beside it."""
    form = shape.heads, group, shape.head_dim, shape.dtype
    paths = [Path("compiled", partial(prove_attention, *form)), Path("sdpa")]
    text = choose("attention", paths, model.device)
    images = use_image_attention(model)
    kernel = attention_kernel(*form) if text.path == "compiled" else None
    why = [text.why, f"of images: {images.why}" if images.why and images.why != text.why else ""]
    return Choice(text.path, "; ".join(filter(None, why))), kernel
