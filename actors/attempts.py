"""Attempt tracking: actors report rows before processing them, so that a row that crashes its process (a poison pill)
is found and quarantined.

A segfault in a decoder or a device assert leaves nobody to write an error row, and the block is tried again for
ever. So somebody outside must remember: an actor tells an `Attempts` object which rows it begins and which it has
done, and is told in return how to go about them. Rows that were in flight at a crash are tried again alone, each with
nothing beside it in the process: the next crash then has one suspect. A quarantined row is handed to the actor as an
error row, and never tried again.

The object is a plain protocol, so that actors run without a cluster; pipeline/run/crashes.py keeps the memory in Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import NoReturn, Protocol

import pyarrow as pa

from actors.schema import ERROR, ERROR_TYPE, ROW, SHARD, error_value

RowKey = tuple[str, int]
"""(shard, row): a row's identity."""


@dataclass(frozen=True, slots=True)
class Proceed:
    """Try the rows but the quarantined ones, each with the message of its error. `ticket` names the attempt when
    it is done."""

    ticket: int = 0
    quarantined: Mapping[RowKey, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Isolate:
    """Nothing was begun: begin these rows one by one, each with nothing beside it."""


Ruling = Proceed | Isolate


class Attempts(Protocol):
    """Remembers across crashes of a stage's processes which rows were in flight."""

    @property
    def stage(self) -> str:
        """The stage named in errors: preprocess or generate."""

    def started(self) -> None:
        """This process begins its life. Raises when too many before it died and nothing got done."""

    def begin(self, rows: Sequence[RowKey], alone: bool) -> Ruling:
        """Rows that are about to be tried; `alone` promises that nothing else runs in this process."""

    def done(self, ticket: int) -> None:
        """The process outlived the attempt."""

    def settled(self, rows: Sequence[RowKey]) -> None:
        """Rows tried one by one are all through, and need not be remembered."""

    def end_process(self, error: BaseException) -> NoReturn:
        """Nothing can be computed in this process any more: ends it, so that another takes its place."""


@dataclass(frozen=True, slots=True)
class Unwatched:
    """No memory: what an actor does without a cluster."""

    stage: str

    def started(self) -> None:
        """Nothing to compare with."""

    def begin(self, rows: Sequence[RowKey], alone: bool) -> Ruling:
        """Every block whole."""
        return Proceed()

    def done(self, ticket: int) -> None:
        """Nothing is remembered."""

    def settled(self, rows: Sequence[RowKey]) -> None:
        """Nothing is remembered."""

    def end_process(self, error: BaseException) -> NoReturn:
        """The process is the caller's: it gets the error."""
        raise error


class Guard:
    """Puts a block through a stage's work, as `attempts` rules: whole, or row by row after a death.

    Threads may call `run` at once. Whole blocks run side by side; a row tried alone waits until no other work
    is in flight and holds the rest back, so that its death incriminates nobody else.
    """

    def __init__(self, attempts: Attempts) -> None:
        attempts.started()
        self._attempts = attempts
        self._lock = SharedExclusiveLock()

    def run(self, block: pa.Table, work: Callable[[pa.Table], pa.Table]) -> pa.Table:
        """`work(block)`, where rows known to kill their process reach `work` as error rows."""
        rows = list(zip(block[SHARD].to_pylist(), block[ROW].to_pylist(), strict=True))
        if not rows:
            return work(block)
        with self._lock.shared():
            ruling = self._attempts.begin(rows, False)
            if isinstance(ruling, Proceed):
                return self._try(ruling, block, rows, work)
        results = []
        for index, row in enumerate(rows):
            with self._lock.alone():
                ruling = self._attempts.begin([row], True)
                assert isinstance(ruling, Proceed)  # it is alone
                results.append(self._try(ruling, block.slice(index, 1), [row], work))
        self._attempts.settled(rows)
        return pa.concat_tables(results)

    def beside(self) -> AbstractContextManager[None]:
        """For other work of the process: it never runs beside a row that is tried alone, and does not wait long."""
        return self._lock.shared(first=True)

    def _try(
        self, ruling: Proceed, block: pa.Table, rows: Sequence[RowKey], work: Callable[[pa.Table], pa.Table]
    ) -> pa.Table:
        # An error that escapes ends the job or the process: the attempt stays open.
        result = work(self._marked(block, rows, ruling))
        self._attempts.done(ruling.ticket)
        return result

    def _marked(self, block: pa.Table, rows: Sequence[RowKey], ruling: Proceed) -> pa.Table:
        """The block with an error in each quarantined row; both stages pass such rows through untouched."""
        if not ruling.quarantined:
            return block
        errors = [
            error_value("crash", self._attempts.stage, ruling.quarantined[row])
            if row in ruling.quarantined
            else error
            for row, error in zip(rows, block[ERROR].to_pylist(), strict=True)
        ]
        return block.set_column(block.schema.get_field_index(ERROR), ERROR, pa.array(errors, ERROR_TYPE))


class SharedExclusiveLock:
    """A readers-writer lock: many at once, or one alone, who goes before newcomers."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._running = 0
        self._waiting = 0
        self._taken = False

    @contextmanager
    def shared(self, first: bool = False) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken and (first or not self._waiting))
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._taken and not self._running)
            self._waiting -= 1
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
