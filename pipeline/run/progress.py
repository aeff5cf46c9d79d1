"""What a person sees while a job runs: one live line on a terminal, plain lines anywhere else.

A display is told the state (`Progress`) and nothing more; it keeps no counts of its own, so it can never
disagree with the ledger that the state was read from.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BAR = 30  # columns
_REPEAT_SECONDS = 30.0  # a phase that lasts is told again
_STALLED_SECONDS = 60.0  # and so is a stall


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast rows come (pipeline/run/pace.py)."""

    rows_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """A job at a moment.

    Attributes:
        done: Rows in the ledger, of `total`; `errors` of them carry one. The other counts are of this run.
        captioned: Rows that this run added, with `generated_tokens` tokens, in `seconds` (Ray's start included).
        succeeded, failed: How many of its rows have a caption, and how many an error, by kind.
        loaded: True once a model stands ready.
        rates: Over the last minute; None until there are some.
        stalled: Seconds without a new row, if that is long; `waiting_for` says why.
    """

    total: int
    done: int
    errors: int
    captioned: int
    generated_tokens: int
    seconds: float
    succeeded: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    loaded: bool = False
    rates: Rates | None = None
    stalled: float = 0.0
    waiting_for: str = ""

    def record(self) -> dict[str, Any]:
        """What is kept of a run that ended here, under _tessera/runs; its rates are of the whole run."""
        return {
            "captioned": self.captioned,
            "generated_tokens": self.generated_tokens,
            "seconds": round(self.seconds, 3),
            "rows_per_s": round(self.captioned / self.seconds, 3) if self.seconds > 0 else 0.0,
            "tokens_per_s": round(self.generated_tokens / self.seconds, 3) if self.seconds > 0 else 0.0,
        }

    @property
    def eta(self) -> timedelta | None:
        """Time to the last row at the present pace; None while there is no pace, or no row left."""
        if self.rates is None or self.stalled or self.done >= self.total:
            return None
        return timedelta(seconds=round((self.total - self.done) / self.rates.rows_per_s))


def describe(progress: Progress) -> str:
    """The state as one plain line."""
    share = progress.done / progress.total if progress.total else 1.0
    figures = [f"{progress.done:,} / {progress.total:,} rows ({share:.0%})"]
    if progress.rates:
        figures += _rates(progress.rates)
    if progress.errors:
        figures.append(_errors(progress))
    if progress.eta is not None:
        figures.append(f"ETA {progress.eta}")
    if progress.stalled:
        figures.append(_stalled(progress))
    return ", ".join(figures) + (f": {progress.waiting_for}" if progress.waiting_for else "")


def _rates(rates: Rates) -> tuple[str, str]:
    return f"{rates.rows_per_s:,.1f} rows/s", f"{rates.tokens_per_s:,.0f} tokens/s"


def _errors(progress: Progress) -> str:
    return f"{progress.errors:,} error{'s' * (progress.errors != 1)}"


def _stalled(progress: Progress) -> str:
    return f"stalled for {_elapsed(progress.stalled)}"


def _elapsed(seconds: float) -> str:
    """
    >>> _elapsed(23.4), _elapsed(3605)
    ('23 s', '1:00:05')
    """
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))


class Display(Protocol):
    """Shows a job's phases and progress; used as a context manager around the run."""

    def __enter__(self) -> Display: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def phase(self, text: str, detail: str = "") -> None:
        """What the job is doing, for the stretches in which no row finishes; `detail` may change meanwhile."""

    def note(self, text: str) -> None:
        """A line that stays, beside whatever the job is doing."""

    def update(self, progress: Progress) -> None: ...


def display(name: str, stream: TextIO) -> Display:
    """A live display where `stream` is a terminal, else plain lines."""
    return _Live(name, stream) if stream.isatty() else Lines(stream)


@dataclass(slots=True)
class _Phase:
    text: str
    detail: str
    began: float

    def describe(self) -> str:
        return f"{self.text}: {self.detail}" if self.detail else self.text


