"""Fuyu: no vision tower; patches of 30 px go straight into the decoder, a newline id after each row of them.

A tile is one patch, so an image has rows x columns tiles and as many features. An image larger
than `size` (1080 x 1920) is shrunk into it, a smaller one is left alone; it is then padded with the byte 1
(sic: stock pads with 1.0 before it rescales) up to whole patches.

The prompt is `[patches and newlines] <s> [text] <0x04>`: one image at most, first whatever the messages say.
Fuyu has no chat template. Turns are joined by newlines, a turn's texts are concatenated, roles are dropped,
so one user turn gives the ids of the stock `processor(text=text, images=image)`, and without an image those
of `processor(text=text)`: `<s> [text]`, with no `<0x04>` (beginning of answer). `<box>` and `<point>` tags
are text like any other: stock means to transform their coordinates, but throws the result away.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.families.base import Family, ImageLayout, PromptError, Size, check_features
from actors.families.checkpoint import Checkpoint, CheckpointError
from actors.families.messages import Message, texts
from actors.images.tiling import BILINEAR, pad, resize, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEWLINE = "|NEWLINE|"
BEGINNING_OF_ANSWER = "<0x04>"


class Fuyu(Family):
    """`grid` is rows and columns of patches, `tiles` and `tokens` their number; newlines are markers."""

    name = "fuyu"
    image_defaults: ClassVar = {
        "image_mean": 0.5,
        "image_std": 0.5,
        "resample": BILINEAR,
        "size": {"height": 1080, "width": 1920},
        "patch_size": {"height": 30, "width": 30},
        "padding_value": 1.0,
    }
    placeholder = "|SPEAKER|"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.patch: Size = _height_width(self.image_config["patch_size"])
        self.size: Size = _height_width(self.image_config["size"])
        if self.size[0] % self.patch[0] or self.size[1] % self.patch[1]:
            raise CheckpointError(f"{self.path}: size {self.size} is no multiple of patch_size {self.patch}")
        self.fill = (int(self.image_config["padding_value"]),) * 3
        self.resample = int(self.image_config["resample"])
        self.tile_shape = (3, *self.patch)
        self.require_token(self.placeholder, "image")
        self.newline_id = self.token_id(NEWLINE)
        self.bos_id = self.token_id("<s>")
        # Answers end with the tokenizer's |ENDOFTEXT|, whatever id the config names.
        self.eos_token_ids |= {int(self.tokenizer.eos_token_id)} if self.tokenizer.eos_token else set()

    @cached_property
    def input_name(self) -> str:
        """What the model calls its patches: transformers before 5.23 says image_patches, and 5.24 forgets that name."""
        # Not above: only who has the model needs its code, and that takes seconds.
        from transformers import FuyuForCausalLM

        named = inspect.signature(FuyuForCausalLM.forward).parameters
        return "pixel_values" if "pixel_values" in named else "image_patches"

    @property
    def reserved(self) -> tuple[str, ...]:
        return self.placeholder, NEWLINE

    def layout(self, sizes: Sequence[Size]) -> tuple[ImageLayout, ...]:
        if len(sizes) > 1:
            raise PromptError(f"Fuyu takes one image a row, this row has {len(sizes)}")
        return tuple(self._layout(size) for size in sizes)

    def tile(self, image: Tensor, layout: ImageLayout) -> Tensor:
        height, width = self._shrunk(layout.size)
        bottom, right = layout.grid[0] * self.patch[0] - height, layout.grid[1] * self.patch[1] - width
        image = resize(image, (height, width), self.resample)
        return split(pad(image, 0, bottom, 0, right, self.fill), self.patch)

    def model_inputs(self, pixels: Tensor, layouts: Sequence[ImageLayout]) -> dict[str, Tensor]:
        return {self.input_name: self.patches(pixels)}

    def patches(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 `[P, 3, h, w]` -> normalised `[P, h * w * 3]`: channels last, as the model reads a patch."""
        return self.normalize(pixels, dtype).permute(0, 2, 3, 1).flatten(1)

    def embed_images(
        self, model: PreTrainedModel, pixels: Tensor, layouts: Sequence[ImageLayout]
    ) -> list[Tensor]:
        embed = model.model.vision_embed_tokens
        features = embed(self.patches(pixels, embed.weight.dtype))
        return check_features(features.split([layout.tiles for layout in layouts]), layouts)

    def image_ids(self, layout: ImageLayout) -> NDArray[np.int32]:
        rows, columns = layout.grid
        ids = np.full((rows, columns + 1), self.image_token_id, dtype=np.int32)
        ids[:, -1] = self.newline_id
        return ids.reshape(-1)

    def prompt(self, messages: Sequence[Message], layouts: Sequence[ImageLayout]) -> NDArray[np.int32]:
        if len(layouts) > 1:
            raise PromptError(f"Fuyu takes one image a row, this row has {len(layouts)}")
        self._check(messages, layouts)
        text = self.render(messages)
        if not layouts:
            ids = self._ids(text, add_special_tokens=True)
            if not len(ids):
                raise PromptError("the prompt is empty")
            return ids
        # The image's ids are made, not tokenised: the dummy prefix piece that stock drops is never there.
        text_ids = self._ids(text + BEGINNING_OF_ANSWER, add_special_tokens=False)
        bos = np.asarray([self.bos_id], dtype=np.int32)
        return np.concatenate([self.image_ids(layouts[0]), bos, text_ids])

    def render(self, messages: Sequence[Message]) -> str:
        """The turns' texts, one turn a line; without placeholders."""
        return "\n".join("".join(texts([message])) for message in messages)

    def _ids(self, text: str, add_special_tokens: bool) -> NDArray[np.int32]:
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def _layout(self, size: Size) -> ImageLayout:
        height, width = self._shrunk(size)
        grid = (-(-height // self.patch[0]), -(-width // self.patch[1]))
        patches = grid[0] * grid[1]
        return ImageLayout(size=size, grid=grid, tiles=patches, tokens=patches)

    def _shrunk(self, size: Size) -> Size:
        """`size` shrunk into `self.size`, rounded down; at least a pixel, where stock fails on 1 x 4000."""
        height, width = size
        if height <= self.size[0] and width <= self.size[1]:
            return size
        scale = min(self.size[0] / height, self.size[1] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))


def _height_width(size: dict[str, Any]) -> Size:
    return int(size["height"]), int(size["width"])
