"""What an output's files say about a job's shards: pure functions from footers to a plan or a verdict.

Why: the driver's progress, its sealing, `tessera status` and `tessera verify` must never disagree. They
cannot, since how far a shard is follows in one place (`ShardState`) from the records of its files. A `Scan` has them
from the footers; the driver of a run gets those of new parts with the rows that flow back to it (journal.py).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.input.rows import RowSet
from pipeline.input.shards import FailedShard, Shard, output_name
from pipeline.ledger.entries import Entry, RowStats


@dataclass(frozen=True, slots=True)
class Published:
    """A file of the output as its footer tells; `problem` says why it tells (and counts for) nothing."""

    path: str
    rows: int  # counted by parquet, not claimed by us
    entries: Mapping[str, Entry]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Scan:
    """Every file of an output: sealed shards by file name below data/, and journal parts, sorted by path."""

    sealed: Mapping[str, Published]
    parts: tuple[Published, ...]

    def seal_of(self, name: str, fingerprint: str) -> Entry | None:
        """The sealed entry of this version of a shard, if there is one."""
        file = self.sealed.get(output_name(name))
        entry = file.entries.get(name) if file else None
        return entry if entry and entry.fingerprint == fingerprint else None


@dataclass(frozen=True, slots=True)
class ShardState:
    """How far one shard is. `parts`: journal parts with rows of it; `stats` may count a row twice where parts
    overlap, until the shard is sealed.

    >>> from types import SimpleNamespace
    >>> state = ShardState.untouched(SimpleNamespace(name="a", rows=8, fingerprint="v1"))
    >>> entry = Entry("v1", RowSet.of([0, 1, 2, 7]), RowStats(4))
    >>> state = state.with_parts([("journal/a/part-1", entry), ("journal/a/part-1", entry)])
    >>> str(state.remaining), state.rows_done, state.stats.rows
    ('3-6', 4, 4)
    """

    shard: Shard
    sealed: bool
    remaining: RowSet
    parts: tuple[str, ...]
    stats: RowStats

    @classmethod
    def untouched(cls, shard: Shard) -> "ShardState":
        """A shard of which nothing is done."""
        return cls(shard, False, RowSet.span(shard.rows), (), RowStats())

    def with_parts(self, found: Iterable[tuple[str, Entry]]) -> "ShardState":
        """The state once these parts are there; of other versions of the shard and known ones, nothing counts."""
        known = dict.fromkeys(self.parts)
        new = {
            path: entry
            for path, entry in found
            if path not in known and entry.fingerprint == self.shard.fingerprint
        }
        remaining = self.remaining - RowSet.union_of(entry.rows for entry in new.values())
        stats = RowStats.total((self.stats, *(entry.stats for entry in new.values())))
        return ShardState(self.shard, False, remaining, (*self.parts, *new), stats)

    def as_sealed(self, stats: RowStats) -> "ShardState":
        """The state once the shard is sealed, with the statistics of its rows."""
        return ShardState(self.shard, True, RowSet(), (), stats)

    @property
    def rows_done(self) -> int:
        return self.shard.rows - len(self.remaining)


@dataclass(frozen=True, slots=True)
class Standing:
    """A job in figures: its rows, how many are done, and the sums over those."""

    rows: int
    rows_done: int
    stats: RowStats


@dataclass(frozen=True)
class Plan:
    """How far a job is, and so what there is to do.

    `changed`: shards that the output also holds in another version, which counts for nothing; `foreign`:
    files below data/ that belong to no shard of the input (removed since); `problems`: unreadable files;
    `settled`: parts that nothing needs any more, since all their shards are sealed or were replaced in the input.
    """

    shards: tuple[ShardState, ...]
    changed: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    settled: tuple[str, ...] = ()

    @cached_property
    def to_caption(self) -> tuple[ShardState, ...]:
        """Shards with rows that nothing holds yet."""
        return tuple(state for state in self.shards if state.remaining)

    @cached_property
    def to_seal(self) -> tuple[ShardState, ...]:
        """Shards all of whose rows are in the journal."""
        return tuple(state for state in self.shards if not state.sealed and not state.remaining)

    @property
    def finished(self) -> bool:
        return all(state.sealed for state in self.shards)

    @cached_property
    def rows(self) -> int:
        return sum(state.shard.rows for state in self.shards)

    @cached_property
    def rows_done(self) -> int:
        return sum(state.rows_done for state in self.shards)

    @cached_property
    def stats(self) -> RowStats:
        return RowStats.total(state.stats for state in self.shards)

    @property
    def standing(self) -> Standing:
        return Standing(self.rows, self.rows_done, self.stats)


def plan_of(shards: Sequence[Shard], scan: Scan, unreadable: Sequence[FailedShard] = ()) -> Plan:
    """The plan for these shards, in their order; `unreadable` ones are the input's all the same."""
    journaled: dict[str, list[tuple[str, Entry]]] = {}
    for part in scan.parts:
        for name, entry in part.entries.items():
            journaled.setdefault(name, []).append((part.path, entry))
    states: list[ShardState] = []
    changed: list[str] = []
    for shard in shards:
        found = journaled.get(shard.name, [])
        older = any(entry.fingerprint != shard.fingerprint for _, entry in found)
        seal = scan.seal_of(shard.name, shard.fingerprint)
        file = scan.sealed.get(output_name(shard.name))
        if older or (file and file.entries and not seal):
            changed.append(shard.name)
        state = ShardState.untouched(shard)
        states.append(state.as_sealed(seal.stats) if seal else state.with_parts(found))
    published = (*scan.sealed.values(), *scan.parts)
    return Plan(
        tuple(states),
        tuple(changed),
        _foreign((*shards, *unreadable), scan),
        tuple(f"{file.path} {file.problem}" for file in published if file.problem),
        tuple(_settled(shards, scan)),
    )


