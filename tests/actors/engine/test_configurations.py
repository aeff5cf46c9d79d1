"""Exact or refused: whatever a checkpoint's text model is, tokens are those of `generate`, or no engine is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

from actors.engine import Sampling
from actors.engine.engine import ContinuousEngine
from actors.engine.reference import ReferenceEngine
from actors.families import CheckpointError
from tests.actors.engine.subjects import Row, subject
from tests.actors.engine.test_parity import run

FAMILY = "llava_onevision"
ROWS = [Row(seed=seed, sampling=Sampling(10)) for seed in range(2)]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
]


def model_of(kind: str, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A LLaVA-OneVision of random weights with another text model, over the family's own tokenizer and tower."""
    own = subject(FAMILY).model.config
    sizes = {**SIZES, "vocab_size": own.get_text_config().vocab_size, **text}
    config = LlavaOnevisionConfig(
        text_config=CONFIG_MAPPING[kind](**sizes),
        vision_config=own.vision_config.to_dict(),
        image_token_index=own.image_token_id,
        video_token_index=own.video_token_id,
        image_grid_pinpoints=own.image_grid_pinpoints,
        vision_feature_layer=own.vision_feature_layer,
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # far from ties
            parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    return model


def outcome(kind: str, **text: Any) -> str:
    """ "equal", or why the engine is not built. Asserts that there is no third."""
    family = subject(FAMILY).family
    expected = run(ReferenceEngine(family, model_of(kind, **text)), FAMILY, ROWS)  # type: ignore[arg-type]
    try:
        engine = ContinuousEngine(family, model_of(kind, **text))
    except CheckpointError as error:
        return str(error)
    found = run(engine, FAMILY, [*ROWS[::-1]])[::-1]
    assert [done.token_ids for done in found] == [done.token_ids for done in expected]
    assert all(done.error is None for done in found)
    return "equal"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 24}),
        ("qwen3", {"head_dim": 20}),
        ("cohere", {}),
        ("phi3", {"pad_token_id": 0}),
        ("olmo", {}),
        ("granite", {}),
        ("starcoder2", {}),
    ],
)
def test_text_models_that_are_served(kind: str, text: dict[str, Any]) -> None:
    assert outcome(kind, **text) == "equal"


@pytest.mark.parametrize("kind", ["olmo2", "gemma2", "stablelm"])
def test_text_models_that_are_built_otherwise_are_refused(kind: str) -> None:
    (sentence,) = outcome(kind).splitlines()
    assert "model.engine: reference" in sentence


@settings(max_examples=12)
@given(
    kind=st.sampled_from(["qwen2", "llama", "mistral", "cohere2"]),
    shared=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    biased=st.booleans(),
    window=st.sampled_from([None, 16, 1000]),
    rope=st.sampled_from(ROPES),
)
def test_any_configuration_is_equal_or_refused(
    kind: str, shared: int, tied: bool, biased: bool, window: int | None, rope: dict[str, Any]
) -> None:
    text: dict[str, Any] = {
        "num_key_value_heads": shared,
        "tie_word_embeddings": tied,
        "attention_bias": biased,
        "rope_parameters": rope,
    }
    if window is not None:
        text |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 1}
    found = outcome(kind, **text)
    assert (found != "equal") == (rope["rope_type"] == "dynamic")


class Masked(nn.Module):
    """An attention layer that sees a window of its mask's, and does not tell its attention function."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        window, self.layer.sliding_window = self.layer.sliding_window, None
        try:
            return self.layer(*arguments, **keywords)
        finally:
            self.layer.sliding_window = window


def test_a_window_that_attention_is_not_told_of_is_refused_however_wide() -> None:
    one = subject("aya_vision")
    model = one.own_model()
    model.config.get_text_config().sliding_window = 4096
    for layer in model.model.language_model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 4096
            layer.self_attn = Masked(layer.self_attn)
    with pytest.raises(CheckpointError, match="computes other states"):
        ContinuousEngine(one.family, model)
