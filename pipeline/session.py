"""A session: one run's right to write an output, and its end, whichever way it ends.

Why: `tessera run` and `tessera retry` both hold the lease, watch the journal while Ray works, drain when they are
told to stop, and leave a record. That is written once, here.

The one idea: the work runs in a thread of its own, so that the main thread is free for signals, progress and the
lease; and whatever ends the session, the lease is released and the record written on the way out.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.lease import Lease, LeaseLost, acquire
from pipeline.ledger import Ledger
from pipeline.outcome import JobError, root_cause
from pipeline.progress import Display
from pipeline.spec import JobSpec
from pipeline.stop import Stopped, StopSignals, grace
from pipeline.storage import Storage
from pipeline.weather import RETRIES

# Between two looks at the journal, at least: looking takes no more than a fifth of the time.
_POLL_SECONDS = 1.0
_TICK_SECONDS = 0.1  # between two looks at signals and lease


class Session:
    """A run that holds its output's lease. `ledger` is fenced; `record` is what its file under _tessera/runs says."""

    def __init__(self, run: str, lease: Lease, signals: StopSignals, show: Display) -> None:
        self.run, self.lease, self.signals, self.show = run, lease, signals, show
        self.ledger = Ledger(lease.storage, lease.fence)
        self.record: dict[str, Any] = {"captioned": 0, "seconds": 0.0, "rows_per_s": 0.0}
        self.storage_retries = 0  # that workers reported
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the session began."""
        return time.monotonic() - self._began

    def retries(self) -> int:
        """Storage operations tried again so far, here and in the workers that reported."""
        self.storage_retries += RETRIES.take()
        return self.storage_retries

    def watch(self, work: Callable[[], None], look: Callable[[], None]) -> None:
        """Runs `work` to its end and calls `look` about every second.

        Raises JobError if it fails; Stopped when the run was asked to stop, once what is in flight is published or the
        grace is over; LeaseLost when another run took the output.
        """
        working = _Background(work)
        looked, deadline = 0.0, None
        with self.signals.draining():
            while True:
                over = self._wait(working, max(_POLL_SECONDS, 4 * looked), deadline)
                if self.lease.lost:
                    raise LeaseLost(self.lease.lost)
                if self.signals.received and deadline is None:
                    deadline = time.monotonic() + grace()
                    self.show.phase(
                        f"stopping: what is in flight may take {grace():g} s; again to stop at once"
                    )
                    self.lease.drain()
                began = time.monotonic()
                look()
                looked = time.monotonic() - began
                if over or (deadline and time.monotonic() > deadline):
                    break
        if self.signals.received:
            raise Stopped(self.signals.received)
        try:
            working.result()
        except Exception as error:
            self.lease.fence.check()  # a worker may have met the fence before our own heartbeat did
            raise JobError(root_cause(error)) from error

    def _wait(self, working: _Background, seconds: float, deadline: float | None) -> bool:
        """Until the work is over, the time is up, or there is something to react to."""
        until = time.monotonic() + seconds
        until = min(until, deadline) if deadline else until
        while not working.wait(_TICK_SECONDS):
            news = self.lease.lost or (self.signals.received and deadline is None)
            if news or time.monotonic() > until:
                return False
        return True

    def ended(self, how: str) -> None:
        """Writes the run's record: done, stopped or failed."""
        record = {**self.record, "ended": how, "storage_retries": self.retries()}
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


class _Background:
    """A function in a daemon thread: the main thread stays free for progress, signals and the lease."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._call, args=(function,), daemon=True).start()

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def result(self) -> None:
        if self._error is not None:
            raise self._error
