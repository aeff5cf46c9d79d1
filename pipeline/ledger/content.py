"""Content records: what the bytes of each sealed shard were, so that a touched or copied file is the same shard.

    <output>/_tessera/input/<hash of the name>.json
    {"name", "fingerprint", "size", "content": SHA-256 of the file, "versions": [fingerprints of files with it]}

Why: a fingerprint is made of size and etag or mtime. A `touch`, a copy to another bucket or an encryption with another
key changes it and not one row, and would silently buy every caption again. Before a shard is sealed its file is read
once more and its digest is put down. A later version of the same size is compared with that, once: what was found is
put down as well.

A record is a hint and no state: where it is missing, or the shard was never sealed, another version is a changed shard,
which costs captions and never mixes them up.
"""

import json
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import Any

from pipeline.input.shards import Shard
from pipeline.input.versions import content_digest
from pipeline.storage.storage import Storage

INPUT = "_tessera/input"
_FIELDS = {"name": str, "fingerprint": str, "size": int, "content": str, "versions": list}


def record_content(storage: Storage, shard: Shard) -> None:
    """Puts down the digest of a shard's file, if that still is the version whose rows were captioned.

    Where the file cannot be read any more there is no record: its captions are whole all the same.
    """
    content = None
    with suppress(OSError):
        content = content_digest(shard)
    if content:
        _write(storage, shard, content, [shard.version])


def known_version(storage: Storage, shard: Shard, read: bool) -> tuple[Shard, bool]:
    """The shard under the fingerprint of an earlier version with its content, itself where there is none; and whether
    that is news.

    A version that was not compared yet is read; or, unless `read`, taken to be the same if its size is.
    """
    record = _record(storage, shard)
    if not record or record["size"] != shard.size:
        return shard, False
    same = replace(shard, fingerprint=record["fingerprint"])
    if shard.version in record["versions"]:
        return same, False
    if not read:
        return same, True
    return (same, True) if content_digest(shard) == record["content"] else (shard, False)


def remember_version(storage: Storage, shard: Shard) -> None:
    """Puts down that the shard's file is a version with the content of the record."""
    record = _record(storage, shard)
    if record and shard.version not in record["versions"]:
        _write(storage, shard, record["content"], [*record["versions"], shard.version])


def _write(storage: Storage, shard: Shard, content: str, versions: list[str]) -> None:
    record = {
        "name": shard.name,
        "fingerprint": shard.fingerprint,
        "size": shard.size,
        "content": content,
        "versions": versions,
    }
    storage.put_atomic(_path(shard), (json.dumps(record, indent=2) + "\n").encode())


def _record(storage: Storage, shard: Shard) -> dict[str, Any]:
    """The record of the shard's name; empty where there is none, or a damaged one."""
    with suppress(FileNotFoundError, ValueError):
        record = json.loads(storage.read(_path(shard)))
        if (
            isinstance(record, dict)
            and set(record) == set(_FIELDS)
            and all(isinstance(record[name], kind) for name, kind in _FIELDS.items())
        ):
            return record
    return {}


def _path(shard: Shard) -> str:
    """Flat, since a name with another ending could be too long for a disk; 80 bits tell a billion shards apart."""
    return f"{INPUT}/{sha256(shard.name.encode()).hexdigest()[:20]}.json"
