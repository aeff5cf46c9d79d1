"""The CUDA leaf as far as a CPU shows it: its page arithmetic, and the metadata it hands to the flash kernel and the
graphs. The kernel is replaced by its documentation, a graph by calling again. Tests marked `cuda` run the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine import Sampling
from actors.engine.attention import window_mask
from actors.engine.engine import ContinuousEngine
from actors.engine.graphs import DecodeGraphs
from actors.engine.kv_cache import KVShape
from actors.engine.paged import PAGE, PagedCache
from actors.engine.scheduler import Limits
from tests.actors.engine.subjects import FAMILIES, Row, subject
from tests.actors.engine.test_parity import assert_equal, pool, run

LIMITS = Limits(sequences=6, prefill_tokens=300, visual_tokens=4000)


def paged_engine(family: str, monkeypatch: pytest.MonkeyPatch, pages: int = 24) -> ContinuousEngine:
    """An engine over the paged cache, on the CPU."""
    one = subject(family)

    def cache(shape: KVShape, capacity: int, kernel: object) -> PagedCache:
        return PagedCache(shape, capacity, torch.device("cpu"))

    monkeypatch.setattr("actors.engine.device.CpuCache", cache)
    return ContinuousEngine(one.family, one.own_model(), LIMITS, kv_tokens=pages * PAGE)


def documented_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """What torch.nn.attention.varlen documents, one sequence at a time."""
    assert cu_seq_k is None and window_size[1] == 0
    assert all(each.dtype == torch.int32 for each in (cu_seq_q, seqused_k, block_table))
    assert max_q >= int(cu_seq_q.diff().max()) and max_k >= int(seqused_k.max())
    assert key.shape[1] % 256 == 0 and block_table.shape[1] * key.shape[1] >= int(seqused_k.max())
    outputs = []
    for row, used in enumerate(seqused_k.tolist()):
        begin, end = cu_seq_q[row : row + 2].tolist()
        keys, values = (pool[block_table[row].long()].flatten(0, 1)[:used] for pool in (key, value))
        window = None if window_size[0] == -1 else window_size[0] + 1
        attended = F.scaled_dot_product_attention(
            query[begin:end].transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=window_mask(end - begin, used - end + begin, window, query.dtype, query.device),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)


def call_again(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands for a captured graph: fixed inputs, fixed output."""
    logits = run().clone()

    def replay() -> None:
        logits.copy_(run())

    return replay, logits


def use_flash(engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the engine take its CUDA path over the documented kernel; the sizes of its graphs are noted."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented_varlen_attn)
    cache: Any = engine.cache
    cache.flash = True
    runner: Any = engine.runner
    used: list[int] = []

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        replay, logits = call_again(run)
        used.append(len(logits))
        return replay, logits

    runner._graphs = DecodeGraphs(cache, runner._decode, LIMITS.sequences, 2 * PAGE, capture)
    return used


@pytest.mark.parametrize("family", FAMILIES)
def test_pages_give_the_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = paged_engine(family, monkeypatch)
    assert_equal(family, pool(family), run(engine, family, pool(family)))
    assert engine.cache.used == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_and_graphs_give_the_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = paged_engine(family, monkeypatch)
    sizes = use_flash(engine, monkeypatch)
    rows = [*pool(family), *pool(family)[::-1]]
    assert_equal(family, rows, run(engine, family, rows))
    assert set(sizes) <= {1, 2, 4, 6} and len(sizes) == len(set(sizes)) > 1


@pytest.mark.parametrize("flash", [False, True])
def test_sequences_longer_than_a_page(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = paged_engine("aya_vision", monkeypatch)  # sliding windows
    if flash:
        use_flash(engine, monkeypatch)
    rows = [
        Row(
            seed=seed,
            sizes=((40, 60),) * images,
            text=" ".join(["red circle"] * words),
            sampling=Sampling(24),
        )
        for seed, (images, words) in enumerate([(3, 60), (1, 110), (6, 2), (0, 125)])
    ]
    lengths = [len(subject("aya_vision").request(row).token_ids) for row in rows]
    assert max(lengths) > PAGE - 24 and any(length < PAGE < length + 24 for length in lengths)
    assert_equal("aya_vision", rows, run(engine, "aya_vision", rows))


def test_followers_hold_the_leaders_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = paged_engine("llava_onevision", monkeypatch, pages=16)
    sizes = ((40, 60),) * 20
    rows = [Row(sizes=sizes, sampling=Sampling(8, temperature=1.0, seed=seed)) for seed in range(5)]
    prompt = len(subject("llava_onevision").request(rows[0]).token_ids)
    assert 5 * (prompt // PAGE + 1) > 3 * PAGE // PAGE
    cache: Any = engine.cache
    most = 0
    original = engine.runner.step

    def step(chunks: Any) -> Any:
        nonlocal most
        most = max(most, cache.used)
        return original(chunks)

    engine.runner.step = step  # type: ignore[method-assign]
    found = run(engine, "llava_onevision", rows)
    assert most == prompt // PAGE + 5
    engine.runner.step = original  # type: ignore[method-assign]
    assert [done.token_ids for done in found] == [
        run(engine, "llava_onevision", [row])[0].token_ids for row in rows
    ]
    assert cache.used == 0


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_tokens_on_cuda(family: str) -> None:
    one = subject(family)
    engine = ContinuousEngine(one.family, one.own_model().cuda(), LIMITS)
    assert_equal(family, pool(family), run(engine, family, pool(family)))


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_logprobs_on_cuda_are_near(family: str, dtype: torch.dtype) -> None:
    """Tokens may differ in 16 bits; the first token's log-probability may not by much."""
    one = subject(family)
    rows = [Row(seed=seed, sampling=Sampling(4, logprobs=True)) for seed in range(8)]
    engine = ContinuousEngine(one.family, one.own_model().to("cuda", dtype), LIMITS)
    exact = ContinuousEngine(one.family, one.own_model(), LIMITS)
    for near, right in zip(run(engine, family, rows), run(exact, family, rows), strict=True):
        assert near.error is None and near.logprobs is not None and right.logprobs is not None
        if near.token_ids[0] == right.token_ids[0]:
            assert near.logprobs[0] == pytest.approx(right.logprobs[0], abs=0.3)


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_equal_eager_steps_on_cuda(family: str) -> None:
    one = subject(family)
    rows = [Row(seed=seed, sampling=Sampling(16)) for seed in range(5)]
    graphed = ContinuousEngine(one.family, one.own_model().to("cuda", torch.bfloat16), LIMITS)
    eager = ContinuousEngine(one.family, one.own_model().to("cuda", torch.bfloat16), LIMITS)
    assert graphed.runner._graphs is not None
    eager.runner._graphs = None
    texts = [[done.token_ids for done in run(each, family, rows)] for each in (graphed, eager)]
    same = sum(a[:4] == b[:4] for a, b in zip(*texts, strict=True))
    assert same >= 3  # bf16: a batch padded to another size may round otherwise
