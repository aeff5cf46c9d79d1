"""Throughput, ETA and stalls: what is measured of a run while it goes on.

Rows arrive in blocks, and the first ones only after minutes of loading. So rates are taken between arrivals, over the
last minute, and the clock starts when a model is loaded (or at the first arrival, where that was not seen).
"""

from collections import deque
from dataclasses import replace

from pipeline.run.progress import Progress, Rates

WINDOW_SECONDS = 60.0
STALL_SECONDS = 60.0  # without a new row, after which a run is told to be stalled


class Pace:
    """Takes note of each look at a run; times are in seconds on any one clock."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, int, int]] = deque()  # when; rows and tokens of the run by then
        self._moved: float | None = None

    def of(self, now: float, progress: Progress) -> Progress:
        """`progress` with its rates, and with `stalled` where no row came for STALL_SECONDS."""
        new = progress.captioned > (self._arrivals[-1][1] if self._arrivals else 0)
        if new or (progress.loaded and not self._arrivals):
            self._arrivals.append((now, progress.captioned, progress.generated_tokens))
        if new or self._moved is None:
            self._moved = now
        while len(self._arrivals) > 2 and self._arrivals[0][0] < now - WINDOW_SECONDS:
            self._arrivals.popleft()
        idle = now - self._moved
        return replace(progress, rates=self._rates(now), stalled=idle if idle >= STALL_SECONDS else 0.0)

    def _rates(self, now: float) -> Rates | None:
        gaps = len(self._arrivals) - 1
        if gaps < 1:
            return None
        (first, *before), (last, *after) = self._arrivals[0], self._arrivals[-1]
        # The gap that is open now counts once it is longer than the others: a run that slows down shows it.
        seconds = max(last - first, (now - first) * gaps / (gaps + 1))
        return Rates(*((late - early) / seconds for early, late in zip(before, after, strict=True)))
