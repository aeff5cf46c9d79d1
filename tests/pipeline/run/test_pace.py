"""Rates, ETA and stalls, by a clock of the test's own."""

from dataclasses import replace

from pipeline.run.pace import Pace
from pipeline.run.progress import Progress

START = Progress(total=1000, done=0, errors=0, captioned=0, generated_tokens=0, seconds=0.0)


def after(rows: int, tokens_a_row: int = 10) -> Progress:
    return replace(START, done=rows, captioned=rows, generated_tokens=rows * tokens_a_row, loaded=True)


def test_loading_counts_for_nothing_and_the_first_block_gives_a_pace():
    pace = Pace()
    assert pace.of(0, START).rates is None
    loaded = pace.of(300, replace(START, loaded=True))
    assert loaded.rates is None and loaded.eta is None
    first = pace.of(304, after(100))  # 25 rows/s; 0.3 since the run began
    assert first.rates and (first.rates.rows_per_s, first.rates.tokens_per_s) == (25, 250)
    assert first.eta and first.eta.total_seconds() == 900 / 25


def test_where_loading_is_not_seen_the_first_block_starts_the_clock():
    pace = Pace()
    assert pace.of(300, after(100)).rates is None
    second = pace.of(304, after(140))
    assert second.rates and second.rates.rows_per_s == 10


def test_the_pace_is_that_of_the_last_minute():
    pace = Pace()
    for second in range(0, 600, 2):
        pace.of(second, after(second))
    for second in range(0, 70, 2):
        now = pace.of(600 + second, after(600 + 5 * second))
    assert now.rates and now.rates.rows_per_s == 5


def test_a_run_that_slows_down_shows_it_before_its_next_block():
    pace = Pace()
    for second in range(0, 12, 2):
        steady = pace.of(second, after(10 * second))
    slowing = pace.of(50, after(100))
    assert steady.rates and slowing.rates and slowing.rates.rows_per_s < steady.rates.rows_per_s / 3


def test_a_minute_without_a_row_is_a_stall_and_has_no_eta():
    pace = Pace()
    pace.of(0, after(1))
    pace.of(10, after(101))
    assert not pace.of(69, after(101)).stalled and pace.of(69, after(101)).eta
    stalled = pace.of(70, after(101))
    assert stalled.stalled == 60 and stalled.eta is None
    assert not pace.of(71, after(102)).stalled
    assert pace.of(200, after(102)).stalled == 129


def test_a_run_that_never_got_a_row_is_stalled_too():
    pace = Pace()
    assert not pace.of(1000, START).stalled
    assert pace.of(1060, START).stalled == 60
