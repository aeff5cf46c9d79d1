"""LLaVA-OneVision (0.5B / 7B / 72B, si and ov).

A row with one image is cut into anyres tiles: the image is fitted into the best of the checkpoint's grid
pinpoints, padded with black, cut into tiles, and preceded by a squashed view of the whole. The model crops
padding off the feature map ("unpad"), shrinks it where it exceeds `anyres_max_N` tiles, and ends each of its
rows with a newline feature. A row with several images takes one tile each, padded to a square.

A video is a list of frames, a tile each, squashed to the tile's shape. The model pools a frame's features to
half the rows and columns and puts one newline feature behind the last frame. Since frames are encoded each by
itself, videos of any lengths share a call.

`layout.grid` is (rows, columns) of tiles beside the whole view; (0, 0) marks one of several images in a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from actors.errors import RowError
from actors.families.base import Family, ImageLayout, Size, VideoSize, check_features, vision_dtype
from actors.families.checkpoint import Checkpoint, CheckpointError, square_side
from actors.families.messages import user_message
from actors.images import tiling
from actors.images.anyres import best_resolution, fit
from actors.images.normalize import PixelTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MULTI: tuple[int, int] = (0, 0)
"""`layout.grid` of an image that shares its row with others."""
_MAX_SQUARE_SIDE = 32768
"""A multi-image image is padded to a square first; above this side that takes more than 3 GiB."""
_SIDES = range(384, 2304 + 1, 384)
_VIDEO_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": tiling.BICUBIC,
        "size": {"height": 384, "width": 384},
    }
)
"""The stock video processor's defaults, for fields that the checkpoint omits or sets to null."""
_FRAMES_AT_ONCE = 32
"""Frames that go through the vision tower together: a long video needs no more memory than a short one."""


