"""What a person sees while a job runs: one live line on a terminal, plain lines anywhere else.

A display is told the state (`Progress`) and nothing more; it keeps no counts of its own, so it can never
disagree with the ledger that the state was read from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Progress:
    """A job at a moment. Counts are of the whole output; rates are of this run only.

    Attributes:
        done: Rows in the ledger, of `total`; `errors` of them carry one.
        captioned: Rows that this run added, with `generated_tokens` tokens, in `seconds` (Ray's start included).
    """

    total: int
    done: int
    errors: int
    captioned: int
    generated_tokens: int
    seconds: float

    @property
    def rows_per_s(self) -> float:
        return self.captioned / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0

    def record(self) -> dict[str, Any]:
        """What is kept of a run that ended here, under _tessera/runs."""
        return {
            "captioned": self.captioned,
            "generated_tokens": self.generated_tokens,
            "seconds": round(self.seconds, 3),
            "rows_per_s": round(self.rows_per_s, 3),
            "tokens_per_s": round(self.tokens_per_s, 3),
        }

    @property
    def eta(self) -> timedelta | None:
        """Time to the last row at this run's pace; None while there is no pace."""
        return (
            timedelta(seconds=round((self.total - self.done) / self.rows_per_s)) if self.rows_per_s else None
        )


def describe(progress: Progress) -> str:
    """The state as one plain line."""
    share = progress.done / progress.total if progress.total else 1.0
    eta = f", ETA {progress.eta}" if progress.eta and progress.done < progress.total else ""
    errors = f", {_errors(progress)}" if progress.errors else ""
    return (
        f"{progress.done:,} / {progress.total:,} rows ({share:.0%}), {progress.rows_per_s:,.1f} rows/s, "
        f"{progress.tokens_per_s:,.0f} tokens/s{errors}{eta}"
    )


def _errors(progress: Progress) -> str:
    return f"{progress.errors:,} error{'s' * (progress.errors != 1)}"


class Display(Protocol):
    """Shows a job's phases and progress; used as a context manager around the run."""

    def __enter__(self) -> Display: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def phase(self, text: str) -> None:
        """What the job is doing, for the stretches in which no row finishes."""

    def update(self, progress: Progress) -> None: ...


def display(name: str, stream: TextIO) -> Display:
    """A live display where `stream` is a terminal, else plain lines."""
    return _Live(name, stream) if stream.isatty() else Lines(stream)


class Lines:
    """Plain lines, for logs: each phase once, then the state when it changed, at most every `every` seconds."""

    def __init__(self, stream: TextIO, every: float = 10.0) -> None:
        self.stream, self.every = stream, every
        self._last: tuple[float, str] = (float("-inf"), "")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def phase(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def update(self, progress: Progress) -> None:
        now, line = time.monotonic(), describe(progress)
        over = progress.done >= progress.total
        if line != self._last[1] and (over or now - self._last[0] >= self.every):
            self._last = (now, line)
            print(line, file=self.stream, flush=True)


class _Live:
    """A bar and the numbers beside it, redrawn in place."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name = name
        self.console = Console(file=stream)
        self.live = Live(console=self.console, refresh_per_second=8, transient=False)
        self._phase = "starting"
        self._progress: Progress | None = None

    def __enter__(self) -> _Live:
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.__exit__(kind, error, trace)

    def phase(self, text: str) -> None:
        self._phase = text
        self.live.update(self._render(), refresh=True)

    def update(self, progress: Progress) -> None:
        self._progress = progress
        self.live.update(self._render())

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 2))
        progress = self._progress
        if progress is None or not progress.captioned:
            table.add_row(Text(self.name, "bold"), Text(f"{self._phase} ...", "dim"))
            return table
        numbers = [Text(f"{progress.done:,}/{progress.total:,}", "green")]
        numbers.append(Text(f"{progress.rows_per_s:,.1f} rows/s"))
        numbers.append(Text(f"{progress.tokens_per_s:,.0f} tokens/s"))
        numbers.append(Text(_errors(progress), "red" if progress.errors else "dim"))
        if progress.done < progress.total:
            numbers.append(Text(f"ETA {progress.eta}", "cyan"))
        bar = ProgressBar(total=max(progress.total, 1), completed=progress.done, width=30)
        table.add_row(Text(self.name, "bold"), bar, *numbers)
        return table
