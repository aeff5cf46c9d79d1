"""Ten thousand requests through one engine: does host memory stay flat, does every request come back?

    python -m benchmarks.engine_soak
    python -m benchmarks.engine_soak --family fuyu --requests 100000

Two callers feed one engine with images of changing sizes and texts alone, greedy and sampled. A table of resident
memory by requests served, then one line of JSON: resident memory after the first tenth and at the end, requests that
came back, cache tokens still held, and the longest wait of a request, in requests that came back during it.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock, Thread

import numpy as np
import torch

import actors  # noqa: F401  (hides a torchvision that does not match torch)
from actors.engine import Request, Sampling
from actors.engine.engine import ContinuousEngine
from actors.families import FAMILIES, Family, user_message
from benchmarks.engine_models import build

CALLERS = 2


class Count:
    """What came back so far, over all callers."""

    def __init__(self, total: int) -> None:
        self.total, self.served, self.longest = total, 0, 0
        self.memory: list[tuple[int, float]] = []
        self._lock = Lock()

    def note(self, served_before: int) -> None:
        """A request came back that was taken when `served_before` had."""
        with self._lock:
            self.served += 1
            self.longest = max(self.longest, self.served - served_before)
            if self.served % (self.total // 10) == 0:
                self.memory.append((self.served, resident_mib()))
                print(f"{self.served:>9} served {self.memory[-1][1]:>9.1f} MiB resident", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="llava_onevision", choices=FAMILIES)
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        family, model = build(options.family, "toy", Path(folder), torch.float32, torch.device("cpu"))
        engine = ContinuousEngine(family, model)
        count = Count(options.requests)
        callers = [
            Thread(target=_call, args=(engine, family, count, index, options.requests // CALLERS))
            for index in range(CALLERS)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    first, last = count.memory[0][1], count.memory[-1][1]
    result = {"family": options.family, "requests": options.requests, "served": count.served}
    memory = {"mib_after_a_tenth": round(first, 1), "mib_at_the_end": round(last, 1)}
    rest = {"cache_tokens_held": engine.cache.used, "longest_wait_in_requests": count.longest}
    print(json.dumps({"benchmark": "engine_soak", **result, **memory, **rest}))


def _call(engine: ContinuousEngine, family: Family, count: Count, caller: int, requests: int) -> None:
    taken: dict[object, int] = {}

    def rows() -> Iterator[Request]:
        random = np.random.default_rng(caller)
        for key in range(requests):
            taken[key] = count.served
            yield _row(family, random, key)

    for done in engine.generate(rows()):
        if done.error is not None:
            raise RuntimeError(f"request {done.key}: {done.error}")
        count.note(taken.pop(done.key))


def _row(family: Family, random: np.random.Generator, key: int) -> Request:
    images = int(key % 8 != 0)  # every eighth is text alone
    sizes = [(int(random.integers(20, 300)), int(random.integers(20, 300))) for _ in range(images)]
    layouts = family.layout(sizes)
    tiles = sum(layout.tiles for layout in layouts)
    return Request(
        key=key,
        token_ids=family.prompt([user_message("describe the image", images=images)], layouts),
        pixels=random.integers(0, 256, (tiles, *family.tile_shape), dtype=np.uint8),
        layouts=layouts,
        sampling=Sampling(
            max_new_tokens=int(random.integers(1, 16)), temperature=float(key % 3 == 0), seed=key
        ),
    )


def resident_mib() -> float:
    """This process's resident memory, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
