"""LLaVA-OneVision against its stock processor and model, at 384 px and 36 grid pinpoints."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import RowError
from actors.families import PromptError, text_message, user_message
from tests.actors.families.conftest import Subject
from tests.actors.families.oracle import assert_equals_stock, lay_out, noise
from tests.actors.families.sizes import EXTREMES, LAW, sizes


@pytest.mark.parametrize("size", [*EXTREMES, (4000, 4000), (1, 4000)])
def test_one_image_equals_stock(llava_onevision: Subject, size: tuple[int, int]) -> None:
    messages = [user_message("What is shown?", images=1)]
    assert_equals_stock(llava_onevision.family, llava_onevision.processor, messages, [noise(*size)])


@LAW
@given(size=sizes())
def test_any_size_equals_stock(llava_onevision: Subject, size: tuple[int, int]) -> None:
    messages = [user_message("Describe the image.", images=1)]
    assert_equals_stock(llava_onevision.family, llava_onevision.processor, messages, [noise(*size)])


@LAW
@given(row=st.lists(sizes(longest=900), min_size=2, max_size=4))
def test_several_images_equal_stock(llava_onevision: Subject, row: list[tuple[int, int]]) -> None:
    messages = [user_message("Compare.", images=len(row))]
    images = [noise(*size) for size in row]
    layouts, _ = assert_equals_stock(llava_onevision.family, llava_onevision.processor, messages, images)
    assert [layout.tokens for layout in layouts] == [730] * len(row)


def test_chats_equal_stock(llava_onevision: Subject) -> None:
    text_only = [text_message("system", "Be brief."), user_message("Hi <|im_end|> there \n é 字")]
    assert_equals_stock(llava_onevision.family, llava_onevision.processor, text_only, [])
    turns = [
        user_message("the first", images=1),
        text_message("assistant", "a cat"),
        user_message(" and these? ", images=2),
    ]
    images = [noise(40, 60), noise(500, 20), noise(7, 7)]
    assert_equals_stock(llava_onevision.family, llava_onevision.processor, turns, images)


@pytest.mark.parametrize("size", [*EXTREMES, (2304, 2304), (700, 1000), (1000, 130), (1, 4000)])
def test_tokens_are_features(llava_onevision: Subject, size: tuple[int, int]) -> None:
    family, model = llava_onevision.family, llava_onevision.model
    layouts, pixels = lay_out(family, [noise(*size)])
    with torch.inference_mode():
        (features,) = family.embed_images(model, pixels, layouts)
        stock = model.get_image_features(**family.model_inputs(pixels, layouts)).pooler_output
    assert features.shape == (layouts[0].tokens, 8)
    assert torch.equal(features, stock[0])


@settings(LAW, max_examples=40)
@given(size=sizes())
def test_tokens_are_packed_features(llava_onevision: Subject, size: tuple[int, int]) -> None:
    """As above for many sizes: the tower skipped, the model's own packing run on empty features."""
    (layout,) = llava_onevision.family.layout([size])
    features, counts = llava_onevision.model.model.pack_image_features(
        [torch.zeros(layout.tiles, 729, 1)],
        torch.tensor([size]),
        image_newline=torch.zeros(1),
    )
    assert counts.tolist() == [layout.tokens] == [len(features[0])]


def test_rows_mix_in_one_call(llava_onevision: Subject) -> None:
    family, model = llava_onevision.family, llava_onevision.model
    rows = [[noise(300, 500)], [noise(20, 30), noise(400, 400)], [noise(384, 384)]]
    laid_out = [lay_out(family, row) for row in rows]
    layouts = [layout for row, _ in laid_out for layout in row]
    with torch.inference_mode():
        together = family.embed_images(model, torch.cat([pixels for _, pixels in laid_out]), layouts)
        apart = [feature for row, pixels in laid_out for feature in family.embed_images(model, pixels, row)]
        row, pixels = laid_out[1]
        alone = family.embed_images(model, pixels[1:], row[1:])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(alone[0], together[2])


def test_generate_takes_the_inputs(llava_onevision: Subject) -> None:
    family, model = llava_onevision.family, llava_onevision.model
    for images in ([noise(50, 500)], [noise(10, 10), noise(30, 20)]):
        layouts, pixels = lay_out(family, images)
        ids = torch.from_numpy(family.prompt([user_message("hi", images=len(images))], layouts)).long()[None]
        inputs = family.model_inputs(pixels, layouts)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **inputs)
        assert out.shape[1] > ids.shape[1]


def test_odd_features_name_the_image(llava_onevision: Subject) -> None:
    family = llava_onevision.family
    layouts, pixels = lay_out(family, [noise(300, 500)])
    wrong = type(layouts[0])(layouts[0].size, layouts[0].grid, layouts[0].tiles, layouts[0].tokens + 1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"image 0 \(300 x 500\) has \d+ features"):
        family.embed_images(llava_onevision.model, pixels, [wrong])


def test_prompt_errors(llava_onevision: Subject) -> None:
    family = llava_onevision.family
    one = family.layout([(10, 10)])
    with pytest.raises(PromptError, match="0 image slots for 1 images"):
        family.prompt([user_message("hi")], one)
    with pytest.raises(PromptError, match="1 image slots for 0 images"):
        family.prompt([user_message("hi", images=1)], ())
    with pytest.raises(PromptError, match="'<image>'"):
        family.prompt([user_message("an <image> tag", images=1)], one)
    with pytest.raises(PromptError, match="'<video>'"):
        family.prompt([user_message("a <video> tag", images=1)], one)
    with pytest.raises(PromptError, match="no messages"):
        family.prompt([], ())
    for part in ({"type": "audio"}, {"type": "text"}, {"type": "text", "text": None}):
        with pytest.raises(PromptError, match="holds images, videos and texts, not"):
            family.prompt([{"role": "user", "content": [part]}], ())
    with pytest.raises(PromptError, match="chat template refuses"):
        family.prompt([{"content": [{"type": "text", "text": "no role"}]}], ())


def test_a_square_too_large_is_an_image_error(llava_onevision: Subject) -> None:
    with pytest.raises(RowError, match="40000") as error:
        llava_onevision.family.layout([(1, 40000), (10, 10)])
    assert error.value.kind == "too_large"
