"""Row errors: the one exception a row may fail with. It becomes the row's `error` column, never the end of the job."""

from __future__ import annotations

from typing import Literal

ErrorKind = Literal["read", "fetch", "decode", "too_large", "prompt", "too_long", "oom", "generate", "crash"]


class RowError(Exception):
    """A failure of one row. `kind` says what is wrong with it and `message` says it to a person."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(kind, message)  # both, so that it survives pickling
        self.kind: ErrorKind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message
