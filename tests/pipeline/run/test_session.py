"""The loop that watches a run: what it says of a stall, when it gives up, and what it lets through."""

import io
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from actors.engine.types import EngineRecord
from pipeline.run import session as module
from pipeline.run.failing import AllFailed
from pipeline.run.outcome import JobError
from pipeline.run.progress import Display, Lines, Progress
from pipeline.run.session import Session, _Stall
from pipeline.run.stop import StopSignals
from pipeline.storage.lease import Lease, LeaseLost, acquire
from pipeline.storage.storage import Storage

STALLED = Progress(
    total=100, done=10, errors=0, captioned=10, generated_tokens=10, seconds=90.0, stalled=60.0
)


@pytest.fixture
def lease(tmp_path):
    with acquire(Storage(str(tmp_path)), "run", False, lambda _: None) as lease:
        yield lease


def session_of(lease: Lease, show: Display | None = None) -> Session:
    return Session("run", lease, StopSignals(), show or Lines(io.StringIO()))


def test_a_run_that_is_given_up_drains_and_raises_why(lease, monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    stream, drained = io.StringIO(), threading.Event()
    session = session_of(lease, Lines(stream))

    def verdict(_: Progress) -> AllFailed | None:
        assert not drained.is_set()  # asked no more once it was given
        return AllFailed("all of them")

    def work() -> None:
        while not session.draining:
            time.sleep(0.01)
        drained.set()

    with pytest.raises(AllFailed, match="all of them"):
        session.watch(work, lambda: replace(STALLED, stalled=0.0), str, verdict)
    assert drained.is_set() and lease.fence.stopping()
    assert "stopping: all of them\n" in stream.getvalue()


def test_work_that_breaks_is_a_broken_job(lease):
    def work() -> None:
        raise ValueError("no such column")

    with pytest.raises(JobError, match="no such column"):
        session_of(lease).watch(work, lambda: STALLED, str, lambda _: None)


def test_work_that_ends_because_workers_met_the_fence_is_a_lost_lease(lease, tmp_path):
    """They drain, which is no error; the driver's own heartbeat has noticed nothing yet."""
    with acquire(Storage(str(tmp_path)), "other", True, lambda _: None):
        assert not lease.lost
        with pytest.raises(LeaseLost, match="took it over"):
            session_of(lease).watch(lambda: None, lambda: STALLED, str, lambda _: None)


def test_who_waits_for_room_notices_that_the_output_was_taken_over(lease):
    stream = io.StringIO()
    session = session_of(lease, Lines(stream))
    session.waiting("4 CPUs")
    assert stream.getvalue() == "waiting for room on the cluster: 4 CPUs\n"
    lease.lost = "another run took it over"
    with pytest.raises(LeaseLost, match="another run took it over"):
        session.waiting("4 CPUs")


def test_the_engines_are_told_once_and_stand_in_the_record(lease):
    stream = io.StringIO()
    session = session_of(lease, Lines(stream))
    record = EngineRecord("continuous", "a processor", "float32", 1, why=("graphs: no memory for them",))
    session.engines_ready([record])
    session.engines_ready([record])
    session.ended("done")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("engine: continuous on a processor, float32, 1 thread; attention stock")
    assert second == "graphs: none, because no memory for them"
    (kept,) = session.ledger.runs()
    assert kept["engine"]["device"] == "a processor" and kept["engine"]["replicas"] == 2
    assert kept["ended"] == "done"


def stall(lacking: Callable[[], str], retries: Callable[[], int] = int) -> _Stall:
    return _Stall(lacking, retries)


def test_a_stall_is_explained_once_a_minute():
    asked: list[int] = []

    def lacking() -> str:
        asked.append(1)
        return f"reason {len(asked)}"

    found = stall(lacking)
    told = [found.explained(replace(STALLED, stalled=float(s))).waiting_for for s in (0, 60, 61, 119, 120)]
    assert told == ["", "reason 1", "reason 1", "reason 1", "reason 2"]


def test_a_stall_that_the_cluster_does_not_explain():
    assert (
        stall(str).explained(STALLED).waiting_for
        == "the cluster lacks nothing; the actors work, and none has finished a block"
    )
    loading = replace(STALLED, captioned=0, stalled=600.0)
    assert not stall(str).explained(loading).stalled  # large models take their time
    assert stall(lambda: "2 Generate actors wait").explained(loading).waiting_for == "2 Generate actors wait"


def test_storage_that_is_tried_again_is_told_beside():
    counts = iter([3, 10])
    found = stall(lambda: "no CPU", lambda: next(counts))
    found.explained(replace(STALLED, stalled=0.0))
    assert found.explained(STALLED).waiting_for == "no CPU; storage was tried again 7 times meanwhile"


def test_a_cluster_that_does_not_answer_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.01)
    released = threading.Event()

    def lacking() -> str:
        released.wait(30)
        return ""

    assert stall(lacking).explained(STALLED).waiting_for == "the cluster does not answer"
    released.set()

    def gone() -> str:
        raise ConnectionError("head node is gone")

    monkeypatch.setattr(module, "_ANSWER_SECONDS", 30)
    assert "head node is gone" in stall(gone).explained(STALLED).waiting_for
