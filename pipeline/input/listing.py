"""Listing the input: which files the entries of input.path stand for, each a file, a folder or a glob.

Names that begin with "_" or "." are passed over in folders and globs; so that captions are not captioned, outputs of
Tessera's own among the files are told (`outputs_among`).
"""

import os.path
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.spec.job_spec import SpecError
from pipeline.storage.files import FileInfo, file_info, in_parallel, list_files, open_filesystem
from pipeline.storage.retrying import MissingBucket, StorageError, with_retries

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_MAGIC = "*?["
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


class InputError(SpecError):
    """The input cannot be captioned as the spec says; raised before anything starts."""


def expand(url: str) -> tuple["AbstractFileSystem", str, list[FileInfo]]:
    """(file system, root, files with full paths) of one entry of input.path."""
    try:
        filesystem, path = open_filesystem(url)
        path = path.rstrip("/") or path
        try:
            info = with_retries(lambda: filesystem.info(path), f"reading {url}")
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
    return [
        FileInfo(f"{folder}/{info.path}", info.size, info.token)
        for info in list_files(filesystem, folder)
        if info.path.endswith(".parquet") and not _hidden(info.path)
    ]


def _expand_glob(filesystem: "AbstractFileSystem", pattern: str) -> tuple[str, list[FileInfo]]:
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in _MAGIC))
    root = "/".join(parts[:fixed])
    files: list[FileInfo] = []
    found = with_retries(lambda: filesystem.glob(pattern, detail=True), f"listing {pattern}")
    for path, info in sorted(found.items()):
        if _hidden(path[len(root) :].lstrip("/")):
            continue
        if info["type"] == "directory":
            files.extend(_expand_folder(filesystem, path))
        else:
            files.append(file_info(filesystem, path, info))
    return root, files


def outputs_among(filesystem: "AbstractFileSystem", root: str, files: Sequence[FileInfo]) -> list[str]:
    """The folders below `root` that are outputs of Tessera's: their captions lie in data/, beside _tessera/."""
    suspects: set[str] = set()
    for info in files:
        folders = info.path[len(root) :].strip("/").split("/")[:-1]
        suspects.update(
            "/".join([root, *folders[:depth]]) for depth in range(1, len(folders)) if folders[depth] == "data"
        )

    def is_output(folder: str) -> bool:
        return bool(with_retries(lambda: filesystem.exists(f"{folder}/_tessera"), f"reading {folder}"))

    folders = sorted(suspects)
    return [folder for folder, found in zip(folders, in_parallel(is_output, folders), strict=True) if found]


def pictures_in(filesystem: "AbstractFileSystem", folder: str) -> list[str]:
    """The picture files below a folder, by their names: what is there most often where no parquet file is."""
    return [info.path for info in list_files(filesystem, folder) if info.path.lower().endswith(_PICTURES)]


def _hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path.split("/"))
