"""Aya Vision (8B / 32B).

Each image is squashed onto the grid of tiles (at most `max_patches`) whose aspect ratio is nearest, cut, and
followed by a thumbnail of the whole, unless the grid is one tile. In the prompt an image reads
START, then TILE_1 and its placeholders, TILE_2 ..., TILE_GLOBAL and the thumbnail's, then END.

`layout.grid` is (rows, columns); (1, 1) means the whole image in one tile, without a thumbnail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.families.base import Family, ImageLayout, Size, check_features, vision_dtype
from actors.families.checkpoint import Checkpoint, CheckpointError, square_side
from actors.images import tiling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AyaVision(Family):
    """Tiles by nearest aspect ratio, a thumbnail, and marker tokens between them."""

    name = "aya_vision"
    image_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": tiling.BICUBIC,
            "size": {"height": 384, "width": 384},
            "min_patches": 1,
            "max_patches": 12,
        }
    )

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        processor, config = checkpoint.processor, self.image_config
        if not config.get("do_resize", True):
            raise CheckpointError(f"{self.path}: do_resize=false is not supported")
        self._side = square_side(config["size"])
        self.tile_shape = (3, self._side, self._side)
        self._resample = int(config["resample"])
        self._grids = _grids(int(config["min_patches"]), int(config["max_patches"]))

        patch = int(processor.get("patch_size") or 28) * int(processor.get("downsample_factor") or 1)
        self._tile_tokens = (int(processor.get("img_size") or 364) // patch) ** 2

        self.placeholder = processor.get("image_token") or "<image>"
        self._start = processor.get("start_of_img_token") or "<|START_OF_IMG|>"
        self._end = processor.get("end_of_img_token") or "<|END_OF_IMG|>"
        self._patch = processor.get("img_patch_token") or "<|IMG_PATCH|>"
        self.require_token(self._patch, "image")
        tile = processor.get("tile_token") or "TILE"
        self._markers = self._marker_ids(
            [f"{tile}_{index}" for index in range(1, max(map(_area, self._grids)) + 1)],
            processor.get("tile_global_token") or "TILE_GLOBAL",
        )
        """int32 marker ids of TILE_1, TILE_2, ..., and of TILE_GLOBAL last."""

    @property
    def anchor(self) -> str:
        # With START and END around it the borders to the user's text tokenise as in the expanded text.
        return f"{self._start}{self._patch}{self._end}"

    @property
    def reserved(self) -> tuple[str, ...]:
        return (self.placeholder, self._patch)

    def layout(self, sizes: Sequence[Size]) -> tuple[ImageLayout, ...]:
        return tuple(self._layout(size) for size in sizes)

    def tile(self, image: Tensor, layout: ImageLayout) -> Tensor:
        tile = (self._side, self._side)
        rows, columns = layout.grid
        canvas = tiling.resize(image, (rows * self._side, columns * self._side), self._resample)
        tiles = tiling.split(canvas, tile)
        if layout.tiles == 1:
            return tiles
        return torch.cat([tiles, tiling.resize(image, tile, self._resample)[None]])

    def image_ids(self, layout: ImageLayout) -> NDArray[np.int32]:
        patches = np.full(self._tile_tokens, self.image_token_id, dtype=np.int32)
        markers = [*self._markers[: layout.tiles - 1], self._markers[-1]]
        return np.concatenate([part for marker in markers for part in (marker, patches)])

    def model_inputs(self, pixels: Tensor, layouts: Sequence[ImageLayout]) -> dict[str, Tensor]:
        return {"pixel_values": self.normalize(pixels)}

    def embed_images(
        self, model: PreTrainedModel, pixels: Tensor, layouts: Sequence[ImageLayout]
    ) -> list[Tensor]:
        values = self.normalize(pixels, vision_dtype(model))
        features = model.get_image_features(pixel_values=values).pooler_output  # [tiles, tokens, D]
        images = features.split([layout.tiles for layout in layouts])
        return check_features([image.flatten(0, 1) for image in images], layouts)

    def _layout(self, size: Size) -> ImageLayout:
        rows, columns = _nearest_grid(size, self._side, self._grids)
        tiles = rows * columns + (rows * columns > 1)  # + the thumbnail
        return ImageLayout(size, (rows, columns), tiles, tiles * self._tile_tokens)

    def _marker_ids(self, tiles: Sequence[str], whole: str) -> list[NDArray[np.int32]]:
        """Ids of each marker where it stands: between START or a placeholder and a placeholder.

        A marker such as TILE_1 may be several ids. They are the same in every prompt only if START, END and
        the placeholder cut the text; the check at the end refuses a tokenizer where they do not.
        """
        text = self._start + "".join(marker + self._patch for marker in (*tiles, whole)) + self._end
        ids = self._ids(text)
        start = self._ids(self._start + self._patch)[:-1]
        cuts = np.flatnonzero(ids == self.image_token_id)
        if len(cuts) != len(tiles) + 1 or not np.array_equal(ids[: len(start)], start):
            raise CheckpointError(f"{self.path}: {self._start!r} and {self._patch!r} must be special tokens")
        begins = [len(start), *(int(cut) + 1 for cut in cuts[:-1])]
        markers = [ids[begin:cut] for begin, cut in zip(begins, cuts, strict=True)]
        alone = np.concatenate([start, markers[-1], ids[cuts[-1] :]])
        if not np.array_equal(alone, self._ids(self._start + whole + self._patch + self._end)):
            raise CheckpointError(f"{self.path}: the ids of {whole!r} depend on the text around it")
        return markers

    def _ids(self, text: str) -> NDArray[np.int32]:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def _grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """All (rows, columns) of `min_tiles` to `max_tiles` tiles, fewest tiles first, then fewest columns."""
    sides = range(1, max_tiles + 1)
    grids = [
        (rows, columns) for columns in sides for rows in sides if min_tiles <= rows * columns <= max_tiles
    ]
    return sorted(grids, key=_area)


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _nearest_grid(size: Size, side: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid of nearest aspect ratio; of equals the largest that the image more than half fills."""
    height, width = size
    best, least = (1, 1), float("inf")
    for grid in grids:
        rows, columns = grid
        distance = abs(width / height - columns / rows)
        if distance < least:
            best, least = grid, distance
        elif distance == least and height * width > 0.5 * side * side * rows * columns:
            best = grid
    return best
