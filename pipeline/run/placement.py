"""Placement: a job starts its actors when all of its smallest pools, and a CPU for its reads, are free at once.

Why: Ray places actors one by one. Two jobs of two actors each on a cluster for three take half of what they need and
wait for each other for ever; and where actors hold the last CPU, no read ever runs.

A placement group is Ray's reservation of all or nothing, and what its autoscaler sees of a job that waits. Ray Data
starts its actors outside of any, so the group is given back right before. Until these actors are placed, the job has
the turn: an actor whose name only one job can hold, and which dies with its driver. A job whose group comes up while
another has the turn gives the group back and waits: what it was given may be what the other was about to take.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.run.cluster import IO_TASK_CPUS, Capacity, bundles, capacity, counted, required
from pipeline.spec.job_spec import ResourcesSpec

_LOOK_SECONDS = 1
_TURN = {"name": "placing", "namespace": "tessera"}
_STAGES = {
    "DrainingPreprocess": "Preprocess",
    "PublishingGenerate": "Generate",
}  # class: what people are told


class _TurnActor:
    """Does nothing: its name is what counts."""


class Turn:
    """The right to place actors, which one job at a time has; a context manager that gives it back at the end."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        if self._actor is not None:
            with suppress(RayError, RuntimeError):  # of a cluster that is gone: so is the turn
                ray.kill(self._actor)
            self._actor = None

    def release_once_placed(self, resources: ResourcesSpec) -> None:
        """Gives the turn back if the job's smallest pools have their places by now."""
        if self._actor is not None and _placed() >= _smallest(resources):
            self.release()


def wait_for_room(resources: ResourcesSpec, waiting: Callable[[str], None]) -> Turn:
    """Returns once the smallest pools and the reads' share can be placed; `waiting` is told every second what for."""
    while True:
        group = placement_group(bundles(resources))
        try:
            while not group.wait(_LOOK_SECONDS):
                waiting(_room(resources, capacity()))
            turn = _take_turn()
        finally:
            remove_placement_group(group)
        if turn:
            return turn
        while _turn_is_taken():
            waiting("another job is placing its actors")
            time.sleep(_LOOK_SECONDS)


def room_needed(resources: ResourcesSpec, found: Capacity) -> str:
    """What a job needs, what there is of it, and what is free."""
    return (
        f"the job needs at least {counted(*required(resources))}; the cluster has {counted(found.cpus, found.gpus)}, "
        f"of which {counted(found.free_cpus, found.free_gpus)} are free"
    )


def _room(resources: ResourcesSpec, found: Capacity) -> str:
    """Why a job has no room: too little is free, or it is scattered over nodes."""
    cpus, gpus = required(resources)
    scattered = cpus <= found.free_cpus and gpus <= found.free_gpus
    return room_needed(resources, found) + (", but no node has enough for each actor" if scattered else "")


def _take_turn() -> Turn | None:
    try:
        return Turn(ray.remote(num_cpus=0)(_TurnActor).options(**_TURN).remote())
    except ActorAlreadyExistsError:
        return None


def _turn_is_taken() -> bool:
    try:
        ray.get_actor(**_TURN)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Standing:
    """A running job's place on the cluster: actors by stage that wait for one, and that are born again (their process
    or node died); `dead_nodes` counts those of the cluster."""

    found: Capacity
    waiting: Mapping[str, int]
    restarting: Mapping[str, int]
    dead_nodes: int


def standing() -> Standing:
    waiting = Counter(stage for stage, state, pid in _actors() if state == "PENDING_CREATION" and not pid)
    restarting = Counter(stage for stage, state, _ in _actors() if state == "RESTARTING")
    return Standing(capacity(), waiting, restarting, dead_nodes())


def dead_nodes() -> int:
    return sum(not node["Alive"] for node in ray.nodes())


def lacking(resources: ResourcesSpec, now: Standing, dead_before: int) -> str:
    """Why a job may stand still, as far as the cluster tells: what waits, what is needed, there and free; else "".

    `dead_before` is how many nodes were dead when the job began.
    """
    reasons = [f"{_told(count, stage)} for a place" for stage, count in now.waiting.items()]
    reasons += [
        f"{count:,} {stage} actor{'s are' if count > 1 else ' is'} starting again"
        for stage, count in now.restarting.items()
    ]
    if not now.waiting and now.found.free_cpus < IO_TASK_CPUS:
        reasons.append("reads and writes may wait for a CPU")
    if reasons:
        reasons.append(room_needed(resources, now.found))
    died = now.dead_nodes - dead_before
    if died > 0:
        reasons.append(f"{died:,} node{'s' * (died > 1)} died since the run began")
    return "; ".join(reasons)


def model_is_loaded() -> bool:
    """True once a Generate actor of this job has its model."""
    return any(stage == "Generate" and state == "ALIVE" for stage, state, _ in _actors())


def _told(count: int, stage: str) -> str:
    return f"{count:,} {stage} actors wait" if count > 1 else f"{count:,} {stage} actor waits"


def _placed() -> Counter[str]:
    """Actors of this job that have or had a process, by stage."""
    return Counter(stage for stage, _, pid in _actors() if pid)


def _smallest(resources: ResourcesSpec) -> Counter[str]:
    return Counter(Preprocess=resources.preprocess.replicas[0], Generate=resources.generate.replicas[0])


def _actors() -> list[tuple[str, str, int]]:
    """Stage, state and process id (0 before it has one) of each actor of this job's pools."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    table = ray_state.actor_table(None, job_id=job).values()
    return [
        (stage, actor["State"], actor["Pid"])
        for actor in table
        for name, stage in _STAGES.items()
        if f"({name})" in actor["ActorClassName"]
    ]
