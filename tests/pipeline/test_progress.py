"""What a person is told: plain lines when piped, a live line on a terminal, figures that add up."""

import io
import os
import pty
import re
import threading

from pipeline.progress import Lines, Progress, describe, display

HALF = Progress(total=200, done=100, errors=1, captioned=80, generated_tokens=800, seconds=40.0)


def test_rates_are_of_this_run_and_eta_of_what_is_left():
    assert HALF.rows_per_s == 2.0 and HALF.tokens_per_s == 20.0
    assert HALF.eta is not None and HALF.eta.total_seconds() == 50
    assert describe(HALF) == "100 / 200 rows (50%), 2.0 rows/s, 20 tokens/s, 1 error, ETA 0:00:50"


def test_nothing_yet_has_no_eta():
    start = Progress(total=10, done=0, errors=0, captioned=0, generated_tokens=0, seconds=0.0)
    assert start.eta is None and describe(start) == "0 / 10 rows (0%), 0.0 rows/s, 0 tokens/s"
    empty = Progress(total=0, done=0, errors=0, captioned=0, generated_tokens=0, seconds=0.0)
    assert describe(empty).startswith("0 / 0 rows (100%)")


def test_a_pipe_gets_plain_lines_not_too_many():
    stream = io.StringIO()
    show = display("job", stream)
    assert isinstance(show, Lines)
    with show:
        show.phase("loading the model")
        for done in (100, 101, 102, 200):
            show.update(Progress(200, done, 0, done, done, 10.0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "loading the model"
    assert [line.split(" rows")[0] for line in lines[1:]] == ["100 / 200", "200 / 200"]
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_live_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    ours, theirs = pty.openpty()
    written: list[bytes] = []
    reader = threading.Thread(target=lambda: written.extend(iter(lambda: read(ours), b"")))
    reader.start()  # while it is written: a terminal holds little
    with os.fdopen(theirs, "w") as terminal, display("nightly", terminal) as show:
        show.phase("loading the model")
        show.update(HALF)
    reader.join(10)
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(written).decode())
    assert "nightly" in seen and "loading the model" in seen
    assert "100/200" in seen and "2.0 rows/s" in seen and "1 error" in seen


def read(descriptor: int) -> bytes:
    """What the other side of a terminal wrote; nothing once it is closed, which Linux tells as an error."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""
