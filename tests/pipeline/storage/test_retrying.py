"""Storage weather: what is retried and counted, what is told at once, on a real S3 server behind a bad line."""

import errno
import io
import logging
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from pipeline.input.rows import RowSet
from pipeline.input.shards import InputError, discover
from pipeline.input.source import ShardWork, read_shard
from pipeline.ledger.ledger import Ledger
from pipeline.spec.job_spec import JobSpec, SpecError, parse_spec
from pipeline.storage import retrying
from pipeline.storage.retrying import (
    RETRIES,
    MissingBucket,
    RetryingFile,
    StorageError,
    is_transient,
    with_retries,
)
from pipeline.storage.storage import Storage
from tests.chaos.proxy import Weather, bad_weather


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(retrying, "BUDGET_SECONDS", 5.0)
    RETRIES.take()


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(), TimeoutError(), retrying.TruncatedRead(), OSError(errno.ESTALE, "stale")],
)
def test_weather_is_waited_out_and_counted(error: Exception) -> None:
    errors = [error, error]

    def action() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert with_retries(action, "reading x") == "done"
    assert RETRIES.take() == 2 and RETRIES.take() == 0


def test_the_budget_ends_it_with_the_last_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def action() -> None:
        raise ConnectionResetError("reset by peer")

    with pytest.raises(StorageError, match=r"reading x: storage failed .* for 0.2 s; .*reset by peer"):
        with_retries(action, "reading x", budget=0.2)
    assert RETRIES.take() > 2


