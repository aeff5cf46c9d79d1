"""What a run's engines computed on, and which paths they took: for its record, its display and `tessera status`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.engine.types import EngineRecord


def to_plain(record: EngineRecord) -> dict[str, Any]:
    """As JSON keeps it."""
    return {**asdict(record), "why": list(record.why)}


def from_plain(data: Mapping[str, Any]) -> EngineRecord:
    from actors.engine.types import (
        EngineRecord,  # here, because it loads torch, and `tessera status` needs none
    )

    return EngineRecord(**{**data, "why": tuple(data["why"])})


class Engines:
    """The engines that reported so far. Equal ones are one, with a count; an actor that died and was replaced counts
    twice."""

    def __init__(self) -> None:
        self._counts: Counter[EngineRecord] = Counter()

    def add(self, records: Iterable[EngineRecord]) -> list[str]:
        """Counts engines; lines that tell of those of a kind not met before."""
        known = set(self._counts)
        self._counts.update(records)
        return [line for record in self._counts if record not in known for line in _lines(to_plain(record))]

    def record(self) -> dict[str, Any]:
        """For the run's record: `engine`, that of most replicas, and `other_engines`, where some differ."""
        engines = [{**to_plain(record), "replicas": count} for record, count in self._counts.most_common()]
        if not engines:
            return {}
        first, *others = engines
        return {"engine": first, "other_engines": others} if others else {"engine": first}


def told(run: Mapping[str, Any]) -> list[str]:
    """The lines about the engines of a run's record; none of a run that captioned nothing."""
    if "engine" not in run:
        return []
    engines = [run["engine"], *run.get("other_engines", [])]
    alike = len(engines) == 1
    return [line for engine in engines for line in _lines(engine, 0 if alike else engine["replicas"])]


def _lines(engine: Mapping[str, Any], replicas: int = 0) -> list[str]:
    """One about the engine, and one for each part of the work that takes a slower path than its fastest. `replicas` are
    told where not all are alike."""
    paths = ", ".join(f"{part} {engine[part]}" for part in ("attention", "layers", "experts", "graphs"))
    threads = f"{engine['threads']:,} thread{'s' * (engine['threads'] != 1)}"
    count = f"{replicas:,} replica{'s' * (replicas != 1)}: " if replicas else ""
    lines = [
        f"engine: {count}{engine['engine']} on {engine['device']}, {engine['dtype']}, {threads}; {paths}"
    ]
    for reason in engine["why"]:
        part, _, against = reason.partition(": ")
        lines.append(f"{part}: {engine[part]}, because {against}" if part in engine and against else reason)
    return lines
