"""Files under one root, local or in an object store: the only place that writes.

Why: everything Tessera promises rests on one property, that a file is either there whole or not there at all.
It is stated and kept here, for local disks and object stores alike.

The one idea: `put_atomic`. Locally: a hidden temporary file in the same folder, fsync, rename, fsync of the
folder. In an object store: one put (or a multipart upload, which only its completion makes visible).
Readers never see a torn file, and a kill leaves at most a hidden temporary file that `list` does not show.

Credentials and endpoints come from the environment, never from URLs. For S3: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, profiles and roles as everywhere, AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) for MinIO
and friends; other options of s3fs through fsspec's own configuration (FSSPEC_S3_*).
"""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

THREADS = 32  # of parallel small requests: they wait for the network, not for a core
STALE_SECONDS = 3600.0  # a temporary file this old has no writer any more

_TOKENS = (
    "ETag",
    "etag",
    "e_tag",
    "md5Hash",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "created",
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class StoragePathError(ValueError):
    """The path is not a plain relative path below the root."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A listed file. `path` is relative to the root listed, `size` in bytes; `token` changes with the content
    (etag in object stores, mtime in ns locally; empty where the store tells neither)."""

    path: str
    size: int
    token: str


def absolute(url: str) -> str:
    """A URL as it is; a local path made absolute, so that it means the same in every process of a cluster."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def open_filesystem(url: str) -> tuple["AbstractFileSystem", str]:
    """(file system, path in it) of any fsspec URL. Listings are never cached: others write here, too."""
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(absolute(url), use_listings_cache=False)
    return filesystem, path


def is_local(filesystem: "AbstractFileSystem") -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """[function(item), ...] in order, by up to 32 threads; the first error is raised."""
    todo = list(items)
    if len(todo) < 2:
        return [function(item) for item in todo]
    with ThreadPoolExecutor(min(THREADS, len(todo))) as pool:
        return list(pool.map(function, todo))


def file_info(filesystem: "AbstractFileSystem", path: str, info: dict[str, Any]) -> FileInfo:
    """FileInfo from fsspec's `info` dict; `path` is taken as it is."""
    if is_local(filesystem):  # fsspec's mtime is a float: too coarse to tell two writes apart
        status = os.stat(info["name"])
        return FileInfo(path, status.st_size, str(status.st_mtime_ns))
    token = next((info[key] for key in _TOKENS if info.get(key) is not None), "")
    return FileInfo(path, int(info.get("size") or 0), str(token).strip('"'))


def list_files(filesystem: "AbstractFileSystem", root: str) -> list[FileInfo]:
    """Every file below a folder, sorted, paths relative to it; nothing when it does not exist."""
    if is_local(filesystem):
        return sorted(_walk(root, ""), key=lambda info: info.path)
    try:
        found = filesystem.find(root, detail=True)
    except FileNotFoundError:
        return []
    prefix = root.rstrip("/") + "/"
    return [
        file_info(filesystem, path.removeprefix(prefix), info)
        for path, info in sorted(found.items())
        if path.startswith(prefix) and not path.endswith("/")  # "folders" that consoles make are no files
    ]


def _walk(root: str, below: str) -> Iterator[FileInfo]:
    try:
        entries = list(os.scandir(os.path.join(root, below)))
    except FileNotFoundError:
        return
    for entry in entries:
        try:
            if entry.is_dir():
                yield from _walk(root, f"{below}{entry.name}/")
            else:
                status = entry.stat()
                yield FileInfo(below + entry.name, status.st_size, str(status.st_mtime_ns))
        except FileNotFoundError:  # deleted while listing
            continue


@dataclass(frozen=True)
class Storage:
    """Files under the root `url`, named by paths relative to it. Small and picklable: no open handles."""

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", absolute(self.url).rstrip("/") or "/")

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

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
        if self.local:
            temporary = self._write_temporary(path, data)
            try:
                os.replace(temporary, self.full(path))
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(temporary.parent)
        else:
            self.filesystem.pipe_file(self.full(path), data)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """As `put_atomic`, but only if the file does not exist; of several callers exactly one gets True.

        S3 decides by `If-None-Match: *`, a local disk by link(2).
        """
        try:
            if not self.local:
                self.filesystem.pipe_file(self.full(path), data, mode="create")
                return True
            temporary = self._write_temporary(path, data)
            try:
                os.link(temporary, self.full(path))
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(temporary.parent)
        except FileExistsError:
            return False
        return True

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file; FileNotFoundError if it is missing."""
        if self.local:
            with open(self.full(path), "rb") as file:
                file.seek(start or 0)
                return file.read(-1 if end is None else end - (start or 0))
        return bytes(self.filesystem.cat_file(self.full(path), start=start, end=end))

    def open(self, path: str) -> BinaryIO:
        """A seekable binary reader."""
        reader: BinaryIO = self.filesystem.open(self.full(path), "rb")
        return reader

    def exists(self, path: str) -> bool:
        return bool(self.filesystem.exists(self.full(path)))

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
        in_parallel(self._delete_one, paths)

    def delete_temporary(self, prefix: str, older_than: float = STALE_SECONDS) -> None:
        """Deletes what killed local writers left below a folder, once it is `older_than` seconds old."""
        if not self.local:
            return
        for info in list_files(self.filesystem, self.full(prefix)):
            if _is_temporary(info.path) and time.time() - int(info.token) / 1e9 > older_than:
                self._delete_one(f"{prefix}/{info.path}")

    def _delete_one(self, path: str) -> None:
        with suppress(FileNotFoundError):
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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
