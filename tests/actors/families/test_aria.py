"""Aria against its stock processor and model: 490 and 980 px, split and not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from actors.families import CheckpointError, PromptError, load_family, load_model, text_message, user_message
from actors.images.anyres import best_resolution, fit
from actors.images.decode import decode
from tests.actors.families.conftest import Subject, subject
from tests.actors.families.oracle import assert_equals_stock, lay_out, noise, stock_row, write_checkpoint
from tests.actors.families.pictures import Picture, pictures
from tests.actors.families.sizes import EXTREMES, LAW, sizes
from tests.actors.families.small_aria import aria

CONFIGURATIONS = [(980, False), (490, False), (980, True), (490, True)]
SIZES = [*EXTREMES, (490, 980), (979, 981), (4000, 4000)]
CHAT = [text_message("system", "Be brief."), user_message("What is it? é 字", images=1)]


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda c: f"{c[0]}-{'split' if c[1] else 'whole'}")
def configured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("aria"), *aria(*request.param))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("aria"), *aria(490, True))


@pytest.mark.parametrize("size", SIZES)
def test_extreme_sizes_equal_stock(configured: Subject, size: tuple[int, int]) -> None:
    assert_equals_stock(configured.family, configured.processor, CHAT, [noise(*size)])


@LAW
@given(picture=pictures())
def test_any_picture_equals_stock(configured: Subject, picture: Picture) -> None:
    family, processor = configured.family, configured.processor
    layouts, pixels = lay_out(family, [decode(picture.data, 10**8)])
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    expected = processor(text=text, images=picture.open(), return_tensors="pt")
    inputs = family.model_inputs(pixels, layouts)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["pixel_mask"], expected["pixel_mask"])
    assert family.prompt(CHAT, layouts).tolist() == expected["input_ids"][0].tolist()


@settings(LAW, max_examples=10)
@given(row=st.lists(sizes(), min_size=2, max_size=3))
def test_mixed_crop_counts_work(split: Subject, row: list[tuple[int, int]]) -> None:
    """Stock takes the largest crop count for everyone's; expected is what it makes of each image alone."""
    images = [noise(*size) for size in row]
    apart = [stock_row(split.processor, CHAT, [image]) for image in images]
    layouts, pixels = lay_out(split.family, images)
    inputs = split.family.model_inputs(pixels, layouts)
    for name, value in inputs.items():
        assert torch.equal(value, torch.cat([one[name] for one in apart])), name
    counts = [int((one["input_ids"] == split.family.image_token_id).sum()) for one in apart]
    assert [layout.tokens for layout in layouts] == counts
    messages = [user_message("Compare.", images=len(row))]
    text = split.processor.apply_chat_template(messages, add_generation_prompt=True)
    for layout in layouts:
        text = text.replace("<|img|><fim_suffix>", "<|img|>" * layout.tokens + "<fim_suffix >", 1)
    expected = split.processor.tokenizer(text.replace("<fim_suffix >", "<fim_suffix>"))["input_ids"]
    assert split.family.prompt(messages, layouts).tolist() == expected


def test_chats_equal_stock(configured: Subject) -> None:
    text_only = [text_message("system", "Be brief."), user_message("Hi <|im_end|> there \n é 字")]
    assert_equals_stock(configured.family, configured.processor, text_only, [])
    turns = [
        user_message("the first", images=1),
        text_message("assistant", "a cat"),
        user_message(" and these? ", images=2),
    ]
    images = [noise(300, 400, seed) for seed in range(3)]  # one size: stock splits rows of equals only
    assert_equals_stock(configured.family, configured.processor, turns, images)


def test_features_fill_the_placeholders(configured: Subject) -> None:
    """Encoded per image, the features are what stock makes of its own inputs, as many as predicted."""
    images = [noise(30, 900), noise(640, 480)]
    layouts, pixels = lay_out(configured.family, images)
    with torch.inference_mode():
        features = configured.family.embed_images(configured.model, pixels, layouts)
        for image, layout, feature in zip(images, layouts, features, strict=True):
            stock = stock_row(configured.processor, CHAT, [image])
            alone = configured.model.get_image_features(
                pixel_values=stock["pixel_values"], pixel_mask=stock["pixel_mask"], return_dict=True
            ).pooler_output.flatten(0, 1)
            placeholders = int((stock["input_ids"] == configured.family.image_token_id).sum())
            assert len(feature) == layout.tokens == placeholders
            torch.testing.assert_close(feature, alone)


