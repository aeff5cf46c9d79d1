"""An S3 server in a process of its own, with bad weather before it; for benchmarks, which have no fixtures."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from tests.chaos.proxy import Proxy, bad_weather

_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def stormy_bucket(seed: int, share: float) -> Iterator[tuple[str, Proxy]]:
    """(URL of an empty bucket, the proxy that everybody here goes through to it).

    This process's AWS variables point to the proxy meanwhile, and so do those of its children.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = {name: os.environ.get(name) for name in ("AWS_ENDPOINT_URL", *_KEYS)}
    try:
        target = f"http://127.0.0.1:{port}"
        _make_bucket(f"{target}/chaos")
        with bad_weather(target, seed, share) as proxy:
            os.environ.update(_KEYS, AWS_ENDPOINT_URL=proxy.endpoint)
            yield "s3://chaos", proxy
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.terminate()
        server.wait(10)


def _make_bucket(url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=10).close()
            return
        except urllib.error.HTTPError:
            raise
        except OSError:  # not up yet
            time.sleep(0.1)
    raise RuntimeError("moto.server did not answer in time")
