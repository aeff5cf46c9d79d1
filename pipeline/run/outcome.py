"""How a run ended: the figures for people and for the run's record, or one sentence about what broke."""

from __future__ import annotations

import os.path
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.input.shards import CHANGED, FailedShard, Input
from pipeline.ledger.entries import RowStats
from pipeline.ledger.state import Verification
from pipeline.spec.job_spec import JobSpec, LimitsSpec

_NAMED = 3  # failed shards in a message; the run's record has them all


class JobError(RuntimeError):
    """The job broke; what was published before is kept, and running it again goes on from there."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished job. `stats`, `failed` (shards that cannot be read, wholly or in part) and `notes` are of the whole
    job; the other counts and `seconds` of this run only."""

    name: str
    output: str
    stats: RowStats
    failed: tuple[FailedShard, ...] = ()
    notes: tuple[str, ...] = ()
    captioned: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    storage_retries: int = 0

    @classmethod
    def of(
        cls,
        spec: JobSpec,
        found: Input,
        verification: Verification,
        failed: tuple[FailedShard, ...],
        **figures: Any,
    ) -> Outcome:
        """The outcome of a job whose output is verified; `figures` are the fields of this run."""
        notes = (*found.notes(), *notes_of(verification.foreign))
        return cls(spec.name, spec.output.path, verification.stats, failed, notes, **figures)

    @property
    def rows(self) -> int:
        return self.stats.rows

    @property
    def errors(self) -> int:
        return self.stats.failed

    @property
    def failed_fraction(self) -> float:
        return self.errors / self.rows if self.rows else 0.0

    def describe(self) -> str:
        """The result in one line, and one more for each note."""
        return "\n".join([self._result(), *self.notes])

    def failure(self, limits: LimitsSpec) -> str | None:
        """One sentence about what failed beyond the job's limits, if anything did."""
        reasons = []
        if len(self.failed) > limits.max_failed_shards:
            damaged = any(shard.reason != CHANGED for shard in self.failed)
            reasons.append(
                f"{shards_told(self.failed)}; that is more than limits.max_failed_shards={limits.max_failed_shards} "
                f"allows{': repair or remove them and run again' * damaged}"
            )
        if self.failed_fraction > limits.max_failed_fraction:
            reasons.append(
                f"{self.errors:,} of {self.rows:,} rows failed ({self.failed_fraction:.1%}), more than "
                f"limits.max_failed_fraction={limits.max_failed_fraction:g} allows"
            )
        return "; ".join([*reasons, "all captions and errors are in the output"]) if reasons else None

    def _result(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.stats.errors.items())
        errors = f"{self.errors:,} errors ({kinds})" if self.errors else "no errors"
        if not self.captioned:
            rows = f"{self.rows:,} rows" + (" of the readable shards" if self.failed else "")
            return f"{self.name}: nothing to do, all {rows} are captioned in {self.output} ({errors})"
        return (
            f"{self.name}: {self.rows:,} rows in {self.output}, {errors}; {self.captioned:,} of them now, in "
            f"{self.seconds:,.1f} s: {self.captioned / self.seconds:,.1f} rows/s, "
            f"{self.generated_tokens / self.seconds:,.0f} tokens/s"
            + (f"; {self.storage_retries:,} storage retries" if self.storage_retries else "")
        )

    def record(self) -> dict[str, Any]:
        """What is kept of the run under _tessera/runs."""
        return {
            "rows": self.rows,
            "errors": dict(self.stats.errors),
            "failed_shards": {shard.name: shard.reason for shard in self.failed},
            "captioned": self.captioned,
            "generated_tokens": self.generated_tokens,
            "seconds": round(self.seconds, 3),
            "rows_per_s": round(self.captioned / self.seconds, 3),
            "tokens_per_s": round(self.generated_tokens / self.seconds, 3),
        }


def shards_told(failed: Sequence[FailedShard]) -> str:
    """`1 shard failed: s3://b/in/x.parquet is empty (0 bytes)`; of many, the first three."""
    more = f" and {len(failed) - _NAMED:,} more" if len(failed) > _NAMED else ""
    named = ", ".join(map(str, failed[:_NAMED]))
    return f"{len(failed):,} shard{'s' * (len(failed) != 1)} failed: {named}{more}"


def notes_of(foreign: Sequence[str]) -> list[str]:
    """What people are told of files whose shards left the input: they stay, and count for nothing."""
    if not foreign:
        return []
    names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
    return [
        f"note: the input no longer has the shards of {len(foreign):,} files of the output, which stay: {names}"
    ]


def root_cause(error: BaseException) -> str:
    """The one line that says what went wrong.

    Ray wraps an exception of a task or actor several times over. Most wraps hold the exception (`cause`); that of an
    actor's batch keeps nothing of it but the remote traceback, in the outermost wrap's text.
    """
    wraps = [error]
    while isinstance(inner := getattr(wraps[-1], "cause", None), BaseException):
        wraps.append(inner)
    for wrap in (*reversed(wraps), error):
        if raised := _raised_in(str(wrap)):
            return raised
        if str(wrap).strip() and not str(wrap).startswith("UDF failed to process a data block"):
            return _told(type(wrap), str(wrap).strip().partition("\n")[0])
    return type(wraps[-1]).__name__


def _raised_in(traceback: str) -> str:
    """The last exception of a remote traceback that is not Ray's own, as one line; empty where there is none."""
    raised, place = "", ""
    for line in traceback.splitlines():
        if frame := re.match(r'\s+File "(.*)", line (\d+), in (.*)', line):
            place = f"in {frame[3]} ({os.path.basename(frame[1])}:{frame[2]})"
        # What follows the frames and their source is the exception
        elif place and line and not line[0].isspace():
            name, _, message = line.rstrip(": ").partition(": ")
            # An empty one says less than its cause
            if not name.startswith("ray.") and (message or not raised):
                raised = _told(_exception(name), message, name.rpartition(".")[2], place)
            place = ""
    return raised


def _exception(name: str) -> type[BaseException]:
    """The exception of a qualified name that a traceback shows, where it is Python's or ours."""
    module, _, kind = name.rpartition(".")
    found = getattr(sys.modules.get(module or "builtins"), kind, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else Exception


def _told(kind: type[BaseException], message: str, name: str = "", place: str = "") -> str:
    """Our own errors and those of the system are sentences; others need their name, and a bug its place."""
    ours = kind.__module__.startswith(("pipeline.", "actors.", "ray."))
    if message and (ours or issubclass(kind, OSError)):
        return message
    named = ": ".join(filter(None, (name or kind.__name__, message)))
    return f"{named}, {place}" if place and kind.__module__ == "builtins" and kind is not Exception else named
