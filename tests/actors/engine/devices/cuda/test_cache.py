"""The CUDA leaf as far as a CPU shows it: its page arithmetic, and the metadata it hands to the flash kernel and the
graphs. The kernel is replaced by what its sources demand, a graph by calling again. Tests marked `cuda` run the real
ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine import DeviceLost, Sampling
from actors.engine.devices.base import window_mask
from actors.engine.devices.cuda.cache import PAGE, Attention, PagedCache, attention_paths
from actors.engine.devices.kv_cache import KVShape
from actors.engine.devices.proof import choose
from actors.engine.engine import ContinuousEngine
from actors.engine.failures import device_is_lost
from actors.engine.scheduler import Limits
from actors.families import FAMILIES
from tests.actors.engine.subjects import Row, subject
from tests.actors.engine.test_parity import assert_equal, pool, run

LIMITS = Limits(sequences=6, prefill_tokens=300, visual_tokens=4000)


Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def paged_engine(
    family: str, monkeypatch: pytest.MonkeyPatch, pages: int = 24, attention: Attention = "gathered"
) -> ContinuousEngine:
    """An engine over the paged cache, on the CPU."""
    one = subject(family)

    def cache(shape: KVShape, capacity: int, kernel: object) -> PagedCache:
        cache = PagedCache(shape, capacity, torch.device("cpu"))
        cache.attention = attention
        return cache

    monkeypatch.setattr("actors.engine.devices.cpu.prepare.CpuCache", cache)
    return ContinuousEngine(one.family, one.own_model(), LIMITS, kv_tokens=pages * PAGE)


def flash_engine(
    family: str, monkeypatch: pytest.MonkeyPatch, capture: Capture | None = None
) -> ContinuousEngine:
    """An engine that takes its CUDA path, over `varlen_attn` and `capture` as below."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr("actors.engine.devices.cuda.graphs.CudaCapture", lambda: capture or call_again)
    return paged_engine(family, monkeypatch, attention="flash")


def varlen_attn(
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
    num_splits: int | None = None,
) -> Tensor:
    """What torch.nn.attention.varlen documents, one sequence at a time, and what FlashAttention 2 behind it demands
    (torch 2.13, transformers/cuda/attention.cu and flash_attn/flash_api.cpp)."""
    if cu_seq_k is None:
        raise RuntimeError(
            "cumulative_sequence_length_q and cumulative_sequence_length_k must be both set or both not set"
        )
    sequences = len(cu_seq_q) - 1
    for each in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert each.dtype == torch.int32 and each.is_contiguous()
    assert cu_seq_k.shape == (sequences + 1,) and seqused_k.shape == (sequences,)
    assert block_table.shape[0] == sequences
    assert cu_seq_k[0] == 0 and torch.equal(cu_seq_k.diff(), seqused_k)
    assert max_q >= int(cu_seq_q.diff().max()) and max_k >= int(seqused_k.max())
    assert key.shape[1] % 256 == 0 and block_table.shape[1] * key.shape[1] >= int(seqused_k.max())
    output = torch.full_like(query, float("nan"))
    for row, used in enumerate(seqused_k.tolist()):
        if row and num_splits != 1:
            break  # pytorch #194167: where the kernel splits the keys, these rows are never written
        begin, end = cu_seq_q[row : row + 2].tolist()
        keys, values = (pool[block_table[row].long()].flatten(0, 1)[:used] for pool in (key, value))
        mask = None
        if window_size != (-1, -1):
            assert window_size[1] == 0
            window = None if window_size[0] == -1 else window_size[0] + 1
            mask = window_mask(end - begin, used - end + begin, window, query.dtype, query.device)
        output[begin:end] = F.scaled_dot_product_attention(
            query[begin:end].transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=mask,
            scale=scale,
            enable_gqa=enable_gqa,
        ).transpose(0, 1)
    return output


