"""Toy checkpoints with random weights, made once a process: for tests that need a model but not its captions."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path


@functools.cache
def untrained(family: str) -> str:
    """The folder of a randomly initialised toy checkpoint of the family."""
    from examples.toy.checkpoint import write_untrained

    write_untrained(family, _folder() / family)
    return str(_folder() / family)


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="tessera-checkpoints-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
