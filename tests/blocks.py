"""Blocks as they travel between the stages, built by hand."""

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from actors.engine import Sampling
from actors.generate import GenerateConfig
from actors.preprocess import PreprocessConfig
from actors.schema import ERROR, ERROR_TYPE, FINGERPRINT, IMAGES, ROW, SHARD, VIDEO


def picture(width: int = 60, height: int = 50, color: str = "red") -> bytes:
    """A PNG of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def scan_bomb(scans: int, side: int = 64) -> bytes:
    """A valid progressive JPEG of so many scans: its last one, of a few bytes, again and again."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "teal").save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + data[-2:]


def source_block(
    images: Sequence[Sequence[bytes] | None],
    errors: Sequence[dict[str, str] | None] | None = None,
    videos: Sequence[Sequence[bytes] | None] | None = None,
    **columns: Any,
) -> pa.Table:
    """What the source gives Preprocess: images and frames of each row, and user columns by name."""
    count = len(images)
    return pa.table(
        {
            **columns,
            SHARD: pa.array(["a.parquet"] * count),
            ROW: pa.array(range(count), pa.int64()),
            FINGERPRINT: pa.array(["f"] * count),
            IMAGES: pa.array(images, pa.list_(pa.large_binary())),
            VIDEO: pa.array(videos or [[]] * count, pa.list_(pa.large_binary())),
            ERROR: pa.array(errors or [None] * count, ERROR_TYPE),
        }
    )


def preprocess_config(model_path: str, **changes: Any) -> PreprocessConfig:
    settings: dict[str, Any] = {
        "revision": None,
        "prompt_column": "prompt",
        "template": "Describe the image.",
        "template_columns": (),
        "system": None,
        "keep": ("id",),
        "max_pixels": 10_000,
        "max_new_tokens": 8,
    }
    return PreprocessConfig(model_path=model_path, **{**settings, **changes})


def generate_config(model_path: str, **sampling: Any) -> GenerateConfig:
    return GenerateConfig(
        model_path=model_path,
        revision=None,
        dtype="auto",
        engine="reference",
        sampling=Sampling(**{"max_new_tokens": 8, **sampling}),
        keep=("id",),
    )
