"""When memory runs out, rows fail or the device dies: each has its one consequence."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any

import pytest
import torch

from actors.engine import DeviceLost, Request, Sampling
from actors.engine.engine import ContinuousEngine
from actors.engine.scheduler import Chunk, Limits
from tests.actors.engine.subjects import Row, subject
from tests.actors.engine.test_parity import assert_equal, pool, run

FAMILY = "llava_onevision"


def fresh(limits: Limits | None = None, kv_tokens: int | None = None) -> ContinuousEngine:
    one = subject(FAMILY)
    return ContinuousEngine(one.family, one.own_model(), limits, kv_tokens)


def fail_when(engine: ContinuousEngine, name: str, when: Callable[[Any], bool], error: Exception) -> None:
    """Lets a call of the runner fail where `when` holds for its argument."""
    original = getattr(engine.runner, name)

    def call(argument: Any) -> Any:
        if when(argument):
            raise error
        return original(argument)

    setattr(engine.runner, name, call)


def spy(engine: ContinuousEngine, name: str, note: Callable[[Any], None]) -> None:
    """Notes what a call of the runner is given."""
    original = getattr(engine.runner, name)

    def call(argument: Any) -> Any:
        note(argument)
        return original(argument)

    setattr(engine.runner, name, call)


def test_a_small_cache_only_makes_rows_wait() -> None:
    rows = [*pool(FAMILY), *pool(FAMILY)[::-1]]
    engine = fresh(kv_tokens=200)
    assert_equal(FAMILY, rows, run(engine, FAMILY, rows))
    assert engine.cache.used == 0


def test_a_row_that_does_not_fit_alone_is_an_oom_row() -> None:
    engine = fresh(kv_tokens=120)
    rows = [Row(), Row(sampling=Sampling(max_new_tokens=500)), Row(seed=1)]
    found = run(engine, FAMILY, rows)
    assert found[1].error is not None and found[1].error.kind == "oom"
    assert_equal(FAMILY, [rows[0], rows[2]], [found[0], found[2]])


def test_out_of_memory_shrinks_the_step_and_changes_no_text(caplog: pytest.LogCaptureFixture) -> None:
    engine = fresh(Limits(sequences=16, prefill_tokens=600, visual_tokens=4000))

    def large(chunks: Sequence[Chunk]) -> bool:
        return sum(chunk.length for chunk in chunks) > 200 or len(chunks) > 3

    fail_when(engine, "step", large, torch.OutOfMemoryError("injected"))
    rows = [*pool(FAMILY), *pool(FAMILY)]
    with caplog.at_level(logging.WARNING, "actors.engine.engine"):
        assert_equal(FAMILY, rows, run(engine, FAMILY, rows))
    assert engine.scheduler.limits.sequences <= 3
    assert "out of memory in a step" in caplog.text


def test_out_of_memory_while_encoding_shrinks_the_micro_batch(caplog: pytest.LogCaptureFixture) -> None:
    engine = fresh()
    engine.runner.tiles = 64
    fail_when(engine, "_encode", lambda images: len(images) > 1, torch.OutOfMemoryError("injected"))
    with caplog.at_level(logging.WARNING, "actors.engine.engine"):
        assert_equal(FAMILY, pool(FAMILY), run(engine, FAMILY, pool(FAMILY)))
    assert engine.runner.tiles < 64
    assert "while encoding images" in caplog.text


def test_what_was_given_up_for_memory_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine.engine._CLEAN_STEPS", 8)
    limits = Limits(sequences=16, prefill_tokens=600, visual_tokens=4000)
    engine = fresh(limits)
    left = [None] * 3  # a neighbour takes the device's memory for a while

    def full(chunks: Sequence[Chunk]) -> bool:
        return len(chunks) > 2 and bool(left) and left.pop() is None

    fail_when(engine, "step", full, torch.OutOfMemoryError("injected"))
    rows = [*pool(FAMILY), *pool(FAMILY)]
    assert_equal(FAMILY, rows, run(engine, FAMILY, rows))
    shrunk = engine.scheduler.limits
    for _ in range(4):
        assert_equal(FAMILY, rows, run(engine, FAMILY, rows))
    assert shrunk != limits and engine.scheduler.limits == limits


def test_an_image_too_large_alone_is_an_oom_row() -> None:
    engine = fresh()
    tiles = engine.runner.tiles
    fail_when(
        engine,
        "_encode",
        lambda images: any(image.layout.size == (96, 48) for image in images),
        torch.OutOfMemoryError("injected"),
    )
    rows = [Row(), Row(sizes=((96, 48),)), Row(seed=1)]
    found = run(engine, FAMILY, rows)
    assert found[1].error is not None and found[1].error.kind == "oom"
    assert_equal(FAMILY, [rows[0], rows[2]], [found[0], found[2]])
    assert engine.runner.tiles >= tiles // 4  # by the groups that it stood in, not by its own tries


@pytest.mark.parametrize("call", ["encode", "step"])
def test_one_odd_row_fails_alone(call: str) -> None:
    engine = fresh()

    def odd(parts: Sequence[Any]) -> bool:
        return any(getattr(part, "sequence", part).request.sampling.seed == 13 for part in parts)

    fail_when(engine, call, odd, ValueError("injected"))
    rows = [*pool(FAMILY), Row(seed=99, sampling=Sampling(seed=13)), *pool(FAMILY)]
    found = run(engine, FAMILY, rows)
    failed = found.pop(len(pool(FAMILY)))
    assert failed.error is not None
    assert (failed.error.kind, failed.error.message) == ("generate", "ValueError: injected")
    assert_equal(FAMILY, [*pool(FAMILY), *pool(FAMILY)], found)
    assert engine.cache.used == 0


def test_placeholders_that_do_not_match_the_images_fail_alone() -> None:
    one, engine = subject(FAMILY), fresh()
    good = one.request(Row(), "good")
    bad = Request("bad", good.token_ids[:-30], good.pixels, good.layouts, good.sampling)
    empty = Request("empty", good.token_ids[:0], good.pixels[:0], (), good.sampling)
    found = {done.key: done for done in engine.generate([bad, good, empty])}
    assert found["good"].token_ids == one.expected(Row()).token_ids
    for key in ("bad", "empty"):
        error = found[key].error
        assert error is not None and error.kind == "prompt"


def test_a_lost_device_reaches_every_caller() -> None:
    engine = fresh()
    fail_when(
        engine, "step", lambda chunks: len(chunks) > 3, torch.AcceleratorError("injected: illegal address")
    )
    caught: list[Exception] = []

    def call() -> None:
        try:
            list(engine.generate(subject(FAMILY).request(row) for row in pool(FAMILY)))
        except DeviceLost as error:
            caught.append(error)

    callers = [Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert len(caught) == 3
    with pytest.raises(DeviceLost, match="illegal address"):
        next(engine.generate([subject(FAMILY).request(Row())]))


def test_a_caller_that_stops_listening_frees_its_rows() -> None:
    engine = fresh(Limits(sequences=4, prefill_tokens=2048, visual_tokens=4000))
    completions = engine.generate(subject(FAMILY).request(Row(seed=seed)) for seed in range(20))
    next(completions)
    completions.close()  # type: ignore[attr-defined]
    assert_equal(FAMILY, pool(FAMILY), run(engine, FAMILY, pool(FAMILY)))
    assert engine.cache.used == 0


def test_soak_keeps_memory_and_cache_flat() -> None:
    """Thousands of rows from several callers: each comes back once, the cache ends empty, objects do not pile up."""
    one, engine = subject(FAMILY), fresh(Limits(sequences=64, prefill_tokens=512, visual_tokens=4000), 4000)
    texts = [one.request(Row(sizes=(), text=text)) for text in ("red", "a blue circle", "describe the image")]
    counts: list[int] = []

    def requests(number: int) -> Any:
        for index in range(number):
            base = texts[index % len(texts)]
            yield Request(index, base.token_ids, base.pixels, (), Sampling(max_new_tokens=1 + index % 4))

    def call(number: int) -> None:
        keys = [done.key for done in engine.generate(requests(number)) if done.error is None]
        assert sorted(keys) == list(range(number))  # type: ignore[type-var]
        counts.append(len(keys))

    def round(number: int) -> int:
        callers = [Thread(target=call, args=(number,)) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(120)
        gc.collect()
        return len(gc.get_objects())

    round(100)
    before = round(100)
    after = round(1400)
    assert sum(counts) == 2 * (100 + 100 + 1400)
    assert engine.cache.used == 0 and len(engine.scheduler) == 0
    assert after - before < 500, "objects pile up"


def test_equal_images_share_one_encoding_and_prefill() -> None:
    one, engine = subject(FAMILY), fresh()
    encoded: list[int] = []
    computed: list[int] = []
    spy(engine, "encode", lambda rows: encoded.append(len(rows)))
    spy(engine, "step", lambda chunks: computed.extend(chunk.length for chunk in chunks if chunk.length > 1))
    rows = [
        *(Row(sampling=Sampling(max_new_tokens=8, temperature=1, seed=seed)) for seed in range(5)),
        Row(text="what color is it ?"),
    ]
    found = run(engine, FAMILY, rows)
    assert sum(encoded) == 1
    whole = len(one.request(rows[0]).token_ids)
    assert sum(computed) < whole + 5 * 12
    assert len({done.token_ids for done in found}) == len(rows)
    again = [run(fresh(), FAMILY, [row])[0] for row in rows]
    assert [done.token_ids for done in found] == [done.token_ids for done in again]
    assert_equal(FAMILY, rows[-1:], found[-1:])


def test_pixels_decide_what_is_shared() -> None:
    rows = [Row(seed=seed, sizes=((48, 48),)) for seed in range(4)]
    found = run(fresh(), FAMILY, rows)
    assert_equal(FAMILY, rows, found)
    assert len({done.token_ids for done in found}) == len(rows)
