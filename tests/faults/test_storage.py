"""Stores that are not quite S3, outputs that are not there or not ours: a warning, or one sentence and an exit code."""

import io
import json
import uuid
from collections.abc import Iterator

import boto3
import pytest
from s3fs import S3FileSystem

from pipeline.ledger.ledger import RUNS, SUCCESS, Ledger
from pipeline.run.progress import display
from pipeline.run.session import open_session
from pipeline.spec.job_spec import parse_spec
from pipeline.storage import lease as leases
from pipeline.storage.lease import LeaseHeld, LeaseLost, acquire
from pipeline.storage.storage import Storage
from tests.chaos.proxy import Proxy, bad_weather
from tests.pipeline.ledgers import KEPT, captions, journal, shard

CONDITIONS = frozenset({"if-match", "if-none-match"})


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[Proxy]:
    """The way to a store that a test makes less than S3."""
    with pytest.MonkeyPatch.context() as patch, bad_weather(s3_endpoint, seed=0, share=0) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def output(proxy: Proxy, s3_endpoint: str) -> str:
    """A new output in a bucket behind it."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/out"


def session(output: str):
    sections = {"input": {"path": "in"}, "model": {"path": "m"}, "output": {"path": output}}
    with display("job", io.StringIO()) as show:
        return open_session(parse_spec(sections), False, show)


def warnings_of(output: str) -> list[str]:
    storage = Storage(output)
    (record,) = storage.list(RUNS)
    return json.loads(storage.read(record.path)).get("warnings", [])


@pytest.mark.parametrize("how", ["ignores", "refuses"])
def test_a_store_without_conditional_writes_is_warned_of_and_compared_with(
    proxy: Proxy, output: str, caplog: pytest.LogCaptureFixture, monkeypatch, how: str
) -> None:
    monkeypatch.setattr(leases, "_WATCH_SECONDS", 0.05)
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    setattr(proxy, how, CONDITIONS)
    storage = Storage(output)
    with session(output) as held:
        with pytest.raises(LeaseHeld):
            acquire(storage, "second")
        ledger, one = held.ledger, shard("a.parquet", 2)
        ledger.publish(captions(one.name, range(2)))
        ledger.seal(one, KEPT)
        ledger.write_success(ledger.verify([one]))
        ledger.clear_success()
        assert ledger.verify([one]).ok and not storage.exists(SUCCESS)
    (said,) = {record.message for record in caplog.records}
    assert "does not keep conditional writes" in said and output in said and "one at a time" in said
    assert warnings_of(output) == [said]
    assert storage.create_exclusive("_tessera/spec.json", b"1")
    _, version = storage.read_version("_tessera/spec.json")
    storage.put_atomic("_tessera/spec.json", b"2")
    assert not storage.create_exclusive("_tessera/spec.json", b"3")
    assert not storage.put_if("_tessera/spec.json", b"3", version)
    assert not storage.delete_if("_tessera/spec.json", version)
    assert storage.read("_tessera/spec.json") == b"2"
    assert not any("probe" in info.path for info in storage.list())


def test_s3_keeps_conditional_writes_and_says_nothing(proxy: Proxy, output: str, caplog) -> None:
    with session(output):
        pass
    assert not caplog.records and warnings_of(output) == []


def test_a_store_without_multiple_deletes_is_served_key_by_key(proxy: Proxy, output: str) -> None:
    proxy.refuses = frozenset({"?delete"})
    ledger, one = Ledger(output), shard("a.parquet", 4)
    for row in range(4):
        ledger.publish(captions(one.name, [row]))
    ledger.seal(one, KEPT)
    assert len(ledger.sweep([one])) == 4
    assert journal(ledger) == [] and ledger.verify([one]).ok


def test_single_deletes_ask_for_the_lease_too(proxy: Proxy, output: str) -> None:
    proxy.refuses = frozenset({"?delete"})
    asked: list[int] = []

    def guard() -> None:
        asked.append(1)
        if len(asked) > 1:  # the first one asked for all of them
            raise LeaseLost("taken over")

    Storage(output).put_atomic("a", b"1")
    Storage(output).put_atomic("b", b"1")
    with pytest.raises(LeaseLost):
        Storage(output, guard=guard).delete(["a", "b"])
    assert len(Storage(output).list()) == 2
