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

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from pipeline.storage.files import (
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
_KEYS = 1000  # in one request that deletes: S3's limit
_LOCK_SECONDS = 5.0  # a lock held longer is a stopped process's; going on without it is no worse than on NFS

Result = TypeVar("Result")


class StoragePathError(ValueError):
    """The path is not a plain relative path below the root."""


@dataclass(frozen=True)
class Storage:
    """Files under the root `url`, named by paths relative to it. Small and picklable: no open handles.

    `guard` is called at the start of every attempt to write or delete a file; what it raises ends the operation.
    """

    url: str
    guard: Callable[[], None] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", absolute(self.url).rstrip("/") or "/")

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
        exactly one gets True. S3 decides by `If-None-Match: *`, a local disk by link(2).
        """
        return self._conditionally(path, data, lambda: self._create(path, data))

    def read_version(self, path: str) -> tuple[bytes, str]:
        """A whole file, and which version of it that is, for `put_if`; FileNotFoundError if it is missing."""
        if self.local:
            data = self.read(path)
            return data, sha256(data).hexdigest()
        # In this order: should the file change in between, the version is the old one and `put_if` says no.
        info = self._with_retries("reading", path, lambda: self.filesystem.info(self.full(path)))
        return self.read(path), file_info(self.filesystem, path, info).token

    def put_if(self, path: str, data: bytes, version: str) -> bool:
        """As `put_atomic`, but only if the file is still the `version` that was read; False if it is not.

        S3 decides by `If-Match`. A local disk compares and renames under a lock on the folder, which is waited for
        for 5 s; other object stores compare and put, which leaves a moment between the two.
        """
        return self._conditionally(path, data, lambda: self._replace(path, data, version))

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
        """A seekable binary reader."""
        info = self._with_retries("reading", path, lambda: self.filesystem.info(self.full(path)))
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
            if not _is_temporary(info.path)
        ]

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes files, in no order; those that are gone already are fine."""
        todo = list(paths)
        if is_s3(self.filesystem) and len(todo) > 1:
            in_parallel(self._delete_keys, [todo[i : i + _KEYS] for i in range(0, len(todo), _KEYS)])
        else:
            in_parallel(self._delete_one, todo)

    def delete_temporary(self, prefix: str, older_than: float = STALE_SECONDS) -> None:
        """Deletes what killed local writers left below a folder, once it is `older_than` seconds old."""
        if not self.local:
            return
        for info in list_files(self.filesystem, self.full(prefix)):
            if _is_temporary(info.path) and time.time() - int(info.token) / 1e9 > older_than:
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
            if self.guard:
                self.guard()
            return write()

        return self._with_retries(doing, path, attempt)

    def _delete_one(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._guarded("deleting", path, lambda: self._remove(path))

    def _delete_keys(self, paths: Sequence[str]) -> None:
        """One request to S3, which answers 200 and says which keys it could not delete; s3fs does not look at that."""
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        def request() -> None:
            names = [self.filesystem.split_path(self.full(path)) for path in paths]
            keys = {"Objects": [{"Key": key} for _, key, _ in names], "Quiet": True}
            answer = self.filesystem.call_s3("delete_objects", Bucket=names[0][0], Delete=keys)
            if errors := answer.get("Errors"):
                raise translate_boto_error(ClientError({"Error": errors[0]}, "DeleteObjects"))

        self._guarded("deleting", f"{paths[0]} and others", request)

    def _conditionally(self, path: str, data: bytes, write: Callable[[], bool]) -> bool:
        """A conditional write whose answer may be lost on the way: the write again (by us, or unseen by the HTTP
        client) then meets its own file. So a file that holds our very bytes is ours."""
        if self._guarded("writing", path, write):
            return True
        with suppress(FileNotFoundError):
            return not self.local and self.read(path) == data
        return False

    def _put(self, path: str, data: bytes) -> None:
        if not self.local:
            self.filesystem.pipe_file(self.full(path), data)
            return
        with self._temporary(path, data) as temporary:
            os.replace(temporary, self.full(path))

    def _create(self, path: str, data: bytes) -> bool:
        try:
            if not self.local:
                self.filesystem.pipe_file(self.full(path), data, mode="create")
                return True
            with self._temporary(path, data) as temporary:
                os.link(temporary, self.full(path))
        except FileExistsError:
            return False
        return True

    def _replace(self, path: str, data: bytes, version: str) -> bool:
        if is_s3(self.filesystem):
            try:
                # One put, however large: s3fs would make a multipart upload unconditional.
                self.filesystem.pipe_file(self.full(path), data, chunksize=5 << 30, IfMatch=f'"{version}"')
            except FileNotFoundError:
                return False
            except OSError as error:
                if (
                    getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
                    != "PreconditionFailed"
                ):
                    raise
                return False
            return True
        try:
            if not self.local:
                if self.read_version(path)[1] != version:
                    return False
                self._put(path, data)
                return True
            # The new file first: nothing that takes time stands between comparing and renaming.
            with self._temporary(path, data) as temporary, _locked(temporary.parent):
                if self.read_version(path)[1] != version:
                    return False
                os.replace(temporary, self.full(path))
                return True
        except FileNotFoundError:
            return False

    @contextmanager
    def _temporary(self, path: str, data: bytes) -> Iterator[Path]:
        """A durable hidden file beside `path`, for as long as the block lasts; what the block renames is durable."""
        temporary = self._write_temporary(path, data)
        try:
            yield temporary
            _sync_folder(temporary.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _remove(self, path: str) -> None:
        self.filesystem.rm_file(self.full(path))

    def _write_temporary(self, path: str, data: bytes) -> Path:
        target = Path(self.full(path))
        _make_folder(target.parent)
        temporary = (
            target.parent / f".{uuid.uuid4().hex}.tmp"
        )  # short: the name's own length may be at its limit
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


def _is_temporary(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".tmp")


def _make_folder(folder: Path) -> None:
    """mkdir -p, durable: a folder that a crash forgets takes its files along."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds an advisory lock on a folder, which ends with the process that holds it; without one where there is
    no locking (some network file systems), or where a stopped process keeps it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
