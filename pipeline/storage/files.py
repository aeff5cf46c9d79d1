"""File systems: opening, listing and reading, local or any fsspec URL, retried.

Why: fsspec gives one interface to many stores, but each lists, caches, retries and names versions a little
differently. The differences end here: nothing is cached, names are plain, and one layer retries (retrying.py).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from pipeline.storage.retrying import RetryingFile, TruncatedRead, with_retries

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

THREADS = 32  # of parallel small requests: they wait for the network, not for a core
_TOKENS = (
    "ETag",
    "etag",
    "e_tag",
    "md5Hash",
    "generation",
    "blob_id",
    "mtime",
    "LastModified",
    "last_modified",
    "created",
)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A listed file. `path` is relative to the root listed, `size` in bytes; `token` changes with the content
    (etag in object stores, blob on the Hugging Face hub, mtime in ns locally; empty where the store tells none)."""

    path: str
    size: int
    token: str


class BadUrl(ValueError):
    """Neither a path nor a URL of storage that can be opened."""


def absolute(url: str) -> str:
    """A URL as it is; a local path made absolute, so that it means the same in every process of a cluster.

    Raises BadUrl for what would be a path, and is a mistyped URL: `s3:/bucket`, `file:/x`, `a::b`.
    """
    if "://" in url:
        return url
    scheme, colon, rest = url.partition(":")
    if colon and (rest.startswith(":") or _is_scheme(scheme)):
        raise BadUrl(
            f"{url!r} is neither a path nor a URL: write scheme://..., for instance s3://bucket/folder, or "
            "./ before a file's name"
        )
    return os.path.abspath(os.path.expanduser(url))


def _is_scheme(name: str) -> bool:
    from fsspec.registry import available_protocols

    return name in available_protocols()


def open_filesystem(url: str) -> tuple["AbstractFileSystem", str]:
    """(file system, path in it) of any fsspec URL. Listings are never cached: others write here, too. BadUrl."""
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(absolute(url), use_listings_cache=False)
    except BadUrl:
        raise
    # A scheme that nobody knows, or whose package is not installed
    except (
        ValueError,
        ImportError,
    ) as error:
        raise BadUrl(f"{url!r} cannot be opened: {error}") from None
    if is_s3(filesystem):  # one layer retries: retrying.py
        filesystem.retries = 1
        filesystem.config_kwargs = {"retries": {"total_max_attempts": 1}, **filesystem.config_kwargs}
    return filesystem, path


def is_s3(filesystem: "AbstractFileSystem") -> bool:
    return "s3" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))


def read_range(filesystem: "AbstractFileSystem", path: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file that is known to hold them, retried."""

    def attempt() -> bytes:
        data = bytes(filesystem.cat_file(path, start=start, end=end)) if end > start else b""
        if len(data) != end - start:
            raise TruncatedRead(f"{len(data)} of {end - start} bytes came")
        return data

    return with_retries(attempt, f"reading {filesystem.unstrip_protocol(path)}")


def open_file(filesystem: "AbstractFileSystem", path: str, size: int) -> BinaryIO:
    """A seekable binary reader of a file of `size` bytes."""
    if is_local(filesystem):
        return open(path, "rb")
    return cast(BinaryIO, RetryingFile(lambda start, end: read_range(filesystem, path, start, end), size))


def is_local(filesystem: "AbstractFileSystem") -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS
) -> list[Result]:
    """[function(item), ...] in order, by up to `threads` threads; the first error is raised."""
    todo = list(items)
    if len(todo) < 2:
        return [function(item) for item in todo]
    with ThreadPoolExecutor(min(threads, len(todo))) as pool:
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
    what = f"listing {filesystem.unstrip_protocol(root)}"
    try:
        if is_s3(filesystem):
            found = dict(_s3_objects(filesystem, root, what))
        else:
            found = with_retries(lambda: filesystem.find(root, detail=True), what)
    except FileNotFoundError:
        return []
    prefix = root.rstrip("/") + "/"
    return [
        file_info(filesystem, path.removeprefix(prefix), info)
        for path, info in sorted(found.items())
        if path.startswith(prefix) and not path.endswith("/")  # "folders" that consoles make are no files
    ]


def _s3_objects(
    filesystem: "AbstractFileSystem", root: str, what: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, info) of every object below a folder. Each page of a listing is retried by itself: of a thousand pages
    one always fails, and it must not cost the others."""
    bucket, folder, _ = filesystem.split_path(root)
    request = {"Bucket": bucket, "Prefix": f"{folder}/" if folder else "", **filesystem.req_kw}
    while True:
        page = with_retries(lambda: filesystem.call_s3("list_objects_v2", **request), what)
        for item in page.get("Contents", ()):
            yield f"{bucket}/{item['Key']}", {"size": item["Size"], **item}
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _walk(root: str, below: str, above: tuple[str, ...] = ()) -> Iterator[FileInfo]:
    """Files below `root/below`, through links to folders; `above` are the real folders that such links were in."""
    try:
        entries = list(os.scandir(os.path.join(root, below)))
    except FileNotFoundError:
        return
    for entry in entries:
        path = below + entry.name
        try:
            if not entry.is_dir():
                status = entry.stat()
                yield FileInfo(path, status.st_size, str(status.st_mtime_ns))
            elif not entry.is_symlink():
                yield from _walk(root, f"{path}/", above)
            elif not _leads_up(entry.path, behind := (*above, os.path.realpath(os.path.dirname(entry.path)))):
                yield from _walk(root, f"{path}/", behind)
        except OSError:
            # It leads nowhere: a disk that is not mounted, say; whoever reads it tells
            if entry.is_symlink():
                yield FileInfo(path, 0, "")
            elif os.path.lexists(entry.path):
                raise
            # else it was deleted while listing


def _leads_up(link: str, behind: tuple[str, ...]) -> bool:
    """Whether a link leads to a folder that it, or a link on the way to it, lies in: that is listed without it."""
    target = os.path.realpath(link)
    return any(os.path.commonpath([folder, target]) == target for folder in behind)
