"""The Ray Data source: reads the rows that remain, and nothing else.

One read task a shard. Ray's own parquet reader packs small files into one block and cannot skip rows inside a
file, so a resumed job would read (and starve its GPUs on) what is already done. A task here opens its shard,
skips row groups with nothing left to do, and streams small batches, so that its memory does not depend on the
shard's size. Tables are cut by bytes as well as by rows: large pictures, in cells or by path, make small tables.

Blocks leave with the user's needed columns, the row's identity, and every accepted form of the image and video
columns turned into one: `_images` and `_video`, lists of encoded files (see actors/schema.py). Frames beyond
`input.max_frames` are left out here, before they are fetched or take part in anything; pictures above
`limits.max_image_bytes` are told from their size, before they are read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from actors.schema import ERROR, ERROR_TYPE, FINGERPRINT, IMAGES, READ, ROW, SHARD, VIDEO, error_value
from pipeline.input.reading import READ_BYTES, read_rows
from pipeline.input.rows import RowSet
from pipeline.input.shards import Shard
from pipeline.spec.job_spec import InputSpec, JobSpec
from pipeline.spec.secrets import redacted
from pipeline.storage.lease import Fence
from pipeline.storage.storage import Storage, StoragePathError

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
        spec: JobSpec,
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
    work: ShardWork, spec: JobSpec, columns: Sequence[str], kept: pa.Schema | None = None
) -> Iterator[pa.Table]:
    """The remaining rows of a shard, in order, in tables of at most `READ_ROWS` rows.

    Rows that cannot be read are error rows. Raises StorageError where the storage fails, not the file.
    """
    shard, beside = work.shard, Storage(work.shard.root)  # the input's root, for images given by path
    pictures = [name for name in (spec.input.image, spec.input.video) if name is not None]
    types = {field.name: field.type for field in (*shard.schema, *(kept or ()))}
    schema = pa.schema([(name, types[name]) for name in dict.fromkeys([*pictures, *columns])])
    for rows, found in read_rows(shard, work.rows, schema):
        if isinstance(found, str):
            yield _unread_block(found, shard, rows, [schema.field(name) for name in columns])
        else:
            yield from _blocks(found, shard, rows, spec, columns, beside)


def _blocks(
    table: pa.Table,
    shard: Shard,
    rows: Sequence[int],
    spec: JobSpec,
    columns: Sequence[str],
    beside: Storage,
) -> Iterator[pa.Table]:
    """The rows with their pictures; so many at once that pictures by path are about `READ_BYTES`."""
    given = _given(table, spec.input)
    table = table.select(columns)
    reader = _PictureReader(shard, beside, spec.limits.max_image_bytes)
    with ThreadPoolExecutor(_FETCHES if any(map(_by_path, given)) else 1) as pool:
        found = list(pool.map(reader.find, given))
        del given
        for start, stop in _cuts(
            [0 if isinstance(row, _Unreadable) else _bytes_by_path(row) for row in found]
        ):
            results = list(pool.map(reader.read, found[start:stop]))
            pictures = [None if isinstance(result, _Unreadable) else result for result in results]
            errors = [
                error_value(result.kind, "read", result.message) if isinstance(result, _Unreadable) else None
                for result in results
            ]
            part = table.slice(start, stop - start)
            block = {name: part[name] for name in columns}
            yield _assembled(block, shard, rows[start:stop], pictures, errors)


def _given(table: pa.Table, spec: InputSpec) -> list[_Pictures]:
    """Each row's pictures as its cells hold them."""
    nothing: list[list[Any]] = [[]] * table.num_rows
    images = table[spec.image].to_pylist() if spec.image else nothing
    videos = table[spec.video].to_pylist() if spec.video else nothing
    return [
        # A null is no image only beside a video; alone it is one that is missing.
        ([] if image is None and video else _items(image), _spread(video or [], spec.max_frames))
        for image, video in zip(images, videos, strict=True)
    ]


