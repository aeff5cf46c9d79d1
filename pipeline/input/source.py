"""The Ray Data source: reads the rows that remain, and nothing else.

One read task a shard. Ray's own parquet reader packs small files into one block and cannot skip rows inside a
file, so a resumed job would read (and starve its GPUs on) what is already done. A task here opens its shard,
skips row groups with nothing left to do, and streams small batches, so that its memory does not depend on the
shard's size.

Blocks leave with the user's needed columns, the row's identity, and every accepted form of the image and video
columns turned into one: `_images` and `_video`, lists of encoded files (see actors/schema.py). Frames beyond
`input.max_frames` are left out here, before they are fetched or take part in anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from actors.schema import ERROR, ERROR_TYPE, FINGERPRINT, IMAGES, READ, ROW, SHARD, VIDEO, error_value
from pipeline.input.reading import read_rows
from pipeline.input.rows import RowSet
from pipeline.input.shards import Shard
from pipeline.spec.job_spec import InputSpec
from pipeline.storage.lease import Fence
from pipeline.storage.storage import Storage

_FETCHES = 16  # concurrent downloads of images given by path; they wait on the network, not on a core


@dataclass(frozen=True, slots=True)
class ShardWork:
    """The rows of one shard that a run has to caption."""

    shard: Shard
    rows: RowSet


class ShardSource(Datasource):
    """A read task for each shard with remaining rows.

    `columns` are the user's columns to carry along. Those of `kept` (columns.job_schema) get their type there, so
    that blocks of different shards fit together. Reading ends early once the run that holds `fence` stops.
    """

    def __init__(
        self,
        work: Sequence[ShardWork],
        spec: InputSpec,
        columns: Sequence[str],
        kept: pa.Schema,
        fence: Fence | None = None,
    ) -> None:
        super().__init__()
        self.work, self.spec, self.columns, self.kept = list(work), spec, list(columns), kept
        self.fence = fence

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(item.shard.size for item in self.work)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        return [self._task(item) for item in self.work]

    def _task(self, item: ShardWork) -> ReadTask:
        # Not `self`: a task carries one shard only.
        spec, columns, kept, fence = self.spec, self.columns, self.kept, self.fence
        metadata = BlockMetadata(
            num_rows=len(item.rows), size_bytes=item.shard.size, input_files=[item.shard.url], exec_stats=None
        )
        return ReadTask(lambda: _until_stopped(read_shard(item, spec, columns, kept), fence), metadata)


def _until_stopped(tables: Iterator[pa.Table], fence: Fence | None) -> Iterator[pa.Table]:
    for table in tables:
        if fence and fence.stopping():
            yield table.slice(0, 0)  # Ray wants at least one block of a task
            return
        yield table


def read_shard(
    work: ShardWork, spec: InputSpec, columns: Sequence[str], kept: pa.Schema | None = None
) -> Iterator[pa.Table]:
    """The remaining rows of a shard, in order, in tables of at most `READ_ROWS` rows.

    Rows that cannot be read are error rows. Raises StorageError where the storage fails, not the file.
    """
    shard, beside = work.shard, Storage(work.shard.root)  # the input's root, for images given by path
    pictures = [name for name in (spec.image, spec.video) if name is not None]
    types = {field.name: field.type for field in (*shard.schema, *(kept or ()))}
    schema = pa.schema([(name, types[name]) for name in dict.fromkeys([*pictures, *columns])])
    for rows, found in read_rows(shard, work.rows, schema):
        if isinstance(found, str):
            yield _unread_block(found, shard, rows, [schema.field(name) for name in columns])
        else:
            yield _block(found, shard, rows, spec, columns, beside)


def _block(
    table: pa.Table,
    shard: Shard,
    rows: Sequence[int],
    spec: InputSpec,
    columns: Sequence[str],
    beside: Storage,
) -> pa.Table:
    count = table.num_rows
    images = table[spec.image].to_pylist() if spec.image else [[]] * count
    videos = table[spec.video].to_pylist() if spec.video else [[]] * count
    given = [
        # A null is no image only beside a video; alone it is one that is missing.
        ([] if image is None and video else _items(image), _spread(video or [], spec.max_frames))
        for image, video in zip(images, videos, strict=True)
    ]
    pictures, errors = _read(given, shard, beside)
    return _assembled({name: table[name] for name in columns}, shard, rows, pictures, errors)


def _unread_block(message: str, shard: Shard, rows: Sequence[int], columns: Sequence[pa.Field]) -> pa.Table:
    count = len(rows)
    nulls = {field.name: pa.nulls(count, field.type) for field in columns}
    return _assembled(nulls, shard, rows, [None] * count, [error_value(READ, "read", message)] * count)


def _assembled(
    block: dict[str, Any],
    shard: Shard,
    rows: Sequence[int],
    pictures: Sequence[_Pictures | None],
    errors: Sequence[dict[str, str] | None],
) -> pa.Table:
    count = len(rows)
    block[SHARD] = pa.array([shard.name] * count, pa.string())
    block[ROW] = pa.array(rows, pa.int64())
    block[FINGERPRINT] = pa.array([shard.fingerprint] * count, pa.string())
    for index, name in enumerate((IMAGES, VIDEO)):
        block[name] = pa.array([row and row[index] for row in pictures], pa.list_(pa.large_binary()))
    block[ERROR] = pa.array(errors, ERROR_TYPE)
    return pa.table(block)


class _Unreadable(Exception):
    """A picture that has no bytes; it becomes its row's error."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


