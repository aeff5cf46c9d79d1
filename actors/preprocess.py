"""Preprocess: a CPU actor that turns encoded images and prompts into tiles and token ids.

It holds a `Family` (tokenizer and processor config, no weights) and maps one block to one block. Whatever goes
wrong with a row is written into that row's `error` column; the block always comes out whole, even when a row of it
kills the process (see actors/attempts.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actors.attempts import Attempts, Guard, Unwatched
from actors.errors import RowError
from actors.families import load_family
from actors.families.base import Size, VideoSize
from actors.families.messages import Kind, Message, slots, text_message
from actors.images.decode import decode
from actors.images.formats import DEFAULT_FORMATS
from actors.schema import (
    ERROR,
    ERROR_TYPE,
    IDENTITY,
    IMAGES,
    PIXELS,
    SIZES,
    TOKEN_IDS,
    VIDEO,
    error_value,
)


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """What a Preprocess actor is built from: a checkpoint, how a row becomes a prompt, and limits.

    Attributes:
        prompt_column: Column with each row's prompt (text or a list of chat messages); None: use `template`.
        template: Without a prompt column: a prompt in which {column} is filled from the row.
        template_columns: The columns that `template` names.
        keep: Input columns that travel on to the output.
        max_pixels: Largest image, height x width, that is decoded.
        max_new_tokens: Room that the caption needs behind the prompt.
        formats: Image formats that are decoded (names of images/formats.py).
    """

    model_path: str
    revision: str | None
    prompt_column: str | None
    template: str
    template_columns: tuple[str, ...]
    system: str | None
    keep: tuple[str, ...]
    max_pixels: int
    max_new_tokens: int
    formats: tuple[str, ...] = DEFAULT_FORMATS

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The input columns a prompt is made from."""
        return (self.prompt_column,) if self.prompt_column else self.template_columns


@dataclass(frozen=True, slots=True)
class _Prepared:
    token_ids: np.ndarray
    pixels: np.ndarray
    sizes: list[Size | VideoSize]


@dataclass(frozen=True, slots=True)
class _Video:
    tiles: torch.Tensor
    size: VideoSize


_UNWATCHED = Unwatched("preprocess")