class LlavaOnevision(Family):
    """anyres tiling of one image, one tile each of several, one tile a frame of a video."""

    name = "llava_onevision"
    image_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **_VIDEO_DEFAULTS,
            "image_grid_pinpoints": [list(pair) for pair in product(_SIDES, _SIDES)],
        }
    )

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        processor, config = checkpoint.processor, self.image_config
        if not config.get("do_resize", True) or config.get("do_center_crop", False):
            raise CheckpointError(f"{self.path}: do_resize=false and do_center_crop=true are not supported")
        self._side = square_side(config["size"])
        self.tile_shape = (3, self._side, self._side)
        self._resample = int(config["resample"])
        self._pinpoints = [(int(height), int(width)) for height, width in config["image_grid_pinpoints"]]
        if any(height % self._side or width % self._side for height, width in self._pinpoints):
            raise CheckpointError(
                f"{self.path}: grid pinpoints must be multiples of the tile side {self._side}"
            )
        red, green, blue = (int(mean * 255) for mean in config["image_mean"])
        self._background = (red, green, blue)

        vision = checkpoint.config.vision_config
        self._tile_tokens = int(
            processor.get("num_image_tokens") or (vision.image_size // vision.patch_size) ** 2
        )
        # The "default" strategy drops one feature (CLS) an image.
        self._dropped = int(processor.get("vision_feature_select_strategy") == "default")
        aspect = processor.get("vision_aspect_ratio") or "anyres_max_9"
        if not aspect.removeprefix("anyres_max_").isdigit():
            raise CheckpointError(f"{self.path}: vision_aspect_ratio={aspect!r} is not anyres_max_<tiles>")
        self._max_tiles = int(aspect.removeprefix("anyres_max_"))

        tokenizer = self.tokenizer
        self.placeholder = (
            getattr(tokenizer, "image_token", None) or processor.get("image_token") or "<image>"
        )
        self.video_placeholder = (
            getattr(tokenizer, "video_token", None) or processor.get("video_token") or "<video>"
        )
        self.require_token(self.placeholder, "image")
        self.video_token_id = int(checkpoint.config.video_token_id)
        given = {key: value for key, value in checkpoint.video_processor.items() if value is not None}
        self.video_config: dict[str, Any] = {**_VIDEO_DEFAULTS, **given}
        self.normalize_frames = PixelTable.of(self.video_config)
        """As `normalize`, of a video's frames: the checkpoint may give them figures of their own."""
        side = vision.image_size // vision.patch_size
        self._frame_tokens = math.ceil(side / 2) ** 2

    def check_videos(self) -> None:
        config = self.video_config
        if not config.get("do_resize", True) or config.get("do_center_crop", False):
            raise CheckpointError(
                f"{self.path}: its video processor has do_resize=false or do_center_crop=true, which are not "
                "supported"
            )
        if square_side(config["size"]) != self._side:
            raise CheckpointError(
                f"{self.path}: frames of {square_side(config['size'])} px beside tiles of {self._side} px"
            )
        if self._dropped:
            raise CheckpointError(
                f"{self.path}: the model cannot pool the frames of videos under the feature strategy 'default'"
            )
        token = str(self.video_placeholder)
        self.require_token(token, "video")
        if self.render([user_message("", videos=1)]).count(token) != 1:
            raise CheckpointError(f"{self.path}: its chat template writes no {token} for a video")

    def layout(self, sizes: Sequence[Size]) -> tuple[ImageLayout, ...]:
        if len(sizes) == 1:
            return (self._anyres(sizes[0]),)
        for height, width in sizes:
            if max(height, width) > _MAX_SQUARE_SIDE:
                raise RowError(
                    "too_large",
                    f"the image is {height} x {width}: in a row of several images it would be padded to a "
                    f"square, whose side must not exceed {_MAX_SQUARE_SIDE}",
                )
        tokens = self._tile_tokens + 1 - self._dropped  # + the newline feature
        return tuple(ImageLayout(size, MULTI, 1, tokens) for size in sizes)

    def tile(self, image: Tensor, layout: ImageLayout) -> Tensor:
        tile = (self._side, self._side)
        if layout.grid == MULTI:
            longest = max(layout.size)
            square = tiling.pad_to(image, (longest, longest), self._background)
            return tiling.resize(square, tile, self._resample)[None]
        target = (layout.grid[0] * self._side, layout.grid[1] * self._side)
        fitted = tiling.resize(image, fit(layout.size, target), self._resample)
        whole = tiling.resize(image, tile, self._resample)
        return torch.cat([whole[None], tiling.split(tiling.pad_to(fitted, target), tile)])

    def layout_video(self, size: VideoSize) -> ImageLayout:
        frames, height, width = size
        tokens = frames * self._frame_tokens + 1  # + the newline feature
        return ImageLayout((height, width), (1, 1), frames, tokens, frames)

    def tile_frame(self, frame: Tensor) -> Tensor:
        return tiling.resize(frame, (self._side, self._side), int(self.video_config["resample"]))

    def model_inputs(self, pixels: Tensor, layouts: Sequence[ImageLayout]) -> dict[str, Tensor]:
        tiles = pixels.split([layout.tiles for layout in layouts])
        inputs: dict[str, Tensor] = {}
        images = [index for index, layout in enumerate(layouts) if not layout.frames]
        if images:
            inputs["pixel_values"] = pad_sequence(
                [self.normalize(tiles[index]) for index in images], batch_first=True
            )
            inputs["image_sizes"] = _sizes([layouts[index] for index in images])
            inputs["batch_num_images"] = torch.tensor([len(images)])
        videos = [tile for tile, layout in zip(tiles, layouts, strict=True) if layout.frames]
        if videos:  # stock has no way to say videos of different lengths: stack refuses them
            inputs["pixel_values_videos"] = self.normalize_frames(torch.stack(videos))
        return inputs

    def embed_images(
        self, model: PreTrainedModel, pixels: Tensor, layouts: Sequence[ImageLayout]
    ) -> list[Tensor]:
        tiles = pixels.split([layout.tiles for layout in layouts])
        features: dict[int, Tensor] = {}
        # The model tells anyres images from multi-image ones by the images of a row: one call for each kind.
        for multi in (False, True):
            chosen = [
                index
                for index, layout in enumerate(layouts)
                if not layout.frames and (layout.grid == MULTI) == multi
            ]
            if not chosen:
                continue
            # Any count but 1 means "multi-image", also where a single one of a row is encoded here.
            counts = [max(2, len(chosen))] if multi else [1] * len(chosen)
            encoded = model.get_image_features(
                pixel_values=self.normalize(
                    torch.cat([tiles[index] for index in chosen]), vision_dtype(model)
                ),
                # On the host: the model asks for each by itself, and would wait for the device each time
                image_sizes=_sizes([layouts[index] for index in chosen]),
                batch_num_images=torch.tensor(counts),
            ).pooler_output
            features |= dict(zip(chosen, encoded, strict=True))
        videos = [index for index, layout in enumerate(layouts) if layout.frames]
        if videos:
            encoded = self._embed_videos(model, [tiles[index] for index in videos])
            features |= dict(zip(videos, encoded, strict=True))
        return check_features([features[index] for index in range(len(layouts))], layouts)

    def _embed_videos(self, model: PreTrainedModel, videos: Sequence[Tensor]) -> list[Tensor]:
        """uint8 `[frames, *tile_shape]` of each video -> its `[tokens, D]`.

        Each frame goes to the model as a video of its own: a video is its frames' features and one newline, whatever
        the lengths of the others. Releases of transformers differ in the argument's name and in whether the newline
        comes with the features, so neither is relied upon.
        """
        encoded = torch.cat(
            [
                model.get_video_features(
                    self.normalize_frames(frames, vision_dtype(model))[:, None]
                ).pooler_output[:, : self._frame_tokens]
                for frames in torch.cat(list(videos)).split(_FRAMES_AT_ONCE)
            ]
        )
        newline = model.model.image_newline[None].to(encoded)
        return [
            torch.cat([frames.flatten(0, 1), newline])
            for frames in encoded.split([len(video) for video in videos])
        ]

    def _anyres(self, size: Size) -> ImageLayout:
        height, width = best_resolution(size, self._pinpoints)
        rows, columns = height // self._side, width // self._side
        feature_rows, feature_columns = self._feature_map(size, (rows, columns))
        newlines = feature_rows
        tokens = self._tile_tokens + feature_rows * feature_columns + newlines - self._dropped
        return ImageLayout(size, (rows, columns), 1 + rows * columns, tokens)

    def _feature_map(self, size: Size, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of features left of a grid of tiles, after unpadding and the anyres_max shrink.

        The roundings are the model's (`unpad_image` and `pack_image_features` of LLaVA-OneVision).
        """
        side = math.isqrt(self._tile_tokens)
        rows, columns = grid[0] * side, grid[1] * side
        height, width = size
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        ratio = math.sqrt(rows * columns / (self._max_tiles * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return rows, columns


def _sizes(layouts: Sequence[ImageLayout]) -> Tensor:
    return torch.tensor([layout.size for layout in layouts], dtype=torch.long)
