"""The ground chaos is played on: a Ray cluster of several nodes whose processes are found and killed by what they do.

Nodes are real raylets with real worker processes, only on one machine. A victim is found by the title Ray gives its
process, among the descendants of this cluster's own raylets, so that nothing else on the machine is ever hit.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.chaos import faults
from tests.commands import ROOT, environment

Victim = Literal["driver", "generate", "preprocess", "task", "node"]
VICTIMS: tuple[Victim, ...] = ("driver", "generate", "preprocess", "task", "node")
_TITLES = {"generate": "(PublishingGenerate)", "preprocess": "(DrainingPreprocess)", "task": "ray::"}
# What else is titled so: workers without work, our register, Ray's own actors, and the agents that a raylet dies with.
_SERVICES = ("ray::IDLE", "Register", "Actor", "Agent")
NODE_CPUS = 3


@dataclass
class Ground:
    """A cluster with a head without CPUs and `nodes` workers, and at most one driver."""

    folder: Path
    cluster: Any
    driver: subprocess.Popen[bytes] | None = None
    nodes: list[Any] = field(default_factory=list)

    def add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=NODE_CPUS, num_gpus=1))

    def start(
        self, arguments: Sequence[str], module: str = "jobs.cli", **extra: str
    ) -> subprocess.Popen[bytes]:
        """`tessera ARGUMENTS` (or another module) on this cluster; it prints to driver.log in the folder."""
        with (self.folder / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=environment(
                    RAY_ADDRESS=self.cluster.address, PYTHONPATH=os.environ["PYTHONPATH"], **extra
                ),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.driver

    def said(self) -> str:
        """Everything the drivers printed."""
        return (self.folder / "driver.log").read_text()

    def finished(self) -> int | None:
        """The driver's exit code, negative for a signal; None while it runs."""
        return self.driver.poll() if self.driver else None

    def calm(self) -> None:
        """Ends the driver and takes all faults away, so that another job can run here."""
        if self.driver and self.driver.poll() is None:
            os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
        self.driver = None
        faults.disarm(self.folder)

    def kill(self, victim: Victim, dice: random.Random) -> bool:
        """SIGKILLs one process of that kind, if there is one; a killed node is replaced by a new one."""
        if victim == "driver":
            if not self.driver or self.driver.poll() is not None:
                return False
            os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
        elif victim == "node":
            node = self.nodes.pop(dice.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.add_node()
        else:
            found = self.workers(victim)
            if not found:
                return False
            with suppress(ProcessLookupError):
                os.kill(dice.choice(found), signal.SIGKILL)
        return True

    def workers(self, victim: Victim) -> list[int]:
        """Process ids, in order. A "task" is a read, a write or a seal at work."""
        pids = []
        for pid in _descendants([raylet.process.pid for node in self.nodes for raylet in _raylets(node)]):
            with suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                actor = "(PublishingGenerate)" in title or "(DrainingPreprocess)" in title
                service = any(name in title for name in _SERVICES)
                if _TITLES[victim] in title and (victim != "task" or not (actor or service)):
                    pids.append(pid)
        return sorted(pids)

    def wait_for_worker(self, victim: Victim, seconds: float = 60) -> None:
        """Waits until there is such a process, or no driver that could start one."""
        deadline = time.monotonic() + seconds
        while not self.workers(victim) and self.finished() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def wait_for(self, captions: int, seconds: float = 240) -> bool:
        """Waits until that many captions were made; False if the driver ended before."""
        deadline = time.monotonic() + seconds
        while faults.captioned(self.folder) < captions:
            assert time.monotonic() < deadline, f"no progress; the driver said:\n{self.said()[-3000:]}"
            if self.finished() is not None:
                return False
            time.sleep(0.02)
        return True


def _raylets(node: Any) -> Any:
    return node.all_processes.get("raylet", ())


def _descendants(roots: Sequence[int]) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError, ValueError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
    todo = list(roots)
    while todo:
        found = children.get(todo.pop(), [])
        todo += found
        yield from found


@contextmanager
def ground(folder: Path, nodes: int = 2, **extra: str) -> Iterator[Ground]:
    """A fresh cluster whose processes listen to tests/chaos/faults.py in `folder`, with `extra` variables."""
    from ray.cluster_utils import Cluster

    folder.mkdir(parents=True, exist_ok=True)
    site = Path(__file__).parent / "site"
    inherited = {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "TESSERA_CHAOS": str(folder),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        **extra,
    }
    before = {name: os.environ.get(name) for name in inherited}
    os.environ.update(inherited)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    here = Ground(folder, cluster)
    try:
        for _ in range(nodes):
            here.add_node()
        yield here
    finally:
        here.calm()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
