"""Fills one replica on the cluster at RAY_ADDRESS with as many blocks as feed a GPU's engine; prints their number."""

import threading

import pyarrow as pa
import ray
import ray.data

from pipeline.run.feeding import blocks_at_once, generate_pool
from pipeline.spec.job_spec import GenerateResources

GENERATE = GenerateResources(replicas=(1, 1))
BLOCKS = blocks_at_once(GENERATE)


class Meeting:
    """A stage whose every call waits for as many more as are to run beside it."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(BLOCKS)

    def __call__(self, block: pa.Table) -> pa.Table:
        self._barrier.wait(timeout=120)  # raises, and ends the job, where they never meet
        return block


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    blocks = ray.data.range(BLOCKS, override_num_blocks=BLOCKS).map_batches(
        Meeting, batch_size=None, batch_format="pyarrow", compute=generate_pool(GENERATE), num_cpus=0
    )
    print(blocks.count())
