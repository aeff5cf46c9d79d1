"""Reading damaged parquet: every row comes back, right or told as unreadable; storage that fails is not damage."""

import errno
import io
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input import reading
from pipeline.input.reading import read_rows
from pipeline.input.rows import RowSet
from pipeline.input.shards import Shard, discover
from pipeline.spec.job_spec import InputSpec
from pipeline.storage.retrying import RetryingFile, StorageError
from pipeline.storage.storage import Storage

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS, GROUP = 400, 200  # pages of about 16 rows, and four batches a row group
SCHEMA = pa.schema([("image", IMAGE), ("title", pa.string()), ("id", pa.int64())])


def rows_of(count: int = ROWS) -> pa.Table:
    noise = random.Random(0)
    images = [{"bytes": noise.randbytes(40), "path": f"{row}.png"} for row in range(count)]
    titles = [f"title {row % 7}" for row in range(count)]
    return pa.table([pa.array(images, IMAGE), titles, range(count)], schema=SCHEMA)


def write(folder: Path, table: pa.Table | None = None, **options: object) -> Shard:
    small = {"row_group_size": GROUP, "data_page_size": 100, "write_batch_size": 16, "use_dictionary": False}
    pq.write_table(rows_of() if table is None else table, folder / "a.parquet", **(small | options))
    (shard,) = discover(InputSpec(path=(str(folder),))).shards
    return replace(shard, token="")  # a disk that loses bytes changes no modification time


def chunk(shard: Shard, group: int, column: str) -> tuple[int, int]:
    """Where the bytes of a column's chunk lie, its dictionary page (if any) first."""
    footer = pq.read_metadata(shard.url)
    found = footer.row_group(group)
    (index,) = (i for i in range(found.num_columns) if found.column(i).path_in_schema == column)
    meta = found.column(index)
    start = meta.dictionary_page_offset or meta.data_page_offset
    return start, start + meta.total_compressed_size


def smash(shard: Shard, start: int, data: bytes) -> None:
    with open(shard.url, "r+b") as file:
        file.seek(start)
        file.write(data)


def read(shard: Shard, rows: RowSet | None = None) -> dict[int, dict | str]:
    """Rows as dicts, or as what is said of them, after a check that they are all there, in order and once."""
    wanted = RowSet.span(shard.rows) if rows is None else rows
    found: list[tuple[int, dict | str]] = []
    for indices, columns in read_rows(shard, wanted, SCHEMA):
        assert 0 < len(indices) <= reading.READ_ROWS
        values = [columns] * len(indices) if isinstance(columns, str) else columns.to_pylist()
        assert isinstance(columns, str) or columns.schema == SCHEMA
        found += zip(indices, values, strict=True)
    assert [row for row, _ in found] == wanted.indices()
    return dict(found)


@pytest.mark.parametrize("column", ["image.bytes", "title", "id"])
def test_a_smashed_page_costs_its_row_group_from_there_on(tmp_path: Path, column: str) -> None:
    shard = write(tmp_path)
    start, stop = chunk(shard, 0, column)
    smash(shard, start + (stop - start) * 3 // 4, b"\xff" * 64)
    found, expected = read(shard), rows_of().to_pylist()
    lost = {row for row, value in found.items() if isinstance(value, str)}
    # Whole batches before the damage, nothing after it, and every row of the next group.
    assert lost == set(range(min(lost), GROUP)) and 64 <= min(lost) < GROUP and min(lost) % 64 == 0
    assert all(found[row] == expected[row] for row in range(ROWS) if row not in lost)
    assert str(found[min(lost)]).startswith("row group 0 of a.parquet: ")
    some = RowSet.of([0, 3, GROUP - 1, GROUP])
    assert read(shard, some) == {row: found[row] for row in some.indices()}


def test_a_smashed_dictionary_costs_the_row_group(tmp_path: Path) -> None:
    shard = write(tmp_path, use_dictionary=True)
    smash(shard, chunk(shard, 1, "title")[0], b"\xff" * 32)
    found = read(shard)
    assert [isinstance(found[row], str) for row in range(ROWS)] == [row >= GROUP for row in range(ROWS)]


@pytest.mark.parametrize(
    "options", [{}, {"compression": "none", "data_page_version": "2.0"}, {"compression": "zstd"}]
)
def test_whatever_bytes_are_wrong_every_row_is_accounted_for(tmp_path: Path, options: dict) -> None:
    shard = write(tmp_path, **options)
    whole = Path(shard.url).read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    damaged = 0
    for seed in range(60):
        chance = random.Random(seed)
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(4, footer if seed % 3 else len(data))] ^= chance.randrange(1, 256)
        Path(shard.url).write_bytes(data)
        damaged += any(isinstance(value, str) for value in read(shard).values())
    assert damaged >= 10


def test_checksums_tell_every_changed_byte_of_a_page(tmp_path: Path) -> None:
    shard = write(tmp_path, compression="none", write_page_checksum=True)
    whole, expected = Path(shard.url).read_bytes(), rows_of().to_pylist()
    start, stop = chunk(shard, 0, "image.bytes")
    damaged = 0
    for seed in range(20):
        data = bytearray(whole)
        data[random.Random(seed).randrange(start, stop)] ^= 1
        Path(shard.url).write_bytes(data)
        found = read(shard)
        damaged += any(isinstance(value, str) for value in found.values())
        assert all(isinstance(found[row], str) or found[row] == expected[row] for row in range(ROWS))
    assert damaged >= 15  # the rest hit what only statistics say


