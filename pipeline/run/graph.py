"""The Ray graph: read -> split -> preprocess -> generate and publish, and the run that drives it.

    ShardSource ──> repartition ──> Preprocess ──> Generate ──> journal parts
    a task a shard,  BLOCK_ROWS      CPU actors:    GPU actors:
    only the rows    rows a block    decode, tile,  the engine;
    that remain                      tokenise       a part a block

Ray Data moves the blocks, scales the actor pools and holds a fast stage back when the next one falls behind.
`prepare_ray` must have been called before this module is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from actors.engine import Sampling
from actors.generate import GenerateConfig
from actors.preprocess import PreprocessConfig
from pipeline.input.columns import needed_columns
from pipeline.input.shards import Shard
from pipeline.input.source import ShardSource, ShardWork
from pipeline.ledger.ledger import Ledger
from pipeline.run import cluster, placement
from pipeline.run.checkpoint import model_path
from pipeline.run.crashes import RayAttempts, watch
from pipeline.run.failing import AllFailed, all_failed
from pipeline.run.progress import Progress
from pipeline.run.sealing import Sealing
from pipeline.run.session import Session
from pipeline.run.stages import STORAGE_RETRIES, DrainingPreprocess, PublishingGenerate
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.lease import Fence
from pipeline.storage.retrying import RETRIES

BLOCK_ROWS = 32  # rows of a block, hence of a journal part: a kill costs a few of these
_BLOCKS_AT_ONCE = 4  # that feed one engine: it stays full while the last rows of a block finish


def dataset(
    spec: JobSpec, work: Sequence[ShardWork], kept: pa.Schema, ledger: Ledger, fence: Fence, folder: str
) -> ray.data.Dataset:
    """The lazy Ray Data pipeline over the rows of `work`, whose captions become parts in `folder` of `ledger`.

    Its rows are those of stages.py: one for each part. Ray is initialised.
    """
    source = ShardSource(work, spec, needed_columns(spec, work[0].shard.schema), kept, fence)
    preprocess, generate = spec.resources.preprocess, spec.resources.generate
    register = watch()
    return (
        ray.data.read_datasource(source, num_cpus=cluster.IO_TASK_CPUS, override_num_blocks=len(work))
        .repartition(target_num_rows_per_block=BLOCK_ROWS)
        .map_batches(
            DrainingPreprocess,
            fn_constructor_args=(fence, _preprocess_config(spec, kept), RayAttempts("preprocess", register)),
            batch_format="pyarrow",
            batch_size=None,  # a block as it comes
            zero_copy_batch=True,
            compute=ActorPoolStrategy(min_size=preprocess.replicas[0], max_size=preprocess.replicas[1]),
            num_cpus=preprocess.cpus,
        )
        .map_batches(
            PublishingGenerate,
            fn_constructor_args=(
                fence,
                _generate_config(spec, kept),
                RayAttempts("generate", register),
                ledger,
                folder,
            ),
            batch_format="pyarrow",
            batch_size=BLOCK_ROWS,
            zero_copy_batch=True,
            compute=ActorPoolStrategy(
                min_size=generate.replicas[0],
                max_size=generate.replicas[1],
                max_concurrent_calls_per_actor=_BLOCKS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=generate.cpus,
            num_gpus=generate.gpus or None,
        )
    )


def drive(
    spec: JobSpec,
    session: Session,
    work: Sequence[ShardWork],
    kept: pa.Schema,
    folder: str,
    look: Callable[[], Progress],
) -> None:
    """Runs the pipeline over `work` to its end; its captions become parts in `folder`. `look` is called meanwhile.

    Raises ClusterError where the smallest pools cannot be placed, AllFailed when there is no use in going on, and what
    `Session.watch` raises.
    """
    session.show.phase("starting Ray")
    spec = spec.model_copy(update={"resources": cluster.connect(spec.resources)})
    session.signals.install()  # Ray has put its own in place
    cluster.preflight(spec.resources, cluster.capacity())
    dead_before = placement.dead_nodes()
    with placement.wait_for_room(spec.resources, session.waiting) as turn:
        _quieten()
        session.show.phase("loading the model")
        parts = dataset(spec, work, kept, session.ledger, session.lease.fence, folder)

        def work_through() -> None:
            for part in parts.iter_rows():
                session.storage_retries += int(part[STORAGE_RETRIES])

        loaded = False

        def look_on() -> Progress:
            nonlocal loaded
            turn.release_once_placed(spec.resources)
            loaded = loaded or placement.model_is_loaded()
            return replace(look(), loaded=loaded)

        def lacking() -> str:
            return placement.lacking(spec.resources, placement.standing(), dead_before)

        def verdict(progress: Progress) -> AllFailed | None:
            return all_failed(progress, spec.limits.stop_after_failures, session.ledger, folder)

        session.watch(work_through, look_on, lacking, verdict)


class RemoteSealing(Sealing):
    """Seals shards and deletes settled parts in small tasks, somewhere on the cluster."""

    def __init__(self, ledger: Ledger, kept: pa.Schema) -> None:
        task = ray.remote(num_cpus=cluster.IO_TASK_CPUS)
        super().__init__(partial(task(_seal).remote, ledger, kept), partial(task(_discard).remote, ledger))

    def retries(self) -> int:
        """How often its tasks tried storage again; waits for them. One that failed counts for nothing: the driver then
        does what it left, and tells what is wrong."""
        return sum(map(_result, self.tasks))


def _seal(ledger: Ledger, kept: pa.Schema, shard: Shard, parts: Sequence[str]) -> int:
    ledger.seal(shard, kept, parts)
    return RETRIES.take()


def _discard(ledger: Ledger, parts: Sequence[str]) -> int:
    ledger.storage.delete(parts)
    return RETRIES.take()


def _result(task: Any) -> int:
    try:
        return int(ray.get(task))
    except ray.exceptions.RayError:
        return 0


def _preprocess_config(spec: JobSpec, kept: pa.Schema) -> PreprocessConfig:
    return PreprocessConfig(
        model_path=model_path(spec),
        revision=spec.model.revision,
        prompt_column=spec.input.prompt,
        template=spec.prompt.template,
        template_columns=spec.prompt.fields,
        system=spec.prompt.system,
        keep=tuple(kept.names),
        max_pixels=spec.limits.max_pixels,
        max_new_tokens=spec.generation.max_new_tokens,
        formats=spec.limits.formats,
    )


def _generate_config(spec: JobSpec, kept: pa.Schema) -> GenerateConfig:
    return GenerateConfig(
        model_path=model_path(spec),
        revision=spec.model.revision,
        dtype=spec.model.dtype,
        engine=spec.model.engine,
        sampling=Sampling(**spec.generation.model_dump()),
        keep=tuple(kept.names),
        threads=None if spec.resources.generate.gpus else int(spec.resources.generate.cpus or 1) or 1,
    )


def _quieten() -> None:
    """Leaves the terminal to our own display; Ray still writes its logs to its session folder."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
