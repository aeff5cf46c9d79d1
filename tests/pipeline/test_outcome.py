"""How a run is told: one line of figures, or one sentence about what broke."""

from pipeline.entries import Stats
from pipeline.outcome import Outcome, root_cause


def outcome(captioned=100) -> Outcome:
    stats = Stats(200, {"decode": 9, "prompt": 1}, 10, 5, 4000)
    return Outcome("job", "out", stats, captioned=captioned, generated_tokens=2000, seconds=50.0)


def test_the_line_says_rows_errors_and_rates():
    assert outcome().describe() == (
        "job: 200 rows in out, 10 errors (9 decode, 1 prompt); 100 of them now, in 50.0 s: 2.0 rows/s, 40 tokens/s"
    )
    assert outcome().failed_fraction == 0.05


def test_nothing_to_do_is_said():
    assert outcome(0).describe().startswith("job: nothing to do, all 200 rows are captioned in out")


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
