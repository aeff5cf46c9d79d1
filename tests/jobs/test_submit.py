"""`ray job submit` against a Ray head with a dashboard: the job's status is the job's own."""

import json

import pyarrow.parquet as pq

from examples.toy.dataset import write_dataset
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
