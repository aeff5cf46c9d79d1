"""Storage weather: what is retried and counted, what is told at once, on a real S3 server behind a bad line."""

import errno
import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import weather
from pipeline.rows import RowSet
from pipeline.shards import discover
from pipeline.source import ShardWork, read_shard
from pipeline.spec import parse_spec
from pipeline.storage import Storage
from pipeline.weather import RETRIES, PatientFile, StorageError, is_transient, patiently
from tests.chaos.proxy import Weather, bad_weather


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weather, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(weather, "BUDGET_SECONDS", 5.0)
    RETRIES.take()


@pytest.mark.parametrize(
    "error", [ConnectionResetError(), TimeoutError(), weather.TruncatedRead(), OSError(errno.ESTALE, "stale")]
)
def test_weather_is_waited_out_and_counted(error: Exception) -> None:
    errors = [error, error]

    def action() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert patiently(action, "reading x") == "done"
    assert RETRIES.take() == 2 and RETRIES.take() == 0


def test_the_budget_ends_it_with_the_last_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def action() -> None:
        raise ConnectionResetError("reset by peer")

    with pytest.raises(StorageError, match=r"reading x: storage failed .* for 0.2 s; .*reset by peer"):
        patiently(action, "reading x", budget=0.2)
    assert RETRIES.take() > 2


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            StorageError,
            "writing x: No space left on device",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError, "writing x: permission denied"),
        (FileNotFoundError("gone"), FileNotFoundError, "gone"),
    ],
)
def test_what_waiting_cannot_mend_is_told_at_once(
    error: Exception, kind: type[Exception], words: str
) -> None:
    def action() -> None:
        raise error

    with pytest.raises(kind, match=words):
        patiently(action, "writing x")
    assert RETRIES.take() == 0


def test_a_wrong_key_is_told_at_once(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import NoCredentialsError

    def action() -> None:
        raise NoCredentialsError

    with pytest.raises(PermissionError, match="no credentials"):
        patiently(action, "reading x")
    assert not is_transient(PermissionError("ExpiredToken"))


def test_a_patient_file_reads_as_a_file_does() -> None:
    data = os.urandom(10_000)
    file = PatientFile(lambda start, end: data[start:end], len(data))
    assert file.read(10) == data[:10] and file.tell() == 10
    file.seek(-5, io.SEEK_END)
    assert file.read() == data[-5:] and file.read() == b""
    file.seek(3)
    assert file.read() == data[3:]


class BadLine:
    """A line that does as it is told: `faults` are what befalls the next requests (None: nothing)."""

    def __init__(self) -> None:
        self.faults: list[Weather | None] = []

    def __call__(self, request: str) -> Weather | None:
        return self.faults.pop(0) if self.faults else None


@pytest.fixture
def line(s3_endpoint: str) -> Iterator[BadLine]:
    from s3fs import S3FileSystem

    line = BadLine()
    with pytest.MonkeyPatch.context() as patch, bad_weather(s3_endpoint, seed=0, share=0) as proxy:
        patch.setattr(proxy, "weather", line)
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3FileSystem.clear_instance_cache()
        yield line
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=name)
    return name


@pytest.mark.parametrize("fault", ["throttle", "reset", "cut"])
def test_a_bad_line_costs_retries_and_nothing_else(line: BadLine, bucket: str, fault: Weather) -> None:
    storage = Storage(f"s3://{bucket}/out")
    data = os.urandom(5000)
    storage.put_atomic("x", data)
    RETRIES.take()
    line.faults = [fault, fault]
    assert storage.read("x", 0, 5000) == data
    assert 1 <= RETRIES.take() <= 2  # the HTTP client itself replaces a kept connection that was reset
    if fault != "cut":
        line.faults = [fault]
        storage.put_atomic("y", data)
        line.faults = [fault]
        assert [info.path for info in storage.list()] == ["x", "y"]
        assert RETRIES.take() <= 2


def test_a_conditional_write_whose_answer_was_lost_is_known_as_our_own(line: BadLine, bucket: str) -> None:
    storage = Storage(f"s3://{bucket}/out")
    line.faults = ["lost_reply"]
    assert storage.create_exclusive("lease", b"mine")
    assert not storage.create_exclusive("lease", b"mine too")
    _, version = storage.read_version("lease")
    line.faults = ["lost_reply"]
    assert storage.put_if("lease", b"mine, later", version)
    assert not storage.put_if("lease", b"again", version)
    assert storage.read("lease") == b"mine, later"


def test_a_shard_is_read_through_bad_weather(line: BadLine, bucket: str, tmp_path: Path) -> None:
    table = pa.table({"id": range(200), "image": [os.urandom(500) for _ in range(200)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    Storage(f"s3://{bucket}").put_atomic("in/a.parquet", (tmp_path / "a.parquet").read_bytes())
    spec = {"input": {"path": f"s3://{bucket}/in"}, "model": {"path": "m"}, "output": {"path": "o"}}
    line.faults = [None, "throttle", None, "reset"]
    (shard,) = discover(parse_spec(spec).input).shards
    line.faults = [None, "cut", "reset", None, "throttle", None, "cut"] * 3
    found = pa.concat_tables(read_shard(ShardWork(shard, RowSet.span(200)), parse_spec(spec).input, ["id"]))
    assert (
        found["id"] == table["id"]
        and [row[0] for row in found["_images"].to_pylist()] == table["image"].to_pylist()
    )
    assert RETRIES.take() > 3
