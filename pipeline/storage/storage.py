"""Files under one root, local or in an object store: the only place that writes.

Why: everything Tessera promises rests on one property, that a file is either there whole or not there at all.
It is stated and kept here, for local disks and object stores alike.

`put_atomic` locally: a hidden temporary file in the same folder, fsync, rename, fsync of the folder. In an
object store: one put (or a multipart upload, which only its completion makes visible). Readers never see a torn
file, and a kill leaves at most a hidden temporary file that `list` does not show. Every operation is retried
(retrying.py): storage that throttles or resets costs time, never the job. A retry may come minutes after the first
attempt, so what permits a write (`guard`) is asked in every attempt.

Credentials and endpoints come from the environment, never from URLs. For S3: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, profiles and roles as everywhere, AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) for MinIO
and friends; other options of s3fs through fsspec's own configuration (FSSPEC_S3_*).
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from pipeline.storage import local, s3
from pipeline.storage.files import (
    BadUrl,
    FileInfo,
    absolute,
    file_info,
    in_parallel,
    is_local,
    is_s3,
    list_files,
    open_file,
    open_filesystem,
)
from pipeline.storage.retrying import with_retries

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

STALE_SECONDS = 3600.0  # a temporary file this old has no writer any more

Result = TypeVar("Result")


class StoragePathError(ValueError):
    """The path is not a plain relative path below the root."""


@dataclass(frozen=True)
class Storage:
    """Files under the root `url`, named by paths relative to it. Small and picklable: no open handles. Raises BadUrl.

    `guard` is called at the start of every attempt to write or delete a file; what it raises ends the operation.
    """

    url: str
    guard: Callable[[], None] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        url = absolute(self.url).rstrip("/") or "/"
        if url.endswith(":"):
            raise BadUrl(f"{self.url!r} names no folder: write {url}//bucket/folder")
        object.__setattr__(self, "url", url)

    def __getstate__(self) -> dict[str, object]:
        return {"url": self.url, "guard": self.guard}

    @cached_property
    def _opened(self) -> tuple["AbstractFileSystem", str]:
        filesystem, root = open_filesystem(self.url)
        return filesystem, root.rstrip("/")

    @property
    def filesystem(self) -> "AbstractFileSystem":
        """The fsspec file system beneath (without listing cache)."""
        return self._opened[0]

    @property
    def local(self) -> bool:
        return is_local(self.filesystem)

    def full(self, path: str) -> str:
        """The path in the file system of a path relative to the root; StoragePathError if it leaves it."""
        if not path or any(part in ("", ".", "..") for part in path.split("/")):
            raise StoragePathError(f"{path!r} is not a plain path below {self.url}")
        return f"{self._opened[1]}/{path}"

    def put_atomic(self, path: str, data: bytes) -> None:
        """Writes or replaces a file: whole and durable on return, untouched after any failure before."""
        self._guarded("writing", path, lambda: self._put(path, data))

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """As `put_atomic`, but only if the file does not exist; of several callers, each with bytes of its own,
        exactly one gets True. S3 decides by `If-None-Match: *`, a local disk by link(2) (without links: under a lock).
        """
        return self._swap(path, data, lambda: not self.exists(path), lambda: self._create(path, data))

    def read_version(self, path: str) -> tuple[bytes, str]:
        """A whole file, and which version of it that is, for `put_if`; FileNotFoundError if it is missing."""
        if self.local:
            data = self.read(path)
            return data, sha256(data).hexdigest()
        # In this order: should the file change in between, the version is the old one and `put_if` says no.
        version = self._token(path)
        return self.read(path), version

    def put_if(self, path: str, data: bytes, version: str) -> bool:
        """As `put_atomic`, but only if the file is still the `version` that was read; False if it is not.

        S3 decides by `If-Match`. A local disk compares and renames under a lock on the folder, which is waited for
        for 5 s; other object stores compare and put, which leaves a moment between the two.
        """
        return self._swap(
            path, data, lambda: self._may_be(path, version), lambda: self._replace(path, data, version)
        )

    def delete_if(self, path: str, version: str) -> bool:
        """Deletes a file that is still the `version` that was read, as `put_if` replaces it; False if it is not."""
        return self._compared(
            "deleting", path, lambda: self._may_be(path, version), lambda: self._remove_if(path, version)
        )

    def keeps_conditions(self, probe: str) -> bool:
        """Whether of two runs that write the same file at once one is always refused. Tries it on the file `probe`,
        which it writes and deletes; a store that leaves `If-Match` and `If-None-Match` out of account is compared with
        before each write, but in the moment between the two another run's write can be lost."""
        if not is_s3(self.filesystem):
            return self.local
        self.put_atomic(probe, b"probe")
        try:
            path = self.full(probe)
            return self._with_retries("writing", probe, lambda: s3.keeps_conditions(self.filesystem, path))
        finally:
            self.delete([probe])

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file, as many as there are; FileNotFoundError if it is missing."""
        if self.local:
            with open(self.full(path), "rb") as file:
                file.seek(start or 0)
                return file.read(-1 if end is None else end - (start or 0))
        return self._with_retries(
            "reading", path, lambda: bytes(self.filesystem.cat_file(self.full(path), start=start, end=end))
        )

    def open(self, path: str) -> BinaryIO:
        """A seekable binary reader; OSError for a pipe or a device, which has no end or never begins."""
        info = self._with_retries("reading", path, lambda: self.filesystem.info(self.full(path)))
        if info["type"] == "other":
            raise OSError(f"{self.url}/{path} is a pipe, a socket or a device, not a file")
        return open_file(self.filesystem, self.full(path), int(info["size"]))

    def exists(self, path: str) -> bool:
        return bool(self._with_retries("reading", path, lambda: self.filesystem.exists(self.full(path))))

    def list(self, prefix: str = "") -> list[FileInfo]:
        """Files below a folder (recursive, sorted, paths relative to the root), temporary ones left out."""
        below = f"{prefix.rstrip('/')}/" if prefix else ""
        root = self.full(prefix.rstrip("/")) if prefix else self._opened[1]
        return [
            FileInfo(below + info.path, info.size, info.token)
            for info in list_files(self.filesystem, root)
            if not local.is_temporary(info.path)
        ]

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes files, in no order; those that are gone already are fine."""
        todo = list(paths)
        if is_s3(self.filesystem) and len(todo) > 1:
            batches = [todo[start : start + s3.KEYS] for start in range(0, len(todo), s3.KEYS)]
            deleted = in_parallel(self._delete_keys, batches)
            todo = [path for batch, done in zip(batches, deleted, strict=True) if not done for path in batch]
        in_parallel(self._delete_one, todo)

    def delete_temporary(self, prefix: str, older_than: float = STALE_SECONDS) -> None:
        """Deletes what killed local writers left below a folder, once it is `older_than` seconds old."""
        if not self.local:
            return
        for info in list_files(self.filesystem, self.full(prefix)):
            if local.is_temporary(info.path) and time.time() - int(info.token) / 1e9 > older_than:
                self._delete_one(f"{prefix}/{info.path}")

    def delete_empty_folders(self, prefix: str) -> None:
        """Deletes a folder and those below it where nothing is left in them; object stores keep none. Nobody may be
        writing there."""
        if self.local:
            for folder, _, _ in os.walk(self.full(prefix), topdown=False):
                with suppress(OSError):  # it is not empty
                    os.rmdir(folder)

    def _with_retries(self, doing: str, path: str, action: Callable[[], Result]) -> Result:
        return with_retries(action, f"{doing} {self.url}/{path}")

    def _guarded(self, doing: str, path: str, write: Callable[[], Result]) -> Result:
        def attempt() -> Result:
            self._ask()
            return write()

        return self._with_retries(doing, path, attempt)

    def _ask(self) -> None:
        if self.guard:
            self.guard()

    def _delete_one(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._guarded("deleting", path, lambda: self._remove(path))

    def _delete_keys(self, paths: Sequence[str]) -> bool:
        return self._guarded("deleting", f"{paths[0]} and others", lambda: self._remove_keys(paths))

    def _compared(
        self, doing: str, path: str, as_expected: Callable[[], bool], write: Callable[[], bool]
    ) -> bool:
        """A conditional write or deletion: whether it took place. The store decides; where it cannot, what was compared
        just before. Who is refused may have lost the right to write: the guard tells."""

        def attempt() -> bool:
            if not as_expected():
                return False
            self._ask()
            return write()

        done = self._with_retries(doing, path, attempt)
        if not done:
            self._ask()
        return done

    def _swap(
        self, path: str, data: bytes, as_expected: Callable[[], bool], write: Callable[[], bool]
    ) -> bool:
        """A conditional write whose answer may be lost on the way: the write again (by us, or unseen by the HTTP
        client) then meets its own file. So a file that holds our very bytes is ours."""
        if self._compared("writing", path, as_expected, write):
            return True
        with suppress(FileNotFoundError):
            return not self.local and self.read(path) == data
        return False

    def _may_be(self, path: str, version: str) -> bool:
        return self.local or self._is(path, version)  # a disk compares under the lock

    def _is(self, path: str, version: str) -> bool:
        try:
            return self._token(path) == version
        except FileNotFoundError:
            return False

    def _token(self, path: str) -> str:
        """Which version of a file there is."""
        if self.local:
            return sha256(self.read(path)).hexdigest()
        info = self._with_retries("reading", path, lambda: self.filesystem.info(self.full(path)))
        return file_info(self.filesystem, path, info).token

    def _put(self, path: str, data: bytes) -> None:
        if not self.local:
            self.filesystem.pipe_file(self.full(path), data)
            return
        with local.temporary(Path(self.full(path)), data) as temporary:
            os.replace(temporary, self.full(path))

    def _create(self, path: str, data: bytes) -> bool:
        if is_s3(self.filesystem):
            return s3.put_if_absent(self.filesystem, self.full(path), data)
        try:
            if not self.local:
                self.filesystem.pipe_file(self.full(path), data, mode="create")
                return True
            with local.temporary(Path(self.full(path)), data) as temporary:
                local.link_or_rename(temporary, Path(self.full(path)))
        except FileExistsError:
            return False
        return True

    def _replace(self, path: str, data: bytes, version: str) -> bool:
        if is_s3(self.filesystem):
            return s3.put_if_match(self.filesystem, self.full(path), data, version)
        if not self.local:
            self._put(path, data)
            return True
        # The new file first: nothing that takes time stands between comparing and renaming.
        target = Path(self.full(path))
        with local.temporary(target, data) as temporary, local.locked(target.parent):
            if not self._is(path, version):
                return False
            os.replace(temporary, target)
            return True

    def _remove_if(self, path: str, version: str) -> bool:
        if is_s3(self.filesystem):
            return s3.delete_if_match(self.filesystem, self.full(path), version)
        if not self.local:
            self._remove(path)
            return True
        with local.locked(Path(self.full(path)).parent):
            if not self._is(path, version):
                return False
            self._remove(path)
            return True

    def _remove(self, path: str) -> None:
        self.filesystem.rm_file(self.full(path))

    def _remove_keys(self, paths: Sequence[str]) -> bool:
        return s3.delete_keys(self.filesystem, [self.full(path) for path in paths])
