"""LLaVA-OneVision's videos against its stock processor and model: 384 px, 196 features a frame, one newline."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaOnevisionVideoProcessor

from actors.families import CheckpointError, Family, PromptError, load_family, text_message, user_message
from tests.actors.families import small
from tests.actors.families.conftest import Subject
from tests.actors.families.oracle import assert_equals_stock, lay_out, noise, write_checkpoint
from tests.actors.families.sizes import LAW, sizes


def clip(frames: int, size: tuple[int, int] = (40, 60), seed: int = 0) -> list[torch.Tensor]:
    return [noise(*size, seed=seed * 1000 + frame) for frame in range(frames)]


@settings(LAW, max_examples=12)
@given(
    # Stock takes the height of a frame 1 or 3 px high for its channels.
    size=sizes(longest=1500).filter(lambda size: size[0] not in (1, 3)),
    frames=st.integers(1, 5),
)
def test_a_video_equals_stock(llava_onevision: Subject, size: tuple[int, int], frames: int) -> None:
    messages = [user_message("What happens?", videos=1)]
    layouts, _ = assert_equals_stock(
        llava_onevision.family, llava_onevision.processor, messages, [], [clip(frames, size)]
    )
    assert (layouts[0].tiles, layouts[0].tokens) == (frames, frames * 196 + 1)


@settings(LAW, max_examples=10)
@given(
    images=st.lists(sizes(longest=300), max_size=3),
    frames=st.integers(1, 4),
    video_first=st.booleans(),
    later=st.booleans(),
)
def test_images_and_a_video_in_one_row_equal_stock(
    llava_onevision: Subject,
    images: list[tuple[int, int]],
    frames: int,
    video_first: bool,
    later: bool,
) -> None:
    """The template puts images before videos whatever the message says; a later turn's video comes later."""
    slots = [{"type": "image"}] * len(images)
    slots = [{"type": "video"}, *slots] if video_first else [*slots, {"type": "video"}]
    messages = [{"role": "user", "content": [*slots, {"type": "text", "text": "Compare."}]}]
    if later:
        ask = user_message("And these?", images=len(images))
        messages = [user_message("See.", videos=1), text_message("assistant", "A cat."), ask]
    family = llava_onevision.family
    pictures = [noise(*size) for size in images]
    layouts, _ = assert_equals_stock(family, llava_onevision.processor, messages, pictures, [clip(frames)])

    ids = family.prompt(messages, layouts)
    images_at, video_at = list(range(len(images))), len(images)
    assert family.appearance(ids, layouts) == ([video_at, *images_at] if later else [*images_at, video_at])


def test_frames_of_one_video_may_differ_in_size(llava_onevision: Subject) -> None:
    """Stock cannot stack them; here each is squashed by itself, to what it would be in a video of its own size."""
    family = llava_onevision.family
    small_frame, large = noise(30, 40), noise(500, 200)
    layouts, pixels = lay_out(family, [], [[small_frame, large]])
    assert layouts[0].size == (30, 40)
    for index, frame in enumerate((small_frame, large)):
        assert torch.equal(pixels[index], lay_out(family, [], [[frame]])[1][0])


def test_tokens_are_features(llava_onevision: Subject) -> None:
    family, model = llava_onevision.family, llava_onevision.model
    layouts, pixels = lay_out(family, [], [clip(3)])
    with torch.inference_mode():
        (features,) = family.embed_images(model, pixels, layouts)
        stock = model.get_video_features(**family.model_inputs(pixels, layouts)).pooler_output
    assert features.shape == (3 * 196 + 1, 8)
    assert torch.equal(features, stock[0])


