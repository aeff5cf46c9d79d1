"""Amending sealed shards: chosen error rows alone are replaced, atomically, whatever dies on the way."""

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input.rows import RowSet
from pipeline.ledger.ledger import RETRY, Ledger
from pipeline.ledger.retry import failed_rows, merge_retried
from tests.pipeline.ledgers import (
    DyingStorage,
    HeldUpStorage,
    Killed,
    captions,
    run_to_the_end,
    sealed_bytes,
    shard,
)

A, B = shard("a.parquet", 6), shard("b.parquet", 4)


@pytest.fixture(params=["local", "s3"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    url = str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3_url") + "/out"
    ledger = Ledger(url)
    run_to_the_end(ledger, [A, B], [captions(A.name, range(6), failed=[1, 4]), captions(B.name, range(4))])
    return ledger


def rows(ledger: Ledger, name: str) -> list[dict[str, object]]:
    return pq.read_table(pa.BufferReader(ledger.storage.read(f"data/{name}"))).to_pylist()


def test_error_rows_are_found_by_kind(ledger: Ledger) -> None:
    assert failed_rows(ledger, [A, B], ["oom", "decode"]) == [(A, RowSet.of([1, 4]))]
    assert failed_rows(ledger, [A, B], ["oom"]) == []


def test_error_rows_are_replaced_and_every_other_row_stays(ledger: Ledger) -> None:
    before, bytes_before = rows(ledger, A.name), sealed_bytes(ledger)
    ledger.publish(captions(A.name, [4], text="second"), RETRY)
    ledger.publish(captions(A.name, [1], failed=[1]), RETRY)
    ledger.publish(captions(A.name, [0], text="second"), RETRY)  # a row that has its caption keeps it
    assert merge_retried(ledger) == [A.name]
    after = rows(ledger, A.name)
    assert after[4]["caption"] == "second 4" and after[4]["error"] is None
    assert [row for n, row in enumerate(after) if n != 4] == [row for n, row in enumerate(before) if n != 4]
    assert sealed_bytes(ledger)["data/b.parquet"] == bytes_before["data/b.parquet"]
    assert ledger.retried() == [] and merge_retried(ledger) == []
    verification = ledger.verify([A, B])
    assert verification.ok and dict(verification.stats.errors) == {"decode": 1}


def test_a_changed_shard_takes_nothing_from_a_retry_of_its_old_version(ledger: Ledger) -> None:
    before = sealed_bytes(ledger)
    ledger.publish(captions(A.name, [4], version="v0", text="second"), RETRY)
    assert merge_retried(ledger) == []
    assert sealed_bytes(ledger) == before and ledger.retried() == []


def test_a_part_that_another_run_published_meanwhile_is_not_deleted_unmerged(ledger: Ledger) -> None:
    """A run that is held up before it deletes its part of row 4 wakes when another has captioned that row."""
    ledger.publish(captions(A.name, [4], failed=[4]), RETRY)
    second = captions(A.name, [4], text="second")
    held_up = HeldUpStorage(ledger.storage.url, RETRY, lambda: ledger.publish(second, RETRY))
    merge_retried(Ledger(held_up))
    assert len(ledger.retried()) == len(held_up.held) == 1
    merge_retried(ledger)
    assert rows(ledger, A.name)[4]["caption"] == "second 4" and ledger.retried() == []


def test_killed_anywhere_the_next_one_merges_the_rest(tmp_path: Path) -> None:
    tables = [captions(A.name, [4], text="second"), captions(B.name, [2], text="second")]
    ends: set[tuple[tuple[str, bytes], ...]] = set()
    for number, (step, when) in enumerate(itertools.product(range(8), ("before", "after"))):
        ledger = Ledger(str(tmp_path / str(number)))
        failed = [captions(A.name, range(6), failed=[1, 4]), captions(B.name, range(4), failed=[2])]
        run_to_the_end(ledger, [A, B], failed)
        dying = Ledger(DyingStorage(ledger.storage.url, iter([*[None] * step, when])))
        try:
            for table in tables:
                dying.publish(table, RETRY)
            merge_retried(dying)
        except Killed:
            pass
        for table in tables:  # the retry again: what is merged is not chosen any more, the rest is
            name = table["_shard"][0].as_py()
            chosen = failed_rows(ledger, [A, B], ["decode"])
            if any(set(table["_row"].to_pylist()) <= set(r.indices()) for s, r in chosen if s.name == name):
                ledger.publish(table, RETRY)
        merge_retried(ledger)
        assert ledger.verify([A, B]).ok
        ends.add(tuple(sorted(sealed_bytes(ledger).items())))
    assert len(ends) == 1
