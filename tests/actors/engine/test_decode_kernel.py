"""The compiled decode attention against torch's, and the engine without it."""

from __future__ import annotations

from shutil import which

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.decode_kernel import decode_kernel
from tests.actors.engine.subjects import FAMILIES
from tests.actors.engine.test_parity import assert_equal, engine, pool, run


@pytest.mark.skipif(which("cc") is None, reason="needs a C compiler")
@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 4), (2, 4, 64), (3, 7, 80), (8, 1, 128)]),
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=5),
    scale=st.sampled_from([0.01, 0.125, 1.0]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_kernel_is_scaled_dot_product_attention(
    shape: tuple[int, int, int], lengths: list[int], scale: float, spread: float
) -> None:
    heads, group, dim = shape
    kernel = decode_kernel(heads, group, dim, torch.float32)
    assert kernel is not None
    generator = torch.Generator().manual_seed(sum(lengths))
    capacity = sum(lengths) + 9
    keys, values = (torch.randn(heads, capacity, dim, generator=generator) * spread for _ in range(2))
    query = torch.randn(len(lengths), heads * group, dim, generator=generator)
    spans, start = [], 5
    for length in lengths:
        spans.append((start, start + length))
        start += length
    found = kernel(query, keys, values, spans, scale)
    for row, (start, end) in enumerate(spans):
        expected = F.scaled_dot_product_attention(
            query[row, None, :, None],
            keys[None, :, start:end],
            values[None, :, start:end],
            scale=scale,
            enable_gqa=True,
        )
        torch.testing.assert_close(found[row], expected[0, :, 0], rtol=2e-4, atol=2e-5 * spread)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_compiler_tokens_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(family, 3)
    monkeypatch.setattr(one.cache, "kernel", None)
    assert_equal(family, pool(family), run(one, family, pool(family)))


def test_other_types_have_no_kernel() -> None:
    assert decode_kernel(2, 2, 16, torch.bfloat16) is None