def test_text_that_is_none_costs_its_row(tmp_path: Path) -> None:
    table = rows_of().set_column(1, "title", pa.array([f"title {row:03}" for row in range(ROWS)]))
    shard = write(tmp_path, table, compression="none")
    start = Path(shard.url).read_bytes().index(b"title 123", 4)
    smash(shard, start, b"\xff")
    found = read(shard)
    assert [row for row, value in found.items() if isinstance(value, str)] == [123]
    assert str(found[123]).startswith("row 123 of a.parquet: ") and "UTF8" in str(found[123])


def test_a_row_group_that_ends_early_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path)
    original = pq.ParquetFile.iter_batches

    def short(self: pq.ParquetFile, *args: object, **kwargs: object) -> Iterator[pa.RecordBatch]:
        yield next(original(self, *args, **kwargs))

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", short)
    found = read(shard)
    assert [row for row, value in found.items() if not isinstance(value, str)] == [
        *range(64),
        *range(200, 264),
    ]
    assert found[64] == "row group 0 of a.parquet: it has fewer rows than it should"


def rewritten_in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def renamed_over(path: Path, data: bytes) -> None:
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").rename(path)


def deleted(path: Path, data: bytes) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [rewritten_in_place, renamed_over, deleted])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_no_row_comes_of_a_version_that_was_not_listed(tmp_path, change, after):
    write(tmp_path)
    (shard,) = discover(InputSpec(path=(str(tmp_path),))).shards
    path, expected = Path(shard.url), rows_of().to_pylist()
    other = path.read_bytes()
    assert other.count(b"title 1") and other.count(b"TITLE 1") == 0
    found: Iterator[Any] = read_rows(shard, RowSet.span(shard.rows), SCHEMA)
    tables = [next(found) for _ in range(after)]
    change(path, other.replace(b"title", b"TITLE"))
    rest = list(found)
    assert len(rest) == 1 and rest[0][0] == [] and rest[0][1].schema == SCHEMA
    rows = [row for _, table in tables for row in table.to_pylist()]
    assert rows == expected[: len(rows)] and len(rows) == sum(len(indices) for indices, _ in tables)
    assert (len(rows) > 0) == (after > 0)


def test_an_object_that_is_put_anew_while_it_is_read(s3_url, tmp_path):
    write(tmp_path, compression="none")
    storage, data = Storage(s3_url), (tmp_path / "a.parquet").read_bytes()
    storage.put_atomic("a.parquet", data)
    (shard,) = discover(InputSpec(path=(s3_url,))).shards
    found: Iterator[Any] = read_rows(shard, RowSet.span(shard.rows), SCHEMA)
    first = next(found)
    storage.put_atomic("a.parquet", data)  # the very same bytes have the same etag
    second = next(found)
    storage.put_atomic("a.parquet", data.replace(b"title", b"TITLE"))
    assert [table.num_rows for _, table in found] == [0]
    assert first[1].to_pylist() + second[1].to_pylist() == rows_of().to_pylist()[:128]


def test_rows_that_a_file_without_versions_lacks_are_told(tmp_path: Path) -> None:
    shard = write(tmp_path)
    pq.write_table(rows_of(150), shard.url)
    found = read(replace(shard, size=os.path.getsize(shard.url)))
    assert found[150] == found[399] == "a.parquet has only 150 rows now"
    assert all(isinstance(found[row], dict) for row in range(150))


@pytest.mark.parametrize(
    "error",
    [StorageError("throttled for 120 s"), PermissionError("no right"), OSError(errno.EIO, "bad sector")],
)
def test_storage_that_fails_is_no_damage_and_names_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    shard = write(tmp_path)
    data = Path(shard.url).read_bytes()
    limit = chunk(shard, 1, "image.bytes")[0]

    def fetch(start: int, end: int) -> bytes:
        if limit <= start and end < len(data) - 8:
            raise error
        return data[start:end]

    monkeypatch.setattr(reading, "open_file", lambda *_: RetryingFile(fetch, len(data)))
    with pytest.raises(StorageError, match=f"a.parquet: .*{error.args[-1]}"):
        read(shard)


def test_a_column_of_large_cells_streams_and_few_rows_are_decoded_at_once(tmp_path, monkeypatch):
    """Not pre-buffered: a row group of pictures may be larger than a task's memory."""
    monkeypatch.setattr(reading, "_BUFFER", 1000)
    monkeypatch.setattr(reading, "READ_BYTES", 4000)
    noise = random.Random(1)
    images = [{"bytes": noise.randbytes(400), "path": ""} for _ in range(100)]
    table = pa.table([pa.array(images, IMAGE), [""] * 100, range(100)], schema=SCHEMA)
    shard = write(tmp_path, table, write_batch_size=1)
    asked: list[int] = []

    class Spy(io.FileIO):
        def read(self, count: int | None = -1) -> bytes:
            asked.append(count or -1)
            return super().read(count)

    monkeypatch.setattr(reading, "open_file", lambda _, path, size: Spy(path))
    sizes = [len(rows) for rows, _ in read_rows(shard, RowSet.span(100), SCHEMA)]
    assert sum(sizes) == 100 and max(sizes) <= 10
    body = asked[2:]  # the footer comes first, in two pieces
    assert len(body) > 20 and max(body) <= 2000
