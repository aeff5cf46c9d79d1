"""Preprocess: every row comes out, prepared or with an error that says what is wrong with it."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.families import FAMILIES, load_family, user_message
from actors.images.decode import decode
from actors.preprocess import Preprocess
from actors.schema import ERROR, PIXELS, SIZES, TOKEN_IDS, error_value
from tests.blocks import picture, preprocess_config, source_block
from tests.checkpoints import untrained


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_carries_what_its_family_makes_of_it(name):
    family = load_family(untrained(name))
    data = picture(90, 50)
    block = source_block([[data]], id=["x"], prompt=["Describe the image."])
    row = Preprocess(preprocess_config(untrained(name)))(block).to_pylist()[0]

    layouts = family.layout([(50, 90)])
    assert row["id"] == "x" and row[ERROR] is None
    assert row[SIZES] == [[50, 90]]
    assert row[TOKEN_IDS] == family.prompt([user_message("Describe the image.", images=1)], layouts).tolist()
    pixels = np.frombuffer(row[PIXELS], np.uint8).reshape(-1, *family.tile_shape)
    assert torch.equal(torch.tensor(pixels), family.tile(decode(data, 10_000), layouts[0]))


def test_bad_rows_become_error_rows_and_the_others_go_on():
    good = picture()
    failed = error_value("fetch", "read", "no such file")
    block = source_block(
        [[good], [good[:40]], [b""], [picture(200, 200)], None, [good], [good]],
        errors=[None, None, None, None, failed, None, None],
        id=list("abcdefg"),
        prompt=["Describe the image."] * 5 + [None, "an <image> of what?"],
    )
    rows = Preprocess(preprocess_config(untrained("llava_onevision")))(block).to_pylist()

    assert [row["id"] for row in rows] == list("abcdefg")
    kinds = [row[ERROR] and row[ERROR]["kind"] for row in rows]
    assert kinds == [None, "decode", "decode", "too_large", "fetch", "prompt", "prompt"]
    assert "40000 pixels" in rows[3][ERROR]["message"] and "max_pixels=10000" in rows[3][ERROR]["message"]
    assert rows[4][ERROR] == failed
    told = "input.prompt: column 'prompt' holds no prompt in this row (it is null)"
    assert rows[5][ERROR] == error_value("prompt", "preprocess", told)
    assert all(row[PIXELS] is None for row in rows[1:]) and rows[0][PIXELS]


def test_a_prompt_that_leaves_no_room_for_the_caption_is_too_long():
    config = preprocess_config(untrained("llava_onevision"), max_new_tokens=1_000_000)
    error = Preprocess(config)(source_block([[picture()]], id=["x"], prompt=["Describe"])).to_pylist()[0][
        ERROR
    ]
    assert error["kind"] == "too_long" and "max_new_tokens=1000000" in error["message"]


def test_a_template_is_filled_from_the_row():
    config = preprocess_config(
        untrained("llava_onevision"),
        prompt_column=None,
        template="{word} the image.",
        template_columns=("word",),
    )
    block = source_block([[picture()]] * 2, id=["x", "y"], word=["Describe", None])
    filled, null = Preprocess(config)(block).to_pylist()
    family = load_family(untrained("llava_onevision"))
    expected = family.prompt([user_message("Describe the image.", images=1)], family.layout([(50, 60)]))
    assert filled[TOKEN_IDS] == expected.tolist()
    assert null[ERROR]["kind"] == "prompt" and "'word'" in null[ERROR]["message"]


def test_a_value_that_python_cannot_hold_costs_its_row():
    config = preprocess_config(
        untrained("llava_onevision"), prompt_column=None, template="{day}", template_columns=("day",)
    )
    days = pa.array([1 << 30, 1], pa.int32()).view(pa.date32())  # what a flipped bit makes of a date
    bad, good = Preprocess(config)(source_block([[picture()]] * 2, id=["x", "y"], day=days)).to_pylist()
    assert bad[ERROR]["kind"] == "crash" and "OverflowError" in bad[ERROR]["message"]
    assert good[ERROR] is None and good[TOKEN_IDS]


def test_chats_several_images_and_text_alone_share_a_block():
    chat = [
        {"role": "user", "content": "Describe the image."},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "Describe the image."},
    ]
    plain = [{"role": "user", "content": "Describe the image."}]
    prompts = pa.array([chat, plain, plain, [], [{"role": "user", "content": None}]])
    block = source_block(
        [[picture()], [picture(), picture(90, 40)], [], [], []], id=list("abcde"), prompt=prompts
    )
    config = preprocess_config(untrained("llava_onevision"), system="Be brief.")
    rows = Preprocess(config)(block).to_pylist()
    assert [row[ERROR] and row[ERROR]["kind"] for row in rows] == [None, None, None, "prompt", "prompt"]
    assert [row[SIZES] for row in rows[:3]] == [[[50, 60]], [[50, 60], [40, 90]], []]
    assert rows[2][PIXELS] == b""
    assert len(rows[0][TOKEN_IDS]) > len(rows[2][TOKEN_IDS])


def test_a_video_becomes_its_frames_in_order():
    family = load_family(untrained("llava_onevision"))
    frames = [picture(60, 50, color) for color in ("red", "green", "blue")]
    videos = [
        frames,
        [],
        None,
        frames[:1],
        [frames[0], frames[1][:40]],
        [frames[0], picture(200, 200)],
        frames,
    ]
    slot = {"type": "video"}
    asked = {"role": "user", "content": [{"type": "text", "text": "a red square"}, slot]}
    then = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and the image"}]}
    texts = [{"role": "user", "content": [{"type": "text", "text": "Describe the image."}]}]
    block = source_block(
        [[], [picture()], [], [picture(), picture(90, 40)], [], [], [picture()]],
        videos=videos,
        id=list("abcdefg"),
        prompt=pa.array(
            [*[texts] * 6, [asked, {"role": "assistant", "content": [texts[0]["content"][0]]}, then]]
        ),
    )
    rows = Preprocess(preprocess_config(untrained("llava_onevision")))(block).to_pylist()
    assert [row[ERROR] and row[ERROR]["kind"] for row in rows] == [*[None] * 4, "decode", "too_large", None]
    assert [row[SIZES] for row in rows[:3]] == [[[3, 50, 60]], [[50, 60]], []]
    # Images before the video, as the template has it
    assert rows[3][SIZES] == [
        [50, 60],
        [40, 90],
        [1, 50, 60],
    ]
    assert rows[6][SIZES] == [[3, 50, 60], [50, 60]]  # the video's turn came first, and so do its pixels
    assert "frame 2 of the video's 2: " in rows[4][ERROR]["message"]
    assert "frame 2 of the video's 2: " in rows[5][ERROR]["message"]

    expected = family.prompt(
        [user_message("Describe the image.", videos=1)], [family.layout_video((3, 50, 60))]
    )
    assert rows[0][TOKEN_IDS] == expected.tolist()
    tiles = torch.stack([family.tile_frame(decode(frame, 10_000)) for frame in frames])
    pixels = torch.tensor(np.frombuffer(rows[0][PIXELS], np.uint8)).reshape(-1, *family.tile_shape)
    assert torch.equal(pixels, tiles)
    pixels = torch.tensor(np.frombuffer(rows[6][PIXELS], np.uint8)).reshape(-1, *family.tile_shape)
    assert torch.equal(pixels[:3], tiles)
    image = decode(picture(), 10_000)
    assert torch.equal(pixels[3:], family.tile(image, family.layout([(50, 60)])[0]))


def test_images_go_where_the_chat_puts_them():
    part = {"type": "text", "text": "Describe"}
    slot = {"type": "image", "text": None}
    after = [{"role": "user", "content": [part, slot]}]
    block = source_block([[picture()], [picture()]], id=["x", "y"], prompt=pa.array([after, after[:1]]))
    family = load_family(untrained("aya_vision"))
    rows = Preprocess(preprocess_config(untrained("aya_vision")))(block).to_pylist()
    messages = [{"role": "user", "content": [part, {"type": "image"}]}]
    assert rows[0][TOKEN_IDS] == family.prompt(messages, family.layout([(50, 60)])).tolist()
