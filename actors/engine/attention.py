"""How the stock text models come to attend to our cache: transformers' attention interface, and what a device adds.

The one idea: the models run unchanged on N packed tokens, [1, N, D]. Their attention layers dispatch by name to the
function registered here, which hands queries, keys and values to the step in progress; the step knows which tokens
belong together and where their past lies. There is no mask and no padding anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from actors.engine.scheduler import Chunk

ATTENTION = "tessera"


class Step(Protocol):
    """One forward pass's view of the cache."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Stores keys and values, then attends causally, each sequence over its own tokens.

        query [1, H, N, d]; key, value [1, H_kv, N, d] -> [1, N, H, d]. With a `window` a token sees that many
        tokens, itself included.
        """
        ...


class Cache(Protocol):
    """A device's keys and values: room for sequences, and the steps over it."""

    capacity: int
    """Tokens it can hold."""

    @property
    def used(self) -> int:
        """Tokens (or pages) in use; 0 once no sequence runs."""
        ...

    def reserve(self, tokens: int) -> Any:
        """Room for one sequence, or None where there is none now."""
        ...

    def release(self, reservation: Any) -> None: ...

    def copy_prefix(self, source: Any, target: Any, tokens: int) -> None:
        """Gives `target` the first `tokens` keys and values of `source`."""
        ...

    def step(self, chunks: Seq[Chunk]) -> Step:
        """The step over `chunks`: decoding ones (length 1) first."""
        ...


def use_packed_attention(model: PreTrainedModel) -> None:
    """Makes the text model of `model` attend through the `step=` it is called with. Its vision tower keeps its own
    attention. From here on the model belongs to the engine: `generate` would find no step."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
    model.set_attn_implementation({"text_config": ATTENTION})
    if model.config.get_text_config()._attn_implementation != ATTENTION:
        raise ValueError(f"{type(model).__name__}: its text model does not take another attention")


def packed_forward(model: PreTrainedModel, embeds: Tensor, positions: Tensor, step: Step) -> Tensor:
    """The text model over N packed tokens: [1, N, D] and int64 [1, N] -> hidden states [N, D]."""
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False, step=step
    )
    return hidden.last_hidden_state[0]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: Step,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    return step.attend(module.layer_idx, query, key, value, scaling, sliding_window), None  # type: ignore[arg-type]


def _no_mask(*_: object, **__: object) -> None:
    return None


def window_mask(queries: int, past: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[queries, past + queries] to add to scores: 0 where a query sees a key, -inf elsewhere. Query i stands at
    position past + i; it sees what is not after it and, with a window, fewer than `window` before it."""
    distance = (
        torch.arange(past, past + queries, device=device)[:, None]
        - torch.arange(past + queries, device=device)[None]
    )
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
