"""Checks of a checkpoint's files: is it a folder or a hub id, and are the folder's weights all there and whole?

Why: a mistyped path or a half-copied folder is told at once and by name, not by an actor on a cluster that was started
for it. Which files count follows transformers' `from_pretrained`. Of safetensors only the headers are read. Imports
neither torch nor transformers, which take seconds.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CONFIG = "config.json"
_INDEX = ".index.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: it breaks the job, not a row."""


class HubError(CheckpointError):
    """The hub could not be asked: no fault of the job's, and the same command may work later."""


def check_path(path: str) -> None:
    """Raises CheckpointError unless `path` is a folder with whole weights, or may be a hub id."""
    check_name(path)
    if os.path.isdir(path):
        check_folder(path)


def check_name(path: str) -> None:
    """Raises CheckpointError unless `path` is a folder, or written as hub ids are."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.path.isdir(path):
        return
    if os.path.exists(path):
        raise CheckpointError(f"{path}: a file; name the checkpoint's folder, or a hub id")
    try:
        validate_repo_id(path)
    except HFValidationError:
        hint = " (only local folders are read)" if "://" in path else did_you_mean(path)
        raise CheckpointError(f"{path}: no such folder{hint}, and not a hub id (organisation/name)") from None


def did_you_mean(path: str) -> str:
    """What to add to "no such folder": the existing folder whose path is most like it, or nothing."""
    with suppress(OSError):
        if folder := _nearest(Path(path)):
            return f" (did you mean {folder}?)"
    return ""


def check_folder(folder: str) -> None:
    """Raises CheckpointError unless `folder` has a config.json, and the weights transformers would load are whole.

    A second set of weights beside them is refused as well: a stale `model.safetensors` wins over fresh shards.
    """
    config = read_object(folder, CONFIG)
    if config is None:
        raise no_config(folder)
    names = weight_files(config)
    first = next((name for name in names if Path(folder, name).is_file()), None)
    if first is None:
        raise no_weights(folder, names)
    listed, files = _index(folder, first) if first.endswith(_INDEX) else (set(), [first])
    held = {tensor for name in files for tensor in _tensors(folder, name)}
    if first.endswith(".safetensors" + _INDEX) and (absent := sorted(listed - held)):
        raise CheckpointError(f"{folder}: {first} lists {absent[0]}, which none of its files holds")
    if strays := _strays(folder, first, files):
        raise CheckpointError(
            f"{folder}: {_are(strays)} there, but transformers loads only what {first} "
            f"{'lists' if first.endswith(_INDEX) else 'holds'}; remove the weights that are not meant"
        )


def weight_files(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The files weights may begin with, in transformers' order: the first that exists is loaded."""
    named = config.get("transformers_weights")
    if isinstance(named, str):
        return (named,)
    return tuple(name + suffix for name in _WEIGHTS for suffix in ("", _INDEX))


def read_object(folder: str, name: str) -> dict[str, Any] | None:
    """A JSON object of a folder, or None where the file is not there."""
    try:
        return parse_object(folder, name, Path(folder, name).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder}: {name} cannot be read: {error.strerror}") from error


def parse_object(path: str, name: str, data: bytes) -> dict[str, Any]:
    """The JSON object that the file `name` of the checkpoint `path` holds."""
    _refuse_pointer(path, name, data)
    try:
        value = json.loads(data.decode("utf-8"))
    except ValueError as error:  # of UTF-8 or of JSON
        raise CheckpointError(f"{path}: {name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} holds no JSON object")
    return value


def no_config(path: str) -> CheckpointError:
    return CheckpointError(f"{path}: no {CONFIG} there, so it is not a checkpoint")


def no_weights(path: str, names: Sequence[str]) -> CheckpointError:
    return CheckpointError(f"{path}: no weights there that transformers loads ({', '.join(names)})")


def _nearest(path: Path) -> Path | None:
    parent = path.parent if path.parent.is_dir() else _nearest(path.parent)
    if parent is None:
        return None
    folders = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(path.name, folders, n=1)
    return parent / close[0] if close else None


def _index(folder: str, name: str) -> tuple[set[str], list[str]]:
    """The tensors an index lists, and their files, which are all there."""
    index = read_object(folder, name) or {}
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(f"{folder}: {name} is no index of weights: it has no weight_map or no metadata")
    files = sorted({str(file) for file in places.values()})
    if missing := [file for file in files if not Path(folder, file).is_file()]:
        raise CheckpointError(
            f"{folder}: {_are(missing)} missing, of the {len(files)} files that {name} lists; "
            "copy or download the rest"
        )
    return set(places), files


def _tensors(folder: str, name: str) -> list[str]:
    """The names of a safetensors file's tensors; none are read of a `.bin`. CheckpointError unless it is whole."""
    from safetensors import SafetensorError, safe_open

    file = Path(folder, name)
    try:
        with file.open("rb") as reader:
            begin = reader.read(200)
        _refuse_pointer(folder, name, begin)
        if name.endswith(".safetensors"):
            with safe_open(file, framework="np") as weights:
                return list(weights.keys())
        if begin.startswith(b"PK"):  # torch.save writes a zip archive, whose directory stands at its end
            zipfile.ZipFile(file).close()
        elif not begin.startswith(b"\x80"):  # and before torch 1.6 a pickle
            raise zipfile.BadZipFile("neither a zip archive nor a pickle")
    except (SafetensorError, zipfile.BadZipFile) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{folder}: {name} is truncated or damaged ({file.stat().st_size:,} bytes: {reason}); "
            "copy or download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder}: {name} cannot be read: {error.strerror}") from error
    return []


def _strays(folder: str, first: str, files: Sequence[str]) -> list[str]:
    """Weights of the loaded ones' format, by the names transformers saves, that are not among the loaded ones.

    Other formats (`pytorch_model.bin` beside safetensors, `consolidated.safetensors`) are other programs' business.
    """
    stem, dot, suffix = first.removesuffix(_INDEX).rpartition(".")
    if stem + dot + suffix not in _WEIGHTS:
        return []
    saved = re.compile(rf"{stem}(-\d+-of-\d+)?\.{suffix}")
    return sorted(name for name in os.listdir(folder) if saved.fullmatch(name) and name not in files)


def _refuse_pointer(path: str, name: str, data: bytes) -> None:
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: {name} is a Git LFS pointer, not the file itself; run `git lfs pull` there"
        )


def _are(names: Sequence[str]) -> str:
    """The subject and verb of a sentence about one file or more."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
