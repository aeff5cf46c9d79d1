"""The reference engine: stop strings, sampling and penalties as the job spec means them."""

from dataclasses import replace

import pytest
import torch

from actors.engine import Request, Sampling
from actors.engine.reference import ReferenceEngine
from actors.families import load_family, load_model, user_message
from actors.images.decode import decode
from tests.blocks import picture
from tests.checkpoints import untrained


@pytest.fixture(scope="module")
def engine():
    path = untrained("llava_onevision")
    return ReferenceEngine(load_family(path), load_model(path))


def request(engine, color="red", **sampling) -> Request:
    family = engine.family
    image = decode(picture(70, 50, color), 10_000)
    layouts = family.layout([(50, 70)])
    ids = family.prompt([user_message("Describe the image.", images=1)], layouts)
    return Request(color, ids, family.tile(image, layouts[0]).numpy(), layouts, Sampling(**sampling))


def only(engine, request):
    (completion,) = engine.generate([request])
    return completion


def test_completions_carry_their_requests_keys(engine):
    keys = [
        c.key
        for c in engine.generate([request(engine, color, max_new_tokens=2) for color in ("red", "blue")])
    ]
    assert keys == ["red", "blue"]


def test_a_stop_string_ends_the_caption_before_it(engine):
    free = only(engine, request(engine, max_new_tokens=12))
    words = free.text.split()
    word = next(word for word in words[1:] if word != words[0])
    stopped = only(engine, request(engine, max_new_tokens=12, stop=("no such words", word)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(word)].strip()
    assert len(stopped.token_ids) < len(free.token_ids)


def test_length_is_said_when_the_budget_ends_the_caption(engine):
    completion = only(engine, request(engine, max_new_tokens=3))
    assert completion.finish_reason == "length" and len(completion.token_ids) == 3


def test_sampling_follows_the_rows_seed_only(engine):
    hot = request(engine, max_new_tokens=8, temperature=5.0, seed=1)
    torch.manual_seed(123)
    first = only(engine, hot)
    torch.manual_seed(321)
    assert only(engine, hot) == first
    other = replace(hot, sampling=replace(hot.sampling, seed=2))
    assert only(engine, other).token_ids != first.token_ids


def test_top_k_one_is_greedy_at_any_temperature(engine):
    greedy = only(engine, request(engine, max_new_tokens=8))
    assert only(engine, request(engine, max_new_tokens=8, temperature=9.0, top_k=1)) == greedy


def test_repetition_penalty_reaches_the_model(engine):
    free = only(engine, request(engine, max_new_tokens=12))
    penalised = only(engine, request(engine, max_new_tokens=12, repetition_penalty=50.0))
    assert len(set(penalised.token_ids)) >= len(set(free.token_ids))
    assert penalised.token_ids != free.token_ids


def test_the_callers_random_state_is_left_alone(engine):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    only(engine, request(engine, max_new_tokens=2, temperature=1.0))
    assert torch.equal(torch.rand(1), expected)
