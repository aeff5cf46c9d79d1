"""How far a job is, for people: from its files alone, from any machine, while it runs or not."""

from collections.abc import Sequence

from pipeline.ledger.damage import failed_shards
from pipeline.ledger.job_input import listed_input, recognised
from pipeline.ledger.ledger import Ledger
from pipeline.run.engines import told
from pipeline.run.outcome import notes_of
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.lease import Holder, holder_of

_RUNS = 5  # the last ones are shown
_FAILED = 20  # shards that cannot be read are named


def status(spec: JobSpec) -> str:
    """A few lines: shards sealed and open, rows done, missing and failed by kind, the last runs, what the engines of
    the last one ran on, who is at it."""
    ledger = Ledger(spec.output.path)
    found = recognised(listed_input(spec, ledger), ledger, read=False)
    plan = ledger.plan(found.shards, found.unreadable)
    sealed = sum(state.sealed for state in plan.shards)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in plan.stats.errors.items())
    complete = "complete" if ledger.succeeded(plan) else "not complete"
    lines = [
        f"{spec.name}: {complete}",
        f"  shards: {sealed:,} sealed, {len(plan.shards) - sealed:,} open"
        + (f", {len(found.unreadable):,} unreadable" if found.unreadable else ""),
        f"  rows: {plan.rows_done:,} of {plan.rows:,} done, {plan.rows - plan.rows_done:,} missing, "
        f"{plan.stats.failed:,} failed" + (f" ({kinds})" if kinds else ""),
    ]
    failed = failed_shards(ledger, found, plan)
    lines += [f"  failed: {shard}" for shard in failed[:_FAILED]]
    if len(failed) > _FAILED:
        lines.append(f"  failed: {len(failed) - _FAILED:,} more shards")
    runs = ledger.runs()[-_RUNS:]
    for run in runs:
        retries = run.get("storage_retries", 0)
        lines.append(
            f"  run {run['run']}: {run.get('ended', 'done')}, {run['captioned']:,} rows in {run['seconds']:,.0f} s, "
            f"{run['rows_per_s']:,.1f} rows/s" + (f", {retries:,} storage retries" if retries else "")
        )
    # Of the last run that captioned something
    lines += [f"  {line}" for line in next(filter(None, map(told, reversed(runs))), [])]
    holder = holder_of(ledger.storage)
    lines.append(f"  lease: {_held(holder)}" if holder else "  lease: free")
    lines += [f"  {note}" for note in (*found.notes(), *notes_of(plan.foreign))]
    if found.touched:
        lines.append(
            f"  note: {len(found.touched):,} shards have other files than were captioned, as long as those were; "
            f"`tessera verify` and the next run compare them: {_first(found.touched)}"
        )
    if plan.changed:
        lines.append(
            f"  note: {len(plan.changed):,} shards changed in the input since they were captioned: "
            f"{_first(plan.changed)}"
        )
    lines += [f"  problem: {problem}" for problem in plan.problems]
    return "\n".join(lines)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _held(holder: Holder) -> str:
    if holder.is_dead:
        return f"{holder.describe()}, which died; the next run takes it"
    return holder.describe() + (", which is stopping" if holder.draining else "")
