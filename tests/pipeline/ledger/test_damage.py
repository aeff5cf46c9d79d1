"""Shards that cannot be read, wholly or in part, are named with the reason; their rows can be tried again."""

from pathlib import Path

import pyarrow as pa

from actors.schema import ERROR, ERROR_TYPE, error_value
from pipeline.input.rows import RowSet
from pipeline.input.shards import FailedShard, Input
from pipeline.ledger.damage import failed_shards
from pipeline.ledger.ledger import RETRY, Ledger
from pipeline.ledger.retry import failed_rows, merge_retried
from tests.pipeline.ledgers import KEPT, captions, shard

MESSAGE = "row group 1 of b.parquet: Corrupt snappy compressed data."
EMPTY = FailedShard("c.parquet", "/input/c.parquet", "is empty (0 bytes)")
SHARDS = (shard("a.parquet", 4), shard("b.parquet", 6))
FOUND = Input(SHARDS, (EMPTY,))


def with_unread_rows(table: pa.Table, rows: list[int]) -> pa.Table:
    errors = [error_value("read", "read", MESSAGE) if row in rows else None for row in range(table.num_rows)]
    index = table.schema.get_field_index(ERROR)
    return table.set_column(index, ERROR, pa.array(errors, ERROR_TYPE))


def test_failed_shards_are_named_with_the_reason(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.publish(captions("a.parquet", range(4), failed=[1]))  # an error, but none of reading
    ledger.publish(with_unread_rows(captions("b.parquet", range(6)), [2, 3]))
    open_, damaged = "/input/b.parquet has 2 of 6 rows that cannot be read", f" ({MESSAGE})"
    assert list(map(str, failed_shards(ledger, FOUND, ledger.plan(SHARDS)))) == [str(EMPTY), open_]
    for one in SHARDS:
        ledger.seal(one, KEPT)
    assert list(map(str, failed_shards(ledger, FOUND, ledger.plan(SHARDS)))) == [str(EMPTY), open_ + damaged]


def test_rows_that_could_not_be_read_are_tried_again(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.publish(with_unread_rows(captions("b.parquet", range(6)), [2, 3]))
    ledger.seal(SHARDS[1], KEPT)
    assert failed_rows(ledger, SHARDS, ["read"]) == [(SHARDS[1], RowSet.of([2, 3]))]
    ledger.publish(captions("b.parquet", [2, 3]), RETRY)
    merge_retried(ledger)
    assert failed_shards(ledger, FOUND, ledger.plan(SHARDS)) == (EMPTY,)


def test_captions_of_a_shard_that_became_unreadable_are_not_foreign(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    for name in ("b.parquet", "c.parquet"):
        ledger.publish(captions(name, range(6)))
        ledger.seal(shard(name, 6), KEPT)
    ledger.publish(captions("c.parquet", range(2), version="v2"))
    assert ledger.plan(SHARDS[1:], [EMPTY]).foreign == ()
    verification = ledger.verify(SHARDS[1:], [EMPTY])
    assert verification.ok and verification.describe() == (
        "verified: 6 rows in, 6 rows out\n  unreadable: /input/c.parquet is empty (0 bytes)"
    )
