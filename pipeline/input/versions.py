"""Versions of input files: is a file still the one that was listed, and which bytes does it hold?

Why: a job over a large input takes days, and people rewrite files meanwhile. A caption must never stand beside a row of
another version than the one it was made from; and a file that was only touched or copied must not be bought twice.

Size and etag (locally: mtime) tell versions apart for the price of a look-up. They say nothing of whether two versions
hold the same bytes, and neither does a parquet footer: a repaired page, or a picture of the same size, leaves it as it
was. So sameness is told by a digest of the whole file, which costs a pass over it, far less than captioning it.
"""

import hashlib
from collections.abc import Iterable

from pipeline.input.shards import FailedShard, Shard
from pipeline.storage.files import file_info, in_parallel, open_file, open_filesystem
from pipeline.storage.retrying import with_retries

_CHUNK = 8 << 20  # bytes of a ranged read: large against a request's latency, small beside 32 threads


def is_current(shard: Shard) -> bool:
    """Whether the file is the version that was listed; bytes that were read before a yes are that version's.

    Raises StorageError or another OSError where storage cannot tell.
    """
    filesystem, path = open_filesystem(shard.url)
    try:
        info = with_retries(lambda: filesystem.info(path), f"reading {shard.url}")
        now = file_info(filesystem, path, info)
    except FileNotFoundError:
        return False
    # Some stores tell no token in listings; then the size is all there is.
    return now.size == shard.size and (not shard.token or now.token == shard.token)


def changed_among(shards: Iterable[Shard]) -> tuple[FailedShard, ...]:
    """Those shards whose file is not the version that was listed any more, as the end of a run tells them."""
    todo = list(shards)
    current = in_parallel(is_current, todo)
    return tuple(FailedShard.changed(shard) for shard, same in zip(todo, current, strict=True) if not same)


def content_digest(shard: Shard) -> str | None:
    """SHA-256 (hexadecimal) of the version that was listed, whole; None where the file is another one by now."""
    filesystem, path = open_filesystem(shard.url)
    digest = hashlib.sha256()
    try:
        with open_file(filesystem, path, shard.size) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        if is_current(shard):
            raise
        return None
    return digest.hexdigest() if is_current(shard) else None
