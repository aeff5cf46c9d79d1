"""Experts of transformers releases that have no interface for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actors.engine.devices.cuda.experts import choose_experts


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
