"""`ray job submit` against a Ray head with a dashboard: the job's status is the job's own."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples.toy.dataset import write_dataset
from tests.checkpoints import untrained
from tests.commands import ROOT, environment, settings

BIN = Path(sys.executable).parent


def ray_environment() -> dict[str, str]:
    env = environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    for name in ("RAY_ADDRESS", "PYTHONPATH"):
        env.pop(name, None)
    return env


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a head's dashboard, with its own ports and temporary folder."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    gcs, web = ports
    start = [BIN / "ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={web}"]
    start += ["--num-cpus=4", "--num-gpus=1", "--disable-usage-stats"]
    with (tmp_path_factory.mktemp("ray") / "log").open("w") as log:
        head = subprocess.Popen(start, env=ray_environment(), stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{web}"
    try:
        # The dashboard answers before the node's agent, which starts jobs, does.
        while ray("job", "submit", f"--address={address}", "--", "true").returncode:
            assert head.poll() is None
        yield address
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # a graceful end takes half a minute
        head.wait(10)


def ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=ray_environment(), capture_output=True, text=True, timeout=240, check=False
    )


def test_a_submitted_job_captions_and_its_failure_is_the_jobs(tmp_path, dashboard):
    write_dataset(tmp_path / "in", rows=12, shards=2, seed=1, corrupt=0.25)
    job = settings(
        input__path=tmp_path / "in",
        output__path=tmp_path / "out",
        model__path=untrained("llava_onevision"),
        generation__max_new_tokens=4,
        limits__max_failed_fraction=0.3,
    )
    submit = ["job", "submit", f"--address={dashboard}", "--working-dir", ".", "--"]
    done = ray(*submit, "python", "-m", "jobs.caption", "examples/llava_onevision.yaml", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 rows" in done.stdout and "3 errors (3 decode)" in done.stdout
    assert json.loads((tmp_path / "out/_SUCCESS").read_text())["rows"] == 12
    assert pq.read_table(tmp_path / "out/data").num_rows == 12

    strict = [*job, "--set=limits.max_failed_fraction=0"]
    done = ray(*submit, "python", "-m", "jobs.caption", "examples/llava_onevision.yaml", *strict)
    assert done.returncode == 1
    assert "3 of 12 rows failed (25.0%)" in done.stdout and "exit code 3" in done.stdout + done.stderr
