"""Helpers for ledger tests: captioned tables, shards, and storages that die or are held up on command."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import pyarrow as pa

from actors.schema import RESULT_SCHEMA
from pipeline.input.shards import Shard
from pipeline.ledger.ledger import DATA, JOURNAL, Ledger
from pipeline.storage.lease import LEASE, Holder
from pipeline.storage.storage import Storage

Result = TypeVar("Result")

KEPT = pa.schema([("id", pa.string()), ("score", pa.float64())])


class Killed(BaseException):
    """The process died here. Not an Exception: nothing may catch it."""


def shard(name: str, rows: int, fingerprint: str = "v1") -> Shard:
    return Shard(name, f"/input/{name}", rows, fingerprint, 1, pa.schema([("id", pa.string())]))


def captions(
    name: str, rows: Iterable[int], version: str = "v1", failed: Collection[int] = (), text: str = "caption"
) -> pa.Table:
    """What Generate hands to the ledger: a function of the row, `failed` rows carry an error."""
    error = {"kind": "decode", "stage": "preprocess", "message": "cut off"}
    lines = [
        (f"{name}:{row}", row / 2, name, row, version)
        + ((None, "error", 10, 7, 0, error) if row in failed else (f"{text} {row}", "stop", 10, 7, 3, None))
        for row in rows
    ]
    identity = pa.schema([("_shard", pa.string()), ("_row", pa.int64()), ("_fingerprint", pa.string())])
    schema = pa.schema([("id", pa.large_string()), ("score", pa.float64()), *identity, *RESULT_SCHEMA])
    columns = list(zip(*lines, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)], schema=schema)


@dataclass(frozen=True)
class DyingStorage(Storage):
    """Raises Killed around writes: `deaths` yields, a write each, None, "before" or "after" it took place."""

    deaths: Iterator[str | None] = field(default_factory=lambda: iter(()))

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("stays in its process")

    def put_atomic(self, path: str, data: bytes) -> None:
        self._around(lambda: Storage.put_atomic(self, path, data))

    def create_exclusive(self, path: str, data: bytes) -> bool:
        return self._around(lambda: Storage.create_exclusive(self, path, data))

    def put_if(self, path: str, data: bytes, version: str) -> bool:
        return self._around(lambda: Storage.put_if(self, path, data, version))

    def _delete_one(self, path: str) -> None:
        self._around(lambda: Storage._delete_one(self, path))

    def _around(self, action: Callable[[], Result]) -> Result:
        death = next(self.deaths, None)
        if death == "before":
            raise Killed
        result = action()
        if death == "after":
            raise Killed
        return result


End = Literal["late", "reset", "lost_reply", "late_lost_reply"]


@dataclass(frozen=True)
class HeldUpStorage(Storage):
    """The first request to write or delete a file `below` a folder is held up while `meanwhile` happens.

    Then it goes out ("late"), or is lost ("reset"), or it goes out and its answer is lost ("late_lost_reply"); or it
    went out before, and its answer is lost ("lost_reply").
    """

    below: str = ""
    meanwhile: Callable[[], object] = lambda: None
    end: End = "late"
    held: list[str] = field(default_factory=list)

    def _put(self, path: str, data: bytes) -> None:
        self._request(path, lambda: Storage._put(self, path, data))

    def _create(self, path: str, data: bytes) -> bool:
        return self._request(path, lambda: Storage._create(self, path, data))

    def _replace(self, path: str, data: bytes, version: str) -> bool:
        return self._request(path, lambda: Storage._replace(self, path, data, version))

    def _remove(self, path: str) -> None:
        self._request(path, lambda: Storage._remove(self, path))

    def _remove_if(self, path: str, version: str) -> bool:
        return self._request(path, lambda: Storage._remove_if(self, path, version))

    def _remove_keys(self, paths: Sequence[str]) -> bool:
        return self._request(paths[0], lambda: Storage._remove_keys(self, paths))

    def _request(self, path: str, request: Callable[[], Result]) -> Result:
        if self.held or not path.startswith(self.below):
            return request()
        self.held.append(path)
        if self.end == "lost_reply":
            request()
        self.meanwhile()
        if self.end in ("late", "late_lost_reply"):
            result = request()
        if self.end != "late":
            raise ConnectionResetError("reset by peer")
        return result


def silent(storage: Storage, run: str = "silent", **fields: object) -> None:
    """A lease of a run on another machine that never beats again."""
    holder = replace(Holder("silent", "far-away", 7, "yesterday", "another machine", "1"), run=run, **fields)  # type: ignore[arg-type]
    storage.put_atomic(LEASE, holder.encode())


def sealed_bytes(ledger: Ledger) -> dict[str, bytes]:
    return {info.path: ledger.storage.read(info.path) for info in ledger.storage.list(DATA)}


def publish(ledger: Ledger, table: pa.Table, folder: str = JOURNAL) -> str:
    """Publishes rows of one shard, and returns their part's path."""
    (part,) = ledger.publish(table, folder)
    return part.path


def journal(ledger: Ledger) -> list[str]:
    return [info.path for info in ledger.storage.list(JOURNAL)]


def run_to_the_end(ledger: Ledger, shards: Sequence[Shard], tables: Iterable[pa.Table]) -> None:
    """One run: publish, seal what is complete, sweep."""
    for table in tables:
        ledger.publish(table)
    for state in ledger.plan(shards).to_seal:
        ledger.seal(state.shard, KEPT)
    ledger.sweep(shards)
