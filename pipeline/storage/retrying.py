"""Retrying storage: which errors are tried again, for how long, and what is said when that does not help.

Why: at scale an object store always throttles, times out or resets somebody. That must cost seconds, not the job. A
wrong key, a missing right or a full disk does not get better by waiting, and must be told at once.

One layer decides: the retries inside botocore and s3fs are off (files.py). Here each operation is tried again after a
random, growing pause, until BUDGET_SECONDS have passed without progress, and every retry is counted. Where there are no
credentials it is CREDENTIALS_SECONDS: the endpoint of a role may be slow to answer, but a person who forgot them should
not wait longer.
"""

import errno
import io
import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, TypeVar

BUDGET_SECONDS = 120.0  # without progress, pauses included; longer than any throttling we have heard of
CREDENTIALS_SECONDS = 60.0  # without any; a role's endpoint that is restarted is back by then
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0  # seconds; drawn from 0 to a limit that doubles with each
_SILENT_SECONDS = 30.0  # twice what s3fs waits for a byte: an attempt that took longer was getting somewhere
_RENEWALS = 5  # of an operation's budget, or storage that fails after minutes, each time, would never end
_SAY_AFTER = 5.0  # seconds of failing, after which people are told what is waited for

_STATUSES = {429, 500, 502, 503, 504}
_CODES = {
    "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "ConditionalRequestConflict", "OperationAborted", "IncompleteBody", "BadDigest",
    "XAmzContentSHA256Mismatch",
}  # fmt: skip
_ERRORS = {  # by name, so that judging an error imports no client library
    "builtins.ConnectionError", "builtins.TimeoutError", "botocore.ConnectionError", "botocore.HTTPClientError",
    "botocore.IncompleteReadError", "botocore.ResponseParserError", "aiohttp.ClientError", "fsspec.FSTimeoutError",
    "http.IncompleteRead", "httpx.TransportError", "httpx2.TransportError",
}  # fmt: skip
_NO_CREDENTIALS = {
    "botocore.NoCredentialsError", "botocore.CredentialRetrievalError", "botocore.TokenRetrievalError",
}  # fmt: skip
_WRONG_CREDENTIALS = {
    "botocore.PartialCredentialsError", "botocore.ProfileNotFound", "botocore.UnauthorizedSSOTokenError",
}  # fmt: skip

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class StorageError(OSError):
    """Storage that cannot be used: it breaks the job, in one sentence. Running it again goes on from there."""


class MissingBucket(StorageError):
    """The bucket does not exist. Not a FileNotFoundError: nothing in it can be absent, or created."""


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


def with_retries(action: Callable[[], Result], what: str, budget: float | None = None) -> Result:
    """`action()`, retried on transient errors with jittered exponential back-off; `what` names it in messages.

    `budget` is the seconds that may pass without progress, BUDGET_SECONDS by default. They count from the first
    failure: what an operation took while it went well is not waiting. They count anew from the failure of an attempt
    that took longer than _SILENT_SECONDS, at most _RENEWALS times. Once the failing has lasted _SAY_AFTER, a warning
    is logged. Missing credentials are waited for no longer than CREDENTIALS_SECONDS. FileNotFoundError and
    FileExistsError are answers and pass through; what waiting cannot mend is raised at once, as StorageError or
    PermissionError.
    """
    seconds = BUDGET_SECONDS if budget is None else budget
    first_failure = failing_since = said_until = None
    limit, renewals = _FIRST_PAUSE, 0
    while True:
        began = time.monotonic()
        try:
            return action()
        except Exception as error:
            unauthorized = bool(_names(error) & _NO_CREDENTIALS)
            if not unauthorized and not is_transient(error):
                told = _told(error, what)
                if told is error:
                    raise
                raise told from error
            now = time.monotonic()
            if first_failure is None or failing_since is None:
                first_failure = failing_since = now
            elif now - began > _SILENT_SECONDS and renewals < _RENEWALS:
                failing_since, renewals = now, renewals + 1
            pause = random.uniform(0, limit)
            left = failing_since + (min(seconds, CREDENTIALS_SECONDS) if unauthorized else seconds) - now
            if unauthorized and pause >= left:
                raise _told(error, what) from error
            if pause >= left:
                raise StorageError(
                    f"{what}: storage failed again and again for {seconds:g} s; the last error: {error}"
                ) from error
            if now - first_failure >= _SAY_AFTER and said_until != failing_since:
                until = datetime.now() + timedelta(seconds=left)
                log.warning("%s: storage fails (%s); trying again until %s", what, error, f"{until:%H:%M:%S}")
                said_until = failing_since  # of a budget that began anew it is said again
            found_none = "botocore.NoCredentialsError" in _names(error)
        RETRIES.add()
        time.sleep(pause)
        if found_none:
            _look_for_credentials()
        limit = min(2 * limit, _LONGEST_PAUSE)


def is_transient(error: BaseException) -> bool:
    """True where trying again may help: throttling, timeouts, resets, truncated bodies, server errors."""
    names = _names(error)
    if isinstance(error, StorageError) or "huggingface_hub.OfflineModeIsEnabled" in names:
        return False  # whatever caused it
    response = _response(error)
    if isinstance(response, dict):  # botocore's ClientError, plain or as s3fs translates it
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _STATUSES or response.get("Error", {}).get("Code") in _CODES
    status = getattr(response, "status_code", None)  # of the Hugging Face hub's client
    return status in _STATUSES or bool(names & _ERRORS) or getattr(error, "errno", None) == errno.ESTALE


def _look_for_credentials() -> None:
    """botocore looks for credentials when it makes a client, and s3fs keeps its clients, so that one made without
    any would never have them: it is made anew."""
    s3fs = sys.modules.get("s3fs")
    for filesystem in list(s3fs.S3FileSystem._cache.values()) if s3fs else ():
        with suppress(Exception):  # the next attempt says why
            if filesystem._s3._request_signer._credentials is None:
                filesystem.connect(refresh=True)


def _response(error: BaseException) -> Any:
    # s3fs translates botocore's ClientError, in some of its methods without naming the cause.
    origin = error.__cause__ or error.__context__
    return getattr(origin, "response", None) or getattr(error, "response", None)


def _names(error: BaseException) -> set[str]:
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}


def _told(error: Exception, what: str) -> Exception:
    """An error that waiting cannot mend, as it is told; itself where it says enough."""
    response = _response(error)
    if isinstance(response, dict) and response.get("Error", {}).get("Code") == "NoSuchBucket":
        bucket = response["Error"].get("BucketName", "")
        return MissingBucket(f"{what}: the bucket {bucket!r} does not exist; create it, or name another one")
    if _names(error) & (_NO_CREDENTIALS | _WRONG_CREDENTIALS):
        return PermissionError(f"{what}: storage got no credentials ({error})")
    if isinstance(error, PermissionError):
        return PermissionError(f"{what}: permission denied ({error})")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return StorageError(f"{what}: {error.strerror or error}")
    if "botocore.BotoCoreError" in _names(error):  # no OSError by itself
        return StorageError(f"{what}: {error}")
    return error


class RetryingFile(io.RawIOBase):
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