class Preprocess:
    """Maps a block of the source's columns to a block for `Generate` (the columns: actors/schema.py)."""

    def __init__(self, config: PreprocessConfig, attempts: Attempts = _UNWATCHED) -> None:
        self._guard = Guard(attempts)  # first, so that a death while loading counts as one
        # One replica, one core: parallelism comes from replicas, and more threads would only fight over cores.
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.config = config
        self.family = load_family(config.model_path, config.revision)

    def __call__(self, block: pa.Table) -> pa.Table:
        return self._guard.run(block, self._preprocess)

    def _preprocess(self, block: pa.Table) -> pa.Table:
        columns = {name: block[name] for name in self.config.prompt_columns}
        images, videos, errors = block[IMAGES], block[VIDEO], block[ERROR].to_pylist()
        rows: list[_Prepared | None] = []
        for index in range(block.num_rows):
            prepared = None
            if errors[index] is None:
                try:
                    # Here, because a damaged date may be none that Python knows.
                    row = {name: column[index].as_py() for name, column in columns.items()}
                    prepared = self._prepare(_buffers(images[index]), _buffers(videos[index]), row)
                except RowError as error:
                    errors[index] = error_value(error.kind, "preprocess", error.message)
                # Nobody's fault that we know of: the other rows go on all the same
                except Exception as error:
                    errors[index] = error_value("crash", "preprocess", f"{type(error).__name__}: {error}")
            rows.append(prepared)
        return self._assemble(block, rows, errors)

    def _prepare(
        self, images: Sequence[pa.Buffer], frames: Sequence[pa.Buffer], row: Mapping[str, Any]
    ) -> _Prepared:
        # The prompt first: it is cheap, and a row without one is not worth decoding.
        messages = self._messages(row, len(images), 1 if frames else 0)
        pictures = [self._decode(image) for image in images]
        sizes: list[Size | VideoSize] = [(picture.shape[1], picture.shape[2]) for picture in pictures]
        video = self._video(frames) if frames else None
        if video is not None:
            sizes.append(video.size)
        layouts = self.family.row_layouts(sizes)
        token_ids = self.family.prompt(messages, layouts)
        room = self.family.max_positions
        if len(token_ids) + self.config.max_new_tokens > room:
            raise RowError(
                "too_long",
                f"{len(token_ids)} prompt tokens and max_new_tokens={self.config.max_new_tokens} exceed the "
                f"model's {room} positions",
            )
        tiles = [self.family.tile(*pair) for pair in zip(pictures, layouts, strict=False)]
        if video is not None:
            tiles.append(video.tiles)
        order = self.family.appearance(token_ids, layouts)
        pixels = np.empty((0, *self.family.tile_shape), np.uint8)
        if tiles:
            pixels = torch.cat([tiles[index] for index in order]).numpy()
        return _Prepared(token_ids, pixels, [sizes[index] for index in order])

    def _decode(self, image: pa.Buffer) -> torch.Tensor:
        return decode(image.to_pybytes(), self.config.max_pixels, self.config.formats)

    def _video(self, frames: Sequence[pa.Buffer]) -> _Video:
        tiles: list[torch.Tensor] = []
        size: Size | None = None
        for number, frame in enumerate(frames, start=1):
            try:
                picture = self._decode(frame)
            except RowError as error:
                message = f"frame {number} of the video's {len(frames)}: {error.message}"
                raise RowError(error.kind, message) from error
            size = size or (picture.shape[1], picture.shape[2])
            tiles.append(self.family.tile_frame(picture))  # at once: a tile is small, a frame need not be
        assert size is not None
        return _Video(torch.stack(tiles), (len(tiles), *size))

    def _messages(self, row: Mapping[str, Any], images: int, videos: int) -> list[Message]:
        column = self.config.prompt_column
        prompt = row[column] if column else self._fill_template(row)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not prompt:
            found = "null" if prompt is None else "empty"
            raise RowError(
                "prompt", f"input.prompt: column {column!r} holds no prompt in this row (it is {found})"
            )
        messages = [_message(turn) for turn in prompt]
        if self.config.system is not None:
            messages.insert(0, text_message("system", self.config.system))
        counts: tuple[tuple[Kind, int], ...] = (("video", videos), ("image", images))
        for kind, count in counts:
            if count and not slots(messages, kind):
                _place(messages, kind, count)
        return messages

    def _fill_template(self, row: Mapping[str, Any]) -> str:
        for name in row:
            if row[name] is None:
                raise RowError("prompt", f"prompt.template needs column {name!r}, which is null in this row")
        return self.config.template.format_map(row)

    def _assemble(self, block: pa.Table, rows: Sequence[_Prepared | None], errors: list[Any]) -> pa.Table:
        columns = {name: block[name] for name in (*self.config.keep, *IDENTITY)}
        columns[TOKEN_IDS] = pa.array([row and row.token_ids for row in rows], pa.list_(pa.int32()))
        # A buffer per row, one copy into the column: pixels are by far most of the bytes that flow.
        columns[PIXELS] = pa.array([row and row.pixels.reshape(-1).data for row in rows], pa.large_binary())
        columns[SIZES] = pa.array([row and row.sizes for row in rows], pa.list_(pa.list_(pa.int32())))
        columns[ERROR] = pa.array(errors, ERROR_TYPE)
        return pa.table(columns)


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn or turn.get("content") is None:
        raise RowError("prompt", f"a chat message needs role and content, found {turn!r:.200}")
    if isinstance(turn["content"], str):
        return text_message(turn["role"], turn["content"])
    parts = [{key: value for key, value in part.items() if value is not None} for part in turn["content"]]
    return {"role": turn["role"], "content": parts}


def _place(messages: list[Message], kind: Kind, count: int) -> None:
    """Puts the row's pictures of a kind before the first user turn's text, where no turn says their places."""
    for index, message in enumerate(messages):
        if message["role"] == "user":
            messages[index] = {**message, "content": [*[{"type": kind}] * count, *message["content"]]}
            return
    raise RowError("prompt", f"the chat has {kind}s but no user turn to show them in")


def _buffers(cell: pa.ListScalar) -> list[pa.Buffer]:
    return [item.as_buffer() for item in cell] if cell.is_valid else []
