"""The lease: one holder, known by name; expiry by stopwatch; a lost lease stops every writer. On disk and on S3."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.ledger.ledger import Ledger
from pipeline.storage import lease as leases
from pipeline.storage import retrying
from pipeline.storage.files import in_parallel
from pipeline.storage.lease import LEASE, Fence, Holder, LeaseHeld, LeaseLost, acquire, holder_of
from pipeline.storage.storage import Storage
from tests.pipeline.ledgers import KEPT, captions, journal, sealed_bytes, shard, silent

A = shard("a.parquet", 3)


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(
        str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3_url") + "/out"
    )


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 1.0)
    monkeypatch.setattr(leases, "_WATCH_SECONDS", 0.05)
    monkeypatch.setattr(leases, "_STOP_SECONDS", 0.0)
    monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.001)


def test_the_loser_is_told_who_holds_the_output_since_when(storage: Storage) -> None:
    with acquire(storage, "first"):
        said: list[str] = []
        with pytest.raises(LeaseHeld) as caught:
            acquire(storage, "second", say=said.append)
        for words in ("run first", f"pid {os.getpid()}", " UTC", "--take-over", storage.url):
            assert words in str(caught.value)
        assert said == [f"waiting to see whether {holder_of(storage).describe()} is alive"]  # type: ignore[union-attr]
    assert holder_of(storage) is None
    with acquire(storage, "third"):  # at once: the first one released it
        assert holder_of(storage).run == "third"  # type: ignore[union-attr]


def test_of_many_that_start_at_once_one_wins(storage: Storage) -> None:
    def start(number: int) -> str | None:
        try:
            acquired.append(acquire(Storage(storage.url), f"run-{number}"))
        except LeaseHeld as error:
            return str(error)
        return None

    acquired: list[leases.Lease] = []
    answers = in_parallel(start, range(6))
    assert answers.count(None) == len(acquired) == 1
    assert all(acquired[0].fence.run in answer for answer in answers if answer)
    acquired[0].__exit__()


def test_a_crashed_holder_far_away_expires_by_our_own_stopwatch(storage: Storage) -> None:
    silent(storage, since="2099-01-01 00:00:00 UTC")  # whatever its clock says
    began = time.monotonic()
    with acquire(storage, "next"):
        assert time.monotonic() - began >= 1


def test_a_crashed_holder_on_this_machine_needs_no_waiting(storage: Storage) -> None:
    code = (
        "import os, sys; from pipeline.storage.storage import Storage; from pipeline.storage.lease import acquire\n"
        "acquire(Storage(sys.argv[1]), 'victim'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, storage.url], cwd=Path(__file__).parents[3], check=False)
    assert holder_of(storage).is_dead  # type: ignore[union-attr]
    with acquire(storage, "next", say=pytest.fail):
        assert holder_of(storage).run == "next"  # type: ignore[union-attr]


def test_a_reused_pid_is_not_its_predecessor(storage: Storage) -> None:
    me = Holder.here("me")
    assert not me.is_dead
    assert replace(me, started="1").is_dead
    assert not replace(me, machine="elsewhere", started="1").is_dead


def test_a_process_that_proc_hides_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    me = Holder.here("me")
    real = Path.exists
    # As with hidepid, for another user's process
    monkeypatch.setattr("pipeline.storage.lease._started", lambda _: "")
    assert me.is_dead  # /proc shows it, so it is a zombie
    hidden = f"/proc/{os.getpid()}"
    monkeypatch.setattr(Path, "exists", lambda self, **named: str(self) != hidden and real(self, **named))
    assert not me.is_dead


def test_take_over_stops_the_run_that_held_it(storage: Storage) -> None:
    with acquire(storage, "old") as old, acquire(storage, "new", take_over=True):
        with pytest.raises(LeaseLost, match=r"run new .* took it over; what it published is kept"):
            old.fence.check()
        deadline = time.monotonic() + 5
        while old.lost is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "run new" in str(old.lost)
        old.__exit__()  # which releases nothing that is not its own
        assert holder_of(storage).run == "new"  # type: ignore[union-attr]


def test_a_lease_that_was_deleted_is_lost(storage: Storage) -> None:
    with acquire(storage, "run") as held:
        storage.delete([LEASE])
        with pytest.raises(LeaseLost, match="gone"):
            held.fence.check()


def test_a_damaged_lease_expires(storage: Storage) -> None:
    storage.put_atomic(LEASE, b"{")
    with acquire(storage, "run") as held:
        held.fence.check()


def test_law_10_only_the_run_that_holds_the_lease_writes(storage: Storage) -> None:
    ledger = Ledger(storage, Fence(storage, "paused"))
    ledger = pickle.loads(pickle.dumps(ledger))  # as it travels to workers
    silent(storage, "paused")
    ledger.publish(captions(A.name, [0, 1]))
    before = journal(ledger)
    silent(storage, "other")
    assert ledger.sweep([A]) == []  # nothing to delete is nothing to ask for
    ledger.clear_success()
    for write in (
        lambda: ledger.publish(captions(A.name, [2])),
        lambda: ledger.sweep([shard(A.name, 3, "v2")]),
        lambda: ledger.record_run("paused", {}),
    ):
        with pytest.raises(LeaseLost, match="run other"):
            write()
    assert journal(ledger) == before
    Ledger(storage).publish(captions(A.name, [2]))
    with pytest.raises(LeaseLost):
        ledger.seal(A, KEPT)
    assert sealed_bytes(ledger) == {}


def test_draining_is_seen_by_workers(storage: Storage) -> None:
    with acquire(storage, "run") as held:
        fence: Fence = pickle.loads(pickle.dumps(held.fence))
        assert not fence.stopping()
        held.drain()
        assert fence.stopping() and holder_of(storage).draining  # type: ignore[union-attr]
        silent(storage)
        assert fence.stopping()


def _beat_for(url: str, run: str, seconds: float) -> None:
    leases.HEARTBEAT_SECONDS = 0.1
    with acquire(Storage(url), run):
        time.sleep(seconds)


def test_a_paused_process_loses_its_lease_and_notices(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    monkeypatch.setattr(leases, "_machine", lambda: "")  # as from another machine
    holder = multiprocessing.get_context("spawn").Process(target=_beat_for, args=(storage.url, "paused", 60))
    holder.start()
    try:
        deadline = time.monotonic() + 30
        while holder_of(storage) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(LeaseHeld):
            acquire(storage, "too-early")
        os.kill(holder.pid or 0, signal.SIGSTOP)
        with acquire(storage, "next"):
            os.kill(holder.pid or 0, signal.SIGCONT)
            time.sleep(0.5)
            assert holder_of(storage).run == "next"  # type: ignore[union-attr]
            assert json.loads(storage.read(LEASE))["beat"] >= 1
    finally:
        holder.kill()
        holder.join()
