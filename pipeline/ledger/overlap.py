"""Refusals of an output.path that is the input's own folder, another dataset's output, or cannot hold its names.

Why: captions written where the input lies are input of every job to come, and a sealed shard could replace the very
file it was made from. A forgotten output.path would mix two datasets in one output, and where shards of both have the
same names, captions of the one would replace those of the other. Both are told before anything is written.
"""

import os.path
import posixpath
from collections.abc import Iterable

from pipeline.input.shards import Input, output_name
from pipeline.ledger.identity import recorded
from pipeline.ledger.ledger import DATA, SPEC, Ledger
from pipeline.spec.job_spec import JobSpec, SpecError
from pipeline.storage.files import is_local, is_s3, open_filesystem

_NAMED = 3  # shards in a message
_KEY_BYTES = 1024  # S3's limit
_PART_BYTES, _PATH_BYTES = 255, 4095  # Linux's limits for a part of a path and for the whole
_OWN_BYTES = 64  # of the longest folder and file name that Tessera puts around a shard's name


def refuse_overlap(spec: JobSpec, found: Input) -> None:
    """Raises SpecError where output.path holds files of the input itself, or would be written over them."""
    output = _place(spec.output.path)
    reserved = tuple(f"{output}/{folder}/" for folder in (DATA, SPEC.partition("/")[0]))
    files = [*(shard.url for shard in found.shards), *(shard.url for shard in found.unreadable)]
    folders = {folder: folder for folder in found.roots} | {url.rpartition("/")[0]: url for url in files}
    for folder, named in folders.items():
        place = _place(folder)
        if place == output or f"{place}/".startswith(reserved):
            raise SpecError(
                f"output.path: {spec.output.path} is where input.path ({', '.join(spec.input.path)}) finds {named}; "
                "captions there would be read as input by later jobs, or replace it: set output.path to a folder "
                "of its own"
            )


def refuse_long_names(spec: JobSpec, found: Input) -> None:
    """Raises SpecError where a shard's sealed file would have a longer name than the output's storage takes.

    Told before anything starts: a disk and S3 tell it when the shard, captioned, is to be written.
    """
    filesystem, root = open_filesystem(spec.output.path)
    if is_local(filesystem):
        limit, within = _PATH_BYTES, root
    elif is_s3(filesystem):
        limit, within = _KEY_BYTES, root.partition("/")[2]
    else:
        return
    for shard in found.shards:
        name = output_name(shard.name)
        length = len(f"{within}/{name}".encode()) + _OWN_BYTES
        part = max(len(part.encode()) for part in name.split("/"))
        if length > limit or (is_local(filesystem) and part > _PART_BYTES):
            raise SpecError(
                f"output.path: {spec.output.path} cannot hold the captions of {shard.url}: their names would be longer "
                f"than its storage takes ({limit:,} bytes"
                + (f", {_PART_BYTES} between two slashes" if is_local(filesystem) else "")
                + "); choose a shorter output.path, or shorten the shard's name"
            )


def refuse_nested_names(spec: JobSpec, found: Input) -> None:
    """Raises SpecError where an output on a disk would need a name for a shard's file and for a folder of others'.

    A bucket may hold a.parquet and a.parquet/b.parquet; a disk tells when the second is to be sealed, captioned.
    """
    filesystem, _ = open_filesystem(spec.output.path)
    if not is_local(filesystem):
        return
    urls = {output_name(shard.name): shard.url for shard in found.shards}
    for shard in found.shards:
        parts = output_name(shard.name).split("/")
        for folder in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
            if folder in urls:
                raise SpecError(
                    f"output.path: {spec.output.path} is on a disk, where data/{folder} cannot be the captions of "
                    f"{urls[folder]} and a folder with those of {shard.url}; rename one of them, or set output.path "
                    "to an object store"
                )


def refuse_other_dataset(spec: JobSpec, found: Input, ledger: Ledger) -> None:
    """Raises SpecError where the output holds captions, none of them of this input's shards.

    An input.path as in the last run is the same dataset, whatever became of its files.
    """
    try:
        data = ledger.storage.read(SPEC)
    except FileNotFoundError:
        return
    before = recorded(data, f"{ledger.storage.url}/{SPEC}")["spec"]["input"]["path"]
    if set(map(_place, before)) == set(map(_place, spec.input.path)):
        return
    scan = ledger.scan()
    held = {
        (name, entry.fingerprint)
        for file in (*scan.sealed.values(), *scan.parts)
        for name, entry in file.entries.items()
    }
    here = {(shard.name, shard.fingerprint) for shard in found.shards}
    if held and not held & here:
        raise SpecError(
            f"output.path: {spec.output.path} holds captions of {_named(held)} from {', '.join(before)}, and of none "
            f"of the {_named(here)} of input.path ({', '.join(spec.input.path)}); set output.path to a new folder, or "
            "input.path back"
        )


def _named(shards: Iterable[tuple[str, str]]) -> str:
    names = sorted({name for name, _ in shards})
    return f"{len(names):,} shards ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"


def _place(url: str) -> str:
    """One text for one place, however it is written: links, "..", doubled and trailing slashes are resolved."""
    filesystem, path = open_filesystem(url)
    if is_local(filesystem):
        return os.path.realpath(path)
    return str(filesystem.unstrip_protocol(posixpath.normpath(path)))
