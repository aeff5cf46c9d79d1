"""Versions of files: a look-up tells whether a file is the one that was listed, a pass over it what it holds."""

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.input import versions
from pipeline.input.shards import Shard, discover
from pipeline.input.versions import changed_among, content_digest, is_current
from pipeline.spec.job_spec import InputSpec
from pipeline.storage.storage import Storage


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_url"))
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(3), "image": [b"x"] * 3}), file)
    storage.put_atomic("a.parquet", file.getvalue().to_pybytes())
    return storage


def listed(storage: Storage) -> Shard:
    (shard,) = discover(InputSpec(path=(storage.url,))).shards
    return shard


def test_a_file_is_current_until_it_is_written_anew_or_deleted(storage: Storage) -> None:
    shard = listed(storage)
    assert shard.token and shard.version == shard.fingerprint
    assert is_current(shard) and not changed_among([shard])
    storage.put_atomic("a.parquet", storage.read("a.parquet").replace(b"x", b"y"))
    assert not is_current(shard) and is_current(listed(storage))
    (changed,) = changed_among([shard, listed(storage)])
    assert str(changed) == f"{shard.url} changed while it was read, and the same command captions it anew"
    storage.delete(["a.parquet"])
    assert not is_current(shard)


def test_where_listings_tell_no_token_the_size_counts(storage: Storage) -> None:
    shard = replace(listed(storage), token="")
    storage.put_atomic("a.parquet", storage.read("a.parquet").replace(b"x", b"y"))
    assert is_current(shard)
    storage.put_atomic("a.parquet", b"x" + storage.read("a.parquet"))
    assert not is_current(shard)


def test_the_digest_is_of_every_byte_of_the_version_listed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_CHUNK", 100)
    shard, data = listed(storage), storage.read("a.parquet")
    assert content_digest(shard) == sha256(data).hexdigest()
    storage.put_atomic("a.parquet", data + b" ")
    assert content_digest(shard) is None
    storage.delete(["a.parquet"])
    assert content_digest(shard) is None


def test_a_touched_file_is_another_version_with_the_same_content(tmp_path: Path, storage: Storage) -> None:
    if not storage.local:
        pytest.skip("an object cannot be touched")
    before = listed(storage)
    os.utime(tmp_path / "a.parquet", ns=(0, 0))
    after = listed(storage)
    assert not is_current(before) and before.version != after.version
    assert content_digest(after) == sha256((tmp_path / "a.parquet").read_bytes()).hexdigest()
