"""The dataflow: read -> split -> preprocess -> generate and publish, and the loop that watches it.

    input shards                                                               output
    ────────────> ShardSource ──> repartition ──> Preprocess ──> Generate ────────────> journal parts
                  a task a shard,  BLOCK_ROWS      CPU actors:    GPU actors:                │ seal
                  only the rows    rows a block    decode, tile,  the engine;                v
                  that remain                      tokenise       a part a block      data/<shard>.parquet

Ray Data moves the blocks, scales the actor pools and holds a fast stage back when the next one falls behind.

What is done stands in the output's files and nowhere else. The driver lists them (`Ledger.plan`) to show progress, to
seal shards whose last row has arrived and to delete the parts they were made of (sealing.py), so killing the driver,
an actor or the whole cluster loses only the blocks in flight, and the same command again does only what is missing.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actors.checkpoint_files import CheckpointError, HubError, check_path
from pipeline.amend import failed_rows, merge_retried
from pipeline.columns import job_schema, needed_columns
from pipeline.damage import failed_shards
from pipeline.entries import Stats
from pipeline.failing import AllFailed, all_failed
from pipeline.files import absolute
from pipeline.lease import Fence
from pipeline.ledger import JOURNAL, RETRY, Ledger
from pipeline.outcome import JobError, Outcome
from pipeline.overlap import refuse_other_dataset, refuse_overlap
from pipeline.progress import Display, Progress
from pipeline.sealing import Sealing
from pipeline.session import Session, open_session
from pipeline.shards import Input, Shard, discover
from pipeline.spec import JobSpec, SpecError
from pipeline.state import Plan, Verification
from pipeline.weather import RETRIES

if TYPE_CHECKING:
    import ray

    from pipeline.source import ShardWork

BLOCK_ROWS = 32  # rows of a block, hence of a journal part: a kill costs a few of these
_BLOCKS_AT_ONCE = 4  # that feed one engine: it stays full while the last rows of a block finish

# Ray Data shares a cluster out among its drivers, and a driver that was killed keeps its share for this long: 180 s
# by default, in which a run that goes on with its work may get no CPU at all. Live drivers ask again every 10 s.
# Ray reads it when ray.data is imported, which is later.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")

# A run that lost its lease leaves the cluster while its dataflow's threads still work. Their next call would join the
# cluster again, as another driver, and say so below our last words. Read when ray is imported, which is later.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def run(spec: JobSpec, show: Display, take_over: bool = False) -> Outcome:
    """Captions every row that has no caption yet, seals, verifies, and says how it went.

    Raises SpecError or LedgerMismatch for a job that must not start, LeaseHeld where another run is at it (unless
    `take_over`), ClusterError where it cannot be placed, JobError, AllFailed, LeaseLost or Stopped for one that ended
    early; whatever was published by then is kept.
    """
    found, kept, ledger = _looked_at(spec, show)
    shards = found.shards
    plan = ledger.plan(shards)
    if not found.unreadable and ledger.succeeded(plan) and not ledger.retried():
        verification = verified(ledger, found, show)
        failed = failed_shards(ledger, found, plan)
        return Outcome.of(spec, found, verification, failed)  # nothing is written, so no lease is needed
    if plan.to_caption:
        _check_checkpoint(spec, show)
    with open_session(spec, take_over, show) as session:
        ledger = session.ledger
        ledger.bind(spec)
        plan = ledger.plan(shards)
        if not plan.finished:
            ledger.clear_success()
        if plan.to_caption:
            _caption(spec, session, shards, kept, plan)
        show.phase("sealing")
        for state in ledger.plan(shards).to_seal:
            ledger.seal(state.shard, kept, state.parts)
        merge_retried(ledger, shards)
        ledger.sweep(shards)
        verification = verified(ledger, found, show)
        _mark(ledger, verification)
        stats = verification.stats
        outcome = Outcome.of(
            spec,
            found,
            verification,
            failed_shards(ledger, found, ledger.plan(shards)),
            captioned=stats.rows - plan.rows_done,
            generated_tokens=stats.generated_tokens - plan.stats.generated_tokens,
            seconds=session.seconds,
            storage_retries=session.retries(),
        )
        session.record = outcome.record()
        return outcome


def retry(spec: JobSpec, kinds: Collection[str], show: Display, take_over: bool = False) -> Outcome:
    """Tries the error rows of some kinds again and amends their sealed shards; raises as `run` does."""
    found, kept, _ = _looked_at(spec, show)
    shards = found.shards
    _check_checkpoint(spec, show)
    with open_session(spec, take_over, show) as session:
        ledger = session.ledger
        merge_retried(ledger, shards)  # what a killed retry had done already
        failed = failed_rows(ledger, shards, kinds)
        total = sum(len(rows) for _, rows in failed)
        if total:
            from pipeline.source import ShardWork

            ledger.clear_success()
            work = [ShardWork(shard, rows) for shard, rows in failed]
            generate(spec, session, work, kept, RETRY, lambda: _retried(session, total))
            show.phase("amending sealed shards")
            merge_retried(ledger, shards)
        verification = verified(ledger, found, show)
        _mark(ledger, verification)
        outcome = Outcome.of(
            spec,
            found,
            verification,
            failed_shards(ledger, found, ledger.plan(shards)),
            captioned=total,
            seconds=session.seconds,
            storage_retries=session.retries(),
        )
        session.record = outcome.record()
        return outcome


def _retried(session: Session, total: int) -> Progress:
    stats = Stats.total(entry.stats for part in session.ledger.retried() for entry in part.entries.values())
    return Progress(
        total=total,
        done=stats.rows,
        errors=stats.failed,
        captioned=stats.rows,
        generated_tokens=stats.generated_tokens,
        seconds=session.seconds,
        succeeded=stats.rows - stats.failed,
        failed=stats.errors,
    )


def _looked_at(spec: JobSpec, show: Display) -> tuple[Input, pa.Schema, Ledger]:
    """The input, the schema of its kept columns and the output; raises what speaks against the job."""
    show.phase("looking at input and output")
    found = discover(spec.input)
    refuse_overlap(spec, found)
    kept = job_schema(spec, found.shards)
    _check_model_path(spec)
    ledger = Ledger(spec.output.path)
    ledger.check(spec)
    refuse_other_dataset(spec, found, ledger)
    return found, kept, ledger


def verified(ledger: Ledger, found: Input, show: Display) -> Verification:
    """The recount of an output that should be complete, by its footers; JobError if it is not."""
    show.phase("verifying")
    verification = ledger.verify(found.shards, found.unreadable, footers_only=True)
    if not verification.ok:
        raise JobError(f"the output at {ledger.storage.url} is {verification.describe()}")
    return verification


def _mark(ledger: Ledger, verification: Verification) -> None:
    """`_SUCCESS` says that every row of the input is there: not while a shard cannot be read."""
    if verification.unreadable:
        ledger.clear_success()
    else:
        ledger.write_success(verification)


def dataset(
    spec: JobSpec, work: Sequence[ShardWork], kept: pa.Schema, ledger: Ledger, fence: Fence, folder: str
) -> ray.data.Dataset:
    """The lazy Ray Data pipeline over the rows of `work`, whose captions become parts in `folder` of `ledger`.

    Its rows are those of stages.py: one for each part. Ray is initialised.
    """
    import ray.data
    from ray.data import ActorPoolStrategy

    from pipeline.cluster import IO_TASK_CPUS
    from pipeline.deaths import RayAttempts, watch
    from pipeline.source import ShardSource
    from pipeline.stages import Generate, Preprocess

    source = ShardSource(work, spec.input, needed_columns(spec, work[0].shard.schema), kept, fence)
    preprocess, generate = spec.resources.preprocess, spec.resources.generate
    register = watch()
    return (
        ray.data.read_datasource(source, num_cpus=IO_TASK_CPUS, override_num_blocks=len(work))
        .repartition(target_num_rows_per_block=BLOCK_ROWS)
        .map_batches(
            Preprocess,
            fn_constructor_args=(fence, _preprocess_config(spec, kept), RayAttempts("preprocess", register)),
            batch_format="pyarrow",
            batch_size=None,  # a block as it comes
            zero_copy_batch=True,
            compute=ActorPoolStrategy(min_size=preprocess.replicas[0], max_size=preprocess.replicas[1]),
            num_cpus=preprocess.cpus,
        )
        .map_batches(
            Generate,
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


def _caption(spec: JobSpec, session: Session, shards: Sequence[Shard], kept: pa.Schema, plan: Plan) -> None:
    """Runs the pipeline over what remains, and meanwhile shows progress and seals what is complete."""
    import ray

    from pipeline.cluster import IO_TASK_CPUS
    from pipeline.source import ShardWork

    work = [ShardWork(state.shard, state.remaining) for state in plan.to_caption]
    task = ray.remote(num_cpus=IO_TASK_CPUS)
    sealing = Sealing(
        partial(task(_seal).remote, session.ledger, kept), partial(task(_discard).remote, session.ledger)
    )

    def look() -> Progress:
        now = session.ledger.plan(shards)
        if not session.draining:
            sealing.advance(now)
        good, good_before = (p.stats.rows - p.stats.failed for p in (now, plan))
        return Progress(
            total=now.rows,
            done=now.rows_done,
            errors=now.stats.failed,
            captioned=now.rows_done - plan.rows_done,
            generated_tokens=now.stats.generated_tokens - plan.stats.generated_tokens,
            seconds=session.seconds,
            succeeded=good - good_before,
            failed=Counter(now.stats.errors) - Counter(plan.stats.errors),
        )

    generate(spec, session, work, kept, JOURNAL, look)
    session.storage_retries += sum(map(_retries_of, sealing.tasks))


def _seal(ledger: Ledger, kept: pa.Schema, shard: Shard, parts: Sequence[str]) -> int:
    """Seals a shard, somewhere on the cluster; returns how often storage was tried again."""
    ledger.seal(shard, kept, parts)
    return RETRIES.take()


def _discard(ledger: Ledger, parts: Sequence[str]) -> int:
    """Deletes settled parts, somewhere on the cluster; returns how often storage was tried again."""
    ledger.storage.delete(parts)
    return RETRIES.take()


def _retries_of(task: Any) -> int:
    """What a task returned; 0 if it failed: the driver then does what it left, and tells what is wrong."""
    import ray

    try:
        return int(ray.get(task))
    except ray.exceptions.RayError:
        return 0


def generate(
    spec: JobSpec,
    session: Session,
    work: Sequence[ShardWork],
    kept: pa.Schema,
    folder: str,
    look: Callable[[], Progress],
) -> None:
    """Runs the pipeline over `work` to its end; its captions become parts in `folder`. `look` is called meanwhile.

    Raises AllFailed when there is no use in going on.
    """
    session.show.phase("starting Ray")
    from pipeline import cluster, placement
    from pipeline.stages import STORAGE_RETRIES

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


def _check_model_path(spec: JobSpec) -> None:
    """Told at once and without a model library: no such folder, or weights that are missing or damaged."""
    try:
        check_path(_model_path(spec))
    except CheckpointError as error:
        raise SpecError(f"model.path: {error}") from None


def _check_checkpoint(spec: JobSpec, show: Display) -> None:
    """Reads the checkpoint's configuration and tokenizer, before anything is written or a cluster is kept waiting."""
    from actors.checkpoint_hub import find_checkpoint

    show.phase("looking at the checkpoint")
    field = "model.path"
    try:
        path = find_checkpoint(_model_path(spec), spec.model.revision)
        from actors.families import load_family  # imports the model libraries, for seconds

        family = load_family(path, spec.model.revision)
        family.check_chat()
        if spec.input.video is not None:
            field = "input.video"
            family.check_videos()
    except HubError as error:
        raise JobError(f"model.path: {error}") from None
    except CheckpointError as error:
        raise SpecError(f"{field}: {error}") from None


