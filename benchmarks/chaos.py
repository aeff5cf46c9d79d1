"""A job under fire: `python -m benchmarks.chaos --kills N --seed S [--s3] [--rows R]`.

A toy job runs once undisturbed and once through a storm: the driver, actors, tasks and whole nodes are killed at
seeded moments, some of them inside publishing and sealing, and with --s3 one request in twenty to storage is throttled,
stalled, cut or reset. The two outputs are then compared row by row. Prints a table, then one JSON line last.

The model is a real one (LLaVA-OneVision, random weights) that makes two tokens a row, so that thousands of rows take
minutes on two cores: what dies and what is done again does not depend on how long captions are. `redone_fraction` is
the share of all rows that one kill caused to be captioned again, counted caption by caption inside the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.toy.checkpoint import write_untrained
from pipeline.storage.storage import Storage
from tests.chaos.ground import Ground, ground
from tests.chaos.s3 import stormy_bucket
from tests.chaos.scene import Audit, Scene, audit, write_input
from tests.chaos.storm import POINTS, Survived, forecast, weather

SHARDS = 5
FAULTS = 0.05  # of S3 requests


def main() -> None:
    options = _options()
    with (
        tempfile.TemporaryDirectory(prefix="tessera-chaos-") as folder,
        _storage(options, Path(folder)) as (
            root,
            met,
        ),
    ):
        result = bench(options, Path(folder), root)
    print(table(options, *result, met))
    print(json.dumps(record(options, *result, met)))


def bench(options: argparse.Namespace, folder: Path, root: str) -> tuple[Survived, Survived, Audit, int]:
    """(the undisturbed run, the storm, the comparison, rows that take a caption)."""
    write_input(folder / "data", options.rows, SHARDS, options.seed)
    for path in sorted((folder / "data").iterdir()):
        Storage(root).put_atomic(f"in/{path.name}", path.read_bytes())
    write_untrained("llava_onevision", folder / "checkpoint")
    scene = Scene(root, str(folder / "checkpoint"))
    with ground(folder / "ground", nodes=2) as here:
        calm = _weather(here, scene, options, 0)
        storm = _weather(here, scene, options, options.kills)
    expected, _ = scene.captions(f"{root}/out-0")
    assert len(expected) == options.rows, f"the undisturbed run made {len(expected)} of {options.rows} rows"
    needed = sum(row[0] != "None" for row in expected.values())
    return calm, storm, audit(scene, expected, f"{root}/out-{options.kills}"), needed


def _weather(here: Ground, scene: Scene, options: argparse.Namespace, kills: int) -> Survived:
    # An object store has no moment between a written and a visible file.
    points = [point for point in POINTS if not (options.s3 and point.endswith("inside"))]
    storm = forecast(options.seed, kills, options.rows, points)
    return weather(here, scene.run(f"{scene.root}/out-{kills}"), storm, options.seed)


@contextmanager
def _storage(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Counter[str]]]:
    """(root of input and output, what befell requests to it)."""
    if not options.s3:
        yield str(folder), Counter()
        return
    with stormy_bucket(options.seed, FAULTS) as (url, proxy):
        yield url, proxy.met


def record(
    options: argparse.Namespace,
    calm: Survived,
    storm: Survived,
    result: Audit,
    needed: int,
    met: Counter[str],
) -> dict[str, object]:
    kills = storm.kills.total()
    redone = storm.captions - needed
    return {
        "benchmark": "chaos",
        "storage": "s3" if options.s3 else "local",
        "seed": options.seed,
        "rows": options.rows,
        "kills": kills,
        "lost": result.lost,
        "duplicated": result.duplicated,
        "differing": result.differing,
        "redone_rows": redone,
        "redone_fraction": round(redone / options.rows / max(kills, 1), 5),
        "starts": storm.starts,
        "storage_faults": met.total(),
        "seconds": round(storm.seconds, 1),
        "seconds_undisturbed": round(calm.seconds, 1),
        "cores": os.cpu_count(),
    }


def table(
    options: argparse.Namespace,
    calm: Survived,
    storm: Survived,
    result: Audit,
    needed: int,
    met: Counter[str],
) -> str:
    redone = storm.captions - needed
    where = "S3 in bad weather" if options.s3 else "local disk"
    lines = [
        f"{options.rows:,} rows in {SHARDS} shards on {where}, seed {options.seed}",
        "",
        f"{'':24}{'undisturbed':>14}{'storm':>14}",
        f"{'seconds':24}{calm.seconds:>14,.1f}{storm.seconds:>14,.1f}",
        f"{'drivers started':24}{calm.starts:>14}{storm.starts:>14}",
        f"{'captions made':24}{calm.captions:>14,}{storm.captions:>14,}",
        f"{'kills':24}{0:>14}{storm.kills.total():>14}",
        *(f"{'  ' + kind:24}{'':>14}{count:>14}" for kind, count in sorted(storm.kills.items())),
        *(f"{'  storage: ' + kind:24}{'':>14}{count:>14}" for kind, count in sorted(met.items())),
        f"{'rows redone':24}{calm.captions - needed:>14,}{redone:>14,}",
        f"{'  of all rows, a kill':24}{'':>14}{redone / options.rows / max(storm.kills.total(), 1):>14.2%}",
        "",
        f"lost {result.lost}, duplicated {result.duplicated}, differing {result.differing}",
        *(f"  row {name}: {expected} became {found}" for name, expected, found in result.examples),
    ]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument(
        "--s3", action="store_true", help="S3 (moto) behind a proxy with faults, not a local folder"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
