"""Input shards: which parquet files a job reads, under which names, in which version.

Why: a row's identity is (shard, row), for ever. So a shard's name must not change when the input grows, and
its content must not change unnoticed.

A name is the path relative to the input's root, and the root follows from the spec, not from the files found: a
folder is its own root, a glob's root is its fixed part, a file's its folder, a list's the deepest folder common to
its entries' roots. An output keeps the root of its first run (ledger/job_input.py), so that a second folder in
input.path renames nothing. A fingerprint of size and etag (locally: mtime) names a version; what it cannot tell,
whether another version holds the same bytes, is told in versions.py.

A file whose footer cannot be read is set apart by name, and the job goes on without it: one damaged file must not
stop a thousand good ones. It counts against `limits.max_failed_shards` at the end (ledger/damage.py).
"""

import hashlib
import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.input.listing import InputError, expand, outputs_among, pictures_in
from pipeline.spec.job_spec import InputSpec
from pipeline.storage.files import FileInfo, in_parallel, is_local, open_filesystem
from pipeline.storage.footer import NotParquetError, one_line, read_footer
from pipeline.storage.retrying import StorageError, with_retries

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CHANGED = "changed while it was read, and the same command captions it anew"
_FSSPEC = ("::", "?versionId=")  # a chain of file systems, a version of an object


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file. `name` identifies it in the output; `schema` is its Arrow schema without metadata."""

    name: str  # path relative to the input root, "/"-separated
    url: str  # any fsspec URL; a local path is absolute
    rows: int
    fingerprint: str  # 12 hex digits: `version`, or that of an earlier one with the same content
    size: int  # bytes
    schema: pa.Schema = field(repr=False, compare=False)
    token: str = ""  # changes with the file (FileInfo.token); empty where the store tells nothing

    @property
    def version(self) -> str:
        """The fingerprint of the file as it was listed, by size and token."""
        return _fingerprint(self.size, self.token)

    @property
    def root(self) -> str:
        """The input's root as a URL: `url` is `root/name`."""
        return self.url.removesuffix(self.name).rstrip("/")


@dataclass(frozen=True, slots=True)
class FailedShard:
    """A shard that cannot be read, wholly or in part: `url` and `reason` make a sentence."""

    name: str
    url: str
    reason: str

    @classmethod
    def partly(cls, shard: Shard, rows: int, message: str | None) -> "FailedShard":
        """A shard so many rows of which cannot be read; `message` is what one of them says."""
        because = f" ({message})" if message else ""
        return cls(shard.name, shard.url, f"has {rows:,} of {shard.rows:,} rows that cannot be read{because}")

    @classmethod
    def changed(cls, shard: Shard) -> "FailedShard":
        """A shard whose file is another one than was listed, so that its rest was not read."""
        return cls(shard.name, shard.url, CHANGED)

    def __str__(self) -> str:
        return f"{self.url} {self.reason}"


@dataclass(frozen=True, slots=True)
class Input:
    """What lies under input.path, sorted by name: shards, and files that cannot be opened as such.

    `root` is where names begin; `roots` are the folders that the entries of input.path name; `outputs` the folders
    below them with captions of Tessera's own, which are passed over. All are URLs. `touched` names the shards whose
    file is another version with the content of an earlier one, as reading them has shown, or as their size suggests
    (ledger/job_input.py).
    """

    shards: tuple[Shard, ...]
    unreadable: tuple[FailedShard, ...] = ()
    roots: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    root: str = ""
    touched: tuple[str, ...] = ()

    def without(self, failed: Sequence[FailedShard]) -> "Input":
        """The input with some of its shards set apart."""
        names = {shard.name for shard in failed}
        shards = tuple(shard for shard in self.shards if shard.name not in names)
        return replace(self, shards=shards, unreadable=(*self.unreadable, *failed))

    def notes(self) -> list[str]:
        """What people are told of files that were passed over."""
        return [f"note: {url} is an output of Tessera's own and not read as input" for url in self.outputs]


