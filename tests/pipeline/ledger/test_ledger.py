"""The ledger's laws, one test each, on a local disk and on a real HTTP S3 server."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from actors.schema import RESULT_SCHEMA
from pipeline.input.columns import sealed_schema
from pipeline.input.rows import RowSet
from pipeline.ledger.entries import RowStats, decode, to_parquet
from pipeline.ledger.ledger import JOURNAL, RETRY, Ledger, LedgerMismatch, SealError
from pipeline.ledger.merge import part_rows, sealed_file
from pipeline.ledger.retry import merge_retried
from pipeline.spec.job_spec import JobSpec, parse_spec
from pipeline.storage.files import FileInfo, in_parallel
from pipeline.storage.footer import tail_of
from pipeline.storage.local import write_temporary
from pipeline.storage.storage import Storage
from tests.pipeline.ledgers import KEPT, captions, journal, publish, run_to_the_end, sealed_bytes, shard

A, B, EMPTY = shard("a.parquet", 12), shard("sub/b.parquet", 5), shard("empty", 0)
SHARDS = [A, B, EMPTY]


@pytest.fixture(params=["local", "s3"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    return Ledger(
        str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3_url") + "/out"
    )


def test_a_job_from_start_to_success(ledger: Ledger) -> None:
    plan = ledger.plan(SHARDS)
    assert (plan.rows, plan.rows_done, plan.finished) == (17, 0, False)
    assert [state.shard for state in plan.to_caption] == [A, B]
    assert [state.shard for state in plan.to_seal] == [EMPTY]

    both = pa.concat_tables([captions(A.name, [3, 0, 2], failed=[2]), captions(B.name, range(5))])
    ledger.publish(both)
    plan = ledger.plan(SHARDS)
    assert plan.shards[0].remaining == RowSet.of([1, *range(4, 12)])
    assert plan.rows_done == 8
    assert plan.stats == RowStats(8, {"decode": 1}, 80, 56, 21)
    assert [state.shard for state in plan.to_seal] == [B, EMPTY]
    assert "a.parquet is not sealed; in the journal: 3 of 12 rows" in ledger.verify(SHARDS).describe()

    run_to_the_end(ledger, SHARDS, [captions(A.name, [1, *range(4, 12)])])
    plan = ledger.plan(SHARDS)
    assert plan.finished
    assert plan.stats == RowStats(17, {"decode": 1}, 170, 119, 48)
    assert journal(ledger) == []
    assert list(sealed_bytes(ledger)) == ["data/a.parquet", "data/empty.parquet", "data/sub/b.parquet"]
    verification = ledger.verify(SHARDS)
    assert verification.ok
    assert verification.describe() == "verified: 17 rows in, 17 rows out"

    table = pq.read_table(pa.BufferReader(ledger.storage.read("data/a.parquet")))
    assert table.column_names == ["id", "score", *RESULT_SCHEMA.names]
    assert table["id"].to_pylist() == [f"a.parquet:{row}" for row in range(12)]
    assert table["caption"].to_pylist() == [None if row == 2 else f"caption {row}" for row in range(12)]
    assert table["error"][2].as_py() == {"kind": "decode", "stage": "preprocess", "message": "cut off"}


def test_law_1_a_row_is_done_if_and_only_if_a_whole_file_holds_it(ledger: Ledger) -> None:
    path = publish(ledger, captions(A.name, range(6)))
    assert ledger.plan([A]).rows_done == 6
    data = ledger.storage.read(path)
    ledger.storage.put_atomic(path, data[:-20])
    plan = ledger.plan([A])
    assert plan.rows_done == 0
    assert path in plan.problems[0]
    ledger.storage.put_atomic(path, data)
    assert ledger.plan([A]).rows_done == 6
    ledger.storage.delete([path])
    assert ledger.plan([A]).rows_done == 0


def test_law_1_under_sigkill(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.ledger.ledger import Ledger; from tests.pipeline.ledgers import captions\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for row in range(100_000): ledger.publish(captions('a.parquet', [row]))"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / JOURNAL).glob("*/part-*"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    plan = Ledger(str(tmp_path)).plan([shard("a.parquet", 100_000)])
    assert plan.problems == ()
    assert plan.rows_done >= 20
    # In order, no gap
    assert plan.shards[0].remaining == RowSet.of(range(100_000)) - RowSet.span(plan.rows_done)


def test_law_2_publishing_is_idempotent(ledger: Ledger) -> None:
    first = publish(ledger, captions(A.name, [1, 2, 7]))
    assert publish(ledger, captions(A.name, [1, 2, 7])) == first
    assert publish(ledger, captions(A.name, [1, 2, 7], version="v2")) != first
    assert publish(ledger, captions(B.name, [1, 2, 7])) != first
    assert len(journal(ledger)) == 3
    assert ledger.plan([A]).stats.rows == 3


def test_law_2_a_block_that_fails_when_it_runs_again_replaces_no_captions(ledger: Ledger) -> None:
    both = {
        publish(ledger, captions(B.name, range(5))),
        publish(ledger, captions(B.name, range(5), failed=[1])),
    }
    assert set(journal(ledger)) == both and len(both) == 2
    assert ledger.plan([B]).rows_done == 5
    assert ledger.seal(B, KEPT).failed == 0
    assert set(ledger.sweep([B])) == both


def test_law_2_retried_and_speculative_writers_race(ledger: Ledger) -> None:
    blocks = [range(start, start + 3) for start in range(0, 12, 3)] * 4
    in_parallel(lambda block: Ledger(ledger.storage).publish(captions(A.name, block)), blocks)
    assert len(journal(ledger)) == 4
    assert ledger.plan([A]).stats.rows == 12


def test_law_4_sealing_is_idempotent(ledger: Ledger) -> None:
    parts = [publish(ledger, captions(B.name, range(5)))]
    stats = ledger.seal(B, KEPT)
    before = sealed_bytes(ledger)
    late = captions(B.name, range(5), text="late")  # a speculative writer that lost
    parts.append(publish(ledger, late))
    assert ledger.seal(B, KEPT) == stats
    assert ledger.sweep([B]) == sorted(parts)
    assert ledger.seal(B, KEPT) == stats
    assert sealed_bytes(ledger) == before


@pytest.mark.parametrize("moment", ["before", "after"])
def test_law_4_a_seal_that_appears_meanwhile_is_not_overwritten(ledger: Ledger, moment: str) -> None:
    """Two runs replace the seal of an older version; one is held up as it looks at what it replaces."""
    old, new = shard("a.parquet", 3), shard("a.parquet", 4, "v2")
    run_to_the_end(ledger, [old], [captions("a.parquet", range(3))])
    ours = publish(ledger, captions("a.parquet", range(4), version="v2"))

    def seal_theirs() -> None:
        if ledger.storage.exists(ours):
            ledger.storage.delete([ours])
            ledger.publish(captions("a.parquet", range(4), version="v2", text="other"))
            ledger.seal(new, KEPT)

    class HeldUp(Storage):
        def read_version(self, path: str) -> tuple[bytes, str]:
            if moment == "before":
                seal_theirs()
            found = super().read_version(path)
            seal_theirs()
            return found

    Ledger(HeldUp(ledger.storage.url)).seal(new, KEPT)
    data = sealed_bytes(ledger)["data/a.parquet"]
    assert pq.read_table(pa.BufferReader(data))["caption"].to_pylist() == [f"other {n}" for n in range(4)]


def test_sealing_an_incomplete_shard_is_refused_and_writes_nothing(ledger: Ledger) -> None:
    ledger.publish(captions(A.name, [0, 1, 5]))
    with pytest.raises(SealError, match=r"rows missing: 2-4, 6-11, rows beyond its 12: none"):
        ledger.seal(A, KEPT)
    ledger.publish(captions(A.name, range(14)))
    with pytest.raises(SealError, match=r"missing: none, rows beyond its 12: 12-13"):
        ledger.seal(A, KEPT)

    class Swept(Storage):
        def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
            raise FileNotFoundError(path)

    with pytest.raises(SealError, match="gone"):
        Ledger(Swept(ledger.storage.url)).seal(A, KEPT)
    with pytest.raises(SealError, match="lacks the column 'other'"):
        ledger.seal(A, pa.schema([("other", pa.string())]))
    assert sealed_bytes(ledger) == {}


def test_law_5_a_part_is_deleted_only_after_its_shard_is_sealed(ledger: Ledger) -> None:
    """By a sweep of the whole journal, or by whoever sealed its shard."""
    ledger.publish(pa.concat_tables([captions(A.name, range(3)), captions(B.name, range(5))]))
    assert len(journal(ledger)) == 2  # one a shard
    ledger.seal(B, KEPT)
    ledger.discard(A)
    ledger.discard(B)
    assert len(journal(ledger)) == 1 and ledger.sweep(SHARDS) == []
    ledger.publish(captions(A.name, range(3, 12)))
    sealed = ledger.seal(A, KEPT)
    assert sealed.rows == 12
    data = ledger.storage.read("data/a.parquet")
    ledger.storage.put_atomic("data/a.parquet", data[:-8])  # a seal that cannot be read back is no seal
    ledger.discard(A)
    parts = journal(ledger)
    assert len(parts) == 2 and ledger.sweep(SHARDS) == []
    ledger.storage.put_atomic("data/a.parquet", data)
    assert ledger.sweep(SHARDS) == parts


def test_what_a_killed_writer_left_keeps_its_folder_and_nothing_else_for_an_hour(tmp_path: Path) -> None:
    """The shard is named as a part would be: what stands in the journal under that name is a folder."""
    ledger, one = Ledger(str(tmp_path)), shard("part-00001.parquet", 2)
    part = publish(ledger, captions(one.name, range(2)))
    torn = write_temporary(tmp_path / part, b"torn")
    ledger.seal(one, KEPT)
    assert ledger.sweep([one]) == [part]
    assert [path for path in (tmp_path / JOURNAL).rglob("*") if path.is_file()] == [torn]
    assert torn.parent == tmp_path / JOURNAL / one.name and ledger.verify([one], deep=True).ok
    os.utime(torn, (0, 0))
    assert ledger.sweep([one]) == [] and not (tmp_path / JOURNAL).exists()


def test_a_seal_looks_at_its_own_folder_and_sees_parts_that_nobody_told_of(ledger: Ledger) -> None:
    """Of names that begin alike, that lie in each other, and that are as long as a key may be."""
    shards = [
        shard(name, 4) for name in ("a", "a/b.parquet", "ab.parquet", "n" * 200 + "/" + "o/" * 350 + "p")
    ]
    for one in shards:
        for row in range(4):
            ledger.publish(captions(one.name, [row]))
    assert max(len(path) for path in journal(ledger)) < 600
    folders: list[str] = []

    class Listed(Storage):
        def list(self, prefix: str = "") -> list[FileInfo]:
            folders.append(prefix)
            return super().list(prefix)

    told = Ledger(Listed(ledger.storage.url))
    told.seal(shards[0], KEPT)
    told.discard(shards[0])
    assert folders == [f"{JOURNAL}/a"] * 2
    assert len(journal(ledger)) == 12 and [state.rows_done for state in ledger.plan(shards).shards] == [4] * 4
    for one in shards[1:]:
        ledger.seal(one, KEPT)
        ledger.discard(one)
    assert journal(ledger) == [] and ledger.verify(shards).ok


def test_a_damaged_part_counts_for_nothing_when_its_shard_is_sealed(ledger: Ledger) -> None:
    torn = publish(ledger, captions(B.name, [0, 1]))
    ledger.storage.put_atomic(torn, ledger.storage.read(torn)[:-20])
    with pytest.raises(SealError, match="rows missing: 0-4"):
        ledger.seal(B, KEPT)
    ledger.publish(captions(B.name, range(5)))
    assert ledger.seal(B, KEPT).rows == 5


def test_law_6_a_changed_shard_is_a_new_shard(ledger: Ledger) -> None:
    old, new = shard("a.parquet", 3), shard("a.parquet", 4, "v2")
    run_to_the_end(ledger, [old], [captions("a.parquet", range(3))])
    stale = publish(ledger, captions("a.parquet", [0], text="stale"))
    plan = ledger.plan([new])
    assert plan.changed == ("a.parquet",)
    assert plan.rows_done == 0
    assert not ledger.verify([new]).ok
    assert "of another version" in ledger.verify([new]).describe()
    ledger.publish(captions("a.parquet", range(4), version="v2", failed=[0]))
    assert ledger.seal(new, KEPT).failed == 1  # the stale caption did not win
    assert ledger.verify([new]).ok
    assert stale in ledger.sweep([new])
    assert journal(ledger) == []


def test_a_grown_input_is_an_increment_and_a_removed_shard_is_reported(ledger: Ledger) -> None:
    run_to_the_end(ledger, [A], [captions(A.name, range(12))])
    assert [state.shard for state in ledger.plan([A, B]).to_caption] == [B]
    run_to_the_end(ledger, [B], [captions(B.name, range(5))])
    assert ledger.plan([B]).foreign == ("data/a.parquet",)
    verification = ledger.verify([B])
    assert verification.ok
    assert "note: data/a.parquet belongs to no shard" in verification.describe()


def test_law_7_planning_reads_footers_only_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(str(tmp_path))
    noise = [random.Random(i).randbytes(100).hex() for i in range(3000)]
    for start in (0, 3000):
        table = captions("a.parquet", range(start, start + 3000))
        table = table.set_column(table.column_names.index("caption"), "caption", pa.array(noise))
        ledger.publish(table)
    assert all(info.size > 100_000 for info in ledger.storage.list(JOURNAL))
    reads: list[int] = []
    cat_file = LocalFileSystem.cat_file

    def counted(self: LocalFileSystem, path: str, start: int, end: int) -> bytes:
        reads.append(end - start)
        return cat_file(self, path, start=start, end=end)

    monkeypatch.setattr(LocalFileSystem, "cat_file", counted)
    monkeypatch.setattr(Storage, "read", None)
    monkeypatch.setattr(Storage, "open", None)
    for _ in range(3):
        assert ledger.plan([shard("a.parquet", 6000)]).rows_done == 6000
    assert len(reads) == 2
    assert max(reads) <= 64 * 1024
    # Travels without cache
    assert pickle.loads(pickle.dumps(ledger)).plan([shard("a.parquet", 6000)]).rows_done == 6000
    assert len(reads) == 4


def spec_with(**generation: object) -> JobSpec:
    sections = {"input": {"path": "in"}, "model": {"path": "m"}, "output": {"path": "out"}}
    return parse_spec({**sections, "generation": generation})


def test_law_8_one_output_holds_the_captions_of_one_spec(ledger: Ledger) -> None:
    ledger.bind(spec_with())
    ledger.publish(captions(A.name, range(3)))
    ledger.bind(spec_with())
    with pytest.raises(LedgerMismatch) as caught:
        ledger.bind(spec_with(max_new_tokens=64, stop=["."]))
    for words in (
        "generation.max_new_tokens (128 there, 64 here)",
        'generation.stop ([] there, ["."] here)',
        "output.path",
    ):
        assert words in str(caught.value)
    moved = spec_with().model_copy(update={"name": "other"})
    ledger.bind(moved)
    assert b'"other"' in ledger.storage.read("_tessera/spec.json")


def test_law_9_success_is_last_and_only_for_a_verified_output(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="verified"):
        ledger.write_success(ledger.verify([B]))
    assert not ledger.storage.exists("_SUCCESS")
    run_to_the_end(ledger, [B], [captions(B.name, range(5))])
    assert not ledger.succeeded(ledger.plan([B]))
    ledger.write_success(ledger.verify([B]))
    assert ledger.succeeded(ledger.plan([B]))
    ledger.clear_success()
    ledger.clear_success()
    assert not ledger.succeeded(ledger.plan([B]))


def test_law_9_a_mark_that_does_not_count_what_the_files_hold_is_no_mark(ledger: Ledger) -> None:
    run_to_the_end(ledger, [B], [captions(B.name, range(5), failed=[1])])
    ledger.write_success(ledger.verify([B]))
    assert ledger.succeeded(ledger.plan([B])) and not ledger.succeeded(ledger.plan([A, B]))
    ledger.publish(captions(B.name, [1]), RETRY)
    merge_retried(ledger)
    assert not ledger.succeeded(ledger.plan([B]))
    ledger.write_success(ledger.verify([B]))
    assert ledger.succeeded(ledger.plan([B]))
    for other in (b"", b"0", b"{}"):  # as other tools write it
        ledger.storage.put_atomic("_SUCCESS", other)
        assert not ledger.succeeded(ledger.plan([B]))


def test_verification_finds_what_does_not_belong(ledger: Ledger) -> None:
    run_to_the_end(ledger, [B], [captions(B.name, range(5))])
    good = ledger.storage.read("data/sub/b.parquet")
    table = pq.read_table(pa.BufferReader(good))
    stray = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(None), stray)
    ledger.storage.put_atomic("data/stray.parquet", stray.getvalue().to_pybytes())
    verification = ledger.verify([B])
    assert not verification.ok
    assert verification.problems == ("data/stray.parquet was not written by Tessera",)
    ledger.storage.delete(["data/stray.parquet"])
    claim = decode(tail_of(good), len(good))  # which a forger keeps
    for rows, words in (
        (table.slice(0, 3), "lacks rows 3-4"),
        (pa.concat_tables([table, table]), "has 10 rows in the output and 5 in the input"),
    ):
        ledger.storage.put_atomic("data/sub/b.parquet", to_parquet(rows, claim, statistics=True))
        verification = ledger.verify([B])
        assert not verification.ok
        assert words in verification.describe()
    miscounted = {B.name: replace(claim[B.name], stats=RowStats(7))}
    ledger.storage.put_atomic("data/sub/b.parquet", to_parquet(table, miscounted, statistics=True))
    assert "counts 7 rows in its statistics and holds 5" in ledger.verify([B]).describe()
    ledger.storage.put_atomic("data/sub/b.parquet", good)
    assert ledger.verify([B]).ok


FORGERIES = {
    "one row four times": [0, 0, 0, 0, 4],
    "two rows swapped": [0, 2, 1, 3, 4],
    "a foreign row": [0, 1, 2, 3, 5],
}


@pytest.mark.parametrize("rows", FORGERIES.values(), ids=FORGERIES)
def test_law_11_a_sealed_file_proves_its_rows(ledger: Ledger, rows: list[int]) -> None:
    """The count is right and the record of the footer is kept, by our own writer or by another that rewrites the file:
    of that one, the footer is another."""
    run_to_the_end(ledger, [A, B], [captions(A.name, range(12)), captions(B.name, range(5))])
    good = ledger.storage.read("data/sub/b.parquet")
    table = pq.read_table(pa.BufferReader(good))
    more = pq.read_table(pa.BufferReader(ledger.storage.read("data/a.parquet")))
    forged = pa.concat_tables([table, more.slice(3, 1)]).take(rows)
    footer = pq.read_metadata(pa.BufferReader(good))
    claim = decode(tail_of(good), len(good))
    rewritten = pa.BufferOutputStream()
    pq.write_table(forged.replace_schema_metadata(footer.metadata), rewritten)
    ledger.storage.put_atomic("data/sub/b.parquet", rewritten.getvalue().to_pybytes())
    assert "data/sub/b.parquet has a damaged footer" in ledger.verify([A, B]).describe()
    ledger.storage.put_atomic("data/sub/b.parquet", to_parquet(forged, claim, statistics=True))
    verification = ledger.verify([A, B], deep=True)
    assert not verification.ok
    assert verification.altered == {B.name: RowSet.span(5)}
    assert (
        "data/sub/b.parquet does not hold the rows that were sealed: among rows 0-4 "
        in verification.describe()
    )
    ledger.storage.put_atomic("data/sub/b.parquet", good)
    assert ledger.verify([A, B], deep=True).ok


def test_law_11_a_page_that_cannot_be_read_proves_nothing(ledger: Ledger) -> None:
    run_to_the_end(ledger, [A, B], [captions(A.name, range(12)), captions(B.name, range(5))])
    data = bytearray(ledger.storage.read("data/a.parquet"))
    column = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)
    start = column.dictionary_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    ledger.storage.put_atomic("data/a.parquet", bytes(data))
    assert ledger.verify([A, B], deep=True).altered == {A.name: RowSet.span(12)}
    assert ledger.verify([A, B]).ok  # which is why there is `tessera verify --deep`


def test_law_11_a_damaged_footer_proves_nothing(ledger: Ledger) -> None:
    """Also where it still is a footer: one letter of what it says differs, or there are bytes too many or too few."""
    run_to_the_end(ledger, [B], [captions(B.name, range(5))])
    good = ledger.storage.read("data/sub/b.parquet")
    said = good.replace(b'"prompt_tokens":50', b'"prompt_tokens":51')
    assert said != good and pq.read_metadata(pa.BufferReader(said)).num_rows == 5
    for data, words in (
        (said, "damaged footer"),
        (good[:4] + b"-" + good[4:], f"has {len(good) + 1:,} bytes"),
    ):
        ledger.storage.put_atomic("data/sub/b.parquet", data)
        verification = ledger.verify([B])
        assert not verification.ok and words in verification.describe()
    ledger.storage.put_atomic("data/sub/b.parquet", good)
    assert ledger.verify([B]).ok


def silently_damaged(data: bytes) -> bytes:
    """The file with one bit changed, so that it reads as other rows."""
    good = pq.read_table(pa.BufferReader(data))
    for place in range(4, len(data)):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with suppress(pa.ArrowException, OSError):
            read = pq.read_table(pa.BufferReader(damaged))
            if read.num_rows == good.num_rows and read != good:
                return damaged
    raise AssertionError("every bit is checked")


@pytest.mark.parametrize("amending", [False, True], ids=["seal", "amend"])
def test_law_11_damage_is_not_sealed(ledger: Ledger, amending: bool) -> None:
    """A byte of a page differs, and it decodes all the same: its checksum tells, before it gets digests of its own."""
    if amending:
        run_to_the_end(ledger, [B], [captions(B.name, range(5), failed=[1])])
    rows, folder = ([1], RETRY) if amending else (range(5), JOURNAL)
    (part,) = ledger.publish(captions(B.name, rows), folder)
    path = "data/sub/b.parquet" if amending else part.path
    ledger.storage.put_atomic(path, silently_damaged(ledger.storage.read(path)))
    before = sealed_bytes(ledger)
    seal = partial(merge_retried, ledger) if amending else partial(ledger.seal, B, KEPT)
    with pytest.raises(SealError, match=rf"^{path} is damaged \(.*\); delete it and run the job again"):
        seal()
    assert sealed_bytes(ledger) == before


def test_verification_reads_footers_only_and_deep_every_page(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_to_the_end(ledger, [B], [captions(B.name, range(5))])
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "read", None)
        patch.setattr(Storage, "open", None)
        assert ledger.verify([B]).ok
    data = ledger.storage.read("data/sub/b.parquet")
    footer = pq.read_metadata(pa.BufferReader(data))
    for index in range(0, footer.num_columns, 3):
        chunk = footer.row_group(0).column(index)
        changed = bytearray(data)
        changed[chunk.data_page_offset + chunk.total_compressed_size // 2 - 1] ^= 1
        ledger.storage.put_atomic("data/sub/b.parquet", bytes(changed))
        assert ledger.verify([B]).ok and not ledger.verify([B], deep=True).ok, chunk.path_in_schema


def test_law_11_only_every_row_once_and_in_order_is_sealed() -> None:
    parts = [part_of(captions(B.name, rows)) for rows in ([0, 1, 2], [3, 4, 5])]
    for places, words in (
        ([0, 0, 0, 0, 4], "rows missing: 1-3, rows beyond its 5: none, rows twice: 0$"),
        ([0, 1, 2, 3], "rows missing: 4, rows beyond its 5: none, rows twice: none$"),
        ([0, 1, 2, 3, 4, 5], "rows missing: none, rows beyond its 5: 5, rows twice: none$"),
        ([0, 2, 1, 3, 4], "rows missing: none, rows beyond its 5: none, rows twice: none, and out of order$"),
    ):
        with pytest.raises(SealError, match=words):
            sealed_file(B, parts, np.array(places))
    _, stats = sealed_file(B, parts, np.arange(5))
    assert stats.rows == 5


def part_of(table: pa.Table) -> pa.Table:
    """What `part_rows` makes of a part."""
    return part_rows("part", to_parquet(table, {}, statistics=False), B, sealed_schema(KEPT))


def test_verification_names_what_lies_about_in_the_journal(ledger: Ledger) -> None:
    for table in (
        captions(A.name, [0, 1, 2]),
        captions(A.name, [2, 3, 40]),
        captions(A.name, [0], version="v0"),
        captions("gone.parquet", [7]),
    ):
        ledger.publish(table)
    said = ledger.verify([A]).describe()
    for words in (
        "a.parquet is not sealed; in the journal: 4 of 12 rows, missing rows 4-11",
        "rows 2 of a.parquet are in several parts",
        "holds rows 40 of a.parquet, which has 12",
        "holds rows 0 of a.parquet, which changed since",
        "holds rows 7 of gone.parquet, which is gone since",
    ):
        assert words in said, said


def test_runs_are_recorded(ledger: Ledger) -> None:
    assert ledger.runs() == []
    ledger.record_run("2026-02", {"rows": 2})
    ledger.record_run("2026-01", {"rows": 1})
    for name, damaged in {"0": b"", "1": b"[]", "2": b"\xff{"}.items():
        ledger.storage.put_atomic(f"_tessera/runs/{name}.json", damaged)
    none = {"captioned": 0, "seconds": 0.0, "rows_per_s": 0.0}
    assert ledger.runs() == [{"run": "2026-01", "rows": 1, **none}, {"run": "2026-02", "rows": 2, **none}]


def test_rows_without_identity_are_refused(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    table = captions(A.name, [0, 1])
    for bad in (
        table.slice(0, 0),
        table.set_column(table.column_names.index("_row"), "_row", pa.array([0, None], pa.int64())),
        pa.concat_tables([table, captions(A.name, [3], version="v2")]),
    ):
        with pytest.raises(ValueError):
            ledger.publish(bad)


def test_an_output_without_captions_is_free_for_another_spec(ledger: Ledger) -> None:
    ledger.bind(spec_with(max_new_tokens=1))
    ledger.bind(spec_with(max_new_tokens=2))
    assert b'"generation.max_new_tokens": 2' in ledger.storage.read("_tessera/spec.json")


def test_law_11_every_bit_of_a_footer_counts(tmp_path: Path) -> None:
    """Also those that say what type a column has, where its pages lie, or how large they are. (Arrow's metadata of a
    column chunk is made without a net: a wrong size in it was `terminate called`, no error.)"""
    ledger = Ledger(str(tmp_path))
    run_to_the_end(ledger, [B], [captions(B.name, range(5))])
    good = (tmp_path / "data/sub/b.parquet").read_bytes()
    assert decode(tail_of(good), len(good)).keys() == {B.name}
    for place in range(len(good) - len(tail_of(good)), len(good) - 8):
        for bit in (0, 1):
            data = bytearray(good)
            data[place] ^= 1 << bit
            with pytest.raises((ValueError, KeyError, TypeError)):  # as the ledger expects
                decode(tail_of(bytes(data)), len(data))
