"""Fuyu against its stock processor and model: patches of 30 px within 1080 x 1920."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.families import (
    CheckpointError,
    PromptError,
    load_family,
    load_model,
    text_message,
    user_message,
)
from actors.images.decode import decode
from tests.actors.families.conftest import Subject
from tests.actors.families.oracle import lay_out, noise, pil, write_checkpoint
from tests.actors.families.pictures import Picture, pictures
from tests.actors.families.sizes import EXTREMES, LAW
from tests.actors.families.small_fuyu import fuyu as small_fuyu

SIZES = [*EXTREMES, (1081, 1920), (1080, 1921), (30, 30), (4000, 4000)]
TEXTS = [
    "Generate a coco-style caption.\n",
    "",
    " the  é 字 ",
    "<s> x",
    "<0x04>",
    "a <box>1, 2, 3, 4</box> b",
]


def stock(subject: Subject, text: str, image: object) -> dict[str, Tensor]:
    inputs = subject.processor(text=text, images=image, return_tensors="pt", return_legacy_image_output=False)
    return dict(inputs)


def assert_equals_stock(subject: Subject, text: str, image: Tensor, expected: dict[str, Tensor]) -> None:
    family = subject.family
    layouts, pixels = lay_out(family, [image])
    inputs = family.model_inputs(pixels, layouts)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    ids = family.prompt([user_message(text, images=1)], layouts)
    assert ids.tolist() == expected["input_ids"][0].tolist()
    assert int((ids == family.image_token_id).sum()) == layouts[0].tokens == len(inputs["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
def test_extreme_sizes_equal_stock(fuyu: Subject, size: tuple[int, int]) -> None:
    image = noise(*size)
    assert_equals_stock(fuyu, "what is it?", image, stock(fuyu, "what is it?", pil(image)))


@LAW
@given(picture=pictures(), text=st.sampled_from(TEXTS))
def test_any_picture_equals_stock(fuyu: Subject, picture: Picture, text: str) -> None:
    assert_equals_stock(fuyu, text, decode(picture.data, 10**8), stock(fuyu, text, picture.open()))


@settings(LAW, max_examples=50)
@given(text=st.text(max_size=30))
def test_any_text_equals_stock(fuyu: Subject, text: str) -> None:
    (layout,) = fuyu.family.layout([(31, 61)])
    ids = fuyu.family.prompt([user_message(text, images=1)], [layout])
    assert ids.tolist() == stock(fuyu, text, pil(noise(31, 61)))["input_ids"][0].tolist()
    alone = fuyu.processor(text=text)["input_ids"]
    assert fuyu.family.prompt([user_message(text)], ()).tolist() == alone


def test_an_image_that_vanishes_keeps_a_pixel(fuyu: Subject) -> None:
    """Stock resizes 1 x 4000 to a height of 0 and fails."""
    layouts, pixels = lay_out(fuyu.family, [noise(1, 4000)])
    assert layouts[0].grid == (1, 64)
    assert pixels[:, :, 1:].unique().tolist() == [1], "the rest is padding"


def test_turns_are_lines(fuyu: Subject) -> None:
    turns = [
        text_message("system", "Be brief."),
        user_message("What is it?", images=1),
        text_message("assistant", "A cat."),
        user_message("And its colour?"),
    ]
    image = noise(50, 70)
    layouts = fuyu.family.layout([(50, 70)])
    joined = "Be brief.\nWhat is it?\nA cat.\nAnd its colour?"
    expected = stock(fuyu, joined, pil(image))["input_ids"][0].tolist()
    assert fuyu.family.prompt(turns, layouts).tolist() == expected
    turns[1] = user_message("What is it?")
    assert fuyu.family.prompt(turns, ()).tolist() == fuyu.processor(text=joined)["input_ids"]


@pytest.mark.parametrize("size", SIZES)
def test_features_fill_the_placeholders(fuyu: Subject, size: tuple[int, int]) -> None:
    family, model = fuyu.family, fuyu.model
    layouts, pixels = lay_out(family, [noise(*size)])
    with torch.inference_mode():
        (features,) = family.embed_images(model, pixels, layouts)
        expected = model.model.get_image_features(family.model_inputs(pixels, layouts)["pixel_values"])
    assert len(features) == layouts[0].tokens
    assert torch.equal(features, expected.last_hidden_state)


def test_generate_equals_stock(fuyu: Subject, tmp_path: Path) -> None:
    fuyu.model.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    image = noise(100, 200)
    layouts, pixels = lay_out(fuyu.family, [image])
    ids = torch.from_numpy(fuyu.family.prompt([user_message("hi", images=1)], layouts)).long()[None]
    inputs = fuyu.family.model_inputs(pixels, layouts)
    ours = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, **inputs)
    theirs = fuyu.model.generate(**stock(fuyu, "hi", pil(image)), max_new_tokens=4, do_sample=False)
    assert ours.tolist() == theirs.tolist()
    text_ids = torch.from_numpy(fuyu.family.prompt([user_message("hello")], ())).long()[None]
    assert model.generate(input_ids=text_ids, max_new_tokens=3).shape[1] > text_ids.shape[1]


def test_prompt_errors(fuyu: Subject) -> None:
    family = fuyu.family
    with pytest.raises(PromptError, match="one image a row, this row has 2"):
        family.layout([(9, 9), (9, 9)])
    for marker in ("|SPEAKER|", "|NEWLINE|"):
        with pytest.raises(PromptError, match=marker.replace("|", r"\|")):
            family.prompt([user_message(f"a {marker} b", images=1)], family.layout([(9, 9)]))
    with pytest.raises(PromptError, match="0 image slots for 1 images"):
        family.prompt([user_message("hi")], family.layout([(9, 9)]))


def test_answers_end_with_the_tokenizers_end_of_text(fuyu: Subject) -> None:
    assert fuyu.family.tokenizer.eos_token_id in fuyu.family.eos_token_ids
    ids = fuyu.family.tokenizer("a cat", add_special_tokens=False)["input_ids"]
    assert fuyu.family.decode([*ids, fuyu.family.tokenizer.eos_token_id]).strip() == "a cat"


def test_hub_file_layout(fuyu: Subject, tmp_path: Path) -> None:
    """As the hub has it: a flat config.json, preprocessor_config.json, `LlamaTokenizerFast`."""
    _, config, processor = small_fuyu()
    write_checkpoint(tmp_path, config, processor)
    nested = json.loads((tmp_path / "config.json").read_text())
    flat = {**nested.pop("text_config"), **nested}
    image_processor = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del tokenizer["backend"]
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**flat, "model_type": "fuyu"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor))
    legacy = {**tokenizer, "tokenizer_class": "LlamaTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(legacy))
    hub = replace(fuyu, family=load_family(str(tmp_path)))
    image = noise(200, 300)
    assert_equals_stock(hub, "what is it?", image, stock(fuyu, "what is it?", pil(image)))


def test_a_ragged_canvas_is_refused(tmp_path: Path) -> None:
    _, config, processor = small_fuyu()
    processor.image_processor.size = {"height": 1000, "width": 1920}
    with pytest.raises(CheckpointError, match=r"\(1000, 1920\) is no multiple of patch_size"):
        load_family(write_checkpoint(tmp_path, config, processor))
