"""A session: one run's right to write an output, and its end, whichever way it ends.

Why: `tessera run` and `tessera retry` both hold the lease, watch the journal while Ray works, drain when they are
told to stop, and leave a record. That is written once, here.

The work runs in a thread of its own, so that the main thread is free for signals, progress and the
lease; and whatever ends the session, the lease is released and the record written on the way out.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.ledger.ledger import Ledger
from pipeline.run.engines import Engines
from pipeline.run.outcome import JobError, root_cause
from pipeline.run.pace import STALL_SECONDS, Pace
from pipeline.run.progress import Display, Progress
from pipeline.run.stop import GRACE_SECONDS, Stopped, StopSignals, grace
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.lease import Lease, LeaseLost, acquire
from pipeline.storage.retrying import RETRIES
from pipeline.storage.storage import Storage

if TYPE_CHECKING:
    from actors.engine.types import EngineRecord

# Between two looks at the journal, at least: looking takes no more than a fifth of the time.
_POLL_SECONDS = 1.0
_TICK_SECONDS = 0.1  # between two looks at signals and lease
_ANSWER_SECONDS = 10.0  # for the cluster to say what it lacks
_WORKING = "the cluster lacks nothing; the actors work, and none has finished a block"

Result = TypeVar("Result")


class Session:
    """A run that holds its output's lease. `ledger` is fenced; `record` is what its file under _tessera/runs says."""

    def __init__(self, run: str, lease: Lease, signals: StopSignals, show: Display) -> None:
        self.run, self.lease, self.signals, self.show = run, lease, signals, show
        self.ledger = Ledger(lease.storage, lease.fence)
        self.record: dict[str, Any] = {"captioned": 0, "seconds": 0.0, "rows_per_s": 0.0}
        self.storage_retries = 0  # that workers reported
        self.engines = Engines()  # of the workers that reported
        self.draining = False  # nothing new is begun
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the session began."""
        return time.monotonic() - self._began

    def retries(self) -> int:
        """Storage operations tried again so far, here and in the workers that reported."""
        self.storage_retries += RETRIES.take()
        return self.storage_retries

    def engines_ready(self, records: Iterable[EngineRecord]) -> None:
        """Says what engines compute on and how, once for all that are alike."""
        for line in self.engines.add(records):
            self.show.note(line)

    def waiting(self, why: str) -> None:
        """Says what the run waits for before it starts. Raises LeaseLost when another run took the output meanwhile."""
        if self.lease.lost:
            raise LeaseLost(self.lease.lost)
        self.show.phase("waiting for room on the cluster", why)

    def watch(
        self,
        work: Callable[[], None],
        look: Callable[[], Progress],
        lacking: Callable[[], str],
        verdict: Callable[[Progress], Exception | None],
    ) -> None:
        """Runs `work` to its end, and shows about every second what `look` finds.

        `lacking` is asked what the cluster lacks when no row came for a while. `verdict` may give up: the run then
        drains, and what it returned is raised. Raises JobError if `work` fails; Stopped when the run was asked to stop,
        once what is in flight is published or the grace is over; LeaseLost when another run took the output.
        """
        working, pace, stall = _Background(work), Pace(), _Stall(lacking, self.retries)
        looked, deadline = 0.0, None
        given_up: BaseException | None = None
        with self.signals.draining():
            while True:
                stopping = isinstance(given_up, Stopped)
                over = self._wait(working, max(_POLL_SECONDS, 4 * looked), deadline, stopping)
                if self.lease.lost:
                    raise LeaseLost(self.lease.lost)
                if self.signals.received and not stopping:
                    given_up, deadline = Stopped(self.signals.received), time.monotonic() + grace()
                    self._drain(f"stopping: what is in flight may take {grace():g} s; again to stop at once")
                began = time.monotonic()
                progress = look()
                looked = time.monotonic() - began
                self.record = progress.record()
                self.show.update(stall.explained(pace.of(time.monotonic(), progress)))
                if not over and given_up is None and (given_up := verdict(progress)):
                    deadline = time.monotonic() + GRACE_SECONDS
                    self._drain(f"stopping: {given_up}")
                if over or (deadline and time.monotonic() > deadline):
                    break
        if self.signals.received:
            raise Stopped(self.signals.received)
        if given_up:
            raise given_up
        try:
            working.result()
        except Exception as error:
            self.lease.fence.check()  # a worker may have met the fence before our own heartbeat did
            raise JobError(root_cause(error)) from error
        self.lease.fence.check()  # one that did leaves its rows undone, without an error

    def _drain(self, why: str) -> None:
        self.show.phase(why)
        self.draining = True
        self.lease.drain()

    def _wait(
        self, working: _Background[None], seconds: float, deadline: float | None, stopping: bool
    ) -> bool:
        """Until the work is over, the time is up, or there is something to react to."""
        until = time.monotonic() + seconds
        until = min(until, deadline) if deadline else until
        while not working.wait(_TICK_SECONDS):
            news = self.lease.lost or (self.signals.received and not stopping)
            if news or time.monotonic() > until:
                return False
        return True

    def ended(self, how: str) -> None:
        """Writes the run's record: done, stopped or failed."""
        record = {
            **self.record,
            **self.engines.record(),
            "ended": how,
            "storage_retries": self.retries(),
        }
        if self.lease.warning:
            record["warnings"] = [self.lease.warning]
        with suppress(OSError, LeaseLost):  # the run's end is worth more than its record
            self.ledger.record_run(self.run, record)


