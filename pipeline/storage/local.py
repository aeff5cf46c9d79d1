"""Durable and exclusive writes on a local disk: folders, hidden temporary files and a lock on a folder."""

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}
_LOCK_SECONDS = 5.0  # a lock held longer is a stopped process's; going on without it is no worse than on NFS


@contextmanager
def temporary(target: Path, data: bytes) -> Iterator[Path]:
    """A durable hidden file beside `target`, for as long as the block lasts; what the block renames is durable."""
    written = write_temporary(target, data)
    try:
        yield written
        _sync_folder(written.parent)
    finally:
        written.unlink(missing_ok=True)


def write_temporary(target: Path, data: bytes) -> Path:
    """The hidden file, which nobody deletes where the process is killed."""
    _make_folder(target.parent)
    written = target.parent / f".{uuid.uuid4().hex}.tmp"  # short: the name's own length may be at its limit
    try:
        with open(written, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    return written


def link_or_rename(written: Path, target: Path) -> None:
    """Gives a file that was written its name; FileExistsError if there is one of that name.

    Disks without hard links (FAT, SMB, most buckets that are mounted) compare and rename under a lock on the folder.
    """
    try:
        os.link(written, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with locked(target.parent):
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            os.replace(written, target)


def is_temporary(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".tmp")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
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
