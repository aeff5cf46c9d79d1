"""Fused layers compute what the stock ones do, or are not used. Kernels run in Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, which CUDA builds of torch bring along")

from actors.engine.devices.cuda import layers, pointwise
from actors.engine.devices.cuda.layers import FusedAttention, FusedGatedMLP, FusedNorm, prepare_layers
from actors.engine.model.packed import use_packed_attention
from tests.actors.engine.devices.cuda.test_cache import paged_engine
from tests.actors.engine.subjects import subject
from tests.actors.engine.test_parity import assert_equal, pool, run

FUSED = {
    "llava_onevision": "fused norms, feed-forward, attention",
    "aya_vision": "fused norms, feed-forward, attention",
    "aria": "fused norms, feed-forward, attention",
    "fuyu": "stock",
}


@pytest.mark.parametrize("family", FUSED)
def test_each_family_proves_its_layers(family: str) -> None:
    model = subject(family).own_model()
    use_packed_attention(model)
    choice = prepare_layers(model)
    assert (choice.path, choice.why) == (FUSED[family], "")
    kinds = {type(module) for module in model.modules()}
    assert kinds.isdisjoint({FusedNorm, FusedGatedMLP, FusedAttention}) == (family == "fuyu")


@pytest.mark.parametrize("family", ["llava_onevision", "aya_vision"])
def test_the_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = paged_engine(family, monkeypatch)
    prepare_layers(engine.runner.model)
    rows = pool(family)[:2]
    assert_equal(family, rows, run(engine, family, rows))


def nan(both: Tensor) -> Tensor:
    return both[:, : both.shape[1] // 2] * float("nan")


def raising(both: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("product", "why"),
    [
        (lambda both: both[:, : both.shape[1] // 2], "differed by"),
        (nan, "differed by nan"),
        (raising, "no kernel image is available"),
    ],
)
def test_a_kind_that_lies_stays_stock(
    product: Callable[[Tensor], Tensor], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "silu_mul", product)
    model = subject("llava_onevision").own_model()
    use_packed_attention(model)
    choice = prepare_layers(model)
    assert choice.path == "fused norms, attention"
    assert choice.why.startswith("feed-forward: fused: ") and why in choice.why


@pytest.mark.parametrize("width", [1, 24, 100])
def test_gates_of_any_width(width: int) -> None:
    both = torch.randn(5, 2 * width)
    gate, up = both.chunk(2, dim=1)
    torch.testing.assert_close(pointwise.silu_mul(both), torch.nn.functional.silu(gate) * up)


def test_kinds_are_told_apart_by_shape_and_window() -> None:
    model = subject("aya_vision").own_model()
    attention = [layer.self_attn for layer in model.model.language_model.layers]
    assert len({layers._shape(module) for module in attention}) == 2  # with a sliding window, and without
