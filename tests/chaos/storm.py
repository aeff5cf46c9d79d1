"""A storm: processes of a job killed at seeded moments, and the job started again until it is done.

A moment is a number of captions made, not a time: the same seed kills at the same stage of the work on a fast
machine and on a slow one.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tests.chaos import faults
from tests.chaos.ground import VICTIMS, Ground, Victim

_PATIENCE_SECONDS = 600.0  # for the end of the job after the last kill
POINTS: tuple[faults.Point, ...] = (
    "part-before",
    "part-inside",
    "part-after",
    "seal-before",
    "seal-inside",
    "seal-after",
)


@dataclass(frozen=True)
class Kill:
    """SIGKILL for a victim once `captions` captions were made."""

    captions: int
    victim: Victim


@dataclass(frozen=True)
class Trap:
    """Once `captions` captions were made: a death of whoever comes to a point of writing a file next."""

    captions: int
    point: faults.Point


@dataclass
class Survived:
    """How a storm went: kills that hit, drivers started, captions made (those lost again included)."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    captions: int = 0
    seconds: float = 0.0


def forecast(
    seed: int, kills: int, captions: int, points: Sequence[faults.Point] = POINTS
) -> list[Kill | Trap]:
    """Seeded kills, evenly spread over the work with a jitter; victims and points take turns in a seeded order."""
    dice = random.Random(seed)
    step = captions / (kills + 1)
    storm: list[Kill | Trap] = []
    while len(storm) < kills:
        round_of_each: list[Kill | Trap] = [
            *(Kill(0, who) for who in VICTIMS),
            *(Trap(0, where) for where in points),
        ]
        for blow in dice.sample(round_of_each, len(round_of_each)):
            storm.append(replace(blow, captions=round((len(storm) + 0.5 + dice.random()) * step)))
    return storm[:kills]


def weather(ground: Ground, arguments: Sequence[str], kills: Sequence[Kill | Trap], seed: int) -> Survived:
    """Runs the job through the storm to exit code 0. Raises AssertionError when it ends in another way."""
    dice = random.Random(f"victims {seed}")
    result = Survived()
    began = time.monotonic()
    before = faults.captioned(ground.folder)

    def start() -> None:
        result.starts += 1
        ground.start(arguments)

    start()
    for kill in sorted(kills, key=lambda kill: kill.captions):
        if not ground.wait_for(before + kill.captions):
            if ground.finished() == 0:
                break
            start()  # a driver that died at an armed point
            ground.wait_for(before + kill.captions)
        if isinstance(kill, Trap):
            faults.arm(ground.folder, [kill.point])
            result.kills[kill.point] += 1
            continue
        victim: Victim = kill.victim
        if not ground.kill(victim, dice):  # no task is at work just now, and there always is a generate actor
            victim = "generate"
            ground.wait_for_worker(victim)
            ground.kill(victim, dice)
        result.kills[victim] += 1
        if victim == "driver":
            start()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (code := ground.finished()) != 0:
        assert code in (None, -9), f"exit code {code}; the driver said:\n{ground.said()[-3000:]}"
        assert time.monotonic() < deadline, f"no end; the driver said:\n{ground.said()[-3000:]}"
        if code == -9:
            start()
        time.sleep(0.05)
    result.kills -= Counter(name.rpartition("-")[0] for name in faults.armed(ground.folder))
    result.captions = faults.captioned(ground.folder) - before
    result.seconds = time.monotonic() - began
    return result
