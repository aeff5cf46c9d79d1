"""Faults inside Tessera's processes, put in from outside: the product has no hooks.

Every process of a test cluster starts with tests/chaos/site on its path, which calls `install(folder)`. From then on
- a picture that starts with `POISON` kills the process that decodes it, one of a poisonous size the process that
  captions it, as its `Manner` says;
- a file `<point>-<n>` in the folder (see `arm`) is taken by the first process that comes to that point of writing
  a file, which dies there by SIGKILL;
- every caption made adds a byte to the file `captioned`, so that work done twice can be counted;
- `no-loading` in the folder kills whoever loads a model;
- with `disk-full` in the folder no journal part fits on the disk any more (local disks).
"""

from __future__ import annotations

import ctypes
import errno
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

Manner = Literal["segfault", "exit", "kill", "lost"]
MANNERS: tuple[Manner, ...] = ("segfault", "exit", "kill", "lost")
MARK = b"POISON "
POISON_WIDTH, POISON_HEIGHT = 61, 41  # pixels; the height plus a manner's index

Point = Literal["part-before", "part-inside", "part-after", "seal-before", "seal-inside", "seal-after"]
"""When a journal part or a sealed shard is written: before anything, with the temporary file whole but not yet
renamed (local disks), after the file is there and nobody was told."""


def poison_image(manner: Manner) -> bytes:
    """Bytes that kill their decoder."""
    return MARK + manner.encode()


def poison_size(manner: Manner) -> tuple[int, int]:
    """(width, height) of a sound picture that kills the process that captions it."""
    return POISON_WIDTH, POISON_HEIGHT + MANNERS.index(manner)


def arm(folder: Path, points: Iterable[Point]) -> None:
    """One death at each of these points, in any process."""
    for point in points:
        (folder / f"{point}-{uuid.uuid4().hex}").touch()


def disarm(folder: Path) -> None:
    """Takes away every point, `no-loading` and `disk-full`; what was counted stays."""
    for path in folder.iterdir():
        if path.name.startswith(("part-", "seal-", "no-loading", "disk-full")):
            path.unlink()


def armed(folder: Path) -> list[str]:
    """The points at which nobody died yet."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("part-", "seal-")))


def captioned(folder: Path) -> int:
    """Captions made so far, those that were lost again included."""
    path = folder / "captioned"
    return path.stat().st_size if path.exists() else 0


def install(folder: str) -> None:
    """Patches modules as they are imported."""
    patches: dict[str, Callable[[ModuleType], None]] = {
        "actors.images.decode": _poison_decoder,
        "actors.generate": lambda module: _poison_engine(module, Path(folder)),
        "pipeline.storage.storage": lambda module: _deadly_storage(module, Path(folder)),
    }
    sys.meta_path.insert(0, _Patcher(patches))


def _die(manner: Manner) -> None:
    if manner == "segfault":
        ctypes.string_at(0)
    elif manner == "exit":
        os._exit(1)
    elif manner == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        from actors.engine import DeviceLost

        raise DeviceLost("CUDA error: device-side assert triggered")


def _poison_decoder(module: ModuleType) -> None:
    decode = module.decode

    def deadly(data: bytes, *limits: Any) -> Any:
        if data.startswith(MARK):
            _die(cast(Manner, data.removeprefix(MARK).decode()))
        return decode(data, *limits)

    module.__dict__["decode"] = deadly


def _poison_engine(module: ModuleType, folder: Path) -> None:
    build, load = module.build_engine, module.load_model

    class Deadly:
        def __init__(self, engine: Any) -> None:
            self.engine, self.record = engine, engine.record
            self.count = os.open(folder / "captioned", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def generate(self, requests: Iterable[Any]) -> Iterator[Any]:
            for completion in self.engine.generate(_checked(requests)):
                os.write(self.count, b".")
                yield completion

    def _checked(requests: Iterable[Any]) -> Iterator[Any]:
        for request in requests:
            height, width = request.layouts[0].size if request.layouts else (0, 0)
            if width == POISON_WIDTH and 0 <= height - POISON_HEIGHT < len(MANNERS):
                _die(MANNERS[height - POISON_HEIGHT])
            yield request

    def load_model(*arguments: Any) -> Any:
        if (folder / "no-loading").exists():
            ctypes.string_at(0)
        return load(*arguments)

    module.__dict__["build_engine"] = lambda *arguments: Deadly(build(*arguments))
    module.__dict__["load_model"] = load_model


def _deadly_storage(module: ModuleType, folder: Path) -> None:
    def here(moment: str, path: str) -> None:
        kind = "part" if "/journal/" in path else "seal" if f"/{path}".endswith(".parquet") else None
        for trap in sorted(folder.glob(f"{kind}-{moment}-*")) if kind else ():
            try:
                trap.unlink()
            except FileNotFoundError:  # another process was faster
                continue
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly_write(write: Callable[..., Any]) -> Callable[..., Any]:
        def deadly(self: Any, path: str, *rest: Any) -> Any:
            here("before", path)
            result = write(self, path, *rest)
            here("after", path)
            return result

        return deadly

    def deadly_rename(rename: Callable[..., None]) -> Callable[..., None]:
        def deadly(source: Any, target: Any, **named: Any) -> None:
            here("inside", str(target))
            if "/journal/" in str(target) and (folder / "disk-full").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            rename(source, target, **named)

        return deadly

    for name in ("put_atomic", "create_exclusive", "put_if"):
        setattr(module.Storage, name, deadly_write(getattr(module.Storage, name)))
    for name in ("replace", "link"):
        setattr(os, name, deadly_rename(getattr(os, name)))


class _Patcher(importlib.abc.MetaPathFinder):
    """Lets a function change a module right after it was executed."""

    def __init__(self, patches: dict[str, Callable[[ModuleType], None]]) -> None:
        self.patches = patches

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self.patches.pop(name, None)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if patch else None
        if spec is None or spec.loader is None or patch is None:
            return None
        execute = spec.loader.exec_module

        def exec_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_and_patch  # type: ignore[method-assign]
        return spec
