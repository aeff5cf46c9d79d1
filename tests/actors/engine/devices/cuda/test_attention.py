"""The Triton kernels, run by Triton's interpreter on a CPU (tests/conftest.py): in float32 and float16, for it has no
bfloat16 of its own."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are made

pytest.importorskip("triton", reason="needs triton, which CUDA builds of torch bring along")

from actors.engine.devices.cuda.cache import attention_paths
from actors.engine.devices.kv_cache import KVShape
from actors.engine.devices.proof import choose
from tests.actors.engine.devices.cuda.test_cache import paged_engine
from tests.actors.engine.test_parity import assert_equal, pool, run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("heads", "shared", "width", "dtype"), [(6, 2, 16, torch.float32), (3, 3, 20, torch.float16)]
)
def test_attention_proves_itself(heads: int, shared: int, width: int, dtype: torch.dtype) -> None:
    shape = KVShape(layers=2, heads=shared, head_dim=width, dtype=dtype)
    choice = choose("attention", attention_paths(shape, heads, {40}, 2, CPU), CPU)
    assert choice.path == "triton", choice.why


def test_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    family = "aya_vision"  # windows and grouped heads
    engine = paged_engine(family, monkeypatch, attention="triton")
    rows = pool(family)[:2]
    assert_equal(family, rows, run(engine, family, rows))