class Lines:
    """Plain lines, for logs: each phase once and again while it lasts, the state when it changed, at most every
    `every` seconds."""

    def __init__(
        self, stream: TextIO, every: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream, self.every, self.clock = stream, every, clock
        self._phase: _Phase | None = None
        self._told = 0.0  # when the phase was
        self._rows_came = False
        self._last = (float("-inf"), "", False)  # the state: when it was told, how, and whether stalled
        self._lock = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> Lines:
        threading.Thread(target=self._repeat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def phase(self, text: str, detail: str = "") -> None:
        with self._lock:
            if self._phase and self._phase.text == text:
                self._phase.detail = detail
                return
            self._told = self.clock()
            self._phase = _Phase(text, detail, self._told)
            self._print(self._phase.describe())

    def note(self, text: str) -> None:
        with self._lock:
            self._print(text)

    def update(self, progress: Progress) -> None:
        now, line, stalled = self.clock(), describe(progress), progress.stalled > 0
        with self._lock:
            if progress.captioned and not self._rows_came:  # which ends the phase
                self._rows_came, self._phase = True, None
            when, before, was_stalled = self._last
            over = progress.done >= progress.total
            due = stalled != was_stalled or now - when >= (_STALLED_SECONDS if stalled else self.every)
            if line != before and (over or due):
                self._last = (now, line, stalled)
                self._print(line)

    def tell_again(self) -> None:
        """Tells the phase again if it has lasted; called every second."""
        with self._lock:
            now = self.clock()
            if self._phase and now - self._told >= _REPEAT_SECONDS:
                self._told = now
                self._print(f"{self._phase.describe()} ({_elapsed(now - self._phase.began)})")

    def _repeat(self) -> None:
        while not self._over.wait(1.0):
            self.tell_again()

    def _print(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


class _Live:
    """A bar and the numbers beside it, redrawn in place; below them a phase or a stall, while there is one."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name = name
        self._phase: _Phase | None = _Phase("starting", "", time.monotonic())
        self._progress: Progress | None = None
        self._over = False
        self.live = Live(
            console=Console(file=stream),
            get_renderable=self._render,  # again and again: the phase's clock runs on
            refresh_per_second=8,
            transient=False,
        )

    def __enter__(self) -> _Live:
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self.live.__exit__(kind, error, trace)

    def phase(self, text: str, detail: str = "") -> None:
        if self._phase and self._phase.text == text:
            self._phase.detail = detail
        else:
            self._phase = _Phase(text, detail, time.monotonic())
        self.live.refresh()

    def note(self, text: str) -> None:
        self.live.console.print(text, style="dim", highlight=False, markup=False)

    def update(self, progress: Progress) -> None:
        before = self._progress
        if progress.captioned and not (before and before.captioned):  # the first row ends the phase
            self._phase = None
        self._progress = progress if progress.captioned or progress.stalled else None

    def _render(self) -> RenderableType:
        progress, phase = self._progress, self._phase
        lines: list[RenderableType] = [Figures(self.name, progress)] if progress else []
        if phase and not (progress and self._over):
            elapsed = "" if self._over else f" {_elapsed(time.monotonic() - phase.began)}"
            name = "" if progress else f"{self.name}  "
            lines.append(Text.assemble((name, "bold"), (f"{phase.describe()} ...{elapsed}", "dim")))
        if progress and progress.waiting_for:
            lines.append(Text(progress.waiting_for, "yellow"))
        return Group(*lines)


@dataclass(frozen=True, slots=True)
class Figures:
    """Renders the bar and the figures in one line. Where there is no room for all, the bar goes first, then the name,
    then the figures that matter least; none is ever cut."""

    name: str
    progress: Progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        progress = self.progress
        name, bar = Text(self.name, "bold"), Text(" " * _BAR)
        count = Text(f"{progress.done:,}/{progress.total:,}", "green")
        rows, tokens = map(Text, _rates(progress.rates) if progress.rates else ("", ""))
        errors = Text(_errors(progress), "red" if progress.errors else "dim")
        left = Text(_stalled(progress), "yellow") if progress.stalled else Text()
        if progress.eta is not None:
            left = Text(f"ETA {progress.eta}", "cyan")
        shown = [part for part in (name, bar, count, rows, tokens, errors, left) if part]
        for part in (bar, name, tokens, errors, rows, left):
            if sum(other.cell_len for other in shown) + 2 * (len(shown) - 1) <= options.max_width:
                break
            shown = [other for other in shown if other is not part]
        table = Table.grid(padding=(0, 2))
        for _ in shown:
            table.add_column(no_wrap=True)
        filled = ProgressBar(total=max(progress.total, 1), completed=progress.done, width=_BAR)
        table.add_row(*(filled if part is bar else part for part in shown))
        yield table
