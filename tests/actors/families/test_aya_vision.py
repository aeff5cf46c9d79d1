"""Aya Vision against its stock processor and model, at 364 px and up to 12 tiles and a thumbnail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.families import PromptError, text_message, user_message
from tests.actors.families.conftest import Subject
from tests.actors.families.oracle import assert_equals_stock, lay_out, noise
from tests.actors.families.sizes import EXTREMES, LAW, sizes


@pytest.mark.parametrize("size", [*EXTREMES, (364, 364), (4000, 4000), (1, 4000)])
def test_one_image_equals_stock(aya_vision: Subject, size: tuple[int, int]) -> None:
    messages = [user_message("What is shown?", images=1)]
    assert_equals_stock(aya_vision.family, aya_vision.processor, messages, [noise(*size)])


@LAW
@given(size=sizes())
def test_any_size_equals_stock(aya_vision: Subject, size: tuple[int, int]) -> None:
    messages = [user_message("Describe the image.", images=1)]
    assert_equals_stock(aya_vision.family, aya_vision.processor, messages, [noise(*size)])


@settings(LAW, max_examples=400)
@given(size=sizes())
def test_any_grid_equals_stock(aya_vision: Subject, size: tuple[int, int]) -> None:
    (layout,) = aya_vision.family.layout([size])
    assert layout.tiles == aya_vision.processor.image_processor.get_number_of_image_patches(
        *size, {"crop_to_patches": True}
    )


@LAW
@given(row=st.lists(sizes(longest=900), min_size=2, max_size=4))
def test_several_images_equal_stock(aya_vision: Subject, row: list[tuple[int, int]]) -> None:
    messages = [user_message("Compare.", images=len(row))]
    assert_equals_stock(aya_vision.family, aya_vision.processor, messages, [noise(*size) for size in row])


def test_chats_equal_stock(aya_vision: Subject) -> None:
    text_only = [text_message("system", "Be brief."), user_message("Merhaba TILE_1 \n é 字 <|START_OF_IMG|>")]
    assert_equals_stock(aya_vision.family, aya_vision.processor, text_only, [])
    turns = [
        text_message("system", "TILE"),
        user_message("the first", images=1),
        text_message("assistant", "a cat"),
        {"role": "user", "content": [{"type": "text", "text": "these: TILE"}, *[{"type": "image"}] * 2]},
    ]
    images = [noise(40, 60), noise(500, 20), noise(7, 7)]
    assert_equals_stock(aya_vision.family, aya_vision.processor, turns, images)


@pytest.mark.parametrize("before", ["", " ", "x ", "x\n", "TILE_", "é"])
@pytest.mark.parametrize("after", ["", " ", "_1", "\n\nx", "字"])
def test_borders_equal_stock(aya_vision: Subject, before: str, after: str) -> None:
    content = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    messages = [{"role": "user", "content": content}]
    assert_equals_stock(aya_vision.family, aya_vision.processor, messages, [noise(100, 200)])


@pytest.mark.parametrize("size", [(1, 1), (364, 364), (80, 4000), (1080, 1920), (1000, 700)])
def test_tokens_are_features(aya_vision: Subject, size: tuple[int, int]) -> None:
    family, model = aya_vision.family, aya_vision.model
    layouts, pixels = lay_out(family, [noise(*size), noise(30, 20)])
    with torch.inference_mode():
        features = family.embed_images(model, pixels, layouts)
        stock = model.get_image_features(**family.model_inputs(pixels, layouts)).pooler_output
    assert [feature.shape for feature in features] == [(layout.tokens, 8) for layout in layouts]
    assert torch.equal(torch.cat(features), stock.flatten(0, 1))


def test_generate_takes_the_inputs(aya_vision: Subject) -> None:
    family, model = aya_vision.family, aya_vision.model
    images = [noise(50, 500), noise(10, 10)]
    layouts, pixels = lay_out(family, images)
    ids = torch.from_numpy(family.prompt([user_message("hi", images=2)], layouts)).long()[None]
    inputs = family.model_inputs(pixels, layouts)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **inputs)
    assert out.shape[1] > ids.shape[1]


def test_odd_features_name_the_image(aya_vision: Subject) -> None:
    layouts, pixels = lay_out(aya_vision.family, [noise(30, 30), noise(300, 500)])
    wrong = type(layouts[1])(layouts[1].size, layouts[1].grid, layouts[1].tiles, layouts[1].tokens - 1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"image 1 \(300 x 500\) has \d+ features"):
        aya_vision.family.embed_images(aya_vision.model, pixels, [layouts[0], wrong])


def test_prompt_errors(aya_vision: Subject) -> None:
    family = aya_vision.family
    one = family.layout([(10, 10)])
    with pytest.raises(PromptError, match="0 image slots for 1 images"):
        family.prompt([user_message("hi")], one)
    for string in ("<image>", "<|IMG_PATCH|>"):
        with pytest.raises(PromptError, match=r"placeholder") as error:
            family.prompt([user_message(f"a {string} tag", images=1)], one)
        assert repr(string) in str(error.value)
    halves = [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}, {"type": "image"}]
    with pytest.raises(PromptError, match="2 times for 1 images"):
        family.prompt([{"role": "user", "content": halves}], one)
    with pytest.raises(PromptError, match="unknown role poet"):
        family.prompt([text_message("poet", "hi")], ())


def test_markers_stand_before_their_tiles(aya_vision: Subject) -> None:
    family, tokenizer = aya_vision.family, aya_vision.family.tokenizer
    (layout,) = family.layout([(364, 728)])
    assert (layout.grid, layout.tiles, layout.tokens) == ((1, 2), 3, 3 * 169)
    ids = family.image_ids(layout)
    text = tokenizer.decode(ids[np.flatnonzero(ids != family.image_token_id)])
    assert text.replace(" ", "") == "TILE_1TILE_2TILE_GLOBAL"
