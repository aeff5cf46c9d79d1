"""Ends a run whose first rows all fail alike: a wrong column or a host that is down fails every row to come, too."""

import pyarrow.parquet as pq

from actors.schema import ERROR, READ, ROW, SHARD
from pipeline.ledger.ledger import JOURNAL, Ledger
from pipeline.run.progress import Progress

_MESSAGE = 300  # characters of the example: a sentence, not a trace


class AllFailed(RuntimeError):
    """Every row of the run failed with one kind of error, and there were `limits.stop_after_failures` of them."""


def all_failed(progress: Progress, limit: int | None, ledger: Ledger, folder: str) -> AllFailed | None:
    """What a run has to end with once `limit` rows (None: however many) came back, none of them with a caption and all
    with one kind of error, while others remain. `folder` of `ledger` is where its parts are.

    Rows that could not be read do not count: they tell of their shard, which may be the only damaged one.
    """
    if limit is None or progress.captioned < limit or progress.done >= progress.total:
        return None
    if progress.succeeded or len(progress.failed) != 1 or READ in progress.failed:
        return None
    (kind,) = progress.failed
    first = "the job again, and then " if folder == JOURNAL else ""
    return AllFailed(
        f"the first {progress.captioned:,} rows all failed with {kind!r}{_example(kind, ledger, folder)}. They are "
        f"kept; once the cause is mended, run {first}`tessera retry {ledger.storage.url} --only {kind}`, or set "
        f"limits.stop_after_failures (now {limit}) to null to go on whatever fails"
    )


def _example(kind: str, ledger: Ledger, folder: str) -> str:
    """One such row, from a part that has no other."""
    parts = ledger.scan().parts if folder == JOURNAL else ledger.retried()
    for part in parts:
        if part.rows and part.rows == sum(entry.stats.errors.get(kind, 0) for entry in part.entries.values()):
            with ledger.storage.open(part.path) as file:
                table = pq.ParquetFile(file).read(columns=[SHARD, ROW, ERROR])
            row = table.slice(0, 1).to_pylist()[0]
            message = " ".join(row[ERROR]["message"].split())
            return f", for instance {row[SHARD]} row {row[ROW]}: {message[:_MESSAGE]}"
    return ""
