"""Reading parquet that may be damaged: every row asked for comes back, with its columns or with why not.

Why: of a thousand shards one has a smashed page. That must cost the rows of the page's row group, from the page on, and
not the job. A row group yields what it can, the rest of its rows are told as unreadable, and reading goes on with the
next one. Page checksums are verified where a file has them; without them, a changed byte that still decodes is not
noticed by anyone.

A file that is rewritten while it is read is not damaged. Rows leave here only if the file, after their bytes were read,
still was the version that was listed; once it is another one, no more rows come of it. So captions under a version's
fingerprint are captions of that version, and the rest of the shard waits for a run that lists the new one.
"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.input.rows import RowSet
from pipeline.input.shards import Shard
from pipeline.input.versions import is_current
from pipeline.storage.files import open_file, open_filesystem
from pipeline.storage.footer import one_line
from pipeline.storage.retrying import StorageError

READ_ROWS = 64  # rows decoded at once: a block's worth, and large against parquet's per-call cost
READ_BYTES = 64 << 20  # of rows decoded at once, where fewer rows are more than that
_BUFFER = 8 << 20  # bytes of a column chunk held while it streams

# What pyarrow raises over damaged bytes. An OSError of its own has no number (_reason).
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError)

Found = tuple[list[int], pa.Table | str]
"""Rows of a shard, ascending, with their columns or with why they cannot be read."""


def read_rows(shard: Shard, rows: RowSet, schema: pa.Schema) -> Iterator[Found]:
    """The columns of `schema` of some rows of a shard: in order, all of them, at most `READ_ROWS` at once, and fewer
    where a row is large (`READ_BYTES`).

    Of a file that is not the version that was listed any more no further rows come, but an empty table. Raises
    StorageError or another OSError where storage fails: that says nothing about the rows.
    """
    try:
        for found in _read_version(shard, rows, schema):
            if not is_current(shard):
                break
            yield found
        else:
            return
    except OSError:
        if is_current(shard):
            raise
    yield [], schema.empty_table()


def _read_version(shard: Shard, rows: RowSet, schema: pa.Schema) -> Iterator[Found]:
    """`read_rows`, of whatever version the file is by now."""
    filesystem, path = open_filesystem(shard.url)
    start = 0
    with open_file(filesystem, path, shard.size) as file:
        try:
            # pre_buffer, which is on by default, would hold whole column chunks whatever buffer_size says.
            parquet = pq.ParquetFile(
                file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
            )
            groups = range(parquet.num_row_groups)
            counts = [max(0, parquet.metadata.row_group(group).num_rows) for group in groups]
        except _DAMAGE as error:
            yield from _unread(rows.within(0, shard.rows), f"{shard.name}: {_reason(error, shard)}")
            return
        for group, count in enumerate(counts):
            stop = min(start + count, shard.rows)
            if wanted := rows.within(start, stop):
                yield from _read_group(parquet, group, shard, start, wanted, schema)
            start = stop
    # Only of a file that was replaced in a store that tells no versions.
    yield from _unread(rows.within(start, shard.rows), f"{shard.name} has only {start:,} rows now")


def _read_group(
    parquet: pq.ParquetFile, group: int, shard: Shard, start: int, rows: RowSet, schema: pa.Schema
) -> Iterator[Found]:
    """Rows of the row group whose first row is `start`."""
    stop, reason = rows.ranges[-1][1], "it has fewer rows than it should"
    batches = parquet.iter_batches(_rows_at_once(parquet, group), row_groups=[group], columns=schema.names)
    while start < stop:
        try:
            batch = next(batches)
            batch.validate()
        except StopIteration:
            break
        except _DAMAGE as error:
            reason = _reason(error, shard)
            break
        wanted = rows.within(start, start + batch.num_rows).indices()
        if wanted:
            table = pa.Table.from_batches([batch])
            if len(wanted) < batch.num_rows:
                table = table.take([row - start for row in wanted])
            yield from _checked(table, wanted, schema, shard)
        start += batch.num_rows
    yield from _unread(rows.within(start, stop), f"row group {group} of {shard.name}: {reason}")


def _rows_at_once(parquet: pq.ParquetFile, group: int) -> int:
    """How many rows of a row group have about `READ_BYTES`: memory follows bytes, not rows."""
    metadata = parquet.metadata.row_group(group)
    return max(1, min(READ_ROWS, READ_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)))


def _checked(table: pa.Table, rows: list[int], schema: pa.Schema, shard: Shard) -> Iterator[Found]:
    """The rows with the columns of `schema`; where one holds text that is none, it is told alone."""
    try:
        table.validate(full=True)
        table = table.select(schema.names).cast(schema)
    except _DAMAGE as error:
        if len(rows) == 1:
            yield rows, f"row {rows[0]} of {shard.name}: {_reason(error, shard)}"
            return
        for index, row in enumerate(rows):
            yield from _checked(table.slice(index, 1), [row], schema, shard)
        return
    yield rows, table


def _unread(rows: RowSet, message: str) -> Iterator[Found]:
    indices = rows.indices()
    for first in range(0, len(indices), READ_ROWS):
        yield indices[first : first + READ_ROWS], message


def _reason(error: BaseException, shard: Shard) -> str:
    """What is wrong with the file. What is wrong with its storage is raised instead."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
        raise StorageError(f"{shard.url}: {error}") from error
    return one_line(error)
