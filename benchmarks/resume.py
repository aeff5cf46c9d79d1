"""What a kill costs, beside Ray Data's own checkpointing: `python -m benchmarks.resume [--rows R] [--kills N]`.

The same toy job, the same actors and the same cluster, once as `tessera run` and once as plain Ray Data with
`DataContext.checkpoint_config` (benchmarks/resume_ray.py). Each driver is killed at the same numbers of captions and
started again. Start-up is the time from starting the driver again to its first new caption; redone rows are captions
made minus captions needed. Prints a table, then one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from examples.toy.checkpoint import write_untrained
from examples.toy.dataset import write_dataset
from tests.chaos import faults
from tests.chaos.ground import Ground, ground
from tests.chaos.scene import Scene


@dataclass(frozen=True)
class Resumed:
    """One system's kills: seconds of each start-up (the first one is not a resume), and what it made."""

    startups: tuple[float, ...]
    captions: int
    rows_out: int
    seconds: float

    @property
    def resume_seconds(self) -> float:
        return statistics.median(self.startups[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, Resumed] = {}
    with tempfile.TemporaryDirectory(prefix="tessera-resume-") as name:
        folder = Path(name)
        write_dataset(folder / "in", rows=options.rows, shards=4, seed=1)
        write_untrained("llava_onevision", folder / "model")
        scene = Scene(name, str(folder / "model"))
        places = [str(folder / part) for part in ("in", "ray", "checkpoints", "model")]
        commands = {"tessera": ("jobs.cli", scene.run()), "ray data": ("benchmarks.resume_ray", places)}
        outputs = {"tessera": folder / "out/data", "ray data": folder / "ray"}
        for system, (module, arguments) in commands.items():
            with ground(folder / f"ground {system}", nodes=2) as here:
                results[system] = measure(
                    here, module, arguments, outputs[system], options.rows, options.kills
                )
    print(table(options.rows, options.kills, results))
    print(json.dumps(record(options.rows, options.kills, results)))


def measure(
    here: Ground, module: str, arguments: Sequence[str], output: Path, rows: int, kills: int
) -> Resumed:
    """Kills and restarts one system's driver at evenly spread numbers of captions, then lets it finish."""
    startups: list[float] = []
    began = time.monotonic()
    for turn in range(kills + 1):
        made, started = faults.captioned(here.folder), time.monotonic()
        here.start(arguments, module)
        assert here.wait_for(made + 1), here.said()[-3000:]
        startups.append(time.monotonic() - started)
        if turn < kills and here.wait_for(round(rows * (turn + 1) / (kills + 1))):
            here.kill("driver", random.Random(turn))
    assert here.driver and here.driver.wait(900) == 0, here.said()[-3000:]
    rows_out = sum(pq.read_metadata(path).num_rows for path in output.rglob("*.parquet"))
    return Resumed(tuple(startups), faults.captioned(here.folder), rows_out, time.monotonic() - began)


def record(rows: int, kills: int, results: dict[str, Resumed]) -> dict[str, object]:
    figures = {
        system.replace(" ", "_"): {
            "startup_seconds": round(result.startups[0], 2),
            "resume_seconds": round(result.resume_seconds, 2),
            "redone_rows": result.captions - rows,
            "rows_out": result.rows_out,
            "seconds": round(result.seconds, 1),
        }
        for system, result in results.items()
    }
    return {"benchmark": "resume", "rows": rows, "kills": kills, **figures, "cores": os.cpu_count()}


def table(rows: int, kills: int, results: dict[str, Resumed]) -> str:
    lines = [
        f"{rows:,} rows, the driver killed {kills} times",
        "",
        f"{'':36}" + "".join(f"{s:>12}" for s in results),
    ]
    each = list(results.values())
    for label, values in (
        ("first start to first caption, s", [f"{result.startups[0]:.1f}" for result in each]),
        ("resume to first caption, s (median)", [f"{result.resume_seconds:.1f}" for result in each]),
        ("rows redone", [f"{result.captions - rows:,}" for result in each]),
        ("rows in the output", [f"{result.rows_out:,}" for result in each]),
        ("seconds in all", [f"{result.seconds:.1f}" for result in each]),
    ):
        lines.append(f"{label:36}" + "".join(f"{value:>12}" for value in values))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
