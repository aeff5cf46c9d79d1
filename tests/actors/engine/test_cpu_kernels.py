"""The compiled attention against torch's, and the engine without it."""

from __future__ import annotations

from shutil import which

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.attention import window_mask
from actors.engine.cpu_kernels import attention_kernel
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
    kernel = attention_kernel(heads, group, dim, torch.float32)
    assert kernel is not None
    generator = torch.Generator().manual_seed(sum(lengths))
    capacity = sum(lengths) + 9
    keys, values = (torch.randn(heads, capacity, dim, generator=generator) * spread for _ in range(2))
    query = torch.randn(len(lengths), heads * group, dim, generator=generator)
    spans, start = [], 5
    for length in lengths:
        spans.append((start, start + length))
        start += length
    found = kernel.decode(query, keys, values, spans, scale)
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
    assert attention_kernel(2, 2, 16, torch.bfloat16) is None


@pytest.mark.skipif(which("cc") is None, reason="needs a C compiler")
@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 4), (2, 4, 64), (3, 7, 80), (8, 1, 128), (2, 1, 72)]),
    queries=st.integers(1, 200),
    past=st.one_of(st.none(), st.integers(0, 150)),
    window=st.one_of(st.none(), st.integers(1, 220)),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_many_queries_attend_like_scaled_dot_product_attention(
    shape: tuple[int, int, int], queries: int, past: int | None, window: int | None, spread: float
) -> None:
    heads, group, dim = shape
    kernel = attention_kernel(heads, group, dim, torch.float32)
    assert kernel is not None
    batch, length = (2, queries + 3) if past is None else (1, past + queries)
    generator = torch.Generator().manual_seed(queries)
    # Tokens before heads, as linear layers leave them.
    query = torch.randn(batch, queries, heads * group, dim, generator=generator).transpose(1, 2)
    keys, values = (torch.randn(batch, heads, length, dim, generator=generator) * spread for _ in range(2))
    mask = None if past is None else window_mask(queries, past, window, torch.float32, torch.device("cpu"))
    expected = F.scaled_dot_product_attention(query, keys, values, mask, scale=0.125, enable_gqa=True)
    found = kernel.attend(query, keys, values, 0.125, past, None if past is None else window)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=2e-4, atol=2e-5 * spread)


@pytest.mark.skipif(which("cc") is None, reason="needs a C compiler")
def test_gaps_in_the_last_dimension_are_refused() -> None:
    kernel = attention_kernel(2, 1, 8, torch.float32)
    assert kernel is not None
    whole = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="not contiguous"):
        kernel.attend(torch.zeros(1, 2, 3, 16)[..., ::2], whole, whole, 1.0)
