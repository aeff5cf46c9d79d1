"""Packed layers against the modules that they replace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.activations import ACT2FN
from transformers.models.aria.modeling_aria import AriaTextRMSNorm
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from actors.engine.devices.cpu import layers
from actors.engine.devices.cpu.layers import (
    PackedAttention,
    PackedGatedMLP,
    PackedLinear,
    RMSNorm,
    prepare_layers,
)


class Model(nn.Module):
    """What the families' models are made of."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.plain = nn.Linear(24, 16)
        self.mlp = Qwen2MLP(Qwen2Config(hidden_size=16, intermediate_size=40, hidden_act="silu"))
        self.norms = nn.Sequential(Qwen2RMSNorm(16, 1e-5), AriaTextRMSNorm(16, 0.1), Cohere2LayerNorm(16))
        for norm in self.norms:
            nn.init.normal_(norm.get_parameter("weight"))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)
        self.requires_grad_(False).eval().to(dtype)

    def forward(self, x: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
        keys = self.norms(self.mlp(self.plain(x)))
        return self.attention(query, keys, keys, attn_mask=mask)[0]


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    torch.manual_seed(0)
    stock = Model()
    packed = copy.deepcopy(stock)
    prepare_layers(packed)
    return stock, packed


def test_every_block_is_packed(models: tuple[Model, Model]) -> None:
    kinds = [type(child) for child in models[1].children()]
    assert kinds == [PackedLinear, PackedGatedMLP, nn.Sequential, PackedAttention]
    assert [type(norm) for norm in models[1].norms] == [RMSNorm, RMSNorm, nn.LayerNorm]


@pytest.mark.parametrize("masked", ["nothing", "patches", "pairs"])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_blocks_compute_the_same(models: tuple[Model, Model], batch: int, masked: str) -> None:
    torch.manual_seed(batch)
    x, query = torch.randn(batch, 9, 24), torch.randn(batch, 5, 16)
    mask = None
    if masked == "patches":  # as Aria's projector makes it: the same for every head and query
        mask = (torch.rand(batch, 9) < 0.4).index_fill(1, torch.tensor([2]), False)
        mask = mask.repeat_interleave(4, 0).unsqueeze(1).expand(-1, 5, -1)
    elif masked == "pairs":
        mask = (torch.rand(batch * 4, 5, 9) < 0.4).index_fill(2, torch.tensor([2]), False)
    stock, packed = models
    torch.testing.assert_close(packed(x, query, mask), stock(x, query, mask), rtol=1e-5, atol=1e-5)


def test_other_types_stay_as_they_are() -> None:
    model = Model(torch.float16)
    prepare_layers(model)
    assert [type(child) for child in (model.plain, model.mlp, model.norms[0], model.attention)] == [
        nn.Linear,
        Qwen2MLP,
        Qwen2RMSNorm,
        nn.MultiheadAttention,
    ]


class Block(nn.Module):
    """A vision tower's feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.activation_fn = nn.Linear(16, 40), ACT2FN["gelu_pytorch_tanh"]
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_fn(self.fc1(x))


@pytest.mark.parametrize("lies", [False, True])
def test_an_activation_is_fused_only_where_it_computes_the_same(
    lies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lies:
        monkeypatch.setitem(layers._FUSED, type(ACT2FN["gelu_pytorch_tanh"]), ("swish", ""))
    torch.manual_seed(0)
    model = nn.Sequential(Block())
    x = torch.randn(5, 16) * 3
    exact = model(x)
    choice = prepare_layers(model)
    torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)
    assert isinstance(model[0].activation_fn, nn.Identity) is not lies
    assert ("Block's activation: differed by" in choice.why) is lies
