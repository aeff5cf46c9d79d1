"""Small models of the four real classes, and rows for them, for every engine test.

Random weights, but wide ones: with the usual initialisation logits are nearly constant, and greedy ties would make
any two engines differ. Texts come out as gibberish that depends on every pixel and every word, which is the point.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.engine.reference import ReferenceEngine
from actors.engine.types import Completion, Request, Sampling
from actors.families import Family, load_family, load_model, text_message, user_message
from examples.toy.checkpoint import write_untrained

_GAIN = 2.0
_FRAME = (36, 50)


@dataclass(frozen=True)
class Row:
    """What a row holds, small enough to be printed by hypothesis and to be a dictionary key."""

    sizes: tuple[tuple[int, int], ...] = ((40, 60),)
    videos: tuple[int, ...] = ()
    """Frames of each video; a chat template puts them behind a turn's images."""
    video_first: bool = False
    """Whether the videos have a turn of their own before the images'."""
    text: str = "describe the image"
    turns: int = 1
    seed: int = 0
    sampling: Sampling = Sampling(max_new_tokens=12)  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Subject:
    """A family, its model, and the oracle over it."""

    family: Family
    model: PreTrainedModel
    path: Path

    def own_model(self) -> PreTrainedModel:
        """A copy for an engine to keep."""
        return copy.deepcopy(self.model)

    def request(self, row: Row, key: object = None) -> Request:
        layouts = self.family.row_layouts([*row.sizes, *((frames, *_FRAME) for frames in row.videos)])
        noise = np.random.default_rng(row.seed)
        tiles = []
        for layout in layouts:
            shape = (max(1, layout.frames), 3, *layout.size)
            pixels = torch.from_numpy(noise.integers(0, 256, shape, dtype=np.uint8))
            if layout.frames:
                tiles.append(torch.stack([self.family.tile_frame(frame) for frame in pixels]).numpy())
            else:
                tiles.append(self.family.tile(pixels[0], layout).numpy())
        messages = [user_message(row.text, len(row.sizes), len(row.videos))]
        if row.video_first:
            messages = [
                user_message("a video", videos=len(row.videos)),
                text_message("assistant", "a circle"),
            ]
            messages.append(user_message(row.text, len(row.sizes)))
        for _ in range(row.turns - 1):
            messages += [text_message("assistant", "a red circle"), user_message("and the background ?")]
        ids = self.family.prompt(messages, layouts)
        order = self.family.appearance(ids, layouts)
        none = np.zeros((0, *self.family.tile_shape), np.uint8)
        ordered = np.concatenate([none, *(tiles[index] for index in order)])
        return Request(key, ids, ordered, tuple(layouts[index] for index in order), row.sampling)

    def expected(self, row: Row) -> Completion:
        """What the reference engine makes of a row; remembered, because tests ask for the same rows often."""
        known = _EXPECTED.setdefault(self.family.name, {})
        if row not in known:
            known[row] = next(ReferenceEngine(self.family, self.model).generate([self.request(row)]))
            assert known[row].error is None, known[row].error
        return known[row]


_EXPECTED: dict[str, dict[Row, Completion]] = {}


@cache
def subject(name: str) -> Subject:
    """The random-weight model of a family: the same in every process."""
    path = Path(mkdtemp(prefix=f"tessera-{name}-"))
    write_untrained(name, path)
    family, model = load_family(str(path)), load_model(str(path), dtype="float32")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else parameter[0].numel()
            parameter.normal_(0, _GAIN * fan_in**-0.5, generator=generator)
    model.get_output_embeddings().weight[sorted(family.eos_token_ids)] *= 0.5  # else most texts end at once
    return Subject(family, model, path)