def test_videos_of_different_lengths_and_images_share_a_call(
    llava_onevision: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, model = llava_onevision.family, llava_onevision.model
    monkeypatch.setattr("actors.families.llava_onevision._FRAMES_AT_ONCE", 2)  # borders inside videos
    rows = [
        lay_out(family, [], [clip(1)]),
        lay_out(family, [noise(90, 30)], [clip(4, seed=1)]),
        lay_out(family, [noise(30, 30), noise(20, 50)]),
        lay_out(family, [], [clip(2, (9, 9)), clip(3, seed=2)]),
    ]
    layouts = [layout for row, _ in rows for layout in row]
    with torch.inference_mode():
        together = family.embed_images(model, torch.cat([pixels for _, pixels in rows]), layouts)
        apart = [feature for row, pixels in rows for feature in family.embed_images(model, pixels, row)]
    assert [len(feature) for feature in together] == [layout.tokens for layout in layouts]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


def test_generate_takes_the_inputs(llava_onevision: Subject) -> None:
    family, model = llava_onevision.family, llava_onevision.model
    for images in ([], [noise(10, 30)], [noise(10, 10), noise(30, 20)]):
        layouts, pixels = lay_out(family, images, [clip(2)])
        messages = [user_message("hi", images=len(images), videos=1)]
        ids = torch.from_numpy(family.prompt(messages, layouts)).long()[None]
        inputs = family.model_inputs(pixels, layouts)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **inputs)
        assert out.shape[1] > ids.shape[1]


def test_prompt_errors(llava_onevision: Subject) -> None:
    family = llava_onevision.family
    video, image = family.layout_video((2, 9, 9)), family.layout([(9, 9)])[0]
    with pytest.raises(PromptError, match="0 video slots for 1 videos"):
        family.prompt([user_message("hi", images=1)], [image, video])
    with pytest.raises(PromptError, match="1 image slots for 0 images"):
        family.prompt([user_message("hi", images=1)], [video])


def test_videos_have_figures_of_their_own_wherever_they_stand(tmp_path: Path) -> None:
    """Nested, in a file of their own, or none: then the image processor's; what is omitted is stock's default."""
    _, config, processor = small.llava_onevision()
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2}
    processor.video_processor = LlavaOnevisionVideoProcessor(**own)
    messages = [user_message("What?", videos=1)]
    assert_equals_stock(
        load_family(write_checkpoint(tmp_path / "5", config, processor)), processor, messages, [], [clip(2)]
    )
    path = Path(write_checkpoint(tmp_path / "4", config, processor, "4.x"))
    (path / "video_preprocessor_config.json").write_text(json.dumps(own))
    assert_equals_stock(load_family(str(path)), processor, messages, [], [clip(2)])
    (path / "video_preprocessor_config.json").unlink()
    images = json.loads((path / "preprocessor_config.json").read_text())
    processor.video_processor = LlavaOnevisionVideoProcessor(image_mean=images["image_mean"])
    assert_equals_stock(load_family(str(path)), processor, messages, [], [clip(2)])


def changed(path: Path, file: str, **fields: object) -> Family:
    value = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({**value, **fields}))
    return load_family(str(path))


def test_checkpoints_that_take_no_videos_say_why(
    llava_onevision: Subject, aria: Subject, fuyu: Subject, tmp_path: Path
) -> None:
    llava_onevision.family.check_videos()
    for other in (aria, fuyu):
        with pytest.raises(CheckpointError, match="takes no videos; LLaVA-OneVision does"):
            other.family.check_videos()
    _, config, processor = small.llava_onevision()
    path = Path(write_checkpoint(tmp_path, config, processor))
    nested = json.loads((path / "processor_config.json").read_text())["video_processor"]
    for fields, words in (
        ({"do_resize": False}, "do_resize=false"),
        ({"size": {"height": 224, "width": 224}}, "frames of 224 px beside tiles of 384 px"),
    ):
        family = changed(path, "processor_config.json", video_processor={**nested, **fields})
        with pytest.raises(CheckpointError, match=words):
            family.check_videos()
    family = changed(
        path, "processor_config.json", video_processor=nested, vision_feature_select_strategy="default"
    )
    with pytest.raises(CheckpointError, match="feature strategy 'default'"):
        family.check_videos()
    family = changed(path, "processor_config.json", vision_feature_select_strategy="full")
    family.check_videos()
    (path / "chat_template.jinja").write_text(
        (path / "chat_template.jinja").read_text().replace("<video>", "")
    )
    with pytest.raises(CheckpointError, match="chat template writes no <video>"):
        load_family(str(path)).check_videos()
    with pytest.raises(CheckpointError, match="'<video>' is id"):
        changed(path, "config.json", video_token_index=3).check_videos()