class Clock:
    """In place of the module `time`: nothing waits, and an operation takes as long as it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(retrying, "time", self)
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", 120.0)
        monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.2)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_time_that_went_well_is_not_waiting(clock: Clock) -> None:
    """A listing that fails after minutes, and once more close to its end, is still tried again."""
    lasts = [150.0, 1.0, 100.0, 1.0, 150.0]

    def action() -> str:
        clock.now += lasts.pop(0)
        if lasts:
            raise ConnectionResetError
        return "done"

    assert with_retries(action, "listing x") == "done" and RETRIES.take() == 4


@pytest.mark.parametrize(("lasts", "most"), [(0.0, 120.0), (15.0, 150.0), (180.0, 7 * 180.0 + 6 * 15.0)])
def test_failing_for_ever_ends_however_long_an_attempt_takes(clock: Clock, lasts: float, most: float) -> None:
    def action() -> None:
        clock.now += lasts
        raise ConnectionResetError("reset by peer")

    with pytest.raises(StorageError, match=r"for 120 s; .*reset by peer"):
        with_retries(action, "reading x")
    assert 90 <= clock.now <= most and RETRIES.take() >= 6


def test_what_was_tried_long_enough_inside_is_not_tried_again_outside(clock: Clock) -> None:
    calls: list[int] = []

    def action() -> None:
        calls.append(1)
        throttled = OSError("slow down")
        throttled.__cause__ = type("Throttled", (Exception,), {"response": {"Error": {"Code": "SlowDown"}}})()
        with_retries(lambda: (_ for _ in ()).throw(throttled), "reading the lease")

    with pytest.raises(StorageError, match="^reading the lease"):
        with_retries(action, "writing x")
    assert len(calls) == 1 and clock.now <= 120


def test_people_are_told_what_is_waited_for_and_until_when(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def until(end: float) -> None:
        if clock.now < end:
            raise ConnectionRefusedError("connection refused")

    with_retries(lambda: until(4.0), "reading s3://bucket/x")
    assert caplog.messages == []  # a few seconds are nobody's business
    with_retries(lambda: until(100.0), "reading s3://bucket/x")
    (said,) = caplog.messages
    assert re.fullmatch(
        r"reading s3://bucket/x: storage fails \(connection refused\); trying again until \d\d:\d\d:\d\d",
        said,
    )
    assert caplog.records[0].levelno == logging.WARNING  # which Python prints where nothing is configured


def test_a_silent_store_is_told_although_each_attempt_takes_long(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def hang() -> None:
        clock.now += 60.0
        raise TimeoutError("not a byte")

    with pytest.raises(StorageError):
        with_retries(hang, "reading s3://bucket/x")
    # From the second attempt on, and for each budget that began anew
    assert len(caplog.messages) == 1 + 5 - 1


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
        with_retries(action, "writing x")
    assert RETRIES.take() == 0


@pytest.mark.parametrize("kind", ["NoCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"])
def test_missing_credentials_are_waited_for_a_minute(
    clock: Clock, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    import botocore.exceptions

    error = getattr(botocore.exceptions, kind)(provider="container-role", error_msg="timed out")

    def action(end: float) -> None:
        if clock.now < end:
            raise error

    with_retries(lambda: action(40.0), "reading x")
    (said,) = caplog.messages
    assert "reading x: storage fails" in said and str(error) in said
    began = clock.now
    with pytest.raises(PermissionError, match="reading x: storage got no credentials"):
        with_retries(lambda: action(1e9), "reading x")
    assert 40 <= clock.now - began <= 60


def test_credentials_that_come_late_are_found(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs keeps a client that was made without any."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    storage = Storage(s3_url)
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    for name in keys:
        monkeypatch.delenv(name)

    def come(seconds: float) -> None:
        if RETRIES.take():
            os.environ.update(keys)

    monkeypatch.setattr(retrying.time, "sleep", come)
    storage.put_atomic("x", b"1")
    assert storage.read("x") == b"1"
    S3FileSystem.clear_instance_cache()


def test_a_wrong_key_or_profile_is_told_at_once(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(PermissionError, match="no credentials .*no-such-profile"):
        Storage(s3_url).list()
    S3FileSystem.clear_instance_cache()
    assert RETRIES.take() == 0 and not is_transient(PermissionError("ExpiredToken"))


def test_a_patient_file_reads_as_a_file_does() -> None:
    data = os.urandom(10_000)
    file = RetryingFile(lambda start, end: data[start:end], len(data))
    assert file.read(10) == data[:10] and file.tell() == 10
    file.seek(-5, io.SEEK_END)
    assert file.read() == data[-5:] and file.read() == b""
    file.seek(3)
    assert file.read() == data[3:]


class BadLine:
    """A line that does as it is told: `faults` are what befalls the next requests (None: nothing)."""

    def __init__(self) -> None:
        self.faults: list[Weather | None] = []
        self.requests = 0

    def __call__(self, request: str) -> Weather | None:
        self.requests += 1
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


def test_a_page_of_a_listing_that_fails_costs_a_page(
    line: BadLine, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(f"s3://{bucket}/out")
    names = [f"part {number} [x].parquet" for number in range(7)]
    for name in names:
        storage.put_atomic(f"j/{name}", name.encode())
    monkeypatch.setattr(storage.filesystem, "req_kw", {"MaxKeys": 2})
    line.faults, line.requests = [None, "throttle", None, None, "throttle"], 0
    listed = storage.list("j")
    assert [info.path for info in listed] == [f"j/{name}" for name in names]
    assert line.requests == 4 + 2 and RETRIES.take() == 2
    assert storage.read_version(listed[3].path) == (names[3].encode(), listed[3].token)


def job(path: str, output: str) -> JobSpec:
    return parse_spec({"input": {"path": path}, "model": {"path": "m"}, "output": {"path": output}})


def test_a_missing_bucket_is_named_with_its_field(s3_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("s3://no-such-bucket/in", "s3://no-such-bucket/in/*.parquet"):
        with pytest.raises(InputError, match=r"^input\.path: .*the bucket 'no-such-bucket' does not exist"):
            discover(job(path, s3_url).input)
    spec = job(s3_url, "s3://no-such-bucket/out")
    with pytest.raises(SpecError, match=r"^output\.path: .*the bucket 'no-such-bucket' does not exist"):
        Ledger(spec.output.path).check(spec)
    with pytest.raises(MissingBucket):
        Storage("s3://no-such-bucket").list()
    assert main(["status", "s3://no-such-bucket/out"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "the bucket 'no-such-bucket' does not exist" in said
    assert RETRIES.take() == 0


def test_the_hub_out_of_reach_is_weather_and_offline_mode_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setattr(retrying, "BUDGET_SECONDS", 0.3)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    HfFileSystem.clear_instance_cache()
    spec = tmp_path / "job.yaml"
    spec.write_text("{input: {path: 'hf://datasets/x/y'}, model: {path: m}, output: {path: out}}")
    assert main(["verify", str(spec)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "reading hf://datasets/x/y: storage failed again and again" in said and RETRIES.take() > 0

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["verify", str(spec)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "input.path: hf://datasets/x/y cannot be read" in said and "offline" in said
    assert RETRIES.take() == 0
    HfFileSystem.clear_instance_cache()


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
    found = pa.concat_tables(read_shard(ShardWork(shard, RowSet.span(200)), parse_spec(spec), ["id"]))
    assert (
        found["id"] == table["id"]
        and [row[0] for row in found["_images"].to_pylist()] == table["image"].to_pylist()
    )
    assert RETRIES.take() > 3
