"""Sealing: one file a shard, the same bytes whatever happened on the way, open to every reader."""

import io
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import datasets
import duckdb
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.schema import RESULT_SCHEMA
from pipeline.input.columns import sealed_schema
from pipeline.input.shards import Shard
from pipeline.ledger import merge
from pipeline.ledger.entries import RowStats
from pipeline.ledger.journal import Journal
from pipeline.ledger.ledger import Ledger
from pipeline.run.sealing import Sealed, Sealing, seal
from tests.pipeline.ledgers import (
    KEPT,
    DyingStorage,
    Killed,
    captions,
    journal,
    publish,
    run_to_the_end,
    sealed_bytes,
    shard,
)

A, B, EMPTY = shard("a.parquet", 12), shard("sub/b.parquet", 5), shard("empty", 0)
SHARDS = [A, B, EMPTY]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "out"))


REFERENCE: dict[str, bytes] = {}


def reference() -> dict[str, bytes]:
    """The sealed files of an undisturbed run with one part a shard."""
    if not REFERENCE:
        with tempfile.TemporaryDirectory() as folder:
            undisturbed = Ledger(folder)
            tables = [captions(A.name, range(12), failed=[4, 11]), captions(B.name, range(5))]
            run_to_the_end(undisturbed, SHARDS, tables)
            REFERENCE.update(sealed_bytes(undisturbed))
    return REFERENCE


ROW_OF_A_OR_B = st.sampled_from([(s.name, row) for s in (A, B) for row in range(s.rows)])
PARTS = st.lists(st.lists(ROW_OF_A_OR_B, min_size=1, max_size=8, unique=True), max_size=6)
DEATHS = st.lists(st.sampled_from([None, None, "before", "after"]), max_size=20)


@settings(max_examples=40)
@given(PARTS, DEATHS)
def test_law_3_any_partition_order_repeat_and_kill_seals_to_the_same_bytes(
    parts: list[list[tuple[str, int]]], deaths: list[str | None]
) -> None:
    rows = [(s.name, row) for s in (A, B) for row in range(s.rows)]
    tables = [
        pa.concat_tables(
            captions(name, [row for n, row in part if n == name], failed=[4, 11] if name == A.name else [])
            for name in (A.name, B.name)
        )
        for part in (*parts, rows[::3], *parts[:1], rows[1::3], rows[2::3])
    ]
    with tempfile.TemporaryDirectory() as folder:
        storage = DyingStorage(folder, deaths=iter(deaths))
        while True:
            try:
                run_to_the_end(Ledger(storage), SHARDS, tables)
                break
            except Killed:
                assert Ledger(folder).plan(SHARDS).problems == ()  # what is left is sound
        finished = Ledger(folder)
        assert finished.verify(SHARDS).ok
        assert finished.sweep(SHARDS) == journal(finished) == []
        assert sealed_bytes(finished) == reference()


def test_law_3_a_caption_beats_an_error_then_the_first_part_wins(ledger: Ledger) -> None:
    one = shard("a.parquet", 3)
    paths = {
        publish(ledger, captions("a.parquet", rows, text=text)): text
        for rows, text in (([0, 1], "one"), ([1, 2], "two"))
    }
    first, second = (paths[path] for path in sorted(paths))
    ledger.seal(one, KEPT)
    read = pq.read_table(pa.BufferReader(ledger.storage.read("data/a.parquet")))
    assert read["caption"][1].as_py() == f"{first} 1"
    ledger.storage.delete(["data/a.parquet", min(paths)])
    ledger.publish(captions("a.parquet", [0, 1, 2], failed=[1]))
    stats = ledger.seal(one, KEPT)
    read = pq.read_table(pa.BufferReader(ledger.storage.read("data/a.parquet")))
    assert read["caption"][1].as_py() == f"{second} 1"
    assert stats.failed == 0


def test_law_3_row_groups_end_where_the_rows_say(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "ROW_GROUP_BYTES", 200)
    seen: set[bytes] = set()
    for parts in ([range(12)], [[row] for row in range(12)], [range(0, 12, 2), range(1, 12, 2), [3, 4]]):
        run_to_the_end(ledger, [A], [captions(A.name, rows, failed=[4]) for rows in parts])
        assert ledger.verify([A]).ok
        seen.add(ledger.storage.read("data/a.parquet"))
        ledger.storage.delete(["data/a.parquet"])
    file = pq.ParquetFile(pa.BufferReader(seen.pop()))
    assert not seen and file.num_row_groups > 1
    assert file.read()["id"].to_pylist() == [f"a.parquet:{row}" for row in range(12)]


