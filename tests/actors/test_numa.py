"""A replica a NUMA node, on machines that are made of files and of sets."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import numa


def machine(root: Path, *cpus: str) -> Path:
    for number, text in enumerate(cpus):
        (root / f"node{number}").mkdir()
        (root / f"node{number}" / "cpulist").write_text(text + "\n")
    (root / "possible").write_text("0-1\n")
    return root


@pytest.fixture
def kept(monkeypatch) -> Iterator[dict[int, set[int]]]:
    """What CPUs each thread was told to keep to; the places that were taken are given back."""
    told: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_setaffinity", lambda task, cpus: told.__setitem__(task, set(cpus)))
    yield told
    while numa._claimed:
        numa._claimed.pop().close()


def test_nodes_are_those_of_the_machine_as_far_as_they_may_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 9})
    root = machine(tmp_path, "0-3", "4-7", "", "8-11")
    assert numa.nodes(root) == {0: {0, 1, 2}, 3: {9}}
    assert numa.nodes(tmp_path / "none") == {}


def test_each_replica_takes_a_node_until_all_are_taken(kept):
    found = {0: frozenset({0, 1, 2, 3}), 1: frozenset({4, 5, 6, 7})}
    assert [numa.pin(4, found) for _ in range(3)] == [0, 1, None]


def test_smaller_replicas_spread_before_they_share_a_node(kept):
    found = {0: frozenset({0, 1, 2, 3}), 1: frozenset({4, 5, 6, 7, 8})}
    assert [numa.pin(2, found) for _ in range(5)] == [0, 1, 0, 1, None]


def test_all_threads_of_the_process_keep_to_the_node(kept):
    assert numa.pin(2, {0: frozenset({0, 1}), 1: frozenset({4, 5})}) == 0
    assert os.getpid() in kept and all(cpus == {0, 1} for cpus in kept.values())
    assert set(kept) == {int(task) for task in os.listdir("/proc/self/task")}


def test_a_replica_that_ends_gives_its_node_back(kept):
    found = {0: frozenset({0}), 1: frozenset({1})}
    assert [numa.pin(1, found), numa.pin(1, found), numa.pin(1, found)] == [0, 1, None]
    numa._claimed[0].close()
    assert numa.pin(1, found) == 0


def test_one_node_or_a_replica_larger_than_any_is_left_alone(kept):
    assert numa.pin(2, {0: frozenset({0, 1})}) is None
    assert numa.pin(3, {0: frozenset({0, 1}), 1: frozenset({2, 3})}) is None
    assert not kept
