"""The memory of a CUDA device: what the cache may take."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from actors.engine.scheduler import Limits

_SHARE = 0.9
"""Of the memory that is free, less what a step needs: fragmentation, workspaces and graphs want some."""


def cache_bytes(model: PreTrainedModel, limits: Limits) -> int:
    """What the cache may take, once the weights are loaded."""
    free, _ = torch.cuda.mem_get_info(model.device)
    text = model.config.get_text_config()
    # A step's widest moment: a layer's inner activations of all its tokens, and the logits in float32, copied.
    inner = (8 * text.hidden_size + 4 * text.intermediate_size) * model.dtype.itemsize
    step = limits.prefill_tokens * inner + 4 * limits.sequences * text.vocab_size * 4
    return max(0, int(free * _SHARE) - step)