def discover(source: InputSpec, pinned: str | None = None) -> Input:
    """The job's input; reads every footer once, in parallel. Raises InputError where there is nothing to read.

    `pinned` is the root (a URL) at which names began before. They begin there again, if every entry of input.path lies
    in it; if none does, it is an input of its own, and it takes an InputError to have both.

    Names that begin with "_" or "." are passed over in folders and globs, and so are outputs of Tessera's own below
    them. A file that is named in the spec is taken whatever its name.
    """
    roots: list[str] = []
    files: dict[str, FileInfo] = {}
    outputs: dict[str, None] = {}
    filesystems: list[AbstractFileSystem] = []
    for url in source.path:
        filesystem, root, found = expand(url)
        own = outputs_among(filesystem, root, found)
        files_of_own = tuple(f"{folder}/data/" for folder in own)
        taken = [info for info in found if not info.path.startswith(files_of_own)]
        if not taken:
            why = f"; all there is are captions of Tessera's own, in {own[0]}/data" if own else ""
            if pictures := pictures_in(filesystem, root):
                why = (
                    f"; there are pictures ({pictures[0]} and {len(pictures) - 1:,} more): write them to parquet files "
                    "first, as the README shows"
                )
            raise InputError(f"input.path: no parquet files found at {url}{why}")
        filesystems.append(filesystem)
        roots.append(root)
        files.update((info.path, info) for info in taken)
        outputs.update((_url_of(filesystem, folder), None) for folder in own)
    if len({type(filesystem) for filesystem in filesystems}) > 1:
        raise InputError(
            "input.path: all its entries must lie in one kind of storage, or rows have no common root"
        )
    filesystem = filesystems[0]
    root = _root_of(filesystem, source.path, roots, pinned)
    schemas: dict[str, pa.Schema] = {}

    def read(info: FileInfo) -> Shard | FailedShard:
        name = info.path.removeprefix(root).removeprefix("/")
        url = _url_of(filesystem, info.path)
        if wrong := _unusable(name):
            printable = name.encode(errors="backslashreplace").decode()
            return FailedShard(printable, url.encode(errors="backslashreplace").decode(), wrong)
        try:
            footer = read_footer(filesystem, info.path, info.size)
            schema = footer.schema.to_arrow_schema().remove_metadata()
            schema = schemas.setdefault(str(schema), schema)  # most shards share one: keep one object
        except StorageError:  # storage that fails for minutes says nothing of the file
            raise
        except NotParquetError as error:
            nowhere = is_local(filesystem) and os.path.islink(info.path) and not os.path.exists(info.path)
            return FailedShard(name, url, "is a link that leads nowhere" if nowhere else str(error))
        except FileNotFoundError:
            return FailedShard(name, url, "was deleted after it had been listed")
        except (OSError, ValueError, pa.ArrowException) as error:
            return FailedShard(name, url, f"cannot be read ({one_line(error)})")
        version = _fingerprint(info.size, info.token)
        return Shard(name, url, footer.num_rows, version, info.size, schema, info.token)

    results = in_parallel(read, sorted(files.values(), key=lambda info: info.path))
    shards = tuple(result for result in results if isinstance(result, Shard))
    unreadable = tuple(result for result in results if isinstance(result, FailedShard))
    if not shards:
        more = f" (and {len(unreadable) - 1:,} more files like it)" if len(unreadable) > 1 else ""
        raise InputError(f"input.path: {unreadable[0]}{more}; remove it from the input, or repair it")
    _refuse_clashes(shards)
    entries = tuple(_url_of(filesystem, entry) for entry in roots)
    return Input(shards, unreadable, entries, tuple(outputs), _url_of(filesystem, root))


def _unusable(name: str) -> str:
    """Why a file of this name can have no sealed file of the same name; empty where it can."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "has an empty part, '.' or '..' in its name: rename it"
    for sign in _FSSPEC:
        if sign in name:
            return f"has {sign!r} in its name, which means something else in a URL of fsspec's: rename it"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8: rename it"
    return ""


def output_name(shard_name: str) -> str:
    """The shard's file name below data/: its own, ending in .parquet exactly once."""
    return shard_name.removesuffix(".parquet") + ".parquet"


def shard_schema(url: str) -> pa.Schema:
    """The Arrow schema (without metadata) of one parquet file. Raises InputError."""
    filesystem, path = open_filesystem(url)
    try:
        info = with_retries(lambda: filesystem.info(path), f"reading {url}")
        footer = read_footer(filesystem, path, int(info["size"]))
    except (NotParquetError, OSError) as error:
        raise InputError(f"{url} {error}") from None
    return footer.schema.to_arrow_schema().remove_metadata()


def _root_of(
    filesystem: "AbstractFileSystem", entries: Sequence[str], roots: Sequence[str], pinned: str | None
) -> str:
    """Where names begin: at the root that is pinned, or else in the deepest folder common to all roots."""
    common = os.path.commonpath(roots).rstrip("/")
    if pinned is None:
        return common
    storage, before = open_filesystem(pinned)
    before = before.rstrip("/")
    if type(storage) is not type(filesystem):
        return common
    outside = [entry for entry, root in zip(entries, roots, strict=True) if not _lies_in(root, before)]
    if not outside:
        return before
    if len(outside) < len(entries):
        raise InputError(
            f"input.path: {outside[0]} lies outside of {pinned}, where the names of this output's shards begin, and "
            "with another beginning its captions would not be found; caption it into an output of its own, or move "
            f"it into {pinned}"
        )
    return common


def _lies_in(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(f"{folder}/")


def _fingerprint(size: int, token: str) -> str:
    return hashlib.sha256(f"{size}:{token}".encode()).hexdigest()[:12]


def _url_of(filesystem: "AbstractFileSystem", path: str) -> str:
    return (path or "/") if is_local(filesystem) else str(filesystem.unstrip_protocol(path))


def _refuse_clashes(shards: Sequence[Shard]) -> None:
    seen: dict[str, Shard] = {}
    for shard in shards:
        other = seen.setdefault(output_name(shard.name), shard)
        if other is not shard:
            raise InputError(
                f"input.path: {other.url} and {shard.url} would both be written to "
                f"data/{output_name(shard.name)}; rename one of them"
            )
