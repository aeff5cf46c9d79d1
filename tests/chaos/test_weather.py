"""Storage in bad weather, and two runs at once: on S3, through a proxy that throttles, stalls, cuts and resets."""

import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import pytest
from s3fs import S3FileSystem

from pipeline.storage import lease
from pipeline.storage.storage import Storage
from tests.chaos.proxy import WEATHER, bad_weather
from tests.chaos.scene import Rows, Scene, audit, write_input
from tests.checkpoints import untrained
from tests.commands import environment, tessera

ROWS = 64


def scene_on_s3(tmp_path: Path, endpoint: str, url: str) -> Scene:
    write_input(tmp_path / "in", rows=ROWS, shards=2, seed=5)
    client = boto3.client("s3", endpoint_url=endpoint)
    for path in sorted((tmp_path / "in").iterdir()):
        client.upload_file(str(path), url.removeprefix("s3://"), f"in/{path.name}")
    return Scene(url, untrained("llava_onevision"))


@dataclass(frozen=True)
class TwoRuns:
    """Two runs of one job, started at once: exit code and last words of each, and what the rows became."""

    ends: list[tuple[int, str]]
    captions: Rows
    times: Counter[str]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, ray_address, s3_endpoint) -> TwoRuns:
    bucket = "test-two-runs"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    scene = scene_on_s3(tmp_path_factory.mktemp("two-runs"), s3_endpoint, f"s3://{bucket}")
    command = [sys.executable, "-m", "jobs.cli", *scene.run()]
    runs = [
        subprocess.Popen(command, env=environment(RAY_ADDRESS=ray_address), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    words = [run.communicate(timeout=200)[1] for run in runs]
    return TwoRuns([(run.returncode, said) for run, said in zip(runs, words, strict=True)], *scene.captions())


@pytest.fixture
def fresh_clients():
    """fsspec keeps clients for ever, whatever the endpoint in the environment says by then."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("fresh_clients")
@pytest.mark.parametrize("seed", [1, 2])
def test_storage_keeps_its_promises_in_any_weather(s3_endpoint, s3_url, monkeypatch, seed):
    with bad_weather(s3_endpoint, seed, share=0.3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage = Storage(f"{s3_url}/out")
        names = [f"data/{number}.parquet" for number in range(8)]
        for number, name in enumerate(names):
            storage.put_atomic(name, bytes([number]) * 5000)
        assert storage.create_exclusive("lease", b"mine"), "though the answer may have been lost"
        assert not storage.create_exclusive("lease", b"yours")
        data, version = storage.read_version("lease")
        assert data == b"mine" and storage.put_if("lease", b"again", version)
        assert not storage.put_if("lease", b"too late", version)
        assert [info.path for info in storage.list("data")] == names
        assert [storage.read(name) for name in names] == [bytes([number]) * 5000 for number in range(8)]
        assert storage.read(names[1], 10, 20) == bytes([1]) * 10 and storage.exists(names[0])
        storage.delete(names)
        assert not storage.list("data") and not storage.exists(names[0])
        assert proxy.met.total() >= len(WEATHER)


def test_of_two_runs_at_once_one_works_and_the_other_says_who(two_runs):
    (winner, _), (loser, said) = sorted(two_runs.ends)
    assert (winner, loser) == (0, 4), two_runs.ends
    assert "is held by run " in said and "--take-over" in said
    assert len(two_runs.captions) == ROWS and set(two_runs.times.values()) == {1}


def test_a_run_in_bad_weather_ends_as_in_good(tmp_path, ray_address, s3_endpoint, s3_url, two_runs):
    scene = scene_on_s3(tmp_path, s3_endpoint, s3_url)
    with bad_weather(s3_endpoint, seed=3, share=0.2) as proxy:
        # The driver lists, plans, seals and verifies in bad weather; the cluster's processes in good.
        done = tessera(*scene.run(), RAY_ADDRESS=ray_address, AWS_ENDPOINT_URL=proxy.endpoint)
        assert done.code == 0, done.err
        assert proxy.met.total() > 5
    assert audit(scene, two_runs.captions).clean


@pytest.mark.usefixtures("fresh_clients")
def test_a_lease_from_tomorrow_is_judged_by_its_beat_not_by_its_clock(s3_url):
    """A holder on a machine whose clock is a day ahead has died: its lease expires all the same."""
    storage = Storage(f"{s3_url}/out")
    gone = replace(lease.Holder.here("r1"), host="other", machine="other", since="2999-01-01 00:00:00 UTC")
    assert storage.create_exclusive(lease.LEASE, gone.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "EXPIRY_SECONDS", 2.0)
        began = time.monotonic()
        with lease.acquire(storage, "r2"):
            assert time.monotonic() - began >= 2
            holder = lease.holder_of(storage)
            assert holder and holder.run == "r2"
        assert lease.holder_of(storage) is None
