"""Sealing while a run goes on: a shard whose last row has arrived becomes a file, and its parts are deleted.

Why: left to the end of a run over 100 million rows, the journal is three million files. Sealed as they become complete,
it holds the parts of the shards that are open. What is complete follows from the records that came back (journal.py);
which parts there are, the task that seals a shard sees for itself, in the shard's folder.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from pipeline.input.shards import Shard
from pipeline.ledger.entries import RowStats
from pipeline.ledger.journal import Journal
from pipeline.ledger.ledger import Ledger
from pipeline.storage.retrying import RETRIES


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a task says of the shard that it sealed: its rows' statistics, and how often storage was tried again."""

    stats: RowStats
    storage_retries: int = 0


class Task(Protocol):
    """A `seal` at work somewhere; `result` waits for it, and raises what it raised."""

    def done(self) -> bool: ...
    def result(self) -> Sealed: ...


def seal(ledger: Ledger, kept: pa.Schema, shard: Shard) -> Sealed:
    """Seals a shard and deletes its parts."""
    stats = ledger.seal(shard, kept)
    ledger.discard(shard)
    return Sealed(stats, RETRIES.take())


class Sealing:
    """Starts a task for each complete shard of a journal, once, and tells the journal of those that are done.

    `start` begins to `seal` a shard somewhere. A task that fails is not started again: the run's end does what it left.
    """

    def __init__(self, journal: Journal, start: Callable[[Shard], Task]) -> None:
        self._journal, self._start = journal, start
        self._tasks: dict[Shard, Task] = {}
        self._begun: set[str] = set()
        self.storage_retries = 0

    def advance(self) -> None:
        """Starts what can be done now."""
        for shard in self._journal.to_seal:
            if shard.name not in self._begun:
                self._begun.add(shard.name)
                self._tasks[shard] = self._start(shard)

    def collect(self) -> None:
        """Takes note of what is done by now."""
        for shard in [shard for shard, task in self._tasks.items() if task.done()]:
            self._note(shard)

    def finish(self) -> None:
        """Waits for what was begun."""
        for shard in list(self._tasks):
            self._note(shard)

    def _note(self, shard: Shard) -> None:
        with suppress(Exception):  # which the driver meets itself, when it does what the task left
            sealed = self._tasks.pop(shard).result()
            self._journal.seal(shard, sealed.stats)
            self.storage_retries += sealed.storage_retries
