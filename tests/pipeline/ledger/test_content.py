"""Content records: a touched, copied or newly encrypted file is the same shard; one that changed never is."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input.shards import Shard, discover
from pipeline.ledger import content
from pipeline.ledger.content import INPUT, known_version, record_content, remember_version
from pipeline.ledger.ledger import Ledger
from pipeline.spec.job_spec import InputSpec
from pipeline.storage.storage import Storage
from tests.pipeline.ledgers import captions, run_to_the_end


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Where an input lies in in/, with one shard, and an output in out/."""
    storage = Storage(str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_url"))
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(4), "image": [b"x" * 5000] * 4}), file, compression="none")
    storage.put_atomic("in/a.parquet", file.getvalue().to_pybytes())
    return storage


def listed(place: Storage) -> Shard:
    (shard,) = discover(InputSpec(path=(f"{place.url}/in",))).shards
    return shard


def output(place: Storage) -> Storage:
    return Storage(f"{place.url}/out")


def put_with_another_etag(place: Storage, data: bytes) -> None:
    """As a copy in parts, or another key's encryption: other bytes of an etag, or of a modification time."""
    if place.local:
        place.put_atomic("in/a.parquet", data)
        return
    import boto3

    client, bucket = boto3.client("s3"), place.url.removeprefix("s3://")
    upload = client.create_multipart_upload(Bucket=bucket, Key="in/a.parquet")["UploadId"]
    name = {"Bucket": bucket, "Key": "in/a.parquet", "UploadId": upload}
    part = client.upload_part(**name, PartNumber=1, Body=data)["ETag"]
    client.complete_multipart_upload(**name, MultipartUpload={"Parts": [{"ETag": part, "PartNumber": 1}]})


def changed_in_place(data: bytes) -> bytes:
    """Another picture of the same size, which no footer tells: statistics stop at 4 KiB."""
    assert data.count(b"x" * 5000) == 1  # the others are in a dictionary
    return data.replace(b"x" * 5000, b"y" * 5000)


def test_the_same_content_is_the_same_shard_and_is_read_once(
    place: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, data = listed(place), place.read("in/a.parquet")
    record_content(output(place), before)
    put_with_another_etag(place, data)
    after = listed(place)
    assert after.fingerprint != before.fingerprint
    known, news = known_version(output(place), after, read=True)
    assert news and known == replace(after, fingerprint=before.fingerprint)
    remember_version(output(place), known)
    monkeypatch.setattr(content, "content_digest", None)
    assert known_version(output(place), listed(place), read=True) == (known, False)


def test_another_content_is_another_shard(place: Storage) -> None:
    before, data = listed(place), place.read("in/a.parquet")
    record_content(output(place), before)
    for other in (changed_in_place(data), data + b" "):
        place.put_atomic("in/a.parquet", other[:-1] + other[-1:])
        after = listed(place) if len(other) == len(data) else replace(before, size=len(other))
        assert known_version(output(place), after, read=True) == (after, False)


def test_unread_files_of_the_same_size_are_taken_to_be_the_same(place: Storage) -> None:
    before, data = listed(place), place.read("in/a.parquet")
    record_content(output(place), before)
    place.put_atomic("in/a.parquet", changed_in_place(data))
    after = listed(place)
    assert known_version(output(place), after, read=False)[0].fingerprint == before.fingerprint
    assert (
        known_version(output(place), replace(after, size=1), read=False)[0].fingerprint == after.fingerprint
    )


def test_where_there_is_no_record_a_changed_shard_is_one(place: Storage) -> None:
    before, data = listed(place), place.read("in/a.parquet")
    put_with_another_etag(place, data)
    after = listed(place)
    record_content(output(place), before)  # by now it is another file
    assert not output(place).list(INPUT)
    assert known_version(output(place), after, read=True) == (after, False)
    record_content(output(place), after)
    (record,) = output(place).list(INPUT)
    whole = json.loads(output(place).read(record.path))
    for damaged in (b"{", b"[]", *(json.dumps({**whole, name: None}).encode() for name in whole)):
        output(place).put_atomic(record.path, damaged)
        assert known_version(output(place), after, read=True) == (after, False)
    remember_version(output(place), after)


def test_sealing_puts_the_content_down(place: Storage) -> None:
    ledger, shard = Ledger(output(place)), listed(place)
    run_to_the_end(ledger, [shard], [captions(shard.name, range(4), shard.fingerprint)])
    put_with_another_etag(place, place.read("in/a.parquet"))
    known, news = known_version(ledger.storage, listed(place), read=True)
    assert news and ledger.plan([known]).finished and not ledger.plan([listed(place)]).finished


def test_a_file_that_cannot_be_read_at_its_sealing_costs_the_record_alone(
    place: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Shard) -> str:
        raise PermissionError("no right to read it any more")

    monkeypatch.setattr(content, "content_digest", failing)
    ledger, shard = Ledger(output(place)), listed(place)
    run_to_the_end(ledger, [shard], [captions(shard.name, range(4), shard.fingerprint)])
    assert ledger.plan([shard]).finished and not ledger.storage.list(INPUT)
