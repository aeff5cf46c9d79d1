"""The Ray cluster a job runs on: a local one by default, an existing one where RAY_ADDRESS names it.

A job whose actors can never all be placed would wait for ever. So the preflight compares what the job needs with what
the cluster has, or may grow to, and refuses it in one sentence before anything starts.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray._private.utils import get_num_cpus

from actors import numa
from pipeline.spec.job_spec import ResourcesSpec

# Logical CPUs beside the actors': reads, block splitting and writes wait on storage more than they compute, so
# fractions of a core keep them from crowding actors out on a small machine.
IO_TASK_CPUS = 0.25
_IO_CPUS = 1

_ROOT = str(Path(__file__).resolve().parents[2])  # where our packages lie, side by side


class ClusterError(RuntimeError):
    """The cluster cannot be reached, or cannot hold the job's smallest set of actors."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """CPUs and GPUs, logical as Ray counts them: now, at most once the cluster has grown, and free at this moment."""

    cpus: float
    gpus: float
    max_cpus: float
    max_gpus: float
    free_cpus: float = 0.0
    free_gpus: float = 0.0


def required(resources: ResourcesSpec) -> tuple[float, float]:
    """CPUs and GPUs without which the smallest actor pools and the I/O tasks cannot run side by side."""
    generate = resources.generate
    cpus = generate.replicas[0] * (generate.cpus or 0)
    return cpus + _cpus_beside(resources), generate.replicas[0] * generate.gpus


def bundles(resources: ResourcesSpec) -> list[dict[str, float]]:
    """`required`, piece by piece: each piece fits on one node or not at all."""
    preprocess, generate = resources.preprocess, resources.generate
    pieces = [{"CPU": preprocess.cpus}] * preprocess.replicas[0]
    pieces += [{"CPU": generate.cpus or 0, "GPU": generate.gpus}] * generate.replicas[0]
    pieces.append({"CPU": _IO_CPUS})  # in one piece: a task that splits blocks takes a whole CPU
    amounts = ({name: amount for name, amount in piece.items() if amount} for piece in pieces)
    return [piece for piece in amounts if piece]


