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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from actors.engine import Sampling
from actors.generate import GenerateConfig
from actors.preprocess import PreprocessConfig
from pipeline.input.columns import needed_columns
from pipeline.input.shards import Shard
from pipeline.input.source import ShardSource, ShardWork
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.state import Published
from pipeline.run import cluster, placement
from pipeline.run.checkpoint import model_path
from pipeline.run.crashes import RayAttempts, watch
from pipeline.run.failing import AllFailed, all_failed
from pipeline.run.feeding import BLOCK_ROWS, generate_pool
from pipeline.run.progress import Progress
from pipeline.run.sealing import Sealed, Task, seal
from pipeline.run.session import Session
from pipeline.run.stages import DrainingPreprocess, PublishingGenerate, Report, reports_in
from pipeline.spec.job_spec import JobSpec, ResourcesSpec
from pipeline.storage.lease import Fence

# One read task yields hundreds of rows a second, many times what a replica captions. Each holds a shard open, and the
# journal has the parts of open shards: so no more are read at once than are needed.
_REPLICAS_A_READ = 4
_FEWEST_READS = 8


def dataset(
    spec: JobSpec, work: Sequence[ShardWork], kept: pa.Schema, ledger: Ledger, fence: Fence, folder: str
) -> ray.data.Dataset:
    """The lazy Ray Data pipeline over the rows of `work`, whose captions become parts in `folder` of `ledger`.

    Its rows are those of stages.py: a report of each block. Ray is initialised.
    """
    source = ShardSource(work, spec, needed_columns(spec, work[0].shard.schema), kept, fence)
    preprocess, generate = spec.resources.preprocess, spec.resources.generate
    register = watch()
    return (
        ray.data.read_datasource(
            source,
            num_cpus=cluster.IO_TASK_CPUS,
            override_num_blocks=len(work),
            compute=TaskPoolStrategy(size=min(reads_at_once(spec.resources), len(work))),
        )
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
            compute=generate_pool(generate),
            num_cpus=generate.cpus,
            num_gpus=generate.gpus or None,
        )
    )


def reads_at_once(resources: ResourcesSpec) -> int:
    """How many shards are read at once, at most."""
    return max(_FEWEST_READS, resources.generate.replicas[1] // _REPLICAS_A_READ)


def drive(
    spec: JobSpec,
    session: Session,
    work: Sequence[ShardWork],
    kept: pa.Schema,
    folder: str,
    look: Callable[[Sequence[Published]], Progress],
) -> None:
    """Runs the pipeline over `work` to its end; its captions become parts in `folder`. Meanwhile `look` is called about
    every second with the parts that came since.

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
        blocks = dataset(spec, work, kept, session.ledger, session.lease.fence, folder)
        inbox: SimpleQueue[Report] = SimpleQueue()

        def work_through() -> None:
            for report in _reports(blocks):
                inbox.put(report)

        loaded, example = False, ""

        def look_on() -> Progress:
            nonlocal loaded, example
            turn.release_once_placed(spec.resources)
            just_loaded = not loaded and placement.model_is_loaded()
            loaded = loaded or just_loaded
            reports = list(_waiting_in(inbox))
            session.storage_retries += sum(report.storage_retries for report in reports)
            session.engines_ready(report.engine for report in reports if report.engine)
            example = example or next((report.example for report in reports if report.example), "")
            progress = replace(look([part for report in reports for part in report.parts]), loaded=loaded)
            if just_loaded and not progress.captioned:
                session.show.phase("captioning the first rows")
            return progress

        def lacking() -> str:
            return placement.lacking(spec.resources, placement.standing(), dead_before)

        def verdict(progress: Progress) -> AllFailed | None:
            limit, output = spec.limits.stop_after_failures, session.ledger.storage.url
            return all_failed(progress, limit, example, output, folder)

        session.watch(work_through, look_on, lacking, verdict)


def remote_sealing(ledger: Ledger, kept: pa.Schema) -> Callable[[Shard], Task]:
    """Seals a shard in a small task, somewhere on the cluster."""
    remote = ray.remote(num_cpus=cluster.IO_TASK_CPUS)(seal)
    return lambda shard: _RayTask(remote.remote(ledger, kept, shard))


@dataclass(frozen=True, slots=True)
class _RayTask:
    ref: ray.ObjectRef

    def done(self) -> bool:
        return bool(ray.wait([self.ref], timeout=0)[0])

    def result(self) -> Sealed:
        sealed: Sealed = ray.get(self.ref)
        return sealed


def _reports(blocks: ray.data.Dataset) -> Iterator[Report]:
    """Each as soon as it is there: with prefetching, one is kept back until the next has come. (The iterator over
    references does neither, but a driver that gives up while it is used exits with 1, whatever it returned.)"""
    for block in blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from reports_in(block)


def _waiting_in(inbox: SimpleQueue[Report]) -> Iterator[Report]:
    try:
        while True:
            yield inbox.get_nowait()
    except Empty:
        return


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
