"""The dataflow: read -> split -> preprocess -> generate -> publish, and the loop that watches it.

    input shards                                                                    output
    ────────────> ShardSource ──> repartition ──> Preprocess ──> Generate ──> JournalSink ──> journal parts
                  a task a shard,  BLOCK_ROWS      CPU actors:    GPU actors:   a part a           │ seal
                  only the rows    rows a block    decode, tile,  the engine    block              v
                  that remain                      tokenise                             data/<shard>.parquet

Ray Data moves the blocks, scales the actor pools and holds a fast stage back when the next one falls behind.

What is done stands in the output's files and nowhere else. The driver lists them (`Ledger.plan`) to show progress
and to seal shards whose last row has arrived, so killing the driver, an actor or the whole cluster loses only the
blocks in flight, and the same command again does only what is missing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.columns import job_schema, needed_columns
from pipeline.entries import Stats
from pipeline.ledger import Ledger
from pipeline.outcome import JobError, Outcome, root_cause
from pipeline.progress import Display, Progress
from pipeline.shards import Shard, discover
from pipeline.spec import JobSpec
from pipeline.state import Plan
from pipeline.storage import absolute

if TYPE_CHECKING:
    import ray

BLOCK_ROWS = 32  # rows of a block, hence of a journal part: a kill costs a few of these
_BLOCKS_AT_ONCE = 4  # that feed one engine: it stays full while the last rows of a block finish
# Between two looks at the journal, at least: looking takes no more than a fifth of the time.
_POLL_SECONDS = 1.0


def run(spec: JobSpec, show: Display) -> Outcome:
    """Captions every row that has no caption yet, seals, verifies, and says how it went.

    Raises SpecError or LedgerMismatch for a job that must not start, ClusterError for one that cannot, and JobError
    for one that broke; whatever was published by then is kept.
    """
    show.phase("looking at input and output")
    shards = discover(spec.input)
    kept = job_schema(spec, shards)
    ledger = Ledger(spec.output.path)
    ledger.bind(spec)
    plan = ledger.plan(shards)
    started = _Run(plan)
    if not plan.finished:
        ledger.clear_success()
        if plan.to_caption:
            _caption(spec, ledger, shards, kept, plan, started, show)
        show.phase("sealing")
        for state in ledger.plan(shards).to_seal:
            ledger.seal(state.shard, kept, state.parts)
        ledger.sweep(shards)
    show.phase("verifying")
    verification = ledger.verify(shards)
    if not verification.ok:
        raise JobError(f"the output at {spec.output.path} is {verification.describe()}")
    if not ledger.succeeded():
        ledger.write_success(verification)
    outcome = started.outcome(spec, verification.stats)
    if outcome.captioned:
        ledger.record_run(started.id, outcome.record())
    return outcome


def status(spec: JobSpec) -> str:
    """How far the job is, for people: from its files alone, without a cluster and while it runs."""
    shards = discover(spec.input)
    ledger = Ledger(spec.output.path)
    plan = ledger.plan(shards)
    sealed = sum(state.sealed for state in plan.shards)
    errors = "".join(f"\n  {count:,} {kind} errors" for kind, count in plan.stats.errors.items())
    runs = "".join(
        f"\n  run {run['run']}: {run['captioned']:,} rows in {run['seconds']:,.0f} s, {run['rows_per_s']:,.1f} rows/s"
        for run in ledger.runs()[-5:]
    )
    complete = "complete" if ledger.succeeded() else "not complete"
    return (
        f"{spec.name}: {complete}, {plan.rows_done:,} of {plan.rows:,} rows done, "
        f"{sealed:,} of {len(plan.shards):,} shards sealed{errors}{runs}"
    )


def dataset(spec: JobSpec, plan: Plan, kept: pa.Schema) -> ray.data.Dataset:
    """The lazy Ray Data pipeline over the plan's remaining rows, up to the captions."""
    import ray.data
    from ray.data import ActorPoolStrategy

    from actors.generate import Generate
    from actors.preprocess import Preprocess
    from pipeline.cluster import IO_TASK_CPUS, generate_cpus
    from pipeline.source import ShardSource, ShardWork

    work = [ShardWork(state.shard, state.remaining) for state in plan.to_caption]
    source = ShardSource(work, spec.input, needed_columns(spec, work[0].shard.schema), kept)
    preprocess, generate = spec.resources.preprocess, spec.resources.generate
    return (
        ray.data.read_datasource(source, num_cpus=IO_TASK_CPUS, override_num_blocks=len(work))
        .repartition(target_num_rows_per_block=BLOCK_ROWS)
        .map_batches(
            Preprocess,
            fn_constructor_args=(_preprocess_config(spec, kept),),
            batch_format="pyarrow",
            batch_size=None,  # a block as it comes
            zero_copy_batch=True,
            compute=ActorPoolStrategy(min_size=preprocess.replicas[0], max_size=preprocess.replicas[1]),
            num_cpus=preprocess.cpus,
        )
        .map_batches(
            Generate,
            fn_constructor_args=(_generate_config(spec, kept),),
            batch_format="pyarrow",
            batch_size=BLOCK_ROWS,
            zero_copy_batch=True,
            compute=ActorPoolStrategy(
                min_size=generate.replicas[0],
                max_size=generate.replicas[1],
                max_concurrent_calls_per_actor=_BLOCKS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=generate_cpus(spec.resources),
            num_gpus=generate.gpus or None,
        )
    )


def _caption(
    spec: JobSpec,
    ledger: Ledger,
    shards: Sequence[Shard],
    kept: pa.Schema,
    plan: Plan,
    run: _Run,
    show: Display,
) -> None:
    """Runs the pipeline to its end, and meanwhile shows progress and seals what is complete."""
    _check_checkpoint(spec)
    show.phase("starting Ray")
    import ray

    from pipeline import cluster
    from pipeline.sink import JournalSink

    cluster.connect(spec.resources)
    cluster.preflight(spec.resources, cluster.capacity())
    _quieten()
    show.phase("loading the model")
    captions = dataset(spec, plan, kept)
    writing = _Background(
        lambda: captions.write_datasink(
            JournalSink(ledger), ray_remote_args={"num_cpus": cluster.IO_TASK_CPUS}
        )
    )
    seal = ray.remote(num_cpus=cluster.IO_TASK_CPUS)(Ledger.seal)
    sealing: dict[str, Any] = {}
    looked = 0.0
    while True:
        over = writing.wait(max(_POLL_SECONDS, 4 * looked))
        began = time.monotonic()
        now = ledger.plan(shards)
        looked = time.monotonic() - began
        show.update(run.progress(now))
        for state in now.to_seal:
            if state.shard.name not in sealing:
                sealing[state.shard.name] = seal.remote(ledger, state.shard, kept, state.parts)
        if over:
            break
    try:
        writing.result()
        ray.get(list(sealing.values()))
    except Exception as error:
        raise JobError(root_cause(error)) from error


def _check_checkpoint(spec: JobSpec) -> None:
    """Reads the checkpoint's configuration here first: a wrong path is told before a cluster is kept waiting."""
    from actors.families import CheckpointError, load_family

    field = "model.path"
    try:
        family = load_family(_model_path(spec), spec.model.revision)
        if spec.input.video is not None:
            field = "input.video"
            family.check_videos()
    except CheckpointError as error:
        raise JobError(f"{field}: {error}") from None


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


class _Run:
    """This run against the output it found: what it added, since when."""

    def __init__(self, plan: Plan) -> None:
        self.id = time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime()) + uuid.uuid4().hex[:6]
        self.before = plan
        self.began = time.monotonic()

    def progress(self, now: Plan) -> Progress:
        captioned = now.rows_done - self.before.rows_done
        return Progress(
            total=now.rows,
            done=now.rows_done,
            errors=now.stats.failed,
            captioned=captioned,
            generated_tokens=now.stats.generated_tokens - self.before.stats.generated_tokens,
            seconds=time.monotonic() - self.began,
        )

    def outcome(self, spec: JobSpec, stats: Stats) -> Outcome:
        return Outcome(
            name=spec.name,
            output=spec.output.path,
            stats=stats,
            captioned=stats.rows - self.before.rows_done,
            generated_tokens=stats.generated_tokens - self.before.stats.generated_tokens,
            seconds=time.monotonic() - self.began,
        )


class _Background:
    """A function in a daemon thread: the main thread stays free for progress, signals and Ctrl-C."""

    def __init__(self, function: Any) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._call, args=(function,), daemon=True).start()

    def _call(self, function: Any) -> None:
        try:
            function()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def result(self) -> None:
        if self._error is not None:
            raise self._error
