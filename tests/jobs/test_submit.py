"""`ray job submit` against a Ray head with a dashboard: the job's status is the job's own."""

import json
import time

import pyarrow.parquet as pq

from examples.toy.dataset import write_dataset
from pipeline.ledger.ledger import JOURNAL, RUNS
from pipeline.storage.lease import LEASE
from tests.checkpoints import untrained
from tests.commands import ray, settings


def test_a_submitted_job_captions_and_fails_as_the_command_would(tmp_path, dashboard):
    write_dataset(tmp_path / "in", rows=12, shards=2, seed=1, corrupt=0.25)
    job = settings(
        input__path=tmp_path / "in",
        output__path=tmp_path / "out",
        model__path=untrained("llava_onevision"),
        generation__max_new_tokens=4,
        limits__max_failed_fraction=0.2,
    )
    submit = ["job", "submit", f"--address={dashboard}", "--working-dir", ".", "--"]
    done = ray(*submit, "python", "-m", "jobs.caption", "examples/llava_onevision.yaml", *job)
    assert done.returncode == 1
    assert "3 of 12 rows failed (25.0%)" in done.stdout and "exit code 3" in done.stdout + done.stderr
    assert json.loads((tmp_path / "out/_SUCCESS").read_text())["rows"] == 12
    assert pq.read_table(tmp_path / "out/data").num_rows == 12


def test_a_job_that_is_stopped_drains(tmp_path, dashboard):
    write_dataset(tmp_path / "in", rows=2016, shards=1, seed=1)
    out = tmp_path / "out"
    job = settings(
        input__path=tmp_path / "in",
        output__path=out,
        model__path=untrained("llava_onevision"),
        generation__max_new_tokens=20,
    )
    address = f"--address={dashboard}"
    environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}})
    submit = ["job", "submit", address, "--no-wait", "--submission-id=drained", "--working-dir=."]
    command = ["python", "-m", "jobs.caption", "examples/llava_onevision.yaml", *job]
    assert ray(*submit, f"--runtime-env-json={environment}", "--", *command).returncode == 0
    deadline = time.monotonic() + 200
    while not list((out / JOURNAL).glob("*/part-*")):
        assert time.monotonic() < deadline, ray("job", "logs", address, "drained").stdout
        time.sleep(0.05)
    stopped = ray("job", "stop", address, "drained")
    assert "Job 'drained' was stopped" in stopped.stdout + stopped.stderr
    assert json.loads((out / LEASE).read_text())["released"]
    (run,) = (json.loads(path.read_text()) for path in (out / RUNS).iterdir())
    assert run["ended"] == "stopped" and 0 < run["captioned"] < 2016
    assert "stopped by SIGTERM" in ray("job", "logs", address, "drained").stdout
