"""When a run gives up because all of its rows fail alike, and what it says then."""

import pytest

from pipeline.ledger.ledger import JOURNAL, RETRY
from pipeline.run.failing import all_failed, example_of
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
def test_a_run_goes_on(progress, limit):
    assert all_failed(progress, limit, "x.parquet row 0: no", "out", JOURNAL) is None


def test_a_run_that_only_fails_ends_with_an_example_and_the_way_on():
    example = example_of(captions("bad.parquet", range(8, 40), failed=range(9, 40)))
    assert example == "bad.parquet row 9: cut off"
    error = all_failed(seen({"decode": 224}), 200, example, "out", JOURNAL)
    assert str(error) == (
        "the first 224 rows all failed with 'decode', for instance bad.parquet row 9: cut off. They are kept; once "
        "the cause is mended, run the job again, and then `tessera retry out --only decode`, or set "
        "limits.stop_after_failures (now 200) to null to go on whatever fails"
    )
    assert example_of(captions("good.parquet", range(4))) == ""


def test_a_retry_is_tried_again_as_a_retry():
    error = all_failed(seen({"decode": 32}), 32, "bad.parquet row 0: cut off", "out", RETRY)
    assert "mended, run `tessera retry" in str(error)
