"""One finished job for all tests of commands on one."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.toy.dataset import write_dataset
from tests.commands import Finished, options, tessera


@dataclass(frozen=True)
class Job:
    """A finished run: its folder, what it was started with, and how it ended."""

    root: Path
    arguments: list[str]
    done: Finished


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Job:
    """90 rows in 3 shards, 9 of them broken."""
    root = tmp_path_factory.mktemp("job")
    write_dataset(root / "in", rows=90, shards=3, seed=1, corrupt=0.1)
    arguments = options(root, resources__generate__gpus=1, resources__generate__replicas="[1, 2]")
    done = tessera("run", "examples/llava_onevision.yaml", *arguments, RAY_ADDRESS=ray_address)
    assert done.code == 0, done.err
    return Job(root, arguments, done)


@pytest.fixture
def folder(job: Job, tmp_path: Path) -> Iterator[Path]:
    """Its folder itself, since an output knows where its input is; afterwards it is as it was."""
    shutil.copytree(job.root, tmp_path / "kept")
    yield job.root
    shutil.rmtree(job.root)
    shutil.copytree(tmp_path / "kept", job.root)