_Pictures = tuple[list[Any], list[Any]]
"""A row's images and the frames of its video: as given, or their bytes."""


def _read(
    rows: Sequence[_Pictures], shard: Shard, beside: Storage
) -> tuple[list[_Pictures | None], list[dict[str, str] | None]]:
    """The encoded pictures of each row, or None with an error value for the row."""
    by_path = any(_is_path(item) for row in rows for items in row for item in items)
    with ThreadPoolExecutor(_FETCHES if by_path else 1) as pool:

        def read(row: _Pictures) -> _Pictures | _Unreadable:
            try:
                return [_encoded(item, shard, beside) for item in row[0]], _frames(row[1], shard, beside)
            except _Unreadable as error:
                return error

        results = list(pool.map(read, rows)) if by_path else [read(row) for row in rows]
    pictures = [None if isinstance(result, _Unreadable) else result for result in results]
    errors = [
        error_value(result.kind, "read", result.message) if isinstance(result, _Unreadable) else None
        for result in results
    ]
    return pictures, errors


def _spread(frames: list[Any], count: int) -> list[Any]:
    """At most `count` of a video's frames, evenly spaced from the first on, as the stock processor samples."""
    if len(frames) <= count:
        return frames
    return [frames[index * len(frames) // count] for index in range(count)]


def _items(cell: Any) -> list[Any]:
    """A cell's images: an image is bytes or a {bytes, path} struct, and a cell holds one or a list of them."""
    return cell if isinstance(cell, list) else [cell]


def _is_path(item: Any) -> bool:
    return isinstance(item, dict) and item.get("bytes") is None and bool(item.get("path"))


def _encoded(item: Any, shard: Shard, beside: Storage) -> bytes:
    if _is_path(item):
        return _fetch(item["path"], shard, beside)
    data = item.get("bytes") if isinstance(item, dict) else item
    if data is None:
        raise _Unreadable("decode", "there is no image: the cell is null")
    return bytes(data)


def _frames(items: list[Any], shard: Shard, beside: Storage) -> list[bytes]:
    frames: list[bytes] = []
    for item in items:
        try:
            frames.append(_encoded(item, shard, beside))
        except _Unreadable as error:
            message = f"frame {len(frames) + 1} of the video's {len(items)}: {error.message}"
            raise _Unreadable(error.kind, message) from None
    return frames


def _fetch(path: str, shard: Shard, beside: Storage) -> bytes:
    """Reads an image named by path, relative to its shard's folder; it must stay below the input's root."""
    folder = shard.name.rpartition("/")[0]
    try:
        return beside.read(f"{folder}/{path}" if folder else path)
    except FileNotFoundError:
        raise _Unreadable("fetch", f"image path {path!r}: no such file beside the shard") from None
    except (OSError, ValueError) as error:
        raise _Unreadable("fetch", f"image path {path!r}: {error}") from None
