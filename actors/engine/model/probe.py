"""Exact or refused: a checkpoint's text model is run once as transformers runs it, and once packed, before any row.

The packed pass assumes a decoder of the usual build. A checkpoint whose layers are built otherwise (norms behind
attention, another residual, a mask that attention is not told of) would fail on every row, or yield other text. So a
few random tokens go through the stock model, and then through the re-arranged one and its cache: as two chunks of a
prompt, and one by one. States that differ refuse the checkpoint. Sliding windows are narrowed on both sides, so that
few tokens show whether what a mask hides is what attention is told of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from actors.engine.devices.base import Cache, Step
from actors.engine.failures import describe, device_is_lost
from actors.engine.model.packed import Pass, packed_forward
from actors.engine.scheduler import Chunk, SequenceState
from actors.engine.types import DeviceLost, Request, Sampling
from actors.families.checkpoint import CheckpointError

_CHUNKS = (9, 11, 1, 1, 1)
"""Tokens of each packed pass: a prompt in two parts, and three that are decoded."""
_WINDOW = 8
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Of a state's norm. What a layer too much or too little changes is about the norm itself."""
_QUANTILE = {torch.float32: 1.0, torch.bfloat16: 0.75, torch.float16: 0.75}
"""Of the tokens: in 16 bits a router may send a token to another expert."""


@dataclass(frozen=True, slots=True)
class StockStates:
    """What the stock text model makes of some tokens: embeddings [1, N, D] -> states [N, D]."""

    embeds: Tensor
    states: Tensor


@torch.inference_mode()
def stock_states(model: PreTrainedModel) -> StockStates:
    """To be taken before the model is re-arranged."""
    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, sum(_CHUNKS), text.hidden_size, generator=generator)
    typical = model.get_input_embeddings().weight[:1024].float().std().item()
    embeds = (embeds * typical).to(model.device, model.dtype)
    with _narrow_masks(text):
        output = model.model.language_model(inputs_embeds=embeds, use_cache=False)
    return StockStates(embeds, output.last_hidden_state[0])


@torch.inference_mode()
def check_packed(model: PreTrainedModel, cache: Cache, stock: StockStates) -> None:
    """Raises CheckpointError where the re-arranged `model` over `cache` makes other states of the same tokens, and
    DeviceLost."""
    try:
        found = torch.cat(list(_packed_states(model, cache, stock.embeds)))
    except CheckpointError:
        raise
    except Exception as error:
        if device_is_lost(model.device):
            raise DeviceLost(describe(error)) from error
        raise _refusal(model, f"fails packed ({describe(error).splitlines()[0]})") from error
    # Of the second chunk, as of a prompt's last, the last token alone goes through the last layer.
    kept = [*range(_CHUNKS[0]), *range(sum(_CHUNKS[:2]) - 1, sum(_CHUNKS))]
    exact = stock.states[kept].float()
    errors = (found.float() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-6)
    worst = errors.nan_to_num(float("inf")).quantile(_QUANTILE[model.dtype]).item()
    if not worst <= _TOLERANCE[model.dtype]:
        raise _refusal(model, f"computes other states packed (they differ by {worst:.2g} of their norm)")


def _packed_states(model: PreTrainedModel, cache: Cache, embeds: Tensor) -> Iterator[Tensor]:
    """[rows, D] of each pass."""
    tokens = sum(_CHUNKS)
    request = Request(None, np.zeros(tokens, np.int32), np.zeros((0, 3, 1, 1), np.uint8), (), Sampling())
    sequence = SequenceState(request, emit=lambda _: None, placeholders=np.zeros(0, np.int64))
    sequence.reservation = cache.reserve(tokens)
    if sequence.reservation is None:
        return  # so small a cache holds no row either
    try:
        start = 0
        for number, length in enumerate(_CHUNKS):
            end = start + length
            padded = cache.bucket(length)
            part = torch.zeros(1, padded, embeds.shape[2], dtype=embeds.dtype, device=embeds.device)
            part[:, :length] = embeds[:, start:end]
            positions = torch.zeros(1, padded, dtype=torch.int64, device=embeds.device)
            positions[0, :length] = torch.arange(start, end)
            step = _Narrow(cache.step([Chunk(sequence, start, length)]))
            forward = Pass(step)
            if number == 1:
                rows = torch.zeros(cache.bucket(1), dtype=torch.int64, device=embeds.device)
                rows[0] = length - 1
                forward = Pass(step, rows, _Narrow(cache.step([Chunk(sequence, end - 1, 1)])))
            states = packed_forward(model, part, positions, forward)
            yield states[: 1 if number == 1 else length]
            start = end
    finally:
        cache.release(sequence.reservation)


def _refusal(model: PreTrainedModel, what: str) -> CheckpointError:
    kind = model.config.get_text_config().model_type
    return CheckpointError(
        f"the checkpoint's text model ({kind}) {what}, so the continuous engine cannot serve it; "
        "model.engine: reference serves it"
    )


@dataclass(frozen=True, slots=True)
class _Narrow:
    """A step whose windows are no wider than `_WINDOW`."""

    step: Step

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.step.store(layer, key, value)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        window = None if window is None else min(window, _WINDOW)
        return self.step.attend(layer, query, key, value, scaling, window)


@contextmanager
def _narrow_masks(text: PreTrainedConfig) -> Iterator[None]:
    """Within it, the masks that transformers makes of `text` have windows no wider than `_WINDOW`."""
    window = getattr(text, "sliding_window", None)
    if window is None:
        yield
        return
    text.sliding_window = min(window, _WINDOW)
    try:
        yield
    finally:
        text.sliding_window = window
