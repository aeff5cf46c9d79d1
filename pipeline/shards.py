"""Input shards: which parquet files a job reads, under which names, in which version.

Why: a row's identity is (shard, row), for ever. So a shard's name must not change when the input grows, and
its content must not change unnoticed.

The one idea: a name is the path relative to the input's root, and the root follows from the spec, not from
the files found: a folder is its own root, a glob's root is its fixed part, a file's its folder, a list's the
deepest folder common to its entries' roots. A fingerprint of size and etag (locally: mtime) stands for
content.
"""

import hashlib
import os.path
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.files import FileInfo, file_info, in_parallel, list_files, open_filesystem
from pipeline.footer import NotParquetError, read_footer
from pipeline.spec import InputSpec, SpecError
from pipeline.weather import MissingBucket, StorageError, patiently

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_MAGIC = "*?["


class InputError(SpecError):
    """The input cannot be captioned as the spec says; raised before anything starts."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file. `name` identifies it in the output; `schema` is its Arrow schema without metadata."""

    name: str  # path relative to the input root, "/"-separated
    url: str  # any fsspec URL; a local path is absolute
    rows: int
    fingerprint: str  # 12 hex digits over size and etag or mtime
    size: int  # bytes
    schema: pa.Schema = field(repr=False, compare=False)

    @property
    def root(self) -> str:
        """The input's root as a URL: `url` is `root/name`."""
        return self.url.removesuffix(self.name).rstrip("/")


def discover(source: InputSpec) -> list[Shard]:
    """The input's shards, sorted by name; reads every footer once, in parallel. Raises InputError.

    Names that begin with "_" or "." are passed over in folders and globs, and so are folders that hold an
    output of Tessera's own. A file that is named in the spec is taken whatever its name.
    """
    roots: list[str] = []
    files: dict[str, FileInfo] = {}
    filesystems: list[AbstractFileSystem] = []
    for url in source.path:
        filesystem, root, found = _expand(url)
        if not found:
            raise InputError(f"input.path: no parquet files found at {url}")
        filesystems.append(filesystem)
        roots.append(root)
        files.update((info.path, info) for info in found)
    if len({type(filesystem) for filesystem in filesystems}) > 1:
        raise InputError(
            "input.path: all its entries must lie in one kind of storage, or rows have no common root"
        )
    filesystem = filesystems[0]
    root = os.path.commonpath(roots).rstrip("/")
    schemas: dict[str, pa.Schema] = {}

    def read(info: FileInfo) -> Shard | str:
        name = info.path[len(root) :].lstrip("/") if root else info.path
        url = info.path if os.path.isabs(info.path) else filesystem.unstrip_protocol(info.path)
        try:
            footer = read_footer(filesystem, info.path, info.size)
        except NotParquetError as error:
            return f"{url} {error}"
        except OSError as error:
            return f"{url} cannot be read ({error})"
        schema = footer.schema.to_arrow_schema().remove_metadata()
        schema = schemas.setdefault(str(schema), schema)  # most shards share one: keep one object
        return Shard(name, url, footer.num_rows, _fingerprint(info), info.size, schema)

    shards: list[Shard] = []
    problems: list[str] = []
    for result in in_parallel(read, sorted(files.values(), key=lambda info: info.path)):
        if isinstance(result, str):
            problems.append(result)
        else:
            shards.append(result)
    if problems:
        more = f" (and {len(problems) - 1} more files like it)" if len(problems) > 1 else ""
        raise InputError(f"input.path: {problems[0]}{more}; remove it from the input, or repair it")
    _refuse_clashes(shards)
    return shards


def output_name(shard_name: str) -> str:
    """The shard's file name below data/: its own, ending in .parquet exactly once."""
    return shard_name.removesuffix(".parquet") + ".parquet"


def shard_schema(url: str) -> pa.Schema:
    """The Arrow schema (without metadata) of one parquet file. Raises InputError."""
    filesystem, path = open_filesystem(url)
    try:
        info = patiently(lambda: filesystem.info(path), f"reading {url}")
        footer = read_footer(filesystem, path, int(info["size"]))
    except (NotParquetError, OSError) as error:
        raise InputError(f"{url} {error}") from None
    return footer.schema.to_arrow_schema().remove_metadata()


def _fingerprint(info: FileInfo) -> str:
    return hashlib.sha256(f"{info.size}:{info.token}".encode()).hexdigest()[:12]


def _refuse_clashes(shards: list[Shard]) -> None:
    seen: dict[str, Shard] = {}
    for shard in shards:
        other = seen.setdefault(output_name(shard.name), shard)
        if other is not shard:
            raise InputError(
                f"input.path: {other.url} and {shard.url} would both be written to "
                f"data/{output_name(shard.name)}; rename one of them"
            )


def _expand(url: str) -> tuple["AbstractFileSystem", str, list[FileInfo]]:
    """(file system, root, files with full paths) of one entry of input.path."""
    try:
        filesystem, path = open_filesystem(url)
        path = path.rstrip("/") or path
        try:
            info = patiently(lambda: filesystem.info(path), f"reading {url}")
        except FileNotFoundError:
            if not any(sign in path for sign in _MAGIC):
                raise
            return filesystem, *_expand_glob(filesystem, path)
        if info["type"] == "directory":
            return filesystem, path, _expand_folder(filesystem, path)
        return filesystem, os.path.dirname(path), [file_info(filesystem, path, info)]
    except FileNotFoundError:
        raise InputError(f"input.path: {url} does not exist") from None
    except MissingBucket as error:
        raise InputError(f"input.path: {error}") from None
    except StorageError:  # says what failed; the spec is not to blame
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"input.path: {url} cannot be read ({error})") from None


def _expand_folder(filesystem: "AbstractFileSystem", folder: str) -> list[FileInfo]:
    found = list_files(filesystem, folder)
    outputs = {info.path.partition("/_tessera/")[0] + "/" for info in found if "/_tessera/" in info.path}
    return [
        FileInfo(f"{folder}/{info.path}", info.size, info.token)
        for info in found
        if info.path.endswith(".parquet")
        and not _hidden(info.path)
        and not info.path.startswith(tuple(outputs))
    ]


def _expand_glob(filesystem: "AbstractFileSystem", pattern: str) -> tuple[str, list[FileInfo]]:
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in _MAGIC))
    root = "/".join(parts[:fixed])
    files: list[FileInfo] = []
    found = patiently(lambda: filesystem.glob(pattern, detail=True), f"listing {pattern}")
    for path, info in sorted(found.items()):
        if _hidden(path[len(root) :].lstrip("/")):
            continue
        if info["type"] == "directory":
            files.extend(_expand_folder(filesystem, path))
        else:
            files.append(file_info(filesystem, path, info))
    return root, files


def _hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path.split("/"))
