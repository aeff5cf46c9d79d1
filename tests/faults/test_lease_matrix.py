"""What a run that lost its lease still changes: every write, held up at every moment, on disk and on S3.

The table says the same as the docstring of pipeline/storage/lease.py. Its columns are the moments in which another run
takes the output over, and does what it would:

- before: the look at the lease comes after it.
- late: between that look and the store's carrying out the request.
- retried: the first attempt was reset; the second one meets the successor.
- lost reply: the request was carried out under the lease, and its answer was lost on the way.

In the last column the write was the run's right, so it stays, and what the successor did came after it.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryDirectory

import pytest

from pipeline.ledger.ledger import JOURNAL, RETRY, RUNS, SPEC, SUCCESS, Ledger, LedgerMismatch
from pipeline.ledger.retry import merge_retried
from pipeline.spec.job_spec import JobSpec, parse_spec
from pipeline.storage import retrying
from pipeline.storage.files import in_parallel
from pipeline.storage.lease import LEASE, Fence, LeaseLost
from pipeline.storage.storage import Storage
from tests.pipeline.ledgers import KEPT, End, HeldUpStorage, captions, run_to_the_end, shard, silent

A, B = shard("a.parquet", 3), shard("b.parquet", 2)
A2, B2 = shard("a.parquet", 3, "v2"), shard("b.parquet", 2, "v2")
Files = dict[str, bytes]
Act = Callable[[Ledger], object]


def spec_of(tokens: int) -> JobSpec:
    sections = {"input": {"path": "in"}, "model": {"path": "m"}, "output": {"path": "out"}}
    return parse_spec({**sections, "generation": {"max_new_tokens": tokens}})


def nothing(ledger: Ledger) -> None:
    """The output is new, or the successor has not come to it yet."""


def bound(tokens: int) -> Act:
    def bind(ledger: Ledger) -> None:
        with suppress(LedgerMismatch):  # the other came first, with captions
            ledger.bind(spec_of(tokens))

    return bind


def with_b_sealed(ledger: Ledger) -> None:
    """One row of it failed, and was tried again; parts of its next version are there as well."""
    run_to_the_end(ledger, [B], [captions(B.name, range(2), failed=[1])])
    ledger.publish(captions(B.name, [1], text="second"), RETRY)
    ledger.publish(captions(B.name, range(2), version="v2"))


def marked(ledger: Ledger) -> None:
    with_b_sealed(ledger)
    mark(ledger)


def with_a_journaled(ledger: Ledger) -> None:
    ledger.publish(captions(A.name, range(3)))


def with_a_in_parts(ledger: Ledger) -> None:
    for row in range(3):
        ledger.publish(captions(A.name, [row]))


def publish(*rows: int) -> Act:
    return lambda ledger: ledger.publish(captions(A.name, rows))


def seal_a(ledger: Ledger) -> None:
    ledger.seal(A, KEPT)


def seal_b2(ledger: Ledger) -> None:
    ledger.seal(B2, KEPT)


def amend(ledger: Ledger) -> None:
    merge_retried(ledger)


def sweep(ledger: Ledger) -> None:
    ledger.sweep([A2])


def mark(ledger: Ledger) -> None:
    ledger.write_success(ledger.verify([B]))


def unmark(ledger: Ledger) -> None:
    ledger.clear_success()


def record(ledger: Ledger) -> None:
    ledger.record_run("paused", {})


@dataclass(frozen=True)
class Write:
    """One write of the paused run: where its request goes, what there is before, and what the successor does."""

    below: str
    before: Act
    write: Act
    successor: Act
    expected: str


MOMENTS: tuple[End | str, ...] = ("before", "late", "retried", "lost_reply")
# Of what the paused run writes there is left:                            before   late     retried  lost reply
TABLE = {
    "spec.json, new": Write(SPEC, nothing, bound(2), bound(1),           "nothing  nothing  nothing  stays"),
    "spec.json": Write(SPEC, bound(3), bound(2), bound(1),               "nothing  nothing  nothing  stays"),
    "a part": Write(JOURNAL, nothing, publish(2), publish(0, 1),         "nothing  stays    nothing  stays"),
    "the first part, of another spec": Write(
        JOURNAL, bound(2), publish(2), bound(1),                         "nothing  stays    nothing  bars the spec"),
    "a seal": Write("data/", with_a_journaled, seal_a, seal_a,           "nothing  nothing  nothing  stays"),
    "a seal that the successor has not come to": Write(
        "data/", with_a_journaled, seal_a, nothing,                      "nothing  stays    nothing  stays"),
    "the seal of a changed shard": Write(
        "data/", with_b_sealed, seal_b2, seal_b2,                        "nothing  nothing  nothing  stays"),
    "the seal of a changed shard that the successor has not come to": Write(
        "data/", with_b_sealed, seal_b2, nothing,                        "nothing  stays    nothing  stays"),
    "an amended seal": Write("data/", with_b_sealed, amend, amend,       "nothing  nothing  nothing  stays"),
    "an amended seal that the successor has not come to": Write(
        "data/", with_b_sealed, amend, nothing,                          "nothing  stays    nothing  stays"),
    "a deleted part": Write(
        JOURNAL, with_a_journaled, sweep, nothing,                       "nothing  stays    nothing  stays"),
    "deleted parts": Write(
        JOURNAL, with_a_in_parts, sweep, nothing,                        "nothing  stays    nothing  stays"),
    "the mark, new": Write(SUCCESS, with_b_sealed, mark, publish(0),     "nothing  nothing  nothing  taken back"),
    "the mark": Write(SUCCESS, marked, mark, mark,                       "nothing  nothing  nothing  stays"),
    "the mark taken away": Write(SUCCESS, marked, unmark, mark,          "nothing  nothing  nothing  stays"),
    "the mark taken away that the successor has not come to": Write(
        SUCCESS, marked, unmark, nothing,                                "nothing  stays    nothing  stays"),
    "the record of the run": Write(RUNS, nothing, record, nothing,       "nothing  stays    nothing  stays"),
}  # fmt: skip


def fenced(storage: Storage, run: str) -> Ledger:
    return Ledger(storage, Fence(Storage(storage.url), run))


def files_of(storage: Storage) -> Files:
    paths = [info.path for info in storage.list()]
    return dict(zip(paths, in_parallel(storage.read, paths), strict=True))


@cache
def after(kind: str, *acts: str) -> Files:
    """The files once the paused run and its successor have done something after the other, each under its lease."""
    write = TABLE[kind]
    with TemporaryDirectory() as folder:
        storage = Storage(folder)
        write.before(Ledger(storage))
        for act, run in (("start", "paused"), *((act, act) for act in acts)):
            silent(storage, run)
            if act != "start":
                (write.write if act == "paused" else write.successor)(fenced(storage, act))
        silent(storage, "other" if acts else "paused")
        return files_of(storage)


def expected(kind: str, moment: str) -> Files:
    write, alone = TABLE[kind], after(kind, "other")
    cells = dict(zip(MOMENTS, write.expected.split(maxsplit=3), strict=True))
    if cells[moment] == "bars the spec":
        return after(kind, "paused", "other")
    if cells[moment] != "stays":
        return alone
    order = ("paused", "other") if moment == "lost_reply" else ("other", "paused")
    with_it = after(kind, *order)
    kept = {path: data for path, data in alone.items() if not path.startswith(write.below)}
    return kept | {path: data for path, data in with_it.items() if path.startswith(write.below)}


class PausedFence(Fence):
    """Is held up before its first look."""

    def __init__(self, storage: Storage, run: str, meanwhile: Callable[[], None]) -> None:
        super().__init__(storage, run)
        self._pauses: Iterator[Callable[[], None]] = iter([meanwhile])

    def check(self) -> None:
        for meanwhile in self._pauses:
            meanwhile()
        super().check()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.001)


CELLS = [
    (store, kind, moment)
    for store in ("local", "s3")
    for kind in TABLE
    for moment in (*MOMENTS, "late_lost_reply")  # whose effect is that of "late"
    if (store, kind) != ("local", "deleted parts")  # a disk deletes file by file, as in "a deleted part"
]


@pytest.mark.parametrize(("store", "kind", "moment"), CELLS)
def test_a_lost_lease(request, tmp_path, store: str, kind: str, moment: str) -> None:
    storage = Storage(
        str(tmp_path / "out") if store == "local" else request.getfixturevalue("s3_url") + "/out"
    )
    in_parallel(lambda item: storage.put_atomic(*item), after(kind).items())
    write, taken_over = TABLE[kind], []

    def take_over() -> None:
        taken_over.append(True)
        silent(storage, "other")
        write.successor(fenced(storage, "other"))

    if moment == "before":
        ledger = Ledger(storage, PausedFence(storage, "paused", take_over))
    else:
        end = "reset" if moment == "retried" else moment
        held_up = HeldUpStorage(storage.url, write.below, take_over, end)  # type: ignore[arg-type]
        ledger = Ledger(held_up, Fence(storage, "paused"))
    want = expected(kind, "late" if moment == "late_lost_reply" else moment)
    went_through = moment == "late" and want != after(kind, "other")
    with suppress(LeaseLost) if went_through else pytest.raises(LeaseLost, match="run other"):
        write.write(ledger)
    assert taken_over
    assert files_of(storage) == want


@pytest.mark.parametrize("kind", TABLE)
def test_whatever_comes_late_the_successor_comes_to_a_whole_end(tmp_path, kind: str) -> None:
    storage = Storage(str(tmp_path))
    for path, data in expected(kind, "late").items():
        storage.put_atomic(path, data)
    ledger, shards = fenced(storage, "other"), [A, B]
    ledger.clear_success()
    for state in ledger.plan(shards).to_caption:
        rows = [row for start, stop in state.remaining.ranges for row in range(start, stop)]
        ledger.publish(captions(state.shard.name, rows))
    run_to_the_end(ledger, shards, [])
    merge_retried(ledger)
    ledger.write_success(ledger.verify(shards))
    assert ledger.succeeded(ledger.plan(shards)) and storage.exists(LEASE)
