"""Packed (varlen) attention: unmodified transformers models read and write our KV cache.

The models run on N packed tokens, [1, N, D]. Their attention layers dispatch by name, through transformers' attention
interface, to the function registered here, which hands queries, keys and values to the step in progress; the step knows
which tokens belong together and where their past lies. There is no mask and no padding anywhere. No mask function is
registered under the name: transformers then makes no mask at all, while for one that returns None it first compares
positions, which waits for the device once a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from actors.engine.devices.base import Attends, Step
from actors.families.checkpoint import CheckpointError

ATTENTION = "tessera"
_HARMLESS = {"dropout", "position_ids", "use_cache", "output_attentions"}
"""Keywords that the stock layers pass to attention and that change no result here: dropout is 0 outside training,
positions are already in queries and keys, and the cache is ours."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: what its tokens attend to, and which of them yield a token."""

    step: Step
    rows: Tensor | None = None
    """int64: the tokens that do; None where all do."""
    last: Step | None = None
    """The step of those rows alone."""

    def attend(self, *arguments: Any) -> Tensor:
        return self.step.attend(*arguments)


@dataclass(frozen=True, slots=True)
class StoreOnly:
    """Fills the cache without attending."""

    step: Step

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        self.step.store(layer, key, value)
        return query.transpose(1, 2)  # of the right shape; nobody reads it


def use_packed_attention(model: PreTrainedModel) -> None:
    """Makes the text model of `model` attend through the `step=` it is called with. Its vision tower keeps its own
    attention. From here on the model belongs to the engine: `generate` would find no step.
    """
    AttentionInterface.register(ATTENTION, _attend)
    model.set_attn_implementation({"text_config": ATTENTION})
    text = model.config.get_text_config()
    if text._attn_implementation != ATTENTION:
        raise ValueError(f"{type(model).__name__}: its text model does not take another attention")
    layers = model.model.language_model.layers
    layers[-1] = LastLayer(layers[-1])


def packed_forward(model: PreTrainedModel, embeds: Tensor, positions: Tensor, forward: Pass) -> Tensor:
    """The text model over N packed tokens: [1, N, D] and int64 [1, N] -> hidden states [R, D] of the pass's rows."""
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False, step=forward
    )
    return hidden.last_hidden_state[0]


class LastLayer(nn.Module):
    """The last decoder layer, computed only for the rows that yield a token.

    Of a prompt's other tokens the cache needs the last layer's keys and values, and nobody needs anything else. So its
    attention runs over all tokens to store them, and the layer itself on what is left: of a long prompt, one row.
    """

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        *,
        step: Pass,
        position_embeddings: tuple[Tensor, Tensor],
        position_ids: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        if step.rows is None:
            return self.layer(
                hidden_states,
                step=step,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **kwargs,
            )
        self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(hidden_states),
            step=StoreOnly(step.step),
            position_embeddings=position_embeddings,
            position_ids=position_ids,
            **kwargs,
        )
        hidden_states = hidden_states[:, step.rows]
        if step.last is None:
            return hidden_states
        cos, sin = position_embeddings
        return self.layer(
            hidden_states,
            step=step.last,
            position_embeddings=(cos[:, step.rows], sin[:, step.rows]),
            position_ids=position_ids[:, step.rows],
            **kwargs,
        )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: Attends,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Raises CheckpointError where a layer asks for attention that the steps do not compute (sinks, a soft cap, a mask
    of its own)."""
    others["attention_mask"] = attention_mask
    unknown = [name for name, value in others.items() if value is not None and name not in _HARMLESS]
    if unknown:
        raise CheckpointError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which the continuous engine cannot "
            "apply; model.engine: reference applies it"
        )
    return step.attend(module.layer_idx, query, key, value, scaling, sliding_window), None  # type: ignore[arg-type]
