"""Storage weather: what is retried, for how long, and what is said when that does not help.

Why: at scale an object store always throttles, times out or resets somebody. Such weather must cost seconds, not the
job. A wrong key, a missing right or a full disk does not get better by waiting, and must be told at once.

The one idea: one layer decides. The retries inside botocore and s3fs are off (storage.py); here each operation is
tried again after a random, growing pause until its time budget is spent, and every retry is counted.
"""

import errno
import io
import threading
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

BUDGET_SECONDS = 120.0  # of one operation, pauses included; longer than any throttling we have heard of
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0  # seconds; each is drawn from 0 to twice the one before

_STATUSES = {429, 500, 502, 503, 504}
_CODES = {
    "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "ConditionalRequestConflict", "OperationAborted", "IncompleteBody", "BadDigest",
    "XAmzContentSHA256Mismatch",
}  # fmt: skip
_ERRORS = {  # by name, so that judging an error imports no client library
    "builtins.ConnectionError", "builtins.TimeoutError", "botocore.ConnectionError", "botocore.HTTPClientError",
    "botocore.IncompleteReadError", "botocore.ResponseParserError", "aiohttp.ClientError", "fsspec.FSTimeoutError",
    "http.IncompleteRead",
}  # fmt: skip
_CREDENTIALS = {
    "botocore.NoCredentialsError", "botocore.PartialCredentialsError", "botocore.CredentialRetrievalError",
    "botocore.TokenRetrievalError", "botocore.ProfileNotFound", "botocore.UnauthorizedSSOTokenError",
}  # fmt: skip

Result = TypeVar("Result")


class StorageError(OSError):
    """Storage that cannot be used: it breaks the job, in one sentence. Running it again goes on from there."""


class TruncatedRead(ConnectionError):
    """Fewer bytes came than the file holds."""


class Retries:
    """How often this process tried a storage operation again. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def take(self) -> int:
        """The count since it was last taken: what a worker hands to the driver is counted once."""
        with self._lock:
            count, self._count = self._count, 0
        return count


RETRIES = Retries()  # one for the process, as a metric is


def patiently(action: Callable[[], Result], what: str, budget: float | None = None) -> Result:
    """`action()`, again and again while the weather is bad; `what` names the operation in errors.

    `budget` is in seconds, BUDGET_SECONDS by default. FileNotFoundError and FileExistsError are answers and pass
    through; what waiting cannot mend is raised at once, as StorageError or PermissionError.
    """
    seconds = BUDGET_SECONDS if budget is None else budget
    attempts = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
        stop=stop_before_delay(seconds),
        before_sleep=lambda _: RETRIES.add(),
        reraise=True,
    )
    try:
        return attempts(action)
    except Exception as error:
        raise _told(error, what, seconds) from error


def is_transient(error: BaseException) -> bool:
    """True where trying again may help: throttling, timeouts, resets, truncated bodies, server errors."""
    # s3fs translates botocore's ClientError, in some of its methods without naming the cause.
    origin = error.__cause__ or error.__context__
    response = getattr(origin, "response", None) or getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's ClientError, plain or as s3fs translates it
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _STATUSES or response.get("Error", {}).get("Code") in _CODES
    return bool(_names(error) & _ERRORS) or getattr(error, "errno", None) == errno.ESTALE


def _names(error: BaseException) -> set[str]:
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}


def _told(error: Exception, what: str, seconds: float) -> Exception:
    if is_transient(error):
        return StorageError(
            f"{what}: storage failed again and again for {seconds:g} s; the last error: {error}"
        )
    if _names(error) & _CREDENTIALS:
        return PermissionError(f"{what}: storage got no credentials ({error})")
    if isinstance(error, PermissionError):
        return PermissionError(f"{what}: permission denied ({error})")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return StorageError(f"{what}: {error.strerror or error}")
    if "botocore.BotoCoreError" in _names(error):  # no OSError by itself
        return StorageError(f"{what}: {error}")
    return error


class PatientFile(io.RawIOBase):
    """A seekable reader over a ranged read, each of them patient: a reset costs a range, not the file."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override] # Buffer is of Python 3.12
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
        count = max(0, end - self._position)
        if count:
            view[:count] = self._read(self._position, end)
            self._position = end
        return count
