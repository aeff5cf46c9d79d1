"""The dataflow: what `tessera run` and `tessera retry` do, from the input's shards to a verified output.

    input shards                                                        output
    ────────────> read ──> preprocess ──> generate ───────────────────> journal parts
                  run/graph.py: Ray Data moves blocks of rows                │ seal
                  through pools of CPU and GPU actors                        v
                                                                        data/<shard>.parquet

What is done stands in the output's files and nowhere else. The driver reads their footers when it begins
(`Ledger.plan`). From then on the record of each new part comes back to it with the rows (ledger/journal.py): it shows
progress and seals shards whose last row has arrived (run/sealing.py). When the pipeline is over it reads the footers
again. So killing the driver, an actor or the whole cluster loses only the blocks in flight, and the same command again
does only what is missing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.input.columns import job_schema, with_kept
from pipeline.input.rows import RowSet
from pipeline.input.shards import FailedShard, Input, Shard
from pipeline.input.versions import changed_among
from pipeline.ledger.damage import failed_shards
from pipeline.ledger.entries import RowStats
from pipeline.ledger.job_input import listed_input, recognised, refuse_recaption, remember
from pipeline.ledger.journal import Journal
from pipeline.ledger.ledger import JOURNAL, RETRY, Ledger
from pipeline.ledger.overlap import (
    refuse_long_names,
    refuse_nested_names,
    refuse_other_dataset,
    refuse_overlap,
)
from pipeline.ledger.retry import failed_rows, merge_retried
from pipeline.ledger.state import Plan, Published, Standing, Verification
from pipeline.run.checkpoint import check_checkpoint, check_model_path, moved, pinned
from pipeline.run.outcome import JobError, Outcome
from pipeline.run.progress import Display, Progress
from pipeline.run.sealing import Sealing, seal
from pipeline.run.session import Session, open_session
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.files import in_parallel


def run(spec: JobSpec, show: Display, take_over: bool = False, recaption: bool = False) -> Outcome:
    """Captions every row that has no caption yet, seals, verifies, and says how it went.

    Raises SpecError or LedgerMismatch for a job that must not start (one that would caption too many rows again, unless
    `recaption`), LeaseHeld where another run is at it (unless `take_over`), ClusterError where it cannot be placed,
    JobError, AllFailed, LeaseLost or Stopped for one that ended early; whatever was published by then is kept.
    """
    ground = _look_at(spec, show)
    asked, spec = spec, ground.spec
    plan, ledger = ground.ledger.plan(ground.shards), ground.ledger
    if not recaption:
        refuse_recaption(spec, ground.found, ledger)
    news = ground.found.unreadable or ground.found.touched  # what comparing found is to be put down
    if not news and ledger.succeeded(plan) and not ledger.retried():
        verification = _verified(ledger, ground.found, show)
        failed = failed_shards(ledger, ground.found, plan)
        # Nothing is written, so no lease is needed
        return Outcome.of(spec, ground.found, verification, failed)
    if plan.to_caption:
        _check_checkpoint(spec, show)
        if note := moved(asked, spec):
            show.phase(note)
    with _open_job(spec, ground, show, take_over) as job:
        job.ledger.bind(with_kept(spec, ground.kept), ground.found.root)
        remember(ground.found, job.ledger)
        plan = job.plan()
        if not plan.finished:
            job.ledger.clear_success()
        if plan.to_caption:
            job.caption(plan)
        show.phase("sealing")
        job.seal_the_rest()
        merge_retried(job.ledger)
        changed = job.sweep()
        gone = {shard.name for shard in changed}
        before = replace(plan, shards=tuple(state for state in plan.shards if state.shard.name not in gone))
        return job.finish(
            changed,
            lambda stats: {
                "captioned": stats.rows - before.rows_done,
                "generated_tokens": stats.generated_tokens - before.stats.generated_tokens,
            },
        )


def retry(spec: JobSpec, kinds: Collection[str], show: Display, take_over: bool = False) -> Outcome:
    """Tries the error rows of some kinds again and amends their sealed shards; raises as `run` does."""
    ground = _look_at(spec, show)
    spec = ground.spec
    _check_checkpoint(spec, show)
    with _open_job(spec, ground, show, take_over) as job:
        merge_retried(job.ledger)  # what a killed retry had done already
        failed = failed_rows(job.ledger, ground.shards, kinds)
        total = sum(len(rows) for _, rows in failed)
        plan = job.plan()
        if total:
            job.ledger.clear_success()
            job.retry(failed, total)
            show.phase("amending sealed shards")
            merge_retried(job.ledger)
        changed = changed_among(shard for shard, _ in failed)
        gone = {shard.name for shard in changed}
        tried = sum(len(rows) for shard, rows in failed if shard.name not in gone)
        before = replace(plan, shards=tuple(state for state in plan.shards if state.shard.name not in gone))
        return job.finish(
            changed,
            lambda stats: {
                "captioned": tried,
                "generated_tokens": stats.generated_tokens - before.stats.generated_tokens,
            },
        )


@dataclass(frozen=True, slots=True)
class _Ground:
    """What a job finds: its spec with the checkpoint pinned, its input, the schema of its kept columns, and the ledger
    of its output (without a fence)."""

    spec: JobSpec
    found: Input
    kept: pa.Schema
    ledger: Ledger

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.found.shards


def _look_at(spec: JobSpec, show: Display) -> _Ground:
    """Raises what speaks against the job before anything is written."""
    _prepare_ray()
    show.phase("looking at input and output")
    ledger = Ledger(spec.output.path)
    found = listed_input(spec, ledger)
    refuse_overlap(spec, found)
    refuse_long_names(spec, found)
    refuse_nested_names(spec, found)
    kept = job_schema(spec, found.shards)
    check_model_path(spec)
    spec = pinned(spec, ledger.bound_fields())
    ledger.check(with_kept(spec, kept))
    found = recognised(found, ledger, say=show.phase)
    refuse_other_dataset(spec, found, ledger)
    return _Ground(spec, found, kept, ledger)


def _check_checkpoint(spec: JobSpec, show: Display) -> None:
    show.phase("looking at the checkpoint")
    check_checkpoint(spec)


@contextmanager
def _open_job(spec: JobSpec, ground: _Ground, show: Display, take_over: bool) -> Iterator[_Job]:
    with open_session(spec, take_over, show) as session:
        # Another run may have begun here since the look
        refuse_other_dataset(spec, ground.found, session.ledger)
        session.ledger.learn(ground.ledger)
        yield _Job(spec, ground, session, show)


@dataclass(frozen=True, slots=True)
class _Job:
    """A job that holds its output's lease, from its first write to its verified end."""

    spec: JobSpec
    ground: _Ground
    session: Session
    show: Display

    @property
    def ledger(self) -> Ledger:
        """Fenced: what it writes, it writes under the lease."""
        return self.session.ledger

    def plan(self) -> Plan:
        return self.ledger.plan(self.ground.shards)

    def caption(self, before: Plan) -> None:
        """Runs the pipeline over what remains, and meanwhile shows progress and seals what is complete."""
        from pipeline.run.graph import remote_sealing

        journal = Journal(before)
        sealing = Sealing(journal, remote_sealing(self.ledger, self.ground.kept))

        def look(parts: Sequence[Published]) -> Progress:
            journal.add(parts)
            sealing.collect()
            if not self.session.draining:
                sealing.advance()
            return progress_since(before.standing, journal.standing, self.session.seconds)

        self.drive([(state.shard, state.remaining) for state in before.to_caption], JOURNAL, look)
        sealing.finish()
        self.session.storage_retries += sealing.storage_retries

    def seal_the_rest(self) -> None:
        """Seals what the files say is complete and no task has sealed: in a resume, or where one failed."""
        shards = [state.shard for state in self.plan().to_seal]
        sealed = in_parallel(
            lambda shard: seal(self.ledger, self.ground.kept, shard), shards, os.cpu_count() or 1
        )
        self.session.storage_retries += sum(each.storage_retries for each in sealed)

    def retry(self, rows: Sequence[tuple[Shard, RowSet]], total: int) -> None:
        """Runs the pipeline over `total` error rows and meanwhile shows progress."""
        seen: dict[str, RowStats] = {}  # by part: a block that is tried again comes twice

        def look(parts: Sequence[Published]) -> Progress:
            seen.update((part.path, entry.stats) for part in parts for entry in part.entries.values())
            stats = RowStats.total(seen.values())
            return progress_since(
                Standing(total, 0, RowStats()), Standing(total, stats.rows, stats), self.session.seconds
            )

        self.drive(rows, RETRY, look)

    def drive(
        self,
        rows: Sequence[tuple[Shard, RowSet]],
        folder: str,
        look: Callable[[Sequence[Published]], Progress],
    ) -> None:
        """Runs the pipeline over some rows; their captions become parts in `folder`."""
        self.show.phase("starting Ray")  # importing it takes seconds
        from pipeline.input.source import ShardWork
        from pipeline.run.graph import drive

        drive(self.spec, self.session, [ShardWork(*each) for each in rows], self.ground.kept, folder, look)

    def sweep(self) -> tuple[FailedShard, ...]:
        """Deletes the parts that nothing needs any more, and returns the shards that changed while they were read: none
        of them is sealed, and captions of a version that is gone are of no use."""
        changed = changed_among(state.shard for state in self.plan().shards if not state.sealed)
        gone = {shard.name for shard in changed}
        self.ledger.sweep(
            [replace(shard, fingerprint="") if shard.name in gone else shard for shard in self.ground.shards]
        )
        return changed

    def finish(
        self, changed: Sequence[FailedShard], figures: Callable[[RowStats], dict[str, Any]]
    ) -> Outcome:
        """Recounts and marks the output, but for shards that `changed` while they were read. `figures` makes the
        counts of this run from the statistics of the whole."""
        found = self.ground.found.without(changed)
        verification = _verified(self.ledger, found, self.show)
        if verification.unreadable:  # _SUCCESS says that every row of the input is there
            self.ledger.clear_success()
        else:
            self.ledger.write_success(verification)
        outcome = Outcome.of(
            self.spec,
            found,
            verification,
            failed_shards(self.ledger, found, self.ledger.plan(found.shards)),
            **figures(verification.stats),
            seconds=self.session.seconds,
            storage_retries=self.session.retries(),
        )
        self.session.record = outcome.record()
        return outcome


