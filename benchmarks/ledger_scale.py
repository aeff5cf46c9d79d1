"""The ledger's bookkeeping at scale: `python -m benchmarks.ledger_scale [--rows R] [--shards S] [--replicas N]`.

What the driver of a long run keeps, and what a look at it costs; and how long the next run takes to know what is done.
Journal, sealing, progress, footers and planning are the product's. The cluster is not there: blocks come back in random
order from as many shards as are read at once and as many blocks as the replicas hold, and a shard is sealed one look
after its last row. For the resume, half of the shards are sealed and those that were being read lie in parts, as files
on a local disk; their footers are real, and the tables beneath have one row. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.schema import RESULT_SCHEMA
from pipeline.dataflow import progress_since
from pipeline.input.rows import RowSet
from pipeline.input.shards import Shard, output_name
from pipeline.ledger.digest import DIGEST_ROWS
from pipeline.ledger.entries import Entry, RowStats, to_parquet
from pipeline.ledger.journal import Journal
from pipeline.ledger.ledger import DATA, JOURNAL, Ledger
from pipeline.ledger.state import Plan, Published, ShardState
from pipeline.run.sealing import Sealed, Sealing
from pipeline.spec.job_spec import GenerateResources, ResourcesSpec

ROWS_A_SECOND = (
    4  # of a replica: LLaVA-OneVision 7B at 7,300 visual tokens a row is bound by prefill at about that
)
_BLOCKS_A_REPLICA = 8  # in its engine, or waiting for it
_LISTS_A_SEAL = 2  # of the shard's folder: before it is sealed, and before its parts are deleted
_LISTS_A_RUN = 12  # of the journal and of the sealed shards: two plans when it begins, four when it ends

Block = tuple[Shard, int, int]
"""A shard, and the first row and the one behind the last."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger_scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--replicas", type=int, default=512)
    options = parser.parse_args(arguments)
    sizes = (options.rows, options.shards, options.replicas)
    with tempfile.TemporaryDirectory(prefix="tessera-ledger-") as folder:
        write_half(folder, *sizes)
        found = {**apart(run, *sizes), **apart(resume, folder, *sizes)}
    print("\n".join(f"{name:22}{value:>14,}" for name, value in found.items()))
    print(
        json.dumps({"benchmark": "ledger_scale", "rows": options.rows, "replicas": options.replicas, **found})
    )


def run(rows: int, shards: int, replicas: int) -> dict[str, float]:
    """One run from its first row to its last: what the driver holds, and its longest look."""
    from pipeline.run.stages import Report, reports_in  # loads Ray, as a driver does

    plan = Plan(tuple(map(ShardState.untouched, input_of(rows, shards))))
    journal = Journal(plan)
    tasks: dict[Shard, Future[Sealed]] = {}
    sealing = Sealing(journal, lambda shard: tasks.setdefault(shard, Future()))
    looks, longest, most_parts = 0, 0.0, 0
    for blocks in in_looks(plan, replicas):
        reports = [Report((record(*block),), "", 0).to_block() for block in blocks]
        for shard, task in tasks.items():
            task.set_result(Sealed(RowStats(shard.rows)))
        tasks.clear()
        began = time.perf_counter()
        journal.add(part for block in reports for report in reports_in(block) for part in report.parts)
        sealing.collect()
        sealing.advance()
        progress = progress_since(plan.standing, journal.standing, 1.0)
        longest = max(longest, time.perf_counter() - began)
        looks, most_parts = looks + 1, max(most_parts, journal.parts)
    assert progress.done == progress.captioned == rows
    hours = rows / (replicas * ROWS_A_SECOND) / 3600
    return {
        "parts_at_once_max": most_parts,
        "look_seconds_max": round(longest, 4),
        "driver_peak_mib": _peak_mib(),
        "lists_per_hour": round((_LISTS_A_SEAL * shards + _LISTS_A_RUN) / hours),
    }


