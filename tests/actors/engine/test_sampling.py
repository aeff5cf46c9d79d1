"""Sampling: a row's text depends on its logits and its seed alone; its rules are transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from actors.engine import Request, Sampling
from actors.engine.checkpoint_rules import CheckpointRules
from actors.engine.sampling import Sampler, draw, uniform_at
from actors.engine.scheduler import SequenceState
from actors.families import FAMILIES
from tests.actors.engine.subjects import Row, subject
from tests.actors.engine.test_parity import engine, run


def sampled_rows(count: int = 10) -> list[Row]:
    rules = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
        {},
    ]
    return [
        Row(seed=index % 3, sampling=Sampling(max_new_tokens=14, seed=index, **rules[index % len(rules)]))  # type: ignore[arg-type]
        for index in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampled_text_does_not_depend_on_its_neighbours(family: str) -> None:
    rows = sampled_rows()
    alone = [run(engine(family, 1), family, [row])[0] for row in rows]
    together = run(engine(family, 16), family, rows)
    shuffled = run(engine(family, 3), family, rows[::-1], threads=2)[::-1]
    texts = [done.token_ids for done in alone]
    assert [done.token_ids for done in together] == texts
    assert [done.token_ids for done in shuffled] == texts
    assert len(set(texts)) == len(texts)  # seeds matter


def processors(row: Sampling) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if row.temperature != 1:
        found.append(TemperatureLogitsWarper(row.temperature))
    if row.top_k:
        found.append(TopKLogitsWarper(row.top_k))
    if row.top_p < 1:
        found.append(TopPLogitsWarper(row.top_p))
    return found


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 40, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
    vocabulary=st.sampled_from([7, 50, 3000]),
)
def test_draws_follow_transformers_distribution(
    temperature: float, top_k: int, top_p: float, scale: float, vocabulary: int
) -> None:
    """The share of the unit interval that yields each token is its probability after transformers' warpers."""
    row = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    scores = scale * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))
    expected = processors(row)(torch.zeros(1, 1, dtype=torch.long), scores.clone()).softmax(-1)[0]
    draws = 2000
    grid = [(index + 0.5) / draws for index in range(draws)]
    drawn = draw(scores.expand(draws, -1), [row] * draws, grid)
    found = torch.bincount(drawn, minlength=vocabulary) / draws
    assert (found - expected).abs().max() <= 1.5 / draws + 1e-5


@settings(derandomize=True, max_examples=30, deadline=None)
@given(penalty=st.sampled_from([0.5, 1.1, 2.0]), ids=st.lists(st.integers(0, 49), min_size=1, max_size=20))
def test_repetition_penalty_is_transformers(penalty: float, ids: list[int]) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(len(ids)))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.clone())
    sequence = make_sequence(ids, Sampling(repetition_penalty=penalty), slot=1)
    neighbour = make_sequence([1, 2], Sampling(), slot=0)
    sampler = Sampler(2, CheckpointRules(), torch.device("cpu"))
    found, _ = sampler(torch.cat([logits, logits]), [sequence, neighbour]).result()
    assert found == [int(expected.argmax()), int(logits.argmax())]
    sequence.generated.append(found[0])
    ids.append(found[0])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.clone())
    assert sampler(logits, [sequence]).result() == ([int(expected.argmax())], None)


@pytest.mark.parametrize("family", FAMILIES)
def test_repetition_penalty_equals_generate(family: str) -> None:
    rows = [
        Row(seed=seed, sampling=Sampling(max_new_tokens=16, repetition_penalty=penalty))
        for seed, penalty in enumerate([1.2, 2.0, 0.8])
    ]
    found = run(engine(family, 16), family, [*rows, Row()])
    for row, completion in zip(rows, found, strict=False):
        assert completion.token_ids == subject(family).expected(row).token_ids


def test_numbers_are_uniform_and_differ_by_seed_and_index() -> None:
    numbers = np.array([[uniform_at(seed, index) for index in range(200)] for seed in range(200)])
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert len(np.unique(numbers)) == numbers.size
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert abs(counts - numbers.size / 20).max() < 5 * (numbers.size / 20) ** 0.5
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("family", ["llava_onevision", "aria"])
def test_logprobs_are_the_models(family: str) -> None:
    one = subject(family)
    row = Row(sampling=Sampling(max_new_tokens=6, temperature=0.9, seed=3, logprobs=True))
    completion = run(engine(family, 3), family, [Row(), row])[1]
    request = one.request(row)
    ids = torch.tensor([[*request.token_ids.tolist(), *completion.token_ids]])
    inputs = one.family.model_inputs(torch.tensor(request.pixels), request.layouts)
    with torch.inference_mode():
        logits = one.model(input_ids=ids, **inputs).logits[0].log_softmax(-1)
    first = len(request.token_ids) - 1
    expected = [float(logits[first + index, token]) for index, token in enumerate(completion.token_ids)]
    assert completion.logprobs == pytest.approx(expected, abs=1e-3)
    assert completion.logprob == pytest.approx(sum(expected), abs=5e-3)
    assert run(engine(family, 3), family, [Row()])[0].logprobs is None


def make_sequence(ids: list[int], sampling: Sampling, slot: int) -> SequenceState:
    request = Request(None, np.array(ids, np.int32), np.zeros((0, 3, 1, 1), np.uint8), (), sampling)
    return SequenceState(request, lambda _: None, np.zeros(0, np.int64), slot=slot)
