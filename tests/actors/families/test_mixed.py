"""Rows of every kind side by side, for all families: what one row gives does not depend on its neighbours."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from actors.families import FAMILIES, Family, ImageLayout, Message, PromptError, text_message, user_message
from tests.actors.families.conftest import Subject
from tests.actors.families.oracle import lay_out, noise


@dataclass(frozen=True)
class Row:
    messages: list[Message]
    images: list[Tensor]


@dataclass(frozen=True)
class Prepared:
    token_ids: list[int]
    pixels: Tensor
    layouts: tuple[ImageLayout, ...]


SINGLE = Row([user_message("What is it?", images=1)], [noise(300, 500)])
TEXT_ONLY = Row([user_message("What is a cat?")], [])
MULTI_TURN = Row(
    [
        text_message("system", "Be brief."),
        user_message("What is it?", images=1),
        text_message("assistant", "A cat."),
        user_message("And its colour?"),
    ],
    [noise(60, 20)],
)
SEVERAL = Row([user_message("Compare.", images=3)], [noise(20, 30), noise(400, 100), noise(7, 7)])
LATER = Row(
    [
        user_message("One.", images=1),
        text_message("assistant", "A dog."),
        user_message("Two more.", images=2),
    ],
    [noise(90, 90), noise(33, 66), noise(120, 40)],
)


@pytest.fixture(params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.getfixturevalue(request.param)


def rows(family: Family) -> list[Row]:
    of_any_family = [SINGLE, TEXT_ONLY, MULTI_TURN]
    return of_any_family if family.name == "fuyu" else [*of_any_family, SEVERAL, LATER]


def prepare(family: Family, row: Row) -> Prepared:
    layouts, pixels = lay_out(family, row.images)
    return Prepared(family.prompt(row.messages, layouts).tolist(), pixels, layouts)


def test_rows_are_independent(subject: Subject) -> None:
    family = subject.family
    first = [prepare(family, row) for row in rows(family)]
    again = [prepare(family, row) for row in reversed(rows(family))][::-1]
    for one, other in zip(first, again, strict=True):
        assert one.token_ids == other.token_ids
        assert one.layouts == other.layouts
        assert torch.equal(one.pixels, other.pixels)


def test_each_row_has_a_place_for_each_feature(subject: Subject) -> None:
    """Encoded alone or with all others, an image has as many features as its row has placeholders."""
    family, model = subject.family, subject.model
    prepared = [prepare(family, row) for row in rows(family)]
    with torch.inference_mode():
        alone = [
            family.embed_images(model, row.pixels, row.layouts) if row.layouts else [] for row in prepared
        ]
        everything = torch.cat([row.pixels for row in prepared])
        layouts = [layout for row in prepared for layout in row.layouts]
        together = family.embed_images(model, everything, layouts)
    for row, features in zip(prepared, alone, strict=True):
        counts = [len(feature) for feature in features]
        assert counts == [layout.tokens for layout in row.layouts]
        assert row.token_ids.count(family.image_token_id) == sum(counts)
    flat = [feature for features in alone for feature in features]
    for one, other in zip(flat, together, strict=True):
        torch.testing.assert_close(one, other)


def test_stock_generate_takes_each_row(subject: Subject) -> None:
    family, model = subject.family, subject.model
    for row in (prepare(family, row) for row in rows(family)):
        ids = torch.tensor([row.token_ids])
        inputs = family.model_inputs(row.pixels, row.layouts) if row.layouts else {}
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, **inputs
        )
        assert output.shape[1] > ids.shape[1]
        assert output[0, : ids.shape[1]].tolist() == row.token_ids


def test_fuyu_refuses_several_images_and_goes_on(fuyu: Subject) -> None:
    with pytest.raises(PromptError, match="one image a row"):
        prepare(fuyu.family, SEVERAL)
    assert prepare(fuyu.family, SINGLE).layouts[0].tokens > 0
