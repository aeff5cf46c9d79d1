"""When a run gives up because all of its rows fail alike, and what it says then."""

import pytest

from pipeline.ledger.ledger import JOURNAL, RETRY, Ledger
from pipeline.run.failing import all_failed
from pipeline.run.progress import Progress
from tests.pipeline.ledgers import captions


def seen(failed: dict[str, int], succeeded: int = 0, total: int = 1000, done: int = 0) -> Progress:
    rows = succeeded + sum(failed.values())
    return Progress(total, done or rows, sum(failed.values()), rows, 0, 1.0, succeeded, failed)


@pytest.mark.parametrize(
    ("progress", "limit"),
    [
        (seen({"decode": 199}), 200),
        (seen({"decode": 500}), None),
        (seen({"decode": 300}, succeeded=1), 200),
        (seen({"decode": 300, "fetch": 1}), 200),
        (seen({"decode": 300}, total=300), 200),  # done: the end is told like any other
        (seen({"read": 300}), 200),  # one damaged file
        (seen({}), 1),
    ],
)
def test_a_run_goes_on(tmp_path, progress, limit):
    assert all_failed(progress, limit, Ledger(str(tmp_path)), JOURNAL) is None


def test_a_run_that_only_fails_ends_with_an_example_and_the_way_on(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.publish(captions("good.parquet", range(4)))  # of a run before
    ledger.publish(captions("bad.parquet", range(8, 40), failed=range(40)))
    error = all_failed(seen({"decode": 224}), 200, ledger, JOURNAL)
    assert str(error) == (
        "the first 224 rows all failed with 'decode', for instance bad.parquet row 8: cut off. They are kept; once "
        f"the cause is mended, run the job again, and then `tessera retry {ledger.storage.url} --only decode`, or set "
        "limits.stop_after_failures (now 200) to null to go on whatever fails"
    )


def test_a_retry_is_tried_again_as_a_retry(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.publish(captions("bad.parquet", range(32), failed=range(32)), RETRY)
    error = all_failed(seen({"decode": 32}), 32, ledger, RETRY)
    assert "bad.parquet row 0: cut off" in str(error) and "mended, run `tessera retry" in str(error)
