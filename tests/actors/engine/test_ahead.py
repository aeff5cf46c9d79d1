"""A step begins before the tokens of the one before it are known (as on CUDA): no text is another for it."""

from __future__ import annotations

import pytest

from actors.engine import Sampling
from actors.engine.engine import ContinuousEngine
from actors.engine.scheduler import Limits
from actors.families import FAMILIES
from tests.actors.engine.subjects import Row, subject
from tests.actors.engine.test_parity import assert_equal, engine, pool, run
from tests.actors.engine.test_sampling import sampled_rows


def ahead(family: str, limits: Limits | None = None, kv_tokens: int | None = None) -> ContinuousEngine:
    one = subject(family)
    engine = ContinuousEngine(one.family, one.own_model(), limits, kv_tokens)
    engine.runner.ahead = True
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(family: str) -> None:
    rows = [*pool(family), *pool(family)[::-1]]
    found = ahead(family, Limits(sequences=5, prefill_tokens=200, visual_tokens=4000), kv_tokens=900)
    assert_equal(family, rows, run(found, family, rows))
    assert found.cache.used == 0 and not len(found.scheduler)


def test_sampled_texts_are_the_same() -> None:
    rows = sampled_rows()
    texts = [
        [done.token_ids for done in run(each, "llava_onevision", rows)]
        for each in (engine("llava_onevision", 4), ahead("llava_onevision"))
    ]
    assert texts[0] == texts[1]


def test_a_row_computes_no_token_beyond_its_length() -> None:
    """Else it would be written behind what the row has reserved."""
    found = ahead("llava_onevision")
    ends: list[int] = []
    step = found.runner.step

    def noted(chunks):
        ends.extend(chunk.end - chunk.sequence.prompt_length for chunk in chunks)
        return step(chunks)

    found.runner.step = noted  # type: ignore[method-assign]
    rows = [Row(seed=seed, sampling=Sampling(max_new_tokens=1 + seed)) for seed in range(4)]
    assert_equal("llava_onevision", rows, run(found, "llava_onevision", rows))
    assert max(ends) <= max(row.sampling.max_new_tokens for row in rows) - 1


def test_what_an_ended_row_computes_on_is_dropped_before_its_slot_is_another_s() -> None:
    found = ahead("aya_vision", Limits(sequences=1, prefill_tokens=200, visual_tokens=4000))
    rows = [Row(seed=seed, sampling=Sampling(12, repetition_penalty=1.3)) for seed in range(5)]
    texts = [done.token_ids for done in run(found, "aya_vision", rows)]
    assert texts == [done.token_ids for done in run(engine("aya_vision", 16), "aya_vision", rows)]
