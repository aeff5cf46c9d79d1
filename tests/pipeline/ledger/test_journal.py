"""The journal that a driver keeps from records says what the files say, whatever came twice, late or never."""

import tempfile

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.input.rows import RowSet
from pipeline.ledger.entries import Entry, RowStats
from pipeline.ledger.journal import Journal
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.state import Plan, Published, ShardState
from tests.pipeline.ledgers import KEPT, captions, shard

A, B, EMPTY = shard("a.parquet", 12), shard("sub/b.parquet", 5), shard("empty", 0)
SHARDS = [A, B, EMPTY]

BLOCKS = st.lists(
    st.tuples(
        st.sampled_from([A, B]), st.sets(st.integers(0, 11), min_size=1), st.sampled_from(["v1", "v0"])
    ),
    max_size=8,
)


@settings(max_examples=60)
@given(BLOCKS, st.integers(0, 8), st.booleans())
def test_records_and_files_tell_the_same(blocks, planned: int, again: bool) -> None:
    """Also where the run begins with some of them in the files, and records come twice."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder)
        plan: Plan | None = None
        records: list[Published] = []
        for number, (one, rows, version) in enumerate(blocks):
            if number == planned:
                plan = ledger.plan(SHARDS)
            found = ledger.publish(
                captions(one.name, sorted({row % one.rows for row in rows}), version, failed=[3])
            )
            records += found if plan else ()
        told = Journal(plan or ledger.plan(SHARDS))
        told.add(reversed(records) if again else records)
        told.add(records if again else ())
        now = ledger.plan(SHARDS)
        assert told.standing == now.standing
        assert {one.name for one in told.to_seal} == {state.shard.name for state in now.to_seal}
        assert told.parts == sum(len(state.parts) for state in now.shards)
        for one in told.to_seal:
            told.seal(one, ledger.seal(one, KEPT))
            ledger.discard(one)
        told.add(records)  # late repeats, of shards that are sealed
        assert told.standing == ledger.plan(SHARDS).standing
        assert told.to_seal == []


def test_a_resumed_job_begins_with_what_the_files_say(tmp_path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.publish(pa.concat_tables([captions(A.name, range(6)), captions(B.name, range(5))]))
    ledger.seal(B, KEPT)
    told = Journal(ledger.plan(SHARDS))
    assert told.standing == ledger.plan(SHARDS).standing and told.standing.rows_done == 11
    assert told.to_seal == [EMPTY]
    told.add(ledger.publish(captions(A.name, range(6, 12))))
    assert set(told.to_seal) == {A, EMPTY}


def test_a_look_goes_once_through_a_shard_s_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once for each part that came: a shard of ten million rows has 300,000 of them."""
    large = shard("large.parquet", 1000)
    steps: list[int] = []
    with_parts = ShardState.with_parts

    def counted(self: ShardState, found: list[tuple[str, Entry]]) -> ShardState:
        steps.append(len(self.parts))
        return with_parts(self, found)

    monkeypatch.setattr(ShardState, "with_parts", counted)
    told = Journal(Plan((ShardState.untouched(large),)))
    entries = [Entry(large.fingerprint, RowSet.of([row]), RowStats(1)) for row in range(1000)]
    parts = [Published(f"part-{row}", 1, {large.name: entry}) for row, entry in enumerate(entries)]
    told.add(parts[:500])
    told.add(parts[500:])
    assert steps == [0, 500] and told.to_seal == [large]
