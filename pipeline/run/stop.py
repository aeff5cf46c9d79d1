"""Stopping: SIGTERM, `ray job stop` and Ctrl-C, turned into a drain.

Why: spot nodes and schedulers end jobs every day. A run that is asked to stop has a few seconds: enough to finish
what is being generated, publish it and release the lease, and not enough for anything else.

A signal means two things. While the run drains in an orderly way (`draining` block), the first one is
only noted; at any other time, and from the second one on, it raises `Stopped` where the main thread stands.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 20.0  # Kubernetes kills after 30
_RAY_JOB_SECONDS = 3.0  # `ray job stop` kills after RAY_JOB_STOP_WAIT_TIME_S, and this is its default
_EXIT_SECONDS = 2.0  # of that, to release the lease and leave


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception: nothing on the way up may take it for a failure."""

    def __init__(self, number: int, message: str = "") -> None:
        told = "what was captioned so far is kept, and the same command goes on from there"
        super().__init__(f"stopped by {signal.Signals(number).name}{message and f', {message}'}; {told}")
        self.number = number


def grace() -> float:
    """Seconds a drain may take before whoever sent the signal sends SIGKILL."""
    told = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if told is None and not submitted:
        return GRACE_SECONDS
    return max(1.0, float(told or _RAY_JOB_SECONDS) - _EXIT_SECONDS)


class StopSignals:
    """Handles the signals while it is entered. Outside the main thread it does nothing, as Python wants it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._noted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def install(self) -> None:
        """To be called again after ray.init(), which puts a handler of its own in place."""
        for number in self._before:
            signal.signal(number, self._handle)

    @contextmanager
    def draining(self) -> Iterator[None]:
        """Inside, the first signal only sets `received`."""
        self._noted = True
        try:
            yield
        finally:
            self._noted = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or number
        if not (first and self._noted):
            raise Stopped(number)
