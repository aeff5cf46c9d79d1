"""bfloat16 and float16 on a CPU: other roundings than in `generate`, so tokens may differ, but rarely at once."""

from __future__ import annotations

import copy

import pytest
import torch

from actors.engine import Sampling
from actors.engine.engine import ContinuousEngine
from actors.engine.reference import ReferenceEngine
from actors.families import FAMILIES
from tests.actors.engine.subjects import Row, subject


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_generates_the_same_but_for_rounding(family: str, dtype: torch.dtype) -> None:
    one = subject(family)
    model = one.own_model().to(dtype)
    rows = [
        Row(seed=seed, sizes=((40 + seed, 60),), sampling=Sampling(max_new_tokens=3)) for seed in range(6)
    ]
    requests = [one.request(row, index) for index, row in enumerate(rows)]
    expected = {done.key: done for done in ReferenceEngine(one.family, model).generate(requests)}
    found = {done.key: done for done in ContinuousEngine(one.family, copy.deepcopy(model)).generate(requests)}
    assert [done.error for done in found.values() if done.error] == []
    same = [key for key in expected if found[key].token_ids == expected[key].token_ids]
    assert len(same) >= len(rows) // 2