def progress_since(before: Standing, now: Standing, seconds: float) -> Progress:
    """How far a job is, and what this run added since `before`."""
    good, good_before = (each.stats.rows - each.stats.failed for each in (now, before))
    return Progress(
        total=now.rows,
        done=now.rows_done,
        errors=now.stats.failed,
        captioned=now.rows_done - before.rows_done,
        generated_tokens=now.stats.generated_tokens - before.stats.generated_tokens,
        seconds=seconds,
        succeeded=good - good_before,
        failed=Counter(now.stats.errors) - Counter(before.stats.errors),
    )


def _verified(ledger: Ledger, found: Input, show: Display) -> Verification:
    """The recount of an output that should be complete, by its footers; JobError if it is not."""
    show.phase("verifying")
    verification = ledger.verify(found.shards, found.unreadable)
    if not verification.ok:
        raise JobError(f"the output at {ledger.storage.url} is {verification.describe()}")
    return verification


def _prepare_ray() -> None:
    """Settings that Ray reads from the environment when it is imported, which is later."""
    # Ray Data shares a cluster out among its drivers, and a driver that was killed keeps its share for this long: 180 s
    # by default, in which a run that goes on with its work may get no CPU at all. Live drivers ask again every 10 s.
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
    # A run that lost its lease leaves the cluster while its dataflow's threads still work. Their next call would join
    # the cluster again, as another driver, and say so below our last words.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
