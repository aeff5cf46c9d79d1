"""The compiled kernels against torch's arithmetic, and the engine without them."""

from __future__ import annotations

from collections.abc import Iterator
from shutil import which

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.devices.base import window_mask
from actors.engine.devices.cpu import kernels as cpu_kernels
from actors.engine.devices.cpu.cache import CpuCache
from actors.engine.devices.cpu.kernels import ExpertsKernel, attention_kernel
from actors.families import FAMILIES
from tests.actors.engine.test_parity import assert_equal, engine, pool, run


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


DTYPES = [torch.float32, torch.bfloat16]


def close(found: torch.Tensor, exact: torch.Tensor, scale: float) -> None:
    """`found` is what its dtype can hold of float32 `exact`, of about `scale`, but for sums in another order."""
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, exact, rtol=2e-4, atol=2e-5 * scale)
    else:  # what products take in between, weights or gated values, is rounded to 2^-8 as well
        torch.testing.assert_close(found.float(), exact, rtol=2e-2, atol=1e-2 * scale)


@pytest.fixture(params=["native", "no AMX", "vectors"], scope="module")
def matrix_unit(request: pytest.FixtureRequest) -> Iterator[None]:
    """bfloat16 kernels with what this machine has, and as built where there is no matrix unit, or nothing at all."""
    build, without = cpu_kernels._build, WITHOUT[request.param]
    cpu_kernels._build = lambda source, *more, **shape: build(source, *more, *without, **shape)
    forget()
    yield
    cpu_kernels._build = build
    forget()


NO_AMX = ("-mno-amx-bf16", "-mno-amx-tile")
WITHOUT = {"native": (), "no AMX": NO_AMX, "vectors": (*NO_AMX, "-mno-avx512bf16")}


def forget() -> None:
    cpu_kernels.attention_kernel.cache_clear()
    cpu_kernels._experts_library.cache_clear()


@pytest.mark.usefixtures("matrix_unit")
@pytest.mark.skipif(which("cc") is None, reason="needs a C compiler")
@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 4), (2, 4, 64), (3, 7, 80), (8, 1, 128)]),
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=5),
    scale=st.sampled_from([0.01, 0.125, 1.0]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_kernel_is_scaled_dot_product_attention(
    shape: tuple[int, int, int], lengths: list[int], scale: float, spread: float, dtype: torch.dtype
) -> None:
    heads, group, dim = shape
    kernel = attention_kernel(heads, group, dim, dtype)
    assert kernel is not None
    generator = torch.Generator().manual_seed(sum(lengths))
    capacity = sum(lengths) + 9
    keys, values = (
        (torch.randn(heads, capacity, dim, generator=generator) * spread).to(dtype) for _ in range(2)
    )
    query = torch.randn(len(lengths), heads * group, dim, generator=generator).to(dtype)
    spans, start = [], 5
    for length in lengths:
        spans.append((start, start + length))
        start += length
    found = kernel.decode(query, keys, values, spans, scale)
    for row, (start, end) in enumerate(spans):
        expected = F.scaled_dot_product_attention(
            query[row, None, :, None].float(),
            keys[None, :, start:end].float(),
            values[None, :, start:end].float(),
            scale=scale,
            enable_gqa=True,
        )
        close(found[row], expected[0, :, 0], spread)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_compiler_tokens_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise FileNotFoundError("cc")

    forget()
    monkeypatch.setattr(cpu_kernels, "_compile", no_compiler)
    try:
        one = engine(family, 3)
        assert isinstance(one.cache, CpuCache)
        assert one.cache.kernel is None
        assert_equal(family, pool(family), run(one, family, pool(family)))
    finally:
        forget()


def test_other_types_have_no_kernel() -> None:
    assert attention_kernel(2, 2, 16, torch.float16) is None


@pytest.mark.usefixtures("matrix_unit")
@pytest.mark.skipif(which("cc") is None, reason="needs a C compiler")
@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 4), (2, 4, 64), (3, 7, 80), (8, 1, 128), (2, 1, 72)]),
    queries=st.integers(1, 200),
    past=st.one_of(st.none(), st.integers(0, 150)),
    window=st.one_of(st.none(), st.integers(1, 220)),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_many_queries_attend_like_scaled_dot_product_attention(
    shape: tuple[int, int, int],
    queries: int,
    past: int | None,
    window: int | None,
    spread: float,
    dtype: torch.dtype,
) -> None:
    heads, group, dim = shape
    kernel = attention_kernel(heads, group, dim, dtype)
    assert kernel is not None
    batch, length = (2, queries + 3) if past is None else (1, past + queries)
    generator = torch.Generator().manual_seed(queries)
    # Tokens before heads, as linear layers leave them.
    query = torch.randn(batch, queries, heads * group, dim, generator=generator).to(dtype).transpose(1, 2)
    keys, values = (
        (torch.randn(batch, heads, length, dim, generator=generator) * spread).to(dtype) for _ in range(2)
    )
    mask = None if past is None else window_mask(queries, past, window, torch.float32, torch.device("cpu"))
    expected = F.scaled_dot_product_attention(
        query.float(), keys.float(), values.float(), mask, scale=0.125, enable_gqa=True
    )
    found = kernel.attend(query, keys, values, 0.125, past, None if past is None else window)
    close(found.transpose(1, 2), expected, spread)


@pytest.mark.skipif(which("cc") is None, reason="needs a C compiler")
def test_gaps_in_the_last_dimension_are_refused() -> None:
    kernel = attention_kernel(2, 1, 8, torch.float32)
    assert kernel is not None
    whole = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="not contiguous"):
        kernel.attend(torch.zeros(1, 2, 3, 16)[..., ::2], whole, whole, 1.0)


@pytest.mark.usefixtures("matrix_unit")
@pytest.mark.skipif(which("cc") is None, reason="needs a C compiler")
@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 1, 1), (4, 2, 64, 32), (5, 3, 20, 33), (16, 4, 130, 70)]),
    tokens=st.integers(1, 70),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_experts_are_the_weighted_sum_of_gated_layers(
    shape: tuple[int, int, int, int], tokens: int, spread: float, dtype: torch.dtype
) -> None:
    count, choices, width, inner = shape
    generator = torch.Generator().manual_seed(tokens)
    gate_up, down = (
        (torch.randn(*sizes, generator=generator) * spread / sizes[1] ** 0.5).to(dtype)
        for sizes in ((count, width, 2 * inner), (count, inner, width))
    )
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    shares, chosen = torch.rand(tokens, count, generator=generator).topk(choices)
    expected = torch.zeros(tokens, width)
    exact, inward, outward = hidden.float(), gate_up.float(), down.float()
    for token in range(tokens):
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            gate, up = (exact[token] @ inward[expert]).chunk(2)
            expected[token] += share * ((F.silu(gate) * up) @ outward[expert])
    kernel = ExpertsKernel(gate_up, down)
    found = kernel(hidden, chosen, shares)
    close(found, expected, max(1e-3, float(expected.abs().max())))
    # Whatever stands beside it, a token's result is the same to the last bit.
    alone = kernel(hidden[-1:], chosen[-1:], shares[-1:])
    assert torch.equal(alone, found[-1:])
