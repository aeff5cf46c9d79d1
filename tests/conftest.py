"""Fixtures for every test: a quiet Ray, and a real HTTP S3 server (moto) in a process of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator

import hypothesis
import pytest

from tests.commands import BIN, ray, ray_environment

# The same examples every time, and no deadline: test machines are shared and slow.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")

# Threads that spin while they wait for each other would take the cores from other processes' tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Without a GPU its kernels are run by Triton's interpreter. Asked for before anything imports Triton.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Whole jobs start a dozen processes each, which need not compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A new local Ray would turn on token auth and write a token file into the home folder. Set before any import.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` skip themselves where there is no device."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of a running S3 server; the usual AWS variables point to it, here and in child processes."""
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            _wait_until_it_answers(endpoint, server)
            yield endpoint
        finally:
            server.terminate()
            server.wait(10)


@pytest.fixture
def s3_url(s3_endpoint: str) -> str:
    """A fresh, empty bucket: s3://test-<random>."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    urllib.request.urlopen(
        urllib.request.Request(f"{s3_endpoint}/{bucket}", method="PUT"), timeout=10
    ).close()
    return f"s3://{bucket}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_answers(endpoint: str, server: subprocess.Popen) -> None:
    for _ in range(300):
        if server.poll() is not None:
            raise RuntimeError(f"moto.server ended with {server.returncode}")
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("moto.server did not answer in time")


@pytest.fixture(scope="session")
def ray_address(s3_endpoint: str) -> Iterator[str]:
    """The address of a running Ray cluster: a head without CPUs and two workers with a logical GPU each.

    Its workers inherit the S3 server's variables. Tests join it as users do, from a process of its own with
    RAY_ADDRESS set.
    """
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2, num_gpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.fixture(scope="session")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the dashboard of a running Ray head, where jobs are submitted."""
    ports = [_free_port() for _ in range(4)]  # of its own, all of them: another cluster may run beside it
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
        "--num-gpus=1",
        "--disable-usage-stats",
    ]
    command += [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    # A submitted job joins the cluster that this folder names last. (A path of pytest's is too long for a socket's.)
    folder = tempfile.mkdtemp(prefix="ray-")
    command.append(f"--temp-dir={folder}")
    with (tmp_path_factory.mktemp("ray") / "log").open("w") as log:
        head = subprocess.Popen(
            command, env=ray_environment(), stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{ports[1]}"
    deadline = time.monotonic() + 120
    try:
        # The dashboard answers before the node's agent, which starts jobs, does.
        while (tried := ray("job", "submit", f"--address={address}", "--", "true")).returncode:
            assert head.poll() is None and time.monotonic() < deadline, tried.stderr
        yield address
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # a graceful end takes half a minute
        head.wait(10)
        shutil.rmtree(folder, ignore_errors=True)
