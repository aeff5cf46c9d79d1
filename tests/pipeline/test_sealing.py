"""Sealing: one file a shard, the same bytes whatever happened on the way, open to every reader."""

import tempfile
from pathlib import Path

import datasets
import duckdb
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.columns import RESULT_SCHEMA
from pipeline.ledger import Ledger
from tests.pipeline.ledgers import (
    KEPT,
    DyingStorage,
    Killed,
    captions,
    journal,
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
        ledger.publish(captions("a.parquet", rows, text=text)): text
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
