"""Aria: crops of 490 or 980 px, each with a mask of its real pixels and a fixed number of queries.

A crop is resized to `side` px, padded at its bottom and right with 0, and costs what the
projector's `patch_to_query_dict` says (128 or 256 tokens), whatever it shows. The mask follows from the
layout, so it is made on the device and never shipped. Where a checkpoint splits (`split_image`), the image
is first fitted to the best of `split_resolutions` and cut; each image counts its own crops, unlike stock,
which gives every image of a batch the largest number of crops in it and then fails.

`max_image_size` and `split_image` are read from the checkpoint's image processor. The stock *processor*
overrides both by its own defaults (980, no split) unless they are passed to the call; hub checkpoints agree
with those defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from actors.families.base import Family, ImageLayout, Size, check_features, vision_dtype
from actors.families.checkpoint import Checkpoint, CheckpointError
from actors.images.anyres import best_resolution, fit
from actors.images.tiling import BICUBIC, pad_to, resize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPLIT_RATIOS = (
    *((1, columns) for columns in range(2, 9)),
    *((2, 4), (2, 3), (2, 2), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2)),
    *((rows, 1) for rows in range(5, 9)),
)
"""The default split resolutions, in units of 490 px; their order decides between equals."""


class Aria(Family):
    """`grid` is rows and columns of crops, (1, 1) where the image is not split; edge crops may be smaller."""

    name = "aria"
    image_defaults: ClassVar = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": BICUBIC,
        "max_image_size": 980,
        "min_image_size": 336,
        "split_image": False,
        "split_resolutions": [[490 * rows, 490 * columns] for rows, columns in SPLIT_RATIOS],
    }

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = checkpoint.config
        self.side = int(self.image_config["max_image_size"])
        self.min_side = int(self.image_config["min_image_size"])
        self.splits = bool(self.image_config["split_image"])
        self.resolutions: list[Size] = [(h, w) for h, w in self.image_config["split_resolutions"]]
        self.resample = int(self.image_config["resample"])
        self.tile_shape = (3, self.side, self.side)
        patches = (self.side // config.vision_config.patch_size) ** 2
        if patches not in config.projector_patch_to_query_dict:
            raise CheckpointError(
                f"{self.path}: max_image_size {self.side} makes {patches} patches a crop, but config.json's "
                f"projector_patch_to_query_dict knows only {sorted(config.projector_patch_to_query_dict)}"
            )
        self.crop_tokens = int(config.projector_patch_to_query_dict[patches])
        self.placeholder = getattr(self.tokenizer, "image_token", None) or "<|img|>"
        self.require_token(self.placeholder, "image")

    def layout(self, sizes: Sequence[Size]) -> tuple[ImageLayout, ...]:
        return tuple(self._layout(size) for size in sizes)

    def tile(self, image: Tensor, layout: ImageLayout) -> Tensor:
        if self.splits:
            canvas = self._canvas(layout.size)
            image = pad_to(resize(image, fit(layout.size, canvas), self.resample), canvas)
        crops = torch.zeros(layout.tiles, *self.tile_shape, dtype=torch.uint8)
        for crop, (top, left, height, width) in zip(crops, self._crops(layout), strict=True):
            content = image[:, top : top + height, left : left + width]
            height, width = self._content((height, width))
            crop[:, :height, :width] = resize(content, (height, width), self.resample)
        return crops

    def model_inputs(self, pixels: Tensor, layouts: Sequence[ImageLayout]) -> dict[str, Tensor]:
        return {"pixel_values": self.normalize(pixels), "pixel_mask": self.pixel_mask(layouts, pixels.device)}

    def pixel_mask(self, layouts: Sequence[ImageLayout], device: torch.device) -> Tensor:
        """bool `[sum of tiles, side, side]` on `device`: True where a crop has content."""
        contents = [self._content(crop[2:]) for layout in layouts for crop in self._crops(layout)]
        heights, widths = torch.tensor(contents, device=device).unbind(1)
        at = torch.arange(self.side, device=device)
        return (at < heights[:, None])[:, :, None] & (at < widths[:, None])[:, None, :]

    def embed_images(
        self, model: PreTrainedModel, pixels: Tensor, layouts: Sequence[ImageLayout]
    ) -> list[Tensor]:
        features = model.model.get_image_features(
            pixel_values=self.normalize(pixels, vision_dtype(model)),
            pixel_mask=self.pixel_mask(layouts, pixels.device),
            vision_feature_layer=model.config.vision_feature_layer,
            return_dict=True,
        ).pooler_output  # [sum of tiles, queries, D]
        images = features.split([layout.tiles for layout in layouts])
        return check_features([image.flatten(0, 1) for image in images], layouts)

    def _layout(self, size: Size) -> ImageLayout:
        height, width = self._canvas(size) if self.splits else (self.side, self.side)
        grid = (-(-height // self.side), -(-width // self.side))
        tiles = grid[0] * grid[1]
        return ImageLayout(size=size, grid=grid, tiles=tiles, tokens=tiles * self.crop_tokens)

    def _canvas(self, size: Size) -> Size:
        return best_resolution(size, self.resolutions)

    def _crops(self, layout: ImageLayout) -> Iterator[tuple[int, int, int, int]]:
        """(top, left, height, width) of each crop, row by row, in the canvas (or in the whole image)."""
        if not self.splits:
            yield (0, 0, *layout.size)
            return
        height, width = self._canvas(layout.size)
        for top in range(0, height, self.side):
            for left in range(0, width, self.side):
                yield top, left, min(self.side, height - top), min(self.side, width - left)

    def _content(self, size: Size) -> Size:
        """(height, width) of a crop's content: its long side fills the crop, its short side has a minimum."""
        height, width = size
        scale = self.side / max(height, width)
        if width >= height:
            return max(int(height * scale), self.min_side), self.side
        return self.side, max(int(width * scale), self.min_side)
