"""How a run is told: one line of figures, or one sentence about what broke."""

from dataclasses import replace

from pipeline.input.shards import CHANGED, FailedShard
from pipeline.ledger.entries import RowStats
from pipeline.run.outcome import Outcome, root_cause
from pipeline.spec.job_spec import LimitsSpec


def outcome(captioned=100, failed=0) -> Outcome:
    stats = RowStats(200, {"decode": 9, "prompt": 1}, 10, 5, 4000)
    shards = tuple(
        FailedShard(f"{n}.parquet", f"/in/{n}.parquet", "is empty (0 bytes)") for n in range(failed)
    )
    return Outcome("job", "out", stats, shards, captioned=captioned, generated_tokens=2000, seconds=50.0)


def test_the_line_says_rows_errors_and_rates():
    assert outcome().describe() == (
        "job: 200 rows in out, 10 errors (9 decode, 1 prompt); 100 of them now, in 50.0 s: 2.0 rows/s, 40 tokens/s"
    )
    assert outcome().failed_fraction == 0.05


def test_nothing_to_do_is_said():
    assert outcome(0).describe().startswith("job: nothing to do, all 200 rows are captioned in out")

    assert "all 200 rows of the readable shards are captioned" in outcome(0, failed=1).describe()


def test_what_failed_beyond_the_limits_is_one_sentence():
    assert outcome().failure(LimitsSpec()) is None
    assert outcome(failed=2).failure(LimitsSpec(max_failed_shards=2)) is None
    assert outcome(failed=2).failure(LimitsSpec(max_failed_shards=1)) == (
        "2 shards failed: /in/0.parquet is empty (0 bytes), /in/1.parquet is empty (0 bytes); that is more than "
        "limits.max_failed_shards=1 allows: repair or remove them and run again; all captions and errors are in "
        "the output"
    )
    changed = (FailedShard("a.parquet", "/in/a.parquet", CHANGED),)
    assert replace(outcome(), failed=changed).failure(LimitsSpec()) == (
        "1 shard failed: /in/a.parquet changed while it was read, and the same command captions it anew; that is more "
        "than limits.max_failed_shards=0 allows; all captions and errors are in the output"
    )
    both = outcome(failed=5).failure(LimitsSpec(max_failed_fraction=0.01))
    assert both and "/in/2.parquet is empty (0 bytes) and 2 more; that" in both
    assert "10 of 200 rows failed (5.0%), more than limits.max_failed_fraction=0.01 allows" in both


def test_the_record_names_every_failed_shard():
    assert list(outcome(failed=5).record()["failed_shards"]) == [f"{n}.parquet" for n in range(5)]


class Wrapped(Exception):
    def __init__(self, message: str, cause: BaseException | None = None):
        super().__init__(message)
        self.cause = cause


def test_the_cause_is_found_inside_rays_wraps():
    assert root_cause(Wrapped("task failed", Wrapped("again", OSError("disk full")))) == "disk full"


def test_the_cause_is_found_in_a_remote_traceback():
    text = (
        "The actor died because of an error raised in its creation task, ray::Worker.__init__()\n"
        '  File "generate.py", line 3, in __init__\n'
        "safetensors._rust.SafetensorError: header too large\n\nsome advice about settings"
    )
    assert root_cause(Wrapped(text)) == "SafetensorError: header too large"


def test_an_exception_without_text_is_named():
    assert root_cause(KeyError()) == "KeyError"


UDF = (
    "ray.exceptions.UserCodeException: UDF failed to process a data block.\nFailed to apply UDF transform.\n"
)
CHAINED = "\nThe above exception was the direct cause of the following exception:\n\n"


def in_a_batch(*raised: str) -> Wrapped:
    """What Ray Data makes of exceptions in an actor's batch: none of them but as text."""
    frames = (
        'ray::MapWorker(MapBatches(Generate)).submit() (pid=7)\n  File "/x/stages.py", line 3, in __call__\n'
    )
    text = CHAINED.join([*(f"{frames}    code()\n    ^^^^\n{each}\n" for each in raised), UDF])
    return Wrapped(text, Wrapped(UDF.removeprefix("ray.exceptions.UserCodeException: ")))


def test_the_cause_is_found_where_a_batch_failed():
    full = (
        "pipeline.storage.retrying.StorageError: writing /out/_tessera/journal/part-1.parquet: No space left"
    )
    assert (
        root_cause(in_a_batch("OSError: [Errno 28] No space left on device", full)) == full.partition(": ")[2]
    )
    assert (
        root_cause(in_a_batch("OSError: [Errno 28] No space left\nmore: of it")) == "[Errno 28] No space left"
    )
    assert root_cause(in_a_batch("torch.OutOfMemoryError: 2 GiB")) == "OutOfMemoryError: 2 GiB"


def test_a_bug_in_a_batch_is_told_with_its_place():
    assert root_cause(in_a_batch("KeyError: 'k'")) == "KeyError: 'k', in __call__ (stages.py:3)"
    assert root_cause(in_a_batch("AssertionError")) == "AssertionError, in __call__ (stages.py:3)"


def test_an_error_without_words_gives_way_to_its_cause():
    assert (
        root_cause(in_a_batch("OSError: [Errno 28] No space left", "ValueError: "))
        == "[Errno 28] No space left"
    )
