"""A checkpoint's own rules: applied as `generate` applies them, or refused; never ignored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from actors.engine import Completion, Request, Sampling
from actors.engine.engine import ContinuousEngine
from actors.engine.reference import ReferenceEngine
from actors.engine.scheduler import Limits
from actors.families import CheckpointError
from tests.actors.engine.subjects import Row, Subject, subject

ROWS = [
    Row(seed=seed, sizes=sizes, sampling=Sampling(max_new_tokens=11))
    for seed, sizes in enumerate([((40, 60),), (), ((48, 48), (30, 30)), ((20, 90),)])
]


def configured(fields: Mapping[str, Any], **eos: Any) -> tuple[Subject, ContinuousEngine, ReferenceEngine]:
    """The two engines over a checkpoint whose generation config has these fields."""
    one = subject("llava_onevision")
    model = one.own_model()
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    family = copy.copy(one.family)
    family.eos_token_ids = eos.get("eos", family.eos_token_ids)
    reference = ReferenceEngine(family, copy.deepcopy(model))
    return one, ContinuousEngine(family, model, Limits(3, 2048, 4000)), reference


def texts(engine: ContinuousEngine | ReferenceEngine, requests: list[Request]) -> list[tuple[int, ...]]:
    found: dict[Any, Completion] = {done.key: done for done in engine.generate(requests)}
    assert all(done.error is None for done in found.values()), found
    return [found[index].token_ids for index in range(len(requests))]


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
def test_forbidden_ids_are_as_in_generate() -> None:
    one = subject("llava_onevision")
    plain = [one.expected(row).token_ids for row in ROWS]
    first, second = plain[0][0], plain[1][1]
    # Two ids that these texts end at, so that a rule about the end has something to forbid.
    eos = frozenset({plain[0][3], plain[3][2]})
    prompt = len(one.request(ROWS[0]).token_ids)
    cases: list[dict[str, Any]] = [
        {},
        {"suppress_tokens": [first, second, 99_999]},
        {"begin_suppress_tokens": [first, plain[2][0]]},
        {"bad_words_ids": [[first], [second], [plain[0][3]]]},  # an id that ends a text is never a bad word
        {"min_new_tokens": 7},
        {"min_length": prompt + 6},
        {"min_length": prompt + 9, "min_new_tokens": 5, "suppress_tokens": [first]},
    ]
    requests = [replace(one.request(row), key=index) for index, row in enumerate(ROWS)]
    penalised = [
        replace(request, key=len(requests) + index, sampling=Sampling(11, repetition_penalty=1.4))
        for index, request in enumerate(requests[:1])
    ]
    seen = []
    for fields in cases:
        _, continuous, reference = configured(fields, eos=eos)
        expected = texts(reference, [*requests, *penalised])
        assert texts(continuous, [*requests, *penalised]) == expected, fields
        seen.append(expected)
    assert all(expected != seen[0] for expected in seen[1:])  # each rule had something to do


def test_sampled_texts_hold_no_forbidden_id() -> None:
    one = subject("llava_onevision")
    forbidden = {token for row in ROWS for token in one.expected(row).token_ids[:6]}
    _, continuous, _ = configured({"suppress_tokens": sorted(forbidden)})
    hot = Sampling(20, temperature=1.5, logprobs=True)
    for sampling in (hot, replace(hot, top_k=4), replace(hot, top_p=0.7)):
        request = replace(one.request(ROWS[0]), key=0, sampling=sampling)
        (text,) = texts(continuous, [request])
        assert text and not forbidden & set(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[7], [8, 9]]),
        ("sequence_bias", [[[7], -2.0]]),
        ("forced_bos_token_id", 5),
        ("forced_eos_token_id", 5),
        ("exponential_decay_length_penalty", (3, 1.2)),
        ("encoder_repetition_penalty", 1.2),
        ("encoder_no_repeat_ngram_size", 2),
        ("guidance_scale", 1.5),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"sets {name}=.*model\.engine: reference applies it"):
        configured({name: value})


def test_values_that_change_nothing_are_not_refused() -> None:
    configured(
        {"no_repeat_ngram_size": 0, "guidance_scale": 1, "encoder_repetition_penalty": 1.0, "min_p": 0.1}
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
        {"rope_type": "longrope", "rope_theta": 1000.0, "short_factor": [1.0], "long_factor": [2.0]},
        {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "dynamic"}},
    ],
)
def test_frequencies_of_the_longest_row_are_refused(rope: dict[str, Any]) -> None:
    one = subject("llava_onevision")
    model = one.own_model()
    model.config.get_text_config().rope_parameters = rope
    with pytest.raises(CheckpointError, match=r"rope_type='(dynamic|longrope)'.*model\.engine: reference"):
        ContinuousEngine(one.family, model)


def test_frequencies_that_are_fixed_are_not_refused() -> None:
    one = subject("llava_onevision")
    model = one.own_model()
    model.config.get_text_config().rope_parameters = {"full_attention": {"rope_type": "yarn"}}
    ContinuousEngine(one.family, model)


def test_a_rule_of_sampling_concerns_rows_that_sample() -> None:
    one, continuous, _ = configured({"min_p": 0.1, "typical_p": 0.9})
    greedy = one.request(ROWS[0])
    assert texts(continuous, [replace(greedy, key=0)]) == [one.expected(ROWS[0]).token_ids]
    (refused,) = continuous.generate([replace(greedy, sampling=Sampling(5, temperature=1.0))])
    assert refused.error is not None and refused.error.kind == "generate"
    assert "sets min_p, typical_p" in refused.error.message


def test_stop_strings_of_a_checkpoint_hold_beside_a_requests_own() -> None:
    text = subject("llava_onevision").expected(ROWS[0]).text or ""
    stop = text[len(text) // 2 :][:4]
    one, continuous, reference = configured({"stop_strings": ["never", stop]})
    for engine in (continuous, reference):
        engine.family.stop_strings = ("never", stop)
        requests = [
            replace(one.request(ROWS[0]), key=key, sampling=Sampling(max_new_tokens=11, stop=own))
            for key, own in enumerate([(), (text[:2],)])
        ]
        found = {done.key: done for done in engine.generate(requests)}
        assert [found[key].error for key in (0, 1)] == [None, None]
        assert [found[key].finish_reason for key in (0, 1)] == ["stop", "stop"]
        assert [found[key].text for key in (0, 1)] == [text[: text.index(stop)].strip(), ""]
