"""Texts end where the reference engine ends them: end-of-sequence ids, stop strings, length."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import Sampling
from actors.engine.stopping import Stopper
from actors.families import FAMILIES
from tests.actors.engine.subjects import Row, subject
from tests.actors.engine.test_parity import engine, run


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_strings_equal_the_reference(family: str) -> None:
    texts = [
        subject(family).expected(Row(seed=seed, sampling=Sampling(max_new_tokens=24))).text
        for seed in range(4)
    ]
    rows = []
    for seed, text in enumerate(texts):
        assert text is not None
        # A piece across word borders, one at the start, one that never comes.
        for stop in ((text[len(text) // 2 :][:6],), (text[:3], "nowhere"), ("nowhere", "never")):
            rows.append(Row(seed=seed, sampling=Sampling(max_new_tokens=24, stop=stop)))
    found = run(engine(family, 16), family, rows)
    for row, completion in zip(rows, found, strict=True):
        expected = subject(family).expected(row)
        assert (completion.token_ids, completion.text, completion.finish_reason) == (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        ), row
    assert {completion.finish_reason for completion in found} == {"stop", "length"}


@pytest.mark.parametrize("family", FAMILIES)
@settings(derandomize=True, max_examples=40, deadline=None)
@given(data=st.data())
def test_tail_decides_as_the_whole_text_would(family: str, data: st.DataObject) -> None:
    one = subject(family).family
    vocabulary = [id for id in range(len(one.tokenizer)) if id not in one.eos_token_ids]
    ids = data.draw(st.lists(st.sampled_from(vocabulary), min_size=1, max_size=60))
    text = one.decode(ids)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = (text[start : start + data.draw(st.integers(1, 12))] or "x",)
    stopper = Stopper(one)
    sampling = Sampling(max_new_tokens=1000, stop=stop)
    for count in range(1, len(ids) + 1):
        whole = any(string in one.decode(ids[:count]) for string in stop)
        assert stopper.finished(ids[:count], sampling) == whole
        if whole:
            break


def test_end_of_sequence_and_length() -> None:
    family = subject("llava_onevision").family
    stopper, eos = Stopper(family), next(iter(family.eos_token_ids))
    assert stopper.finished([eos], Sampling(max_new_tokens=9))
    assert stopper.finished([7, 7], Sampling(max_new_tokens=2))
    assert not stopper.finished([7, 7], Sampling(max_new_tokens=3))