def test_law_3_a_column_may_be_larger_than_an_array_of_32_bit_offsets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2.25 GiB, which here are one buffer seen nine times."""

    def quick_writer(file: io.BytesIO, schema: pa.Schema, statistics: bool) -> pq.ParquetWriter:
        plain = {"use_dictionary": False, "write_statistics": False}  # each takes seconds over such values
        return pq.ParquetWriter(file, schema, compression="zstd", **plain)

    monkeypatch.setattr(merge, "parquet_writer", quick_writer)
    one = shard("a.parquet", 9)
    value = pa.array([bytes(1 << 28)], pa.binary())
    schema = sealed_schema(pa.schema([("value", pa.binary())]))
    results = captions(one.name, range(9))
    rows = [results.slice(row, 1).append_column("value", value) for row in range(9)]
    data, stats = merge.merged_file(one, [row.select(["_row", *schema.names]) for row in rows], schema)
    assert stats.rows == 9
    file = pq.ParquetFile(pa.BufferReader(data))
    assert file.schema_arrow.field("value").type == pa.binary()
    assert file.num_row_groups == 9


def at_once(ledger: Ledger) -> Callable[[Shard], Future[Sealed]]:
    """Seals as a task does, done by the time it is begun."""

    def start(shard: Shard) -> Future[Sealed]:
        future: Future[Sealed] = Future()
        future.set_result(seal(ledger, KEPT, shard))
        return future

    return start


def test_law_5_parts_go_while_the_run_goes_on(ledger: Ledger) -> None:
    """The journal holds the parts of open shards, however long the run, and the driver knows of it without a look."""
    shards = [shard(f"{number:02}.parquet", 80) for number in range(20)]
    told = Journal(ledger.plan(shards))
    sealing = Sealing(told, at_once(ledger))
    most = 0
    for one in shards:
        for start in range(0, 80, 8):
            told.add(ledger.publish(captions(one.name, range(start, start + 8), failed=[start])))
            assert told.parts == len(journal(ledger))
        most = max(most, told.parts)
        sealing.advance()
        sealing.collect()
        assert told.standing == ledger.plan(shards).standing
    assert most == 10 and told.parts == 0
    plan = ledger.plan(shards)
    assert plan.finished and told.standing.stats == plan.stats and told.standing.rows_done == 1600
    assert ledger.sweep(shards) == journal(ledger) == []
    assert ledger.verify(shards).ok
    assert not ledger.storage.exists("_tessera/journal")  # no empty folders


def test_a_shard_is_begun_once_and_a_task_that_fails_is_left_to_the_end(ledger: Ledger) -> None:
    begun: dict[str, Future[Sealed]] = {}

    def start(shard: Shard) -> Future[Sealed]:
        assert shard.name not in begun
        return begun.setdefault(shard.name, Future())

    told = Journal(ledger.plan(SHARDS))
    sealing = Sealing(told, start)
    told.add(ledger.publish(pa.concat_tables([captions(A.name, range(12)), captions(B.name, range(5))])))
    for _ in range(2):
        sealing.advance()
        sealing.collect()
    assert set(begun) == {A.name, B.name, EMPTY.name}
    begun[A.name].set_exception(OSError("the node is gone"))
    begun[B.name].set_result(Sealed(RowStats(5), storage_retries=2))
    begun[EMPTY.name].set_exception(OSError("the bucket is gone"))
    sealing.finish()
    sealing.advance()
    assert {one.name for one in told.to_seal} == {A.name, EMPTY.name}
    assert (told.standing.rows_done, sealing.storage_retries) == (17, 2)


def test_the_output_opens_in_datasets_duckdb_and_pandas(tmp_path: Path) -> None:
    """All rows of one shard fail and another is empty: still one schema."""
    ledger = Ledger(str(tmp_path / "out"))
    all_failed = captions(A.name, range(12), failed=range(12))
    none_failed = captions(B.name, range(5)).set_column(10, "error", pa.nulls(5))  # untyped
    run_to_the_end(ledger, SHARDS, [all_failed, none_failed])
    files = sorted(str(path) for path in (tmp_path / "out" / "data").rglob("*.parquet"))
    assert len({str(pq.read_schema(file).remove_metadata()) for file in files}) == 1
    pattern = str(tmp_path / "out" / "data" / "**" / "*.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=pattern, split="train", cache_dir=str(tmp_path / "hf")
    )
    assert len(loaded) == 17
    assert set(loaded.column_names) == {"id", "score", *RESULT_SCHEMA.names}
    query = f"select count(*), count(error.kind), count(caption) from read_parquet('{pattern}')"
    assert duckdb.sql(query).fetchall() == [(17, 12, 5)]
    frame = pandas.concat(pandas.read_parquet(file) for file in files)
    assert frame["caption"].notna().sum() == 5
    assert pandas.read_parquet(tmp_path / "out" / "data").shape == (17, 8)
    types = pq.read_schema(files[0]).types
    assert pa.large_string() not in types
    assert frame["prompt_tokens"].sum() == 170
