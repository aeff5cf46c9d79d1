"""S3 requests beyond fsspec's interface: conditional puts and deletes, and a thousand deletes in one request.

Why: the lease, the seals and the marks change hands by If-None-Match and If-Match. Stores that only resemble S3 answer
these with other errors, do not know them, or leave them out of account; whether a store keeps its word is found out by
`keeps_conditions`. Where it knows no such header, a request goes out without: the caller has compared just before.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

KEYS = 1000  # in one request that deletes: S3's limit
_CHANGED = {"PreconditionFailed", "412", "NoSuchKey", "404"}
_UNKNOWN = {"NotImplemented", "501", "MethodNotAllowed", "405", "MissingContentMD5"}
_ONE_PUT = 5 << 30  # bytes; s3fs makes larger files multipart uploads, whose completion takes no If-Match


def put_if_absent(filesystem: "AbstractFileSystem", path: str, data: bytes) -> bool:
    """Creates an object; False if there is one."""
    return _conditional(lambda **match: filesystem.pipe_file(path, data, **match), mode="create")


def put_if_match(filesystem: "AbstractFileSystem", path: str, data: bytes, etag: str) -> bool:
    """Replaces an object; False if it is gone or has another etag."""
    return _conditional(
        lambda **match: filesystem.pipe_file(path, data, chunksize=_ONE_PUT, **match), IfMatch=f'"{etag}"'
    )


def delete_if_match(filesystem: "AbstractFileSystem", path: str, etag: str) -> bool:
    """Deletes an object; False if it is gone or has another etag."""
    bucket, key, _ = filesystem.split_path(path)
    return _conditional(
        lambda **match: filesystem.call_s3("delete_object", Bucket=bucket, Key=key, **match),
        IfMatch=f'"{etag}"',
    )


def keeps_conditions(filesystem: "AbstractFileSystem", path: str) -> bool:
    """Whether the store refuses to create the object at `path`, which exists, and to replace what it is not."""
    return not (
        put_if_absent(filesystem, path, b"again") or put_if_match(filesystem, path, b"again", "0" * 32)
    )


def delete_keys(filesystem: "AbstractFileSystem", paths: Sequence[str]) -> bool:
    """Deletes up to `KEYS` objects of one bucket in one request; False where the store knows no such request.

    S3 answers 200 and says which keys it could not delete, at which s3fs does not look: the first is raised.
    """
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    names = [filesystem.split_path(path) for path in paths]
    keys = {"Objects": [{"Key": key} for _, key, _ in names], "Quiet": True}
    try:
        answer = filesystem.call_s3("delete_objects", Bucket=names[0][0], Delete=keys)
    except OSError as error:
        if _code(error) in _UNKNOWN:
            return False
        raise
    if errors := answer.get("Errors"):
        raise translate_boto_error(ClientError({"Error": errors[0]}, "DeleteObjects"))
    return True


def _conditional(request: Callable[..., object], **condition: Any) -> bool:
    """Whether the condition held, and so the request was carried out."""
    try:
        request(**condition)
    except OSError as error:
        if _code(error) in _CHANGED:
            return False
        if _code(error) not in _UNKNOWN:
            raise
        request()
    return True


def _code(error: OSError) -> str:
    return str(getattr(error.__cause__, "response", {}).get("Error", {}).get("Code"))
