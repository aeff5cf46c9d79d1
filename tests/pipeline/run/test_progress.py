"""What a person is told: plain lines when piped, a live line on a terminal, figures that add up and are never cut."""

import io
import os
import pty
import re
import threading
from dataclasses import replace

import pytest
from rich.console import Console

from pipeline.run.progress import Figures, Lines, Progress, Rates, describe, display

HALF = Progress(
    total=200, done=100, errors=1, captioned=80, generated_tokens=800, seconds=400.0, rates=Rates(2.0, 20.0)
)
START = Progress(total=10, done=0, errors=0, captioned=0, generated_tokens=0, seconds=0.0)


def test_rates_are_recent_and_the_record_is_of_the_whole_run():
    assert HALF.eta is not None and HALF.eta.total_seconds() == 50
    assert describe(HALF) == "100 / 200 rows (50%), 2.0 rows/s, 20 tokens/s, 1 error, ETA 0:00:50"
    assert (HALF.record()["rows_per_s"], HALF.record()["tokens_per_s"]) == (0.2, 2.0)


def test_nothing_yet_has_neither_rates_nor_eta():
    assert START.eta is None and describe(START) == "0 / 10 rows (0%)"
    assert describe(replace(START, total=0)).startswith("0 / 0 rows (100%)")


def test_a_stall_is_told_in_place_of_an_eta():
    stalled = replace(HALF, stalled=3605.0, waiting_for="2 Generate actors wait for a place")
    assert describe(stalled).endswith("1 error, stalled for 1:00:05: 2 Generate actors wait for a place")


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_pipe_gets_plain_lines_not_too_many():
    stream = io.StringIO()
    show = display("job", stream)
    assert isinstance(show, Lines)
    with show:
        show.phase("loading the model")
        for done in (100, 101, 102, 200):
            show.update(Progress(200, done, 0, done, done, 10.0))
    lines = lines_of(stream)
    assert lines[0] == "loading the model"
    assert [line.split(" rows")[0] for line in lines[1:]] == ["100 / 200", "200 / 200"]
    assert "\x1b" not in stream.getvalue()


def test_a_phase_that_lasts_is_told_again_with_its_time():
    stream, clock = io.StringIO(), Clock()
    show = Lines(stream, clock=clock)
    show.phase("waiting for room on the cluster", "4 CPUs are needed, 1 is free")
    for clock.now in (10, 29):
        show.phase("waiting for room on the cluster", "4 CPUs are needed, 2 are free")
        show.tell_again()
    clock.now = 30
    show.tell_again()
    assert lines_of(stream) == [
        "waiting for room on the cluster: 4 CPUs are needed, 1 is free",
        "waiting for room on the cluster: 4 CPUs are needed, 2 are free (30 s)",
    ]
    show.update(replace(HALF, captioned=1))  # the first row ends the phase
    clock.now = 100
    show.tell_again()
    assert len(lines_of(stream)) == 3


def test_a_note_stays_and_ends_no_phase(monkeypatch):
    stream, clock = io.StringIO(), Clock()
    show = Lines(stream, clock=clock)
    show.phase("loading the model")
    show.note("engine: continuous on a [processor]")
    clock.now = 40
    show.tell_again()
    assert lines_of(stream)[1:] == ["engine: continuous on a [processor]", "loading the model (40 s)"]
    seen = on_terminal(monkeypatch, 160, "engine: continuous on a [processor]", HALF)
    assert "\rengine: continuous on a [processor]\r\n" in seen  # a line of its own, and not drawn over


def test_a_stall_is_told_at_once_and_then_every_minute():
    stream, clock = io.StringIO(), Clock()
    show = Lines(stream, clock=clock)
    show.update(HALF)
    for clock.now in range(1, 122):
        show.update(replace(HALF, stalled=60.0 + clock.now))
    show.update(HALF)  # and so is its end
    assert [line.rpartition(", ")[2] for line in lines_of(stream)] == [
        "ETA 0:00:50",
        "stalled for 61 s",
        "stalled for 0:02:01",
        "stalled for 0:03:01",
        "ETA 0:00:50",
    ]


def figures(progress: Progress, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=True, color_system=None).print(
        Figures("nightly", progress)
    )
    assert len(lines_of(stream)) == 1
    return stream.getvalue().rstrip()


def test_a_wide_terminal_shows_all_and_a_narrow_one_drops_the_bar_first():
    numbers = "100/200  2.0 rows/s  20 tokens/s  1 error  ETA 0:00:50"
    wide = figures(HALF, 160)
    assert wide.startswith("nightly  ━") and wide.endswith(numbers)
    assert figures(HALF, 64) == f"nightly  {numbers}"
    assert figures(HALF, 60) == numbers


@pytest.mark.parametrize("width", range(15, 130))
def test_no_figure_is_ever_cut(width):
    large = replace(
        HALF, total=123_456_789, done=1_234_567, errors=98_765, rates=Rates(1234.5, 123_456.0), stalled=0.0
    )
    shown = set(figures(large, max(width, 22)).split("  "))
    whole = set(figures(large, 200).split("  "))
    assert shown <= whole and "1,234,567/123,456,789" in shown


def on_terminal(monkeypatch, width: int, *shown: Progress | str) -> str:
    """What a terminal of that width was sent, notes among it, without its control sequences."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    ours, theirs = pty.openpty()
    written: list[bytes] = []
    reader = threading.Thread(target=lambda: written.extend(iter(lambda: read(ours), b"")))
    reader.start()  # while it is written: a terminal holds little
    with os.fdopen(theirs, "w") as terminal, display("nightly", terminal) as show:
        show.phase("loading the model")
        for each in shown:
            show.note(each) if isinstance(each, str) else show.update(each)
    reader.join(10)
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(written).decode())


def test_a_terminal_gets_a_live_line(monkeypatch):
    seen = on_terminal(monkeypatch, 160, HALF)
    assert "nightly" in seen and "loading the model ... 0 s" in seen
    assert "100/200" in seen and "2.0 rows/s" in seen and "1 error" in seen


def test_a_stall_before_the_first_row_goes_when_it_is_over(monkeypatch):
    stalled = replace(START, stalled=60.0, waiting_for="no room for it")
    assert "no room for it" in on_terminal(monkeypatch, 160, stalled)
    last = on_terminal(monkeypatch, 160, stalled, replace(START, loaded=True)).splitlines()[-1]
    assert "loading the model" in last and "no room for it" not in last


def read(descriptor: int) -> bytes:
    """What the other side of a terminal wrote; nothing once it is closed, which Linux tells as an error."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""
