"""Experts of transformers releases that have no interface for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from actors.engine.devices.cuda.experts import choose_experts
from tests.actors.engine.subjects import subject


class AriaGroupedExpertsGemm(nn.Module):
    """As in transformers 5.17: one product for tokens sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 12), requires_grad=False)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        parts = zip(tokens.split(counts.tolist()), self.weight, strict=True)
        return torch.cat([part @ weight for part, weight in parts])


def test_grouped_experts_are_one_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(AriaGroupedExpertsGemm())
    tokens, counts = torch.randn(11, 8), torch.tensor([3, 0, 7, 1])
    expected = model[0](tokens, counts)
    choose_experts(model)
    assert "forward" in vars(model[0])
    torch.testing.assert_close(model[0](tokens, counts), expected)


def test_the_interfaces_experts_prove_themselves() -> None:
    model = subject("aria").own_model()
    assert choose_experts(model).path == "grouped_mm"
    assert model.config.get_text_config()._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("lie", [lambda product: product * float("nan"), lambda product: product.roll(1, 0)])
def test_a_grouped_product_that_lies_leaves_the_loop(
    lie: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        "torch.nn.functional.grouped_mm", lambda *given, **named: lie(grouped(*given, **named))
    )
    torch.manual_seed(0)
    model = nn.Sequential(AriaGroupedExpertsGemm())
    choice = choose_experts(model)
    assert choice.path == "loop" and choice.why.startswith("grouped_mm: differed by")
    assert "forward" not in vars(model[0])