def _settled(shards: Sequence[Shard], scan: Scan) -> Iterator[str]:
    current = {shard.name: shard.fingerprint for shard in shards}
    for part in scan.parts:
        if part.entries and all(
            scan.seal_of(name, entry.fingerprint) or current.get(name, entry.fingerprint) != entry.fingerprint
            for name, entry in part.entries.items()
        ):
            yield part.path


@dataclass(frozen=True, slots=True)
class Verification:
    """The recount. `rows_out` counts rows in sealed files of the input's shards. By shard: rows that are `missing`,
    rows of the file, by place, that no row of the input answers to (`surplus`), and rows that differ from those
    that were sealed (`altered`). `foreign` names files of shards no longer in the input, and `notes` what lies about
    in the journal; both are reported but no fault. `unreadable` shards of the input count for nothing: nobody knows
    their rows."""

    rows_in: int
    rows_out: int
    missing: Mapping[str, RowSet]
    surplus: Mapping[str, RowSet]
    altered: Mapping[str, RowSet]
    foreign: tuple[str, ...]
    problems: tuple[str, ...]
    stats: RowStats
    notes: tuple[str, ...] = ()
    unreadable: tuple[FailedShard, ...] = ()

    @property
    def ok(self) -> bool:
        """Every row of the readable input is in the output exactly once, and every file below data/ is sound."""
        return (
            not (self.problems or self.missing or self.surplus or self.altered)
            and self.rows_in == self.rows_out
        )

    def describe(self) -> str:
        """The verdict in one line, then a line for each problem and each foreign file."""
        verdict = "verified" if self.ok else "not verified"
        lines = [f"{verdict}: {self.rows_in:,} rows in, {self.rows_out:,} rows out"]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [f"  unreadable: {shard}" for shard in self.unreadable]
        lines += [f"  note: {path} belongs to no shard of the input" for path in self.foreign]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def verification_of(
    shards: Sequence[Shard],
    scan: Scan,
    unreadable: Sequence[FailedShard] = (),
    altered: Mapping[str, RowSet] | None = None,
) -> Verification:
    """Rows in against rows out, shard by shard. `altered`, by shard: rows that differ from those that were sealed."""
    altered = altered or {}
    missing: dict[str, RowSet] = {}
    surplus: dict[str, RowSet] = {}
    problems: list[str] = []
    stats: list[RowStats] = []
    rows_out = 0
    states = {state.shard.name: state for state in plan_of(shards, scan).shards}
    for shard in shards:
        file = scan.sealed.get(output_name(shard.name))
        if file and file.problem:
            problems.append(f"{file.path} {file.problem}")
        seal = scan.seal_of(shard.name, shard.fingerprint)
        if not file or not seal:
            missing[shard.name] = RowSet.span(shard.rows)  # of the sealed output
            older = " (the sealed file is of another version of it)" if file and file.entries else ""
            done = states[shard.name].rows_done
            lacking = states[shard.name].remaining
            problems.append(
                f"{shard.name} is not sealed{older}; in the journal: {done} of {shard.rows} rows"
                + (f", missing rows {lacking}" if lacking else "")
            )
            continue
        rows_out += file.rows
        stats.append(seal.stats)
        lacking = seal.rows.complement(shard.rows) | RowSet.span(file.rows).complement(shard.rows)
        if lacking:
            missing[shard.name] = lacking
            problems.append(f"{shard.name} lacks rows {lacking}")
        claimed = seal.rows | RowSet.span(file.rows)
        beyond = claimed - RowSet.span(shard.rows)
        if beyond:
            surplus[shard.name] = beyond
            problems.append(
                f"{shard.name} has {file.rows} rows in the output and {shard.rows} in the input; "
                f"rows {beyond} are twice there or foreign"
            )
        if seal.stats.rows != file.rows:
            problems.append(
                f"{file.path} counts {seal.stats.rows} rows in its statistics and holds {file.rows}"
            )
        if altered.get(shard.name):
            problems.append(
                f"{file.path} does not hold the rows that were sealed: among rows {altered[shard.name]} some are "
                "twice there, missing, foreign, changed or unreadable; delete the file and run the job again"
            )
    known = {output_name(shard.name) for shard in shards}
    problems += [f"{f.path} {f.problem}" for key, f in scan.sealed.items() if f.problem and key not in known]
    return Verification(
        sum(shard.rows for shard in shards),
        rows_out,
        missing,
        surplus,
        altered,
        _foreign((*shards, *unreadable), scan),
        tuple(problems),
        RowStats.total(stats),
        tuple(_in_the_journal(shards, scan, {shard.name for shard in unreadable})),
        tuple(unreadable),
    )


def _in_the_journal(shards: Sequence[Shard], scan: Scan, unreadable: Collection[str]) -> Iterator[str]:
    """Rows of parts that are no part of the job, or that several parts hold: sealing leaves them out."""
    current = {shard.name: shard for shard in shards}
    held: dict[str, RowSet] = {}
    for part in scan.parts:
        for name, entry in part.entries.items():
            if name in unreadable:
                continue
            shard = current.get(name)
            if shard is None or shard.fingerprint != entry.fingerprint:
                yield f"{part.path} holds rows {entry.rows} of {name}, which {'changed' if shard else 'is gone'} since"
                continue
            beyond = entry.rows - RowSet.span(shard.rows)
            if beyond:
                yield f"{part.path} holds rows {beyond} of {name}, which has {shard.rows}"
            twice = entry.rows & held.get(name, RowSet())
            held[name] = held.get(name, RowSet()) | entry.rows
            if twice:
                yield f"rows {twice} of {name} are in several parts; sealing keeps one of each"


def _foreign(shards: Iterable[Shard | FailedShard], scan: Scan) -> tuple[str, ...]:
    known = {output_name(shard.name) for shard in shards}
    return tuple(file.path for key, file in scan.sealed.items() if key not in known)
