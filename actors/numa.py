"""NUMA: the memory nodes of a machine, and a node for each replica on CPUs.

Why: a machine of several sockets has memory beside each. Threads that share weights and a KV cache across sockets wait
for the link between them, so a replica computes on the CPUs of one node; what it allocates from then on lies there
(Linux takes memory from the node of the thread that touches it first).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_NODES = Path("/sys/devices/system/node")

_claimed: list[socket.socket] = []  # for this process's life


def nodes(root: Path = _NODES) -> dict[int, frozenset[int]]:
    """The CPUs of each node that this process may use; nodes without one are left out. Empty where none can be read."""
    if not hasattr(os, "sched_getaffinity"):
        return {}
    allowed = os.sched_getaffinity(0)
    found = {}
    for folder in root.glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            cpus = parse_cpus((folder / "cpulist").read_text()) & allowed
            if cpus:
                found[int(folder.name.removeprefix("node"))] = cpus
    return dict(sorted(found.items()))


def pin(threads: int, found: Mapping[int, frozenset[int]]) -> int | None:
    """Keeps this process, its threads included, on a node of `found` that has `threads` CPUs which no other replica
    took, and returns the node's number: None where there is one node only, or none with so much left.

    To be called before libraries start threads of their own. The node is taken until the process ends.
    """
    if len(found) < 2:
        return None
    room = {number: len(cpus) // threads for number, cpus in found.items()}
    for place in range(max(room.values())):
        for number, cpus in found.items():
            if place < room[number] and _claim(number, place):
                _keep_on(cpus)
                return number
    return None


def parse_cpus(text: str) -> frozenset[int]:
    """
    >>> sorted(parse_cpus("0-2,8\\n"))
    [0, 1, 2, 8]
    """
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def _claim(node: int, place: int) -> bool:
    """Takes a place on a node. An abstract socket's name is free again as soon as its process is gone."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0tessera-node-{node}-{place}")
    except OSError:
        claim.close()
        return False
    _claimed.append(claim)
    return True


def _keep_on(cpus: frozenset[int]) -> None:
    # Each thread by itself: an actor's calls run in threads that are there already, and new ones take after these
    for task in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task), cpus)
