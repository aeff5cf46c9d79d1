"""The trained toy checkpoints: what the engine says about a scene is what `generate` says, and mostly true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.engine import Request, Sampling
from actors.engine.engine import ContinuousEngine
from actors.engine.reference import ReferenceEngine
from actors.engine.scheduler import Limits
from actors.families import FAMILIES, Family, load_family, load_model, user_message
from examples.toy.scenes import PROMPTS, caption, draw, random_scene

CHECKPOINTS = Path(__file__).parents[3] / "examples" / "toy" / "checkpoints"
SCENES = range(900_000, 900_024)  # none that a checkpoint was trained on


def request(family: Family, seed: int) -> Request:
    image = torch.from_numpy(np.array(draw(random_scene(seed)).convert("RGB"))).permute(2, 0, 1)
    layouts = family.layout([(image.shape[1], image.shape[2])])
    ids = family.prompt([user_message(PROMPTS["en"], images=1)], layouts)
    return Request(seed, ids, family.tile(image, layouts[0]).numpy(), layouts, Sampling(max_new_tokens=40))


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_checkpoints_say_what_generate_says(name: str) -> None:
    path = str(CHECKPOINTS / name)
    if not (CHECKPOINTS / name).is_dir():
        pytest.skip(f"no trained checkpoint at {path}")
    family = load_family(path)
    requests = [request(family, seed) for seed in SCENES]
    expected = {
        done.key: done
        for done in ReferenceEngine(family, load_model(path, dtype="float32")).generate(requests)
    }
    right = 0
    for slots in (1, 5, 16):
        engine = ContinuousEngine(family, load_model(path, dtype="float32"), Limits(slots, 2048, 4000))
        found = list(engine.generate(requests[::-1]))
        assert len(found) == len(requests)
        for done in found:
            assert (done.token_ids, done.text, done.finish_reason) == (
                expected[done.key].token_ids,
                expected[done.key].text,
                expected[done.key].finish_reason,
            )
            assert isinstance(done.key, int)
            right += done.text == caption(random_scene(done.key))
    assert right / (3 * len(requests)) > 0.7


def test_a_trained_checkpoint_says_of_videos_what_generate_says() -> None:
    """It never saw one in training, so what it says means little; it says the same in every batch."""
    path = str(CHECKPOINTS / "llava_onevision")
    family = load_family(path)
    requests = [
        video(family, seed, frames) for seed, frames in zip(SCENES, (1, 2, 3, 5, 8, 13), strict=False)
    ]
    requests += [request(family, seed) for seed in SCENES[6:12]]
    reference = ReferenceEngine(family, load_model(path, dtype="float32"))
    expected = {done.key: (done.token_ids, done.text) for done in reference.generate(requests)}
    assert len({ids for ids, _ in expected.values()}) > len(requests) // 2
    for slots in (1, 5, 16):
        engine = ContinuousEngine(family, load_model(path, dtype="float32"), Limits(slots, 2048, 4000))
        found = {done.key: (done.token_ids, done.text) for done in engine.generate(requests[::-1])}
        assert found == expected


def video(family: Family, seed: int, frames: int) -> Request:
    """A scene, then others."""
    scenes = [draw(random_scene(seed + 1000 * frame)).convert("RGB") for frame in range(frames)]
    pictures = [torch.from_numpy(np.array(scene)).permute(2, 0, 1) for scene in scenes]
    layouts = (family.layout_video((frames, *pictures[0].shape[1:])),)
    ids = family.prompt([user_message(PROMPTS["en"], videos=1)], layouts)
    tiles = torch.stack([family.tile_frame(picture) for picture in pictures]).numpy()
    return Request(seed, ids, tiles, layouts, Sampling(max_new_tokens=40))
