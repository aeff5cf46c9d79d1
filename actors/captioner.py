"""A captioner in your own process: the stages of a job without Ray, parquet or an output, for trying things out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.engine import EngineName, Sampling
from actors.generate import Generate, GenerateConfig
from actors.images.formats import DEFAULT_FORMATS
from actors.preprocess import Preprocess, PreprocessConfig
from actors.schema import ERROR, ERROR_TYPE, FINGERPRINT, IMAGES, ROW, SHARD, VIDEO

_PROMPT = "prompt"
_MAX_PIXELS = 178_956_970  # as in a job spec's limits

Image = bytes | str | Path
Prompt = str | Sequence[Mapping[str, Any]]


class Captioner:
    """Captions images with the checkpoint at `path`, a local folder or a hub id.

    `max_pixels` and `formats` are those of a job spec's limits; `sampling` are fields of `Sampling`, for instance
    `max_new_tokens=64`. Raises CheckpointError for a checkpoint that cannot be used.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        engine: EngineName = "continuous",
        system: str | None = None,
        max_pixels: int = _MAX_PIXELS,
        formats: Sequence[str] = DEFAULT_FORMATS,
        **sampling: Any,
    ) -> None:
        settings = Sampling(**sampling)
        self._preprocess = Preprocess(
            PreprocessConfig(
                model_path=path,
                revision=revision,
                prompt_column=_PROMPT,
                template="",
                template_columns=(),
                system=system,
                keep=(),
                max_pixels=max_pixels,
                max_new_tokens=settings.max_new_tokens,
                formats=tuple(formats),
            )
        )
        self._generate = Generate(GenerateConfig(path, revision, dtype, engine, settings, keep=()))

    def __call__(
        self, images: Iterable[Image | Sequence[Image]], prompt: Prompt | Sequence[Prompt]
    ) -> list[dict[str, Any]]:
        """A row of result columns for each of `images`: `caption`, `error` and so on, as in a job's output.

        An image is the bytes of a file, or its path; several for one caption are a list. `prompt`, a text or a chat as
        a list of {role, content}, is for all of them, or a list of prompts has one for each.
        """
        rows = [[_encoded(image) for image in _several(each)] for each in images]
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], Mapping))
        prompts = [prompt] * len(rows) if one else list(prompt)
        if len(prompts) != len(rows):
            raise ValueError(
                f"{len(rows)} images and {len(prompts)} prompts: give one prompt, or one for each"
            )
        block = pa.table(
            {
                _PROMPT: pa.array(prompts),
                SHARD: pa.array([""] * len(rows), pa.string()),
                ROW: pa.array(range(len(rows)), pa.int64()),
                FINGERPRINT: pa.array([""] * len(rows), pa.string()),
                IMAGES: pa.array(rows, pa.list_(pa.large_binary())),
                VIDEO: pa.array([[]] * len(rows), pa.list_(pa.large_binary())),
                ERROR: pa.array([None] * len(rows), ERROR_TYPE),
            }
        )
        results: list[dict[str, Any]] = (
            self._generate(self._preprocess(block)).drop_columns([SHARD, ROW, FINGERPRINT]).to_pylist()
        )
        return results


def _several(images: Image | Sequence[Image]) -> Sequence[Image]:
    return [images] if isinstance(images, bytes | str | Path) else images


def _encoded(image: Image) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()
