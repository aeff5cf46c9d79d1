"""What `benchmarks.device` writes: to the terminal and, line by line, to a file that a cut-off leaves whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

PART_SECONDS = 520.0


class Report:
    """The report, and the clock of the run: a part may take `PART_SECONDS`, the run `budget` seconds if given."""

    def __init__(self, path: Path, budget: float | None) -> None:
        self.path, self.budget = path, budget
        self.begin = self._part = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)

    def write(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(f"{text}\n")

    def say(self, text: str) -> None:
        """A line with the seconds since the start."""
        self.write(f"- {time.perf_counter() - self.begin:.1f} s: {text}")

    def block(self, text: str) -> None:
        self.write(f"```\n{text}\n```")

    def begin_part(self, name: str) -> None:
        self._part = time.perf_counter()
        self.write(f"\n## {name}\n")

    @property
    def left(self) -> float:
        """Seconds that the current part may still take."""
        now = time.perf_counter()
        left = self._part + PART_SECONDS - now
        return left if self.budget is None else min(left, self.begin + self.budget - now)


class LogLines(logging.Handler):
    """What the engine logs goes into the report."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.INFO)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        self.report.say(f"log: {record.getMessage()}")


@dataclass(frozen=True)
class Result:
    """One system over one workload: a line of the table. None: not measured for that system."""

    family: str
    size: str
    workload: str
    system: str
    rows: int
    images_per_s: float
    rows_per_s: float
    tokens_per_s: float
    prompt_tokens: int
    """Of a row, on average."""
    times_generate: float | None = None
    prefill_mfu: float | None = None
    decode_bandwidth: float | None = None
    host_ms: float | None = None
    """Milliseconds of a full decode step in which the device waits for the host; None on a CPU."""
    step_ms: float | None = None
    """Milliseconds of a full decode step."""
    encoding: float | None = None
    """Share of the pass in which images are encoded."""

    def rounded(self) -> dict[str, object]:
        """Figures to four digits."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in values.items()
        }

    def line(self) -> str:
        first = " ".join((self.family, self.size, self.workload, self.system))
        others = list(self.rounded().items())[4:]
        return f"{first}: " + ", ".join(f"{name} {value}" for name, value in others if value is not None)


def table(results: Sequence[Result]) -> str:
    """In Markdown, a line a result."""
    names = [field.name for field in fields(Result)]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for result in results:
        cells = result.rounded().values()
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)
