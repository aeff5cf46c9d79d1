"""S3 requests beyond fsspec: what stores that resemble S3 answer, and what is made of it."""

from typing import Any

import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from pipeline.storage.s3 import keeps_conditions, put_if_absent, put_if_match


class Store:
    """A file system whose store answers conditional requests with an error, and takes all others."""

    def __init__(self, code: str, **more: str) -> None:
        self.error, self.taken = {"Code": code, "Message": "no", **more}, 0

    def pipe_file(self, path: str, data: bytes, **named: Any) -> None:
        if {"mode", "IfMatch"} & set(named):
            raise translate_boto_error(ClientError({"Error": self.error}, "PutObject"))
        self.taken += 1


@pytest.mark.parametrize("more", [{}, {"Condition": "If-None-Match"}], ids=["plain", "named"])
@pytest.mark.parametrize("code", ["PreconditionFailed", "412"])
def test_a_condition_that_does_not_hold_is_an_answer(code: str, more: dict[str, str]) -> None:
    """AWS says which condition it was; MinIO and others do not."""
    store: Any = Store(code, **more)
    assert not put_if_absent(store, "b/x", b"") and not put_if_match(store, "b/x", b"", "1")
    assert keeps_conditions(store, "b/x") and not store.taken


@pytest.mark.parametrize("code", ["NotImplemented", "501", "MethodNotAllowed"])
def test_a_condition_that_is_unknown_is_left_out(code: str) -> None:
    store: Any = Store(code)
    assert put_if_absent(store, "b/x", b"") and put_if_match(store, "b/x", b"", "1")
    assert not keeps_conditions(store, "b/x") and store.taken == 3


@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchBucket", "SlowDown", "ConditionalRequestConflict"])
def test_other_errors_are_raised(code: str) -> None:
    store: Any = Store(code)
    with pytest.raises(OSError, match="no"):
        put_if_absent(store, "b/x", b"")
    with pytest.raises(OSError, match="no"):
        put_if_match(store, "b/x", b"", "1")
    assert not store.taken
