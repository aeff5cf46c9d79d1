"""Parity is the law: in float32, greedy tokens equal `generate` row by row, whatever the batch, order and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.engine import Completion, Sampling
from actors.engine.engine import ContinuousEngine
from actors.engine.scheduler import Limits
from actors.families import FAMILIES
from tests.actors.engine.subjects import Row, subject

SLOTS = (1, 3, 16)
SMALL = Limits(sequences=16, prefill_tokens=2048, visual_tokens=400)


def greedy(tokens: int, **others: object) -> Sampling:
    return Sampling(max_new_tokens=tokens, **others)  # type: ignore[arg-type]


@cache
def pool(family: str) -> tuple[Row, ...]:
    """Rows of every mode a family has; few enough that the oracle is asked once for each."""
    rows = [
        Row(seed=0, sampling=greedy(20)),
        Row(seed=1, sizes=((96, 48),), sampling=greedy(1)),
        Row(seed=2, sizes=((20, 100),), text="what color is the circle ?", sampling=greedy(33)),
        Row(seed=3, sizes=((48, 48),), text="red", turns=2, sampling=greedy(9)),
        Row(seed=4, sizes=((13, 7),), turns=3, sampling=greedy(40)),
        Row(sizes=(), text="a red square", sampling=greedy(24)),
        Row(sizes=(), text="describe the image", turns=2, sampling=greedy(5)),
        Row(
            seed=0, sizes=((40, 60),), text="is it left of the square ?", sampling=greedy(12)
        ),  # row 0's image
    ]
    if family != "fuyu":
        rows += [
            Row(seed=5, sizes=((40, 60), (90, 50)), sampling=greedy(14)),
            Row(seed=6, sizes=((48, 48), (30, 30), (96, 20)), turns=2, sampling=greedy(28)),
        ]
    if family == "llava_onevision":
        rows += [
            Row(seed=7, sizes=(), videos=(1,), sampling=greedy(11)),
            Row(seed=8, sizes=(), videos=(5,), turns=2, sampling=greedy(26)),
            Row(seed=9, sizes=(), videos=(37,), text="what color is the circle ?", sampling=greedy(17)),
            Row(seed=10, sizes=((40, 60),), videos=(3,), sampling=greedy(19)),
            Row(seed=11, sizes=((48, 30), (30, 30)), videos=(2,), video_first=True, sampling=greedy(23)),
            Row(seed=12, sizes=(), videos=(4, 4), sampling=greedy(8)),
            Row(seed=8, sizes=(), videos=(5,), text="red", sampling=greedy(7)),  # the second one's video
        ]
    return tuple(rows)


@cache
def engine(family: str, slots: int) -> ContinuousEngine:
    one = subject(family)
    return ContinuousEngine(one.family, one.own_model(), replace(SMALL, sequences=slots))


def run(engine: ContinuousEngine, family: str, rows: Sequence[Row], threads: int = 1) -> list[Completion]:
    """Rows through one engine, dealt to several threads that submit at once; completions in the rows' order."""
    found: dict[object, Completion] = {}

    def submit(part: Sequence[int]) -> None:
        for done in engine.generate(subject(family).request(rows[index], index) for index in part):
            assert done.key not in found
            found[done.key] = done

    parts = [range(start, len(rows), threads) for start in range(threads)]
    workers = [Thread(target=submit, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [found[index] for index in range(len(rows))]


def assert_equal(family: str, rows: Sequence[Row], found: Sequence[Completion]) -> None:
    for row, completion in zip(rows, found, strict=True):
        expected = subject(family).expected(row)
        assert (completion.error, completion.token_ids) == (None, expected.token_ids), row
        assert (completion.text, completion.finish_reason) == (expected.text, expected.finish_reason), row


@pytest.mark.parametrize("family", FAMILIES)
@settings(derandomize=True, max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_greedy_tokens_equal_generate(family: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.sampled_from(pool(family)), min_size=1, max_size=12))
    slots, threads = data.draw(st.sampled_from(SLOTS)), data.draw(st.integers(1, 3))
    assert_equal(family, rows, run(engine(family, slots), family, rows, threads))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slots", SLOTS)
def test_every_mode_in_one_batch(family: str, slots: int) -> None:
    rows = pool(family)
    assert_equal(family, rows, run(engine(family, slots), family, rows))
    assert_equal(family, rows[::-1], run(engine(family, slots), family, rows[::-1], threads=2))
    assert engine(family, slots).cache.used == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_longer_than_a_step_are_computed_in_chunks(family: str) -> None:
    one = subject(family)
    chunked = ContinuousEngine(
        one.family, one.own_model(), Limits(sequences=4, prefill_tokens=11, visual_tokens=64)
    )
    assert_equal(family, pool(family), run(chunked, family, pool(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_differ(family: str) -> None:
    """The oracle is worth something: random texts are long, varied, and depend on the image."""
    texts = [subject(family).expected(row).token_ids for row in pool(family)]
    assert len(set(texts)) == len(texts)
    assert sum(len(set(text)) for text in texts) > 5 * len(texts)
    assert sum(map(len, texts)) > 10 * len(texts)
