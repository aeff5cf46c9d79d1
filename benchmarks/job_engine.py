"""The engine alone under the load of benchmarks/job.py: all rows decoded, tiled and tokenised in memory before the
clock starts. Prints seconds by the clock, and of CPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from actors.engine import Request, Sampling, build_engine
from actors.families import load_family, load_model, user_message
from actors.images.decode import decode


def main(source: str, checkpoint: str, _: str, prompt: str, new_tokens: str) -> None:
    family = load_family(checkpoint)
    requests: list[Request] = []
    for path in sorted(Path(source).iterdir()):
        for data in pq.read_table(path)["image"].to_pylist():
            picture = decode(data, 1 << 30)
            layouts = family.layout([(picture.shape[1], picture.shape[2])])
            requests.append(
                Request(
                    key=len(requests),
                    token_ids=family.prompt([user_message(prompt, images=1)], layouts),
                    pixels=family.tile(picture, layouts[0]).numpy(),
                    layouts=layouts,
                    sampling=Sampling(max_new_tokens=int(new_tokens)),
                )
            )
    engine = build_engine("continuous", family, load_model(checkpoint))
    began, used = time.perf_counter(), time.process_time()
    failed = [done.error for done in engine.generate(requests) if done.error is not None]
    assert not failed, failed[0]
    print(time.perf_counter() - began, time.process_time() - used)


if __name__ == "__main__":
    main(*sys.argv[1:])