def with_generate_cpus(resources: ResourcesSpec, cpus: float) -> ResourcesSpec:
    """`resources` with the CPUs of a Generate actor, where the spec leaves them open.

    None beside a GPU (Ray would reserve one by default). Without one it computes on all of the CPUs it can get: its
    share of `cpus`, at least one.
    """
    if resources.generate.cpus is not None:
        return resources
    share = 0 if resources.generate.gpus else max(1, cpus // resources.generate.replicas[0])
    return resources.model_copy(
        update={"generate": resources.generate.model_copy(update={"cpus": float(share)})}
    )


def on_machine(resources: ResourcesSpec, cpus: int, nodes: Sequence[int]) -> ResourcesSpec:
    """`resources` with what the spec leaves open (`with_generate_cpus`) on one machine of so many CPUs, whose NUMA
    nodes have `nodes` of them: as many replicas on CPUs as it has nodes, if the spec allows, each as large as a node.

    Nodes of which less than half may be used, beside the largest, are no replica's. Nor is any where the job may use
    fewer `cpus` than the nodes have.
    """
    generate = resources.generate
    usable = [size for size in nodes if 2 * size >= max(nodes)]
    replicas = min(generate.replicas[1], len(usable))
    if generate.gpus or generate.cpus is not None or replicas <= generate.replicas[0] or cpus < sum(nodes):
        return with_generate_cpus(resources, cpus)
    update = {"replicas": (replicas, generate.replicas[1]), "cpus": float(min(usable))}
    return resources.model_copy(update={"generate": generate.model_copy(update=update)})


def _cpus_beside(resources: ResourcesSpec) -> float:
    """CPUs of the smallest preprocess pool, and of the I/O tasks."""
    return resources.preprocess.replicas[0] * resources.preprocess.cpus + _IO_CPUS


def connect(resources: ResourcesSpec) -> ResourcesSpec:
    """Joins the cluster at RAY_ADDRESS or starts a local one, unless this process has joined one already, and returns
    `resources` with what the spec left open (`with_generate_cpus`).

    Raises ClusterError when there is none at that address.
    """
    if not ray.is_initialized():
        # A laptop runs the smallest pools even where they outnumber its cores: slower, but it works.
        local = on_machine(resources, _threads(_local_cpus()), [len(cpus) for cpus in numa.nodes().values()])
        _initialise(max(math.ceil(required(local)[0]), _local_cpus() + _IO_CPUS))
        if "RAY_ADDRESS" not in os.environ:
            return local
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return fitted(resources, nodes)


def fitted(resources: ResourcesSpec, nodes: Sequence[float]) -> ResourcesSpec:
    """`resources` with as many CPUs for a Generate actor (`with_generate_cpus`) as leave all of the smallest pools
    their places on nodes of so many CPUs."""
    most = int(max(nodes, default=1)) * resources.generate.replicas[0]
    tried = (with_generate_cpus(resources, cpus) for cpus in range(most, 0, -1))
    return next((each for each in tried if _fit(each, nodes)), with_generate_cpus(resources, 1))


def _fit(resources: ResourcesSpec, nodes: Sequence[float]) -> bool:
    """Whether every actor finds a node, the largest first and each where least is left (best fit decreasing)."""
    free = list(nodes)
    for cpus in sorted((piece.get("CPU", 0) for piece in bundles(resources)), reverse=True):
        places = [index for index, left in enumerate(free) if left >= cpus]
        if not places:
            return False
        free[min(places, key=lambda index: free[index])] -= cpus
    return True


def _local_cpus() -> int:
    """CPUs that this process may use, by its container's limits and its affinity."""
    allowed = int(get_num_cpus(True))
    return max(1, min(allowed, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else allowed)


def _threads(cpus: int) -> int:
    """Threads on a machine of `cpus`: fewer where OMP_NUM_THREADS says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is of nested levels
    return max(1, min(cpus, int(asked))) if asked.isdecimal() and asked.isascii() else cpus


def _initialise(local_cpus: int) -> None:
    # Ray's C++ side writes harmless but alarming lines about every actor pool to the driver's terminal, and one
    # more about being told not to.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = os.environ.get("RAY_ADDRESS")
    environment = {"worker_process_setup_hook": _import_ours()} if _shadowed() else None
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.WARNING,
        "runtime_env": environment,
    }
    try:
        with _muted_stderr():
            if address:
                _knock(address)
                ray.init(address=address, **quiet)
            else:
                ray.init(address="local", num_cpus=local_cpus, include_dashboard=False, **quiet)
    except Exception as error:  # a node that does not come up is a bare Exception
        where = f"no Ray cluster answers at RAY_ADDRESS={address}"
        if not address:
            where = (
                "Ray did not start on this machine (is it busy, or out of memory?); its logs are in /tmp/ray"
            )
        raise ClusterError(f"{where}: {str(error).partition(chr(10))[0]}") from None


def _shadowed() -> bool:
    """Whether a worker would import somebody else's `pipeline` or `actors`: Ray has workers look into the driver's
    working folder first, and a repository of one's own may well have a package of that name."""
    searched = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    names = ("pipeline", "pipeline.py", "actors", "actors.py")
    return any(
        os.path.realpath(folder) != os.path.realpath(_ROOT)
        and any(os.path.exists(os.path.join(folder, name)) for name in names)
        for folder in searched
        if folder
    )


def _import_ours() -> Callable[[], None]:
    """What makes a worker import our packages before it looks for any. Not a function of this module, since Ray would
    send its name alone, and finding it by name is what goes wrong. It costs each worker a second, so only where needed.
    """
    root = _ROOT

    def import_ours() -> None:
        import importlib
        import os.path
        import sys

        if not os.path.isdir(os.path.join(root, "pipeline")):  # another machine, laid out in another way
            return
        sys.path.insert(0, root)
        try:
            for name in ("pipeline", "actors"):
                importlib.import_module(name)
        finally:
            sys.path.remove(root)

    return import_ours


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
            f"the job needs {gpus:g} GPU{'s' * (gpus != 1)} and the cluster has {found.max_gpus:g} ({pools}): ask for "
            "fewer replicas or GPUs, or set resources.generate.gpus=0 to run on CPUs"
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