def call_again(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands for a captured graph: fixed inputs, fixed output."""
    logits = run().clone()

    def replay() -> None:
        logits.copy_(run())

    return replay, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_pages_give_the_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = paged_engine(family, monkeypatch)
    assert_equal(family, pool(family), run(engine, family, pool(family)))
    assert engine.cache.used == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_and_graphs_give_the_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        replay, logits = call_again(run)
        sizes.append(len(logits))
        return replay, logits

    engine = flash_engine(family, monkeypatch, capture)
    assert sizes == [6, 4, 2, 1]  # all of them before the first row
    rows = [*pool(family), *pool(family)[::-1]]
    assert_equal(family, rows, run(engine, family, rows))
    assert len(sizes) == 4


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("llava_onevision", {(True, (-1, -1)), (False, (-1, 0))}),
        # 24 tokens in three of four layers; the last one attends for lone queries only
        ("aya_vision", {(True, (-1, -1)), (True, (23, 0)), (False, (23, 0))}),
    ],
)
def test_lone_queries_are_asked_for_in_the_way_that_packs_grouped_heads(
    family: str, windows: set[tuple[bool, tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = set()

    def spy(*arguments: Any, **keywords: Any) -> Tensor:
        max_q, window = arguments[5], keywords["window_size"]
        asked.add((max_q == 1, window))
        return varlen_attn(*arguments, **keywords)

    engine = flash_engine(family, monkeypatch)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", spy)
    assert_equal(family, pool(family), run(engine, family, pool(family)))
    assert asked == windows


def test_a_capture_that_fails_leaves_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[object] = []

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if captured:
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nhint")
        captured.append(run)
        return call_again(run)

    engine = flash_engine("llava_onevision", monkeypatch, capture)
    (line,) = engine.record.why
    assert engine.record.graphs == "none"
    assert line.startswith("graphs: up to 6 sequences: ") and "not permitted when stream is capturing" in line
    assert "\n" not in line
    rows = pool("llava_onevision")
    assert_equal("llava_onevision", rows, run(engine, "llava_onevision", rows))


@pytest.mark.parametrize("wrong", [lambda logits: logits.roll(1, 0), lambda logits: logits * float("nan")])
def test_graphs_that_lie_are_not_replayed(
    wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        logits = run().clone()

        def replay() -> None:
            logits.copy_(wrong(run()) if len(logits) == 4 else run())

        return replay, logits

    engine = flash_engine("llava_onevision", monkeypatch, capture)
    assert engine.record.graphs == "none" and "at 4 sequences" in engine.record.why[0]
    rows = pool("llava_onevision")
    assert_equal("llava_onevision", rows, run(engine, "llava_onevision", rows))


def test_a_device_lost_in_a_capture_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("actors.engine.devices.proof.device_is_lost", lambda device: True)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        flash_engine("llava_onevision", monkeypatch, capture)


@pytest.mark.parametrize(
    ("errors", "lost"),
    [
        ([], False),
        (
            [torch.AcceleratorError("CUDA error: capture invalidated")],
            False,
        ),  # the last error, told once more
        ([torch.OutOfMemoryError("full")], False),
        ([torch.AcceleratorError("CUDA error: illegal address")] * 2, True),
    ],
)
def test_a_device_that_computes_is_not_lost(
    errors: list[Exception], lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, zeros = list(errors), torch.zeros

    def failing(*arguments: Any, **keywords: Any) -> Tensor:
        if left:
            raise left.pop()
        return zeros(*arguments, **keywords)

    monkeypatch.setattr("torch.zeros", failing)
    assert device_is_lost(torch.device("cpu")) is lost


def unwritten(*arguments: Any, **keywords: Any) -> Tensor:
    return varlen_attn(*arguments, **{**keywords, "num_splits": None})


def unwindowed(*arguments: Any, **keywords: Any) -> Tensor:
    return varlen_attn(*arguments, **{**keywords, "window_size": (-1, 0)})


def torch_2_12(*arguments: Any, num_splits: int, **keywords: Any) -> Tensor:
    raise RuntimeError("num_splits requires FA3")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (varlen_attn, None),
        (unwritten, "differed by nan"),
        (unwindowed, "window 40"),
        (torch_2_12, "requires FA3"),
    ],
)
def test_the_flash_kernel_is_not_used_before_it_agrees(
    kernel: Callable[..., Tensor], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    shape = KVShape(layers=7, heads=2, head_dim=16, dtype=torch.bfloat16)
    device = torch.device("cpu")
    paths = [path for path in attention_paths(shape, 6, {40}, 6, device) if path.name != "triton"]
    choice = choose("attention", paths, device)
    assert choice.path == ("flash" if reason is None else "gathered")
    assert str(reason or "") in choice.why


@pytest.mark.parametrize("flash", [False, True])
def test_sequences_longer_than_a_page(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build = flash_engine if flash else paged_engine
    engine = build("aya_vision", monkeypatch)  # sliding windows
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
def test_16_bits_on_cuda_are_as_near_as_the_stock_model_is(family: str, dtype: torch.dtype) -> None:
    """By the first token's log-probability, against float32. (Tokens may differ in 16 bits.)"""
    one = subject(family)
    rows = [Row(seed=seed, sampling=Sampling(1, logprobs=True)) for seed in range(12)]
    found = run(ContinuousEngine(one.family, one.own_model().to("cuda", dtype), LIMITS), family, rows)
    stock = one.own_model().to("cuda", dtype)
    errors = []
    for row, completion in zip(rows, found, strict=True):
        assert completion.error is None and completion.logprobs is not None
        (token,) = completion.token_ids
        exact, near = (first_logprobs(family, model, row)[token].item() for model in (one.model, stock))
        errors.append((abs(completion.logprobs[0] - exact), abs(near - exact)))
    ours, theirs = torch.tensor(errors).mean(0).tolist()
    assert ours <= 1.5 * theirs + 0.02


@torch.inference_mode()
def first_logprobs(family: str, model: PreTrainedModel, row: Row) -> Tensor:
    """[V], of the stock model."""
    one, request = subject(family), subject(family).request(row)
    inputs = one.family.model_inputs(torch.tensor(request.pixels, device=model.device), request.layouts)
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
    }
    ids = torch.tensor(request.token_ids[None], dtype=torch.long, device=model.device)
    logits: Tensor = model(input_ids=ids, **inputs).logits[0, -1]
    return logits.float().log_softmax(-1).cpu()


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_equal_eager_steps_on_cuda(family: str) -> None:
    one = subject(family)
    rows = [Row(seed=seed, sampling=Sampling(16)) for seed in range(5)]
    graphed = ContinuousEngine(one.family, one.own_model().to("cuda", torch.bfloat16), LIMITS)
    eager = ContinuousEngine(one.family, one.own_model().to("cuda", torch.bfloat16), LIMITS)
    assert graphed.runner._graphs is not None, graphed.record
    eager.runner._graphs = None
    texts = [[done.token_ids for done in run(each, family, rows)] for each in (graphed, eager)]
    same = sum(a[:4] == b[:4] for a, b in zip(*texts, strict=True))
    assert same >= 3  # bf16: a batch padded to another size may round otherwise