@contextmanager
def open_session(spec: JobSpec, take_over: bool, show: Display) -> Iterator[Session]:
    """Takes the output's lease, and releases it at the end. Raises LeaseHeld."""
    run = time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + uuid.uuid4().hex[:6]
    storage = Storage(spec.output.path)
    with StopSignals() as signals, acquire(storage, run, take_over, show.phase) as lease:
        session = Session(run, lease, signals, show)
        try:
            yield session
        except BaseException as error:
            session.ended("stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed")
            raise
        session.ended("done")


class _Stall:
    """Finds out why no row comes, about once a minute while none does.

    `lacking` says what the cluster lacks (nothing: ""), `retries` how often storage was tried again so far.
    """

    def __init__(self, lacking: Callable[[], str], retries: Callable[[], int]) -> None:
        self._lacking, self._retries = lacking, retries
        self._told, self._why, self._retries_before = 0.0, "", 0

    def explained(self, progress: Progress) -> Progress:
        """`progress` with what it waits for, where it is stalled."""
        if not progress.stalled:
            self._told, self._why, self._retries_before = 0.0, "", self._retries()
            return progress
        if progress.stalled - self._told >= STALL_SECONDS:
            self._told, self._why = progress.stalled, self._ask()
        if not self._why and not progress.captioned:
            return replace(progress, stalled=0.0)  # a model that takes its time to load
        return replace(progress, waiting_for=self._why or _WORKING)

    def _ask(self) -> str:
        asking = _Background(self._lacking)
        if not asking.wait(_ANSWER_SECONDS):
            return "the cluster does not answer"
        try:
            found = [asking.result()]
        except Exception as error:
            return f"the cluster cannot be asked ({root_cause(error)})"
        retries = self._retries() - self._retries_before
        if retries:
            found.append(f"storage was tried again {retries:,} times meanwhile")
        return "; ".join(filter(None, found))


class _Background(Generic[Result]):
    """A function in a daemon thread: the main thread stays free for progress, signals and the lease."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._done = threading.Event()
        self._result: Result
        self._error: BaseException | None = None
        threading.Thread(target=self._call, args=(function,), daemon=True).start()

    def _call(self, function: Callable[[], Result]) -> None:
        try:
            self._result = function()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._result
