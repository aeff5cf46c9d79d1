"""The packed attention: nothing waits for the device, and what it does not know is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.engine.engine import ContinuousEngine
from actors.engine.model.packed import Pass, packed_forward, use_packed_attention
from actors.families import FAMILIES, CheckpointError
from tests.actors.engine.subjects import subject


class Blind:
    """A step that attends to nothing."""

    def store(self, layer: int, key: Tensor, value: Tensor) -> None: ...

    def attend(self, layer: int, query: Tensor, *_: object) -> Tensor:
        return query.transpose(1, 2)


READS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu", "numpy", "nonzero")
"""Methods of a tensor by which the host learns its values: on a GPU it waits for them."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_does_not_wait_for_the_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject(family).own_model()
    if hasattr(model, "set_experts_implementation"):
        # CUDA's; the CPU's own loop reads counts
        model.set_experts_implementation({"text_config": "grouped_mm"})
    use_packed_attention(model)
    embeds = torch.randn(1, 4, model.config.get_text_config().hidden_size)
    positions = torch.tensor([[7, 0, 1, 2]])  # a decoding token beside a prompt
    read: list[str] = []
    for name in READS:
        monkeypatch.setattr(Tensor, name, _noted(name, getattr(Tensor, name), read))
    with torch.inference_mode():
        packed_forward(model, embeds, positions, Pass(Blind()))
    monkeypatch.undo()
    assert read == []


def _noted(name: str, method: Callable[..., Any], read: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        read.append(name)
        return method(*arguments, **keywords)

    return call


class Asking(nn.Module):
    """An attention layer that asks for something more."""

    def __init__(self, layer: nn.Module, **asked: object) -> None:
        super().__init__()
        self.layer, self.asked = layer, asked

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.layer(*arguments, **keywords, **self.asked)


def asking(family: str, **asked: object) -> PreTrainedModel:
    model = subject(family).own_model()
    second = model.model.language_model.layers[1]
    second.self_attn = Asking(second.self_attn, **asked)
    model.set_attn_implementation({"text_config": "eager"})  # which takes any keyword
    return model


def engine_of(family: str, model: PreTrainedModel) -> ContinuousEngine:
    return ContinuousEngine(subject(family).family, model)


@pytest.mark.parametrize(
    ("keyword", "value"), [("s_aux", torch.zeros(4)), ("softcap", 50.0), ("never_heard_of", True)]
)
def test_attention_that_the_steps_do_not_compute_is_refused_by_name(keyword: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"Qwen2Attention passes {keyword} .*model\.engine: reference"):
        engine_of("llava_onevision", asking("llava_onevision", **{keyword: value}))


def test_a_mask_of_the_models_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(**_: object) -> Tensor:
        return torch.zeros(1, 1, 1, 1)

    monkeypatch.setattr("transformers.models.qwen2.modeling_qwen2.create_causal_mask", masked)
    with pytest.raises(CheckpointError, match="attention_mask"):
        engine_of("llava_onevision", subject("llava_onevision").own_model())


def test_keywords_that_ask_for_nothing_are_taken() -> None:
    engine_of("aya_vision", asking("aya_vision", s_aux=None, softcap=None, output_attentions=False))