def test_generate_equals_stock(configured: Subject) -> None:
    image = noise(500, 700)
    stock = stock_row(configured.processor, CHAT, [image])
    layouts, pixels = lay_out(configured.family, [image])
    ids = torch.from_numpy(configured.family.prompt(CHAT, layouts)).long()[None]
    inputs = configured.family.model_inputs(pixels, layouts)
    ours = configured.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, **inputs)
    theirs = configured.model.generate(**stock, max_new_tokens=3, do_sample=False)
    assert ours.tolist() == theirs.tolist()
    text_ids = torch.from_numpy(configured.family.prompt([user_message("hello")], ())).long()[None]
    assert configured.model.generate(input_ids=text_ids, max_new_tokens=3).shape[1] > text_ids.shape[1]


@settings(LAW, max_examples=200)
@given(size=sizes())
def test_anyres_equals_stock(size: tuple[int, int]) -> None:
    resolutions = [(490 * rows, 490 * columns) for rows in range(1, 9) for columns in range(1, 9)]
    best = best_resolution(size, resolutions)
    assert best == select_best_resolution(size, resolutions)
    channels_first = np.broadcast_to(np.uint8(0), (3, *size))
    assert fit(size, best) == get_patch_output_size(channels_first, best, ChannelDimension.FIRST)


@pytest.mark.parametrize("nested", ["", "experts."])
def test_sequential_experts_load(tmp_path: Path, nested: str) -> None:
    """One Linear per expert, as `rhymes-ai/Aria-sequential_mlp` stores the very same weights."""
    model_class, config, _ = aria()
    fused = model_class(config)
    fused.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(_unroll(load_file(file), nested), file, metadata={"format": "pt"})
    loaded = load_model(str(tmp_path)).state_dict()
    for name, value in fused.state_dict().items():
        assert torch.equal(loaded[name], value), name
    fused.save_pretrained(tmp_path)
    assert any("experts.fc1" in name for name in load_file(file)), "saving stays as stock has it"


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    model_class, config, _ = aria()
    model_class(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "experts.fc1" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="2 weights are missing, e.g. .*gate_up_proj"):
        load_model(str(tmp_path))


def test_unknown_crop_size_is_refused(tmp_path: Path) -> None:
    _, config, processor = aria(700)
    with pytest.raises(CheckpointError, match=r"2500 patches a crop.*\[1225, 4900\]"):
        load_family(write_checkpoint(tmp_path, config, processor))


def test_4x_file_layout(tmp_path: Path) -> None:
    """preprocessor_config.json with the nulls that hub checkpoints hold, chat_template.json."""
    _, config, processor = aria(980, True)
    path = write_checkpoint(tmp_path, config, processor, "4.x")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "split_resolutions": None}))
    assert_equals_stock(load_family(path), processor, CHAT, [noise(700, 1500)])


def test_users_cannot_write_placeholders(split: Subject) -> None:
    with pytest.raises(PromptError, match=r"<\|img\|>"):
        split.family.prompt([user_message("see <|img|>", images=1)], split.family.layout([(9, 9)]))


def _unroll(weights: dict[str, Tensor], nested: str) -> dict[str, Tensor]:
    unrolled = {}
    for name, value in weights.items():
        if not name.endswith((".experts.fc1.weight", ".experts.fc2.weight")):
            unrolled[name] = value
            continue
        prefix, matrix = name.removesuffix(".weight").rsplit(".", 1)
        for index, expert in enumerate(value):
            parts = expert.chunk(2, dim=1) if matrix == "fc1" else [expert]
            kinds = ["gate_proj", "up_proj"] if matrix == "fc1" else ["down_proj"]
            for kind, part in zip(kinds, parts, strict=True):
                unrolled[f"{prefix}.{nested}{index}.{kind}.weight"] = part.T.contiguous()
    return unrolled
