"""A storm: processes of a job killed at seeded moments, and the job started again until it is done.

A moment is a number of captions made, not a time: the same seed kills at the same stage of the work on a fast
machine and on a slow one.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

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


def forecast(seed: int, kills: int, captions: int, victims: Sequence[Victim] = VICTIMS) -> list[Kill | Trap]:
    """Seeded kills, evenly spread over the work with a jitter; victims and traps take turns in a seeded order."""
    dice = random.Random(seed)
    turns: list[Kill | Trap] = []
    step = captions / (kills + 1)
    while len(turns) < kills:
        kinds = [lambda at, v=v: Kill(at, v) for v in victims] + [lambda at, p=p: Trap(at, p) for p in POINTS]
        for make in dice.sample(kinds, len(kinds)):
            turns.append(make(round((len(turns) + 0.5 + dice.random()) * step)))
    return turns[:kills]


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
        elif ground.kill(kill.victim, dice):
            result.kills[kill.victim] += 1
            if kill.victim == "driver":
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
