"""The ledger: which rows are done, told by the data itself.

    <output>/data/<shard>.parquet                     sealed: every row of one input shard, in input order
    <output>/_tessera/spec.json                       what captions depend on, and where shards' names begin
    <output>/_tessera/input/*.json                    what the files of sealed shards were (content.py)
    <output>/_tessera/journal/<shard>/part-*.parquet  rows done but not sealed
    <output>/_tessera/retry/<shard>/part-*.parquet    error rows of sealed shards, done again (retry.py)
    <output>/_tessera/lease.json                      which run may write (lease.py)
    <output>/_tessera/runs/<run>.json                 statistics of each run
    <output>/_SUCCESS                                 how many rows a run verified, and which run

Why: a job is killed at hour 20, a task is retried, two writers race. State kept beside the data then says one
thing and the data another. Here there is no such state: a file is the record of the rows it holds.

The laws (each has a test of its name):
1. A row is done if and only if a whole file holds it. Files appear by one atomic put, and the row set stands
   in the footer of the file that holds the rows.
2. Publishing is idempotent: a part is named after its content, so a retried write replaces itself. Rows that come
   out otherwise when they are done again (an error where there was a caption) stand in another part, and law 3
   decides between the two. A part holds rows of one shard and lies in that shard's folder of the journal.
3. Sealing is a function of the rows: however the same rows were partitioned, ordered, repeated or overlapped
   in parts, the sealed bytes are the same. Where parts disagree about a row, a caption beats an error, then
   the part whose name sorts first wins. No size of a shard or a column is too large, as long as a row is not.
4. Sealing is idempotent: sealing a sealed shard does nothing, so a kill inside costs nothing. A sealed file is
   created, or swapped for the very file it replaces, and never written over blindly.
5. A part is deleted only after its shard is readable as sealed (or was replaced in the input), and soon after that,
   while the run goes on (run/sealing.py): the journal holds the open shards.
6. A changed input shard is a new shard: rows of its old version count for nothing. A file that was touched or copied
   is no changed shard (content.py).
7. Planning reads footers only, each of them once, and a run plans when it begins and when its pipeline is over: in
   between, the records of new parts come back with the rows (journal.py). The recount that it ends with reads footers
   again.
8. One output holds one spec's captions: a run whose captions would differ is refused.
9. `_SUCCESS` is written last, only for a verified output, and while no shard of the input is unreadable; it goes
   before new work starts. A run that lost its lease while it wrote the mark takes it back, and a mark that does
   not count what the files hold is no mark.
10. Only the run that holds the lease writes: every attempt of every write begins with a look at it (lease.py says
    what can happen between the look and the write).
11. A sealed file proves its rows. It is written only from every row of its shard, once and in order, and its footer
    carries digests of their values, against which a deep `verify` holds what it reads.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from actors.schema import IDENTITY, RESULT_SCHEMA, SHARD
from pipeline.input.columns import sealed_schema
from pipeline.input.rows import RowSet
from pipeline.input.shards import FailedShard, Shard, output_name
from pipeline.ledger.content import record_content
from pipeline.ledger.entries import Entry, RowStats, decode, entries_of, to_parquet
from pipeline.ledger.identity import identity_record, mismatch, recorded
from pipeline.ledger.merge import SealError, altered_rows, merged_file, part_rows
from pipeline.ledger.state import Plan, Published, Scan, Verification, plan_of, verification_of
from pipeline.spec.job_spec import JobSpec, SpecError
from pipeline.storage.files import FileInfo, in_parallel
from pipeline.storage.footer import NotParquetError, parse_footer, read_tail, tail_of
from pipeline.storage.lease import Fence, LeaseLost
from pipeline.storage.retrying import MissingBucket
from pipeline.storage.storage import Storage

DATA = "data"
JOURNAL = "_tessera/journal"
RETRY = "_tessera/retry"
RUNS = "_tessera/runs"
SPEC = "_tessera/spec.json"
SUCCESS = "_SUCCESS"

_LONGEST_FOLDER = (
    512  # bytes: keys of object stores have at most 1,024, and a part's is longer than its shard's
)


class LedgerMismatch(ValueError):
    """The output holds captions of a spec that differs where captions depend on it."""


class Ledger:
    """The ledger of one output. Picklable, and cheap to build: everything is read when it is asked for.

    `plan` may be called again and again: a footer is read once, as long as its file stays as it is. With a
    `fence`, whatever writes raises LeaseLost unless the run holds the output's lease (law 10): `storage` is guarded.
    """

    def __init__(self, storage: Storage | str, fence: Fence | None = None) -> None:
        storage = Storage(storage) if isinstance(storage, str) else storage
        self.storage = replace(storage, guard=fence.check) if fence else storage
        self.fence = fence
        self._seen: dict[FileInfo, Published] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"storage": self.storage, "fence": self.fence, "_seen": {}}

    def publish(self, table: pa.Table, folder: str = JOURNAL) -> tuple[Published, ...]:
        """Writes rows, those of a shard as one part, each atomically; returns the parts' records (laws 1 and 2).

        `table` has the identity columns, the kept ones and the result columns (actors/schema.py), at least
        one row, and rows of any number of shards; those of a pipeline's block are of one.
        """
        if not table.num_rows:
            raise ValueError("a part needs at least one row")
        kept = [name for name in table.column_names if name not in (*IDENTITY, *RESULT_SCHEMA.names)]
        results = table.select(RESULT_SCHEMA.names).cast(RESULT_SCHEMA)
        table = table.select([*IDENTITY, *kept])
        for name in RESULT_SCHEMA.names:
            table = table.append_column(name, results[name])
        return tuple(self._publish(table, name, entry, folder) for name, entry in entries_of(table).items())

    def _publish(self, table: pa.Table, name: str, entry: Entry, folder: str) -> Published:
        rows = table.filter(pc.equal(table[SHARD], name))
        data = to_parquet(rows, {name: entry}, statistics=False)
        path = f"{folder}/{_folder(name)}/{_part_name(data)}"
        self.storage.put_atomic(path, data)
        return Published(path, rows.num_rows, {name: entry})

    def scan(self) -> Scan:
        """Every sealed shard and journal part there is now, by their footers (law 7)."""
        # The journal first: what is sealed and swept in between is then seen twice (harmless), not never.
        listed = [info for folder in (JOURNAL, DATA) for info in self.storage.list(folder)]
        listed = [info for info in listed if info.path.endswith(".parquet")]
        new = [info for info in listed if info not in self._seen]
        looked = zip(new, in_parallel(self._look, new), strict=True)
        known = self._seen | {info: published for info, published in looked if published}
        self._seen = {info: known[info] for info in listed if info in known}
        files = self._seen.values()
        sealed = (file for file in files if file.path.startswith(f"{DATA}/"))
        parts = tuple(file for file in files if file.path.startswith(f"{JOURNAL}/"))
        return Scan({file.path.removeprefix(f"{DATA}/"): file for file in sealed}, parts)

    def learn(self, other: "Ledger") -> None:
        """Takes over the footers that another ledger of the same output has read."""
        self._seen = dict(other._seen)

    def retried(self) -> list[Published]:
        """The parts of a retry that are not merged into their sealed shards yet, by their footers."""
        listed = [info for info in self.storage.list(RETRY) if info.path.endswith(".parquet")]
        return [part for part in in_parallel(self._look, listed) if part]

    def plan(self, shards: Sequence[Shard], unreadable: Sequence[FailedShard] = ()) -> Plan:
        """How far the job is, and what there is to do: the one answer for resuming, progress and status."""
        return plan_of(shards, self.scan(), unreadable)

    def seal(self, shard: Shard, kept: pa.Schema) -> RowStats:
        """Merges a shard's parts into its sealed file (laws 3 and 4); returns the statistics of its rows.

        `kept` is the schema of the job's kept columns (`columns.job_schema`). The parts are those that lie in the
        shard's folder, whoever knows of them. Raises SealError if a row is missing.
        """
        seal = self.seal_of(shard)
        if seal:
            return seal.stats
        schema = sealed_schema(kept)
        record_content(self.storage, shard)  # first: whatever is sealed can be recognised

        def rows(path: str) -> pa.Table | None:
            data = self.storage.read(path)
            return part_rows(path, data, shard, schema) if _holds(data, shard) else None

        try:
            read = in_parallel(rows, self._parts_of(shard))
        except FileNotFoundError as error:  # another driver sealed the shard and swept
            seal = self.seal_of(shard)
            if seal:
                return seal.stats
            raise SealError(f"{shard.name}: a part is gone while its rows are not sealed ({error})") from None
        data, stats = merged_file(shard, [table for table in read if table is not None], schema)
        del read  # gigabytes, maybe, and so is the file
        path = f"{DATA}/{output_name(shard.name)}"
        while not self.storage.create_exclusive(path, data):  # a seal is there, or a file of an older version
            with suppress(FileNotFoundError):
                # First: a seal that comes after it fails the swap
                version = self.storage.read_version(path)[1]
                seal = self.seal_of(shard)
                if seal:
                    return seal.stats
                if self.storage.put_if(path, data, version):
                    break
        return stats

    def discard(self, shard: Shard) -> None:
        """Deletes the parts of a shard that is sealed (law 5)."""
        if self.seal_of(shard):
            self.storage.delete(self._parts_of(shard))

    def _parts_of(self, shard: Shard) -> list[str]:
        """What lies in the shard's folder of the journal, sorted."""
        folder = f"{JOURNAL}/{_folder(shard.name)}"
        # Those of shards below a name like ours as well
        found = (info.path for info in self.storage.list(folder))
        return [path for path in found if path.rpartition("/")[0] == folder and path.endswith(".parquet")]

    def sweep(self, shards: Sequence[Shard]) -> list[str]:
        """Deletes the parts that nothing needs any more (law 5), and returns their paths.

        `shards` is the input as it is now: parts of a version that was replaced are of no use either.
        """
        settled = self.plan(shards).settled
        self.storage.delete(settled)
        for folder in ("_tessera", DATA):
            self.storage.delete_temporary(folder)
        self.storage.delete_empty_folders(JOURNAL)
        return list(settled)

    def verify(
        self, shards: Sequence[Shard], unreadable: Sequence[FailedShard] = (), *, deep: bool = False
    ) -> Verification:
        """Holds the rows of the input against those of the sealed files; nothing that was read before is trusted.

        Reads footers: which rows of which shard, in which version, a file was sealed from, and whether the file is as
        long as its footer says. A page that was changed behind our back passes. `deep` reads every page and holds its
        rows against the digests in the footer (law 11), a row group at a time on each core.
        """
        self._seen = {}
        scan = self.scan()
        altered = self._altered(shards, scan) if deep else {}
        return verification_of(shards, scan, unreadable, altered)

    def _altered(self, shards: Sequence[Shard], scan: Scan) -> dict[str, RowSet]:
        """By shard, the rows of sealed files that differ from what was sealed; of files with as many rows as that."""

        def read(shard: Shard) -> RowSet:
            file, seal = scan.sealed.get(output_name(shard.name)), scan.seal_of(shard.name, shard.fingerprint)
            if not file or not seal or file.rows != shard.rows:
                return RowSet()
            with self.storage.open(file.path) as data:
                return altered_rows(data, seal)

        found = in_parallel(read, shards, threads=os.cpu_count() or 1)
        return {shard.name: rows for shard, rows in zip(shards, found, strict=True) if rows}

    def check(self, spec: JobSpec) -> None:
        """Raises LedgerMismatch unless captions would be those the output already holds (law 8); changes nothing.

        An output without a single caption is free for any spec. Raises SpecError where there can be no output.
        """
        try:
            self._compare(identity_record(spec))
        except MissingBucket as error:
            raise SpecError(f"output.path: {error}") from None
        except NotADirectoryError:
            raise SpecError(
                f"output.path: {self.storage.url} is a file, or lies below one; name a folder"
            ) from None

    def bound_fields(self) -> dict[str, Any]:
        """What the output's captions depend on, by dotted name, as spec.json says; {} before a first run."""
        try:
            fields: dict[str, Any] = recorded(self.storage.read(SPEC), f"{self.storage.url}/{SPEC}")["fields"]
            return fields
        except (FileNotFoundError, NotADirectoryError, MissingBucket):
            return {}

    def bind(self, spec: JobSpec, root: str = "") -> None:
        """As `check`, and writes spec.json: what captions depend on, the root (a URL) at which the names of shards
        begin, and the whole spec of the last run.

        It is swapped for the version that was compared with. It names the run, so that each run's is another version:
        a run that was held up cannot replace its successor's, though both were of the same spec.
        """
        record = identity_record(spec)
        data = _to_json({**record, "root": root, "run": self._run})
        while not self._swap(SPEC, data, self._compare(record)):
            pass

    def _compare(self, record: Mapping[str, Any]) -> str | None:
        """The version of spec.json, if there is one; raises LedgerMismatch."""
        try:
            before, version = self.storage.read_version(SPEC)
        except FileNotFoundError:
            return None
        held = recorded(before, f"{self.storage.url}/{SPEC}")
        refused = mismatch(self.storage.url, held["fields"], record["fields"])
        if refused and any(self.storage.list(folder) for folder in (JOURNAL, DATA)):
            raise LedgerMismatch(refused)
        return version

    def _swap(self, path: str, data: bytes, version: str | None) -> bool:
        """Puts a file in the place of one of its versions (None: of nothing); False if that is not what is there."""
        if version is None:
            return self.storage.create_exclusive(path, data)
        return self.storage.put_if(path, data, version)

    @property
    def _run(self) -> str | None:
        return self.fence.run if self.fence else None

    def record_run(self, run: str, stats: Mapping[str, Any]) -> None:
        """Writes the JSON statistics of one run under its id."""
        self.storage.put_atomic(f"{RUNS}/{run}.json", _to_json({"run": run, **stats}))

    def runs(self) -> list[dict[str, Any]]:
        """The recorded statistics of every run, by id; a damaged record tells nothing."""
        paths = [info.path for info in self.storage.list(RUNS) if info.path.endswith(".json")]
        return [record for data in in_parallel(self.storage.read, paths) for record in _run_record(data)]

    def write_success(self, verification: Verification) -> None:
        """Marks the output complete (law 9); leaves no mark of its own where it raises LeaseLost."""
        if not verification.ok or verification.unreadable:
            raise ValueError("only a verified output of the whole input is marked complete")
        data = _to_json({**_counts(verification.stats), "run": self._run})
        try:
            while not self._swap(SUCCESS, data, self._mark()[1]):
                pass
            if self.fence:
                self.fence.check()  # a successor that began in between had no mark to take away
        except LeaseLost:
            mark, version = self._mark()
            if mark == data and version:
                replace(self.storage, guard=None).delete_if(SUCCESS, version)
            raise

    def clear_success(self) -> None:
        """Takes the mark that there is away, and no later one: call it before the first new row is published."""
        while version := self._mark()[1]:
            if self.storage.delete_if(SUCCESS, version):
                return

    def succeeded(self, plan: Plan) -> bool:
        """Whether the output is complete and marked so: the mark alone could be one that came late."""
        if not plan.finished:
            return False
        try:
            mark = json.loads(self._mark()[0] or b"{}")
        except ValueError:
            return False
        return isinstance(mark, dict) and {**mark, **_counts(plan.stats)} == mark

    def _mark(self) -> tuple[bytes | None, str | None]:
        """`_SUCCESS` as it is, and its version."""
        try:
            return self.storage.read_version(SUCCESS)
        except FileNotFoundError:
            return None, None

    def _look(self, info: FileInfo) -> Published | None:
        """The file by its footer; None if it was deleted since it was listed."""
        try:
            tail = read_tail(self.storage.filesystem, self.storage.full(info.path), info.size)
            rows = parse_footer(tail).num_rows
        except FileNotFoundError:
            return None
        except NotParquetError as error:
            return Published(info.path, 0, {}, str(error))
        try:
            return Published(info.path, rows, decode(tail, info.size))
        except (ValueError, KeyError, TypeError) as error:
            return Published(info.path, rows, {}, str(error))

    def seal_of(self, shard: Shard) -> Entry | None:
        """The shard's sealed entry, straight from the file."""
        path = f"{DATA}/{output_name(shard.name)}"
        try:
            size = int(self.storage.filesystem.info(self.storage.full(path))["size"])
        except FileNotFoundError:
            return None
        published = self._look(FileInfo(path, size, ""))
        sealed = {output_name(shard.name): published} if published else {}
        return Scan(sealed, ()).seal_of(shard.name, shard.fingerprint)


def _folder(shard_name: str) -> str:
    """A shard's folder in the journal: its name, or what stands for a very long one."""
    name = shard_name.encode()
    return shard_name if len(name) <= _LONGEST_FOLDER else sha256(name).hexdigest()


def _holds(data: bytes, shard: Shard) -> bool:
    """Whether a part is whole and has rows of this version of a shard."""
    try:
        entry = decode(tail_of(data), len(data)).get(shard.name)
    except (ValueError, KeyError, TypeError):
        return False
    return entry is not None and entry.fingerprint == shard.fingerprint


def _part_name(data: bytes) -> str:
    return f"part-{sha256(data).hexdigest()[:20]}.parquet"


def _counts(stats: RowStats) -> dict[str, Any]:
    return {"rows": stats.rows, "errors": dict(stats.errors)}


def _run_record(data: bytes) -> Iterator[dict[str, Any]]:
    with suppress(ValueError):
        record = json.loads(data)
        if isinstance(record, dict) and record.get("run"):
            yield {"captioned": 0, "seconds": 0.0, "rows_per_s": 0.0, **record}


def _to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
