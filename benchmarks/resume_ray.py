"""The baseline of benchmarks/resume.py: the same actors in plain Ray Data with its own checkpointing.

`python -m benchmarks.resume_ray INPUT OUTPUT CHECKPOINTS MODEL`: read_parquet, Preprocess, Generate, write_parquet,
with `DataContext.checkpoint_config` keyed by the column `id`. Blocks of 32 rows, as in Tessera.
"""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from actors.engine import Sampling
from actors.generate import Generate, GenerateConfig
from actors.preprocess import Preprocess, PreprocessConfig
from actors.schema import ERROR, ERROR_TYPE, FINGERPRINT, IMAGES, ROW, SHARD

KEEP = ("id", "truth")
BLOCK_ROWS = 32


def to_block(table: pa.Table) -> pa.Table:
    """What Tessera's source would give Preprocess."""
    count = table.num_rows
    images = [[cell["bytes"]] if cell and cell["bytes"] else [b""] for cell in table["image"].to_pylist()]
    return (
        table.drop_columns(["image"])
        .append_column(SHARD, pa.array(["all"] * count))
        .append_column(ROW, pa.array(np.array([int(name) for name in table["id"].to_pylist()], np.int64)))
        .append_column(FINGERPRINT, pa.array(["f"] * count))
        .append_column(IMAGES, pa.array(images, pa.list_(pa.large_binary())))
        .append_column(ERROR, pa.nulls(count, ERROR_TYPE))
    )


def main(source: str, output: str, checkpoints: str, model: str) -> None:
    ray.init(log_to_driver=False)
    DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=checkpoints
    )
    preprocess = PreprocessConfig(model, None, "prompt", "", (), None, KEEP, 100_000_000, 2)
    generate = GenerateConfig(model, None, "auto", "continuous", Sampling(max_new_tokens=2), KEEP)
    one = ActorPoolStrategy(size=1)
    rows = ray.data.read_parquet(source).repartition(target_num_rows_per_block=BLOCK_ROWS)
    prepared = rows.map_batches(to_block, batch_format="pyarrow", batch_size=None).map_batches(
        Preprocess, fn_constructor_args=(preprocess,), batch_format="pyarrow", batch_size=None, compute=one
    )
    captions = prepared.map_batches(
        Generate, fn_constructor_args=(generate,), batch_format="pyarrow", batch_size=BLOCK_ROWS, compute=one
    )
    captions.write_parquet(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
