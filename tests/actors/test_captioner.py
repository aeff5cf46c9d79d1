"""The captioner: a job's stages in one process."""

from pathlib import Path

import pytest

from actors.captioner import Captioner
from tests.blocks import picture
from tests.checkpoints import untrained
from tests.commands import ROOT

SCENE = ROOT / "examples/toy/scene.png"
TRUTH = "a yellow square left of a purple square on a gray background"
PROMPT = "Describe the image."


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner(str(ROOT / "examples/toy/checkpoints/llava_onevision"), max_new_tokens=32)


def test_images_are_bytes_or_paths(captioner: Captioner) -> None:
    rows = captioner([SCENE, str(SCENE), SCENE.read_bytes()], PROMPT)
    assert [row["caption"] for row in rows] == [TRUTH] * 3
    assert {"caption", "finish_reason", "error"} <= set(rows[0]) and not any(
        name[0] == "_" for name in rows[0]
    )


def test_a_prompt_is_text_or_a_chat_for_all_or_for_each(captioner: Captioner) -> None:
    chat = [{"role": "user", "content": PROMPT}]
    for prompt in (chat, [PROMPT, PROMPT], [chat, chat]):
        assert [row["caption"] for row in captioner([SCENE, SCENE], prompt)] == [TRUTH] * 2
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        captioner([SCENE, SCENE], [PROMPT])


def test_a_picture_that_is_none_fails_alone(captioner: Captioner) -> None:
    good, bad = captioner([SCENE, b"no picture"], PROMPT)
    assert good["caption"] == TRUTH
    assert bad["caption"] is None and bad["error"]["kind"] == "decode"


def test_several_images_and_none(tmp_path: Path) -> None:
    caption = Captioner(untrained("llava_onevision"), engine="reference", max_new_tokens=2)
    rows = caption([[picture(), picture(color="blue")], []], "What is it?")
    assert all(row["error"] is None for row in rows)
    assert rows[0]["image_tokens"] > 0 and rows[1]["image_tokens"] == 0
    assert caption([], "What is it?") == []
