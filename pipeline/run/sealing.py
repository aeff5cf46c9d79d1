"""Sealing while a run goes on: a shard whose last row has arrived becomes a file, and its parts are deleted.

Why: every look at the journal lists its parts, and the driver remembers each. Left to the end of a run over 100 million
rows they are three million files and more than a driver's memory; so the journal is kept to the shards that are open.
"""

from collections.abc import Callable
from typing import Any

from pipeline.ledger.state import Plan

BATCH_PARTS = 64  # deleted at a time, at least: an object store takes up to 1,000 keys in one request


class Sealing:
    """Starts tasks that seal shards and delete parts, as plans come in; each once.

    `seal(shard, parts)` and `discard(parts)` start a task somewhere and return its handle; `tasks` has them all.
    """

    def __init__(self, seal: Callable[..., Any], discard: Callable[..., Any]) -> None:
        self._seal, self._discard = seal, discard
        self.tasks: list[Any] = []
        self._begun: set[str] = set()  # shards
        self._discarded: set[str] = set()  # parts that were still there when last looked at

    def advance(self, plan: Plan) -> None:
        """Starts what can be done now. A task that fails is not started again: the run's end does what it left."""
        for state in plan.to_seal:
            if state.shard.name not in self._begun:
                self._begun.add(state.shard.name)
                self.tasks.append(self._seal(state.shard, state.parts))
        self._discarded &= set(plan.settled)
        batch = [path for path in plan.settled if path not in self._discarded]
        if len(batch) >= BATCH_PARTS:
            self._discarded.update(batch)
            self.tasks.append(self._discard(batch))
