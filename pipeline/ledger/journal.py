"""The journal as a running job's driver knows it: kept up to date by records, without a look at the files.

Why: over 100 million rows, millions of parts come and go. A driver that lists them every second reads more than it
learns. So each part's record (its path and entries, what its footer says) comes back from the actor that published it,
with the rows of the pipeline, and a task that sealed a shard says so. What follows from them is `ShardState`'s, as when
a plan is read off the files. What a kill swallows on the way is still in the files, where the run's end finds it.

Memory: a few numbers for each shard, and the paths of open shards' parts.
"""

from collections.abc import Iterable

from pipeline.input.shards import Shard
from pipeline.ledger.entries import Entry, RowStats
from pipeline.ledger.state import Plan, Published, ShardState, Standing


class Journal:
    """How far a job is since `plan` was read; every question costs what is open, not what there is."""

    def __init__(self, plan: Plan) -> None:
        self._rows = plan.rows
        self._open = {state.shard.name: state for state in plan.shards if not state.sealed}
        # Shards with rows done (or without any) that are not sealed; the others have nothing to add to a sum.
        self._begun = {name for name, state in self._open.items() if state.parts or not state.remaining}
        self._sealed_rows = sum(state.shard.rows for state in plan.shards if state.sealed)
        self._sealed_stats = RowStats.total(state.stats for state in plan.shards if state.sealed)

    def add(self, parts: Iterable[Published]) -> None:
        """Parts that were published; in any order, and any of them again."""
        found: dict[str, list[tuple[str, Entry]]] = {}
        for part in parts:
            for name, entry in part.entries.items():
                if name in self._open:  # else a late repeat, of a shard that is sealed
                    found.setdefault(name, []).append((part.path, entry))
        for name, new in found.items():  # a shard at once: it goes through all its parts
            self._open[name] = self._open[name].with_parts(new)
            self._begun.add(name)

    def seal(self, shard: Shard, stats: RowStats) -> None:
        """A shard that was sealed, with the statistics of its rows; its parts are no longer the journal's."""
        if self._open.pop(shard.name, None):
            self._begun.discard(shard.name)
            self._sealed_rows += shard.rows
            self._sealed_stats = RowStats.total((self._sealed_stats, stats))

    @property
    def to_seal(self) -> list[Shard]:
        """Shards all of whose rows are in the journal."""
        return [state.shard for state in self._states() if not state.remaining]

    @property
    def standing(self) -> Standing:
        begun = self._states()
        return Standing(
            self._rows,
            self._sealed_rows + sum(state.rows_done for state in begun),
            RowStats.total((self._sealed_stats, *(state.stats for state in begun))),
        )

    @property
    def parts(self) -> int:
        """How many parts the open shards have."""
        return sum(len(state.parts) for state in self._states())

    def _states(self) -> list[ShardState]:
        return [self._open[name] for name in self._begun]
