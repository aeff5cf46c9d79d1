"""Merging: rows of one shard from many parts, as the one file that is sealed.

The file is a function of the rows: however they were partitioned, ordered, repeated or overlapped, the same rows give
the same bytes. It is made a row group at a time, so that beside the parts only one is in memory, and no array comes
near the 2 GiB that Arrow's 32-bit offsets can address.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.schema import ERROR, FINGERPRINT, ROW, SHARD
from pipeline.input.rows import RowSet
from pipeline.input.shards import Shard
from pipeline.ledger.digest import DIGEST_ROWS, row_digests, row_sizes
from pipeline.ledger.entries import Entry, RowStats, parquet_writer, signed, write_entries
from pipeline.storage.footer import one_line
from pipeline.storage.retrying import StorageError

ROW_GROUP_BYTES = 128 << 20  # of values; what one reader holds, and far below 2 GiB


class SealError(RuntimeError):
    """The journal does not hold what sealing a shard takes; nothing was written."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What sealing needs to know of a version of a shard; a `Shard` has it too."""

    name: str
    fingerprint: str
    rows: int


def part_rows(path: str, data: bytes, shard: Shard | Sealed, schema: pa.Schema) -> pa.Table:
    """A part's rows of this version of a shard, as `_row` and the sealed columns. SealError if it is damaged."""
    with damage_told(path):
        table = opened(pa.BufferReader(data)).read(use_threads=False)
    mine = pc.and_(pc.equal(table[SHARD], shard.name), pc.equal(table[FINGERPRINT], shard.fingerprint))
    table = table.filter(mine)
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise SealError(f"{path} lacks the column {missing[0]!r} that the job keeps")
    try:
        return table.select([ROW, *schema.names]).cast(_with_row(schema))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SealError(f"{path} does not fit the job's columns ({error})") from None


def opened(file: BinaryIO) -> pq.ParquetFile:
    """A file of the output, whose pages are held against their checksums as they are read.

    Without reading ahead: Arrow does that in threads of its own, which call into Python for every range; a `verify` of
    a million rows was once seen to hang there.
    """
    return pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)


@contextmanager
def damage_told(path: str) -> Iterator[None]:
    """Raises SealError where a file that is in memory cannot be decoded: what it holds must not be sealed."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise SealError(
            f"{path} is damaged ({one_line(error)}); delete it and run the job again, which captions its rows anew"
        ) from None


def winning_rows(tables: Sequence[pa.Table]) -> np.ndarray:
    """Each row that the tables hold once, ascending, as its place in the tables laid end to end: where several hold
    one, a caption beats an error, then the first table wins (law 3, where tables come in order of their names)."""
    rows = _row_numbers(tables)
    failed = np.concatenate([pc.is_valid(table[ERROR]).to_numpy() for table in tables])
    order = np.lexsort((np.arange(len(rows)), failed, rows))
    return order[np.diff(rows[order], prepend=-1) != 0]


def merged_file(shard: Shard, tables: Sequence[pa.Table], schema: pa.Schema) -> tuple[bytes, RowStats]:
    """The sealed file of a shard from its parts' rows (`part_rows`), and their statistics; SealError as below."""
    tables = tables or [_with_row(schema).empty_table()]
    return sealed_file(shard, tables, winning_rows(tables))


def sealed_file(
    shard: Shard | Sealed, tables: Sequence[pa.Table], places: np.ndarray
) -> tuple[bytes, RowStats]:
    """The sealed file of a shard and the statistics of its rows, which stand at `places` of `tables` laid end to end.

    `tables` have `_row` and the sealed columns. The file proves its rows: SealError unless each row of the shard is
    there once and in order, and its footer carries the digests of what was written then.
    """
    rows = _row_numbers(tables)[places]
    if not np.array_equal(rows, np.arange(shard.rows)):
        raise SealError(f"{shard.name}: cannot be sealed, {_what_is_wrong(rows, shard.rows)}")
    schema = tables[0].schema.remove(0).remove_metadata()
    sizes = np.concatenate([row_sizes(table) for table in tables])[places]
    stats: list[RowStats] = []
    digests: list[str] = []
    file = io.BytesIO()
    with parquet_writer(file, schema, statistics=True) as writer:
        for start, stop in _row_groups(sizes):
            group = _gathered(tables, places[start:stop]).select(schema.names)
            stats.append(RowStats.of(group))
            digests += row_digests(group)
            writer.write_table(group, row_group_size=group.num_rows)
        entry = Entry(shard.fingerprint, RowSet.span(shard.rows), RowStats.total(stats), tuple(digests))
        write_entries(writer, {shard.name: entry}, file.tell())
    return signed(file), entry.stats


def altered_rows(file: BinaryIO, sealed: Entry) -> RowSet:
    """The rows of a sealed file, in runs of `DIGEST_ROWS`, whose values are not those that `sealed` has the digests of,
    or cannot be read. Storage that fails raises."""
    parquet = opened(file)
    expected = iter(sealed.digests)
    altered: list[tuple[int, int]] = []
    start = 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        try:
            digests = row_digests(parquet.read_row_group(group, use_threads=False))
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, (StorageError, PermissionError, FileNotFoundError)):
                raise
            digests = [""] * len(range(0, rows, DIGEST_ROWS))
        for first, digest in zip(range(start, start + rows, DIGEST_ROWS), digests, strict=True):
            if digest != next(expected, None):
                altered.append((first, min(first + DIGEST_ROWS, start + rows)))
        start += rows
    return RowSet.union_of(RowSet((run,)) for run in altered)


def _with_row(schema: pa.Schema) -> pa.Schema:
    return pa.schema([(ROW, pa.int64()), *schema])


def _row_numbers(tables: Sequence[pa.Table]) -> np.ndarray:
    return np.concatenate([table[ROW].to_numpy() for table in tables])


def _what_is_wrong(rows: np.ndarray, count: int) -> str:
    held = RowSet.of(rows)
    found, times = np.unique(rows, return_counts=True)
    twice = RowSet.of(found[times > 1])
    return (
        f"rows missing: {held.complement(count) or 'none'}, rows beyond its {count}: "
        f"{held - RowSet.span(count) or 'none'}, rows twice: {twice or 'none'}"
        + ("" if np.array_equal(rows, np.sort(rows)) else ", and out of order")
    )


def _row_groups(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of the row groups: as many rows as `ROW_GROUP_BYTES` hold, or one that is larger."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(ends):
        limit = ends[start] - sizes[start] + ROW_GROUP_BYTES
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield start, stop
        start = stop


def _gathered(tables: Sequence[pa.Table], places: np.ndarray) -> pa.Table:
    """The rows at `places` of the tables laid end to end, as one chunk a column.

    Runs of neighbours are slices. `Table.take` would first lay whole columns end to end in one array.
    """
    starts = np.cumsum([0, *(table.num_rows for table in tables[:-1])])
    owners = np.searchsorted(starts, places, side="right") - 1
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(owners) != 0)) + 1
    slices = []
    for first, last in zip([0, *breaks], [*breaks, len(places)], strict=True):
        owner = owners[first]
        slices.append(tables[owner].slice(places[first] - starts[owner], last - first))
    return pa.concat_tables(slices).combine_chunks()
