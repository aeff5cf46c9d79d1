"""The Ray cluster a job runs on: a local one by default, an existing one where RAY_ADDRESS names it.

The one idea is the preflight: a job whose actors can never all be placed would wait for ever, so what it needs
is compared with what the cluster has (or may grow to) and refused in one sentence before anything starts.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private.state import state as ray_state

from pipeline.spec import ResourcesSpec

# Logical CPUs beside the actors': reads, block splitting and writes wait on storage more than they compute, so
# fractions of a core keep them from crowding actors out on a small machine.
IO_TASK_CPUS = 0.25
_IO_CPUS = 1


class ClusterError(RuntimeError):
    """The cluster cannot be reached, or cannot hold the job's smallest set of actors."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """CPUs and GPUs, logical as Ray counts them: now, at most once the cluster has grown, and free at this moment."""

    cpus: float
    gpus: float
    max_cpus: float
    max_gpus: float
    free_cpus: float
    free_gpus: float


def generate_cpus(resources: ResourcesSpec) -> float:
    """CPUs of a Generate actor: none beside a GPU (Ray would reserve one by default), one core without."""
    return 0 if resources.generate.gpus else 1


def required(resources: ResourcesSpec) -> tuple[float, float]:
    """CPUs and GPUs without which the smallest actor pools and the I/O tasks cannot run side by side."""
    generate = resources.generate
    cpus = resources.preprocess.replicas[0] * resources.preprocess.cpus + _IO_CPUS
    return cpus + generate.replicas[0] * generate_cpus(resources), generate.replicas[0] * generate.gpus


def bundles(resources: ResourcesSpec) -> list[dict[str, float]]:
    """`required`, piece by piece: each piece fits on one node or not at all."""
    preprocess, generate = resources.preprocess, resources.generate
    pieces = [{"CPU": preprocess.cpus}] * preprocess.replicas[0]
    pieces += [{"CPU": generate_cpus(resources), "GPU": generate.gpus}] * generate.replicas[0]
    pieces.append({"CPU": _IO_CPUS})
    return [{name: amount for name, amount in piece.items() if amount} for piece in pieces]


def connect(resources: ResourcesSpec) -> None:
    """Joins the cluster at RAY_ADDRESS or starts a local one; no-op when this process has joined already.

    Raises ClusterError when there is none at that address.
    """
    if ray.is_initialized():
        return
    # Ray's C++ side writes harmless but alarming lines about every actor pool to the driver's terminal, and one
    # more about being told not to.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = os.environ.get("RAY_ADDRESS")
    with _muted_stderr():
        if address:
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            except (OSError, RuntimeError, ValueError) as error:
                raise ClusterError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from None
        else:
            # A laptop runs the smallest pools even where they outnumber its cores: slower, but it works.
            cpus = max(math.ceil(required(resources)[0]), (os.cpu_count() or 1) + _IO_CPUS)
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at host:port: Ray would try again and again for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Sends file descriptor 2 to nowhere for a while: C++ code does not write through sys.stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def capacity() -> Capacity:
    """What the connected cluster has, what its autoscaler (if any) may add, and what nobody uses."""
    now, free = ray.cluster_resources(), ray.available_resources()
    cpus, gpus = now.get("CPU", 0.0), now.get("GPU", 0.0)
    most = ray_state.get_max_resources_from_cluster_config() or {}
    return Capacity(
        cpus,
        gpus,
        max(cpus, most.get("CPU", 0)),
        max(gpus, most.get("GPU", 0)),
        free.get("CPU", 0.0),
        free.get("GPU", 0.0),
    )


def preflight(resources: ResourcesSpec, found: Capacity) -> None:
    """Raises ClusterError, in one sentence with the fix, when the smallest pools can never be placed."""
    cpus, gpus = required(resources)
    pools = (
        f"resources.preprocess.replicas[0]={resources.preprocess.replicas[0]} x "
        f"cpus={resources.preprocess.cpus:g}, resources.generate.replicas[0]={resources.generate.replicas[0]} x "
        f"gpus={resources.generate.gpus:g}"
    )
    if gpus > found.max_gpus:
        raise ClusterError(
            f"the job needs {gpus:g} GPUs and the cluster has {found.max_gpus:g} ({pools}): ask for fewer "
            "replicas or GPUs, or set resources.generate.gpus=0 to run on CPUs"
        )
    if cpus > found.max_cpus:
        raise ClusterError(
            f"the job needs {cpus:g} CPUs, {_IO_CPUS} of them for reads and writes, and the cluster has "
            f"{found.max_cpus:g} ({pools}): ask for fewer replicas or CPUs, or add CPUs"
        )


def counted(cpus: float, gpus: float) -> str:
    """
    >>> counted(1, 0), counted(2.5, 8)
    ('1 CPU and 0 GPUs', '2.5 CPUs and 8 GPUs')
    """
    return f"{cpus:g} CPU{'s' * (cpus != 1)} and {gpus:g} GPU{'s' * (gpus != 1)}"