def resume(folder: str, rows: int, shards: int, replicas: int) -> dict[str, float]:
    """The next run's driver: from its first look at the output to its list of what remains."""
    found = input_of(rows, shards)
    began = time.perf_counter()
    before = Ledger(folder)
    before.plan(found)
    ledger = Ledger(folder)  # under the lease
    ledger.learn(before)
    plan = ledger.plan(found)
    journal = Journal(plan)
    work = [(state.shard, state.remaining) for state in plan.to_caption]
    seconds = time.perf_counter() - began
    assert journal.standing == plan.standing and sum(len(left) for _, left in work) == rows - plan.rows_done
    return {
        "resume_parts": journal.parts,
        "resume_seconds": round(seconds, 2),
        "resume_peak_mib": _peak_mib(),
    }


def input_of(rows: int, shards: int) -> list[Shard]:
    schema = pa.schema([("id", pa.string())])
    sizes = [rows * (number + 1) // shards - rows * number // shards for number in range(shards)]
    return [
        Shard(name, f"s3://bucket/images/{name}", size, f"{number:012x}", 1 << 30, schema)
        for number, size in enumerate(sizes)
        for name in [f"part-{number:05}.parquet"]
    ]


def blocks_of(shard: Shard) -> list[Block]:
    from pipeline.run.feeding import BLOCK_ROWS

    return [(shard, start, min(start + BLOCK_ROWS, shard.rows)) for start in range(0, shard.rows, BLOCK_ROWS)]


def in_looks(plan: Plan, replicas: int) -> Iterator[list[Block]]:
    """The blocks that are captioned between two looks, a second apart: in random order, from the shards being read."""
    dice, limit = random.Random(1), _reads(replicas)
    waiting = iter(plan.shards)
    reading: list[list[Block]] = []
    held: list[Block] = []
    while True:
        while len(reading) < limit and (state := next(waiting, None)):
            reading.append(blocks_of(state.shard)[::-1])
        while reading and len(held) < replicas * _BLOCKS_A_REPLICA:
            place = dice.randrange(len(reading))
            held.append(reading[place].pop())
            if not reading[place]:
                del reading[place]
        if not held:
            return
        done = []
        for _ in range(min(len(held), max(1, round(replicas * ROWS_A_SECOND / 32)))):
            place = dice.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            done.append(held.pop())
        yield done


def record(shard: Shard, start: int, stop: int) -> Published:
    """The record of a block's part, as long as a real one."""
    stats = RowStats(stop - start, {}, 64 * 7300, 64 * 7200, 64 * 60)
    path = f"{JOURNAL}/{shard.name}/part-{random.getrandbits(80):020x}.parquet"
    return Published(
        path, stop - start, {shard.name: Entry(shard.fingerprint, RowSet(((start, stop),)), stats)}
    )


def write_half(folder: str, rows: int, shards: int, replicas: int) -> None:
    """Half of the shards sealed, and of those that were being read, on average half of the blocks in parts."""
    dice, found, reads = random.Random(1), input_of(rows, shards), _reads(replicas)
    table = pa.table({field.name: pa.nulls(1, field.type) for field in RESULT_SCHEMA})
    for shard in found[: shards // 2]:
        digests = tuple(f"{dice.getrandbits(64):016x}" for _ in range(0, shard.rows, DIGEST_ROWS))
        entry = Entry(shard.fingerprint, RowSet.span(shard.rows), RowStats(shard.rows), digests)
        _write(Path(folder, DATA, output_name(shard.name)), to_parquet(table, {shard.name: entry}, True))
    for shard in found[shards // 2 :][:reads]:
        for block in dice.sample(blocks := blocks_of(shard), len(blocks) // 2):
            part = record(*block)
            _write(Path(folder, part.path), to_parquet(table, part.entries, False))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _reads(replicas: int) -> int:
    from pipeline.run.graph import reads_at_once

    return reads_at_once(ResourcesSpec(generate=GenerateResources(replicas=(1, replicas))))


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def apart(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """In a process of its own, whose memory is only this function's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    main()
