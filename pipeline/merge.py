"""Merging: rows of one shard from many parts, as the one table that is sealed.

The one idea: the result is a function of the rows. However they were partitioned, ordered, repeated or overlapped,
the same rows give the same bytes.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.columns import ERROR, FINGERPRINT, ROW, SHARD
from pipeline.entries import Entry, Stats, to_parquet
from pipeline.rows import RowSet
from pipeline.shards import Shard


class SealError(RuntimeError):
    """The journal does not hold what sealing a shard takes; nothing was written."""


def part_rows(path: str, data: bytes, shard: Shard, schema: pa.Schema) -> pa.Table:
    """A part's rows of this version of a shard, as `_row` and the sealed columns."""
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    mine = pc.and_(pc.equal(table[SHARD], shard.name), pc.equal(table[FINGERPRINT], shard.fingerprint))
    return _fitted(table.filter(mine), schema, path)


def sealed_file(shard: Shard, table: pa.Table) -> tuple[bytes, Stats]:
    """The sealed file of a shard whose every row `table` holds, in order, and the statistics of its rows."""
    stats = Stats.of(table)
    entries = {shard.name: Entry(shard.fingerprint, RowSet.span(shard.rows), stats)}
    return to_parquet(table, entries, statistics=True), stats


def _fitted(table: pa.Table, schema: pa.Schema, path: str) -> pa.Table:
    """The part's rows as `_row` and the sealed columns."""
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise SealError(f"{path} lacks the column {missing[0]!r} that the job keeps")
    try:
        return table.select([ROW, *schema.names]).cast(pa.schema([(ROW, pa.int64()), *schema]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SealError(f"{path} does not fit the job's columns ({error})") from None


def merged(shard: Shard, tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """Each row of the shard once, in order; `tables` come in the order of their parts' names (law 3)."""
    if not tables:
        tables = [pa.schema([(ROW, pa.int64()), *schema]).empty_table()]
    table = pa.concat_tables(tables).combine_chunks()
    rows = table[ROW].to_numpy()
    failed = pc.is_valid(table[ERROR]).to_numpy()
    order = np.lexsort((np.arange(len(rows)), failed, rows))  # by row, captions first, then by part
    chosen = order[np.diff(rows[order], prepend=-1) != 0]
    if not np.array_equal(rows[chosen], np.arange(shard.rows)):
        held = RowSet.of(rows)
        raise SealError(
            f"{shard.name}: cannot be sealed, rows missing: {held.complement(shard.rows) or 'none'}, "
            f"rows beyond its {shard.rows}: {held - RowSet.span(shard.rows) or 'none'}"
        )
    return table.select(schema.names).take(chosen)
