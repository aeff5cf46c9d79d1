"""The memory of a CUDA device: what encoding images needs at once, and what the cache may take."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from actors.engine.failures import is_out_of_memory
from actors.engine.scheduler import Limits
from actors.families.base import Family

log = logging.getLogger(__name__)

_SHARE = 0.9
"""Of the memory that is free, less what a step needs: fragmentation, workspaces and graphs want some."""
_SIDE = 360
"""Pixels of a trial image's side, at least: one tile of most families, many patches of Fuyu."""


def encoding_bytes(model: PreTrainedModel, family: Family, tiles: int) -> tuple[int, int]:
    """How many tiles are encoded at once, at most `tiles`, and the bytes that takes beside weights: tried, since no
    rule tells what a tower and its attention allocate."""
    while True:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        try:
            _encode(model, family, tiles)
        except Exception as error:
            if tiles == 1 or not is_out_of_memory(error):
                raise
            tiles //= 2
            log.warning("out of memory in a trial of encoding images: now %d tiles at once", tiles)
            continue
        peak = torch.cuda.max_memory_allocated(model.device) - before
        torch.cuda.empty_cache()
        return tiles, peak


def cache_bytes(model: PreTrainedModel, limits: Limits, encoding: int) -> int:
    """What the cache may take once the weights are loaded; `encoding` bytes are for images."""
    free, _ = torch.cuda.mem_get_info(model.device)
    text = model.config.get_text_config()
    # A step's widest moment: a layer's inner activations of all its tokens, and the logits in float32, copied.
    inner = (8 * text.hidden_size + 4 * text.intermediate_size) * model.dtype.itemsize
    step = limits.prefill_tokens * inner + 4 * limits.sequences * text.vocab_size * 4
    return max(0, int(free * _SHARE) - max(step, encoding))


@torch.inference_mode()
def _encode(model: PreTrainedModel, family: Family, tiles: int) -> None:
    _, height, width = family.tile_shape
    times = -(-_SIDE // min(height, width))
    (layout,) = family.layout([(times * height, times * width)])
    layouts = [layout] * max(1, tiles // layout.tiles)
    shape = (layout.tiles * len(layouts), *family.tile_shape)
    family.embed_images(model, torch.zeros(shape, dtype=torch.uint8, device=model.device), layouts)