def _cuts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each of about `READ_BYTES` at most or of a single row.

    >>> list(_cuts([READ_BYTES, 1, 1, 2 * READ_BYTES]))
    [(0, 1), (1, 3), (3, 4)]
    """
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > READ_BYTES:
            yield start, index
            start, total = index, 0
        total += size
    yield start, len(sizes)


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


@dataclass(frozen=True, slots=True)
class _File:
    """A picture that lies beside the shard: its path below the input's root, as the cell has it, and its bytes."""

    path: str
    named: str
    size: int


_Pictures = tuple[list[Any], list[Any]]
"""A row's images and the frames of its video: as given, found (bytes or a `_File`), or read."""


@dataclass(frozen=True, slots=True)
class _PictureReader:
    """Turns pictures as cells hold them into encoded files, in two steps: their sizes first, then their bytes."""

    shard: Shard
    beside: Storage
    max_bytes: int

    def find(self, row: _Pictures) -> _Pictures | _Unreadable:
        """Each picture's bytes, or the `_File` that has them."""
        return _each(row, self._find)

    def read(self, row: _Pictures | _Unreadable) -> _Pictures | _Unreadable:
        """Each picture's bytes."""
        return row if isinstance(row, _Unreadable) else _each(row, self._read)

    def _find(self, item: Any) -> bytes | _File:
        if _is_path(item):
            found: bytes | _File = self._look_up(item["path"])
        else:
            data = item.get("bytes") if isinstance(item, dict) else item
            if data is None:
                raise _Unreadable("decode", "there is no image: the cell is null")
            found = data
        size = found.size if isinstance(found, _File) else len(found)
        if size > self.max_bytes:
            named = redacted(f"image path {found.named!r}: ") if isinstance(found, _File) else ""
            limit = f"limits.max_image_bytes={self.max_bytes}"
            raise _Unreadable("too_large", f"{named}the encoded image has {size:,} bytes, above {limit}")
        return found

    def _look_up(self, named: str) -> _File:
        """An image named by path, relative to its shard's folder; it must stay below the input's root."""
        folder = self.shard.name.rpartition("/")[0]
        path = f"{folder}/{named}" if folder else named
        with _fetching(named), self.beside.open(path) as file:
            return _File(path, named, file.seek(0, io.SEEK_END))

    def _read(self, found: bytes | _File) -> bytes:
        if isinstance(found, bytes):
            return found
        with _fetching(found.named):
            return self.beside.read(found.path)


def _each(row: _Pictures, action: Callable[[Any], Any]) -> _Pictures | _Unreadable:
    """The action's results for a row's pictures, or why there are none."""
    images, frames = row
    try:
        return [action(each) for each in images], [
            _frame(frames, index, action) for index in range(len(frames))
        ]
    except _Unreadable as error:
        return error


def _frame(frames: list[Any], index: int, action: Callable[[Any], Any]) -> Any:
    try:
        return action(frames[index])
    except _Unreadable as error:
        message = f"frame {index + 1} of the video's {len(frames)}: {error.message}"
        raise _Unreadable(error.kind, message) from None


@contextmanager
def _fetching(named: str) -> Iterator[None]:
    """Turns what fails into the row's error. It stands in the output, so a URL's credentials are left out of it."""
    try:
        yield
    except FileNotFoundError:
        raise _Unreadable("fetch", redacted(f"image path {named!r}: no such file beside the shard")) from None
    except StoragePathError:
        why = (
            "leads out of the shard's folder, and images by path are read from there alone: store their bytes"
        )
        raise _Unreadable("fetch", redacted(f"image path {named!r} {why}")) from None
    except (OSError, ValueError) as error:
        raise _Unreadable("fetch", redacted(f"image path {named!r}: {error}")) from None


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


def _by_path(row: _Pictures) -> bool:
    return any(_is_path(item) for items in row for item in items)


def _bytes_by_path(row: _Pictures) -> int:
    return sum(item.size for items in row for item in items if isinstance(item, _File))