def _preprocess_config(spec: JobSpec, kept: pa.Schema) -> Any:
    from actors.preprocess import PreprocessConfig

    return PreprocessConfig(
        model_path=_model_path(spec),
        revision=spec.model.revision,
        prompt_column=spec.input.prompt,
        template=spec.prompt.template,
        template_columns=spec.prompt.fields,
        system=spec.prompt.system,
        keep=tuple(kept.names),
        max_pixels=spec.limits.max_pixels,
        max_new_tokens=spec.generation.max_new_tokens,
    )


def _generate_config(spec: JobSpec, kept: pa.Schema) -> Any:
    from actors.engine import Sampling
    from actors.generate import GenerateConfig

    return GenerateConfig(
        model_path=_model_path(spec),
        revision=spec.model.revision,
        dtype=spec.model.dtype,
        engine=spec.model.engine,
        sampling=Sampling(**spec.generation.model_dump()),
        keep=tuple(kept.names),
        threads=None if spec.resources.generate.gpus else int(spec.resources.generate.cpus or 1) or 1,
    )


def _model_path(spec: JobSpec) -> str:
    """A local checkpoint folder by its absolute path: an actor's working folder need not be the driver's."""
    return absolute(spec.model.path) if os.path.isdir(spec.model.path) else spec.model.path


def _quieten() -> None:
    """Leaves the terminal to our own display; Ray still writes its logs to its session folder."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
