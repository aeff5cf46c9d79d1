"""Ends a run whose first rows all fail alike: a wrong column or a host that is down fails every row to come, too."""

import pyarrow as pa
import pyarrow.compute as pc

from actors.schema import ERROR, READ, ROW, SHARD
from pipeline.ledger.ledger import JOURNAL
from pipeline.run.progress import Progress

_MESSAGE = 300  # characters of the example: a sentence, not a trace


class AllFailed(RuntimeError):
    """Every row of the run failed with one kind of error, and there were `limits.stop_after_failures` of them."""


def all_failed(
    progress: Progress, limit: int | None, example: str, output: str, folder: str
) -> AllFailed | None:
    """What a run has to end with once `limit` rows (None: however many) came back, none of them with a caption and all
    with one kind of error, while others remain. `example` tells of one such row, and `folder` of `output` is where the
    run's parts are.

    Rows that could not be read do not count: they tell of their shard, which may be the only damaged one.
    """
    if limit is None or progress.captioned < limit or progress.done >= progress.total:
        return None
    if progress.succeeded or len(progress.failed) != 1 or READ in progress.failed:
        return None
    (kind,) = progress.failed
    first = "the job again, and then " if folder == JOURNAL else ""
    return AllFailed(
        f"the first {progress.captioned:,} rows all failed with {kind!r}, for instance {example}. They are "
        f"kept; once the cause is mended, run {first}`tessera retry {output} --only {kind}`, or set "
        f"limits.stop_after_failures (now {limit}) to null to go on whatever fails"
    )


def example_of(captions: pa.Table) -> str:
    """The first error row of a block, in words; empty where there is none."""
    failed = captions.filter(pc.is_valid(captions[ERROR])).slice(0, 1).select([SHARD, ROW, ERROR]).to_pylist()
    if not failed:
        return ""
    message = " ".join(failed[0][ERROR]["message"].split())
    return f"{failed[0][SHARD]} row {failed[0][ROW]}: {message[:_MESSAGE]}"
